"""Cut a real worker off from a real coordinator a thousand times, and print what came of it.

A proxy between them ends, resets, half-closes, silences or stalls connections at random bytes of
either direction, on lines that are slow, late or chopped; everything is drawn from a seed. The
goal: over at least 2,000 blocks nothing is lost, nothing is accepted twice, and nothing is computed
again once its result was on disk.

With --half-open it measures instead how long a line may be silent before the worker, with the
settings that are shipped, takes it for dead: 40 s at most is the goal.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import structlog
import typer
import ujson
from broken_links import Findings, cut_again_and_again, seconds_until_noticed
from chaos_proxy import Blow
from rich.console import Console
from rich.progress import Progress

NOTICED_WITHIN_S = 40.0


def shortcomings(found: Findings, blocks: int, disconnects: int) -> list[str]:
    """What falls short of the goal."""
    short = []
    if found.blocks < blocks or found.disconnects < disconnects:
        short.append(f"{found.disconnects} disconnects over {found.blocks} blocks are too few")
    counts = ("lost", "accepted_twice", "recomputed", "left")
    short += [f"{name}: {getattr(found, name)}" for name in counts if getattr(found, name)]
    if found.violations:
        short.append(f"the coordinator did not understand: {found.violations[0]}")
    return short


async def measure(blocks: int, disconnects: int, seed: int, console: Console) -> Findings:
    """Half of it with a coordinator that speaks all extensions, half with one that has none."""
    found = Findings()
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("cutting links", total=disconnects)
        for strict_seed in (False, True):
            before, place = found.disconnects, Path(folder) / str(strict_seed)
            place.mkdir()
            found.add(
                await cut_again_and_again(
                    place,
                    blocks=blocks // 2,
                    disconnects=disconnects // 2,
                    seed=seed + strict_seed,
                    strict_seed=strict_seed,
                    on_progress=lambda blows, _: progress.update(bar, completed=before + blows),  # noqa: B023
                )
            )
    return found


def print_findings(found: Findings, seed: int, console: Console) -> None:
    """Print what happened, and what came of it."""
    kinds = ", ".join(f"{found.blows[blow]} {blow.value}" for blow in Blow)
    console.print(
        f"{found.disconnects} disconnects ({kinds}) over {found.blocks} blocks in "
        f"{found.seconds:.0f} s, seed {seed}; {found.registrations} registrations"
    )
    console.print(
        f"lost {found.lost}, accepted twice {found.accepted_twice}, recomputed after their result "
        f"was on disk {found.recomputed}, refused {found.refused}, left on disk {found.left}, "
        f"frames not understood {len(found.violations)}"
    )


def main(
    disconnects: Annotated[int, typer.Option(min=2, help="Blows, at least.")] = 1000,
    blocks: Annotated[int, typer.Option(min=2, help="Blocks, at least.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 1,
    half_open: Annotated[
        bool, typer.Option("--half-open", help="Measure how soon a silent line is noticed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
) -> None:
    """Cut links, or silence one, and see. The exit status is 1 when the goal is missed."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.CRITICAL)
    console = Console(soft_wrap=True)
    document: dict[str, Any]
    if half_open:
        seconds = [
            asyncio.run(seconds_until_noticed(blow)) for blow in (Blow.BLACK_HOLE, Blow.STALL)
        ]
        document = {"black_hole_s": seconds[0], "stall_s": seconds[1]}
        short = [f"noticed after {s:.1f} s" for s in seconds if s > NOTICED_WITHIN_S]
        if not as_json:
            console.print(
                f"a silent line is noticed after {seconds[0]:.1f} s, "
                f"one that takes nothing after {seconds[1]:.1f} s"
            )
    else:
        found = asyncio.run(measure(blocks, disconnects, seed, Console(stderr=True)))
        document = asdict(found) | {"blows": {b.value: found.blows[b] for b in Blow}, "seed": seed}
        short = shortcomings(found, blocks, disconnects)
        if not as_json:
            print_findings(found, seed, console)
    if as_json:
        print(ujson.dumps(document | {"short": short}, indent=2))
    else:
        console.print("\n".join(short) if short else "the goal is met")
    raise typer.Exit(1 if short else 0)


if __name__ == "__main__":
    typer.run(main)
