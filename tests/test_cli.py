from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import fake_command

from ai4all import __version__
from ai4all.cli import main

COMMANDS = [
    "worker",
    "demo",
    "coordinator",
    "benchmark",
    "generate",
    "doctor",
    "schema",
    "models",
    "config",
]
WITH_DATA_DIRECTORY = [
    *["worker", "demo", "benchmark", "generate", "doctor"],
    *["models list", "models pull", "models verify", "models remove"],
    *["config show", "config init", "config validate"],
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from ai4all.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize("command", WITH_DATA_DIRECTORY)
def test_commands_that_touch_the_data_directory_let_it_be_named(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert "--data-dir" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ai4all.cli import main; status = main(['--help']); "
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr); "
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    for heavy in ("pydantic", "rich", "websockets", "aiohttp", "numpy", "structlog", "asyncio"):
        assert f"'{heavy}'" not in done.stderr


def test_version_names_package_and_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"ai4all-native {__version__} (")
    assert "engine" in out
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nonsense"], "nonsense"),
        (["generate"], "--model"),
        (["demo", "--tasks", "many"], "--tasks"),
        (["demo", "--tasks", "0"], "--tasks"),
        (["benchmark", "--frobnicate"], "--frobnicate"),
        (["coordinator", "--tasks", "x", "--results", "y", "--port", "70000"], "--port"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert part in captured.err
    assert "--help" in captured.err


def test_schema_is_json_on_standard_output() -> None:
    import ujson

    done = run("schema")
    assert done.returncode == 0
    assert "Assignment" in ujson.loads(done.stdout)["$defs"]
    assert done.stderr == ""


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = "import sys; from ai4all.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, "schema"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert err == ""


def test_an_error_of_ours_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> dict[str, object]:
        raise KeyError("a bug")

    monkeypatch.setattr("ai4all.protocol.schema.wire_schema", broken)
    with pytest.raises(KeyError):
        main(["schema"])


def test_ctrl_c_ends_a_generation_with_130(tmp_path: Path, tiny_model: Path) -> None:
    arguments = ["generate", "--model", str(tiny_model), "--prompt", "x"]
    command = fake_command(*arguments, "--data-dir", str(tmp_path), hang_at=3)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        # The first text is proof that it is under way.
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in err
