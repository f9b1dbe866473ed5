"""The short form of ``tests/simulate.py``, and that script itself."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
import ujson
from simulation.chaos import FAULTS
from simulation.many import run_many, run_one

from ai4all.worker_delivery import Delivery

SEEDS, EVENTS = 60, 200

SCRIPT = Path(__file__).parents[1] / "simulate.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_happens_that_must_not() -> None:
    found = run_many(range(SEEDS), EVENTS)
    assert found.failing == {}
    assert found.differing == []
    assert found.replayed > 0
    assert found.seeds == SEEDS
    assert found.events >= SEEDS * EVENTS
    assert found.delivered > SEEDS
    # Every fault there is has happened, and every way to die but a few moments of the disk.
    assert set(found.injected) == set(FAULTS)
    assert {"killed", "power cut"} < set(found.deaths)
    assert any(why.startswith("during") for why in found.deaths)


@pytest.mark.parametrize("seed", [8154, 8588, 9428])
def test_seeds_that_once_showed_a_fault_show_none(seed: int) -> None:
    # 8588: the late deletion of an acknowledged result took the block's next one along.
    assert not run_one(seed, EVENTS, ()).faults


def test_a_run_that_breaks_off_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a bug of the simulation")

    monkeypatch.setattr("simulation.coordinator.Coordinator.heard", broken)
    outcome = run_one(0, EVENTS, ())
    assert "a bug of the simulation" in outcome.faults[0]


def test_the_script_prints_figures_over_several_processes() -> None:
    command = [sys.executable, str(SCRIPT), "--seeds", "4", "--processes", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    document = ujson.loads(done.stdout)
    assert (document["seeds"], document["failing"]) == (4, {})
    assert done.stderr == ""


def test_the_script_names_the_seed_that_failed_and_how_to_run_it_again(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Delivery, "take_over", lambda self: None)
    with pytest.raises(typer.Exit) as ended:
        script.main(seeds=4, first=0, events=EVENTS, only=["kill", "lose_acks"], processes=1)
    assert ended.value.exit_code == 1
    lines = capsys.readouterr().out.splitlines()
    (command,) = [line.split() for line in lines if "python tests/simulate.py" in line][:1]
    seed = int(command[command.index("--seed") + 1])
    assert command[2:] == f"--seed {seed} --events {EVENTS} --only kill --only lose_acks".split()

    with pytest.raises(typer.Exit) as ended:
        script.main(seed=seed, events=EVENTS, only=["kill", "lose_acks"])
    assert ended.value.exit_code == 1
    printed = capsys.readouterr().out
    assert "must not be:" in printed
    assert "a second run was the same" in printed


def test_a_fault_that_does_not_exist_is_refused(script: ModuleType) -> None:
    with pytest.raises(typer.BadParameter, match="no such fault: flood"):
        script.main(only=["flood"])
