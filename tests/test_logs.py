from __future__ import annotations

import io
import logging
import os
import pty
import re
import select
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
import structlog
import ujson
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from ai4all import logs
from ai4all.config import Settings, load_settings
from ai4all.errors import DataDirectoryError
from ai4all.logs import REDACTED, configure_logging, hide_secret, redact

SECRET = "s3cret-c4nary-8f1b"


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in logs._LIBRARIES}
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    logs._newer_secrets.clear()


def settings_for(tmp_path: Path, level: str = "debug", **more: object) -> Settings:
    overrides = {"data_dir": tmp_path, "log.level": level}
    overrides |= {key.replace("__", "."): value for key, value in more.items()}
    return load_settings(None, overrides, environ={"AI4ALL_COORDINATOR_TOKEN": SECRET})


def lines(tmp_path: Path) -> list[dict[str, object]]:
    text = (tmp_path / "logs" / logs.LOG_FILE).read_text()
    return [ujson.loads(line) for line in text.splitlines()]


def test_events_are_readable_on_a_console_and_json_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(settings_for(tmp_path))
    structlog.get_logger("ai4all.worker").info("block_started", block_id="b-1", tokens=[1, 2])
    logging.getLogger("some.library").warning("it took %d ms", 5)
    console = capsys.readouterr()
    assert console.out == ""
    assert "block_started" in console.err
    assert "b-1" in console.err
    assert "\x1b" not in console.err  # not a terminal
    ours, theirs = lines(tmp_path)
    assert ours["event"] == "block_started"
    assert ours["block_id"] == "b-1"
    assert ours["tokens"] == [1, 2]
    assert ours["level"] == "info"
    assert ours["logger"] == "ai4all.worker"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", str(ours["timestamp"]))
    assert theirs["event"] == "it took 5 ms"
    assert theirs["logger"] == "some.library"


def test_json_on_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(settings_for(tmp_path), json_console=True)
    structlog.get_logger().info("hello", path=tmp_path)
    assert ujson.loads(capsys.readouterr().err)["path"] == str(tmp_path)


def test_quiet_is_for_the_console_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(settings_for(tmp_path), quiet=True)
    structlog.get_logger().info("progress_made")
    structlog.get_logger().warning("trouble_ahead")
    err = capsys.readouterr().err
    assert "progress_made" not in err
    assert "trouble_ahead" in err
    assert [line["event"] for line in lines(tmp_path)] == ["progress_made", "trouble_ahead"]


def test_the_level_holds(tmp_path: Path) -> None:
    configure_logging(settings_for(tmp_path, "warning"))
    structlog.get_logger().info("unseen")
    logging.getLogger("x").info("unseen")
    structlog.get_logger().error("seen")
    assert [line["event"] for line in lines(tmp_path)] == ["seen"]


def test_configuring_again_does_not_double_lines(tmp_path: Path) -> None:
    for _ in range(3):
        configure_logging(settings_for(tmp_path))
    structlog.get_logger().info("once")
    assert len(lines(tmp_path)) == 1


def test_who_bound_a_logger_before_a_change_logs_as_the_others_do(tmp_path: Path) -> None:
    configure_logging(load_settings(None, {"data_dir": tmp_path / "before"}, environ={}))
    bound = structlog.get_logger("ai4all.old").bind(block_id="b-1")
    configure_logging(settings_for(tmp_path / "after"))
    bound.info("said", value=f"<{SECRET}>")
    (line,) = lines(tmp_path / "after")
    assert (line["event"], line["block_id"], line["logger"]) == ("said", "b-1", "ai4all.old")
    assert line["value"] == f"<{REDACTED}>"
    assert lines(tmp_path / "before") == []


