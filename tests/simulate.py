"""Run the control plane in a simulated world, many thousand times, and look for what must not be.

The worker, its session, its connection and its spool are the real ones; the time, the network, the
disk, the engine and the coordinator's connections are simulated. Each seed makes a world of its
own: one to three workers, a coordinator with more or less of the protocol, blocks, and faults. From
the seed all follows, so that one that fails can be run again and gives the very same trace.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import typer
import ujson
from rich.console import Console
from rich.progress import Progress
from simulation.chaos import FAULTS
from simulation.many import Findings, Outcome, run_many
from simulation.run import simulate

_SHOWN: Final = 10


def replay_command(seed: int, events: int, only: tuple[str, ...]) -> str:
    """What runs a seed again, with its trace."""
    parts = [f"python tests/simulate.py --seed {seed} --events {events}"]
    return " ".join(parts + [f"--only {name}" for name in only])


def replay(seed: int, events: int, only: tuple[str, ...], as_json: bool) -> bool:
    """Run a seed twice and print its trace. Returns whether all is well."""
    run, second = simulate(seed, events, only=only), simulate(seed, events, only=only)
    is_same = run.digest == second.digest and run.faults == second.faults
    if as_json:
        document = asdict(run) | {"history": [str(record) for record in run.history]}
        print(ujson.dumps(document | {"replays": is_same}, indent=2))
        return is_same and not run.faults
    print("\n".join(run.trace))
    print(
        f"\nseed {seed}: {run.events} events in {run.seconds:.0f} s of virtual time, "
        f"{run.blocks} blocks, {run.lives} starts of a worker\ntrace sha256 {run.digest}"
    )
    print("\n".join(f"must not be: {fault}" for fault in run.faults) or "nothing is wrong")
    print("a second run was the same" if is_same else "a second run was ANOTHER one")
    return is_same and not run.faults


def print_findings(found: Findings, events: int, only: tuple[str, ...], console: Console) -> None:
    """Print the figures, and what failed."""
    injected, deaths = (
        ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda c: -c[1]))
        for counts in (found.injected, found.deaths)
    )
    console.print(
        f"{found.seeds} seeds, {found.events} events, {found.virtual_s / 3600:.0f} hours of "
        f"virtual time in {found.seconds:.0f} s, {found.cpu_s:.0f} s of CPU time\n"
        f"{found.blocks} blocks, {found.delivered} of them delivered, {found.lives} starts of a "
        f"worker\n"
        f"{sum(found.injected.values())} faults: {injected}\n"
        f"deaths of a worker: {deaths}\n"
        f"all work was done {found.longest_recovery_s:.0f} s after the last fault at the latest\n"
        f"{found.replayed - len(found.differing)} of {found.replayed} seeds run again were the "
        f"same to the byte\n"
        f"violations: {len(found.failing)} seeds"
    )
    for seed, faults in sorted(found.failing.items())[:_SHOWN]:
        console.print(f"seed {seed}: {faults[0]}\n    {replay_command(seed, events, only)}")
    for seed in found.differing[:_SHOWN]:
        console.print(f"seed {seed} is not the same twice")


def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 10_000,
    first: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    events: Annotated[int, typer.Option(min=1, help="Before the faults stop, in each.")] = 200,
    seed: Annotated[int | None, typer.Option(help="Run this one, and print its trace.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A fault to choose from.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="At once.")] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
) -> None:
    """Simulate. The exit status is 1 when anything was found, or a seed was not the same twice."""
    names = tuple(only or ())
    if unknown := set(names) - set(FAULTS):
        raise typer.BadParameter(
            f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}",
            param_hint="--only",
        )
    if seed is not None:
        raise typer.Exit(0 if replay(seed, events, names, as_json) else 1)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("seeds", total=seeds)

        def on_outcome(outcome: Outcome) -> None:
            progress.advance(bar)
            if outcome.faults:
                progress.console.print(f"seed {outcome.seed}: {outcome.faults[0]}")

        found = run_many(
            range(first, first + seeds),
            events,
            only=names,
            processes=processes,
            on_outcome=on_outcome,
        )
    if as_json:
        commands = {seed: replay_command(seed, events, names) for seed in found.failing}
        print(ujson.dumps(asdict(found) | {"replay": commands}, indent=2))
    else:
        print_findings(found, events, names, Console(soft_wrap=True))
    raise typer.Exit(1 if found.failing or found.differing else 0)


if __name__ == "__main__":
    typer.run(main)
