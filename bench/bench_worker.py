"""The control plane: what a task costs beside its computation (P3), and how many go through (P8).

The coordinator is a process of its own that does as little as it can; ``coordinator_busy`` says how
much of the time it worked, so that it is seen not to be the limit. Logs go to a file, as the
command line sets them up. A result is on the disk before it is sent, so no task can take less than
an ``fsync``: ``fsync_ms`` has that of the same disk in the same minute. Put the data on the disk in
question with ``--basetemp``; ``ram`` is a file system in memory, where an ``fsync`` costs nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_plane import ControlPlane, Load, fsync_ms, logging_to_file
from load_coordinator import MODEL_ID
from tiny_gguf import write_tiny_gguf

from ai4all.backend.base import (
    EngineOptions,
    GenerateRequest,
    GenerationEvent,
    InferenceBackend,
)
from ai4all.backend.fake import FakeBackend
from ai4all.backend.registry import describe, open_backend
from ai4all.delivery.spool import MemorySpool, ResultSpool, Spool
from ai4all.types.model import ModelFile

TASKS = 256
"""Tasks of one timed round of the throughput."""

ALONE = 32
"""Tasks of one timed round of the overhead, one after the other."""

BACKENDS: dict[str, Callable[[], InferenceBackend]] = {
    "fake": FakeBackend,
    **{status.name: lambda name=status.name: open_backend(name) for status in describe()},
}
"""A scripted backend, and every one that this build has."""

IN_PROCESS = {"isolated": "native"}
"""What a backend is compared with where that is not itself."""

RAM = Path("/dev/shm")
SPOOLS = ["memory", *(["ram"] if RAM.is_dir() else []), "disk"]

ENGINE = EngineOptions(n_ctx=512, n_slots=4, threads=1)


class NullBackend(FakeBackend):
    """Computes nothing, not even what a fake one does: every answer is the first one."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[GenerationEvent] = []

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerationEvent, None]:
        if not self._events:
            self._events = [event async for event in super().generate(request)]
        await asyncio.sleep(0)
        for event in self._events:
            yield event


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = write_tiny_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return ModelFile(MODEL_ID, path, sha256, path.stat().st_size)


@pytest.fixture(autouse=True)
def _logs(tmp_path: Path) -> Iterator[None]:
    with logging_to_file(tmp_path):
        yield


@pytest.fixture
def directory(tmp_path: Path, spool: str) -> Iterator[Path]:
    """Where a spool of this kind has its file."""
    if spool != "ram":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=RAM) as in_memory:
        yield Path(in_memory)


def opener(kind: str, directory: Path) -> Callable[[], ResultSpool]:
    if kind == "memory":
        return MemorySpool
    return lambda: Spool.open(directory / "results.sqlite3")


def task_input(max_tokens: int) -> dict[str, Any]:
    return {
        "prompt": "the river and the sea",
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }


def request(max_tokens: int) -> GenerateRequest:
    return GenerateRequest(repetition_penalty=1.0, **task_input(max_tokens))


def note_load(benchmark: Any, loads: list[Load], directory: Path, **figures: float) -> None:
    if benchmark.stats is None:
        return  # Benchmarks are switched off: the rounds were run for their asserts.
    busy = sum(load.cpu_s for load in loads) / sum(load.wall_s for load in loads)
    benchmark.extra_info |= {
        **{name: round(value, 3) for name, value in figures.items()},
        "coordinator_busy": round(busy, 2),
        "fsync_ms": round(fsync_ms(directory), 3),
    }


