"""The search for the fastest way to run a model, and a run of the benchmark suite."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ai4all.backend.base import EngineOptions, InferenceBackend
from ai4all.benchmark.scores import BenchmarkResult
from ai4all.benchmark.store import BenchmarkStore
from ai4all.benchmark.suite import BenchmarkProgress, BenchmarkSuite
from ai4all.benchmark.tuning import TuningProgress, is_peaceful, tune
from ai4all.benchmark.tuning_store import Tuning, TuningKey, TuningStore, is_open
from ai4all.models.memory import load_model
from ai4all.types.model import ModelFile

__all__ = ["measure"]


async def measure(
    open_backend: Callable[[], InferenceBackend],
    model: ModelFile,
    options: EngineOptions,
    data_dir: Path,
    console: Console,
    *,
    tune_again: bool = False,
) -> BenchmarkResult:
    """Run the suite on a backend of its own and keep the result; progress goes to ``console``.

    The search for the fastest way to run the model goes first when none is kept, or when the one
    that is kept was disturbed and the machine is quiet now.

    Args:
        open_backend: Gives the backend.
        model: What to measure.
        options: What they leave open is filled by the search.
        data_dir: Where both results are kept.
        console: For the bar.
        tune_again: Search also when a result is kept.

    Raises:
        EngineUnavailable: No engine can run here.
        ComputeError: The load or a generation failed.
        DataDirectoryError: The result could not be kept.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("benchmark: loading the model", total=None)

        def show(step: BenchmarkProgress) -> None:
            bar.update(
                task,
                description=f"benchmark: {step.stage}",
                completed=step.tokens_done,
                total=step.tokens_total,
            )

        def show_tuning(step: TuningProgress) -> None:
            bar.update(task, description=f"tuning: {step.stage}", completed=step.share, total=1.0)

        async with open_backend() as backend:
            tunings = TuningStore(data_dir)
            tuning = await _tuning(backend, model, options, tunings, show_tuning, again=tune_again)
            if tuning is not None:
                options = tunings.options_for(options, model.sha256, backend.capabilities())
            await load_model(backend, model, options)
            return await BenchmarkSuite(BenchmarkStore(data_dir)).run(backend, show, tuning)


async def _tuning(
    backend: InferenceBackend,
    model: ModelFile,
    options: EngineOptions,
    store: TuningStore,
    show: Callable[[TuningProgress], None],
    *,
    again: bool,
) -> Tuning | None:
    if not is_open(options):
        return None
    key = TuningKey.of(model.sha256, backend.capabilities(), options)
    kept = await asyncio.to_thread(store.get, key)
    # One that was disturbed is made again as soon as the machine is quiet.
    wants_another = again or kept is None
    if not wants_another and kept is not None and not kept.is_sound:
        wants_another = await asyncio.to_thread(is_peaceful)
    if not wants_another:
        return kept
    # A draft model changes nothing about which way is the fastest.
    alone = dataclasses.replace(options, draft=None)
    tuning = await tune(backend, model, alone, progress=show)
    if not tuning.trials:
        # Not even one way could be measured: there is nothing to learn from that.
        return kept
    await asyncio.to_thread(store.save, tuning)
    return tuning
