from __future__ import annotations

import errno
import inspect
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from worker_process import real_command

from ai4all import errors
from ai4all.commands.failure import describe_failure


@pytest.mark.parametrize(
    ("error", "parts", "status"),
    [
        (errors.ConfigError("coordinator.url", "bad", "a.toml"), ["coordinator.url", "a.toml"], 2),
        (errors.BadRequest("--max-tokens: too small"), ["--max-tokens"], 2),
        (errors.ModelNotFound("nope"), ["'nope'"], 1),
        (errors.EngineUnavailable("not built"), ["not built"], 1),
        (errors.DataDirectoryError("/x", "full"), ["/x", "full"], 1),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), ["/x/y", "no space"], 1),
        (OSError(errno.EADDRINUSE, "bind on 127.0.0.1:1"), ["in use", "127.0.0.1:1"], 1),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), ["/x", "Permission"], 1),
        (KeyboardInterrupt(), ["interrupted"], 130),
        (ExceptionGroup("tasks", [errors.VersionMismatch("2.0.0", "1.0.0")]), ["2.0.0"], 1),
    ],
)
def test_a_users_matter_is_one_line_and_a_status(
    error: BaseException, parts: list[str], status: int
) -> None:
    described = describe_failure(error)
    assert described is not None
    line, given = described
    assert given == status
    assert "\n" not in line
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        AssertionError("x"),
        ExceptionGroup("tasks", [errors.EngineClosed("x"), TypeError("ours")]),
    ],
)
def test_a_bug_of_ours_keeps_its_traceback(error: BaseException) -> None:
    assert describe_failure(error) is None


def test_many_lines_become_one_of_bounded_length() -> None:
    described = describe_failure(errors.LoadFailed("a\nb\n" + "x" * 10_000))
    assert described is not None
    assert described[0].startswith("a b x")
    assert len(described[0]) <= 2000


def leaves(kind: type[errors.Ai4allError]) -> list[type[errors.Ai4allError]]:
    below = kind.__subclasses__()
    return [leaf for each in below for leaf in leaves(each)] if below else [kind]


def test_every_error_of_the_package_has_a_line() -> None:
    kinds = leaves(errors.Ai4allError)
    assert len(kinds) > 20
    for kind in kinds:
        parameters = inspect.signature(kind.__init__).parameters.values()
        needed = [
            p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        described = describe_failure(kind(*["what"] * max(1, len(needed) - 1)))
        assert described is not None, kind
        assert "what" in described[0], kind


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(tmp_path: Path, closed: str) -> None:
    line = f"{shlex.join(real_command('config', 'show'))} {closed}"
    environment = os.environ | {"AI4ALL_DATA_DIR": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-c", line], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("coordinator.url" in done.stdout) == (">&-" not in closed or closed == "2>&-")
