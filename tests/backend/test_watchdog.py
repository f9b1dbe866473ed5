from __future__ import annotations

import pytest

from ai4all.backend.watchdog import EngineState, Watchdog, WatchdogLimits

LIMITS = WatchdogLimits(load=120.0, prefill=60.0, decode=8.0, silence=20.0)
INTERVAL = LIMITS.interval


def ticks_until_hung(watchdog: Watchdog, state: EngineState, most: int = 1000) -> int:
    for number in range(1, most + 1):
        if watchdog.passed(INTERVAL, state) is not None:
            return number
        watchdog.heard()
    raise AssertionError("it never hung")


@pytest.mark.parametrize(
    ("state", "limit"),
    [(EngineState.LOADING, 120.0), (EngineState.PREFILL, 60.0), (EngineState.DECODE, 8.0)],
)
def test_each_state_has_its_limit(state: EngineState, limit: float) -> None:
    assert ticks_until_hung(Watchdog(LIMITS), state) == limit / INTERVAL


@pytest.mark.parametrize("state", [EngineState.IDLE, EngineState.STARTING])
def test_an_idle_process_may_be_silent(state: EngineState) -> None:
    watchdog = Watchdog(LIMITS)
    assert all(watchdog.passed(INTERVAL, state) is None for _ in range(1000))


def test_time_spent_idle_is_not_held_against_work() -> None:
    watchdog = Watchdog(LIMITS)
    for _ in range(100):
        watchdog.passed(INTERVAL, EngineState.IDLE)
    assert ticks_until_hung(watchdog, EngineState.DECODE) == 8.0 / INTERVAL


def test_silence_ends_the_patience_with_a_slow_state() -> None:
    watchdog = Watchdog(LIMITS)
    spent = 0.0
    while watchdog.passed(INTERVAL, EngineState.LOADING) is None:
        spent += INTERVAL
    assert spent + INTERVAL == LIMITS.silence


def test_a_pulse_counts_only_when_it_moves() -> None:
    watchdog = Watchdog(LIMITS)
    for pulse in range(100):
        watchdog.felt(pulse)
        assert watchdog.passed(INTERVAL, EngineState.DECODE) is None
    hung_after = 0
    while watchdog.passed(INTERVAL, EngineState.DECODE) is None:
        watchdog.felt(99)
        hung_after += 1
    assert (hung_after + 1) * INTERVAL == pytest.approx(8.0, abs=INTERVAL)


def test_it_says_how_long_there_was_no_progress() -> None:
    watchdog = Watchdog(LIMITS)
    found = [watchdog.passed(INTERVAL, EngineState.DECODE) for _ in range(8)]
    assert found[:7] == [None] * 7
    assert found[7] == pytest.approx(8.0)


def test_a_suspended_parent_blames_nobody() -> None:
    watchdog = Watchdog(LIMITS)
    assert watchdog.passed(36_000.0, EngineState.DECODE) is None
    assert watchdog.passed(36_000.0, EngineState.DECODE) is None


def test_the_interval_lets_a_short_limit_be_kept() -> None:
    assert WatchdogLimits(decode=0.4).interval == pytest.approx(0.1)
    assert WatchdogLimits().interval == 1.0
