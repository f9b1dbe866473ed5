"""Kill the engine of a real worker a hundred times and print what the coordinator saw of it.

The goal: each death is reported within 10 s, the engine is back within 5 s and a load, and the
link to the coordinator never drops. Hangs are found after the limits that are shipped.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import structlog
import typer
import ujson
from mortality import KINDS, Findings, kill_again_and_again
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tiny_gguf import write_tiny_gguf

REPORTED_WITHIN_S = 10.0
BACK_WITHIN_S = 5.0


def failures(found: Findings) -> list[str]:
    """What falls short of the goal."""
    short = []
    for number, death in enumerate(found.deaths):
        wanted = "engine_hung" if death.kind == "hang" else "engine_crashed"
        if death.code is None or death.code.value != wanted or not death.retryable:
            short.append(f"death {number} ({death.kind}) was told as {death.code}")
        if death.reported > REPORTED_WITHIN_S:
            short.append(f"death {number} ({death.kind}) was told after {death.reported:.1f} s")
        if death.back > BACK_WITHIN_S:
            short.append(f"after death {number} ({death.kind}) it took {death.back:.1f} s")
    if found.links != 1 or found.drops:
        short.append(f"the link was made {found.links} times and dropped {found.drops} times")
    if found.answers != 1:
        short.append(f"the same question had {found.answers} different answers")
    if found.records != len(found.deaths):
        short.append(f"{found.records} crash records of {len(found.deaths)} deaths")
    return short


def print_findings(found: Findings, console: Console) -> None:
    """Print a row for each kind of death, and what holds for all."""
    table = Table("death", "count", "told after, s: median", "most", "next block: median", "most")
    for kind in KINDS:
        told = [death.reported for death in found.deaths if death.kind == kind]
        back = [death.back for death in found.deaths if death.kind == kind]
        if told:
            figures = (statistics.median(told), max(told), statistics.median(back), max(back))
            table.add_row(kind, str(len(told)), *(f"{seconds:.3f}" for seconds in figures))
    console.print(table)
    console.print(
        f"registrations: {found.links}; links dropped: {found.drops}; "
        f"heartbeats: {found.heartbeats}; crash records: {found.records}; "
        f"different answers to one question: {found.answers}"
    )


def main(
    deaths: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
) -> None:
    """Kill engines. The exit status is 1 when the goal is missed."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.ERROR)
    stderr = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress,
    ):
        bar = progress.add_task("killing engines", total=deaths)
        tiny = write_tiny_gguf(Path(folder) / "tiny.gguf")
        found = asyncio.run(
            kill_again_and_again(Path(folder), tiny, deaths, on_death=lambda: progress.advance(bar))
        )
    short = failures(found)
    if as_json:
        print(ujson.dumps(asdict(found) | {"short": short}, indent=2))
    else:
        console = Console(soft_wrap=True)
        print_findings(found, console)
        verdict = "\n".join(short) if short else f"{len(found.deaths)} deaths: the goal is met"
        console.print(verdict, highlight=False)
    raise typer.Exit(1 if short else 0)


if __name__ == "__main__":
    typer.run(main)
