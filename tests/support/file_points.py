"""What else is kept in the data directory: who the worker is, its models, what it measured."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ujson
from promises import Point, Tell, Told
from tiny_gguf import encode_gguf, tiny_metadata, tiny_tensors

from ai4all.backend.crash_records import CrashRecord, CrashRecords
from ai4all.backend.quarantine import QUARANTINE_FILE, Quarantine, Subject
from ai4all.benchmark.hardware import HardwareInfo
from ai4all.benchmark.scores import BenchmarkKey, BenchmarkResult, BenchmarkScores
from ai4all.benchmark.store import BenchmarkStore
from ai4all.benchmark.tuning_store import Trial, Tuning, TuningKey, TuningStore
from ai4all.data_dir_lock import hold_data_dir
from ai4all.first_run import prepare_data_dir, worker_id
from ai4all.models import store as model_store
from ai4all.models.files import hash_file, write_atomically
from ai4all.models.store import ModelStore

__all__ = ["FILE_POINTS"]


def identity_act(folder: Path, _state: Any, tell: Tell) -> None:
    """Make the worker's identity."""
    tell("identity", worker_id(folder))


def identity_check(folder: Path, _state: Any, told: Told) -> None:
    """There is one, or can be; one that was given out stays."""
    now = worker_id(folder)
    assert told.of("identity") in ([], [now]), "the identity has changed"
    assert worker_id(folder) == now


def directory_act(folder: Path, _state: Any, tell: Tell) -> None:
    """Make the data directory, and be alone in it."""
    prepare_data_dir(folder / "data")
    with hold_data_dir(folder / "data", "worker"):
        tell("held", "data")


def directory_check(folder: Path, _state: Any, _told: Told) -> None:
    """The next start has it."""
    prepare_data_dir(folder / "data")
    with hold_data_dir(folder / "data", "worker"):
        pass


def marker_act(folder: Path, _state: Any, tell: Tell) -> None:
    """Mark the first run as done."""
    write_atomically(folder / ".initialized", b"2026-01-01T00:00:00+00:00\n")
    tell("marked", "done")


def marker_check(folder: Path, _state: Any, told: Told) -> None:
    """The mark is whole or absent."""
    file = folder / ".initialized"
    assert not file.exists() or file.read_text() == "2026-01-01T00:00:00+00:00\n"
    assert file.exists() or not told.of("marked"), "the mark is lost"


@dataclass
class ModelFiles:
    """Two models to fetch, outside the directory that fails."""

    first: Path
    second: Path

    @property
    def digests(self) -> dict[str, str]:
        """By id."""
        return {"first": hash_file(self.first), "second": hash_file(self.second)}


def store_of(folder: Path) -> ModelStore:
    """The model store below ``folder``."""
    return ModelStore(folder / "data", disk_reserve_bytes=0)


def a_model(folder: Path, rng: random.Random) -> ModelFiles:
    """One model is here, another is to be fetched."""
    outside = folder.with_name(folder.name + "-models")
    outside.mkdir(exist_ok=True)
    files = ModelFiles(outside / "first.gguf", outside / "second.gguf")
    for file in (files.first, files.second):
        name = {"general.name": ("str", f"{file.stem} {rng.random()}")}
        file.write_bytes(encode_gguf(tiny_metadata() | name, tiny_tensors()))
    asyncio.run(store_of(folder).add("first", f"file:{files.first}"))
    return files


def add_model_act(folder: Path, files: ModelFiles, tell: Tell) -> None:
    """Fetch a model, and give it its final name."""
    asyncio.run(store_of(folder).add("second", f"file:{files.second}"))
    tell("added", "second")


def replace_model_act(folder: Path, files: ModelFiles, tell: Tell) -> None:
    """Fetch another model under a name that is taken."""
    asyncio.run(store_of(folder).add("first", f"file:{files.second}"))
    tell("replaced", "first")


def remove_model_act(folder: Path, _files: ModelFiles, tell: Tell) -> None:
    """Forget a model and delete its file."""
    tell("removing", "first")
    store_of(folder).remove("first")
    tell("removed", "first")


def models_check(folder: Path, files: ModelFiles, told: Told) -> None:
    """What has a final name has the bytes of that name; what was there still is, or can be had."""
    store = store_of(folder)
    for path in (folder / "data" / "models").glob("*.gguf"):
        assert hash_file(path) == path.stem, "a file under a final name is not what it says"
    digests = files.digests
    for model in store.list():
        assert store.get(model.model_id).sha256 in digests.values()
    first = store.stored().get("first")
    if not told.of("removing"):
        assert first is not None, "a model is lost"
        replaced = told.of("replaced") and first.sha256 != digests["second"]
        assert not replaced, "a model that was replaced is back"
    assert first is None or not told.of("removed"), "a model that was removed is back"
    if told.of("added"):
        assert store.get("second").sha256 == digests["second"], "a model is lost"
    for model_id, path in (("first", files.first), ("second", files.second)):
        asyncio.run(store.add(model_id, f"file:{path}"))
        assert store.get(model_id).sha256 == digests[model_id]


def benchmark_result(composite: float) -> BenchmarkResult:
    """A run of the benchmark."""
    return BenchmarkResult(
        timestamp="2026-01-01T00:00:00.000Z",
        backend="cpu",
        model="benchmark",
        scores=BenchmarkScores(
            tokens_per_second=1.5,
            time_to_first_token_ms=2.25,
            memory_efficiency=0.1,
            composite=composite,
        ),
        memory_mb=1,
        prompts=[],
        key=BenchmarkKey(model_sha256="ab" * 32, engine_build="x", device="CPU", threads=2),
        hardware=HardwareInfo(),
    )


