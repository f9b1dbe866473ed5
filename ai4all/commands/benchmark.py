"""``ai4all-native benchmark``: measure, keep, and compare with the run before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ai4all.backend.base import EngineOptions, InferenceBackend
from ai4all.benchmark.scores import BenchmarkResult
from ai4all.benchmark.store import BenchmarkStore
from ai4all.benchmark.suite import BenchmarkProgress, BenchmarkSuite
from ai4all.types.model import ModelFile

__all__ = ["measure", "print_result"]


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
            await backend.load(model, options)
            return await BenchmarkSuite(store).run(backend, show)


def print_result(
    result: BenchmarkResult, previous: BenchmarkResult | None, path: Path, console: Console
) -> None:
    """Print the tables of one run and its change against ``previous``."""
    prompts = Table(title=f"Prompts: {result.model} on {result.key.device}")
    for heading in ("prompt", "tokens in", "tokens out", "first token", "whole"):
        prompts.add_column(heading, justify="left" if heading == "prompt" else "right")
    prompts.add_column("prompt speed", justify="right")
    prompts.add_column("decode speed", justify="right")
    for row in result.prompts:
        prompts.add_row(
            row.name,
            str(row.prompt_tokens),
            str(row.completion_tokens),
            f"{row.time_to_first_token_ms:.1f} ms",
            f"{row.total_ms:.0f} ms",
            _rate(row.prompt_tokens_per_second),
            _rate(row.decode_tokens_per_second),
        )
    console.print(prompts)

    scores = Table(title="Scores")
    scores.add_column("figure")
    scores.add_column("value", justify="right")
    scores.add_column("change", justify="right")
    now, before = result.scores, previous.scores if previous is not None else None
    for label, name, unit in (
        ("tokens per second", "tokens_per_second", ""),
        ("time to first token", "time_to_first_token_ms", " ms"),
        ("tokens per MiB in use", "memory_efficiency", ""),
        ("composite", "composite", ""),
    ):
        value = getattr(now, name)
        change = _change(value, getattr(before, name) if before is not None else None)
        scores.add_row(label, f"{value:.3g}{unit}" if value < 1 else f"{value:.2f}{unit}", change)
    console.print(scores)

    hardware = result.hardware
    cores = f"{hardware.usable_cores:g}" if hardware.usable_cores is not None else "?"
    console.print(
        f"{hardware.cpu_model or 'unknown processor'}, {cores} usable hardware threads, "
        f"{result.key.threads} used; {result.key.engine_build}"
    )
    if previous is not None:
        console.print(f"compared with the run of {previous.timestamp}")
    else:
        console.print("no earlier run with the same model, build, device and threads")
    # A path must come out whole to be copied, whatever the width of the terminal.
    console.print(f"kept in {path}", soft_wrap=True)


def run_measure(
    open_backend: Callable[[], InferenceBackend],
    model: ModelFile,
    options: EngineOptions,
    store: BenchmarkStore,
    console: Console,
) -> BenchmarkResult:
    """``measure`` for callers without an event loop."""
    return asyncio.run(measure(open_backend, model, options, store, console))


def _rate(tokens_per_second: float | None) -> str:
    return f"{tokens_per_second:.1f} tok/s" if tokens_per_second is not None else "-"


def _change(now: float, before: float | None) -> str:
    if before is None or before == 0.0:
        return "-"
    return f"{(now - before) / before * 100.0:+.1f} %"
