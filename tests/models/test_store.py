from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import ujson
from tiny_gguf import write_tiny_gguf

from ai4all.errors import (
    DataDirectoryError,
    InvalidModelFile,
    ModelChecksumMismatch,
    ModelNotFound,
    ModelSourceError,
)
from ai4all.models import store as store_module
from ai4all.models.store import ModelStore


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def backdate(path: Path, seconds: int = 10) -> None:
    """Make a file look settled, as it is when it was written a while ago."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - seconds * 10**9))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(data_dir: Path) -> ModelStore:
    return ModelStore(data_dir, disk_reserve_bytes=0)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read to be hashed."""
    paths: list[Path] = []
    real = store_module.hash_file

    def recording(path: Path, *rest: object) -> str:
        paths.append(path)
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(store_module, "hash_file", recording)
    # A change time cannot be set back, so files count as settled at once.
    monkeypatch.setattr(store_module, "_TOO_FRESH_NS", -1)
    return paths


async def test_a_model_is_kept_under_its_content_and_found_by_its_id(
    store: ModelStore, tiny_model: Path, data_dir: Path
) -> None:
    added = await store.add("benchmark", f"file:{tiny_model}", sha256=digest(tiny_model).upper())
    assert added.path == data_dir / "models" / f"{digest(tiny_model)}.gguf"
    assert added.size_bytes == tiny_model.stat().st_size
    assert store.get("benchmark") == added
    assert store.list() == [added]
    row = store.stored()["benchmark"]
    assert (row.sha256, row.source) == (added.sha256, f"file:{tiny_model}")
    assert store.header(added).architecture == "llama"
    # Another process sees the same.
    assert ModelStore(data_dir).get("benchmark") == added


async def test_nothing_is_readable_by_others(
    store: ModelStore, tiny_model: Path, data_dir: Path
) -> None:
    await store.add("m", f"file:{tiny_model}")
    for path in [data_dir, *data_dir.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_an_empty_store(store: ModelStore, data_dir: Path) -> None:
    assert store.list() == []
    with pytest.raises(ModelNotFound, match="'benchmark'"):
        store.get("benchmark")
    with pytest.raises(ModelNotFound):
        store.remove("benchmark")
    assert not (data_dir / "models" / "index.json").exists()


async def test_a_second_add_does_not_fetch_again(
    store: ModelStore, tiny_model: Path, tmp_path: Path
) -> None:
    original = tmp_path / "m.gguf"
    original.write_bytes(tiny_model.read_bytes())
    first = await store.add("m", f"file:{original}", sha256=digest(original))
    original.unlink()
    assert await store.add("m", f"file:{original}", sha256=first.sha256) == first
    # The same content under another id is the same file.
    other = await store.add("n", f"file:{original}", sha256=first.sha256)
    assert other.path == first.path
    assert [model.model_id for model in store.list()] == ["m", "n"]
    with pytest.raises(ModelSourceError):
        await store.add("n", f"file:{original}")


async def test_an_id_can_change_its_content(
    store: ModelStore, tmp_path: Path, data_dir: Path
) -> None:
    one = write_tiny_gguf(tmp_path / "one.gguf", seed=1)
    two = write_tiny_gguf(tmp_path / "two.gguf", seed=2)
    first = await store.add("m", f"file:{one}")
    await store.add("other", f"file:{one}")
    second = await store.add("m", f"file:{two}")
    assert store.get("m") == second
    assert first.path.exists()  # "other" has it still
    store.remove("other")
    assert not first.path.exists()
    assert [path.name for path in (data_dir / "models").glob("*.gguf")] == [second.path.name]
    store.remove("m")
    assert store.list() == []
    assert not second.path.exists()


async def test_the_wrong_content_never_gets_a_name(
    store: ModelStore, tiny_model: Path, data_dir: Path
) -> None:
    with pytest.raises(ModelChecksumMismatch):
        await store.add("m", f"file:{tiny_model}", sha256="0" * 64)
    with pytest.raises(ModelSourceError, match="expected 5"):
        await store.add("m", f"file:{tiny_model}", size_bytes=5)
    with pytest.raises(ModelSourceError, match="64 hexadecimal"):
        await store.add("m", f"file:{tiny_model}", sha256="xyz")
    assert list((data_dir / "models").glob("[!.]*")) == []


async def test_a_file_that_is_no_model_is_refused_by_its_source(
    store: ModelStore, tmp_path: Path, data_dir: Path
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InvalidModelFile, match=f"file:{bad}"):
        await store.add("m", f"file:{bad}")
    assert list((data_dir / "models").glob("[!.]*")) == []


async def test_only_allowed_sources(data_dir: Path, tiny_model: Path) -> None:
    store = ModelStore(data_dir, allowed_sources=["pypi:", "https://models.example.org/"])
    for source in (f"file:{tiny_model}", "https://models.example.org.evil.net/m"):
        with pytest.raises(ModelSourceError, match="not an allowed source"):
            await store.add("m", source)


@pytest.mark.parametrize("flip", range(12))
async def test_a_changed_file_is_refused(store: ModelStore, tiny_model: Path, flip: int) -> None:
    model = await store.add("m", f"file:{tiny_model}")
    chance = random.Random(flip)
    with model.path.open("r+b") as file:
        at = chance.randrange(model.size_bytes)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << chance.randrange(8))]))
    with pytest.raises(ModelChecksumMismatch, match="model m"):
        store.get("m")
    # Pulling it again heals it.
    healed = await store.add("m", f"file:{tiny_model}", sha256=model.sha256)
    assert store.get("m") == healed
    assert healed.path.read_bytes() == tiny_model.read_bytes()


