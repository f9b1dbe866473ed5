"""The short form of ``tests/fuzz.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz_targets
import pytest
import ujson
from fuzz_targets import TARGETS, Findings

SCRIPT = Path(__file__).with_name("fuzz.py")


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_find_nothing(name: str, tmp_path: Path) -> None:
    feed = TARGETS[name].make(tmp_path)
    seeds = TARGETS[name].seeds()
    assert len(seeds) > 3
    for seed in seeds:
        assert len(seed) <= TARGETS[name].max_len
        feed(seed)
        feed(seed[: len(seed) // 2])


def test_most_headers_are_models(tmp_path: Path) -> None:
    """Else the way behind the checks is never gone."""
    sound = 0
    for seed in TARGETS["gguf"].seeds():
        path = tmp_path / "model.gguf"
        path.write_bytes(seed + bytes(1 << 18))
        try:
            sound += bool(fuzz_targets.read_header(path).tensors)
        except fuzz_targets.InvalidModelFile:
            continue
    assert sound > 2


def test_a_fault_is_kept_once_with_its_input(tmp_path: Path) -> None:
    def feed(data: bytes) -> None:
        if data.startswith(b"x"):
            raise KeyError(data[1])

    findings = Findings("some", feed, tmp_path)
    for data in (b"a", b"xb", b"xc"):
        findings(data)
    assert findings.executions == 3
    (note,) = (tmp_path / "some.jsonl").read_text().splitlines()
    found = ujson.loads(note)
    assert found["what"].startswith("KeyError at test_fuzz.py:")
    assert Path(found["input"]).read_bytes() == b"xb"


@pytest.mark.parametrize(("promise", "name"), [("read_header", "gguf"), ("open_file", "spool")])
def test_a_broken_promise_is_found(
    promise: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    findings = Findings(name, TARGETS[name].make(tmp_path / "work"), tmp_path)
    monkeypatch.setattr(fuzz_targets, promise, lambda *_, **__: {}["gone"])
    findings(b"anything")
    assert "KeyError" in (tmp_path / f"{name}.jsonl").read_text()


def test_the_script_runs_without_atheris(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            str(SCRIPT),
            "codec",
            "--seconds",
            "1",
            "--engine",
            "hypothesis",
            "--keep",
            str(tmp_path),
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (outcome,) = ujson.loads(done.stdout)
    assert outcome["executions"] > 45
    assert outcome["findings"] == []
    assert outcome["coverage"] is None
