"""One place where the worker changes something on disk that the next start relies on.

It has a state from before, an act that a child process does while its disk fails or it is killed,
and a look at what is left. The child tells what it was promised as soon as it was: a result whose
commit has returned, a new name, a model that was kept. What was promised must be there; what was
not may be there, but whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Point", "Tell", "Told"]

Tell = Callable[[str, str], None]
"""Says that something was promised: what kind of thing, and which."""


@dataclass
class Told:
    """What a child was promised, by kind, in order."""

    words: list[tuple[str, str]] = field(default_factory=list)

    def of(self, kind: str) -> list[str]:
        """What was told of one kind."""
        return [what for told, what in self.words if told == kind]


@dataclass(frozen=True)
class Point:
    """One place.

    Attributes:
        name: What is done there, in words.
        prepare: Makes the state from before; gives what ``act`` and ``check`` need to know.
        act: Done in the child. Raises what the product raises.
        check: Looks at what is left; an ``AssertionError`` is a finding.
        has_spool: Whether results are there, to be delivered after a restart.
    """

    name: str
    prepare: Callable[[Path, random.Random], Any]
    act: Callable[[Path, Any, Tell], None]
    check: Callable[[Path, Any, Told], None]
    has_spool: bool = False
