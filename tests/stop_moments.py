"""Stop a real worker at 200 random moments and print what is lost, and how long each stop took.

Each time ``ai4all-native worker`` is started over the same data directory, with its engine in a
process of its own, against a coordinator that has always work; SIGTERM comes while it starts, idles
or computes, and sometimes twice. Half of the workers have a grace too short for their blocks. The
goal: every process ends within 30 s, and nothing is lost or accepted twice.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import structlog
import typer
import ujson
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from stopped_workers import Findings, stop_again_and_again
from tiny_gguf import write_tiny_gguf
from worker_process import own_environment, real_command

ENDS_WITHIN_S = 30.0


def shortcomings(runs: list[Findings]) -> list[str]:
    """What falls short of the goal."""
    short = []
    for found in runs:
        if found.lost or found.accepted_twice:
            short.append(f"lost: {found.lost}, accepted twice: {found.accepted_twice}")
        if found.violations:
            short.append(f"the coordinator did not understand: {found.violations[0]}")
        for stop in found.stops:
            if stop.seconds > ENDS_WITHIN_S:
                short.append(f"a stop while {stop.phase} took {stop.seconds:.1f} s")
            # A signal that comes before the program does ends the interpreter.
            if stop.status != 0 and not (stop.status == -15 and stop.phase == "starting"):
                short.append(f"a stop while {stop.phase} ended with status {stop.status}")
    return short


def print_findings(runs: list[Findings], seed: int, console: Console) -> None:
    """Print a row for each phase, and what came of it all."""
    table = Table("signal came while", "stops", "twice", "median s", "most s", "status 0")
    stops = [stop for found in runs for stop in found.stops]
    for phase in ("starting", "idle", "busy"):
        these = [stop for stop in stops if stop.phase == phase]
        if these:
            seconds = [stop.seconds for stop in these]
            table.add_row(
                phase,
                str(len(these)),
                str(sum(stop.twice for stop in these)),
                f"{statistics.median(seconds):.2f}",
                f"{max(seconds):.2f}",
                str(sum(stop.status == 0 for stop in these)),
            )
    console.print(table)
    console.print(
        f"{len(stops)} stops over {sum(f.blocks for f in runs)} blocks in "
        f"{sum(f.seconds for f in runs):.0f} s, seed {seed}: lost {sum(f.lost for f in runs)}, "
        f"accepted twice {sum(f.accepted_twice for f in runs)}, "
        f"handed back {sum(f.handed_back for f in runs)}, "
        f"given out after the signal {sum(f.assigned_late for f in runs)}"
    )


def prepare(folder: Path) -> dict[str, str]:
    """Do the first run; gives the variables of the workers."""
    environment = own_environment(folder, write_tiny_gguf(folder / "tiny.gguf"))
    subprocess.run(real_command("benchmark"), env=environment, check=True, capture_output=True)
    return environment


async def measure(
    environment: dict[str, str], stops: int, seed: int, console: Console
) -> list[Findings]:
    """Half of it with a coordinator that speaks all extensions, half with one that has none."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("stopping workers", total=stops)
        return [
            await stop_again_and_again(
                lambda url: real_command("worker", "--coordinator", url),
                environment,
                count=stops // 2,
                seed=seed + strict_seed,
                strict_seed=strict_seed,
                on_stop=lambda: progress.advance(bar),
            )
            for strict_seed in (False, True)
        ]


def main(
    stops: Annotated[int, typer.Option(min=2, help="How many.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
) -> None:
    """Stop workers. The exit status is 1 when the goal is missed."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        runs = asyncio.run(measure(prepare(Path(folder)), stops, seed, Console(stderr=True)))
    short = shortcomings(runs)
    if as_json:
        document = {"runs": [asdict(found) for found in runs], "seed": seed, "short": short}
        print(ujson.dumps(document, indent=2))
    else:
        console = Console(soft_wrap=True)
        print_findings(runs, seed, console)
        console.print("\n".join(short) if short else "the goal is met")
    raise typer.Exit(1 if short else 0)


if __name__ == "__main__":
    typer.run(main)
