from __future__ import annotations

import asyncio
import importlib.util
import signal
import socket
from pathlib import Path

import pytest
import ujson
from command_line import Cli, fake_command

from ai4all import logs
from ai4all.commands.worker import link_options
from ai4all.config import load_settings
from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, TaskSpec
from ai4all.errors import ConfigError
from ai4all.logs import redact


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--coordinator"),
        (["--coordinator", "nonsense"], "coordinator.url"),
        (["--coordinator", "http://127.0.0.1:1"], "wss://"),
        (["--coordinator", "ws://example.org:1"], "ws://"),
        (["--coordinator", "ws://user:planted@127.0.0.1:1"], "coordinator.url"),
    ],
)
def test_a_wrong_url_is_one_line_before_anything_happens(
    cli: Cli, data_dir: Path, arguments: list[str], part: str
) -> None:
    done = cli("worker", *arguments)
    assert (done.status, done.out) == (2, "")
    assert part in done.error_line
    assert "planted" not in done.err
    assert not data_dir.exists()


@pytest.mark.parametrize("proxy", ["http://[::1", "http://127.0.0.1:99999", "http://ex..ample"])
def test_a_proxy_that_is_none_is_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    done = cli("worker", "--coordinator", "wss://coordinator.invalid")
    assert done.status == 2
    assert "the proxy of this environment cannot be used" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_an_absent_model_is_one_line_and_costs_no_download(cli: Cli, data_dir: Path) -> None:
    done = cli("worker", "--coordinator", "ws://127.0.0.1:1", "--model", "absent")
    assert done.status == 1
    assert "'absent'" in done.error_line
    assert list((data_dir / "models").glob("*.gguf")) == []


def test_certificates_that_are_none_are_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    monkeypatch.setenv("AI4ALL_COORDINATOR_CA_FILE", str(tmp_path / "ca.pem"))
    done = cli("worker", "--coordinator", "wss://127.0.0.1:1")
    assert done.status == 2
    assert "AI4ALL_COORDINATOR_CA_FILE" in done.error_line


