"""The control plane: what a task costs beside its computation (P3), and how many go through (P8).

A worker and an embedded coordinator share one process and one event loop, so every figure holds
both sides of the wire. Logs go to a file, as the command line sets them up. A commit to the spool
waits for the disk: put it on the disk in question with ``--basetemp``, and read the rates of
``extra_info`` beside that of bare ``fsync`` calls, which is there too.
"""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_plane import ControlPlane, fsyncs_per_second, logging_to_file
from tiny_gguf import write_tiny_gguf

from ai4all.backend.base import EngineOptions, GenerateRequest, InferenceBackend
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
"""The null backend, and every one that this build has."""

ENGINE = EngineOptions(n_ctx=512, n_slots=4, threads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = write_tiny_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return ModelFile("benchmark", path, sha256, path.stat().st_size)


@pytest.fixture(autouse=True)
def _logs(tmp_path: Path) -> Iterator[None]:
    with logging_to_file(tmp_path):
        yield


def task_input(max_tokens: int) -> dict[str, Any]:
    return {
        "prompt": "the river and the sea",
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }


def request(max_tokens: int) -> GenerateRequest:
    return GenerateRequest(repetition_penalty=1.0, **task_input(max_tokens))


def opener(kind: str, directory: Path) -> Callable[[], ResultSpool]:
    if kind == "memory":
        return MemorySpool
    return lambda: Spool.open(directory / "results.sqlite3")


@pytest.mark.parametrize("spool", ["memory", "disk"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_task_overhead(
    benchmark: Any, tiny: ModelFile, tmp_path: Path, kind: str, spool: str
) -> None:
    """P3: a task through the socket, less the same generation asked of the backend directly.

    ``overhead_ms`` runs from the assignment at the coordinator until it has read the result.
    """
    inside: list[float] = []
    outside: list[float] = []

    async def directly(backend: InferenceBackend) -> None:
        for _ in range(ALONE):
            started = time.perf_counter()
            await backend.complete(request(16))
            inside.append(time.perf_counter() - started)

    with ControlPlane(tiny, BACKENDS[kind], opener(spool, tmp_path), engine=ENGINE) as plane:

        def prepare() -> None:
            plane.run(directly(plane.backend))
            plane.add(ALONE, task_input(16))

        def one_after_the_other() -> None:
            outside.extend(plane.finish())

        benchmark.pedantic(one_after_the_other, setup=prepare, rounds=10, warmup_rounds=1)
        assert all(o.accepted and o.result.success for o in plane.coordinator.outcomes.values())
    assert len(outside) == len(inside)
    if benchmark.stats is not None:
        overhead = statistics.median(outside) - statistics.median(inside)
        benchmark.extra_info |= {
            "overhead_ms": round(overhead * 1e3, 3),
            "in_process_ms": round(statistics.median(inside) * 1e3, 3),
            "fsyncs_per_second": round(fsyncs_per_second(tmp_path)),
        }


@pytest.mark.parametrize("spool", ["memory", "disk"])
@pytest.mark.parametrize("in_flight", [1, 32])
def test_throughput(
    benchmark: Any, tiny: ModelFile, tmp_path: Path, in_flight: int, spool: str
) -> None:
    """P8: tasks of one token of a backend that computes nothing, until they are acknowledged."""
    with ControlPlane(tiny, FakeBackend, opener(spool, tmp_path), in_flight=in_flight) as plane:
        delivered = 0

        def all_of_them() -> None:
            nonlocal delivered
            delivered += len(plane.finish())

        benchmark.pedantic(
            all_of_them, setup=lambda: plane.add(TASKS, task_input(1)), rounds=8, warmup_rounds=1
        )
        outcomes = plane.coordinator.outcomes
        assert delivered == len(outcomes)
        assert all(outcome.accepted and outcome.result.success for outcome in outcomes.values())
    if benchmark.stats is not None:
        benchmark.extra_info |= {
            "tasks_per_second": round(TASKS / benchmark.stats.stats.median),
            "fsyncs_per_second": round(fsyncs_per_second(tmp_path)),
        }


@pytest.mark.parametrize("kind", [name for name in BACKENDS if name != "fake"])
def test_loop_lag_while_generating(
    benchmark: Any, tiny: ModelFile, tmp_path: Path, kind: str
) -> None:
    """P8: how late the loop is while four sequences stream as fast as the tiny model can."""
    lags: list[float] = []

    async def watched(work: Any) -> None:
        watching = asyncio.ensure_future(watch_lag(lags))
        try:
            await work
        finally:
            watching.cancel()

    with ControlPlane(
        tiny, BACKENDS[kind], opener("disk", tmp_path), in_flight=4, engine=ENGINE, heartbeat_ms=100
    ) as plane:
        benchmark.pedantic(
            lambda: plane.run(watched(plane.coordinator.finished())),
            setup=lambda: plane.add(16, task_input(200)),
            rounds=8,
            warmup_rounds=1,
        )
        outcomes = plane.coordinator.outcomes
        assert all(outcome.accepted and outcome.result.success for outcome in outcomes.values())
    if benchmark.stats is not None:
        in_order = sorted(lags)
        benchmark.extra_info |= {
            "lag_ms_p50": round(in_order[len(in_order) // 2] * 1e3, 3),
            "lag_ms_p99": round(in_order[len(in_order) * 99 // 100] * 1e3, 3),
            "lag_ms_max": round(in_order[-1] * 1e3, 3),
            "samples": len(in_order),
        }


async def watch_lag(lags: list[float], interval: float = 0.001) -> None:
    """Gather by how much the loop wakes up later than asked, in seconds."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + interval
        await asyncio.sleep(interval)
        lags.append(max(0.0, clock() - due))
