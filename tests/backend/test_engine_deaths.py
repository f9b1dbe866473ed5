"""The short form of ``tests/engine_deaths.py``: one death of each kind under a real worker."""

from __future__ import annotations

from pathlib import Path

from mortality import KINDS, kill_again_and_again

from ai4all.backend.watchdog import WatchdogLimits
from ai4all.types.task import ErrorCode


async def test_each_death_is_told_and_survived_without_losing_the_link(
    tmp_path: Path, tiny_model: Path
) -> None:
    found = await kill_again_and_again(
        tmp_path, tiny_model, len(KINDS), limits=WatchdogLimits(silence=1.0)
    )
    assert {death.kind: death.code for death in found.deaths} == {
        kind: ErrorCode.ENGINE_HUNG if kind == "hang" else ErrorCode.ENGINE_CRASHED
        for kind in KINDS
    }
    assert all(death.retryable for death in found.deaths)
    assert (found.links, found.drops) == (1, 0)
    assert found.heartbeats > 0
    assert found.answers == 1
    assert found.records == len(KINDS)
