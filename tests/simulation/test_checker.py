"""The checker's rules one by one, on histories written by hand."""

from __future__ import annotations

import pytest
from simulation.checker import check
from simulation.history import LEFT_RUNNING, Kind, Record


def record(kind: Kind, digest: str = "", detail: str = "", block: str = "b") -> Record:
    return Record(0.0, kind, "w", block, digest, detail)


OPENED = record(Kind.OPENED, block="")
ADDED = record(Kind.ADDED)
GIVEN = record(Kind.GIVEN)
DECLINED = record(Kind.DECLINED)
REQUEUED = record(Kind.REQUEUED)
DELIVERED = record(Kind.DELIVERED)
COMMITTED = record(Kind.COMMITTED, "x")
SENT = record(Kind.SENT, "x")
SUBMITTED = record(Kind.SUBMITTED, "x")
ACKNOWLEDGED = record(Kind.ACKNOWLEDGED)
FORGOTTEN = record(Kind.FORGOTTEN)

UNTIL_SENT = (OPENED, ADDED, GIVEN, COMMITTED, SENT)
ALL = (*UNTIL_SENT, SUBMITTED, DELIVERED, ACKNOWLEDGED, FORGOTTEN)
AGAIN = (*UNTIL_SENT, OPENED, record(Kind.FOUND, "x"), SENT, *ALL[5:])


@pytest.mark.parametrize(
    "history",
    [
        ALL,
        AGAIN,
        (OPENED, ADDED, GIVEN, DECLINED, record(Kind.FAILED)),
        # Said twice, and so answered twice.
        (OPENED, ADDED, GIVEN, GIVEN, DECLINED, *ALL[3:]),
        # The disk refused it; it went out from memory.
        (OPENED, ADDED, GIVEN, record(Kind.NOT_COMMITTED, "x"), SENT, SUBMITTED, DELIVERED),
        # The power went before the write was known to be done, or the delete.
        (OPENED, ADDED, GIVEN, record(Kind.IN_DOUBT, "x", "insert"), OPENED, GIVEN, *ALL[3:]),
        (*ALL[:8], record(Kind.IN_DOUBT, "", "delete"), OPENED),
        (*ALL[:8], record(Kind.IN_DOUBT, "", "delete"), *AGAIN[5:8], ACKNOWLEDGED, FORGOTTEN),
        # What an earlier process left running is handed back, and computed anew.
        (OPENED, ADDED, GIVEN, OPENED, record(Kind.SENT, "y", LEFT_RUNNING), REQUEUED, *ALL[2:]),
    ],
)
def test_what_may_be(history: tuple[Record, ...]) -> None:
    assert check(history) == []


@pytest.mark.parametrize(
    ("history", "says"),
    [
        # Every block ends exactly once, and so does every assignment.
        ((ADDED,), "never ended"),
        ((*ALL, DELIVERED), "ended as delivered before"),
        ((*ALL, record(Kind.FAILED)), "ended as delivered before"),
        ((*ALL, record(Kind.FAILED, block="c")), "which nobody asked for"),
        ((*ALL, GIVEN), "was given out after its end"),
        ((*ALL, record(Kind.KEPT)), "was given out after its end"),
        ((ADDED, GIVEN), "is still with w"),
        ((OPENED, ADDED, GIVEN, DECLINED, COMMITTED, SENT, SUBMITTED), "declined b and then sent"),
        ((*UNTIL_SENT, SUBMITTED, DECLINED), "sent b and then declined"),
        # Equal bytes for equal ids.
        ((*UNTIL_SENT, record(Kind.SENT, "y")), "keeps one result of b and sent another"),
        ((*UNTIL_SENT, record(Kind.COMMITTED, "y")), "keeps two results of b"),
        ((*UNTIL_SENT, SUBMITTED, record(Kind.SUBMITTED, "y")), "sent 2 results of one assignment"),
        ((*UNTIL_SENT, OPENED, record(Kind.FOUND, "y"), GIVEN), "found another result of b"),
        ((*UNTIL_SENT, record(Kind.SENT, "y", LEFT_RUNNING)), "hands back b that it finished"),
        # No result for a block that was never given.
        ((ADDED, SUBMITTED), "was never given b"),
        ((ADDED, DECLINED), "was never given b"),
        ((ADDED, record(Kind.ABANDONED)), "was never given b"),
        ((OPENED, record(Kind.FOUND, "x"), ADDED), "found a result of b that nobody wrote"),
        # Nothing is sent before it is kept, and nothing that was kept vanishes.
        ((OPENED, ADDED, GIVEN, SENT), "before it kept it"),
        ((*UNTIL_SENT, OPENED, GIVEN), "lost a committed result of b"),
        ((*UNTIL_SENT, OPENED), "lost a committed result of b"),
        ((*UNTIL_SENT, FORGOTTEN), "before it was acknowledged"),
        ((*UNTIL_SENT, record(Kind.IN_DOUBT, "", "delete")), "before it was acknowledged"),
        ((*UNTIL_SENT, SUBMITTED, DELIVERED), "still keeps a result of b"),
        # What is not in the protocol.
        ((record(Kind.VIOLATION, detail="odd"),), "broke the protocol: odd"),
    ],
)
def test_what_must_not_be(history: tuple[Record, ...], says: str) -> None:
    found = check(history)
    assert any(says in fault for fault in found), found