def benchmarks(folder: Path, _rng: random.Random) -> list[float]:
    """Two runs are kept."""
    for composite in (0.25, 0.5):
        BenchmarkStore(folder).save(benchmark_result(composite))
    return [0.25, 0.5]


def benchmark_act(folder: Path, _state: list[float], tell: Tell) -> None:
    """Keep a third."""
    BenchmarkStore(folder).save(benchmark_result(0.75))
    tell("saved", "0.75")


def benchmark_check(folder: Path, before: list[float], told: Told) -> None:
    """The history has what it had; the latest is one of it."""
    store = BenchmarkStore(folder)
    history = [result.scores.composite for result in store.history()]
    latest = store.latest()
    assert history[:2] == before, "runs are lost"
    assert history[2:] in ([], [0.75])
    assert history[2:] or not told.of("saved"), "a run is lost"
    assert latest is not None
    assert latest.scores.composite in history
    assert not list(folder.rglob("*.corrupt-*"))


def tuning(model_sha256: str) -> Tuning:
    """A way to run a model."""
    way = {"threads": 2, "threads_batch": 2, "ubatch": 512, "flash_attention": "auto"}
    return Tuning(
        key=TuningKey(model_sha256=model_sha256, engine_build="x", device="CPU", usable_cores=2.0),
        timestamp="2026-01-01T00:00:00.000Z",
        seconds=1.0,
        is_complete=True,
        other_load=0.0,
        trials=[Trial(**way)],  # type: ignore[arg-type]
        **way,  # type: ignore[arg-type]
    )


def tunings(folder: Path, _rng: random.Random) -> str:
    """One is kept."""
    TuningStore(folder).save(tuning("a" * 64))
    return "a" * 64


def tuning_act(folder: Path, _state: str, tell: Tell) -> None:
    """Keep another."""
    TuningStore(folder).save(tuning("b" * 64))
    tell("saved", "b")


def tuning_check(folder: Path, before: str, told: Told) -> None:
    """The one from before is there, and the new one if it was promised."""
    kept = [each.key.model_sha256 for each in TuningStore(folder).all()]
    assert kept[:1] == [before], "a tuning is lost"
    assert kept[1:] in ([], ["b" * 64])
    assert kept[1:] or not told.of("saved"), "a tuning is lost"


SUBJECT = Subject("model", "c" * 64, "x", {"n_ctx": 512})


def two_deaths(folder: Path, _rng: random.Random) -> None:
    """Two deaths are counted, one less than is borne."""
    quarantine = Quarantine(folder / QUARANTINE_FILE)
    for _ in range(2):
        quarantine.record_death(SUBJECT)


def quarantine_act(folder: Path, _state: None, tell: Tell) -> None:
    """Count the third."""
    Quarantine(folder / QUARANTINE_FILE).record_death(SUBJECT)
    tell("counted", "third")


def quarantine_check(folder: Path, _state: None, told: Told) -> None:
    """The first two are counted still: with one more at most the model is held."""
    quarantine = Quarantine(folder / QUARANTINE_FILE)
    held = bool(quarantine.held())
    assert held or not told.of("counted"), "a quarantine is lost"
    assert held or quarantine.record_death(SUBJECT), "deaths are lost"


def crash_record(number: int) -> CrashRecord:
    """A death."""
    return CrashRecord(
        time=f"2026-01-01T00:00:{number:02}+00:00",
        kind="crashed",
        state="decode",
        signal="SIGSEGV",
        exit_status=None,
        assertion=None,
        fault=None,
        problem=None,
        model_sha256=None,
        engine_build="x",
        options=None,
        seconds=None,
        process_id=number,
    )


def crash_records(folder: Path, _rng: random.Random) -> int:
    """As many as are kept."""
    for number in range(3):
        CrashRecords(folder / "crashes", keep=3).add(crash_record(number))
    return 3


def crash_record_act(folder: Path, _state: int, tell: Tell) -> None:
    """Keep one more, and drop the oldest."""
    CrashRecords(folder / "crashes", keep=3).add(crash_record(3))
    tell("kept", "3")


def crash_record_check(folder: Path, before: int, told: Told) -> None:
    """Each record is whole, and there are as many as there were, or one more."""
    records = sorted((folder / "crashes").glob("crash-*.json"))
    numbers = [ujson.loads(path.read_bytes())["process_id"] for path in records]
    assert numbers in ([0, 1, 2], [0, 1, 2, 3], [1, 2, 3])
    assert 3 in numbers or not told.of("kept"), "a record is lost"


def hash_cache_act(folder: Path, _files: ModelFiles, tell: Tell) -> None:
    """Look at a model again, and remember its hash."""
    # A hash of a file that was written a moment ago is not remembered; a clock that moved is cheap.
    model_store._TOO_FRESH_NS = -1
    (folder / "data" / "cache" / "hashes.json").unlink(missing_ok=True)
    store_of(folder).get("first")
    tell("looked", "first")


FILE_POINTS = (
    Point("the data directory is made", lambda *_: None, directory_act, directory_check),
    Point("the identity is made", lambda *_: None, identity_act, identity_check),
    Point("the first run is marked", lambda *_: None, marker_act, marker_check),
    Point("a model is fetched", a_model, add_model_act, models_check),
    Point("a model is replaced", a_model, replace_model_act, models_check),
    Point("a model is removed", a_model, remove_model_act, models_check),
    Point("a hash is remembered", a_model, hash_cache_act, models_check),
    Point("a benchmark is kept", benchmarks, benchmark_act, benchmark_check),
    Point("a tuning is kept", tunings, tuning_act, tuning_check),
    Point("a death is counted", two_deaths, quarantine_act, quarantine_check),
    Point("a crash is recorded", crash_records, crash_record_act, crash_record_check),
)
