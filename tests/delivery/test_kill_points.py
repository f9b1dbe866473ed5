"""The short form of ``tests/kill_points.py``: one kill at each point, at a call that is drawn."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import ujson

_SCRIPT = Path(__file__).parents[1] / "kill_points.py"


async def test_a_kill_at_any_point_loses_nothing_that_was_promised() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", str(_SCRIPT), "--drawn", "--times", "1", "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert out, err.decode()
    document = ujson.loads(out)
    assert document["short"] == []
    assert process.returncode == 0
    assert len(document["points"]) >= 20
    assert all(point["strikes"] == 1 for point in document["points"])
    assert sum(point["delivered"] for point in document["points"]) > 0
