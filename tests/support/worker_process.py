"""A worker in a process of its own, as an owner runs it: what it says, and how it ends."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["WorkerProcess", "own_environment", "real_command", "worker_process"]

_MAIN = "import sys; from ai4all.cli import main; sys.exit(main())"


def real_command(*arguments: str) -> list[str]:
    """A process's arguments for the command line, with the engine."""
    return [sys.executable, "-P", "-c", _MAIN, *arguments]


def own_environment(folder: Path, model: Path, **more: str) -> dict[str, str]:
    """The variables of a process that reaches no setting and no home of this machine.

    Args:
        folder: Its home, and what is in it.
        model: Stands for the benchmark's model.
        more: Further variables.
    """
    kept = {name: text for name, text in os.environ.items() if not name.startswith("AI4ALL_")}
    return kept | {
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder / "share"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "AI4ALL_DATA_DIR": str(folder / "data"),
        "AI4ALL_MODELS_BENCHMARK_SOURCE": f"file:{model}",
        "AI4ALL_MODELS_DISK_RESERVE_MB": "0",
        # The benchmark of the first run has a long prompt.
        "AI4ALL_ENGINE_CONTEXT_LENGTH": "3072",
        **more,
    }


@dataclass
class WorkerProcess:
    """One that runs, or ran.

    Attributes:
        process: The process.
        lines: What it has said on standard error so far.
    """

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def said(self) -> str:
        """All of it."""
        return "".join(self.lines)

    async def read(self) -> None:
        """Take down what it says, to its end."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(line.decode(errors="replace"))
            self._changed.set()

    async def until(self, text: str) -> str:
        """Wait for a line with ``text`` in it."""
        while True:
            found = [line for line in self.lines if text in line]
            if found:
                return found[-1]
            self._changed.clear()
            await self._changed.wait()


@asynccontextmanager
async def worker_process(
    *command: str, env: Mapping[str, str] | None = None, **options: Any
) -> AsyncIterator[WorkerProcess]:
    """Start a command; what still runs at the end is killed. It must not say a traceback."""
    process = await asyncio.create_subprocess_exec(
        *command, env=env, stderr=asyncio.subprocess.PIPE, **options
    )
    running = WorkerProcess(process)
    reading = asyncio.create_task(running.read())
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading
        assert "Traceback" not in running.said, running.said
