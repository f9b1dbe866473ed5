"""Frames to messages and back.

Whatever a peer sends, only ``RemoteProtocolError`` comes out, and it names the place of the fault
but never its content: frames hold people's prompts, and errors end up in logs.

A frame is checked in this order: size, nesting, JSON, the numbers and text that JSON allows and
other languages do not, protocol version, type, fields. Of two equal keys in one object the last
one counts, as in JavaScript.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import ujson
from pydantic import ValidationError

from ai4all.errors import (
    BadRequest,
    ComputeError,
    LocalProtocolError,
    RemoteProtocolError,
    UnsupportedTask,
)
from ai4all.protocol.messages import (
    PROTOCOL_VERSION,
    Assignment,
    Cancel,
    ClientMessage,
    Decline,
    Drain,
    Error,
    Goodbye,
    Heartbeat,
    Message,
    NoWork,
    Progress,
    Reconcile,
    Register,
    Registered,
    RequestWork,
    ResultAck,
    ServerMessage,
    SubmitResult,
)

__all__ = [
    "DEFAULT_LIMITS",
    "ForeignVersion",
    "Limits",
    "UnfitAssignment",
    "UnknownMessage",
    "decode_client_message",
    "decode_server_message",
    "describe_invalid",
    "encode",
    "put_under",
]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a frame may be before anything reads it.

    Attributes:
        max_bytes: Length of the frame in UTF-8.
        max_depth: Objects and arrays within each other.
    """

    max_bytes: int = 1024 * 1024
    max_depth: int = 64


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class UnknownMessage:
    """A well-formed frame of a type that this side does not know; ``type`` is cut to 64 letters."""

    type: str


@dataclass(frozen=True, slots=True)
class ForeignVersion:
    """A frame of another major version of the protocol; its fields were not looked at."""

    theirs: str


@dataclass(frozen=True, slots=True)
class UnfitAssignment:
    """An assignment that cannot be read in full, but well enough to answer it.

    Attributes:
        block_id: The block to answer for.
        error: The answer: ``UnsupportedTask`` or ``BadRequest`` with the path of the bad field.
    """

    block_id: str
    error: ComputeError


_CLIENT_TYPES: Final[Mapping[str, type[Message]]] = {
    "Register": Register,
    "Heartbeat": Heartbeat,
    "RequestWork": RequestWork,
    "SubmitResult": SubmitResult,
    "Decline": Decline,
    "Goodbye": Goodbye,
    "Progress": Progress,
    "Reconcile": Reconcile,
}
_SERVER_TYPES: Final[Mapping[str, type[Message]]] = {
    "Registered": Registered,
    "Assignment": Assignment,
    "NoWork": NoWork,
    "ResultAck": ResultAck,
    "Error": Error,
    "Cancel": Cancel,
    "Drain": Drain,
}

# Strings are matched whole, so that brackets inside them do not count. The closing quote is
# optional: without that, a frame of unclosed quotes would be scanned once for each of them.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)

# Most frames hold no value that only ujson can read. Plain searches say so at a few nanoseconds a
# character, and the values are walked only when there is a hint. (One pattern for all of them
# would cost five times as much; one that begins with a letter is found by its letter.)
_HINTS: Final = ("NaN", "Infinity", "\\ud", "\\uD")
_LARGE_EXPONENTS: Final = (
    re.compile(r"e(?<=[0-9]e)\+?[0-9]{3}"),
    re.compile(r"E(?<=[0-9]E)\+?[0-9]{3}"),
)
# Hexadecimal ids and hashes look like that too, but stand in quotes.
_LARGE_NUMBER = re.compile(r"[:,\[\s]-?[0-9.]+[eE]\+?[0-9]{3}")
_OF_ENVELOPE: Final = {"id", "timestamp", "version"}
_MAX_NAME_LENGTH = 64
_MAX_PATH_LENGTH = 200


