"""What is kept of a death of the engine: enough to find the fault, nothing of any request.

Of what the engine process wrote to standard error only lines of known shape are taken. The rest
may quote a prompt or a grammar.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import ujson

__all__ = ["CrashRecord", "CrashRecords", "assertion_in", "fault_in", "signal_name"]

_ASSERTION: Final = re.compile(r"^ai4all engine aborted: (.+)$", re.MULTILINE)

# Where the engine was built says nothing of its fault, but perhaps who built it.
_SOURCE_FOLDER: Final = re.compile(r"^.*?/(?=[^/:]+:\d+: )")

# The interpreter, the C and C++ libraries and the sanitizers on their own way out.
_FAULT: Final = re.compile(
    r"^(Fatal Python error: .+|terminate called .+|free\(\): .+|malloc.*: .+|double free .+"
    r"|corrupted .+|munmap_chunk\(\): .+|\*\*\* stack smashing .+|==\d+==ERROR: .+|SUMMARY: .+)$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashRecord:
    """One death.

    Attributes:
        time: When, in ISO 8601, UTC.
        kind: "crashed", or "hung" when it was killed for that.
        state: What it was doing; one of ``EngineState``.
        signal: Name of the signal that ended it, or None.
        exit_status: Its exit status when no signal did.
        assertion: The assertion that failed, with file and line, or None.
        fault: The last word of a run-time library, or None.
        problem: What rule of the channel it broke, or None.
        model_sha256: The model it held or was loading, or None.
        engine_build: The build, or None when it died before it could say.
        options: How the model was run.
        seconds: How long it had made no progress, when it hung.
        process_id: Its process id.
    """

    time: str
    kind: str
    state: str
    signal: str | None
    exit_status: int | None
    assertion: str | None
    fault: str | None
    problem: str | None
    model_sha256: str | None
    engine_build: str | None
    options: dict[str, Any] | None
    seconds: float | None
    process_id: int


class CrashRecords:
    """A folder of records, the newest ``keep`` of them.

    Args:
        folder: Made when it is needed. None keeps nothing.
        keep: Most records to keep.
    """

    def __init__(self, folder: Path | None, keep: int = 50) -> None:
        self._folder = folder
        self._keep = keep

    def add(self, record: CrashRecord) -> str | None:
        """Keep a record; returns the name of its file, or None where nothing is kept. Blocks.

        Raises:
            OSError: It cannot be written.
        """
        if self._folder is None:
            return None
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        when = datetime.fromisoformat(record.time)
        name = f"crash-{when:%Y%m%dT%H%M%S%f}-{record.process_id}.json"
        text = ujson.dumps(asdict(record), indent=2, escape_forward_slashes=False)
        write_whole(self._folder / name, text.encode("utf-8", "replace") + b"\n")
        for old in sorted(self._folder.glob("crash-*.json"))[: -self._keep]:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
        return name


def write_whole(path: Path, content: bytes) -> None:
    """Replace a small private file at once: a reader sees the old content or the new.

    Raises:
        OSError: It cannot be written; the old file is untouched.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:  # mkstemp made it 0600
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def now() -> str:
    """The time for a record."""
    return datetime.now(UTC).isoformat()


def assertion_in(stderr: str) -> str | None:
    """The assertion that the engine's abort handler wrote last, with file and line."""
    found = _ASSERTION.findall(stderr)
    return _SOURCE_FOLDER.sub("", found[-1].strip())[:2048] if found else None


def fault_in(stderr: str) -> str | None:
    """The line in which a run-time library said why it gave up."""
    found = _FAULT.search(stderr)
    return found.group(1).strip()[:512] if found else None


def signal_name(number: int) -> str:
    """Such as ``SIGSEGV``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
