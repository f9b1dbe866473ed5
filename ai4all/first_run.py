"""What happens once on a machine: directories, an identity, the benchmark model, the benchmark.

Each step leaves something behind that tells the next start that it is done; the marker file says
that all are. An interrupted first run goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console

from ai4all.config import Settings
from ai4all.errors import DataDirectoryError, ModelChecksumMismatch, ModelNotFound
from ai4all.models.files import disk_error, sync_directory, write_atomically
from ai4all.models.progress import show_download
from ai4all.models.sources import (
    BENCHMARK_MODEL_ID,
    BENCHMARK_SHA256,
    BENCHMARK_SIZE_BYTES,
)
from ai4all.models.store import ModelStore
from ai4all.types.model import ModelFile

__all__ = [
    "FirstRunReport",
    "ensure_first_run",
    "is_initialized",
    "open_store",
    "prepare_data_dir",
    "worker_id",
]

_log = structlog.get_logger(__name__)

MARKER = ".initialized"
WORKER_ID = "worker_id"
DIRECTORIES = ("models", "logs", "cache")

# The last is that of a process that may write no more (``ulimit -f``).
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_OWN_NAMES = frozenset({MARKER, WORKER_ID, *DIRECTORIES, "config.toml"})


@dataclass(frozen=True, slots=True)
class FirstRunReport:
    """What was there and what was done.

    Attributes:
        worker_id: The persistent identity.
        model: The benchmark model; None when its owner removed it and uses another.
        was_first: Whether this was the first run, or the rest of one.
        benchmark: What the benchmark returned, or None when it was not run.
    """

    worker_id: str
    model: ModelFile | None
    was_first: bool
    benchmark: Any = None


def prepare_data_dir(path: Path) -> None:
    """Make the data directory and what belongs below it, readable by nobody else.

    Modes that let others in are put right, but only in a directory that is empty or ours: a
    directory named by mistake must not lose its mode. A full disk is no reason not to start where
    the first run is done: there may be results to deliver, and what cannot be kept is told later.

    Raises:
        DataDirectoryError: It cannot be used; says why.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise DataDirectoryError(path, "is not a directory") from error
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        _make_private(path)
        for name in DIRECTORIES:
            (path / name).mkdir(mode=0o700, exist_ok=True)
        _make_content_private(path)
        _probe(path)
    except FileExistsError as error:
        raise DataDirectoryError(error.filename or path, "is not a directory") from error
    except DataDirectoryError:
        raise
    except OSError as error:
        raise disk_error(path, error) from error


def _probe(path: Path) -> None:
    """Permission bits do not tell of a read-only or full file system; writing does."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".probe.", dir=path) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        if error.errno not in _NO_ROOM or not is_initialized(path):
            raise


def _make_private(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise DataDirectoryError(path, f"belongs to another user (uid {status.st_uid})")
    mode = stat.S_IMODE(status.st_mode)
    if not mode & 0o077:
        return
    names = set(os.listdir(path))
    if not (names <= _OWN_NAMES or names & {MARKER, WORKER_ID}):
        raise DataDirectoryError(
            path,
            f"is open to others (mode {mode:o}) and holds other files; "
            f"name an empty directory, or run: chmod 700 {path}",
        )
    path.chmod(0o700)


def _make_content_private(path: Path) -> None:
    """Close to others what lies below, too: the directory may have stood open until now."""
    for directory, _, names in os.walk(path):
        for name in ("", *names):
            entry = Path(directory, name)
            # Another process may rotate a log or take a partial file away meanwhile.
            with contextlib.suppress(FileNotFoundError):
                status = entry.lstat()
                mode = stat.S_IMODE(status.st_mode)
                ours = not stat.S_ISLNK(status.st_mode) and status.st_uid == os.geteuid()
                if ours and mode & 0o077:
                    entry.chmod(mode & 0o700)


def worker_id(path: Path) -> str:
    """The identity kept in the data directory; made when there is none.

    Raises:
        DataDirectoryError: It cannot be read or written, or it is no UUID.
    """
    file = path / WORKER_ID
    try:
        if not file.exists():
            _create_worker_id(file)
        with file.open("rb") as reading:
            raw = reading.read(256)
    except OSError as error:
        raise disk_error(file, error) from error
    try:
        return str(uuid.UUID(raw.decode("ascii").strip()))
    except ValueError as error:
        problem = "does not hold a UUID; restore it, or remove it to get a new identity"
        raise DataDirectoryError(file, problem) from error


def _create_worker_id(file: Path) -> None:
    """Of several processes that start at once, one wins, and all read what it wrote."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as writing:  # mkstemp made it 0600
            writing.write(f"{uuid.uuid4()}\n".encode())
            writing.flush()
            os.fsync(writing.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, file)
            sync_directory(file.parent)
    finally:
        os.unlink(temporary)