def test_a_pin_needs_a_key_to_look_at(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AI4ALL_COORDINATOR_PIN_SHA256", "0" * 64)
    done = cli("worker", "--coordinator", "ws://127.0.0.1:1")
    assert done.status == 2
    assert "coordinator.pin_sha256: needs an address that begins with wss://" in done.error_line
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = cli("worker", "--coordinator", "wss://127.0.0.1:1")
    assert done.status == 2
    assert "pip install 'ai4all-native[pin]'" in done.error_line


def test_a_token_in_a_file_may_change_under_a_worker(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first-token\n")
    file.chmod(0o600)
    overrides = {"coordinator.url": "wss://coordinator", "coordinator.token_file": file}
    link = link_options(load_settings(None, overrides, environ={"AI4ALL_DATA_DIR": str(tmp_path)}))
    assert callable(link.token)
    assert link.token() == "first-token"
    file.write_text("second-token")
    assert link.token() == "second-token"
    # What no line of settings ever held is in no log either.
    assert "second-token" not in str(redact("sent second-token", tuple(logs._newer_secrets)))
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        link.token()
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        link.token()


def test_attempts_that_run_out_are_one_clear_end(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AI4ALL_COORDINATOR_MAX_RECONNECT_ATTEMPTS", "1")
    monkeypatch.setenv("AI4ALL_COORDINATOR_RECONNECT_INTERVAL_MS", "1")
    monkeypatch.setenv("AI4ALL_LOG_LEVEL", "error")
    with socket.socket() as taken:
        # Bound and not listening: a port that refuses for as long as the test holds it.
        taken.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{taken.getsockname()[1]}"
        done = cli("worker", "--coordinator", url)
    assert done.status == 1
    assert "Traceback" not in done.err
    assert "gave up after" in done.err.splitlines()[-1]


async def coordinator_or_end(
    coordinator: EmbeddedCoordinator, process: asyncio.subprocess.Process
) -> None:
    """Wait until the work is done, or the worker has failed to do it."""
    waits = [asyncio.ensure_future(each) for each in (coordinator.finished(), process.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    assert process.returncode is None, "the worker ended before its work was done"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
async def test_a_worker_does_its_blocks_and_a_signal_ends_it_with_0(
    data_dir: Path, stop: signal.Signals
) -> None:
    tasks = [TaskSpec(input={"prompt": f"p{n}", "max_tokens": 4}) for n in range(3)]
    async with EmbeddedCoordinator(tasks) as coordinator:
        process = await asyncio.create_subprocess_exec(
            *fake_command("worker", "--coordinator", coordinator.url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        await coordinator_or_end(coordinator, process)
        process.send_signal(stop)
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert out == b""
    assert b"Traceback" not in err
    assert [outcome.accepted for outcome in coordinator.outcomes.values()] == [True] * 3
    (worker_id,) = {outcome.worker_id for outcome in coordinator.outcomes.values()}
    assert worker_id == (data_dir / "worker_id").read_text().strip()
    assert coordinator.violations() == []
    # What people sent is in no log.
    logged = (data_dir / "logs" / "ai4all-native.jsonl").read_text()
    assert [ujson.loads(line) for line in logged.splitlines()]
    assert "p0" not in {word for line in logged.splitlines() for word in line.split('"')}


async def test_a_second_signal_ends_a_block_that_hangs(data_dir: Path) -> None:
    started = asyncio.Event()
    tasks = [TaskSpec(input={"prompt": "x", "max_tokens": 200})]

    def watch(event: object) -> None:
        if getattr(event, "kind", None) is EventKind.ASSIGNED:
            started.set()

    # The benchmark of the first run needs an engine that works.
    prepared = await asyncio.create_subprocess_exec(
        *fake_command("benchmark", "--json"), stdout=asyncio.subprocess.DEVNULL
    )
    assert await prepared.wait() == 0
    async with EmbeddedCoordinator(tasks, on_event=watch) as coordinator:
        process = await asyncio.create_subprocess_exec(
            *fake_command("worker", "--coordinator", coordinator.url, hang_at=150),
            stderr=asyncio.subprocess.PIPE,
        )
        await started.wait()
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        async for line in process.stderr:
            if b"worker_stopping" in line:
                break
        process.send_signal(signal.SIGTERM)
        err = await process.stderr.read()
        assert await process.wait() == 0, err.decode()
    assert b"Traceback" not in err


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_during_the_first_run_ends_it_with_0_and_the_next_start_goes_on(
    data_dir: Path, stop: signal.Signals
) -> None:
    command = fake_command("worker", "--coordinator", "ws://127.0.0.1:1", hang_at=50)
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    async for line in process.stderr:
        if b"measuring this machine" in line:
            break
    process.send_signal(stop)
    err = await process.stderr.read()
    assert await process.wait() == 0, err.decode()
    assert b"Traceback" not in err
    assert not (data_dir / ".initialized").exists()
    before = (data_dir / "worker_id").read_text()
    again = await asyncio.create_subprocess_exec(
        *fake_command("benchmark", "--json"), stdout=asyncio.subprocess.DEVNULL
    )
    assert await again.wait() == 0
    assert (data_dir / ".initialized").exists()
    assert (data_dir / "worker_id").read_text() == before


async def test_a_second_worker_is_refused_until_the_first_is_dead(
    data_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ai4all.data_dir_lock._PATIENCE_S", 0.0)
    registered = asyncio.Event()
    delivered = asyncio.Event()

    def watch(event: Event) -> None:
        if event.kind is EventKind.REGISTERED:
            registered.set()
        if event.kind is EventKind.DELIVERED:
            delivered.set()

    async with EmbeddedCoordinator([], on_event=watch) as coordinator:
        arguments = ("worker", "--coordinator", coordinator.url)
        first = await asyncio.create_subprocess_exec(
            *fake_command(*arguments), stderr=asyncio.subprocess.DEVNULL
        )
        await registered.wait()
        for command in (arguments, ("demo",), ("benchmark",)):
            done = await asyncio.to_thread(cli, *command)
            assert done.status == 1
            assert f"in use by process {first.pid}, worker since" in done.error_line
        first.kill()
        await first.wait()
        second = await asyncio.create_subprocess_exec(
            *fake_command(*arguments), stderr=asyncio.subprocess.DEVNULL
        )
        coordinator.add(TaskSpec(input={"prompt": "x", "max_tokens": 4}))
        await delivered.wait()
        second.terminate()
        assert await second.wait() == 0
