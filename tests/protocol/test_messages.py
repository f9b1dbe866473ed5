from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ai4all.protocol.messages import (
    RequestWork,
    format_timestamp,
    parse_timestamp,
    working,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2030-03-17T17:46:40Z", datetime(2030, 3, 17, 17, 46, 40, tzinfo=UTC)),
        ("2030-03-17T17:46:40.5Z", datetime(2030, 3, 17, 17, 46, 40, 500_000, tzinfo=UTC)),
        (
            "2030-03-17T17:46:40.123456789Z",
            datetime(2030, 3, 17, 17, 46, 40, 123_456, tzinfo=UTC),
        ),
        (
            "2030-03-17T17:46:40.999999999999Z",
            datetime(2030, 3, 17, 17, 46, 40, 999_999, tzinfo=UTC),
        ),
        ("2030-03-17T17:46:40+02:00", datetime(2030, 3, 17, 15, 46, 40, tzinfo=UTC)),
        ("2030-03-17t17:46:40.25-00:30", datetime(2030, 3, 17, 18, 16, 40, 250_000, tzinfo=UTC)),
        (
            "2016-12-31T23:59:60Z",
            datetime(2016, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        ),
        ("+262142-12-31T23:59:59.999999999Z", datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_reads_every_spelling_of_an_instant(text: str, expected: datetime) -> None:
    assert parse_timestamp(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2030-03-17",
        "2030-03-17T17:46:40",
        "2030-13-17T17:46:40Z",
        "2030-02-30T17:46:40Z",
        "2030-03-17T24:00:00Z",
        "2030-03-17T17:46:61Z",
        "2030-03-17T17:46:40.Z",
        "2030-03-17T17:46:40+24:00",
        "2030-03-17T17:46:40+02:60",
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
        "२०३०-03-17T17:46:40Z",
        "2030-03-17T17:46:40Z\n",
        " 2030-03-17T17:46:40Z",
    ],
)
def test_refuses_what_is_no_instant(text: str) -> None:
    with pytest.raises(ValueError, match=r"timestamp|no such"):
        parse_timestamp(text)


@given(st.datetimes(timezones=st.just(UTC)))
def test_instants_survive_the_wire(instant: datetime) -> None:
    assert parse_timestamp(format_timestamp(instant)) == instant


def test_writes_utc_whatever_the_offset() -> None:
    instant = datetime(2030, 1, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    assert format_timestamp(instant) == "2029-12-31T23:00:00.000000Z"


def test_messages_do_not_change() -> None:
    message = RequestWork(worker_id="w-1")
    with pytest.raises(ValidationError):
        message.worker_id = "w-2"  # type: ignore[misc]


@pytest.mark.parametrize(("given_share", "sent"), [(-0.5, 0.0), (0.25, 0.25), (1.5, 1.0)])
def test_progress_is_held_in_its_range(given_share: float, sent: float) -> None:
    assert working("b-1", given_share).Working.progress == sent
