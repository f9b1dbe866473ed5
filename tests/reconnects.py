"""Let 1,000 workers lose their coordinator for ten minutes, and print how they come back.

On virtual time, with the policy that is shipped, for many seeds. The goal: at most 60 connects in
any second after the recovery, and at most 20 in ten minutes from one worker to a coordinator that
accepts and then closes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import typer
import ujson
from crowds import busiest_second, connects_after_recovery, connects_to_a_closing_coordinator
from rich.console import Console
from rich.progress import track

WORKERS = 1000
OUTAGE_S = 600.0
MOST_IN_A_SECOND = 60
MOST_IN_TEN_MINUTES = 20
LIVES_S = (0.0, 1.0, 30.0)


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Crowds to look at.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
) -> None:
    """Let crowds come back. The exit status is 1 when the goal is missed."""
    stderr = Console(stderr=True)
    crowds = []
    patient = 0
    for seed in track(range(seeds), console=stderr, transient=True, disable=not stderr.is_terminal):
        crowds.append(connects_after_recovery(WORKERS, OUTAGE_S, seed))
        closed = (connects_to_a_closing_coordinator(600.0, life, seed) for life in LIVES_S)
        patient = max(patient, *closed)
    peak = max(map(busiest_second, crowds))
    # The hundredth part that comes last is left out of the first figure.
    most_back = max(crowd[WORKERS * 99 // 100 - 1] for crowd in crowds)
    all_back = max(crowd[-1] for crowd in crowds)
    short = []
    if peak > MOST_IN_A_SECOND:
        short.append(f"{peak} connects in one second")
    if patient > MOST_IN_TEN_MINUTES:
        short.append(f"{patient} connects in ten minutes to who closes")
    if as_json:
        document = {
            "seeds": seeds,
            "peak_per_second": peak,
            "p99_back_s": most_back,
            "all_back_s": all_back,
            "connects_in_ten_minutes": patient,
            "short": short,
        }
        print(ujson.dumps(document, indent=2))
    else:
        console = Console(soft_wrap=True)
        console.print(
            f"{seeds} crowds of {WORKERS} workers after {OUTAGE_S:.0f} s: at most {peak} connects "
            f"in a second; 99 of 100 back within {most_back:.1f} s, all within {all_back:.1f} s"
        )
        console.print(
            f"a coordinator that accepts and closes sees a worker at most {patient} times in ten "
            "minutes"
        )
        console.print("\n".join(short) if short else "the goal is met")
    raise typer.Exit(1 if short else 0)


if __name__ == "__main__":
    typer.run(main)
