"""``ai4all-native doctor``: what would keep this machine from working, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ai4all.backend import registry
from ai4all.backend.base import Capabilities, EngineOptions
from ai4all.backend.quarantine import QUARANTINE_FILE, Quarantine
from ai4all.benchmark.hardware import HardwareInfo
from ai4all.benchmark.store import BenchmarkStore
from ai4all.commands.check import Check
from ai4all.commands.doctor_devices import DeviceReport
from ai4all.commands.environment import (
    log_to_terminal,
    print_json,
    read_settings,
    stdout_console,
)
from ai4all.commands.failure import EXIT_FAILURE
from ai4all.commands.memory import MemoryAsked
from ai4all.config import Settings
from ai4all.errors import Ai4allError, DeviceUnavailable, OutOfMemory
from ai4all.first_run import is_initialized, open_store
from ai4all.models.memory import free_memory, require_memory

__all__ = ["Check", "Doctor", "print_checks", "report", "run_doctor"]

_MIB = 1024**2
_GIB = 1024**3
_COMFORTABLE_FREE_BYTES = 2 * _GIB
_COMFORTABLE_MEMORY_MB = 1024

_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}


class Doctor:
    """Looks at everything in turn. Changes nothing on the machine and opens no connection.

    Args:
        config_file: What ``--config`` says.
        data_dir: What ``--data-dir`` says.

    Attributes:
        capabilities: What the engine said of itself; None when it could not be asked.
        devices: What there is to compute on; None likewise.
    """

    def __init__(self, config_file: Path | None, data_dir: Path | None) -> None:
        self._config_file = config_file
        self._data_dir = data_dir
        self.capabilities: Capabilities | None = None
        self.devices: DeviceReport | None = None

    def examine(self) -> Iterator[Check]:
        """One check after the other."""
        settings, problem = self._settings()
        # What is logged on the way is not part of the report.
        log_to_terminal(settings)
        yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
        yield from self._engine()
        yield from self._devices(settings.engine_options())
        yield _memory()
        if problem is not None:
            yield Check("configuration", "problem", problem)
            return
        yield Check("configuration", "ok", str(settings.config_file or "no file, defaults"))
        if settings.coordinator.url is None:
            yield Check("coordinator", "warning", "none set; give `worker` its --coordinator URL")
        else:
            yield Check("coordinator", "ok", settings.coordinator.url)
        yield from _data_directory(settings, self.capabilities)

    def _settings(self) -> tuple[Settings, str | None]:
        """The owner's settings; the defaults where they are wrong, and what is."""
        try:
            settings = read_settings(self._config_file, self._data_dir)
            settings.coordinator_token()
        except (Ai4allError, OSError) as error:
            return Settings(), str(error)
        return settings, None

    def _engine(self) -> Iterator[Check]:
        backends = registry.describe()
        for backend in backends:
            status = "ok" if backend.available else "problem"
            yield Check(f"backend {backend.name}", status, backend.reason or "can run here")
        if not any(backend.available for backend in backends):
            return
        try:
            # Not in this process: a driver may hang, or end whoever asks it.
            self.capabilities = registry.ask_capabilities()
        except Ai4allError as error:
            yield Check("engine", "problem", f"it could not be asked for its devices: {error}")
            return
        yield Check("engine", "ok", self.capabilities.engine_build)
        for target in registry.targets(self.capabilities):
            # What is not built in is a choice; what is built in and finds no device, a surprise.
            status = "ok" if target.available or not target.built else "warning"
            yield Check(f"target {target.name}", status, target.reason or "built in, device here")

    def _devices(self, options: EngineOptions) -> Iterator[Check]:
        if self.capabilities is not None:
            self.devices = DeviceReport(self.capabilities, options)
            yield from self.devices.checks()


def _memory() -> Check:
    available = HardwareInfo.detect().memory_available_mb
    if available is None:
        return Check("memory", "warning", "this machine does not say how much is free")
    if available < _COMFORTABLE_MEMORY_MB:
        return Check("memory", "warning", f"{available} MiB free; close other programs")
    return Check("memory", "ok", f"{available} MiB free")


def _data_directory(settings: Settings, capabilities: Capabilities | None) -> Iterator[Check]:
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
    yield from _models(settings, capabilities)
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


def _models(settings: Settings, capabilities: Capabilities | None) -> Iterator[Check]:
    try:
        store = open_store(settings)
        stored, here = store.stored(), {model.model_id: model for model in store.list()}
        memory, free = MemoryAsked(settings, capabilities, here.values()), free_memory()
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
        detail, status = f"{size / _MIB:.1f} MiB", "ok"
        limit = settings.engine.memory_limit_mb * _MIB or None
        try:
            plan = memory.plan_for(here[model_id])
            if plan is not None:
                detail += f"; takes {plan.estimate.needed / _MIB:.0f} MiB of memory when loaded"
                if plan.choice.gpus:
                    detail += f"; {plan}"
                    status = "warning" if plan.limited_by else "ok"
                require_memory(plan.estimate, free, limit)
        except (OutOfMemory, DeviceUnavailable) as error:
            detail, status = str(error), "warning"
        yield Check(f"model {model_id}", status, detail)


def run_doctor(config: Path | None, data_dir: Path | None, *, as_json: bool) -> int:
    """Examine, print, and return the exit status: 0 healthy, 1 something is wrong."""
    doctor = Doctor(config, data_dir)
    checks = list(doctor.examine())
    if as_json:
        print_json(report(checks, doctor))
    else:
        print_checks(checks, stdout_console())
    return 0 if _healthy(checks) else EXIT_FAILURE


def _healthy(checks: Sequence[Check]) -> bool:
    return all(check.status != "problem" for check in checks)


def report(checks: Sequence[Check], doctor: Doctor) -> dict[str, Any]:
    """The checks as ``--json`` prints them, with what the engine says about itself."""
    found, engine = doctor.capabilities, None
    if found is not None:
        engine = {**found.build_info, "engine_build": found.engine_build}
    return {
        "healthy": _healthy(checks),
        "checks": [asdict(check) for check in checks],
        "engine": engine,
        "devices": doctor.devices.to_list() if doctor.devices is not None else [],
        "hardware": HardwareInfo.detect().model_dump(mode="json"),
    }


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Print the checks for a person."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for check in checks:
        table.add_row(_MARKS[check.status], escape(check.name), escape(check.detail))
    console.print(table)
