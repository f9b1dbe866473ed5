from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_gguf import Q8_0, write_tiny_gguf

from ai4all.errors import InvalidModelFile, ModelChecksumMismatch, ModelNotFound
from ai4all.models.fitted import FittedModels
from ai4all.models.store import ModelStore
from ai4all.types.model import ModelFile


@pytest.fixture
async def store(tiny_model: Path, tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "data", disk_reserve_bytes=0)
    await store.add("m", f"file:{tiny_model}")
    return store


def keep(store: ModelStore, seed: int = 0, type_name: str = "Q8_0") -> ModelFile:
    original = store.get("m")
    path = store.fitting_path(original, type_name)
    write_tiny_gguf(path, seed=seed, weight_type=Q8_0)
    return store.keep_fitted(f"m.fit-{type_name.lower()}", original, type_name)


def test_a_fitted_file_is_kept_beside_its_original(store: ModelStore) -> None:
    original = store.get("m")
    fitted = keep(store)
    assert store.get("m") == original
    assert store.get("m.fit-q8_0") == fitted
    assert fitted.sha256 != original.sha256
    row = store.stored()["m.fit-q8_0"]
    assert (row.fitted_from, row.source) == (original.sha256, "fit:Q8_0")
    assert not store.fitting_path(original, "Q8_0").exists()
    assert (fitted.path.stat().st_mode & 0o077) == 0


def test_it_is_used_only_where_the_owner_asked(store: ModelStore) -> None:
    original, fitted = store.get("m"), keep(store)
    models = FittedModels(store)
    assert models.get("m") == original
    store.prefer(original.sha256, fitted.sha256)
    used = models.get("m")
    # The id is that of the assignment; digest and path are those of what runs.
    assert (used.model_id, used.sha256, used.path) == ("m", fitted.sha256, fitted.path)
    assert {model.model_id: model.sha256 for model in models.list()} == {
        "m": fitted.sha256,
        "m.fit-q8_0": fitted.sha256,
    }
    store.prefer(original.sha256, None)
    assert models.get("m") == original


def test_all_of_them_can_be_used(store: ModelStore) -> None:
    original = store.get("m")
    everywhere = FittedModels(store, use_all=True)
    assert everywhere.get("m") == original
    first = keep(store)
    assert everywhere.get("m").sha256 == first.sha256
    other = keep(store, seed=1, type_name="Q4_0")
    store.prefer(original.sha256, first.sha256)
    assert everywhere.get("m").sha256 == first.sha256
    store.prefer(original.sha256, other.sha256)
    assert everywhere.get("m").sha256 == other.sha256


def test_removing_it_brings_the_original_back(store: ModelStore) -> None:
    original, fitted = store.get("m"), keep(store)
    store.prefer(original.sha256, fitted.sha256)
    store.remove("m.fit-q8_0")
    assert store.preferred() == {}
    assert FittedModels(store, use_all=True).get("m") == original
    assert not fitted.path.exists()


async def test_another_original_of_the_same_name_does_not_get_it(
    store: ModelStore, tmp_path: Path
) -> None:
    fitted = keep(store)
    store.prefer(store.get("m").sha256, fitted.sha256)
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=7)
    replaced = await store.add("m", f"file:{other}")
    assert FittedModels(store, use_all=True).get("m") == replaced


def test_a_changed_fitted_file_is_refused(store: ModelStore, tiny_model: Path) -> None:
    original, fitted = store.get("m"), keep(store)
    store.prefer(original.sha256, fitted.sha256)
    shutil.copyfile(tiny_model, fitted.path)
    with pytest.raises(ModelChecksumMismatch):
        FittedModels(store).get("m")


def test_what_is_no_model_is_not_kept(store: ModelStore) -> None:
    original = store.get("m")
    path = store.fitting_path(original, "Q8_0")
    path.write_bytes(b"rubbish")
    with pytest.raises(InvalidModelFile):
        store.keep_fitted("m.fit-q8_0", original, "Q8_0")
    assert not path.exists()
    assert list(store.stored()) == ["m"]


def test_an_unknown_model_stays_unknown(store: ModelStore) -> None:
    with pytest.raises(ModelNotFound):
        FittedModels(store, use_all=True).get("absent")
