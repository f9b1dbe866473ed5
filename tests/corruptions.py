"""Spoil a model a thousand times: on the disk, on its way, and half-way through a download.

The goal: none of it is handed out to be loaded, none of it ever lies under a final name, and an
interrupted download goes on where it stopped.

Usage: python tests/corruptions.py [--trials 1000] [--interrupts 500] [--seed 0] [--json]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import typer
import ujson
from corruption import Findings, spoil_arriving, spoil_interrupted, spoil_kept
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

Trial = Callable[[Path, int, int, Callable[[], None]], Findings]


def print_findings(console: Console, title: str, found: Findings, refusable: bool) -> None:
    """A row for each sort of trial."""
    table = Table("what was wrong", "trials", *(["refused"] if refusable else []), title=title)
    for name, count in sorted(found.trials.items()):
        table.add_row(name, str(count), *([str(found.refused[name])] if refusable else []))
    total, refused = found.trials.total(), found.refused.total()
    table.add_row("all", str(total), *([str(refused)] if refusable else []))
    console.print(table)
    if not refusable:
        console.print(
            f"  went on where they had stopped: {found.resumed}; spoiled meanwhile, and right "
            f"in the end: {found.mended}"
        )
    for fault in found.faults[:10]:
        console.print(f"  {fault}", markup=False)


def main(
    trials: Annotated[int, typer.Option(min=1, help="Spoiled files of each way.")] = 1000,
    interrupts: Annotated[int, typer.Option(min=1, help="Interrupted downloads.")] = 500,
    seed: Annotated[int, typer.Option(help="Another seed spoils in other ways.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Run; the exit status is 1 when the goal is missed."""
    parts: list[tuple[str, Trial, int, bool]] = [
        ("on the disk", spoil_kept, trials, True),
        ("on their way", spoil_arriving, trials, True),
        ("half-way", spoil_interrupted, interrupts, False),
    ]
    console = Console(stderr=as_json, highlight=False, width=100)
    found: dict[str, Findings] = {}
    met = True
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        for title, trial, count, _ in parts:
            bar = progress.add_task(title, total=count)
            with tempfile.TemporaryDirectory() as folder:
                found[title] = trial(
                    Path(folder), count, seed, lambda bar=bar: progress.advance(bar)
                )
    for title, _, _, refusable in parts:
        part = found[title]
        print_findings(console, title, part, refusable)
        met = met and not part.faults
        met = met and (not refusable or part.refused == part.trials)
    console.print("the goal is met" if met else "the goal is missed")
    if as_json:
        print(ujson.dumps({t: asdict(f) for t, f in found.items()}, indent=2))
    raise typer.Exit(0 if met else 1)


if __name__ == "__main__":
    typer.run(main)
