"""Logs: readable on a terminal, JSON lines in a rotated file, never a secret in either.

structlog shapes all events, and what other libraries log through the standard library takes the
same way and the same care. Only the command line calls ``configure_logging``; importing this module
changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import logging.handlers
import os
import re
import select
import sys
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

import structlog
import ujson

from ai4all.config import Settings
from ai4all.errors import DataDirectoryError

__all__ = ["configure_logging", "hide_secret", "redact"]

REDACTED = "[redacted]"
LOG_FILE = "ai4all-native.jsonl"

_MAX_DEPTH = 8

# What is shorter would be taken out of the middle of words, and is no secret.
_MIN_SECRET = 4

# Names of values that are never logged at any level...
_SECRET_KEY = re.compile(
    r"(^|[_-])(token|secret|password|passwd|passphrase|api_?key|authorization|cookie|credentials?)$",
    re.IGNORECASE,
)
# ...and of content that belongs to whoever asked for the work. It is not logged at any level
# either: a log outlives the block.
_CONTENT_KEYS = frozenset(
    {
        "answer", "completion", "content", "context", "input", "inputs", "messages", "output",
        "prompt", "question", "system_prompt", "text", "texts",
    }
)  # fmt: skip
# What is in every event, and is put there after whatever an event may bring along.
_OWN_KEYS = ("level", "logger", "timestamp")
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_BLANK = re.compile(r"\s")
_BEARER = re.compile(r"\b(bearer|basic)\s+[^\s'\",;]+", re.IGNORECASE)
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|(?:set-)?cookie)(['\"]?\s*[:=]\s*).+", re.IGNORECASE
)
_URL_CREDENTIALS = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE)
_QUERY_SECRET = re.compile(
    r"([?&](?:[\w-]*token|api_?key|signature|sig|secret|password)=)[^&\s'\"]+", re.IGNORECASE
)

# Loggers of libraries, and the least level of theirs that is of use. At DEBUG websockets writes
# whole frames and the headers of the handshake, and asyncio the selector it uses.
_LIBRARIES = {
    "aiohttp": logging.WARNING,
    "asyncio": logging.WARNING,
    "urllib3": logging.WARNING,
    "websockets": logging.INFO,
}

# Secrets that came after logging was set up: tokens that were changed meanwhile. The oldest of many
# is worth nothing any more.
_newer_secrets: deque[str] = deque(maxlen=8)

_Event = MutableMapping[str, Any]

# Where lines go, and what is taken out of them. Loggers that were bound before a change follow it.
_outputs: list[_Output] = []
_known_secrets: list[str] = []


def configure_logging(
    settings: Settings, *, json_console: bool = False, quiet: bool = False
) -> None:
    """Send this process's logs to standard error and, when so set, to the data directory.

    Args:
        settings: Level, form and file; its token never appears in any line, whatever logs it.
        json_console: JSON lines on standard error, as with ``log.json``.
        quiet: On standard error, warnings and worse only.

    Raises:
        DataDirectoryError: The log file cannot be written.
    """
    level = logging.getLevelNamesMapping()[settings.log.level.upper()]
    as_json = json_console or settings.log.as_json
    console = _Console(sys.stderr)
    console.setLevel(max(level, logging.WARNING) if quiet else level)
    outputs = [_Output(console, console.write_line, _json if as_json else _for_people())]
    if settings.log.file:
        file = _file_handler(settings)
        outputs.append(_Output(file, file.write_line, _json))

    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    _outputs[:] = outputs
    _known_secrets[:] = _secrets(settings)
    root.addHandler(_Records(outputs))
    root.setLevel(level)
    for name, least in _LIBRARIES.items():
        logging.getLogger(name).setLevel(max(level, least))
    logging.captureWarnings(True)
    # What no line of ours shows is not looked up either (logging's own advice on optimization).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.StackInfoRenderer(),
            _write,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )


def hide_secret(secret: str) -> None:
    """Keep one more secret out of every line, whatever logs it."""
    if len(secret) >= _MIN_SECRET and secret not in _newer_secrets:
        _newer_secrets.append(secret)


def redact(value: Any, secrets: tuple[str, ...] = (), depth: int = 0) -> Any:
    """A copy of a logged value without what must not be in a log.

    Args:
        value: Anything; mappings and sequences are looked through.
        secrets: Texts that are taken out wherever they stand.
        depth: How deep inside the event this is; what is too deep is left out whole.
    """
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth >= _MAX_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return {
            str(key): REDACTED if _is_private(str(key)) else redact(inner, secrets, depth + 1)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(inner, secrets, depth + 1) for inner in value]
    return _redact_text(str(value), secrets)


def _redact_text(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    # Most texts are names and ids. What no pattern can do without is looked for first, at a
    # twentieth of the cost.
    if ":" in text or "=" in text:
        text = _HEADER.sub(rf"\1\2{REDACTED}", text)
    if _BLANK.search(text) is not None:
        text = _BEARER.sub(rf"\1 {REDACTED}", text)
    if "@" in text:
        text = _URL_CREDENTIALS.sub(rf"\1{REDACTED}@", text)
    if "=" in text:
        text = _QUERY_SECRET.sub(rf"\1{REDACTED}", text)
    return text


@functools.lru_cache(maxsize=1024)
def _is_private(key: str) -> bool:
    return key.lower() in _CONTENT_KEYS or _SECRET_KEY.search(key) is not None


def _secrets(settings: Settings) -> tuple[str, ...]:
    """The secrets this process knows, so that no way of logging them exists."""
    token = settings.coordinator.token
    texts = [token.get_secret_value().strip()] if token is not None else []
    if settings.coordinator.token_file is not None:
        # Whoever needs the token reports that its file cannot be read; here nothing can leak then.
        with contextlib.suppress(OSError):
            texts.append(settings.coordinator.token_file.read_text(errors="replace").strip())
    return tuple(text for text in texts if len(text) >= _MIN_SECRET)


def _write(logger: Any, name: str, event: _Event) -> NoReturn:
    """Write an event wherever its level is wanted. The last step: there is nothing after it."""
    level = _LEVELS.get(event["level"], 0)
    wanted = [output for output in _outputs if output.handler.level <= level]
    # A log never ends its program, whatever somebody put into an event; nor does one place that
    # cannot be written take the line from the other.
    with contextlib.suppress(Exception):
        # After the traceback became text: it may quote anything.
        kept = {key: event.pop(key) for key in _OWN_KEYS if key in event}
        shaped = {**redact(event, (*_newer_secrets, *_known_secrets)), **kept}
        for output in wanted:
            with contextlib.suppress(Exception):
                output.write(output.render(shaped.copy()))
    raise structlog.DropEvent


def _json(event: _Event) -> str:
    return ujson.dumps(event, escape_forward_slashes=False, ensure_ascii=False)


def _for_people() -> Callable[[_Event], str]:
    colors = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    render = structlog.dev.ConsoleRenderer(colors=colors)
    return lambda event: render(None, "", event)


@dataclass(frozen=True, slots=True)
class _Output:
    """A place for lines, and the form that they have there."""

    handler: logging.Handler
    write: Callable[[str], None]
    render: Callable[[_Event], str]


class _Records(logging.Handler):
    """Takes what others log through the standard library the way of our own events.

    Args:
        outputs: Closed with this.
    """

    def __init__(self, outputs: Sequence[_Output]) -> None:
        super().__init__()
        self._mine = outputs

    def close(self) -> None:
        """Let go of the outputs."""
        for output in self._mine:
            output.handler.close()
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record anew."""
        # Levels between the usual ones count as the one below.
        level = max(known for known in _LEVELS.values() if known <= max(record.levelno, 10))
        more: dict[str, Any] = {}
        if record.exc_info:
            more["exc_info"] = record.exc_info
        if record.stack_info:
            more["stack"] = record.stack_info
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - as the library does: a log never ends its program.
            return
        structlog.get_logger(record.name).log(level, message, **more)

    def handle(self, record: logging.LogRecord) -> bool:
        """Without a lock: what writes has its own."""
        self.emit(record)
        return True


