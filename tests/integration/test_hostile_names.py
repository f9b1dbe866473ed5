"""Five hundred names that would like to be paths, as ids of blocks and models, as digests, as
sources: nothing outside the data directory is read or written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ujson
from hostile_archives import snapshot
from hostile_names import NAMES, TARGET
from tiny_gguf import write_tiny_gguf

import ai4all

# What a process looks at without being asked by anybody.
OWN_BUSINESS = ("/proc", "/sys/fs/cgroup", "/dev/null", "/dev/urandom")


def test_no_name_is_a_path(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    outside = tmp_path / Path(TARGET).parent
    outside.mkdir()
    write_tiny_gguf(tmp_path / TARGET, seed=1)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    before = snapshot(tmp_path)
    stamps = {path: path.stat().st_atime_ns for path in outside.iterdir()}
    script = Path(__file__).parents[1] / "support" / "audited_names.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path), "40"],
        cwd=cwd,
        env={
            **os.environ,
            "HOME": str(outside),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = ujson.loads(done.stdout)

    # Every name was a block's id that could be one, and each block was answered.
    assert report["given"] == len(NAMES)
    assert len(report["ended"]) > 450
    assert {None, "model_not_found"} <= set(report["ended"].values())
    # No name was taken for a model, a source that may be used, or a digest.
    assert all("accepted" not in outcome for outcome in report["kinds"]), report["kinds"]

    data_dir = str(tmp_path / "data")
    package = str(Path(ai4all.__file__).parent)
    touched = {path for _, path in report["touched"]}
    strange = {
        path
        for path in touched
        if not (path == data_dir or path.startswith(f"{data_dir}/"))
        and not path.startswith((*OWN_BUSINESS, package, sys.prefix, sys.base_prefix))
    }
    assert strange == set()
    assert touched & {f"{data_dir}/results.sqlite3"}, "the watch saw nothing"
    inside = {path.removeprefix(data_dir) for path in touched if path.startswith(data_dir)}
    assert all(len(Path(path).parts) <= 5 for path in inside), inside
    after = snapshot(tmp_path)
    assert {p for p in after.keys() ^ before.keys() if not p.startswith(("data", "site"))} == set()
    assert all(
        after[path] == was for path, was in before.items() if not path.startswith(("data", "site"))
    )
    assert stamps == {path: path.stat().st_atime_ns for path in outside.iterdir()}
