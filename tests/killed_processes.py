"""Kill a real worker before its result is acknowledged, or its engine in a block, and time it all.

Each time ``ai4all-native worker`` runs as its owner runs it, with the tiny model, and gets SIGKILL
once it has sent a result that nobody acknowledged; or its engine's process gets it in the middle of
a block. The goal: the next process delivers the same bytes within 5 s of its start; the death of an
engine is told as a retryable ``engine_crashed`` while the link stays up, and the next block
computes.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import structlog
import typer
import ujson
from rich.console import Console
from rich.progress import track
from sudden_ends import EngineKill, Redelivery, kill_after_commit, kill_engine
from tiny_gguf import write_tiny_gguf
from worker_process import own_environment, real_command

from ai4all.backend.quarantine import QUARANTINE_FILE

DELIVERED_WITHIN_S = 5.0
TOLD_WITHIN_S = 10.0


def shortcomings(workers: Sequence[Redelivery], engines: Sequence[EngineKill]) -> list[str]:
    """What falls short of the goal."""
    short = []
    for again in workers:
        if not again.is_same or again.repeats:
            short.append(f"a result came back otherwise, or too often: {again}")
        if again.seconds > DELIVERED_WITHIN_S:
            short.append(f"a result came after {again.seconds:.1f} s")
    for kill in engines:
        if (kill.code, kill.retryable, kill.drops) != ("engine_crashed", True, 0):
            short.append(f"an engine's death was seen as {kill}")
        if kill.told > TOLD_WITHIN_S:
            short.append(f"it was told after {kill.told:.1f} s")
    return short


def prepare(folder: Path) -> dict[str, str]:
    """Do the first run; gives the variables of the workers."""
    environment = own_environment(folder, write_tiny_gguf(folder / "tiny.gguf"))
    subprocess.run(real_command("benchmark"), env=environment, check=True, capture_output=True)
    return environment


async def measure(
    environment: dict[str, str], times: int, console: Console
) -> tuple[list[Redelivery], list[EngineKill]]:
    """Do both so many times, over one data directory."""
    command = real_command("worker", "--coordinator")
    workers, engines = [], []
    for _ in track(range(times), console=console, disable=not console.is_terminal, transient=True):
        workers.append(await kill_after_commit(command, environment))
        engines.append(await kill_engine(command, environment))
        # What is measured is life after each death; three of one model would end it.
        Path(environment["AI4ALL_DATA_DIR"], QUARANTINE_FILE).unlink(missing_ok=True)
    return workers, engines


def print_findings(
    workers: Sequence[Redelivery], engines: Sequence[EngineKill], console: Console
) -> None:
    """Print both."""

    def spread(values: Sequence[float]) -> str:
        return f"median {statistics.median(values):.2f} s, most {max(values):.2f} s"

    console.print(
        f"{len(workers)} workers killed before the acknowledgement: "
        f"{sum(again.is_same for again in workers)} results came again byte for byte, after the "
        f"start of the next process: {spread([again.seconds for again in workers])}"
    )
    console.print(
        f"{len(engines)} engines killed in a block: "
        f"{sum(kill.code == 'engine_crashed' for kill in engines)} told as engine_crashed after "
        f"{spread([kill.told for kill in engines])}; next block delivered after "
        f"{spread([kill.back for kill in engines])}; "
        f"links dropped: {sum(kill.drops for kill in engines)}"
    )


def main(
    times: Annotated[int, typer.Option(min=1, help="Of each.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
) -> None:
    """Kill workers and engines. The exit status is 1 when the goal is missed."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        workers, engines = asyncio.run(measure(prepare(Path(folder)), times, Console(stderr=True)))
    short = shortcomings(workers, engines)
    if as_json:
        document = {
            "workers": [asdict(again) for again in workers],
            "engines": [asdict(kill) for kill in engines],
            "short": short,
        }
        print(ujson.dumps(document, indent=2))
    else:
        console = Console(soft_wrap=True)
        print_findings(workers, engines, console)
        console.print("\n".join(short) if short else "the goal is met")
    raise typer.Exit(1 if short else 0)


if __name__ == "__main__":
    typer.run(main)
