from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

import pytest
import ujson
from command_line import Cli, fake_command


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    lines = [{"block_id": f"b{n}", "input": {"prompt": "x", "max_tokens": 4}} for n in range(2)]
    path.write_text("".join(ujson.dumps(line) + "\n" for line in lines))
    return path


def test_what_is_wrong_is_one_line(cli: Cli, tmp_path: Path, tasks: Path) -> None:
    results = str(tmp_path / "results.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"input": {"prompt": "x"}}\n{"input": 3}\n')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, part, status in [
            (["--tasks", str(tmp_path / "absent"), "--results", results], "absent", 2),
            (["--tasks", str(tmp_path / "bad.jsonl"), "--results", results], "line 2", 2),
            (["--tasks", str(tasks), "--results", results, "--port", port], port, 2),
            (["--tasks", str(tasks), "--results", results, "--host", "0.0.0.0"], "0.0.0.0", 2),
            (["--tasks", str(tasks), "--results", str(tmp_path / "no" / "r")], "no/r", 1),
            (["--tasks", str(tasks), "--results", results, "--token-file", "/no"], "/no", 2),
        ]:
            done = cli("coordinator", *arguments)
            assert (done.status, done.out) == (status, ""), done
            assert part in done.error_line


async def url_of(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    line = (await process.stderr.readline()).decode()
    return next(word.rstrip(",") for word in line.split() if word.startswith("ws://"))


async def test_two_commands_do_the_work_of_a_file(tmp_path: Path, tasks: Path) -> None:
    results = tmp_path / "results.jsonl"
    coordinator = await asyncio.create_subprocess_exec(
        *fake_command("coordinator", "--tasks", str(tasks), "--results", str(results)),
        *["--port", "0", "--strict-seed"],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    url = await url_of(coordinator)
    worker = await asyncio.create_subprocess_exec(
        *fake_command("worker", "--coordinator", url), stderr=asyncio.subprocess.PIPE
    )
    out, said = await coordinator.communicate()
    worker.send_signal(signal.SIGTERM)
    _, err = await worker.communicate()
    assert (coordinator.returncode, worker.returncode) == (0, 0), (said, err)
    rows = [ujson.loads(line) for line in results.read_text().splitlines()]
    assert {(row["block_id"], row["accepted"]) for row in rows} == {("b0", True), ("b1", True)}
    assert b"all tasks have ended" in said
    assert b"violation" not in said
    assert out == b""


async def test_a_signal_ends_it_and_the_work_can_go_on(tmp_path: Path, tasks: Path) -> None:
    results = tmp_path / "results.jsonl"
    coordinator = await asyncio.create_subprocess_exec(
        *fake_command("coordinator", "--tasks", str(tasks), "--results", str(results)),
        *["--port", "0"],
        stderr=asyncio.subprocess.PIPE,
    )
    await url_of(coordinator)
    coordinator.send_signal(signal.SIGTERM)
    _, said = await coordinator.communicate()
    assert coordinator.returncode == 0
    assert b"2 tasks to do" in said
