"""P9: what the whole worker costs as a process: its start, its memory, its ``--help``."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from peers_contenders import OURS, MissingPeer, resident_mb
from peers_rows import SERVER, Comparison, Run

from ai4all.benchmark.suite import benchmark_prompts
from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, TaskSpec

_WORKER = f"{OURS} worker"
_FIRST_RUN_S = 300.0
_REGISTER_S = 60.0
_STOP_S = 20.0


def command() -> list[str]:
    """How to call the command line: as it is installed beside this Python, else from the tree."""
    installed = shutil.which(OURS, path=str(Path(sys.executable).parent))
    if installed is not None:
        return [installed]
    return [sys.executable, "-c", "from ai4all.cli import main; main()"]


def process(run: Run) -> None:
    """P9: time of ``--help``, time until registered, memory beside the server's."""
    _help(run)
    with tempfile.TemporaryDirectory(prefix="ai4all-peers-") as directory:
        try:
            asyncio.run(_worker(run, Path(directory)))
        except MissingPeer as exc:
            run.missing("P9", _WORKER, str(exc))


def _help(run: Run) -> None:
    seconds = []
    for number in range(max(3, run.rounds)):
        run.tell(f"P9: --help, {number + 1}")
        start = time.perf_counter()
        subprocess.run([*command(), "--help"], stdout=subprocess.DEVNULL, check=True)
        seconds.append(1e3 * (time.perf_counter() - start))
    run.report.comparisons.append(
        Comparison(
            row="P9", what="--help", unit="ms", ours=seconds, how="value", goal=200, at_least=False
        )
    )


async def _worker(run: Run, directory: Path) -> None:
    registered = asyncio.Event()

    def watch(event: Event) -> None:
        if event.kind is EventKind.REGISTERED:
            registered.set()

    starts: list[float] = []
    memory: dict[str, list[float]] = {_WORKER: [], SERVER: []}
    task_input = {
        "prompt": benchmark_prompts()[-1][1],
        "max_tokens": run.tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    async with EmbeddedCoordinator([], no_work_retry_ms=100, on_event=watch) as coordinator:
        environment = _environment(run, directory, coordinator.url)
        run.tell("P9: the worker's first run")
        async with _Worker(environment) as worker:
            await worker.until(registered.wait(), _FIRST_RUN_S)
        for number in range(run.rounds):
            run.tell(f"P9: round {number + 1} of {run.rounds}, {_WORKER}")
            registered.clear()
            start = time.perf_counter()
            async with _Worker(environment) as worker:
                await worker.until(registered.wait(), _REGISTER_S)
                starts.append(time.perf_counter() - start)
                coordinator.add(TaskSpec(input=task_input))
                await worker.until(coordinator.finished(), _FIRST_RUN_S)
                memory[_WORKER].append(worker.memory_mb)
            run.tell(f"P9: round {number + 1} of {run.rounds}, {SERVER}")
            with ExitStack() as held:
                server = run.open_server("P9", held)
                if server is not None:
                    server.generate(task_input["prompt"], run.tokens)
                    memory[SERVER].append(server.memory_mb())
    failed = [o for o in coordinator.outcomes.values() if not o.result.success]
    if failed:
        run.missing("P9", _WORKER, f"the task failed: {failed[0].result.error}")
        return
    run.report.comparisons.append(
        Comparison(
            row="P9",
            what="worker: start to registered",
            unit="s",
            ours=starts,
            how="value",
            goal=0.6,
            at_least=False,
        )
    )
    if len(memory[SERVER]) == len(memory[_WORKER]):
        what = "resident memory of the worker after a task, all its processes"
        run.compare("P9", what, "MiB", memory, {SERVER: 1.0}, at_least=False, ours=_WORKER)


def _environment(run: Run, directory: Path, url: str) -> dict[str, str]:
    """Settings for a worker that has this model as its benchmark model, and nothing else."""
    model = run.setup.model.resolve()
    with model.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    others = {key: value for key, value in os.environ.items() if not key.startswith("AI4ALL_")}
    return others | {
        "AI4ALL_DATA_DIR": str(directory),
        "AI4ALL_COORDINATOR_URL": url,
        "AI4ALL_MODELS_BENCHMARK_SOURCE": f"file:{model}",
        "AI4ALL_MODELS_BENCHMARK_SHA256": sha256,
        "AI4ALL_ENGINE_CONTEXT_LENGTH": str(run.setup.n_ctx),
        "AI4ALL_ENGINE_THREADS": str(run.setup.threads),
    }


class _Worker:
    """A worker that runs while the context is open, and is stopped politely at its end."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: asyncio.subprocess.Process
        self._messages: asyncio.Task[bytes]

    @property
    def memory_mb(self) -> float:
        """Resident memory of all its processes, in MiB."""
        return resident_mb(self._process.pid)

    async def until(self, happens: Coroutine[Any, Any, object], limit: float) -> None:
        """Wait for something that only a living worker brings about.

        Raises:
            MissingPeer: It ended, or took longer than ``limit`` seconds.
        """
        waiting = asyncio.ensure_future(happens)
        ended = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({waiting, ended}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                await waiting
                return
        finally:
            waiting.cancel()
            ended.cancel()
        if self._process.returncode is None:
            raise MissingPeer(f"it took more than {limit:.0f} s")
        text = (await self._messages).decode(errors="replace")
        raise MissingPeer(f"it ended with status {self._process.returncode}: {text[-300:]}")

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *command(),
            "worker",
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert self._process.stderr is not None
        self._messages = asyncio.ensure_future(self._process.stderr.read())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._messages