class _Console(logging.StreamHandler[TextIO]):
    """Standard error, which nobody has to read.

    A terminal may be stopped with Ctrl-S and a pipe be full; whoever waited for them would stop
    working. Lines that are not taken at once are left out, and counted.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._descriptor, self._is_own = _open_once_more(stream)
        self._rest = b""
        self._left_out = 0

    def close(self) -> None:
        """Let go of what was opened once more."""
        if self._descriptor is not None and self._is_own:
            os.close(self._descriptor)
        self._descriptor, self._is_own = None, False
        super().close()

    def write_line(self, line: str) -> None:
        """Write a line and show it at once, or leave it out."""
        self.acquire()
        try:
            left_out = self._write(line + self.terminator)
        finally:
            self.release()
        if left_out:
            structlog.get_logger(__name__).warning("lines_left_out", count=left_out)

    def _write(self, text: str) -> int:
        """Write ``text``; returns how many lines before it were left out."""
        descriptor = self._descriptor
        if descriptor is None:
            self.stream.write(text)
            self.flush()
            return 0
        self._rest = _taken(descriptor, self._rest)
        if self._rest:
            self._left_out += 1
            return 0
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        data = text.encode(encoding, "replace")
        self._rest = _taken(descriptor, data)
        if self._rest == data:
            # Not a letter of it: nothing has to be finished later.
            self._rest = b""
            self._left_out += 1
            return 0
        left_out, self._left_out = self._left_out, 0
        return left_out


def _taken(descriptor: int, data: bytes) -> bytes:
    """Write what is taken at once; returns the rest."""
    # What is said to be ready takes this much without a wait.
    while data and select.select((), (descriptor,), (), 0)[1]:
        try:
            data = data[os.write(descriptor, data[: select.PIPE_BUF]) :]
        except BlockingIOError:
            break
    return data


def _open_once_more(stream: TextIO) -> tuple[int | None, bool]:
    """Where to write without a wait, and whether it was opened here.

    None for a stream that is none of the system's.
    """
    try:
        descriptor = stream.fileno()
        # A terminal says that it is ready also when it has too little room. Opened once more it
        # can be told not to wait, and whoever shares it does not notice.
        if os.isatty(descriptor):
            flags = os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
            with contextlib.suppress(OSError):
                return os.open(os.ttyname(descriptor), flags), True
        select.select((), (descriptor,), (), 0)
    except (AttributeError, OSError, ValueError):
        return None, False
    return descriptor, False


class _PrivateRotatingFile(logging.handlers.RotatingFileHandler):
    """A rotated log file that only its owner can read."""

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.baseFilename, flags, 0o600)
        os.fchmod(descriptor, 0o600)
        self._size = os.fstat(descriptor).st_size
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def write_line(self, line: str) -> None:
        """Write a line, into a new file if it has no room in this one."""
        text = line + self.terminator
        size = len(text.encode("utf-8", "backslashreplace"))
        self.acquire()
        try:
            if self.stream is None:
                self.stream = self._open()
            if self.maxBytes > 0 and self._size + size > self.maxBytes:
                self.doRollover()
            self._size += size
            self.stream.write(text)
            self.stream.flush()
        finally:
            self.release()


def _file_handler(settings: Settings) -> _PrivateRotatingFile:
    directory = Path(settings.data_dir) / "logs"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _PrivateRotatingFile(
            directory / LOG_FILE,
            maxBytes=settings.log.max_file_mb << 20,
            backupCount=settings.log.backups,
        )
    except OSError as error:
        raise DataDirectoryError(directory, error.strerror or str(error)) from error
