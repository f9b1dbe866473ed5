"""Kills a process, or fails its calls, at the n-th change of a file below one directory.

It works on the calls to the C library, below Python and below SQLite, so that no part of the
product knows of it and every one is hit: ``fault_shim.c`` is compiled once and preloaded. The
process that is to be hit calls ``arm``. Linux only.
"""

from __future__ import annotations

import ctypes
import enum
import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["Fault", "arm", "calls", "disarm", "is_loaded", "preloaded_environment"]

_SOURCE = Path(__file__).with_name("fault_shim.c")
_FOR_EVER = (1 << 62) - 1


class Fault(enum.IntEnum):
    """What happens at the chosen call. The values are those of ``fault_shim.c``."""

    COUNT = 0
    """Nothing: calls are only counted."""
    KILL_BEFORE = 1
    KILL_AFTER = 2
    KILL_TORN = 3
    """The process is killed when half of what it writes is written."""
    FAIL = 4
    FAIL_SHORT = 5
    """Of what it writes, half is written, and the call says so; other calls fail."""


def preloaded_environment(folder: Path) -> dict[str, str]:
    """Compile the shim into ``folder``; the environment of a process that has it.

    Raises:
        RuntimeError: There is no C compiler, or it fails.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("a C compiler is needed (cc)")
    library = folder / "fault_shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the shim does not compile: {done.stderr}")
    return os.environ | {
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def is_loaded() -> bool:
    """Whether this process has the shim."""
    return hasattr(ctypes.CDLL(None), "fault_arm")


def arm(
    directory: Path,
    fault: Fault,
    first: int = 1,
    *,
    last: int | None = None,
    error: int = 0,
    log: int = -1,
) -> None:
    """Count from now on, and do what is to be done at the call ``first``.

    Args:
        directory: What changes below it counts.
        fault: What happens.
        first: Which call, counted from 1.
        last: The last call that fails; by default the same one. -1: until ``disarm``.
        error: ``errno`` of a call that fails.
        log: Descriptor that gets a line for each call: its number, its name and the file's.
    """
    end = first if last is None else _FOR_EVER if last < 0 else last
    ctypes.CDLL(None).fault_arm(
        os.fsencode(directory),
        ctypes.c_long(first),
        ctypes.c_long(end),
        int(fault),
        error,
        log,
    )


def disarm() -> None:
    """Let everything through."""
    ctypes.CDLL(None).fault_disarm()


def calls() -> int:
    """How many were counted since ``arm``."""
    function = ctypes.CDLL(None).fault_calls
    function.restype = ctypes.c_long
    return int(function())
