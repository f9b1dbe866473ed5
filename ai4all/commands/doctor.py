"""``ai4all-native doctor``: what would keep this machine from working, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ai4all.backend import registry
from ai4all.backend.quarantine import QUARANTINE_FILE, Quarantine
from ai4all.benchmark.hardware import HardwareInfo
from ai4all.benchmark.store import BenchmarkStore
from ai4all.commands.environment import (
    print_json,
    read_settings,
    stdout_console,
)
from ai4all.commands.failure import EXIT_FAILURE
from ai4all.commands.memory import MemoryAsked
from ai4all.config import Settings
from ai4all.errors import Ai4allError, EngineUnavailable, OutOfMemory
from ai4all.first_run import is_initialized, open_store
from ai4all.models.memory import free_memory, require_memory

__all__ = ["Check", "examine", "print_checks", "report", "run_doctor"]

_MIB = 1024**2
_GIB = 1024**3
_COMFORTABLE_FREE_BYTES = 2 * _GIB
_COMFORTABLE_MEMORY_MB = 1024

_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Attributes:
        name: What was looked at.
        status: "ok", "warning" (works, but look at it) or "problem" (keeps the worker from
            working).
        detail: What was found, and for the latter two what to do.
    """

    name: str
    status: str
    detail: str


def examine(config_file: Path | None, data_dir: Path | None) -> Iterator[Check]:
    """Look at everything in turn. Changes nothing on the machine and opens no connection."""
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield from _engine()
    yield _memory()
    try:
        settings = read_settings(config_file, data_dir)
        settings.coordinator_token()
    except (Ai4allError, OSError) as error:
        yield Check("configuration", "problem", str(error))
        return
    yield Check("configuration", "ok", str(settings.config_file or "no file, defaults"))
    if settings.coordinator.url is None:
        yield Check("coordinator", "warning", "none set; give `worker` its --coordinator URL")
    else:
        yield Check("coordinator", "ok", settings.coordinator.url)
    yield from _data_directory(settings)


def _engine() -> Iterator[Check]:
    backends = registry.describe()
    for backend in backends:
        status = "ok" if backend.available else "problem"
        yield Check(f"backend {backend.name}", status, backend.reason or "can run here")
    if not any(backend.available for backend in backends):
        return
    yield Check("engine", "ok", str(registry.build_info()["engine_build"]))
    for target in registry.targets():
        # What is not built in is a choice; what is built in and finds no device is a surprise.
        status = "ok" if target.available or not target.built else "warning"
        yield Check(f"target {target.name}", status, target.reason or "built in, device here")


def _memory() -> Check:
    available = HardwareInfo.detect().memory_available_mb
    if available is None:
        return Check("memory", "warning", "this machine does not say how much is free")
    if available < _COMFORTABLE_MEMORY_MB:
        return Check("memory", "warning", f"{available} MiB free; close other programs")
    return Check("memory", "ok", f"{available} MiB free")


def _data_directory(settings: Settings) -> Iterator[Check]:
    folder = settings.data_dir
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        yield Check("data directory", "problem", f"{existing} is not a directory")
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Check("data directory", "problem", f"{existing} cannot be written; use --data-dir")
        return
    yield Check("data directory", "ok", str(folder))
    free = shutil.disk_usage(existing).free
    status = "ok" if free >= _COMFORTABLE_FREE_BYTES else "warning"
    yield Check("disk", status, f"{free / _GIB:.1f} GiB free")
    if not is_initialized(folder):
        yield Check("first run", "warning", "not done yet; `ai4all-native demo` does it")
        return
    yield Check("first run", "ok", "done")
    yield from _models(settings)
    for held in Quarantine(folder / QUARANTINE_FILE).held():
        how = f"`ai4all-native models unquarantine {held.model_id}` lifts that"
        detail = f"killed the engine again and again; quarantined until {held.until_text}; {how}"
        yield Check(f"model {held.model_id}", "warning", detail)
    try:
        latest = BenchmarkStore(folder).latest()
    except Ai4allError as error:
        yield Check("benchmark", "problem", str(error))
        return
    if latest is None:
        yield Check("benchmark", "warning", "none kept; run `ai4all-native benchmark`")
    else:
        speed = latest.scores.tokens_per_second
        yield Check("benchmark", "ok", f"{speed:.1f} tok/s with {latest.model}, {latest.timestamp}")


def _models(settings: Settings) -> Iterator[Check]:
    try:
        store = open_store(settings)
        memory, free = MemoryAsked(settings), free_memory()
        stored, here = store.stored(), {model.model_id: model for model in store.list()}
    except Ai4allError as error:
        yield Check("models", "problem", str(error))
        return
    for model_id in stored:
        if model_id not in here:
            yield Check(f"model {model_id}", "problem", "its file is missing; pull it again")
            continue
        try:
            store.header(here[model_id])
            size = here[model_id].path.stat().st_size
        except (Ai4allError, OSError) as error:
            yield Check(f"model {model_id}", "problem", str(error))
            continue
        if size != stored[model_id].size_bytes:
            yield Check(f"model {model_id}", "problem", "its size has changed; pull it again")
            continue
        estimate = memory.of(here[model_id])
        detail, status = f"{size / _MIB:.1f} MiB", "ok"
        if estimate is not None:
            detail += f"; takes {estimate.needed / _MIB:.0f} MiB of memory when loaded"
            limit = settings.engine.memory_limit_mb * _MIB or None
            try:
                require_memory(estimate, free, limit)
            except OutOfMemory as error:
                detail, status = str(error), "warning"
        yield Check(f"model {model_id}", status, detail)


def run_doctor(config: Path | None, data_dir: Path | None, *, as_json: bool) -> int:
    """Examine, print, and return the exit status: 0 healthy, 1 something is wrong."""
    checks = list(examine(config, data_dir))
    if as_json:
        print_json(report(checks))
    else:
        print_checks(checks, stdout_console())
    return 0 if _healthy(checks) else EXIT_FAILURE


def _healthy(checks: Sequence[Check]) -> bool:
    return all(check.status != "problem" for check in checks)


def report(checks: Sequence[Check]) -> dict[str, Any]:
    """The checks as ``--json`` prints them, with what the engine says about itself."""
    try:
        engine = registry.build_info()
    except EngineUnavailable:
        engine = None
    return {
        "healthy": _healthy(checks),
        "checks": [asdict(check) for check in checks],
        "engine": engine,
        "hardware": HardwareInfo.detect().model_dump(mode="json"),
    }


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Print the checks for a person."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for check in checks:
        table.add_row(_MARKS[check.status], escape(check.name), escape(check.detail))
    console.print(table)
