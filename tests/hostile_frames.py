"""Send a million broken frames into a real session, and attack a real worker over real sockets.

The goal: no frame is answered with an unhandled exception; a worker that meets a decompression
bomb, a nesting bomb, endless fragments or a flood of tiny frames closes the link, grows by at most
32 MiB, and lives.

Usage: python tests/hostile_frames.py [--frames 1000000] [--seed 0] [--jobs 2] [--json]
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import typer
import ujson
from frame_mutants import Mutator, Target
from hostile_links import ATTACKS, MAX_GROWTH_MIB, Survival, attack_all
from rich.console import Console
from rich.progress import Progress

BATCH = 5000


@dataclass
class Fed:
    """What a batch of frames came to."""

    seed: int
    frames: int
    outcomes: dict[str, int]
    links: int
    slowest_s: float
    slowest: str
    failures: list[str]


def feed(seed_and_count: tuple[int, int]) -> Fed:
    """Feed one batch; a frame that raises is told, and the batch goes on with a new session."""
    seed, count = seed_and_count
    mutator, target = Mutator(seed), Target()
    total = Fed(seed, 0, {}, 0, 0.0, "", [])
    outcomes: Counter[str] = Counter()
    for number in range(count):
        frame = mutator.frame()
        try:
            target.feed(frame)
        except Exception:  # noqa: BLE001 - each is a finding.
            total.failures.append(
                f"seed {seed}, frame {number}: {traceback.format_exc(limit=-3)}\n{frame!r:.300}"
            )
            outcomes += target.outcomes
            target = Target()
    outcomes += target.outcomes
    total.frames, total.outcomes, total.links = count, dict(outcomes), target.links
    total.slowest_s, total.slowest = target.slowest_s, target.slowest
    return total


def feed_all(frames: int, seed: int, jobs: int) -> Iterator[Fed]:
    """Feed all batches, in as many processes as asked for."""
    batches = [
        (seed * 1_000_003 + first // BATCH, min(BATCH, frames - first))
        for first in range(0, frames, BATCH)
    ]
    if jobs == 1:
        yield from map(feed, batches)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(feed, batches)


def report(
    console: Console, fed: list[Fed], seconds: float, survivals: list[Survival]
) -> dict[str, Any]:
    """Print what happened; returns it."""
    outcomes: Counter[str] = Counter()
    for batch in fed:
        outcomes.update(batch.outcomes)
    frames = sum(batch.frames for batch in fed)
    slowest = max(fed, key=lambda batch: batch.slowest_s, default=None)
    failures = [text for batch in fed for text in batch.failures]
    for name, count in outcomes.most_common():
        console.print(f"{count:>10}  {name}")
    if slowest is not None:
        console.print(
            f"{frames} frames in {seconds:.0f} s ({frames / seconds:.0f}/s), "
            f"slowest {slowest.slowest_s * 1000:.0f} ms, "
            f"unhandled exceptions: {len(failures)}"
        )
    for text in failures[:5]:
        console.print(text, markup=False)
    for survival in survivals:
        console.print(str(survival))
    return {
        "frames": frames,
        "seconds": seconds,
        "outcomes": dict(outcomes),
        "slowest_ms": slowest.slowest_s * 1000 if slowest else None,
        "slowest_frame": slowest.slowest if slowest else None,
        "failures": failures[:50],
        "failure_count": len(failures),
        "attacks": [asdict(survival) for survival in survivals],
    }


def main(
    frames: Annotated[int, typer.Option(help="Frames to send into sessions.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Another seed makes other frames.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, max=2, help="Processes.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Run; the exit status is 1 when the goal is missed."""
    console = Console(stderr=as_json, highlight=False)
    fed: list[Fed] = []
    started = time.monotonic()
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("frames", total=frames)
        for batch in feed_all(frames, seed, jobs):
            fed.append(batch)
            progress.advance(bar, batch.frames)
        seconds = time.monotonic() - started
        bar = progress.add_task("attacks", total=len(ATTACKS))
        survivals = attack_all(lambda: progress.advance(bar))
    figures = report(console, fed, seconds, survivals)
    met = not figures["failure_count"] and all(survival.is_well for survival in survivals)
    console.print(
        "the goal is met" if met else f"the goal is missed (growth allowed: {MAX_GROWTH_MIB} MiB)"
    )
    if as_json:
        print(ujson.dumps(figures, indent=2, escape_forward_slashes=False))
    raise typer.Exit(0 if met else 1)


if __name__ == "__main__":
    typer.run(main)
