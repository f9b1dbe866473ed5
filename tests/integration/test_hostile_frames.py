"""A coordinator of the first protocol that sends rubbish between valid frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from frame_mutants import Mutator, Target
from hostile_links import survive
from station import Station
from watching import Watch
from websockets.asyncio.server import broadcast

from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, TaskSpec
from ai4all.worker_events import LinkDown

MIB = 1024 * 1024

SURVIVABLE: dict[str, str | bytes] = {
    "empty": "",
    "not json": "this is not JSON",
    "half": '{"type": "Assignment", "block_id": "b-',
    "no object": "[1, 2, 3]",
    "null": "null",
    "no type": "{}",
    "unknown type": '{"type": "Dance", "tempo": 120}',
    "type is no string": '{"type": ["NoWork"]}',
    "missing fields": '{"type": "NoWork"}',
    "wrong types": '{"type": "NoWork", "retry_after_ms": "soon"}',
    "negative": '{"type": "NoWork", "retry_after_ms": -5}',
    "beyond 64 bits": '{"type": "NoWork", "retry_after_ms": ' + "9" * 500 + "}",
    "not a number": '{"type": "NoWork", "retry_after_ms": NaN}',
    "deeply nested": '{"type": "NoWork", "retry_after_ms": 1, "x": '
    + "[" * 5000
    + "]" * 5000
    + "}",
    "nested and cut": '{"a":' * 100_000,
    "quotes": '"' * 100_000,
    "lone surrogate": '{"type": "Error", "code": "\\ud800", "message": ""}',
    "binary": b"\x00\xff\xfe not text",
    "large but allowed": '{"type": "Dance", "x": "' + "y" * (MIB - 100) + '"}',
    "ack of nothing": '{"type": "ResultAck", "block_id": "never", "accepted": true, "error": null}',
    "second welcome": '{"type": "Registered", "session_id": "s", "heartbeat_interval_ms": 1}',
    "extension never offered": '{"type": "Drain", "reason": "because"}',
    "cancel of nothing": '{"type": "Cancel", "block_id": "never", "reason": null}',
    "complaint": '{"type": "Error", "code": "x", "message": "y"}',
    "unreadable assignment": '{"type": "Assignment", "block_id": "bad-1", "task_type": 7}',
    "assignment without a day": (
        '{"type": "Assignment", "block_id": "bad-2", "task_type": "TEXT_COMPLETION", '
        '"input": {"prompt": "x"}, "deadline": "2030-02-31T00:00:00Z", "model_id": "benchmark"}'
    ),
    "assignment of the future": (
        '{"type": "Assignment", "block_id": "bad-3", "task_type": "TELEPATHY", "input": {}, '
        '"deadline": "2030-01-01T00:00:00Z", "model_id": "benchmark"}'
    ),
    "assignment of a path": (
        '{"type": "Assignment", "block_id": "../../etc/passwd", "task_type": "TEXT_COMPLETION", '
        '"input": {"prompt": "x"}, "deadline": "2030-01-01T00:00:00Z", '
        '"model_id": "../../../etc/passwd"}'
    ),
}

FATAL: dict[str, str] = {
    "oversized": '{"type": "Dance", "x": "' + "y" * MIB + '"}',
}


def tasks(count: int) -> list[TaskSpec]:
    return [
        TaskSpec(block_id=f"b-{n}", input={"prompt": f"prompt {n}", "max_tokens": 3})
        for n in range(count)
    ]


class Rubbish:
    """Sends something before the answer to each message that a worker sends."""

    def __init__(self, frames: list[str | bytes], *, times: int = 1_000_000) -> None:
        self.frames = frames
        self.times = times
        self.coordinator: EmbeddedCoordinator
        self.watch = Watch[Event]()

    def __call__(self, event: Event) -> None:
        self.watch(event)
        if event.kind in (EventKind.ASSIGNED, EventKind.DELIVERED) and self.times > 0:
            self.times -= 1
            for link in self.coordinator.links.values():
                for frame in self.frames:
                    broadcast([link.socket], frame)


async def run(
    rubbish: Rubbish, count: int, check: Callable[[Station], None] = lambda station: None
) -> EmbeddedCoordinator:
    coordinator = EmbeddedCoordinator(tasks(count), strict_seed=True, on_event=rubbish)
    rubbish.coordinator = coordinator
    async with coordinator, Station(coordinator.url) as station:
        await coordinator.finished()
        assert not station.running.done()
        check(station)
    ended = [e.block_id for e in coordinator.history if e.kind is EventKind.DELIVERED]
    assert sorted(ended, key=str) == [f"b-{n}" for n in range(count)]
    assert coordinator.violations() == [], "only frames that the first protocol names"
    assert station.spool.pending() == []
    return coordinator


@pytest.mark.parametrize("kind", SURVIVABLE)
async def test_a_bad_frame_costs_that_frame_alone(kind: str) -> None:
    def never_down(station: Station) -> None:
        assert not any(isinstance(event, LinkDown) for event in station.seen.seen)

    await run(Rubbish([SURVIVABLE[kind]]), 3, never_down)


@pytest.mark.parametrize("kind", FATAL)
async def test_a_fatal_frame_costs_the_connection_and_no_block(kind: str) -> None:
    def was_down(station: Station) -> None:
        assert any(isinstance(event, LinkDown) for event in station.seen.seen)

    await run(Rubbish([FATAL[kind]], times=2), 3, was_down)


async def test_all_of_it_together() -> None:
    await run(Rubbish(list(SURVIVABLE.values()), times=4), 4)


def test_broken_frames_become_events_and_nothing_else() -> None:
    """The short form of ``tests/hostile_frames.py``."""
    mutator, target = Mutator(20_260_101), Target()
    for _ in range(3000):
        target.feed(mutator.frame())
    assert target.frames == 3000
    for outcome in ("BadFrame", "block taken", "answered with bad_request", "CloseLink"):
        assert target.outcomes[outcome] > 0, target.outcomes


@pytest.mark.parametrize("attack", ["deflate bomb", "10k tiny frames"])
async def test_an_attack_on_the_socket_costs_the_link_alone(
    attack: str, tmp_path: Path, tiny_model: Path
) -> None:
    survival = await survive(attack, tmp_path / "data", tiny_model, lets_go=True)
    assert survival.is_well, str(survival)
    assert survival.close_code == 1002
