"""The commands and the process that the engine runs in."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Cli

from ai4all.backend.fake import FakeBackend
from ai4all.backend.isolated import IsolatedBackend
from ai4all.backend.native import NativeBackend
from ai4all.backend.quarantine import QUARANTINE_FILE, Quarantine, Subject
from ai4all.cli import main
from ai4all.commands.environment import Environment, read_settings
from ai4all.errors import LoadFailed

SUBJECT = Subject("tiny", "a" * 64, "llama.cpp 0 cpu", {"n_ctx": 512})


async def test_blocks_are_computed_in_a_process_of_its_own(data_dir: Path) -> None:
    settings = read_settings(None, data_dir)
    async with Environment().open_backend_for_blocks(settings) as backend:
        assert isinstance(backend, IsolatedBackend)


async def test_settings_and_flag_opt_out(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_flag = read_settings(None, data_dir, isolation__in_process=True)
    assert by_flag.origin("isolation.in_process") == "flag --in-process"
    monkeypatch.setenv("AI4ALL_ISOLATION_IN_PROCESS", "true")
    for settings in (by_flag, read_settings(None, data_dir)):
        async with Environment().open_backend_for_blocks(settings) as backend:
            assert isinstance(backend, NativeBackend)


def test_what_a_caller_puts_in_place_is_taken(data_dir: Path) -> None:
    fake = FakeBackend()
    environment = Environment(lambda: fake)
    assert environment.open_backend_for_blocks(read_settings(None, data_dir)) is fake


@pytest.mark.parametrize("flags", [[], ["--in-process"]])
def test_the_demo_runs_either_way(
    data_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
) -> None:
    # The benchmark of the first run has a long prompt.
    monkeypatch.setenv("AI4ALL_ENGINE_CONTEXT_LENGTH", "3072")
    assert main(["demo", "--tasks", "2", "--json", *flags]) == 0
    assert '"success": true' in capsys.readouterr().out
    assert not (data_dir / "logs" / "crashes").exists()


def test_limits_reach_the_watchdog(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AI4ALL_ISOLATION_DECODE_LIMIT_SECONDS", "2.5")
    settings = read_settings(None, data_dir)
    assert settings.isolation.decode_limit_seconds == 2.5
    backend = Environment().open_backend_for_blocks(settings)
    assert isinstance(backend, IsolatedBackend)
    assert backend.limits.decode == 2.5
    assert backend.limits.load == 120.0


class TestUnquarantine:
    @pytest.fixture
    def quarantine(self, cli: Cli, data_dir: Path) -> Quarantine:
        assert cli("doctor").status == 0
        data_dir.mkdir(mode=0o700, exist_ok=True)
        quarantine = Quarantine(data_dir / QUARANTINE_FILE)
        for _ in range(3):
            quarantine.record_death(SUBJECT)
        return quarantine

    def test_it_lifts(self, cli: Cli, quarantine: Quarantine) -> None:
        with pytest.raises(LoadFailed):
            quarantine.check(SUBJECT)
        done = cli("models", "unquarantine", "tiny")
        assert done.status == 0
        assert done.out == "tiny may be loaded again\n"
        quarantine.check(SUBJECT)

    def test_json(self, cli: Cli, quarantine: Quarantine) -> None:
        done = cli("models", "unquarantine", "tiny", "--json")
        assert done.json == {"model_id": "tiny", "lifted": 1}

    def test_a_model_that_is_nowhere(self, cli: Cli, quarantine: Quarantine) -> None:
        done = cli("models", "unquarantine", "large")
        assert done.status == 1
        assert "'large'" in done.error_line

    def test_a_model_that_is_not_quarantined(self, cli: Cli, tiny_model: Path) -> None:
        assert cli("models", "pull", "tiny", f"file:{tiny_model}").status == 0
        assert cli("models", "unquarantine", "tiny").out == "tiny was not quarantined\n"

    def test_the_doctor_names_it(self, cli: Cli, quarantine: Quarantine) -> None:
        assert cli("demo", "--tasks", "1", "--json").status == 0
        done = cli("doctor", "--json")
        (check,) = [c for c in done.json["checks"] if c["name"] == "model tiny"]
        assert check["status"] == "warning"
        assert "models unquarantine tiny" in check["detail"]

    def test_it_has_help(self, cli: Cli) -> None:
        done = cli("models", "unquarantine", "--help")
        assert "three times" in done.out
        assert "--data-dir" in done.out