@pytest.mark.parametrize("spool", SPOOLS)
@pytest.mark.parametrize("kind", BACKENDS)
def test_task_overhead(
    benchmark: Any, tiny: ModelFile, directory: Path, kind: str, spool: str
) -> None:
    """P3: a task through the socket, less the same generation in this process.

    ``overhead_ms`` runs from the assignment at the coordinator until it has read the result;
    ``socket_overhead_ms`` from the bytes of the one, as they go into its socket, until the last of
    the other are out of it, without what the coordinator does before and after.
    """
    inside: list[float] = []
    loads: list[Load] = []

    async def directly(backend: InferenceBackend) -> None:
        for _ in range(ALONE):
            started = time.perf_counter()
            await backend.complete(request(16))
            inside.append(time.perf_counter() - started)

    with ControlPlane(tiny, BACKENDS[kind], opener(spool, directory), engine=ENGINE) as plane:
        beside = plane.backend
        if kind in IN_PROCESS:
            beside = BACKENDS[IN_PROCESS[kind]]()
            plane.run(beside.load(tiny, ENGINE))
        benchmark.pedantic(
            lambda: loads.append(plane.compute(ALONE, task_input(16))),
            setup=lambda: plane.run(directly(beside)),
            rounds=10,
            warmup_rounds=1,
        )
        plane.run(beside.close())
    outside = [seconds for load in loads for seconds in load.seconds]
    at_socket = [seconds for load in loads for seconds in load.socket_seconds]
    assert len(outside) == len(at_socket) == len(inside)
    assert not any(load.failed for load in loads)
    note_load(
        benchmark,
        loads,
        directory,
        overhead_ms=(statistics.median(outside) - statistics.median(inside)) * 1e3,
        socket_overhead_ms=(statistics.median(at_socket) - statistics.median(inside)) * 1e3,
        in_process_ms=statistics.median(inside) * 1e3,
    )


@pytest.mark.parametrize("spool", SPOOLS)
@pytest.mark.parametrize("in_flight", [1, 32])
def test_throughput(
    benchmark: Any, tiny: ModelFile, directory: Path, in_flight: int, spool: str
) -> None:
    """P8: tasks of one token of a backend that computes nothing, until they are acknowledged."""
    loads: list[Load] = []
    with ControlPlane(tiny, NullBackend, opener(spool, directory), in_flight=in_flight) as plane:
        benchmark.pedantic(
            lambda: loads.append(plane.compute(TASKS, task_input(1))), rounds=10, warmup_rounds=2
        )
    assert all(len(load.seconds) == TASKS and not load.failed for load in loads)
    note_load(
        benchmark,
        loads,
        directory,
        tasks_per_second=statistics.median(TASKS / load.wall_s for load in loads),
        task_ms=statistics.median(s for load in loads for s in load.seconds) * 1e3,
    )


@pytest.mark.parametrize("spool", ["disk"])
@pytest.mark.parametrize("kind", [name for name in BACKENDS if name != "fake"])
def test_loop_lag_while_generating(
    benchmark: Any, tiny: ModelFile, directory: Path, kind: str, spool: str
) -> None:
    """P8: how late the loop is while four sequences stream as fast as the tiny model can."""
    lags: list[float] = []
    loads: list[Load] = []

    async def watched(plane: ControlPlane) -> None:
        watching = asyncio.ensure_future(watch_lag(lags))
        try:
            loads.append(await plane.computed(16, task_input(200)))
        finally:
            watching.cancel()

    with ControlPlane(
        tiny, BACKENDS[kind], opener(spool, directory), in_flight=4, engine=ENGINE
    ) as plane:
        benchmark.pedantic(lambda: plane.run(watched(plane)), rounds=8, warmup_rounds=1)
    assert not any(load.failed for load in loads)
    in_order = sorted(lag * 1e3 for lag in lags)
    note_load(
        benchmark,
        loads,
        directory,
        lag_ms_p50=in_order[len(in_order) // 2],
        lag_ms_p99=in_order[len(in_order) * 99 // 100],
        lag_ms_max=in_order[-1],
        samples=len(in_order),
    )


async def watch_lag(lags: list[float], interval: float = 0.001) -> None:
    """Gather by how much the loop wakes up later than asked, in seconds."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + interval
        await asyncio.sleep(interval)
        lags.append(max(0.0, clock() - due))
