from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_gguf

# A shell without job control starts background commands with SIGINT ignored, nohup with SIGHUP, and
# what they start inherits that. The tests send both, so they begin as in the foreground.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that really loads. Read it, copy it, do not change it."""
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def reference_model(pytestconfig: pytest.Config) -> Path:
    """The benchmark model: ``AI4ALL_TEST_MODEL``, else fetched once into pytest's cache."""
    from ai4all.models.sources import BENCHMARK_SHA256, BENCHMARK_SOURCE, fetch

    given = os.environ.get("AI4ALL_TEST_MODEL")
    if given:
        return Path(given)
    cache = pytestconfig.cache
    assert cache is not None
    final = cache.mkdir("ai4all-models") / f"{BENCHMARK_SHA256}.gguf"
    if not final.exists():
        # In a thread of its own: this one may have an event loop that is not ours to run.
        with ThreadPoolExecutor(1) as pool:
            fetching = fetch(
                BENCHMARK_SOURCE, final.with_suffix(".partial"), expected_sha256=BENCHMARK_SHA256
            )
            pool.submit(asyncio.run, fetching).result().path.rename(final)
    return final
