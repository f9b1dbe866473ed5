"""Measure us beside what a user would pick instead, on his machine, in one run.

We are measured through the Python API; beside us ``llama-bench``, ``llama-batched-bench`` and
``llama-server``, all built from the engine's own pinned source, and xllamacpp and
llama-cpp-python where they are installed (``pip install '.[bench]'``). All get the same model,
prompts and threads, and have their turns one after the other in every round. Who cannot be
measured is named with the reason.

Usage: python bench/peers.py [--rounds 5] [--only P1,P2] [--json FILE] [--picture FILE] ...
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import hashlib
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ujson
from peers_contenders import OURS, Setup
from peers_process import process
from peers_report import as_json, as_markdown, draw, print_table
from peers_rows import (
    Run,
    decode_alone,
    eight_at_once,
    first_token,
    prompt_speed,
    shared_prefix,
    speculation,
    whole_benchmark,
)
from reference import build
from rich.console import Console

from ai4all import __version__
from ai4all.backend.cores import compute_threads
from ai4all.backend.registry import build_info
from ai4all.config_places import default_data_dir
from ai4all.errors import Ai4allError, EngineUnavailable, ModelNotFound
from ai4all.models.sources import BENCHMARK_MODEL_ID, BENCHMARK_SHA256, BENCHMARK_SOURCE, fetch
from ai4all.models.store import ModelStore

ROWS: dict[str, Callable[[Run], None]] = {
    "P0": whole_benchmark,
    "P1": decode_alone,
    "P2": first_token,
    "P4": eight_at_once,
    "P5": shared_prefix,
    "P6": speculation,
    "P7": prompt_speed,
    "P9": process,
}


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="GGUF file; the benchmark model by default")
    add("--fitted", type=Path, metavar="MODEL", help="the same model, fitted to this machine")
    add("--threads", type=int, default=compute_threads(), help="default: %(default)s")
    add("--rounds", type=int, default=5, help="turns of each contender; default: %(default)s")
    add("--tokens", type=int, default=100, help="of a generation; default: %(default)s")
    add("--only", default="", metavar="ROW,...", help=f"of {', '.join(ROWS)}")
    add("--quick", action="store_true", help="one round of few tokens, to see that all works")
    add("--programs", type=Path, metavar="DIR", help="llama.cpp's programs, already built")
    add("--json", type=Path, metavar="FILE", help="write all figures of all rounds")
    add("--markdown", type=Path, metavar="FILE", help="write the table for a document")
    add("--picture", type=Path, metavar="FILE", help="draw the ratios into a PNG file")
    chosen = parser.parse_args()
    chosen.rows = [row.strip().upper() for row in chosen.only.split(",") if row.strip()] or [*ROWS]
    if unknown := [row for row in chosen.rows if row not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if chosen.quick:
        chosen.rounds, chosen.tokens = 1, 16
    for name in ("threads", "rounds", "tokens"):
        if getattr(chosen, name) < (2 if name == "tokens" else 1):
            parser.error(f"--{name} is too small")
    for path in (chosen.model, chosen.fitted):
        if path is not None and not path.is_file():
            parser.error(f"there is no file {path}")
    return chosen


@contextmanager
def model_file(given: Path | None) -> Iterator[Path]:
    """The model: as given, from the data directory, or fetched for the time of the run."""
    if given is not None:
        yield given
        return
    try:
        yield ModelStore(default_data_dir()).get(BENCHMARK_MODEL_ID).path
        return
    except ModelNotFound:
        pass
    with tempfile.TemporaryDirectory(prefix="ai4all-peers-") as directory:
        target = Path(directory) / "benchmark.gguf"
        fetching = fetch(BENCHMARK_SOURCE, target, expected_sha256=BENCHMARK_SHA256)
        yield asyncio.run(fetching).path


def keys(chosen: argparse.Namespace, run: Run) -> dict[str, Any]:
    """What the figures are only comparable with."""
    setup = run.setup
    try:
        build_line = build_info()["engine_build"]
    except EngineUnavailable:
        build_line = None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": setup.model.name,
        "model_sha256": _sha256(setup.model),
        "fitted_sha256": None if run.fitted is None else _sha256(run.fitted),
        "version": __version__,
        "build": build_line,
        "device": run.report.contenders.get(OURS, {}).get("device"),
        "machine": _machine(),
        "threads": setup.threads,
        "n_ctx": setup.n_ctx,
        "n_batch": setup.n_batch,
        "n_ubatch": setup.n_ubatch,
        "rounds": run.rounds,
        "tokens": run.tokens,
        "quick": chosen.quick,
    }


def _machine() -> str:
    from ai4all.benchmark.hardware import HardwareInfo

    hardware = HardwareInfo.detect(())
    return f"{hardware.cpu_model}, {platform.system()} {platform.machine()}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def telling(console: Console) -> Iterator[Callable[[str], None]]:
    """Say what is going on: in one line of a terminal, else line by line."""
    if not console.is_terminal:
        yield lambda text: console.print(text, markup=False, highlight=False)
        return
    with console.status("starting") as status:
        yield status.update


def measure(run: Run, rows: list[str]) -> None:
    """Measure row by row. An interrupt ends the run; what was measured before it counts."""
    for number, row in enumerate(rows):
        try:
            ROWS[row](run)
        except KeyboardInterrupt:
            for left in rows[number:]:
                run.missing(left, "everybody", "the run was interrupted")
            return


def main() -> int:
    """Measure, print, write."""
    chosen = arguments()
    # An end from outside unwinds too: no server outlives the run.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console, progress = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=160)
    try:
        with model_file(chosen.model) as model:
            setup = Setup(model=model, programs=chosen.programs or build(), threads=chosen.threads)
            with telling(progress) as tell:
                run = Run(
                    setup=setup,
                    fitted=chosen.fitted,
                    rounds=chosen.rounds,
                    tokens=chosen.tokens,
                    tell=tell,
                )
                measure(run, chosen.rows)
            measured = keys(chosen, run)
    except Ai4allError as error:
        progress.print(f"error: {error}", markup=False)
        return 1
    title = (
        f"{model.name}, {setup.threads} threads, {measured['build'] or 'no engine'},"
        f" {measured['machine']}, medians of {run.rounds} rounds"
    )
    if chosen.quick:
        title += " (quick: only to see that it works)"
    print_table(console, run.report, title)
    if chosen.json is not None:
        document = as_json(run.report, measured)
        chosen.json.write_text(ujson.dumps(document, indent=2, escape_forward_slashes=False))
    if chosen.markdown is not None:
        chosen.markdown.write_text(as_markdown(run.report))
    if chosen.picture is not None:
        try:
            draw(run.report, chosen.picture, title)
        except ImportError as error:
            progress.print(f"no picture: {error}; pip install '.[bench]'", markup=False)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
