from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai4all.protocol.refusals import retry_after

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ("7", 7.0),
        (" 7 ", 7.0),
        ("0", 0.0),
        ("9" * 400, float("inf")),
        ("Mon, 01 Jun 2026 12:01:00 GMT", 60.0),
        ("Mon, 01 Jun 2026 12:01:00 -0000", 60.0),
        ("Mon, 01 Jun 2026 14:01:00 +0200", 60.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("-7", None),
        ("7.5", None),
        ("1e9", None),
        ("inf", None),
        ("", None),
        ("soon", None),
        ("Mon, 01 Jun 99999 12:01:00 GMT", None),
        ("Mon, 01 Jun 2026 12:01:00 +99999999999999999999", None),
        ("Fri, 31 Dec 9999 23:59:59 -2359", None),
    ],
)
def test_what_is_asked_for(asked: str, seconds: float | None) -> None:
    assert retry_after(asked, None, NOW) == seconds


def test_no_header_asks_for_nothing() -> None:
    assert retry_after(None, None, NOW) is None


@pytest.mark.parametrize("wrong_by", [timedelta(0), timedelta(days=3650), -timedelta(days=20000)])
def test_the_response_tells_its_own_time(wrong_by: timedelta) -> None:
    moment = "Mon, 01 Jun 2026 12:01:30 GMT"
    assert retry_after(moment, "Mon, 01 Jun 2026 12:00:00 GMT", NOW + wrong_by) == 90.0


def test_a_response_without_a_time_is_of_now() -> None:
    for date in (None, "", "never"):
        assert retry_after("Mon, 01 Jun 2026 12:01:30 GMT", date, NOW) == 90.0


@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_it_says_it_is_a_wait_or_nothing(asked: str, date: str) -> None:
    seconds = retry_after(asked, date, NOW)
    assert seconds is None or seconds >= 0.0
