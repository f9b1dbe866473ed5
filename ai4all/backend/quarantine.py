"""Models that keep killing the engine are not loaded again for a while, across restarts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import ujson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ai4all.backend.crash_records import write_whole
from ai4all.errors import LoadFailed

__all__ = ["QUARANTINE_FILE", "Quarantine", "QuarantineRules", "Quarantined", "Subject"]

QUARANTINE_FILE: Final = "quarantine.json"
"""Its name in the data directory."""

_log = logging.getLogger(__name__)

_MAX_ENTRIES: Final = 1000


@dataclass(frozen=True, slots=True)
class Subject:
    """What is under suspicion: a model as a build runs it. Another of any of them may do better.

    Attributes:
        model_id: Its name, to speak of it.
        model_sha256: Its content.
        engine_build: What runs it.
        options: How.
    """

    model_id: str
    model_sha256: str
    engine_build: str
    options: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells subjects apart."""
        return self.model_sha256, self.engine_build, ujson.dumps(self.options, sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineRules:
    """When, and for how long. Times are in seconds.

    Attributes:
        deaths: So many deaths of the engine ...
        window: ... within so long ...
        hold: ... and the model is not loaded for so long.
    """

    deaths: int = 3
    window: float = 1800.0
    hold: float = 86_400.0


class _Entry(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    model_id: str
    model_sha256: str
    engine_build: str
    options: dict[str, Any]
    deaths: list[float] = Field(max_length=1000)
    until: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        subject = Subject(self.model_id, self.model_sha256, self.engine_build, self.options)
        return subject.key


class _Content(BaseModel):
    entries: list[_Entry] = Field(default_factory=list, max_length=_MAX_ENTRIES)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A model that is not loaded now.

    Attributes:
        model_id: Its name when it was last loaded.
        model_sha256: Its content.
        until: ``time.time()`` value of the end.
    """

    model_id: str
    model_sha256: str
    until: float

    @property
    def until_text(self) -> str:
        """The end, for a person."""
        return datetime.fromtimestamp(self.until, UTC).strftime("%Y-%m-%d %H:%M UTC")


class Quarantine:
    """Counts deaths. Every call looks at the file again: the command line may have changed it.

    Deaths are dated by the wall clock, because they must outlive the process. A clock that was
    set back makes none of them younger than now, and no hold longer than the rules say.

    Args:
        file: Where it is kept, or None: in this object only.
        rules: When and for how long.
        clock: ``time.time``.
    """

    def __init__(
        self,
        file: Path | None = None,
        rules: QuarantineRules | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._rules = rules if rules is not None else QuarantineRules()
        self._clock = clock
        self._entries: dict[tuple[str, str, str], _Entry] = {}
        self._stamp: tuple[int, int, int] | None = None

    def check(self, subject: Subject) -> None:
        """Make sure that ``subject`` may be loaded.

        Raises:
            LoadFailed: It may not; says until when, and how to lift that.
        """
        self._read()
        entry = self._entries.get(subject.key)
        if entry is None or not self._holds(entry):
            return
        held = Quarantined(subject.model_id, subject.model_sha256, entry.until or 0.0)
        raise LoadFailed(
            f"model {subject.model_id!r} killed the engine {self._rules.deaths} times within "
            f"{self._rules.window / 60:g} minutes and is quarantined until {held.until_text}; "
            f"`ai4all-native models unquarantine {subject.model_id}` lifts that",
            {"quarantined_until": held.until_text, "model_sha256": subject.model_sha256},
        )

    def record_death(self, subject: Subject) -> bool:
        """Count a death; returns whether ``subject`` is quarantined now.

        Raises:
            OSError: The count could not be kept; it holds until this process ends.
        """
        self._read()
        now = self._clock()
        entry = self._entries.setdefault(
            subject.key,
            _Entry(
                model_id=subject.model_id,
                model_sha256=subject.model_sha256,
                engine_build=subject.engine_build,
                options=dict(subject.options),
                deaths=[],
            ),
        )
        recent = [min(t, now) for t in entry.deaths if t > now - self._rules.window]
        entry.deaths = [*recent, now][-self._rules.deaths :]
        entry.model_id = subject.model_id
        held = self._holds(entry)
        if not held and len(entry.deaths) >= self._rules.deaths:
            entry.until = now + self._rules.hold
            held = True
        self._write()
        return held

    def lift(self, model_sha256: str) -> int:
        """Forget everything about a model; returns how many quarantines that ended.

        Raises:
            OSError: That could not be kept.
        """
        self._read()
        mine = [key for key in self._entries if key[0] == model_sha256]
        ended = sum(self._holds(self._entries.pop(key)) for key in mine)
        if mine:
            self._write()
        return ended

    def held(self) -> list[Quarantined]:
        """What is quarantined now."""
        self._read()
        return [
            Quarantined(entry.model_id, entry.model_sha256, entry.until or 0.0)
            for entry in self._entries.values()
            if self._holds(entry)
        ]

    def _holds(self, entry: _Entry) -> bool:
        if entry.until is None:
            return False
        now = self._clock()
        entry.until = min(entry.until, now + self._rules.hold)
        return now < entry.until

    def _read(self) -> None:
        if self._file is None:
            return
        try:
            status = os.stat(self._file)
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return
            content = _Content.model_validate(ujson.loads(self._file.read_bytes()))
        except FileNotFoundError:
            # Somebody removed the file: that lifts everything.
            if self._stamp is not None:
                self._entries, self._stamp = {}, None
            return
        except (OSError, ValueError, ValidationError) as error:
            _log.warning("the quarantine file %s cannot be read: %s", self._file.name, error)
            return
        self._entries = {entry.key: entry for entry in content.entries}
        self._stamp = stamp

    def _write(self) -> None:
        if self._file is None:
            return
        # What no rule looks at any more is left out.
        oldest = self._clock() - self._rules.window
        live = [
            entry
            for entry in self._entries.values()
            if self._holds(entry) or any(t > oldest for t in entry.deaths)
        ]
        self._entries = {entry.key: entry for entry in live[-_MAX_ENTRIES:]}
        content = _Content(entries=list(self._entries.values()))
        text = ujson.dumps(content.model_dump(), indent=2, escape_forward_slashes=False)
        write_whole(self._file, text.encode("utf-8", "replace") + b"\n")
        status = os.stat(self._file)
        self._stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
