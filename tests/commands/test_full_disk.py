"""The short form of ``tests/full_disk.py``: the disk of a real worker is full once."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import ujson

_SCRIPT = Path(__file__).parents[1] / "full_disk.py"


async def test_a_full_disk_loses_nothing_and_work_goes_on_when_there_is_room() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", str(_SCRIPT), "--brief", "--rounds", "1", "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert out, err.decode()
    found = ujson.loads(out)
    assert found["short"] == []
    assert process.returncode == 0
    assert found["sent_from_memory"] == 1
    assert found["blocks"] > 0