async def test_a_truncated_or_absent_file(store: ModelStore, tiny_model: Path) -> None:
    model = await store.add("m", f"file:{tiny_model}")
    os.truncate(model.path, 1000)
    with pytest.raises(ModelChecksumMismatch):
        store.get("m")
    model.path.unlink()
    with pytest.raises(ModelNotFound):
        store.get("m")
    assert store.list() == []


async def test_an_untouched_file_is_hashed_once(
    store: ModelStore, tiny_model: Path, hashed: list[Path], data_dir: Path
) -> None:
    model = await store.add("m", f"file:{tiny_model}")
    for _ in range(3):
        store.get("m")
    ModelStore(data_dir).get("m")
    assert hashed == [model.path]
    backdate(model.path)
    store.get("m")
    assert hashed == [model.path] * 2


async def test_a_file_replaced_by_one_of_equal_size_and_time_is_hashed(
    store: ModelStore, tiny_model: Path, tmp_path: Path, hashed: list[Path]
) -> None:
    model = await store.add("m", f"file:{tiny_model}")
    store.get("m")
    status = model.path.stat()
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=9)
    assert other.stat().st_size == status.st_size
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(model.path)
    with pytest.raises(ModelChecksumMismatch):
        store.get("m")


async def test_a_hash_of_a_file_touched_just_now_is_not_trusted_later(
    store: ModelStore, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_TOO_FRESH_NS", 10**18)
    model = await store.add("m", f"file:{tiny_model}")
    store.get("m")
    status = model.path.stat()
    with model.path.open("r+b") as file:
        file.write(b"gguf")
    os.utime(model.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ModelChecksumMismatch):
        store.get("m")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"x": 1}', b"{not json", b'{"/x": {"sha256": 5}}', b"\xff" * 10]
)
async def test_a_damaged_hash_cache_costs_a_hash_and_nothing_else(
    store: ModelStore, tiny_model: Path, data_dir: Path, content: bytes
) -> None:
    model = await store.add("m", f"file:{tiny_model}")
    (data_dir / "cache" / "hashes.json").write_bytes(content)
    assert store.get("m") == model


async def test_verify_reads_the_file_whatever_is_known(
    store: ModelStore, tiny_model: Path, hashed: list[Path]
) -> None:
    model = await store.add("m", f"file:{tiny_model}")
    store.get("m")
    hashed.clear()
    assert await store.verify("m") == model
    assert hashed == [model.path]
    model.path.write_bytes(b"x" * model.size_bytes)
    with pytest.raises(ModelChecksumMismatch):
        await store.verify("m")
    model.path.unlink()
    with pytest.raises(ModelNotFound):
        await store.verify("m")


async def test_resolve_finds_ids_before_files(
    store: ModelStore, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    added = await store.add("m", f"file:{tiny_model}")
    (tmp_path / "m").write_bytes(b"not looked at")
    assert await store.resolve("m") == added


async def test_a_file_is_used_where_it_lies(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path
) -> None:
    path = write_tiny_gguf(tmp_path / "my model.gguf", seed=5)
    monkeypatch.chdir(tmp_path)
    for text in (str(path), "my model.gguf", "./my model.gguf"):
        model = await store.resolve(text)
        assert (model.model_id, model.path, model.sha256) == ("my model", path, digest(path))
    assert store.get("my model") == model
    assert store.list() == [model]
    assert ModelStore(data_dir).list() == []
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ModelChecksumMismatch):
        store.get("my model")


async def test_what_resolve_refuses(store: ModelStore, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"hello")
    with pytest.raises(InvalidModelFile):
        await store.resolve(str(bad))
    with pytest.raises(InvalidModelFile):
        await store.resolve(str(tmp_path))
    for text in ("absent", "./absent.gguf", "", "a\0b", "~nobody-of-this-name/x", "x" * 5000):
        with pytest.raises((ModelNotFound, InvalidModelFile)):
            await store.resolve(text)


