"""What the engine's own process costs: a task, a token, a start, a death."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import statistics
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from tiny_gguf import write_tiny_gguf

from ai4all.backend.base import EngineOptions, GenerateRequest, InferenceBackend
from ai4all.backend.isolated import IsolatedBackend
from ai4all.backend.native import NativeBackend
from ai4all.backend.quarantine import Quarantine, QuarantineRules
from ai4all.errors import EngineCrashed
from ai4all.types.model import ModelFile

OPTIONS = EngineOptions(n_ctx=512, threads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = write_tiny_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf")
    return ModelFile("tiny", path, hashlib.sha256(path.read_bytes()).hexdigest(), 1)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def request(max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        prompt="Hello, world!",
        max_tokens=max_tokens,
        temperature=0.0,
        repetition_penalty=1.0,
        ignore_eos=True,
        reuse_prefix=False,
    )


@pytest.mark.parametrize("max_tokens", [1, 100])
def test_task(
    benchmark: Any, loop: asyncio.AbstractEventLoop, tiny: ModelFile, max_tokens: int
) -> None:
    """A task through the process. ``added_ms``: less the same task in this one, in turn with it.

    The tiny model decodes thousands of tokens a second, so a token's share of the cost is seen at
    its worst; ``added_cpu_us_per_token`` is the processor time of both processes.
    """
    here: list[float] = []
    there: list[float] = []
    native, isolated = NativeBackend(), IsolatedBackend()
    for backend in (native, isolated):
        loop.run_until_complete(backend.load(tiny, OPTIONS))

    def timed(backend: InferenceBackend, times: list[float]) -> None:
        started = time.perf_counter()
        loop.run_until_complete(backend.complete(request(max_tokens)))
        times.append(time.perf_counter() - started)

    benchmark.pedantic(
        lambda: timed(isolated, there),
        setup=lambda: timed(native, here),
        rounds=100,
        warmup_rounds=3,
    )
    if benchmark.stats is not None:
        pairs = zip(there, here, strict=True)
        benchmark.extra_info["added_ms"] = round(
            statistics.median(a - b for a, b in pairs) * 1e3, 3
        )
        cpu = []
        for backend in (isolated, native):
            before = _cpu_seconds(isolated)
            for _ in range(20):
                loop.run_until_complete(backend.complete(request(max_tokens)))
            cpu.append(_cpu_seconds(isolated) - before)
        per_token = (cpu[0] - cpu[1]) / 20 / max_tokens
        benchmark.extra_info["added_cpu_us_per_token"] = round(per_token * 1e6, 1)
    for backend in (native, isolated):
        loop.run_until_complete(backend.close())


def _cpu_seconds(isolated: IsolatedBackend) -> float:
    assert isolated.process_id is not None
    times = psutil.Process(isolated.process_id).cpu_times()
    return time.process_time() + float(times.user + times.system)


def test_start_and_close(benchmark: Any, loop: asyncio.AbstractEventLoop) -> None:
    """From nothing to the engine's first word, and to its end."""

    async def start() -> None:
        async with IsolatedBackend():
            pass

    benchmark.pedantic(lambda: loop.run_until_complete(start()), rounds=5, warmup_rounds=1)


def test_death(benchmark: Any, loop: asyncio.AbstractEventLoop, tiny: ModelFile) -> None:
    """From a SIGKILL under a task to the end of the next: told, started, loaded, computed."""
    backend = IsolatedBackend(quarantine=Quarantine(None, QuarantineRules(deaths=10**9)))
    loop.run_until_complete(backend.load(tiny, OPTIONS))

    async def die_and_compute() -> None:
        task = asyncio.ensure_future(backend.complete(request(400)))
        await asyncio.sleep(0.005)
        assert backend.process_id is not None
        os.kill(backend.process_id, signal.SIGKILL)
        with pytest.raises(EngineCrashed):
            await task
        await backend.complete(request(1))

    benchmark.pedantic(lambda: loop.run_until_complete(die_and_compute()), rounds=5)
    loop.run_until_complete(backend.close())
