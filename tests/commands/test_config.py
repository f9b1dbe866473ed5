from __future__ import annotations

import stat
from pathlib import Path

import pytest
from command_line import Cli


def test_what_init_writes_is_valid_and_found(cli: Cli, data_dir: Path) -> None:
    written = cli("config", "init", "--json")
    assert written.status == 0
    path = data_dir / "config.toml"
    assert written.json == {"config_file": str(path)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert cli("config", "validate", "--json").json == {"valid": True, "config_file": str(path)}
    assert cli("config", "show", "--json").json["config_file"] == str(path)


def test_init_replaces_nothing_unasked(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[engine]\nthreads = 3\n")
    done = cli("config", "init", "--config", str(path))
    assert done.status == 2
    assert "--force" in done.error_line
    assert path.read_text() == "[engine]\nthreads = 3\n"
    assert cli("config", "init", "--config", str(path), "--force").status == 0
    assert cli("config", "validate", "--config", str(path)).status == 0
    assert "threads = 3" not in path.read_text()


def test_show_says_where_each_value_comes_from(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[engine]\nthreads = 3\n")
    monkeypatch.setenv("AI4ALL_COORDINATOR_TOKEN", "planted-secret")
    done = cli("config", "show", "--config", str(path), "--data-dir", "/elsewhere", "--json")
    rows = {row["key"]: row for row in done.json["settings"]}
    assert rows["engine.threads"]["value"] == 3
    assert str(path) in rows["engine.threads"]["origin"]
    assert rows["data_dir"]["value"] == "/elsewhere"
    assert "--data-dir" in rows["data_dir"]["origin"]
    assert rows["engine.batch"]["origin"] == "default"
    table = cli("config", "show", "--config", str(path))
    assert table.status == 0
    assert "planted-secret" not in done.out + table.out


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("[engine]\nthread = 3\n", "engine.threads"),
        ("[engine]\n\nthreads = 'many'\n", "line 3"),
        ("[coordinator]\nurl = 'http://x'\n", "coordinator.url"),
        ("[engine\n", "TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    cli: Cli, tmp_path: Path, content: str, part: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    for command in (["config", "validate"], ["config", "show"], ["worker"], ["demo"]):
        done = cli(*command, "--config", str(path))
        assert (done.status, done.out) == (2, "")
        assert part in done.error_line
        assert str(path) in done.error_line


def test_a_config_that_cannot_be_read_is_named(cli: Cli, tmp_path: Path) -> None:
    done = cli("worker", "--config", str(tmp_path / "absent.toml"))
    assert done.status == 2
    assert "absent.toml" in done.error_line
