"""Hashing, copying and checking of large files, off the event loop and cancellable."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ai4all.errors import DataDirectoryError

__all__ = [
    "DownloadProgress",
    "FileStamp",
    "ProgressCallback",
    "Reporter",
    "check_free_space",
    "disk_error",
    "hash_file",
    "in_thread",
    "replace_durably",
    "sha256_of",
    "size_of",
    "stamp_of",
    "sync_directory",
    "write_atomically",
]

CHUNK_BYTES = 1 << 20
_REPORT_INTERVAL = 0.1  # seconds

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far a fetch is.

    Attributes:
        phase: "downloading", "extracting", "copying" or "checking".
        done_bytes: Bytes done in this phase, those of an earlier interrupted run included.
        total_bytes: Bytes to do in this phase, or None while nobody knows.
    """

    phase: str
    done_bytes: int
    total_bytes: int | None


ProgressCallback = Callable[[DownloadProgress], None]


class Reporter:
    """Passes progress on to the loop's thread, from any thread, at a bounded rate."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._last_time = 0.0
        self._last_phase = ""

    def report(self, phase: str, done_bytes: int, total_bytes: int | None) -> None:
        """Report. The first and the last figure of a phase always pass."""
        if self._callback is None:
            return
        now = time.monotonic()
        recent = now - self._last_time < _REPORT_INTERVAL
        if recent and phase == self._last_phase and done_bytes != total_bytes:
            return
        self._last_time, self._last_phase = now, phase
        progress = DownloadProgress(phase, done_bytes, total_bytes)
        self._loop.call_soon_threadsafe(self._callback, progress)


async def in_thread(work: Callable[[threading.Event], T]) -> T:
    """Run ``work`` in a thread. When cancelled, set its event and wait until it has stopped.

    Without the wait, a cancelled fetch would go on writing behind the back of the next one.
    """
    stop = threading.Event()
    task = asyncio.create_task(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # retrieved: what a stopped thread says is of no interest
        raise


def hash_file(
    path: Path, stop: threading.Event | None = None, reporter: Reporter | None = None
) -> str:
    """The lower-case hex sha256 of a file. Blocks; once ``stop`` is set, the digest is of a part.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        total = os.fstat(file.fileno()).st_size
        done = 0
        while (count := file.readinto(buffer)) and not (stop is not None and stop.is_set()):
            digest.update(buffer[:count])
            done += count
            if reporter is not None:
                reporter.report("checking", done, max(total, done))
    return digest.hexdigest()


async def sha256_of(path: Path, reporter: Reporter | None = None) -> str:
    """``hash_file`` off the event loop.

    Raises:
        OSError: The file cannot be read.
    """
    return await in_thread(lambda stop: hash_file(path, stop, reporter))


def size_of(path: Path) -> int:
    """The size of a file, 0 when there is none."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What changes when a file's content does: reason enough to hash it again."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int


def stamp_of(path: Path) -> FileStamp:
    """The stamp of a file.

    Raises:
        OSError: There is none, or it cannot be read.
    """
    status = path.stat()
    return FileStamp(
        status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a small private file so that a reader sees the old content or the new, never less.

    Raises:
        OSError: It cannot be written; the old file is untouched.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:  # mkstemp made it 0600
            file.write(content)
        replace_durably(Path(temporary), path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def check_free_space(directory: Path, needed_bytes: int, reserve_bytes: int) -> None:
    """Make sure that ``needed_bytes`` more leave the reserve untouched.

    Raises:
        DataDirectoryError: They do not; names all figures.
    """
    free = shutil.disk_usage(directory).free
    if free - needed_bytes < reserve_bytes:
        raise DataDirectoryError(
            directory,
            f"{_megabytes(needed_bytes)} are needed beside the reserve of "
            f"{_megabytes(reserve_bytes)}, but {_megabytes(free)} are free",
        )


def disk_error(path: Path, error: OSError) -> DataDirectoryError:
    """The error of ours for a failed write below ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataDirectoryError(path, "the disk is full")
    return DataDirectoryError(path, error.strerror or str(error))


def replace_durably(source: Path, target: Path) -> None:
    """Rename within one file system so that the new name survives a power cut with its content."""
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    source.replace(target)
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"