def is_initialized(path: Path) -> bool:
    """Whether the first run of this data directory is done."""
    return (path / MARKER).exists()


def open_store(settings: Settings) -> ModelStore:
    """The model store as the settings want it."""
    return ModelStore(
        settings.data_dir,
        allowed_sources=settings.models.allowed_sources,
        disk_reserve_bytes=settings.models.disk_reserve_mb << 20,
    )


async def ensure_first_run(
    settings: Settings,
    store: ModelStore,
    run_benchmark: Callable[[ModelFile], Awaitable[Any]],
    console: Console,
) -> FirstRunReport:
    """Do what the first run has left to do; afterwards, only look that all is well.

    Args:
        settings: Where the data is, and which model is the benchmark's.
        store: The model store of that directory.
        run_benchmark: Measures this machine with the model, and keeps the figures.
        console: Where the download's progress bar goes; silent unless it is a terminal.

    Raises:
        DataDirectoryError: The data directory cannot be used, or the disk is full.
        ModelError: The benchmark model cannot be had.
        Exception: Whatever ``run_benchmark`` raises; the first run is then not done.
    """
    data_dir = settings.data_dir
    await asyncio.to_thread(prepare_data_dir, data_dir)
    identity = settings.worker.id
    if identity is None:
        identity = await asyncio.to_thread(worker_id, data_dir)
    if is_initialized(data_dir):
        return FirstRunReport(identity, await _present_model(settings, store, console), False)

    _log.info("first_run_started", data_dir=str(data_dir), worker_id=identity)
    model = await _fetch_model(settings, store, console)
    benchmark = await run_benchmark(model)
    done_at = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        await asyncio.to_thread(write_atomically, data_dir / MARKER, f"{done_at}\n".encode())
    except OSError as error:
        raise disk_error(data_dir, error) from error
    _log.info("first_run_done", data_dir=str(data_dir))
    return FirstRunReport(identity, model, True, benchmark)


async def _present_model(
    settings: Settings, store: ModelStore, console: Console
) -> ModelFile | None:
    try:
        return await asyncio.to_thread(store.get, BENCHMARK_MODEL_ID)
    except (ModelNotFound, ModelChecksumMismatch) as error:
        # Whoever uses another model may have removed this one on purpose.
        if settings.worker.model != BENCHMARK_MODEL_ID:
            return None
        _log.warning("benchmark_model_fetched_again", error=str(error))
        return await _fetch_model(settings, store, console)


async def _fetch_model(settings: Settings, store: ModelStore, console: Console) -> ModelFile:
    sha256 = settings.models.benchmark_sha256
    size = BENCHMARK_SIZE_BYTES if sha256 == BENCHMARK_SHA256 else None
    with show_download(console, "the benchmark model") as progress:
        return await store.add(
            BENCHMARK_MODEL_ID,
            settings.models.benchmark_source,
            sha256=sha256,
            size_bytes=size,
            progress=progress,
        )
