from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from moved_clock import MovedClock

from ai4all.blocks import Block, as_compute_error
from ai4all.errors import (
    Ai4allError,
    Cancelled,
    DataDirectoryError,
    DeadlineExceeded,
    InvalidModelFile,
    ModelChecksumMismatch,
    ModelSourceError,
)
from ai4all.protocol.messages import Assignment
from ai4all.types.task import ErrorCode, TaskType

YEAR = 365 * 86_400.0
HOME = "/home/planted-owner/models"


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (InvalidModelFile(Path(HOME, "m.gguf"), "is cut short"), "load_failed", "is cut short"),
        (ModelChecksumMismatch(f"{HOME}/m.gguf", "a" * 64, "b" * 64), "load_failed", "b" * 64),
        (ModelSourceError(f"file:{HOME}/m.gguf", "is absent"), "load_failed", "ModelSourceError"),
        (DataDirectoryError(HOME, "the disk is full"), "engine_crashed", "DataDirectoryError"),
        (FileNotFoundError(2, "No such file", HOME), "engine_crashed", "FileNotFoundError"),
    ],
)
def test_no_path_of_the_machine_goes_into_an_answer(
    error: Ai4allError | OSError, code: str, part: str
) -> None:
    answer = as_compute_error(error)
    assert answer.code is ErrorCode(code)
    assert part in answer.info().message
    assert HOME in str(error)
    assert "planted-owner" not in answer.info().model_dump_json()


def assignment(seconds: float, timestamp: datetime | None = None) -> Assignment:
    """One whose deadline is so far from its timestamp, or from now without one."""
    return Assignment(
        block_id="b-1",
        task_type=TaskType.TEXT_COMPLETION,
        input={},
        deadline=(timestamp or datetime.now(UTC)) + timedelta(seconds=seconds),
        model_id="m",
        timestamp=timestamp,
    )


def received(seconds: float, clock: MovedClock, timestamp: datetime | None = None) -> Block:
    return Block.received(assignment(seconds, timestamp), clock)


@pytest.mark.parametrize("ahead", [0.0, 3600.0, -3600.0, 10 * YEAR, -56 * YEAR])
def test_a_clock_that_is_set_later_moves_no_deadline(ahead: float) -> None:
    clock = MovedClock()
    block = received(30.0, clock)
    clock.ahead = ahead
    assert block.remaining == pytest.approx(30.0, abs=1.0)
    metrics = block.failed(Cancelled("x")).metrics
    assert min(metrics.queue_time_ms, metrics.execution_time_ms, metrics.total_time_ms) >= 0.0
    assert metrics.suspended_ms is None


@pytest.mark.parametrize("ahead", [0.0, 3600.0, -3600.0, 10 * YEAR, -56 * YEAR])
def test_who_sets_a_deadline_tells_the_time(ahead: float) -> None:
    clock = MovedClock()
    clock.ahead = ahead
    block = received(30.0, clock, datetime.now(UTC))
    assert block.remaining == pytest.approx(30.0, abs=0.5)


def test_without_a_timestamp_this_machine_tells_the_time() -> None:
    clock = MovedClock()
    clock.ahead = 20.0
    assert received(30.0, clock).remaining == pytest.approx(10.0, abs=1.0)


def test_a_deadline_far_away_is_none_asleep_or_awake() -> None:
    clock = MovedClock()
    block = received(100 * YEAR, clock)
    block.machine_slept(YEAR)
    assert block.remaining is None


def test_a_deadline_that_has_long_passed_still_fits_a_clock_in_nanoseconds() -> None:
    block = received(-8000 * YEAR, MovedClock(), datetime(9999, 12, 31, tzinfo=UTC))
    assert block.deadline is not None
    assert abs(block.deadline * 1e9) < 1 << 62
    assert block.remaining is not None
    assert block.remaining < -YEAR / 13


def test_what_was_slept_is_told_beside_the_other_times() -> None:
    clock = MovedClock()
    block = received(600.0, clock)
    clock.slept += 0.5
    assert block.suspended_ms is None
    clock.slept += 99.5
    metrics = block.failed(Cancelled("x")).metrics
    assert metrics.suspended_ms == pytest.approx(100_000.0, abs=100.0)
    assert metrics.total_time_ms < 10_000.0


async def stopped(block: Block) -> Any:
    """What a block is stopped with."""

    async def compute() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            block.is_computing, block.is_over = False, True
            block.rest()

    block.is_computing = True
    block.task = asyncio.ensure_future(compute())
    await asyncio.sleep(0)
    return block.task


async def test_a_deadline_that_passed_in_a_sleep_stops_the_block() -> None:
    clock = MovedClock()
    block = received(30.0, clock)
    task = await stopped(block)
    clock.slept += 31.0
    block.machine_slept(31.0)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    assert isinstance(block.stopped_by, DeadlineExceeded)
    assert "sleep" in str(block.stopped_by)


async def test_a_deadline_soon_after_a_sleep_is_kept() -> None:
    clock = MovedClock()
    block = received(30.0, clock)
    task = await stopped(block)
    block.machine_slept(20.0)
    block.machine_slept(9.9)
    assert block.stopped_by is None
    assert block.remaining == pytest.approx(0.1, abs=0.1)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    assert isinstance(block.stopped_by, DeadlineExceeded)


async def test_a_block_that_has_ended_has_no_deadline_to_keep() -> None:
    clock = MovedClock()
    block = received(30.0, clock)
    task = await stopped(block)
    block.machine_slept(10.0)
    assert block._alarm is not None
    task.cancel()
    await asyncio.wait([task])
    assert block._alarm is None
