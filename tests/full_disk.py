"""Fill the disk under a real worker thirty times, and print what is lost and how it recovers.

The data directory of ``ai4all-native worker`` is a small tmpfs in a mount namespace. It is filled
to the last byte while blocks run and the link is down, while results wait and the worker is
stopped and started, and before the worker is killed; each time the space comes back. The goal: no
traceback, nothing lost, nothing accepted twice, no work taken that cannot be kept, and work goes on
by itself once there is room.

Where nothing can be mounted (or with --limit) the worker is forbidden instead to write to any
file. Linux only.
"""

from __future__ import annotations

import asyncio
import logging
import os
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
from command_line import fake_command
from filled_disk import (
    Disk,
    Findings,
    LimitedProcess,
    SmallDisk,
    fill_again_and_again,
    in_a_mount_namespace,
)
from rich.console import Console
from rich.progress import Progress
from tiny_gguf import write_tiny_gguf
from worker_process import own_environment, real_command

_INSIDE = "AI4ALL_IN_A_MOUNT_NAMESPACE"


def shortcomings(found: Findings, logs: str) -> list[str]:
    """What falls short of the goal."""
    names = ("lost", "accepted_twice", "assigned_while_full")
    short = [f"{name}: {getattr(found, name)}" for name in names if getattr(found, name)]
    if found.violations:
        short.append(f"the coordinator did not understand: {found.violations[0]}")
    if not found.statuses:
        short.append("no heartbeat told of it")
    if "Traceback" in logs:
        short.append("there is a traceback in a log")
    return short


def prepare(folder: Path, *, limit: bool, brief: bool) -> tuple[Disk, dict[str, str]]:
    """Make the disk and do the first run on it; gives the variables of the workers too."""
    environment = own_environment(
        folder,
        write_tiny_gguf(folder / "tiny.gguf"),
        AI4ALL_COORDINATOR_RECONNECT_INTERVAL_MS="20",
        AI4ALL_WORKER_MAX_CONCURRENT_TASKS="2",
        AI4ALL_ENGINE_THREADS="1",
    )
    disk = LimitedProcess() if limit else SmallDisk(folder / "data")
    # It is not what is looked at here, and need not take its time.
    first_run = fake_command("benchmark") if brief else real_command("benchmark")
    subprocess.run(first_run, env=environment, check=True, capture_output=True)
    return disk, environment


async def measure(
    disk: Disk,
    environment: dict[str, str],
    rounds: int,
    seed: int,
    console: Console,
    *,
    brief: bool,
) -> Findings:
    """Fill and free."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("filling the disk", total=None)
        return await fill_again_and_again(
            disk,
            lambda url: real_command("worker", "--coordinator", url),
            environment,
            rounds=rounds,
            seed=seed,
            brief=brief,
            on_filled=lambda: progress.advance(bar),
        )


def print_findings(found: Findings, seed: int, console: Console) -> None:
    """Print what happened, and what came of it."""
    console.print(
        f"full {found.fillings} times over {found.blocks} blocks in {found.seconds:.0f} s, seed "
        f"{seed}: lost {found.lost}, accepted twice {found.accepted_twice}, given out while full "
        f"{found.assigned_while_full}"
    )
    console.print(
        f"results sent from memory in {found.sent_from_memory} fillings; workers started while "
        f"full {found.started_while_full}, killed while full {found.killed_while_full}"
    )
    console.print(
        f"from room to new results: median {statistics.median(found.recoveries):.1f} s, "
        f"most {max(found.recoveries):.1f} s"
    )
    for reason, count in found.refused.most_common():
        console.print(f"{count} results refused: {reason}", highlight=False)
    for status, count in found.statuses.most_common():
        console.print(f"{count} heartbeats said: {status}", highlight=False)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Each fills the disk three times.")] = 10,
    seed: Annotated[int, typer.Option(help="Of lengths and moments.")] = 1,
    limit: Annotated[
        bool, typer.Option("--limit", help="Forbid the worker to write; mount nothing.")
    ] = False,
    brief: Annotated[
        bool, typer.Option("--brief", help="Fill it once a round: while blocks run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
) -> None:
    """Fill the disk. The exit status is 1 when the goal is missed."""
    if not limit and _INSIDE not in os.environ:
        inside = in_a_mount_namespace([sys.executable, *sys.orig_argv[1:]])
        if inside is not None:
            done = subprocess.run(inside, env=os.environ | {_INSIDE: "1"}, check=False)
            raise typer.Exit(done.returncode)
        limit = True
    os.environ.pop(_INSIDE, None)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disk, environment = prepare(folder, limit=limit, brief=brief)
        try:
            found = asyncio.run(
                measure(disk, environment, rounds, seed, Console(stderr=True), brief=brief)
            )
            logs = "".join(log.read_text() for log in (folder / "data" / "logs").iterdir())
        finally:
            if not limit:
                subprocess.run(["umount", "--lazy", str(folder / "data")], check=True)
    short = shortcomings(found, logs)
    if as_json:
        document = asdict(found) | {"seed": seed, "limit": limit, "short": short}
        print(ujson.dumps(document, indent=2))
    else:
        console = Console(soft_wrap=True)
        print_findings(found, seed, console)
        console.print("\n".join(short) if short else "the goal is met")
    raise typer.Exit(1 if short else 0)


if __name__ == "__main__":
    typer.run(main)
