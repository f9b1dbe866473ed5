from __future__ import annotations

import random

import pytest
from crowds import busiest_second, connects_after_recovery, connects_to_a_closing_coordinator
from hypothesis import given
from hypothesis import strategies as st

from ai4all.delivery.backoff import MAX_FLOOR_S, Attempts, Backoff


def test_without_jitter_the_delays_are_the_seeds() -> None:
    backoff = Backoff(1000, jitter=0.0)
    assert [backoff.next_delay(n) for n in range(1, 9)] == [2, 4, 8, 16, 32, 32, 32, 32]
    # Patience after a short session cannot make them differ.
    assert [backoff.next_delay(n, accepted=True) for n in (1, 5, 6)] == [2, 32, 32]


@given(
    interval_ms=st.integers(1, 60_000),
    jitter=st.floats(0, 1),
    attempt=st.integers(1, 10_000),
    floor=st.floats(0, 10_000),
    accepted=st.booleans(),
    seed=st.integers(),
)
def test_a_delay_stays_in_its_range(
    interval_ms: int, jitter: float, attempt: int, floor: float, accepted: bool, seed: int
) -> None:
    backoff = Backoff(interval_ms, jitter=jitter, rng=random.Random(seed))
    ceiling = interval_ms * 2 ** min(attempt, 5) / 1000
    assert backoff.ceiling(attempt) == ceiling
    delay = backoff.next_delay(attempt, floor=floor, accepted=accepted)
    granted = min(floor, MAX_FLOOR_S)
    assert delay >= granted
    assert delay >= (1 - jitter) * ceiling * 0.999999
    assert delay <= max(ceiling, granted + ceiling) * 1.000001
    if floor == 0.0:
        assert delay <= ceiling * 1.000001


def test_full_jitter_covers_the_whole_range() -> None:
    backoff = Backoff(1000, rng=random.Random(1))
    delays = sorted(backoff.next_delay(1) for _ in range(1000))
    assert delays[0] < 0.1
    assert delays[-1] > 1.9
    assert 0.9 < sum(delays) / len(delays) < 1.1


def test_a_hint_of_the_server_raises_the_delay_and_keeps_the_spread() -> None:
    backoff = Backoff(1000, rng=random.Random(1))
    delays = [backoff.next_delay(1, floor=30.0) for _ in range(100)]
    assert min(delays) >= 30.0
    assert max(delays) - min(delays) > 1.0
    assert Backoff(1000, jitter=0.0).next_delay(1, floor=30.0) == 30.0
    assert Backoff(1000, jitter=0.0).next_delay(6, floor=30.0) == 32.0


def test_attempts_end_where_the_seed_ends_them() -> None:
    assert [Backoff(1, max_attempts=3).exhausted(n) for n in (1, 2, 3, 4)] == [
        False,
        False,
        False,
        True,
    ]
    assert not Backoff(1, max_attempts=0).exhausted(1_000_000)


@pytest.mark.parametrize(
    "arguments",
    [
        {"interval_ms": 0},
        {"interval_ms": 1, "jitter": 1.5},
        {"interval_ms": 1, "jitter": -0.1},
        {"interval_ms": 1, "max_attempts": -1},
    ],
)
def test_figures_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Backoff(**arguments)  # type: ignore[arg-type]


def test_attempts_count_from_one() -> None:
    with pytest.raises(ValueError, match="count from 1"):
        Backoff(1).next_delay(0)


def test_only_a_session_that_lived_starts_the_count_over() -> None:
    attempts = Attempts(Backoff(1000, jitter=0.0))
    assert attempts.lost(0.0) == 2
    assert attempts.lost(2.0) == 4

    attempts.opened(6.0)
    attempts.heard()
    assert not attempts.lived(65.9)
    assert attempts.lost(65.9) == 8, "59.9 s is too short"

    attempts.opened(80.0)
    assert attempts.lost(200.0) == 16, "long enough, but nothing was ever said"

    attempts.opened(300.0)
    attempts.heard()
    assert attempts.lived(360.0)
    assert attempts.lost(360.0) == 2
    assert attempts.count == 1


def test_a_message_without_a_session_proves_nothing() -> None:
    attempts = Attempts(Backoff(1000, jitter=0.0))
    attempts.heard()
    assert not attempts.lived(1e9)
    attempts.opened(0.0)
    assert not attempts.lived(1e9)


def test_a_handshake_does_not_save_from_giving_up() -> None:
    attempts = Attempts(Backoff(1000, max_attempts=2))
    for now in (0.0, 10.0, 20.0):
        assert not attempts.exhausted
        attempts.opened(now)
        attempts.heard()
        attempts.lost(now + 1.0)
    assert attempts.exhausted


@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_workers_do_not_stampede_after_an_outage(seed: int) -> None:
    connects = connects_after_recovery(1000, 600.0, seed)
    assert len(connects) == 1000
    assert busiest_second(connects) <= 60
    assert connects[989] <= 60.0, "and yet all but a few are back within a minute"


@pytest.mark.parametrize("life_s", [0.0, 1.0])
def test_a_coordinator_that_accepts_and_closes_meets_patience(life_s: float) -> None:
    for seed in range(50):
        assert connects_to_a_closing_coordinator(600.0, life_s, seed) <= 20


def test_the_bound_on_connects_holds_for_the_least_lucky_draw() -> None:
    class AlwaysLow(random.Random):
        def random(self) -> float:
            return 0.0

    attempts = Attempts(Backoff(rng=AlwaysLow()))
    now, connects = 0.0, 0
    while now < 600.0:
        connects += 1
        attempts.opened(now)
        now += attempts.lost(now)
    assert connects == 19
