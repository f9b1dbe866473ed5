"""The short form of ``tests/killed_processes.py``: a worker and an engine are killed once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from command_line import fake_command
from sudden_ends import kill_after_commit, kill_engine
from worker_process import own_environment, real_command


@pytest.fixture
async def environment(tmp_path: Path, tiny_model: Path) -> dict[str, str]:
    variables = own_environment(tmp_path, tiny_model)
    # The first run without an engine: it is not what is killed here.
    first = await asyncio.create_subprocess_exec(
        *fake_command("benchmark", "--json"), env=variables, stdout=asyncio.subprocess.DEVNULL
    )
    assert await first.wait() == 0
    return variables


async def test_a_result_that_was_sent_but_not_acknowledged_comes_again_byte_for_byte(
    environment: dict[str, str],
) -> None:
    again = await kill_after_commit(real_command("worker", "--coordinator"), environment)
    assert again.is_same
    assert again.repeats == 0


async def test_the_death_of_an_engine_is_told_and_the_next_block_computes(
    environment: dict[str, str],
) -> None:
    seen = await kill_engine(real_command("worker", "--coordinator"), environment)
    assert (seen.code, seen.retryable) == ("engine_crashed", True)
    assert seen.heartbeats >= 2
    assert seen.drops == 0
