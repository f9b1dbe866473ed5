"""The one place that turns an exception into a line for a person and an exit status.

========  =====================================================================
status    meaning
========  =====================================================================
0         done
1         it could not be done: no such model, no engine, disk full, port taken
2         it was asked for wrongly: a flag, a configuration key, an input
130       interrupted by Ctrl-C
========  =====================================================================

What is not listed here is a bug of ours, and keeps its traceback.
"""

from __future__ import annotations

import errno
import os

from ai4all.errors import Ai4allError, BadRequest, ConfigError, InvalidModelFile

__all__ = [
    "EXIT_FAILURE",
    "EXIT_INTERRUPTED",
    "EXIT_SUCCESS",
    "EXIT_USAGE",
    "describe_failure",
]

EXIT_SUCCESS = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_LONGEST_LINE = 2000


def describe_failure(error: BaseException) -> tuple[str, int] | None:
    """One line about ``error`` and the exit status, or None when it is not a user's matter."""
    if isinstance(error, BaseExceptionGroup):
        # A task group wraps what its tasks raised; the first that we know tells the story.
        known = [describe_failure(inner) for inner in error.exceptions]
        return known[0] if all(known) else None
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, (ConfigError, BadRequest)):
        return _one_line(str(error)), EXIT_USAGE
    if isinstance(error, InvalidModelFile):
        return _one_line(f"not a usable model: {error}"), EXIT_FAILURE
    if isinstance(error, Ai4allError):
        return _one_line(str(error) or type(error).__name__), EXIT_FAILURE
    if isinstance(error, OSError):
        return _one_line(_describe_os_error(error)), EXIT_FAILURE
    return None


def _describe_os_error(error: OSError) -> str:
    problem = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        problem = "no space left on the disk"
    elif error.errno == errno.EADDRINUSE:
        # asyncio's own text for this names the address already.
        problem = f"the address is in use by another program ({problem})"
    if error.filename is None:
        return problem
    return f"{os.fsdecode(error.filename)}: {problem}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST_LINE]
