"""``ai4all-native demo``: the whole way on one machine, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from ai4all.benchmark.store import BenchmarkStore
from ai4all.commands.demo_screen import DemoScreen
from ai4all.commands.environment import (
    Environment,
    log_to_terminal,
    print_json,
    read_settings,
    stderr_console,
    stdout_console,
)
from ai4all.commands.failure import EXIT_FAILURE
from ai4all.commands.promises import Promises
from ai4all.commands.station import Station, prepare_station
from ai4all.config import Settings
from ai4all.coordinator import EmbeddedCoordinator, Outcome, TaskSpec
from ai4all.data_dir_lock import hold_data_dir
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.delivery.spool import MemorySpool
from ai4all.errors import DeviceUnavailable, LinkError
from ai4all.first_run import prepare_data_dir
from ai4all.protocol.connection import LinkOptions
from ai4all.types.task import TextCompletionOutput
from ai4all.worker import Worker, WorkerOptions
from ai4all.worker_events import Degraded, WorkerEvent

__all__ = ["demo_tasks", "run_demo"]

_SYSTEM_PROMPT = "You are a helpful assistant. Answer in two or three sentences."
_QUESTIONS = (
    "Why is sea water salty?",
    "What does a compiler do?",
    "How do bees find their way back to the hive?",
    "Why do we have leap years?",
    "What makes bread rise?",
)
_MAX_TOKENS = 64


def run_demo(
    environment: Environment,
    config: Path | None,
    data_dir: Path | None,
    tasks: int,
    model: str | None,
    *,
    as_json: bool,
    device: str | None = None,
    gpu_layers: str | None = None,
    in_process: bool = False,
) -> None:
    """Set up, compute ``tasks`` blocks for an embedded coordinator, print what came of them.

    Raises:
        ConfigError: The settings are wrong.
        DataDirectoryError: The data directory cannot be used, or another process works in it.
        ModelError: A model cannot be had.
        typer.Exit: With status 1, when a block was not computed or not accepted.
    """
    settings = read_settings(
        config,
        data_dir,
        worker__model=model,
        engine__device=device,
        engine__gpu_layers=gpu_layers,
        isolation__in_process=in_process or None,
    )
    prepare_data_dir(settings.data_dir)
    log_to_terminal(settings)
    with hold_data_dir(settings.data_dir, "demo"):
        document = asyncio.run(_demo(environment, settings, tasks, as_json=as_json))
    if as_json:
        print_json(document)
    if not all(row["accepted"] and row["success"] for row in document["results"]):
        raise typer.Exit(EXIT_FAILURE)


def demo_tasks(count: int, model_id: str, *, has_chat_template: bool) -> list[TaskSpec]:
    """Questions of our own, as tasks; the same on every run, and answered greedily."""
    tasks = []
    for number in range(count):
        question = _QUESTIONS[number % len(_QUESTIONS)]
        task_input: dict[str, Any] = {
            "prompt": question,
            "max_tokens": _MAX_TOKENS,
            "temperature": 0.0,
        }
        if has_chat_template:
            task_input["system_prompt"] = _SYSTEM_PROMPT
        else:
            task_input["prompt"] = f"Question: {question}\nAnswer:"
        tasks.append(TaskSpec(block_id=f"demo-{number + 1}", input=task_input, model_id=model_id))
    return tasks


async def _demo(
    environment: Environment, settings: Settings, count: int, *, as_json: bool
) -> dict[str, Any]:
    station = await prepare_station(environment, settings, stderr_console())
    header = await asyncio.to_thread(station.store.header, station.model)
    tasks = demo_tasks(
        count,
        station.model.model_id,
        has_chat_template="tokenizer.chat_template" in header.metadata,
    )
    benchmarks = BenchmarkStore(settings.data_dir)
    screen = None
    if not as_json:
        prompts = {str(task.block_id): str(task.input["prompt"]) for task in tasks}
        screen = DemoScreen(stdout_console(), prompts)
    benchmark = benchmarks.latest()
    if screen is not None and benchmark is not None:
        screen.print_benchmark(benchmark)
    outcomes, build = await _compute(environment, settings, station, benchmarks, tasks, screen)
    if screen is not None:
        screen.print_table()
    return {
        "results": [_row(task, outcomes) for task in tasks],
        "benchmark": benchmark.model_dump(mode="json") if benchmark is not None else None,
        "worker_id": station.worker_id,
        "model": {
            "model_id": station.model.model_id,
            "sha256": station.model.sha256,
            "size_bytes": station.model.size_bytes,
        },
        "engine_build": build,
        "data_dir": str(settings.data_dir),
    }


async def _compute(
    environment: Environment,
    settings: Settings,
    station: Station,
    benchmarks: BenchmarkStore,
    tasks: Sequence[TaskSpec],
    screen: DemoScreen | None,
) -> tuple[Mapping[str, Outcome], str]:
    """Run a worker against a coordinator until every task has ended.

    Raises:
        DeviceUnavailable: The worker would wait for its device, and nobody here for the worker.
    """
    refusing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def observe(event: WorkerEvent) -> None:
        if screen is not None:
            screen.show(event)
        if isinstance(event, Degraded) and event.refusing and not refusing.done():
            refusing.set_exception(DeviceUnavailable(f"the worker is degraded: {event.reason}"))

    async with (
        EmbeddedCoordinator(tasks) as coordinator,
        environment.open_backend_for_blocks(settings) as backend,
    ):
        build = backend.capabilities().engine_build
        engine = settings.engine_options()
        promises = Promises(benchmarks, station.model.sha256, build)
        options = WorkerOptions(
            worker_id=station.worker_id,
            score_for=promises.score_on,
            health=promises.health(backend.capabilities(), engine),
            engine=engine,
            engine_for=lambda model: station.options_for(model, engine, backend.capabilities()),
            preload=station.model,
            stop_grace=settings.worker.stop_grace_seconds,
        )
        worker = Worker(
            backend,
            station.models,
            # Not the spool on disk: its results belong to another coordinator.
            MemorySpool(),
            LinkOptions(url=coordinator.url),
            Attempts(Backoff(max_attempts=5)),
            options,
            observe,
        )
        working = asyncio.ensure_future(worker.run())
        finished = asyncio.ensure_future(coordinator.finished())
        try:
            ended = asyncio.FIRST_COMPLETED
            await asyncio.wait({working, finished, refusing}, return_when=ended)
            if refusing.done():
                await refusing
            if not finished.done():
                await working
                raise LinkError("the worker ended before the tasks did")
            await finished
            worker.stop()
            await working
        finally:
            for task in (working, finished, refusing):
                task.cancel()
            await asyncio.gather(working, finished, refusing, return_exceptions=True)
        return coordinator.outcomes, build


def _row(task: TaskSpec, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    outcome = outcomes[str(task.block_id)]
    result = outcome.result
    output = result.output
    completed = output if isinstance(output, TextCompletionOutput) else None
    return {
        "block_id": outcome.block_id,
        "accepted": outcome.accepted,
        "success": result.success,
        "prompt": task.input["prompt"],
        "text": completed.text if completed is not None else None,
        "finish_reason": completed.finish_reason.value if completed is not None else None,
        "usage": completed.usage.model_dump(mode="json") if completed is not None else None,
        "error": result.error.model_dump(mode="json") if result.error is not None else None,
        "metrics": result.metrics.model_dump(mode="json"),
        "fingerprint": (
            result.fingerprint.model_dump(mode="json") if result.fingerprint is not None else None
        ),
    }
