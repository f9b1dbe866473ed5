from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ai4all import data_dir_lock
from ai4all.data_dir_lock import LOCK_FILE, hold_data_dir
from ai4all.errors import DataDirectoryError, DataDirectoryInUse

HOLDER = """
    import sys
    from pathlib import Path
    from ai4all.data_dir_lock import hold_data_dir

    with hold_data_dir(Path(sys.argv[1]), "worker"):
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_dir_lock, "_PATIENCE_S", 0.0)


def another_process(path: Path) -> subprocess.Popen[str]:
    """A process that holds the directory until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(HOLDER), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    with process:
        process.kill()


@pytest.mark.usefixtures("impatient")
def test_a_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    process = another_process(tmp_path)
    try:
        with pytest.raises(DataDirectoryInUse) as caught, hold_data_dir(tmp_path, "demo"):
            pass
    finally:
        end(process)
    line = str(caught.value)
    assert f"in use by process {process.pid}, worker since 20" in line
    assert "\n" not in line
    assert "--data-dir" in line


@pytest.mark.usefixtures("impatient")
def test_a_holder_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    process = another_process(tmp_path)
    with process:
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with hold_data_dir(tmp_path, "worker"):
        pass


def test_one_that_is_on_its_way_out_is_waited_for(tmp_path: Path) -> None:
    process = another_process(tmp_path)
    with process:
        process.kill()
        # Perhaps not dead yet.
        with hold_data_dir(tmp_path, "worker"):
            pass


@pytest.mark.usefixtures("impatient")
def test_what_the_holder_starts_does_not_hold_it(tmp_path: Path) -> None:
    with hold_data_dir(tmp_path, "worker"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with hold_data_dir(tmp_path, "worker"):
            pass
    finally:
        child.kill()
        child.wait()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("text", ["", "{}", '{"pid": "many"}', "\0" * 10, "[1]"])
def test_a_holder_that_did_not_say_who_it_is(tmp_path: Path, text: str) -> None:
    with hold_data_dir(tmp_path, "worker"):
        (tmp_path / LOCK_FILE).write_text(text)
        with (
            pytest.raises(DataDirectoryInUse, match="another process"),
            hold_data_dir(tmp_path, "demo"),
        ):
            pass


def test_its_file_is_private_and_stays(tmp_path: Path) -> None:
    with hold_data_dir(tmp_path, "worker"):
        pass
    assert stat.S_IMODE((tmp_path / LOCK_FILE).stat().st_mode) == 0o600


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to(victim)
    with pytest.raises(DataDirectoryError), hold_data_dir(tmp_path, "worker"):
        pass
    assert victim.read_text() == "precious"


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(DataDirectoryError, match="has no locks"), hold_data_dir(tmp_path, "worker"):
        pass
