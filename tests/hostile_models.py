"""Give a real worker ten thousand spoiled models, each of them another one.

All of them go the way that every model goes: our pre-check, then a load and a short generation in
the engine's own process. The goal: each is answered, with an error or a success, within 2 s; the
worker never ends and its link never drops. Before the mutants come the malformed files that
llama.cpp's own tests make, and one file for each shape of a public bug.

Usage: python tests/hostile_models.py [--mutants 10000] [--seed 0] [--json]
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import structlog
import typer
import ujson
from gguf_mutants import BUG_SHAPES, MALFORMED, Mutator, small_model
from model_gauntlet import CLASSES, Gauntlet, Passage, place_of, run_gauntlet
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ANSWERED_WITHIN_S = 2.0


def run(mutants: int, seed: int, system_prompts: bool) -> tuple[Gauntlet, Gauntlet]:
    """The named files, then the mutants."""
    named = MALFORMED | BUG_SHAPES

    def mutant(name: str) -> bytes:
        return Mutator(int(name)).mutant()[1]

    with (
        tempfile.TemporaryDirectory() as place,
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        folder = Path(place)
        good = folder / "good.gguf"
        good.write_bytes(small_model())
        bar = progress.add_task("named files", total=len(named))
        first = asyncio.run(
            run_gauntlet(
                folder,
                good,
                list(named),
                lambda name: named[name](),
                system_prompts=True,
                advance=lambda: progress.advance(bar),
            )
        )
        bar = progress.add_task("mutants", total=mutants)
        second = asyncio.run(
            run_gauntlet(
                folder,
                good,
                [str(seed * 1_000_000 + number) for number in range(mutants)],
                mutant,
                system_prompts=system_prompts,
                advance=lambda: progress.advance(bar),
            )
        )
    return first, second


def print_classes(console: Console, title: str, found: Gauntlet) -> None:
    """A row for each class, with how long its members took."""
    table = Table("what became of it", "files", "median, s", "most, s", title=title)
    for outcome in CLASSES:
        took = sorted(p.seconds for p in found.passages if p.outcome == outcome)
        if took:
            median, most = took[len(took) // 2], took[-1]
            table.add_row(outcome, str(len(took)), f"{median:.3f}", f"{most:.2f}")
    console.print(table)
    deaths = Counter(place_of(p.died_of) for p in found.passages if p.died_of is not None)
    for place, count in deaths.most_common():
        console.print(f"  the engine died {count} times of {place}")
    console.print(
        f"  registrations: {found.links}; links dropped: {found.drops}; "
        f"heartbeats: {found.heartbeats}"
    )


def failures(found: Gauntlet) -> list[str]:
    """What falls short of the goal."""
    short = []
    if found.links != 1 or found.drops:
        short.append(f"the link was made {found.links} times and dropped {found.drops} times")
    if found.passages[-1].outcome != "answered":
        short.append("the good model after all the bad ones was not answered")
    slow = [p for p in found.passages if p.seconds > ANSWERED_WITHIN_S]
    short += [f"{p.name} took {p.seconds:.1f} s: {p.outcome}, {p.message[:100]}" for p in slow]
    return short


def main(
    mutants: Annotated[int, typer.Option(min=1, help="Spoiled models to try.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Another seed makes other mutants.")] = 0,
    system_prompts: Annotated[
        bool, typer.Option("--system-prompts", help="Use the mutants' chat templates.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Run; the exit status is 1 when the goal is missed."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.ERROR)
    started = time.monotonic()
    console = Console(stderr=as_json, highlight=False, width=100)
    found = run(mutants, seed, system_prompts)
    for title, part in zip(("named files", "mutants"), found, strict=True):
        print_classes(console, title, part)
    short = [line for part in found for line in failures(part)]
    console.print(f"{time.monotonic() - started:.0f} s in all")
    for line in short[:20]:
        console.print(line, markup=False)
    console.print("the goal is met" if not short else f"the goal is missed ({len(short)} times)")
    if as_json:
        print(ujson.dumps(_as_json(found, short), indent=2, escape_forward_slashes=False))
    raise typer.Exit(1 if short else 0)


def _as_json(found: tuple[Gauntlet, Gauntlet], short: list[str]) -> dict[str, Any]:
    def notable(passage: Passage) -> bool:
        bad = passage.outcome in ("engine died", "engine hung")
        return bad or passage.seconds > ANSWERED_WITHIN_S

    return {
        title: {
            "classes": dict(part.classes),
            "links": part.links,
            "drops": part.drops,
            "notable": [asdict(passage) for passage in part.passages if notable(passage)],
        }
        for title, part in zip(("named", "mutants"), found, strict=True)
    } | {"short_of_the_goal": short}


if __name__ == "__main__":
    typer.run(main)