def test_odd_records_of_others_are_lines_too(tmp_path: Path) -> None:
    configure_logging(settings_for(tmp_path))
    theirs = logging.getLogger("some.library")
    theirs.log(25, "between two levels")
    theirs.warning("with %d too few", 1, 2)  # A fault of theirs: logged nowhere, and no end.
    theirs.warning({"not": "a text"})
    theirs.warning("percent: 100%")
    assert [(line["level"], line["event"]) for line in lines(tmp_path)] == [
        ("info", "between two levels"),
        ("warning", "{'not': 'a text'}"),
        ("warning", "percent: 100%"),
    ]


def test_a_terminal_that_has_gone_takes_no_line_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Gone())
    configure_logging(settings_for(tmp_path))
    structlog.get_logger().warning("still here")
    assert [line["event"] for line in lines(tmp_path)] == ["still here"]


def test_a_value_that_cannot_be_shown_ends_nothing(tmp_path: Path) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    configure_logging(settings_for(tmp_path))
    structlog.get_logger().info("unlucky", value=Broken())
    structlog.get_logger().info("next")
    assert [line["event"] for line in lines(tmp_path)] == ["next"]


def test_the_file_is_private_bounded_and_optional(tmp_path: Path) -> None:
    configure_logging(settings_for(tmp_path, log__max_file_mb=1, log__backups=2))
    log = structlog.get_logger()
    for _ in range(500):
        log.info("filler", filler="x" * 10_000)
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == [logs.LOG_FILE + end for end in ("", ".1", ".2")]
    for file in files:
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.stat().st_size <= 1 << 20

    other = tmp_path / "other"
    configure_logging(settings_for(other, log__file=False))
    assert not other.exists()


def test_a_log_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(DataDirectoryError, match="logs"):
        configure_logging(settings_for(tmp_path))


def plant_everywhere() -> None:
    """Log the secret, and a prompt, in every way that code has of logging something."""
    log = structlog.get_logger("ai4all.test")
    log.debug("a", token=SECRET, prompt="PROMPT", text="PROMPT", input={"prompt": "PROMPT"})
    log.info("b", headers={"Authorization": f"Bearer {SECRET}", "Host": "h"})
    log.info("c", nested=[{"deep": ({"api_key": SECRET},)}], assignment={"input": "PROMPT"})
    log.info(f"connecting with Bearer {SECRET}")
    log.info("d", url=f"wss://user:{SECRET}@host/path?token={SECRET}&x=1")
    log.info("e %s", f"Authorization: Bearer {SECRET}")
    log.bind(session_token=SECRET, system_prompt="PROMPT").warning("f")
    structlog.contextvars.bind_contextvars(password=SECRET)
    log.error("g", value=f"x{SECRET}y")
    structlog.contextvars.clear_contextvars()
    try:
        raise ValueError(f"bad header {SECRET}")
    except ValueError:
        log.exception("h")
        logging.getLogger("lib").exception("i")
    logging.getLogger("lib").info("j %s", {"Authorization": f"Bearer {SECRET}"})
    logging.getLogger("lib").info("Cookie: session=%s", SECRET, stack_info=True)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"old way with {SECRET}", stacklevel=1)


@pytest.mark.parametrize("level", ["debug", "info"])
@pytest.mark.parametrize("json_console", [True, False])
def test_a_planted_secret_is_in_no_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], level: str, json_console: bool
) -> None:
    configure_logging(settings_for(tmp_path, level), json_console=json_console)
    plant_everywhere()
    captured = capsys.readouterr()
    everything = captured.out + captured.err + (tmp_path / "logs" / logs.LOG_FILE).read_text()
    assert everything.count(REDACTED) > 20
    assert "connecting" in everything
    assert SECRET not in everything
    assert "PROMPT" not in everything


def test_a_secret_that_nobody_configured_is_known_by_its_place(tmp_path: Path) -> None:
    settings = load_settings(None, {"data_dir": tmp_path}, environ={})
    configure_logging(settings)
    log = structlog.get_logger()
    log.info("a", authorization="abc-1", coordinator_token="abc-2", note="Bearer abc-3")
    log.info("b", url="https://u:abc-4@host/?signature=abc-5", note="Proxy-Authorization: abc-6")
    assert "abc-" not in (tmp_path / "logs" / logs.LOG_FILE).read_text()


