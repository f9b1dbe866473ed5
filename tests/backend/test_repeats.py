"""The short forms of tests/determinism.py and tests/load_cycles.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ai4all.backend.base import EngineOptions

TESTS = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ai4all_tests_{name}", TESTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_deterministic_runs_are_identical_over_restarts(tiny_model: Path) -> None:
    digests = script("determinism").run_all(tiny_model, runs=6, restart_every=3, threads=2, slots=3)
    assert len(digests) == 6
    assert len(set(digests)) == 1


@pytest.mark.model
def test_deterministic_runs_of_the_reference_model(reference_model: Path) -> None:
    command = [sys.executable, str(TESTS / "determinism.py"), str(reference_model)]
    done = subprocess.run(
        [*command, "--runs", "4", "--restart-every", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 of 4 runs identical, over 2 processes")


async def test_loading_again_and_again_does_not_grow(tiny_model: Path) -> None:
    cycles = script("load_cycles")
    options = EngineOptions(n_ctx=512, threads=1)
    figures = await cycles.resident_after_each(tiny_model, 10, options)
    assert cycles.growth(figures) < 2 * cycles.MIB


def test_growth_is_seen_and_noise_is_not() -> None:
    cycles = script("load_cycles")
    assert cycles.growth([9, 9, 9, *range(100, 200)]) > 60
    assert cycles.growth([1, 50, 99, 100, 101, 100, 101, 100, 101]) <= 1
