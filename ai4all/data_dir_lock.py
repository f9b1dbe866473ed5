"""One working process at a time in a data directory, held by a lock that dies with its process.

It is a lock of the operating system (``flock``) on a file that stays where it is: a crash, a
SIGKILL or a power cut lets go of it, and there is nothing to clean up. What stands in the file is
for people alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import ujson

from ai4all.errors import DataDirectoryError, DataDirectoryInUse
from ai4all.models.files import disk_error

__all__ = ["LOCK_FILE", "hold_data_dir"]

LOCK_FILE: Final = "lock"
"""Its name in the data directory."""

# How long to wait for a predecessor that is on its way out.
_PATIENCE_S: Final = 2.0
_LOOK_EVERY_S: Final = 0.05

_BUSY: Final = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def hold_data_dir(path: Path, command: str) -> Iterator[None]:
    """Be the one that works in a data directory while the context is open. Blocks a little.

    Args:
        path: The directory; it exists.
        command: Who we are, for the one that comes second.

    Raises:
        DataDirectoryInUse: Another process holds it; says which.
        DataDirectoryError: It cannot be locked at all.
    """
    file = path / LOCK_FILE
    try:
        # Not inherited: an engine process that outlives this one for a moment holds nothing.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise disk_error(file, error) from error
    try:
        _lock(descriptor, path)
        _sign(descriptor, command)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    patience_ends = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _BUSY:
                raise DataDirectoryError(
                    path, f"its file system has no locks ({error.strerror}); name one on a disk"
                ) from error
            if time.monotonic() >= patience_ends:
                raise DataDirectoryInUse(path, _holder(descriptor)) from None
            time.sleep(_LOOK_EVERY_S)
        else:
            return


def _sign(descriptor: int, command: str) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    text = ujson.dumps({"pid": os.getpid(), "command": command, "since": since}) + "\n"
    # A full disk must not keep the worker from delivering what it has; the lock is held anyway.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        signed = ujson.loads(os.pread(descriptor, 4096, 0))
        who = f"process {int(signed['pid'])}, {signed['command']!s:.40}"
        return f"{who} since {signed['since']!s:.40}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
