from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from ai4all.errors import DataDirectoryError, ModelChecksumMismatch, ModelSourceError
from ai4all.models import files, sources
from ai4all.models.files import DownloadProgress
from ai4all.models.sources import (
    BENCHMARK_SOURCE,
    FileSource,
    HttpSource,
    PypiSource,
    discard,
    fetch,
    parse_source,
)


def test_each_kind_of_source_is_read_and_written_back() -> None:
    for text, kind in (
        (BENCHMARK_SOURCE, PypiSource),
        ("https://example.org/a/b.gguf?x=1", HttpSource),
        ("http://127.0.0.1:8000/m", HttpSource),
        ("http://localhost/m", HttpSource),
        ("http://[::1]:1/m", HttpSource),
        ("file:/models/a.gguf", FileSource),
    ):
        source = parse_source(text)
        assert isinstance(source, kind)
        assert str(source) == text
    assert parse_source("file:///a b.gguf") == FileSource(Path("/a b.gguf"))
    assert parse_source("file:~/m") == FileSource(Path.home() / "m")
    assert parse_source("file:m") == FileSource(Path.cwd() / "m")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model.gguf",
        "ftp://example.org/m",
        "http://example.org/m",
        "http://127.0.0.1.example.org/m",
        "https://",
        "https:///m",
        "https://host:port/m",
        "https://[::1/m",
        "file:",
        "file://other/m",
        "file:~nobody-of-this-name/m",
        "pypi:",
        "pypi:package",
        "pypi:package==1.0",
        "pypi:package==1.0/",
        "pypi:package>=1.0/m",
        "pypi:--index-url==1.0/m",
        "pypi:-r==1/m",
        "pypi:package==1.0 --pre/m",
        "pypi:../package==1.0/m",
        "pypi:package==1.0/../m",
        "pypi:package==1.0//m",
        "pypi:package==1.0/a/./m",
        "pypi:package==1.0/a\\m",
        "pypi:package==1.0/a\0m",
        "https://example.org/\nm",
        "https://example.org/" + "m" * 3000,
    ],
)
def test_what_is_no_source(text: str) -> None:
    with pytest.raises(ModelSourceError):
        parse_source(text)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ModelSourceError) as caught:
        parse_source("https://user:hunter2@example.org/m.gguf")
    assert "credentials" in str(caught.value)
    assert "hunter2" not in str(caught.value)


async def test_a_file_is_copied_and_hashed(tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.write_bytes(os.urandom(3_000_000))
    seen: list[DownloadProgress] = []
    partial = tmp_path / "p.partial"
    fetched = await fetch(f"file:{original}", partial, progress=seen.append, disk_reserve_bytes=0)
    assert partial.read_bytes() == original.read_bytes()
    assert partial.stat().st_ino != original.stat().st_ino
    assert partial.stat().st_mode & 0o777 == 0o600
    assert fetched.sha256 == hashlib.sha256(original.read_bytes()).hexdigest()
    assert fetched.size_bytes == 3_000_000
    assert {p.phase for p in seen} == {"copying", "checking"}
    assert seen[-1].done_bytes == seen[-1].total_bytes == 3_000_000


async def test_a_file_that_cannot_be_copied(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "fifo"):
        with pytest.raises(ModelSourceError):
            await fetch(f"file:{path}", tmp_path / "p.partial")


async def test_the_wrong_file_leaves_nothing_behind(tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.write_bytes(b"content")
    partial = tmp_path / "p.partial"
    with pytest.raises(ModelChecksumMismatch) as caught:
        await fetch(f"file:{original}", partial, expected_sha256="0" * 64, disk_reserve_bytes=0)
    assert caught.value.actual == hashlib.sha256(b"content").hexdigest()
    with pytest.raises(ModelSourceError, match="7 bytes, expected 8"):
        await fetch(f"file:{original}", partial, expected_size=8, disk_reserve_bytes=0)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


async def test_the_disk_reserve_is_kept(tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.write_bytes(b"content")
    with pytest.raises(DataDirectoryError, match="beside the reserve"):
        await fetch(f"file:{original}", tmp_path / "p.partial", disk_reserve_bytes=1 << 60)
    assert not (tmp_path / "p.partial").exists()


async def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tmp_path / "original"
    original.write_bytes(b"content")

    def full(reading: int, writing: int) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(sources, "_copy_chunk", full)
    with pytest.raises(DataDirectoryError, match="the disk is full"):
        await fetch(f"file:{original}", tmp_path / "p.partial", disk_reserve_bytes=0)


async def test_a_link_in_place_of_the_partial_file_is_not_followed(tmp_path: Path) -> None:
    original, victim = tmp_path / "original", tmp_path / "victim"
    original.write_bytes(b"content")
    victim.write_bytes(b"precious")
    (tmp_path / "p.partial").symlink_to(victim)
    await fetch(f"file:{original}", tmp_path / "p.partial", disk_reserve_bytes=0)
    assert victim.read_bytes() == b"precious"


async def test_cancelling_stops_the_thread_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tmp_path / "original"
    original.write_bytes(bytes(8 << 20))
    partial = tmp_path / "p.partial"
    copying = asyncio.Event()
    loop = asyncio.get_running_loop()
    real = os.write
    steps = 0

    def slowly(reading: int, writing: int) -> int:
        nonlocal steps
        steps += 1
        loop.call_soon_threadsafe(copying.set)
        return real(writing, b"x" * 1024)

    monkeypatch.setattr(sources, "_copy_chunk", slowly)
    task = asyncio.create_task(fetch(f"file:{original}", partial, disk_reserve_bytes=0))
    await copying.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    at_return = steps
    await asyncio.sleep(0.05)
    assert steps == at_return


def test_discard_takes_what_belongs_to_a_fetch_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / "abc.gguf", tmp_path / "other.partial"]
    for path in (*kept, tmp_path / "a[b].partial", tmp_path / "a[b].partial.json"):
        path.write_bytes(b"x")
    (tmp_path / "a[b].partial.wheel").mkdir()
    discard(tmp_path / "a[b].partial")
    assert sorted(tmp_path.iterdir()) == kept


async def test_progress_is_bounded_and_ends_with_the_last_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[DownloadProgress] = []
    reporter = files.Reporter(seen.append)
    for done in range(10_001):
        reporter.report("downloading", done, 10_000)
    await asyncio.sleep(0)
    assert seen[0].done_bytes == 0
    assert seen[-1] == DownloadProgress("downloading", 10_000, 10_000)
    assert len(seen) < 1000
