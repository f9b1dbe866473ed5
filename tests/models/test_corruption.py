"""The short form of ``tests/corruptions.py``."""

from __future__ import annotations

from pathlib import Path

from corruption import spoil_arriving, spoil_interrupted, spoil_kept


def nothing() -> None:
    """No progress to show."""


def test_no_spoiled_model_is_handed_out(tmp_path: Path) -> None:
    found = spoil_kept(tmp_path, 60, 1, nothing)
    assert found.faults == []
    assert found.refused == found.trials
    assert found.trials.total() == 60
    assert len(found.trials) > 6


def test_no_spoiled_model_gets_a_name(tmp_path: Path) -> None:
    found = spoil_arriving(tmp_path, 40, 1, nothing)
    assert found.faults == []
    assert found.refused == found.trials
    assert found.trials.total() == 40


def test_what_was_interrupted_ends_well(tmp_path: Path) -> None:
    found = spoil_interrupted(tmp_path, 25, 1, nothing)
    assert found.faults == []
    assert found.trials.keys() == {"the link broke", "it was cancelled"}
    assert found.resumed > 5
    assert found.mended > 2
