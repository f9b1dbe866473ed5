"""One thing that ``doctor`` looked at."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Check"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Attributes:
        name: What was looked at.
        status: "ok", "warning" (works, but look at it) or "problem" (keeps the worker from
            working).
        detail: What was found, and for the latter two what to do.
    """

    name: str
    status: str
    detail: str
