"""What a refused handshake says about when to come again."""

from __future__ import annotations

import email.utils
from datetime import UTC, datetime

__all__ = ["retry_after"]


def retry_after(asked: str | None, date: str | None, now: datetime) -> float | None:
    """Seconds that a ``Retry-After`` header asks for (RFC 9110, section 10.2.3), never negative.

    A moment is counted from the response's own ``Date`` where it has one, so that a clock that is
    wrong on either side changes nothing. Whoever asks decides how much of it is granted.

    Args:
        asked: The header's value, if there is one.
        date: That of the response's ``Date``, if there is one.
        now: The time, for a response without a date.

    Returns:
        None when nothing is asked for, or nothing that can be read.
    """
    asked = (asked or "").strip()
    if asked.isascii() and asked.isdigit():
        return float(asked)
    moment = _moment(asked)
    if moment is None:
        return None
    return max(0.0, (moment - (_moment(date) or now)).total_seconds())


def _moment(text: str | None) -> datetime | None:
    """An HTTP date; None when the text is none."""
    if not text:
        return None
    try:
        moment = email.utils.parsedate_to_datetime(text)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError, TypeError, IndexError):
        # The parser of mail's dates is not made for what a hostile peer may write.
        return None