HOSTILE_IDS = [
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:\\x",
    "CON",
    "~",
    "~root",
    "$HOME",
    "%2e%2e%2f",
    "．．／",
    "․․/x",
    "index.json",
    ".index.lock",
    "-rf",
    "{}",
    '"',
    "x" * 256,
    "模型",
    "__proto__",
]


async def test_hostile_ids_are_data(
    store: ModelStore, tiny_model: Path, data_dir: Path, tmp_path: Path
) -> None:
    before = {path for path in tmp_path.rglob("*") if data_dir not in path.parents}
    for model_id in HOSTILE_IDS:
        model = await store.add(model_id, f"file:{tiny_model}", sha256=digest(tiny_model))
        assert model.path.parent == data_dir / "models"
        assert store.get(model_id) == model
    assert len(store.list()) == len(HOSTILE_IDS)
    assert len(list((data_dir / "models").glob("*.gguf"))) == 1
    for model_id in HOSTILE_IDS:
        store.remove(model_id)
    assert list((data_dir / "models").glob("*.gguf")) == []
    after = {path for path in tmp_path.rglob("*") if data_dir not in path.parents}
    assert after - before <= {data_dir}


@pytest.mark.parametrize(
    "model_id", ["", "x" * 257, "a\0b", "a\nb", "\x1b[31m", "\ud800", "\u202e"]
)
async def test_ids_that_cannot_be_shown_are_refused(
    store: ModelStore, tiny_model: Path, model_id: str
) -> None:
    with pytest.raises(ModelSourceError, match="not a model id"):
        await store.add(model_id, f"file:{tiny_model}")
    with pytest.raises(ModelNotFound):
        store.get(model_id)


def test_the_error_for_an_endless_id_is_short(store: ModelStore) -> None:
    with pytest.raises(ModelNotFound) as caught:
        store.get("x" * 1_000_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[1]",
        "{broken",
        '{"version": 2, "models": {}}',
        '{"version": 1, "models": {"m": {}}}',
    ],
)
async def test_a_damaged_index_is_named(
    store: ModelStore, tiny_model: Path, data_dir: Path, content: str
) -> None:
    await store.add("m", f"file:{tiny_model}")
    (data_dir / "models" / "index.json").write_text(content)
    for act in (store.list, lambda: store.get("m"), lambda: store.remove("m")):
        with pytest.raises(DataDirectoryError, match=r"index\.json: is damaged"):
            act()


async def test_an_index_cannot_lead_out_of_the_directory(
    store: ModelStore, tiny_model: Path, data_dir: Path, tmp_path: Path
) -> None:
    await store.add("m", f"file:{tiny_model}")
    index = data_dir / "models" / "index.json"
    rows = ujson.loads(index.read_bytes())
    write_tiny_gguf(tmp_path / "outside.gguf")
    for name in ("../../outside", "/etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n"):
        rows["models"]["m"]["sha256"] = name
        index.write_text(ujson.dumps(rows))
        with pytest.raises(DataDirectoryError):
            store.get("m")


async def test_adds_at_the_same_time(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_LOCK_POLL", 0.01)
    paths = [write_tiny_gguf(tmp_path / f"{n}.gguf", seed=n) for n in range(6)]
    await asyncio.gather(
        *(
            ModelStore(data_dir, disk_reserve_bytes=0).add(f"m{n}", f"file:{path}")
            for n, path in enumerate([*paths, *paths])
        )
    )
    store = ModelStore(data_dir)
    assert len(store.list()) == 12
    for n, path in enumerate([*paths, *paths]):
        assert store.get(f"m{n}").sha256 == digest(path)


async def test_a_cancelled_add_leaves_the_store_as_it_was(
    store: ModelStore, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching = asyncio.Event()

    async def stuck(*args: object, **more: object) -> None:
        fetching.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "fetch", stuck)
        task = asyncio.create_task(store.add("m", f"file:{tiny_model}"))
        await fetching.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert store.list() == []
    # Its lock is free again.
    await store.add("m", f"file:{tiny_model}")


async def test_a_directory_that_cannot_be_written(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "data").write_text("a file")
    store = ModelStore(tmp_path / "data")
    with pytest.raises(DataDirectoryError):
        await store.add("m", f"file:{tiny_model}")


async def test_a_failed_write_keeps_the_old_index(
    store: ModelStore,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail_writes: Callable[[], None],
) -> None:
    added = await store.add("m", f"file:{tiny_model}")
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=3)
    with monkeypatch.context():
        fail_writes()
        with pytest.raises(DataDirectoryError, match="disk is full"):
            await store.add("n", f"file:{other}")
    assert store.list() == [added]


@pytest.fixture
def fail_writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def full(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    return lambda: monkeypatch.setattr(store_module, "write_atomically", full)
