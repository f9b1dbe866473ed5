from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from command_line import Cli, Finished

from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.cli import main
from ai4all.commands.environment import Environment


@pytest.fixture(autouse=True)
def a_place_of_its_own(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test, and no test reaches the machine's home."""
    for name in os.environ:
        if name.startswith("AI4ALL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    monkeypatch.setenv("AI4ALL_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("AI4ALL_MODELS_BENCHMARK_SOURCE", f"file:{tiny_model}")
    monkeypatch.setenv("AI4ALL_MODELS_DISK_RESERVE_MB", "0")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The commands send the process's logs where they want them; put that back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    warnings.resetwarnings()
    warnings.simplefilter("error")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run one command over a scripted backend."""

    def run(*arguments: str, backend: FakeBackend | None = None) -> Finished:
        def open_backend() -> FakeBackend:
            if backend is not None:
                return backend
            return FakeBackend(ScriptedGeneration(token_ms=1.0), time_scale=0.0)

        capsys.readouterr()
        status = main(arguments, Environment(open_backend))
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    return run
