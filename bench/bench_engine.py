"""What the road from native code to a coroutine costs: wake-up, the token loop, slots.

The tiny model computes next to nothing, so these rows measure our part of a step: queue, batch,
sampling, text, events, descriptor, drain, stream.
"""

from __future__ import annotations

import asyncio
import hashlib
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from tiny_gguf import write_tiny_gguf

from ai4all import _engine
from ai4all.backend.base import EngineOptions, GenerateRequest
from ai4all.backend.native import NativeBackend
from ai4all.types.model import ModelFile


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf")


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def request(max_tokens: int, prompt: str = "Hello, world!") -> GenerateRequest:
    return GenerateRequest(
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0.0,
        repetition_penalty=1.0,
        ignore_eos=True,
    )


def opened(loop: asyncio.AbstractEventLoop, tiny: Path, n_slots: int) -> NativeBackend:
    sha256 = hashlib.sha256(tiny.read_bytes()).hexdigest()
    backend = NativeBackend()
    file = ModelFile("tiny", tiny, sha256, tiny.stat().st_size)
    options = EngineOptions(n_ctx=512, n_slots=n_slots, threads=1)
    loop.run_until_complete(backend.load(file, options))
    return backend


def test_wake_up(benchmark: BenchmarkFixture) -> None:
    """From a command into the engine's thread and its answer back out of the descriptor."""
    engine = _engine.Engine(16)

    def there_and_back() -> None:
        engine.unload()
        select.select([engine], [], [])
        assert engine.drain()

    benchmark(there_and_back)
    engine.close()


def test_one_task(benchmark: BenchmarkFixture, loop: asyncio.AbstractEventLoop, tiny: Path) -> None:
    """A task of one token: the fixed cost of a generation."""
    backend = opened(loop, tiny, 1)
    benchmark(lambda: loop.run_until_complete(backend.complete(request(1))))
    loop.run_until_complete(backend.close())


def test_token_loop(
    benchmark: BenchmarkFixture, loop: asyncio.AbstractEventLoop, tiny: Path
) -> None:
    """200 tokens, each an event that a coroutine sees."""
    backend = opened(loop, tiny, 1)
    benchmark(lambda: loop.run_until_complete(backend.complete(request(200))))
    loop.run_until_complete(backend.close())


def test_prompt_chunks(
    benchmark: BenchmarkFixture, loop: asyncio.AbstractEventLoop, tiny: Path
) -> None:
    """A prompt of several chunks and one token."""
    backend = opened(loop, tiny, 1)
    prompt = "the sea " * 100
    benchmark(lambda: loop.run_until_complete(backend.complete(request(1, prompt))))
    loop.run_until_complete(backend.close())


def test_eight_slots(
    benchmark: BenchmarkFixture, loop: asyncio.AbstractEventLoop, tiny: Path
) -> None:
    """16 tasks of 25 tokens over eight slots: admission, batching, release."""
    backend = opened(loop, tiny, 8)

    async def together() -> None:
        await asyncio.gather(*(backend.complete(request(25)) for _ in range(16)))

    benchmark(lambda: loop.run_until_complete(together()))
    loop.run_until_complete(backend.close())
