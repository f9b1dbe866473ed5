from __future__ import annotations

import errno
import hashlib
import io
import os
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from file_server import Cut, FileServer, serve_file
from rich.console import Console

from ai4all.config import Settings, load_settings
from ai4all.errors import DataDirectoryError, ModelChecksumMismatch, ModelSourceError
from ai4all.first_run import (
    FirstRunReport,
    ensure_first_run,
    is_initialized,
    open_store,
    prepare_data_dir,
    worker_id,
)
from ai4all.models import http_download
from ai4all.types.model import ModelFile


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "data"


def test_directories_are_made_and_private(data_dir: Path) -> None:
    old = os.umask(0)
    try:
        prepare_data_dir(data_dir)
    finally:
        os.umask(old)
    names = {path.name for path in data_dir.iterdir()}
    assert names == {"models", "logs", "cache"}
    assert {mode(data_dir / name) for name in names} | {mode(data_dir)} == {0o700}
    prepare_data_dir(data_dir)


def test_modes_that_let_others_in_are_put_right(data_dir: Path) -> None:
    prepare_data_dir(data_dir)
    worker_id(data_dir)
    (data_dir / "something").write_text("x")
    for path in (data_dir, data_dir / "models"):
        path.chmod(0o755)
    (data_dir / "worker_id").chmod(0o644)
    prepare_data_dir(data_dir)
    assert [mode(data_dir), mode(data_dir / "models"), mode(data_dir / "worker_id")] == [
        0o700,
        0o700,
        0o600,
    ]


def test_an_empty_directory_is_taken_and_a_strange_one_is_not(tmp_path: Path) -> None:
    empty, strange = tmp_path / "empty", tmp_path / "strange"
    for path in (empty, strange):
        path.mkdir()
        path.chmod(0o755)
    (strange / "thesis.txt").write_text("x")
    prepare_data_dir(empty)
    assert mode(empty) == 0o700
    with pytest.raises(DataDirectoryError, match="chmod 700"):
        prepare_data_dir(strange)
    assert mode(strange) == 0o755
    assert [path.name for path in strange.iterdir()] == ["thesis.txt"]


def test_what_cannot_be_a_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataDirectoryError, match="not a directory"):
        prepare_data_dir(tmp_path / "file")
    with pytest.raises(DataDirectoryError, match="Not a directory"):
        prepare_data_dir(tmp_path / "file" / "below")
    (tmp_path / "blocked").mkdir(mode=0o700)
    (tmp_path / "blocked" / "models").write_text("x")
    with pytest.raises(DataDirectoryError, match="not a directory"):
        prepare_data_dir(tmp_path / "blocked")
    with pytest.raises(DataDirectoryError):
        prepare_data_dir(Path("/proc/ai4all-native"))
    monkeypatch.setattr(os, "geteuid", lambda: 987_654)
    with pytest.raises(DataDirectoryError, match="belongs to another user"):
        prepare_data_dir(tmp_path / "new")