def test_a_token_file_is_known_too(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-the-file\n")
    overrides = {"data_dir": tmp_path, "coordinator.token_file": file}
    configure_logging(load_settings(None, overrides, environ={}))
    structlog.get_logger().info("a", value="<from-the-file>")
    assert lines(tmp_path)[0]["value"] == f"<{REDACTED}>"


async def test_a_real_handshake_at_debug_does_not_show_its_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(settings_for(tmp_path, "debug"))

    async def echo(connection: ServerConnection) -> None:
        assert connection.request is not None
        await connection.send(connection.request.headers["Authorization"][:6])

    async with serve(echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        headers = {"Authorization": f"Bearer {SECRET}"}
        async with connect(f"ws://127.0.0.1:{port}", additional_headers=headers) as client:
            assert await client.recv() == "Bearer"
    captured = capsys.readouterr()
    everything = captured.out + captured.err + (tmp_path / "logs" / logs.LOG_FILE).read_text()
    assert websockets.__name__ in everything  # its own lines are there, at info
    assert SECRET not in everything


def test_redaction_leaves_the_rest_alone() -> None:
    event = {"block_id": "b", "tokens": 5, "prompt_tokens": 7, "ok": True, "none": None, "f": 1.5}
    assert redact(event) == event
    assert redact({"tokenizer": "spm", "text_length": 3}) == {"tokenizer": "spm", "text_length": 3}
    assert redact({"Token": "x", "prompt": "x"}) == {"Token": REDACTED, "prompt": REDACTED}
    loop: list[object] = []
    loop.append(loop)
    redact(loop)


def test_a_secret_that_comes_later_is_hidden_too(tmp_path: Path) -> None:
    configure_logging(settings_for(tmp_path))
    hide_secret("n3wer-" + SECRET)
    hide_secret("abc")
    structlog.get_logger().info("said", words=f"n3wer-{SECRET} and {SECRET}, abc")
    (line,) = lines(tmp_path)
    assert line["words"] == f"{REDACTED} and {REDACTED}, abc"
    for number in range(100):
        hide_secret(f"token-{number}")
    assert len(logs._newer_secrets) < 10


@pytest.fixture(params=["pipe", "terminal"])
def unread(request: pytest.FixtureRequest) -> Iterator[tuple[int, TextIO]]:
    """Where to read, and a standard error that nobody has read from yet."""
    reading, writing = os.pipe() if request.param == "pipe" else pty.openpty()
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        yield reading, stream
    os.close(reading)


def taken(reading: int) -> str:
    """All that is there to be read."""
    pieces = []
    while select.select([reading], [], [], 0.2)[0]:
        pieces.append(os.read(reading, 65_536))
    return b"".join(pieces).decode().replace("\r\n", "\n")


def test_who_does_not_read_standard_error_holds_nobody_up(
    tmp_path: Path, unread: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, stream = unread
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging(settings_for(tmp_path), json_console=True)
    log = structlog.get_logger("x")
    for number in range(3000):
        log.info("something happened", number=number, padding="p" * 100)
    assert len(lines(tmp_path)) == 3000
    shown = taken(reading)
    log.info("it is read again")
    shown += taken(reading)
    log.info("and goes on")
    shown += taken(reading)
    # What was begun is finished, so every line is whole.
    pieces = [ujson.loads(line) for line in shown.splitlines()]
    numbers = [piece["number"] for piece in pieces if "number" in piece]
    assert 0 < len(numbers) < 3000
    assert numbers == list(range(len(numbers)))
    (left_out,) = (piece["count"] for piece in pieces if piece["event"] == "lines_left_out")
    others = [piece["event"] for piece in pieces if "number" not in piece]
    assert others[-1] == "and goes on"
    assert left_out + len(numbers) + others.count("it is read again") == 3001
