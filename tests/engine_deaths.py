"""Kill the engine of a real worker a hundred times and print what the coordinator saw of it.

Usage: python tests/engine_deaths.py [--deaths N]

The goal: each death is reported within 10 s, the engine is back within 5 s and a load, and the
link to the coordinator never drops. Hangs are found after the limits that are shipped.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import structlog
from mortality import KINDS, Findings, kill_again_and_again
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


def print_findings(found: Findings) -> None:
    """Print a line for each kind of death, and what holds for all."""
    print(f"{'death':<10}{'count':>6}{'told after, s':>22}{'next block after, s':>24}")
    print(f"{'':<10}{'':>6}{'median':>12}{'most':>10}{'median':>14}{'most':>10}")
    for kind in KINDS:
        told = [death.reported for death in found.deaths if death.kind == kind]
        back = [death.back for death in found.deaths if death.kind == kind]
        if told:
            print(
                f"{kind:<10}{len(told):>6}{statistics.median(told):>12.3f}{max(told):>10.3f}"
                f"{statistics.median(back):>14.3f}{max(back):>10.3f}"
            )
    print(
        f"registrations: {found.links}; links dropped: {found.drops}; "
        f"heartbeats: {found.heartbeats}; crash records: {found.records}; "
        f"different answers to one question: {found.answers}"
    )


def main() -> int:
    """Run; the exit status is 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deaths", type=int, default=100)
    count = parser.parse_args().deaths
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_tiny_gguf(Path(folder) / "tiny.gguf")
        found = asyncio.run(kill_again_and_again(Path(folder), tiny, count))
    print_findings(found)
    short = failures(found)
    print("\n".join(short) if short else f"{len(found.deaths)} deaths: the goal is met")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