def encode(message: Message, envelope: str | None = None) -> str:
    """Write a message as the text of one frame.

    The same message and envelope give the same text every time. Where a field may hold anything, a
    number that is not finite is written as ``null``.

    Args:
        message: What to say.
        envelope: What to say it under, from ``messages.envelope``; None keeps the one that the
            message has, if any.

    Raises:
        LocalProtocolError: It holds something that JSON cannot.
    """
    try:
        text = message.model_dump_json(exclude=_OF_ENVELOPE)
        # The envelope comes last, where a reader of a log looks for it last.
        own = "{}"
        if envelope is None:
            own = message.model_dump_json(include=_OF_ENVELOPE, exclude_none=True)
    except ValueError as exc:
        raise LocalProtocolError(f"a {type(message).__name__} that JSON cannot hold") from exc
    if envelope is not None:
        return put_under(text, envelope)
    return text if own == "{}" else f"{text[:-1]},{own[1:]}"


def put_under(text: str, envelope: str) -> str:
    """The text of a frame without an envelope, under one."""
    return f"{text[:-1]},{envelope}}}"


def decode_server_message(
    frame: str | bytes, limits: Limits = DEFAULT_LIMITS
) -> ServerMessage | UnknownMessage | ForeignVersion | UnfitAssignment:
    """Read what a coordinator sent.

    Args:
        frame: The text of a frame, or its UTF-8.
        limits: Checked before anything is parsed.

    Raises:
        RemoteProtocolError: The frame breaks a rule.
    """
    data, problem = _parse(frame, limits)
    assignment_id = _assignment_id(data)
    if problem is not None:
        if assignment_id is None:
            raise RemoteProtocolError(problem)
        return UnfitAssignment(assignment_id, BadRequest(problem))
    kind = _kind(data, _SERVER_TYPES)
    if not isinstance(kind, type):
        return kind
    try:
        return cast("ServerMessage", kind.model_validate(data))
    except ValidationError as exc:
        if assignment_id is None:
            raise RemoteProtocolError(describe_invalid(exc, kind.__name__)) from None
        return UnfitAssignment(assignment_id, _unfit(data, exc))


def decode_client_message(
    frame: str | bytes, limits: Limits = DEFAULT_LIMITS
) -> ClientMessage | UnknownMessage | ForeignVersion:
    """Read what a worker sent.

    Args:
        frame: The text of a frame, or its UTF-8.
        limits: Checked before anything is parsed.

    Raises:
        RemoteProtocolError: The frame breaks a rule.
    """
    data, problem = _parse(frame, limits)
    if problem is not None:
        raise RemoteProtocolError(problem)
    kind = _kind(data, _CLIENT_TYPES)
    if not isinstance(kind, type):
        return kind
    try:
        return cast("ClientMessage", kind.model_validate(data))
    except ValidationError as exc:
        raise RemoteProtocolError(describe_invalid(exc, kind.__name__)) from None


def describe_invalid(exc: ValidationError, root: str) -> str:
    """Say where the first fault is and what would be right, without repeating what was there.

    Args:
        exc: What the model raised.
        root: What to call the whole value, such as ``input``.
    """
    first, *rest = exc.errors(include_url=False, include_context=False, include_input=False)
    path = root
    for part in first["loc"]:
        path = _step(path, part)
    # The text of this one kind quotes the value.
    known = first["type"] != "union_tag_invalid"
    text = first["msg"] if known else "Input should be one of the known kinds"
    return f"{path}: {text}" + (f" (and {len(rest)} more)" if rest else "")


def _parse(frame: str | bytes, limits: Limits) -> tuple[dict[str, Any], str | None]:
    """Read a frame's object, and say what in it is unsafe, if anything is."""
    text = _as_text(frame, limits.max_bytes)
    _check_depth(text, limits.max_depth)
    try:
        data = ujson.loads(text)
    except (ValueError, RecursionError, OverflowError):
        # ujson's own text can quote the frame, and a number of 4,301 digits is a bare ValueError.
        raise RemoteProtocolError("a frame that is not JSON") from None
    if not isinstance(data, dict):
        raise RemoteProtocolError("a frame that is not a JSON object")
    return data, _find_unsafe(data) if _is_suspect(text) else None


