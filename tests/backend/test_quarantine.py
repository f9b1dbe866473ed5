from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ujson

from ai4all.backend.quarantine import Quarantine, QuarantineRules, Subject
from ai4all.errors import LoadFailed

SUBJECT = Subject("tiny", "a" * 64, "llama.cpp 0 cpu", {"n_ctx": 512, "use_mmap": True})
RULES = QuarantineRules(deaths=3, window=1800.0, hold=86_400.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(tmp_path: Path, clock: Clock) -> Callable[[], Quarantine]:
    return lambda: Quarantine(tmp_path / "quarantine.json", RULES, clock)


def deaths(quarantine: Quarantine, count: int, subject: Subject = SUBJECT) -> list[bool]:
    return [quarantine.record_death(subject) for _ in range(count)]


def test_the_third_death_quarantines(opened: Callable[[], Quarantine]) -> None:
    quarantine = opened()
    assert deaths(quarantine, 2) == [False, False]
    quarantine.check(SUBJECT)
    assert deaths(quarantine, 1) == [True]
    with pytest.raises(LoadFailed, match=r"3 times within 30 minutes.*until 2027-01-1") as caught:
        quarantine.check(SUBJECT)
    assert "models unquarantine tiny" in str(caught.value)
    assert caught.value.details is not None
    assert caught.value.details["model_sha256"] == "a" * 64


def test_it_outlives_the_process(opened: Callable[[], Quarantine]) -> None:
    deaths(opened(), 2)
    assert deaths(opened(), 1) == [True]
    with pytest.raises(LoadFailed):
        opened().check(SUBJECT)
    assert [held.model_id for held in opened().held()] == ["tiny"]


@pytest.mark.parametrize(
    "other",
    [
        replace(SUBJECT, model_sha256="b" * 64),
        replace(SUBJECT, engine_build="llama.cpp 1 cpu"),
        replace(SUBJECT, options={"n_ctx": 256, "use_mmap": True}),
    ],
)
def test_another_model_build_or_shape_is_another_matter(
    opened: Callable[[], Quarantine], other: Subject
) -> None:
    quarantine = opened()
    deaths(quarantine, 3)
    quarantine.check(other)
    assert deaths(quarantine, 1, other) == [False]


def test_another_name_for_the_same_file_is_the_same(opened: Callable[[], Quarantine]) -> None:
    quarantine = opened()
    deaths(quarantine, 3)
    with pytest.raises(LoadFailed, match="'alias'"):
        quarantine.check(replace(SUBJECT, model_id="alias"))


def test_deaths_far_apart_do_not_add_up(opened: Callable[[], Quarantine], clock: Clock) -> None:
    quarantine = opened()
    for _ in range(10):
        assert deaths(quarantine, 2) == [False, False]
        clock.now += RULES.window + 1


def test_it_ends_by_itself(opened: Callable[[], Quarantine], clock: Clock) -> None:
    quarantine = opened()
    deaths(quarantine, 3)
    clock.now += RULES.hold - 1
    with pytest.raises(LoadFailed):
        quarantine.check(SUBJECT)
    clock.now += 2
    quarantine.check(SUBJECT)
    assert quarantine.held() == []
    assert deaths(quarantine, 1) == [False]


def test_it_can_be_lifted_from_another_process(opened: Callable[[], Quarantine]) -> None:
    quarantine = opened()
    deaths(quarantine, 3)
    assert opened().lift(SUBJECT.model_sha256) == 1
    quarantine.check(SUBJECT)
    assert deaths(quarantine, 2) == [False, False]
    assert opened().lift("c" * 64) == 0


def test_a_clock_set_back_makes_no_hold_longer(
    opened: Callable[[], Quarantine], clock: Clock
) -> None:
    deaths(opened(), 3)
    clock.now -= 10 * 365 * 86_400.0
    quarantine = opened()
    with pytest.raises(LoadFailed):
        quarantine.check(SUBJECT)
    clock.now += RULES.hold + 1
    quarantine.check(SUBJECT)


def test_a_clock_set_back_does_not_forget_deaths(
    opened: Callable[[], Quarantine], clock: Clock
) -> None:
    deaths(opened(), 2)
    clock.now -= 3600.0
    assert deaths(opened(), 1) == [True]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"entries": 3}', b'{"entries": [{"deaths": ["x"]}]}', b"\xff"]
)
def test_a_spoiled_file_is_replaced_and_stops_nothing(
    opened: Callable[[], Quarantine], tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "quarantine.json"
    file.write_bytes(content)
    quarantine = opened()
    quarantine.check(SUBJECT)
    assert deaths(quarantine, 3) == [False, False, True]
    with pytest.raises(LoadFailed):
        opened().check(SUBJECT)


def test_removing_the_file_lifts_everything(
    opened: Callable[[], Quarantine], tmp_path: Path
) -> None:
    quarantine = opened()
    deaths(quarantine, 3)
    (tmp_path / "quarantine.json").unlink()
    quarantine.check(SUBJECT)


def test_a_count_that_cannot_be_kept_holds_while_the_process_lives(
    tmp_path: Path, clock: Clock
) -> None:
    quarantine = Quarantine(tmp_path / "absent" / "quarantine.json", RULES, clock)
    for _ in range(3):
        with pytest.raises(OSError, match="absent"):
            quarantine.record_death(SUBJECT)
    with pytest.raises(LoadFailed):
        quarantine.check(SUBJECT)


def test_the_file_is_private_and_bounded(
    opened: Callable[[], Quarantine], tmp_path: Path, clock: Clock
) -> None:
    quarantine = opened()
    for number in range(50):
        deaths(quarantine, 3, replace(SUBJECT, model_sha256=f"{number:064x}"))
        clock.now += 86_400.0
    file = tmp_path / "quarantine.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(ujson.loads(file.read_text())["entries"]) <= 3
    assert list(tmp_path.iterdir()) == [file]


def test_without_a_file_it_is_kept_in_memory() -> None:
    quarantine = Quarantine()
    assert deaths(quarantine, 3) == [False, False, True]
    with pytest.raises(LoadFailed):
        quarantine.check(SUBJECT)
    Quarantine().check(SUBJECT)
