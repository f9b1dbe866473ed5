"""Running the command line in this process, and what it left on both streams."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ujson

FAKE_MAIN = """
import sys
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.cli import main
from ai4all.commands.environment import Environment
script = ScriptedGeneration(token_ms=1.0, hang_at={hang_at})
sys.exit(main(sys.argv[1:], Environment(lambda: FakeBackend(script, time_scale=0.0))))
"""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as the one JSON document that it must be."""
        return ujson.loads(self.out)

    @property
    def error_line(self) -> str:
        """Standard error as the one line that a failure must leave."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


Cli = Callable[..., Finished]
"""Runs one command: its arguments, and ``backend=`` for one in place of the scripted default."""


def fake_command(*arguments: str, hang_at: int | None = None) -> list[str]:
    """A process's arguments for the command line over a scripted backend."""
    return [sys.executable, "-P", "-c", FAKE_MAIN.format(hang_at=hang_at), *arguments]