def _as_text(frame: str | bytes, max_bytes: int) -> str:
    # The first look is free; a text has at least as many bytes as characters.
    too_long = len(frame) > max_bytes
    try:
        if isinstance(frame, bytes):
            text = "" if too_long else frame.decode("utf-8")
        else:
            text = frame
            too_long = too_long or (not text.isascii() and len(text.encode("utf-8")) > max_bytes)
    except UnicodeError:
        raise RemoteProtocolError("a frame that is not UTF-8") from None
    if too_long:
        raise RemoteProtocolError(f"a frame longer than {max_bytes} bytes")
    return text


def _check_depth(text: str, max_depth: int) -> None:
    if text.count("{") + text.count("[") <= max_depth:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        token = match[0]
        if token in ("{", "["):
            depth += 1
            if depth > max_depth:
                raise RemoteProtocolError(f"a frame nested deeper than {max_depth}")
        elif token in ("}", "]"):
            depth -= 1


def _is_suspect(text: str) -> bool:
    for hint in _HINTS:
        if hint in text:
            return True
    for exponent in _LARGE_EXPONENTS:
        if exponent.search(text) is not None:
            return _LARGE_NUMBER.search(text) is not None
    return False


def _find_unsafe(value: object, path: str = "frame") -> str | None:
    """Find a value that our side could read but not everyone: the problem, or None."""
    match value:
        case str():
            # Only a lone surrogate cannot be encoded.
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                return f"{path}: text with a lone surrogate"
        case float() if not math.isfinite(value):
            return f"{path}: a number that is not finite"
        case dict():
            for key, item in value.items():
                if _find_unsafe(key) is not None:
                    return f"{path}: a key with a lone surrogate"
                if problem := _find_unsafe(item, _step(path, key)):
                    return problem
        case list():
            for index, item in enumerate(value):
                if problem := _find_unsafe(item, _step(path, index)):
                    return problem
    return None


def _step(path: str, part: str | int) -> str:
    # A key of the peer's choosing may be anything, even a prompt; a name is no content.
    fit = isinstance(part, int) or (part.isidentifier() and len(part) <= _MAX_NAME_LENGTH)
    return f"{path}.{part if fit else '?'}"[:_MAX_PATH_LENGTH]


def _kind(
    data: dict[str, Any], known: Mapping[str, type[Message]]
) -> type[Message] | UnknownMessage | ForeignVersion:
    # The version first: in another one, nothing else need mean what it means here.
    version = data.get("version")
    if isinstance(version, dict):
        major = version.get("major")
        if type(major) is int and major != PROTOCOL_VERSION.major:
            parts = (version.get(name) for name in ("major", "minor", "patch"))
            theirs = ".".join(str(part) if type(part) is int else "?" for part in parts)
            return ForeignVersion(theirs)
    name = data.get("type")
    if not isinstance(name, str):
        raise RemoteProtocolError("type: missing, or not a string")
    return known.get(name) or UnknownMessage(name[:_MAX_NAME_LENGTH])


def _assignment_id(data: dict[str, Any]) -> str | None:
    """The block of an ``Assignment`` if it can be read, whatever else is wrong."""
    if data.get("type") != "Assignment":
        return None
    block_id = data.get("block_id")
    if not isinstance(block_id, str) or not 0 < len(block_id) <= 1024:
        return None
    return block_id if _find_unsafe(block_id) is None else None


def _unfit(data: dict[str, Any], exc: ValidationError) -> ComputeError:
    faults = {fault["loc"][:1] for fault in exc.errors(include_url=False, include_input=False)}
    if faults == {("task_type",)} and isinstance(data.get("task_type"), str):
        return UnsupportedTask("this worker does not know that task type")
    return BadRequest(describe_invalid(exc, "Assignment"))
