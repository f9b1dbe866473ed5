"""What a worker that runs makes of other settings."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import termios
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ujson
from command_line import fake_command
from structlog.testing import capture_logs
from worker_process import worker_process

from ai4all.commands.reload import LiveSettings, is_taken_up
from ai4all.config import Settings, explain, load_settings
from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, TaskSpec
from ai4all.errors import ConfigError

TOKEN = "a-token-that-nobody-knows"


@dataclass
class Applied:
    """Takes the settings that a reload applies."""

    error: Exception | None = None
    seen: list[Settings] = field(default_factory=list)

    def __call__(self, settings: Settings) -> None:
        if self.error is not None:
            raise self.error
        self.seen.append(settings)


def reload_with(before: dict[str, Any], after: dict[str, Any], applied: Applied) -> dict[str, Any]:
    live = LiveSettings(
        load_settings(None, before, environ={}),
        lambda: load_settings(None, after, environ={}),
        applied,
    )
    with capture_logs() as logs:
        live.reload()
    (line,) = logs
    return dict(line)


def test_what_can_be_taken_up_is_and_the_rest_is_said() -> None:
    applied = Applied()
    line = reload_with(
        {},
        {
            "log.json": True,
            "log.level": "debug",
            "worker.max_concurrent_tasks": 3,
            "engine.threads": 2,
            "engine.draft_model": "smaller",
            "coordinator.ping_interval_ms": 5000,
            "coordinator.url": "wss://elsewhere.example/",
            "worker.model": "another",
            "data_dir": "/elsewhere",
        },
        applied,
    )
    assert line["event"] == "settings_reloaded"
    assert set(line["taken_up"]) == {
        "log.json",
        "log.level",
        "worker.max_concurrent_tasks",
        "engine.threads",
        "coordinator.ping_interval_ms",
    }
    assert set(line["after_restart"]) == {
        "coordinator.url",
        "engine.draft_model",
        "worker.model",
        "data_dir",
    }
    (settings,) = applied.seen
    assert (settings.log.as_json, settings.log.level) == (True, "debug")
    assert settings.engine_options().threads == 2
    assert settings.engine_options().n_slots == 3
    assert settings.coordinator.ping_interval_ms == 5000
    assert settings.coordinator.url is None
    assert settings.worker.model == "benchmark"
    assert settings.data_dir != Path("/elsewhere")
    assert settings.origin("log.level") == "flag --log-level"


def test_what_waits_for_a_restart_is_said_each_time() -> None:
    live = LiveSettings(
        load_settings(None, {}, environ={}),
        lambda: load_settings(None, {"worker.model": "x", "log.level": "error"}, environ={}),
        Applied(),
    )
    with capture_logs() as logs:
        live.reload()
        live.reload()
    assert [log["taken_up"] for log in logs] == [["log.level"], []]
    assert [log["after_restart"] for log in logs] == [["worker.model"], ["worker.model"]]


@pytest.mark.parametrize("broken_by", ["reading", "applying"])
def test_what_is_broken_changes_nothing(broken_by: str) -> None:
    applied = Applied(None if broken_by == "reading" else ConfigError("x", "is wrong", "file"))
    readings: list[dict[str, Any]] = [
        {"log.level": "loud"} if broken_by == "reading" else {"log.level": "debug"},
        {"log.level": "debug"},
    ]
    live = LiveSettings(
        load_settings(None, {}, environ={}),
        lambda: load_settings(None, readings.pop(0), environ={}),
        applied,
    )
    with capture_logs() as logs:
        live.reload()
        assert applied.seen == []
        applied.error = None
        live.reload()
    assert [log["event"] for log in logs] == ["settings_not_reloaded", "settings_reloaded"]
    assert ("log.level" if broken_by == "reading" else "is wrong") in logs[0]["error"]
    assert logs[1]["taken_up"] == ["log.level"]


def test_every_setting_is_one_or_the_other() -> None:
    keys = [row.key for row in explain(load_settings(None, {}, environ={}))]
    assert {key.partition(".")[0] for key in keys if is_taken_up(key)} == {
        "coordinator",
        "engine",
        "log",
        "worker",
    }
    assert not is_taken_up("worker.id")


# A real process.


def fake_worker(coordinator: EmbeddedCoordinator) -> list[str]:
    return fake_command("worker", "--coordinator", coordinator.url)


async def test_sighup_reads_the_file_and_the_token_again(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o700)
    config, token = data_dir / "config.toml", data_dir / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    config.write_text(f'[coordinator]\ntoken_file = "{token}"\nreconnect_interval_ms = 20\n')
    registered = asyncio.Event()

    def watch(event: Event) -> None:
        if event.kind is EventKind.REGISTERED:
            registered.set()

    async with (
        EmbeddedCoordinator([], on_event=watch, token=TOKEN) as coordinator,
        worker_process(*fake_worker(coordinator)) as running,
    ):
        await registered.wait()
        config.write_text("[worker]\nmax_concurrent_tasks = many\n")
        running.process.send_signal(signal.SIGHUP)
        line = await running.until("settings_not_reloaded")
        assert "config.toml" in line
        token.write_text("another-" + TOKEN)
        config.write_text(
            f'[coordinator]\ntoken_file = "{token}"\nreconnect_interval_ms = 30\n'
            '[worker]\nmax_concurrent_tasks = 2\n[log]\nlevel = "debug"\njson = true\n'
        )
        running.process.send_signal(signal.SIGHUP)
        told = ujson.loads(await running.until('"settings_reloaded"'))
        assert told["taken_up"] == ["worker.max_concurrent_tasks", "log.level", "log.json"]
        assert told["after_restart"] == ["coordinator.reconnect_interval_ms"]
        # The work went on, and goes on with two blocks at once.
        for number in range(4):
            coordinator.add(TaskSpec(input={"prompt": f"p{number}", "max_tokens": 4}))
        await coordinator.finished()
        # The next connection has the new token.
        registered.clear()
        port = int(coordinator.url.rpartition(":")[2])
        await coordinator.stop()
        async with EmbeddedCoordinator([], on_event=watch, token="another-" + TOKEN, port=port):
            await registered.wait()
            running.process.terminate()
            assert await running.process.wait() == 0
        logged = (data_dir / "logs" / "ai4all-native.jsonl").read_text()
    assert TOKEN not in logged + "".join(running.lines)
    assert coordinator.violations() == []


def in_a_session_of_its_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.usefixtures("data_dir")
async def test_a_terminal_that_is_closed_stops_it_and_a_reload_there_does_not(closed: bool) -> None:
    registered = asyncio.Event()

    def watch(event: Event) -> None:
        if event.kind is EventKind.REGISTERED:
            registered.set()

    ours, theirs = os.openpty()
    try:
        async with EmbeddedCoordinator([], on_event=watch) as coordinator:
            start = worker_process(
                *fake_worker(coordinator), stdin=theirs, preexec_fn=in_a_session_of_its_terminal
            )
            async with start as running:
                os.close(theirs)
                await registered.wait()
                if closed:
                    os.close(ours)
                    await running.until("worker_stopping")
                else:
                    running.process.send_signal(signal.SIGHUP)
                    await running.until("settings_reloaded")
                    running.process.terminate()
                assert await running.process.wait() == 0
    finally:
        if not closed:
            os.close(ours)


async def test_nohup_stays_in_force(data_dir: Path) -> None:
    registered = asyncio.Event()

    def watch(event: Event) -> None:
        if event.kind is EventKind.REGISTERED:
            registered.set()

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    async with (
        EmbeddedCoordinator([], on_event=watch) as coordinator,
        worker_process(*fake_worker(coordinator), preexec_fn=ignore) as running,
    ):
        await registered.wait()
        running.process.send_signal(signal.SIGHUP)
        coordinator.add(TaskSpec(input={"prompt": "x", "max_tokens": 4}))
        await coordinator.finished()
        running.process.terminate()
        assert await running.process.wait() == 0
        assert "settings_reloaded" not in "".join(running.lines)
