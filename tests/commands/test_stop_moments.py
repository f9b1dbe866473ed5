"""The short form of ``tests/stop_moments.py``: a real worker, stopped at a few random moments."""

from __future__ import annotations

import asyncio
from pathlib import Path

from command_line import fake_command
from stopped_workers import stop_again_and_again
from worker_process import own_environment, real_command


async def test_nothing_is_lost_whenever_it_is_stopped(tmp_path: Path, tiny_model: Path) -> None:
    environment = own_environment(tmp_path, tiny_model)
    # The first run without an engine: it is not what is stopped here.
    first = await asyncio.create_subprocess_exec(
        *fake_command("benchmark", "--json"), env=environment, stdout=asyncio.subprocess.DEVNULL
    )
    assert await first.wait() == 0
    found = await stop_again_and_again(
        lambda url: real_command("worker", "--coordinator", url),
        environment,
        count=3,
        seed=3,
        lengths=(1, 8, 64),
    )
    assert len(found.stops) == 3
    assert found.blocks > 0
    assert (found.lost, found.accepted_twice) == (0, 0)
    assert found.violations == []
    for stop in found.stops:
        assert stop.status == 0 or (stop.phase, stop.status) == ("starting", -15)
