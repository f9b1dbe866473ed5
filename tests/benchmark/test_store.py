from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import ujson

from ai4all.benchmark.hardware import HardwareInfo
from ai4all.benchmark.scores import BenchmarkKey, BenchmarkResult, BenchmarkScores
from ai4all.benchmark.store import BenchmarkStore
from ai4all.errors import DataDirectoryError


def key(threads: int = 2) -> BenchmarkKey:
    return BenchmarkKey(model_sha256="ab" * 32, engine_build="x", device="CPU", threads=threads)


def result(composite: float, threads: int = 2) -> BenchmarkResult:
    scores = BenchmarkScores(
        tokens_per_second=1.5,
        time_to_first_token_ms=2.25,
        memory_efficiency=0.1,
        composite=composite,
    )
    return BenchmarkResult(
        timestamp="2024-01-01T00:00:00.000Z",
        backend="cpu",
        model="benchmark",
        scores=scores,
        memory_mb=1,
        prompts=[],
        key=key(threads),
        hardware=HardwareInfo(),
    )


def test_nothing_is_kept_before_the_first_save(tmp_path: Path) -> None:
    store = BenchmarkStore(tmp_path)
    assert store.latest() is None
    assert store.history() == []
    assert store.registration_score() is None
    assert list(tmp_path.iterdir()) == []


def test_a_result_comes_back_equal_from_a_new_store(tmp_path: Path) -> None:
    kept = result(1 / 3)
    path = BenchmarkStore(tmp_path).save(kept)
    assert path == BenchmarkStore(tmp_path).latest_path
    assert BenchmarkStore(tmp_path).latest() == kept
    assert ujson.loads(path.read_text())["scores"]["composite"] == 1 / 3
    assert sorted(p.name for p in path.parent.iterdir()) == ["history.jsonl", "latest.json"]


def test_only_runs_with_the_same_key_are_compared(tmp_path: Path) -> None:
    store = BenchmarkStore(tmp_path)
    for composite, threads in [(0.1, 2), (0.9, 4), (0.2, 2), (0.8, 4), (0.3, 2)]:
        store.save(result(composite, threads))
    latest, previous = store.latest(key(2)), store.previous(key(2))
    assert latest is not None
    assert previous is not None
    assert (latest.scores.composite, previous.scores.composite) == (0.3, 0.2)
    assert store.latest(key(8)) is None
    assert store.previous(key(8)) is None


def test_the_best_run_of_the_model_and_build_is_registered(tmp_path: Path) -> None:
    store = BenchmarkStore(tmp_path)
    for composite, build in [(0.5, "x"), (0.9, "y"), (0.4, "x")]:
        kept = result(composite)
        store.save(
            kept.model_copy(update={"key": key().model_copy(update={"engine_build": build})})
        )
    assert store.registration_score("ab" * 32, "x") == 0.5
    assert store.registration_score("ab" * 32, "y") == 0.9
    assert store.registration_score("cd" * 32, "x") == 0.4
    assert store.registration_score() == 0.4


def test_the_history_is_bounded(tmp_path: Path) -> None:
    store = BenchmarkStore(tmp_path, history_limit=3)
    for n in range(5):
        store.save(result(n / 10))
    assert [r.scores.composite for r in store.history()] == [0.2, 0.3, 0.4]


@pytest.mark.parametrize("content", [b"{", b"null", b"\xff\xfe\x00", b"", b'{"scores": {}}'])
def test_a_corrupt_latest_is_set_aside_and_the_history_serves(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = BenchmarkStore(tmp_path)
    store.save(result(0.5))
    store.latest_path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        latest = store.latest()
    assert latest is not None
    assert latest.scores.composite == 0.5
    assert "latest.json" in caplog.text
    aside = [p for p in store.latest_path.parent.iterdir() if "corrupt" in p.name]
    assert [p.read_bytes() for p in aside] == [content]
    assert not store.latest_path.exists()


def test_bad_lines_of_the_history_cost_themselves_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = BenchmarkStore(tmp_path)
    store.save(result(0.1))
    store.save(result(0.2))
    torn = store.history_path.read_text() + '{"timestamp": "20'
    store.history_path.write_text(torn)
    with caplog.at_level(logging.WARNING):
        assert [r.scores.composite for r in store.history()] == [0.1, 0.2]
    assert "history.jsonl" in caplog.text
    caplog.clear()
    store.save(result(0.3))
    assert [r.scores.composite for r in store.history()] == [0.1, 0.2, 0.3]
    assert caplog.text == ""
    aside = [p for p in store.history_path.parent.iterdir() if "corrupt" in p.name]
    assert [p.read_text() for p in aside] == [torn]


def test_a_failed_write_leaves_the_old_result_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BenchmarkStore(tmp_path)
    store.save(result(0.1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataDirectoryError, match="No space left"):
        store.save(result(0.2))
    monkeypatch.undo()
    latest = store.latest()
    assert latest is not None
    assert latest.scores.composite == 0.1
    assert sorted(p.name for p in store.latest_path.parent.iterdir()) == [
        "history.jsonl",
        "latest.json",
    ]
