"""``ai4all-native benchmark``: measure, keep, and compare with the run before."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ai4all.benchmark.scores import BenchmarkResult
from ai4all.benchmark.store import BenchmarkStore
from ai4all.benchmark.tuning_store import Tuning
from ai4all.commands.environment import (
    Environment,
    log_to_terminal,
    print_json,
    read_settings,
    stderr_console,
    stdout_console,
)
from ai4all.commands.measure import measure
from ai4all.commands.station import prepare_station
from ai4all.config import Settings
from ai4all.data_dir_lock import hold_data_dir
from ai4all.first_run import prepare_data_dir

__all__ = ["print_result", "run_benchmark"]


def run_benchmark(
    environment: Environment,
    config: Path | None,
    data_dir: Path | None,
    model: str | None,
    *,
    tune_again: bool = False,
    device: str | None = None,
    gpu_layers: str | None = None,
    as_json: bool,
) -> None:
    """Measure a model, by default the one of the first run, which is done if it is still due.

    Args:
        environment: Where compute comes from.
        config: Configuration file.
        data_dir: Data directory.
        model: Id or path, or None for the one that the settings name.
        tune_again: Search for the fastest way to run it also when one is kept.
        device: As ``engine.device``.
        gpu_layers: As ``engine.gpu_layers``.
        as_json: One JSON object in place of the tables.

    Raises:
        ConfigError: The settings are wrong.
        ModelError: The model cannot be had.
        ComputeError: It could not be computed.
        DataDirectoryError: The result could not be kept, or another process works in there.
    """
    settings = read_settings(
        config,
        data_dir,
        worker__model=model,
        engine__device=device,
        engine__gpu_layers=gpu_layers,
    )
    prepare_data_dir(settings.data_dir)
    log_to_terminal(settings)
    # Beside a worker of the same directory the figures would be of half a machine.
    with hold_data_dir(settings.data_dir, "benchmark"):
        result = asyncio.run(_benchmark(environment, settings, tune_again=tune_again))
    store = BenchmarkStore(settings.data_dir)
    if as_json:
        previous = store.previous(result.key)
        document = result.model_dump(mode="json")
        document["device"] = result.key.device
        document["previous"] = previous.model_dump(mode="json") if previous is not None else None
        document["path"] = str(store.latest_path)
        print_json(document)
    else:
        print_result(result, store.previous(result.key), store.latest_path, stdout_console())


async def _benchmark(
    environment: Environment, settings: Settings, *, tune_again: bool
) -> BenchmarkResult:
    station = await prepare_station(environment, settings, stderr_console())
    options = station.drafting.options_for(settings.engine_options(), station.model)
    if isinstance(station.first_benchmark, BenchmarkResult) and options.draft is None:
        measured = station.first_benchmark
        if measured.key.model_sha256 == station.model.sha256:
            # The first run has just measured it: a second measurement would say the same.
            return measured
    return await measure(
        environment.open_backend,
        station.model,
        options,
        settings.data_dir,
        stderr_console(),
        tune_again=tune_again,
    )


def print_result(
    result: BenchmarkResult, previous: BenchmarkResult | None, path: Path, console: Console
) -> None:
    """Print the tables of one run and its change against ``previous``."""
    prompts = Table(title=f"Prompts: {result.model} on {result.key.device}, times in ms")
    prompts.add_column("prompt")
    for heading in ("in", "out", "first token", "whole", "prompt tok/s", "decode tok/s"):
        prompts.add_column(heading, justify="right")
    for row in result.prompts:
        prompts.add_row(
            row.name,
            str(row.prompt_tokens),
            str(row.completion_tokens),
            f"{row.time_to_first_token_ms:.1f}",
            f"{row.total_ms:.1f}",
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

    if result.tuning is not None:
        _print_tuning(result.tuning, console)
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


def _print_tuning(tuning: Tuning, console: Console) -> None:
    table = Table(title=f"Ways to run it, tried in {tuning.seconds:.1f} s, {tuning.timestamp}")
    for heading in ("threads", "for prompts", "batch"):
        table.add_column(heading, justify="right")
    table.add_column("flash attention")
    for heading in ("prompt tok/s", "decode tok/s"):
        table.add_column(heading, justify="right")
    for trial in tuning.trials:
        table.add_row(
            str(trial.threads),
            str(trial.threads_batch),
            str(trial.ubatch),
            trial.flash_attention,
            _rate(trial.prompt_tokens_per_second),
            _rate(trial.decode_tokens_per_second),
        )
    console.print(table)
    console.print(
        f"chosen: {tuning.threads} threads, {tuning.threads_batch} for prompts, "
        f"batch {tuning.ubatch}, flash attention {tuning.flash_attention}"
    )
    if not tuning.is_complete:
        console.print("there was not time for all of it; `benchmark --tune` tries again")
    elif not tuning.is_sound:
        console.print("the machine was busy meanwhile; `benchmark --tune` tries again")


def _rate(tokens_per_second: float | None) -> str:
    return f"{tokens_per_second:.1f}" if tokens_per_second is not None else "-"


def _change(now: float, before: float | None) -> str:
    if before is None or before == 0.0:
        return "-"
    return f"{(now - before) / before * 100.0:+.1f} %"
