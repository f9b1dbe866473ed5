"""From a seed all follows: the same run to the byte, in this process and in any other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulation.run import simulate

from ai4all.worker_delivery import Delivery

SEED, EVENTS = 11, 200

_SUPPORT = Path(__file__).parents[1] / "support"
_RUN = (
    f"import sys; sys.path.append({str(_SUPPORT)!r})\n"
    "from simulation.run import simulate\n"
    f"print(simulate({SEED}, {EVENTS}).digest)"
)


def test_a_seed_gives_one_run() -> None:
    first, second = simulate(SEED, EVENTS), simulate(SEED, EVENTS)
    assert first.trace == second.trace
    assert first == second
    assert first.events >= EVENTS


def test_another_seed_gives_another_run() -> None:
    assert simulate(SEED, EVENTS).digest != simulate(SEED + 1, EVENTS).digest


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_another_process_gives_the_same_run(hash_seed: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == simulate(SEED, EVENTS).digest, done.stderr


def test_a_failing_seed_fails_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Delivery, "take_over", lambda self: None)
    for seed in range(30):
        run = simulate(seed, EVENTS)
        if run.faults:
            break
    else:
        pytest.fail("no seed fails")
    again = simulate(seed, EVENTS)
    assert again == run
