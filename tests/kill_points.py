"""Kill the worker's parts at every change of the disk, and print what the next start finds.

At each place where something is kept (results, the worker's name, models, what it measured) a
process does what the worker does there, and is killed with SIGKILL before, after, or in the middle
of its n-th call that changes a file, for every n, and at least 50 times in all. Then the next start
looks: the file opens, what was promised is there, and a worker delivers every result to a
coordinator, byte for byte, within 5 s.

With --failures the same calls fail instead, as on a full and as on a broken disk: whoever asked is
told in one line, and goes on once the disk does.

A small library is compiled and preloaded for it (cc); Linux only.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import disk_faults
import structlog
import typer
import ujson
from file_points import FILE_POINTS
from promises import Point
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from spool_points import SPOOL_POINTS
from struck_points import Findings, fail_at, kill_at, kill_at_drawn

DELIVERED_WITHIN_S = 5.0


def shortcomings(runs: Sequence[Findings]) -> list[str]:
    """What falls short of the goal."""
    short = [f"{found.name}: {problem}" for found in runs for problem in found.problems]
    for found in runs:
        if not found.strikes:
            short.append(f"{found.name}: it was never hit")
        if found.slowest > DELIVERED_WITHIN_S:
            short.append(f"{found.name}: a delivery took {found.slowest:.1f} s")
    return short


def print_findings(
    runs: Sequence[Findings], seed: int, console: Console, *, failures: bool
) -> None:
    """Print a row for each point, and the sum."""
    struck = "failures" if failures else "kills"
    table = Table("where", struck, "calls", "problems", "sent again", "slowest s")
    table.columns[0].no_wrap = True
    for found in runs:
        table.add_row(
            found.name,
            str(found.strikes),
            str(len(found.calls)),
            str(len(found.problems)),
            str(found.delivered) if found.delivered else "",
            f"{found.slowest:.2f}" if found.delivered else "",
        )
    console.print(table)
    console.print(
        f"{sum(found.strikes for found in runs)} {struck} at {len(runs)} points, seed {seed}: "
        f"{sum(len(found.problems) for found in runs)} problems; "
        f"{sum(found.delivered for found in runs)} results sent again, "
        f"within {max(found.slowest for found in runs):.2f} s of the start"
    )
    for message in sorted({text for found in runs for text in found.messages}):
        console.print(f"said: {message}", highlight=False)


def strike(
    points: Sequence[Point],
    root: Path,
    console: Console,
    *,
    times: int,
    seed: int,
    drawn: bool,
    failures: bool,
) -> list[Findings]:
    """Strike at each point in turn."""
    runs = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("striking", total=None)
        for number, point in enumerate(points):
            folder = root / str(number)
            folder.mkdir()
            progress.update(bar, description=point.name)

            def advance() -> None:
                progress.advance(bar)

            if failures:
                runs.append(fail_at(point, folder, seed=seed, on_failure=advance))
            elif drawn:
                runs.append(kill_at_drawn(point, folder, kills=times, seed=seed))
            else:
                runs.append(kill_at(point, folder, kills=times, seed=seed, on_kill=advance))
    return runs


def main(
    times: Annotated[int, typer.Option(min=1, help="Kills at each point, at least.")] = 50,
    only: Annotated[str, typer.Option(help="Points whose name has this in it.")] = "",
    seed: Annotated[int, typer.Option(help="Of contents, and of what is drawn.")] = 1,
    drawn: Annotated[
        bool, typer.Option("--drawn", help="Only so many, at calls that are drawn.")
    ] = False,
    failures: Annotated[
        bool, typer.Option("--failures", help="The calls fail instead of killing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
) -> None:
    """Kill at each point. The exit status is 1 when the goal is missed."""
    points = [point for point in (*SPOOL_POINTS, *FILE_POINTS) if only in point.name]
    if not points:
        raise typer.BadParameter(f"no point has {only!r} in its name", param_hint="--only")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not disk_faults.is_loaded():
            # The library has to be there before the program is.
            environment = disk_faults.preloaded_environment(folder)
            arguments = [sys.executable, *sys.orig_argv[1:]]
            raise typer.Exit(os.spawnve(os.P_WAIT, sys.executable, arguments, environment))
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        logging.disable(logging.CRITICAL)
        runs = strike(
            points,
            folder,
            Console(stderr=True),
            times=times,
            seed=seed,
            drawn=drawn,
            failures=failures,
        )
    short = shortcomings(runs)
    if as_json:
        document = {
            "points": [
                asdict(found) | {"calls": sorted(found.calls), "messages": sorted(found.messages)}
                for found in runs
            ],
            "seed": seed,
            "short": short,
        }
        print(ujson.dumps(document, indent=2))
    else:
        console = Console(soft_wrap=True)
        print_findings(runs, seed, console, failures=failures)
        console.print("\n".join(short) if short else "the goal is met", highlight=False)
    raise typer.Exit(1 if short else 0)


if __name__ == "__main__":
    typer.run(main)
