"""One run of the benchmark suite, with a bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ai4all.backend.base import EngineOptions, InferenceBackend
from ai4all.benchmark.scores import BenchmarkResult
from ai4all.benchmark.store import BenchmarkStore
from ai4all.benchmark.suite import BenchmarkProgress, BenchmarkSuite
from ai4all.models.memory import load_model
from ai4all.types.model import ModelFile

__all__ = ["measure"]


async def measure(
    open_backend: Callable[[], InferenceBackend],
    model: ModelFile,
    options: EngineOptions,
    store: BenchmarkStore,
    console: Console,
) -> BenchmarkResult:
    """Run the suite on a backend of its own and keep the result; progress goes to ``console``.

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

        async with open_backend() as backend:
            await load_model(backend, model, options)
            return await BenchmarkSuite(store).run(backend, show)
