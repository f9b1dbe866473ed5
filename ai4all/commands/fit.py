"""``ai4all-native models fit``: the encoding of a model that runs fastest on this machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ai4all.backend.cores import compute_threads
from ai4all.benchmark.fit import Encoding, FitRow, candidate_types, choose, measure_encodings
from ai4all.benchmark.tuning_store import TuningStore
from ai4all.commands.environment import (
    Environment,
    log_to_terminal,
    print_json,
    read_settings,
    stderr_console,
    stdout_console,
)
from ai4all.config import Settings
from ai4all.errors import BadRequest
from ai4all.first_run import open_store
from ai4all.models.files import hash_file
from ai4all.models.progress import show_download
from ai4all.models.reencode import BITS_PER_WEIGHT, reencode
from ai4all.models.store import MAX_ID_LENGTH, ModelStore
from ai4all.types.model import ModelFile

__all__ = ["run_fit"]

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Outcome:
    original: ModelFile
    rows: Sequence[FitRow]
    chosen: FitRow
    kept: ModelFile | None


def run_fit(
    environment: Environment,
    config: Path | None,
    data_dir: Path | None,
    model: str,
    types: str | None,
    *,
    max_perplexity_increase: float,
    rounds: int,
    use: bool,
    as_json: bool,
) -> None:
    """Re-encode ``model``, measure, and keep the winner beside it.

    Args:
        environment: Where compute comes from.
        config: Configuration file.
        data_dir: Data directory.
        model: Id or path.
        types: Names of types with commas between, or None for those worth trying.
        max_perplexity_increase: In per cent of the original's.
        rounds: Times that each file is measured.
        use: Compute with the winner from now on where the original is asked for.
        as_json: One JSON object in place of the table.

    Raises:
        BadRequest: A type that cannot be made.
        ModelError: There is no such model, or it cannot be used.
        ComputeError: It could not be computed.
        DataDirectoryError: The winner could not be kept.
    """
    wanted = _types(types)
    settings = read_settings(config, data_dir)
    log_to_terminal(settings)
    outcome = asyncio.run(
        _fit(environment, settings, model, wanted, max_perplexity_increase / 100.0, rounds)
    )
    if use:
        kept_sha256 = outcome.kept.sha256 if outcome.kept is not None else None
        open_store(settings).prefer(outcome.original.sha256, kept_sha256)
    if as_json:
        print_json(_document(outcome, max_perplexity_increase, use=use))
    else:
        _print(outcome, stdout_console(), use=use)


def _types(given: str | None) -> list[str] | None:
    if given is None:
        return None
    names = list(dict.fromkeys(name.strip().upper() for name in given.split(",") if name.strip()))
    for name in names:
        if name not in BITS_PER_WEIGHT:
            raise BadRequest(f"--types: there is no {name}; use {', '.join(BITS_PER_WEIGHT)}")
    if not names:
        raise BadRequest("--types: names no type")
    return names


async def _fit(
    environment: Environment,
    settings: Settings,
    name: str,
    wanted: list[str] | None,
    max_increase: float,
    rounds: int,
) -> _Outcome:
    store = open_store(settings)
    console = stderr_console()
    with show_download(console, name) as progress:
        original = await store.resolve(name, progress)
    header = await asyncio.to_thread(store.header, original)
    types = [t for t in wanted or candidate_types(header) if t != header.quantization]
    with _bar(console) as bar, contextlib.ExitStack() as leftovers:
        task = bar.add_task("fitting", total=1.0)
        encodings = [Encoding(header.quantization, original)]
        for type_name in types:
            bar.update(task, description=f"re-encoding as {type_name}")
            path = store.fitting_path(original, type_name)
            leftovers.callback(path.unlink, missing_ok=True)
            await reencode(
                original.path,
                path,
                type_name,
                threads=compute_threads(),
                disk_reserve_bytes=settings.models.disk_reserve_mb << 20,
            )
            encodings.append(await asyncio.to_thread(_encoding, original, type_name, path))

        def show(type_name: str, share: float) -> None:
            bar.update(task, description=f"measuring {type_name}", completed=share)

        async with environment.open_backend_for_blocks(settings) as backend:
            options = TuningStore(settings.data_dir).options_for(
                settings.engine_options(), original.sha256, backend.capabilities()
            )
            rows = await measure_encodings(
                backend, encodings, options, rounds=rounds, progress=show
            )
        chosen = choose(rows, max_increase)
        kept = None
        if chosen is not rows[0]:
            kept = await asyncio.to_thread(_keep, store, original, chosen)
    return _Outcome(original, rows, chosen, kept)


def _encoding(original: ModelFile, type_name: str, path: Path) -> Encoding:
    file = ModelFile(original.model_id, path, hash_file(path), path.stat().st_size)
    return Encoding(type_name, file)


def _keep(store: ModelStore, original: ModelFile, chosen: FitRow) -> ModelFile:
    ending = f".fit-{chosen.type_name.lower()}"
    model_id = original.model_id[: MAX_ID_LENGTH - len(ending)] + ending
    return store.keep_fitted(model_id, original, chosen.type_name)


def _document(outcome: _Outcome, max_perplexity_increase: float, *, use: bool) -> dict[str, Any]:
    kept = outcome.kept
    return {
        "model_id": outcome.original.model_id,
        "sha256": outcome.original.sha256,
        "max_perplexity_increase_percent": max_perplexity_increase,
        "original": outcome.rows[0].to_dict(),
        "candidates": [row.to_dict() for row in outcome.rows[1:]],
        "chosen": outcome.chosen.type_name,
        "fitted": None
        if kept is None
        else {
            "model_id": kept.model_id,
            "path": str(kept.path),
            "sha256": kept.sha256,
            "size_bytes": kept.size_bytes,
            "fitted_from": outcome.original.sha256,
        },
        "in_use": use and kept is not None,
    }


def _print(outcome: _Outcome, console: Console, *, use: bool) -> None:
    original = outcome.rows[0]
    table = Table(title=f"{outcome.original.model_id}: as it came, and re-encoded")
    table.add_column("type")
    for heading in ("size", "perplexity", "prompt tok/s", "decode tok/s", "benchmark tok/s"):
        table.add_column(heading, justify="right")
    for row in outcome.rows:
        mark = " (chosen)" if row is outcome.chosen else ""
        table.add_row(
            row.type_name + (" (as it came)" if row is original else mark),
            f"{row.size_bytes / _MIB:.1f} MiB",
            _beside(row.perplexity, original.perplexity, row is original, "{:.3f}"),
            _times(row.prompt_tokens_per_second, original.prompt_tokens_per_second),
            _times(row.decode_tokens_per_second, original.decode_tokens_per_second),
            _times(row.tokens_per_second, original.tokens_per_second),
        )
    console.print(table)
    for row in outcome.rows:
        if row.note:
            console.print(f"{row.type_name}: {row.note}", markup=False)
    if outcome.kept is None:
        console.print("nothing is clearly faster within the bound: the model stays as it came")
        return
    kept = outcome.kept
    console.print(f"kept as {kept.model_id}, sha256 {kept.sha256}", markup=False, soft_wrap=True)
    if use:
        console.print(
            f"the worker computes {outcome.original.model_id} with it from its next start on; "
            f"`ai4all-native models remove {kept.model_id}` ends that",
            markup=False,
            soft_wrap=True,
        )
    else:
        console.print("it is used where it is named; --use puts it in the original's place")


def _beside(value: float, before: float, is_original: bool, form: str) -> str:
    text = form.format(value)
    return text if is_original else f"{text} ({(value / before - 1.0) * 100.0:+.2f} %)"


def _times(value: float, before: float) -> str:
    return f"{value:.1f} ({value / before:.2f}x)" if before else f"{value:.1f}"


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        yield bar
