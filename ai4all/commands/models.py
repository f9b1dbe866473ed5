"""``ai4all-native models``: list, pull, verify, release and remove."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from rich.table import Table

from ai4all.backend import registry
from ai4all.backend.base import Capabilities
from ai4all.backend.quarantine import QUARANTINE_FILE, Quarantine
from ai4all.commands.environment import (
    log_to_terminal,
    print_json,
    read_settings,
    stderr_console,
    stdout_console,
)
from ai4all.commands.memory import MemoryAsked
from ai4all.errors import (
    ComputeError,
    EngineUnavailable,
    InvalidModelFile,
    ModelChecksumMismatch,
    ModelNotFound,
)
from ai4all.first_run import open_store
from ai4all.models.files import disk_error
from ai4all.models.progress import show_download
from ai4all.models.store import ModelStore
from ai4all.types.model import ModelFile

__all__ = ["list_models", "pull_model", "remove_model", "unquarantine_model", "verify_models"]

_MIB = 1024 * 1024


def list_models(config: Path | None, data_dir: Path | None, *, as_json: bool) -> None:
    """Print what is kept, by id; as JSON also the memory that each would take, in bytes."""
    settings = read_settings(config, data_dir)
    log_to_terminal(settings)
    store = open_store(settings)
    stored, here = store.stored(), {model.model_id: model for model in store.list()}
    if as_json:
        memory = MemoryAsked(settings, _capabilities(), here.values())
        print_json(
            {
                "models": [
                    {
                        "model_id": model_id,
                        **row.model_dump(),
                        "present": model_id in here,
                        "memory": _memory(memory, here.get(model_id)),
                    }
                    for model_id, row in stored.items()
                ]
            }
        )
        return
    console = stdout_console()
    if not stored:
        console.print("no models here; `ai4all-native models pull ID SOURCE` fetches one")
        return
    table = Table()
    for heading in ("id", "size", "sha256", "source", "added"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "size" else "left")
    for model_id, row in stored.items():
        size = f"{row.size_bytes / _MIB:.1f} MiB" if model_id in here else "missing"
        table.add_row(model_id, size, row.sha256[:16], row.source, row.added)
    console.print(table)


def _memory(memory: MemoryAsked, model: ModelFile | None) -> dict[str, Any] | None:
    try:
        plan = memory.plan_for(model) if model is not None else None
    except ComputeError as error:
        return {"problem": str(error)}
    if plan is None:
        return None
    return {**plan.estimate.to_dict(), "device_label": plan.label, "gpu_layers": plan.n_layers}


def _capabilities() -> Capabilities | None:
    try:
        return registry.capabilities()
    except EngineUnavailable:
        return None


def pull_model(
    config: Path | None,
    data_dir: Path | None,
    model_id: str,
    source: str,
    sha256: str | None,
    *,
    as_json: bool,
) -> None:
    """Fetch a model from ``source`` and keep it as ``model_id``.

    Raises:
        ModelError: It cannot be had, or is not what was expected.
        DataDirectoryError: It cannot be kept.
    """
    store = _open_store(config, data_dir)
    with show_download(stderr_console(), f"model {model_id}") as progress:
        model = asyncio.run(store.add(model_id, source, sha256=sha256, progress=progress))
    _print_model(model, "kept", as_json=as_json)


def verify_models(
    config: Path | None, data_dir: Path | None, model_id: str | None, *, as_json: bool
) -> int:
    """Hash one model, or all; returns the exit status: 1 when one is not what it was.

    Raises:
        ModelNotFound: ``model_id`` is not here.
    """
    store = _open_store(config, data_dir)
    if model_id is not None and model_id not in store.stored():
        raise ModelNotFound(model_id)
    ids = [model_id] if model_id is not None else list(store.stored())
    rows = [asyncio.run(_verify(store, each)) for each in ids]
    if as_json:
        print_json({"models": rows})
    else:
        console = stdout_console()
        for row in rows:
            line = f"{row['model_id']}: {row['problem'] or 'as it was'}"
            console.print(line, markup=False, soft_wrap=True)
        if not rows:
            console.print("no models here")
    return 1 if any(row["problem"] for row in rows) else 0


def remove_model(
    config: Path | None, data_dir: Path | None, model_id: str, *, as_json: bool
) -> None:
    """Forget a model and delete its file.

    Raises:
        ModelNotFound: It is not here.
        DataDirectoryError: It cannot be deleted.
    """
    _open_store(config, data_dir).remove(model_id)
    if as_json:
        print_json({"removed": model_id})
    else:
        stdout_console().print(f"removed {model_id}", markup=False)


def unquarantine_model(
    config: Path | None, data_dir: Path | None, model_id: str, *, as_json: bool
) -> None:
    """Forget the deaths of the engine that are held against a model.

    Raises:
        ModelNotFound: It is neither here nor quarantined.
        DataDirectoryError: That could not be kept.
    """
    settings = read_settings(config, data_dir)
    log_to_terminal(settings)
    stored = open_store(settings).stored()
    quarantine = Quarantine(settings.data_dir / QUARANTINE_FILE)
    digests = {held.model_sha256 for held in quarantine.held() if held.model_id == model_id}
    if model_id in stored:
        digests.add(stored[model_id].sha256)
    if not digests:
        raise ModelNotFound(model_id)
    try:
        lifted = sum(quarantine.lift(digest) for digest in digests)
    except OSError as error:
        raise disk_error(settings.data_dir / QUARANTINE_FILE, error) from error
    if as_json:
        print_json({"model_id": model_id, "lifted": lifted})
    else:
        line = "may be loaded again" if lifted else "was not quarantined"
        stdout_console().print(f"{model_id} {line}", markup=False)


def _open_store(config: Path | None, data_dir: Path | None) -> ModelStore:
    settings = read_settings(config, data_dir)
    log_to_terminal(settings)
    return open_store(settings)


async def _verify(store: ModelStore, model_id: str) -> dict[str, Any]:
    problem = None
    with show_download(stderr_console(), f"model {model_id}") as progress:
        try:
            await store.verify(model_id, progress)
        except ModelNotFound:
            problem = "its file is missing"
        except (ModelChecksumMismatch, InvalidModelFile) as error:
            problem = str(error)
    return {"model_id": model_id, "ok": problem is None, "problem": problem}


def _print_model(model: ModelFile, verb: str, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "model_id": model.model_id,
                "path": str(model.path),
                "sha256": model.sha256,
                "size_bytes": model.size_bytes,
            }
        )
        return
    line = f"{verb} {model.model_id}: {model.size_bytes / _MIB:.1f} MiB, sha256 {model.sha256}"
    stdout_console().print(line, markup=False, soft_wrap=True)
