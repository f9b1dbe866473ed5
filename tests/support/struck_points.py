"""Strikes at every change of the disk at every point of ``spool_points`` and
``file_points``, one by one.

This is the way of SQLite's own tests: the n-th call is hit, for n from 1 on, until the act comes to
its end without having been hit. Each time a forked child does the act, and this process, which the
shim leaves alone, looks at what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import os
import random
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import disk_faults
import ujson
from disk_faults import Fault
from promises import Point, Told
from scripted_coordinator import Coordinator, serving, working
from spool_points import SPOOL_FILE

from ai4all.delivery.spool import Spool
from ai4all.errors import Ai4allError

KILLS = (Fault.KILL_BEFORE, Fault.KILL_AFTER, Fault.KILL_TORN)

_OUR_FOLDER = re.compile(r"\S*/run-\d+")

# What is not delivered by then is a finding.
_PATIENCE_S = 60.0


@dataclass(slots=True)
class Findings:
    """What came of one point.

    Attributes:
        name: The point's.
        calls: Different calls that were hit, such as ``fsync results.sqlite3-wal``.
        strikes: How often it was hit.
        problems: What was wrong afterwards, if anything.
        messages: What the product said when its disk failed.
        delivered: Results that a worker delivered after the restart.
        slowest: Most seconds from a restart to the last acknowledgement.
    """

    name: str
    calls: set[str] = field(default_factory=set)
    strikes: int = 0
    problems: list[str] = field(default_factory=list)
    messages: set[str] = field(default_factory=set)
    delivered: int = 0
    slowest: float = 0.0


@dataclass(slots=True)
class _Child:
    """How a child ended, and what it told."""

    told: Told
    status: int
    last_call: str
    was_struck: bool


def _act(
    point: Point, folder: Path, state: object, arm: Callable[[int], None], out: int, log: int
) -> None:
    """In the child: do the act with the disk as it is, tell how it went, and end."""

    def tell(kind: str, what: str) -> None:
        os.write(out, (ujson.dumps([kind, what]) + "\n").encode())

    try:
        arm(log)
        point.act(folder, state, tell)
    except (Ai4allError, OSError) as error:
        tell("raised", str(error))
    except BaseException:  # noqa: BLE001 - told, and then a finding.
        tell("bug", traceback.format_exc())
    disk_faults.disarm()
    os._exit(0)


def _in_a_child(point: Point, folder: Path, state: object, arm: Callable[[int], None]) -> _Child:
    told_end, tell_end = os.pipe()
    log_path = folder.with_name(folder.name + ".calls")
    log = os.open(log_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    pid = os.fork()
    if pid == 0:
        os.close(told_end)
        _act(point, folder, state, arm, tell_end, log)
    os.close(tell_end)
    with open(told_end, encoding="utf-8") as words:
        told = Told([tuple(ujson.loads(line)) for line in words])
    _, wait_status = os.waitpid(pid, 0)
    os.close(log)
    calls = log_path.read_text().splitlines()
    log_path.unlink()
    status = os.waitstatus_to_exitcode(wait_status)
    return _Child(told, status, calls[-1] if calls else "", status == -signal.SIGKILL)


async def _deliver(folder: Path) -> tuple[int, float]:
    """Start a worker over what is left: each result arrives, with the bytes that are on disk."""
    coordinator = Coordinator()
    async with serving(coordinator):
        begun_at = time.monotonic()
        async with Spool.open(folder / SPOOL_FILE) as spool:
            kept = dict(spool.pending())
            async with working(coordinator, spool=spool) as running:
                async with asyncio.timeout(_PATIENCE_S):
                    await running.until(lambda: not spool.pending() and not spool.interrupted)
                seconds = time.monotonic() - begun_at
    sent: dict[str, bytes] = {}
    for raw in coordinator.raw_results():
        block_id = ujson.loads(raw)["block_id"]
        if block_id in kept:
            sent[block_id] = raw.encode()
    assert sent == kept, "what was delivered is not what was kept"
    return len(kept), seconds


def _look(point: Point, folder: Path, state: object, child: _Child, found: Findings) -> None:
    """Look at what is left; what is wrong is noted with the call that was hit."""
    try:
        bugs = child.told.of("bug")
        assert not bugs, bugs[0]
        assert child.status in (0, -signal.SIGKILL), f"it ended with status {child.status}"
        point.check(folder, state, child.told)
        if point.has_spool:
            delivered, seconds = asyncio.run(_deliver(folder))
            found.delivered += delivered
            found.slowest = max(found.slowest, seconds)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was looked for.
        where = traceback.extract_tb(error.__traceback__)[-1].name
        text = str(error) or type(error).__name__
        found.problems.append(f"after call {child.last_call}: {where}: {text}")


@contextlib.contextmanager
def _fresh(root: Path, number: int) -> Iterator[Path]:
    folder = root / f"run-{number}"
    folder.mkdir()
    yield folder
    for path in root.glob(f"run-{number}*"):
        shutil.rmtree(path, ignore_errors=True)


def _run(
    point: Point, root: Path, number: int, seed: str, arm: Callable[[Path, int], None], f: Findings
) -> _Child:
    """Do the act once over fresh ground with the disk as it is, and look at what is left."""
    with _fresh(root, number) as folder:
        state = point.prepare(folder, random.Random(seed))
        child = _in_a_child(point, folder, state, functools.partial(arm, folder))
        if child.was_struck:
            f.strikes += 1
            f.calls.add(_kind(child.last_call))
        _look(point, folder, state, child, f)
    return child


def kill_at(
    point: Point,
    root: Path,
    *,
    kills: int,
    seed: int,
    on_kill: Callable[[], None] = lambda: None,
) -> Findings:
    """Kill the act at each of its calls, then with other contents, until ``kills`` are reached.

    Args:
        point: What is done.
        root: An empty folder.
        kills: How many at least; every call is hit once in any case.
        seed: Of contents.
        on_kill: Called after each.
    """
    found = Findings(point.name)
    numbers = itertools.count()
    for turn in itertools.count():
        for call in itertools.count(1):
            fault = KILLS[(call + turn) % len(KILLS)]
            arm = functools.partial(_arm_kill, fault, call)
            child = _run(point, root, next(numbers), f"{seed} {turn}", arm, found)
            if not child.was_struck:
                break
            on_kill()
            # The first turn hits every call; later ones only make up the number.
            if turn > 0 and found.strikes >= kills:
                return found
        if found.strikes >= kills or found.strikes == 0:
            return found
    raise AssertionError("unreachable")


def kill_at_drawn(point: Point, root: Path, *, kills: int, seed: int) -> Findings:
    """Kill the act at ``kills`` of its calls, drawn at random."""
    found = Findings(point.name)
    rng = random.Random(f"{seed} {point.name}")
    calls = _count(point, root, seed)
    for number in itertools.count(1):
        # Other contents may need fewer calls than were counted; then another is drawn.
        arm = functools.partial(_arm_kill, rng.choice(KILLS), rng.randint(1, calls))
        _run(point, root, number, f"{seed} {number}", arm, found)
        if found.strikes == kills or number == 10 * kills:
            break
    return found


def _count(point: Point, root: Path, seed: int) -> int:
    """How many calls the act makes when nothing happens to it."""
    with _fresh(root, 0) as folder:
        state = point.prepare(folder, random.Random(seed))
        arm = functools.partial(_arm_kill, Fault.COUNT, 0, folder)
        child = _in_a_child(point, folder, state, arm)
    return int(child.last_call.partition(" ")[0])


def _arm_kill(fault: Fault, call: int, folder: Path, log: int) -> None:
    disk_faults.arm(folder, fault, call, log=log)


def fail_at(
    point: Point, root: Path, *, seed: int, on_failure: Callable[[], None] = lambda: None
) -> Findings:
    """Fail each call of the act: with a full disk from there on, and once with a broken one."""
    found = Findings(point.name)
    numbers = itertools.count()
    for error, last in ((errno.ENOSPC, -1), (errno.EIO, None)):
        for call in itertools.count(1):
            fault = (Fault.FAIL, Fault.FAIL_SHORT)[call % 2]
            arm = functools.partial(_arm_failure, fault, call, last, error)
            child = _run(point, root, next(numbers), f"{seed}", arm, found)
            said = child.told.of("raised") + child.told.of("failed")
            found.messages.update(_OUR_FOLDER.sub("...", text) for text in said)
            if not child.last_call or int(child.last_call.partition(" ")[0]) < call:
                break
            found.strikes += 1
            found.calls.add(_kind(child.last_call))
            on_failure()
    return found


def _arm_failure(
    fault: Fault, call: int, last: int | None, error: int, folder: Path, log: int
) -> None:
    disk_faults.arm(folder, fault, call, last=last, error=error, log=log)


def _kind(call: str) -> str:
    """``17 fsync results.sqlite3-wal`` without its number, and without what is random in a name."""
    _, name, file = call.split(" ", 2)
    if file.startswith("."):
        file = "a temporary file"
    elif file.startswith("run-"):
        file = "the directory"
    return f"{name} {file}"