def test_a_full_disk_is_noticed_before_anything_is_fetched(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("ai4all.first_run.tempfile.NamedTemporaryFile", full)
    with pytest.raises(DataDirectoryError, match="the disk is full"):
        prepare_data_dir(data_dir)


def test_a_full_disk_keeps_no_worker_from_starting_that_may_have_results_to_deliver(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_data_dir(data_dir)
    (data_dir / ".initialized").touch()

    def failing(number: int) -> None:
        def fail(*args: object, **more: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("ai4all.first_run.tempfile.NamedTemporaryFile", fail)

    failing(errno.ENOSPC)
    prepare_data_dir(data_dir)
    failing(errno.EROFS)
    with pytest.raises(DataDirectoryError, match="Read-only"):
        prepare_data_dir(data_dir)


def test_the_identity_is_made_once(data_dir: Path) -> None:
    prepare_data_dir(data_dir)
    first = worker_id(data_dir)
    assert uuid.UUID(first).version == 4
    assert mode(data_dir / "worker_id") == 0o600
    assert worker_id(data_dir) == first
    assert sorted(path.name for path in data_dir.glob("*worker_id*")) == ["worker_id"]


def test_processes_that_start_at_once_share_one_identity(data_dir: Path) -> None:
    prepare_data_dir(data_dir)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(worker_id, [data_dir] * 32))) == 1


@pytest.mark.parametrize("content", [b"", b"me", b"\xff", b"x" * 10_000])
def test_an_identity_that_is_none_is_not_replaced(data_dir: Path, content: bytes) -> None:
    prepare_data_dir(data_dir)
    file = data_dir / "worker_id"
    file.write_bytes(content)
    with pytest.raises(DataDirectoryError, match="does not hold a UUID"):
        worker_id(data_dir)
    assert file.read_bytes() == content


class Run:
    """First runs on one data directory, with a benchmark that is counted."""

    def __init__(self, data_dir: Path, source: str, content: bytes) -> None:
        self.data_dir = data_dir
        self.overrides: dict[str, Any] = {
            "data_dir": data_dir,
            "models.benchmark_source": source,
            "models.benchmark_sha256": hashlib.sha256(content).hexdigest(),
            "models.disk_reserve_mb": 0,
        }
        self.benchmarked: list[ModelFile] = []
        self.benchmark_fails = False
        self.output = io.StringIO()
        self.terminal = False

    @property
    def settings(self) -> Settings:
        return load_settings(None, self.overrides, environ={})

    async def __call__(self) -> FirstRunReport:
        async def run_benchmark(model: ModelFile) -> str:
            if self.benchmark_fails:
                raise RuntimeError("interrupted")
            self.benchmarked.append(model)
            return "figures"

        console = Console(file=self.output, force_terminal=self.terminal, width=120)
        store = open_store(self.settings)
        return await ensure_first_run(self.settings, store, run_benchmark, console)


@pytest.fixture
async def server(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FileServer]:
    monkeypatch.setattr(http_download, "RETRY_DELAYS", (0.0,))
    async with serve_file(tiny_model.read_bytes()) as serving:
        yield serving


@pytest.fixture
def run(server: FileServer, data_dir: Path) -> Run:
    return Run(data_dir, server.url, server.content)


async def test_a_first_run_and_a_second(run: Run, server: FileServer) -> None:
    first = await run()
    assert first.was_first
    assert first.benchmark == "figures"
    assert first.model is not None
    assert run.benchmarked == [first.model]
    assert first.model.model_id == "benchmark"
    assert first.model.path.read_bytes() == server.content
    assert first.worker_id == worker_id(run.data_dir)
    assert is_initialized(run.data_dir)
    assert mode(run.data_dir / ".initialized") == 0o600

    second = await run()
    assert second == FirstRunReport(first.worker_id, first.model, False, None)
    assert len(run.benchmarked) == 1
    assert len(server.requests) == 1


async def test_an_interrupted_download_goes_on(run: Run, server: FileServer) -> None:
    server.script = [Cut(300_000), 404]
    with pytest.raises(ModelSourceError):
        await run()
    assert not is_initialized(run.data_dir)
    assert run.benchmarked == []
    identity = worker_id(run.data_dir)
    (partial,) = (run.data_dir / "models").glob("*.partial")
    have = partial.stat().st_size
    assert have > 0
    server.script = []
    server.requests.clear()
    report = await run()
    assert (report.was_first, report.worker_id) == (True, identity)
    assert [request["Range"] for request in server.requests] == [f"bytes={have}-"]
    assert len(run.benchmarked) == 1


async def test_a_failed_benchmark_is_repeated_without_a_download(
    run: Run, server: FileServer
) -> None:
    run.benchmark_fails = True
    with pytest.raises(RuntimeError, match="interrupted"):
        await run()
    assert not is_initialized(run.data_dir)
    run.benchmark_fails = False
    assert (await run()).was_first
    assert len(server.requests) == 1


async def test_the_wrong_model_is_not_benchmarked(run: Run, server: FileServer) -> None:
    server.content = server.content[:-1] + b"!"
    with pytest.raises(ModelChecksumMismatch):
        await run()
    assert run.benchmarked == []
    assert not is_initialized(run.data_dir)
    assert not list((run.data_dir / "models").glob("*.gguf"))


async def test_a_model_that_was_lost_is_fetched_again(run: Run, server: FileServer) -> None:
    first = await run()
    assert first.model is not None
    first.model.path.unlink()
    again = await run()
    assert again.model == first.model
    assert not again.was_first
    assert len(server.requests) == 2
    assert len(run.benchmarked) == 1


async def test_a_model_that_its_owner_does_not_use_may_be_removed(
    run: Run, server: FileServer
) -> None:
    await run()
    open_store(run.settings).remove("benchmark")
    run.overrides["worker.model"] = "another"
    assert (await run()).model is None
    assert len(server.requests) == 1


async def test_an_identity_from_the_settings(run: Run) -> None:
    run.overrides["worker.id"] = "8a7d9f3e-1c1f-4a7b-9a56-0f2d8c1b2a3d"
    assert (await run()).worker_id == run.overrides["worker.id"]
    assert not (run.data_dir / "worker_id").exists()


async def test_progress_is_for_terminals(run: Run, tmp_path: Path, server: FileServer) -> None:
    await run()
    assert run.output.getvalue() == ""
    seen = Run(tmp_path / "other", server.url, server.content)
    seen.terminal = True
    await seen()
    assert "the benchmark model" in seen.output.getvalue()
    assert "MB" in seen.output.getvalue() or "kB" in seen.output.getvalue()


async def test_a_marker_that_cannot_be_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("ai4all.first_run.write_atomically", full)
    with pytest.raises(DataDirectoryError, match="the disk is full"):
        await run()
    assert not is_initialized(run.data_dir)
