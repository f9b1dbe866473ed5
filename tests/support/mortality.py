"""Kills the engine under a real worker at work, again and again, and looks at what is seen of it.

The worker, the engine process, the coordinator and the socket between them are the real ones; the
model is the tiny one. Each death hits a block that has begun; a short block after it must compute,
and compute what it always does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tiny_gguf import encode_gguf, tiny_metadata, tiny_tensors

from ai4all.backend.base import EngineOptions
from ai4all.backend.crash_records import CrashRecords
from ai4all.backend.isolated import IsolatedBackend
from ai4all.backend.quarantine import Quarantine, QuarantineRules
from ai4all.backend.watchdog import WatchdogLimits
from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, LeaseRules, TaskSpec
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.delivery.spool import MemorySpool
from ai4all.errors import ModelNotFound
from ai4all.models.files import hash_file
from ai4all.protocol.connection import LinkOptions
from ai4all.protocol.session import SessionOptions
from ai4all.types.model import ModelFile
from ai4all.types.task import ErrorCode
from ai4all.worker import Worker, WorkerOptions
from ai4all.worker_events import BlockText, WorkerEvent

KINDS = ("kill", "segv", "abort", "hang", "assertion")
"""Ways to die: three signals, a stop that looks like a hang, and an assertion of llama.cpp's own
that a file trips at its load."""

_SIGNALS = {
    "kill": signal.SIGKILL,
    "segv": signal.SIGSEGV,
    "abort": signal.SIGABRT,
    "hang": signal.SIGSTOP,
}


@dataclass(slots=True)
class Death:
    """One death, in seconds from the blow.

    Attributes:
        kind: One of ``KINDS``.
        code: What the coordinator was told.
        retryable: Whether it may give the block out again.
        reported: Until it was told.
        back: From then until the next block was delivered: restart, load and computation.
    """

    kind: str
    struck_at: float = 0.0
    code: ErrorCode | None = None
    retryable: bool = False
    reported: float = 0.0
    back: float = 0.0


@dataclass(slots=True)
class Findings:
    """What a run came to.

    Attributes:
        deaths: In their order.
        links: How often the worker registered; 1 is: the link never dropped.
        drops: How often it disconnected before the end.
        answers: Different texts of the one short question; 1 is: it always computed the same.
        heartbeats: Heartbeats that arrived.
        records: Crash records that were kept.
    """

    deaths: list[Death] = field(default_factory=list)
    links: int = 0
    drops: int = 0
    answers: int = 0
    heartbeats: int = 0
    records: int = 0


class _Models:
    def __init__(self, *files: ModelFile) -> None:
        self._files = {file.model_id: file for file in files}

    def get(self, model_id: str) -> ModelFile:
        if model_id not in self._files:
            raise ModelNotFound(model_id)
        return self._files[model_id]

    def list(self) -> Sequence[ModelFile]:
        return list(self._files.values())


def _model(model_id: str, path: Path) -> ModelFile:
    return ModelFile(model_id, path, hash_file(path), path.stat().st_size)


def _tasks(kinds: Sequence[str]) -> Iterator[TaskSpec]:
    for number, kind in enumerate(kinds):
        yield TaskSpec(
            block_id=f"victim-{number}",
            # Long enough to be struck in the middle; greedy, the tiny model never ends by itself.
            input={"prompt": f"the sea {number}", "max_tokens": 3000, "temperature": 0.0},
            model_id="spoiled" if kind == "assertion" else "tiny",
        )
        yield TaskSpec(
            block_id=f"probe-{number}",
            input={"prompt": "the river", "max_tokens": 8, "temperature": 0.0},
            model_id="tiny",
        )


class _Reaper:
    """Strikes once each victim has begun, and notes when the coordinator hears of it."""

    def __init__(
        self, backend: IsolatedBackend, kinds: Sequence[str], on_death: Callable[[], None]
    ) -> None:
        self._on_death = on_death
        self.deaths = [Death(kind) for kind in kinds]
        self.heartbeats = 0
        self._backend = backend
        self._told_at: dict[int, float] = {}

    def on_worker(self, event: WorkerEvent) -> None:
        if isinstance(event, BlockText) and event.block_id.startswith("victim-"):
            death = self.deaths[_number(event.block_id)]
            pid = self._backend.process_id
            if death.struck_at == 0.0 and pid is not None:
                death.struck_at = time.monotonic()
                os.kill(pid, _SIGNALS[death.kind])

    def on_coordinator(self, event: Event) -> None:
        if event.kind is EventKind.HEARTBEAT:
            self.heartbeats += 1
        if event.block_id is None:
            return
        death, now = self.deaths[_number(event.block_id)], time.monotonic()
        if event.kind is EventKind.ASSIGNED and death.kind == "assertion":
            # Nobody strikes: the load does, a moment from now.
            death.struck_at = death.struck_at or now
        if event.kind in (EventKind.FAILED, EventKind.DELIVERED):
            if event.block_id.startswith("victim-"):
                death.reported = now - death.struck_at
                self._told_at[_number(event.block_id)] = now
                self._on_death()
            else:
                death.back = now - self._told_at[_number(event.block_id)]


def deadly_model() -> bytes:
    """A model that passes the pre-check and kills the engine at its load.

    llama.cpp asserts of this architecture, which has the same tensors, that all of a head is
    rotated. Others have other rules, so the pre-check knows none of them.
    """
    metadata = {key.replace("llama.", "baichuan."): v for key, v in tiny_metadata().items()}
    metadata |= {
        "general.architecture": ("str", "baichuan"),
        "baichuan.rope.dimension_count": ("u32", 8),
    }
    return encode_gguf(metadata, tiny_tensors())


def _number(block_id: str) -> int:
    return int(block_id.partition("-")[2])


async def kill_again_and_again(
    folder: Path,
    tiny_model: Path,
    count: int,
    *,
    kinds: Sequence[str] = KINDS,
    limits: WatchdogLimits | None = None,
    on_death: Callable[[], None] = lambda: None,
) -> Findings:
    """Let the engine die ``count`` times, of each of ``kinds`` in turn.

    Args:
        folder: Where what is needed is written.
        tiny_model: What computes.
        count: Deaths.
        kinds: Of ``KINDS``.
        limits: When an engine counts as hanging; by default as shipped.
        on_death: Called once the coordinator was told of each.
    """
    order = list(itertools.islice(itertools.cycle(kinds), count))
    spoiled = folder / "spoiled.gguf"
    spoiled.write_bytes(deadly_model())
    records = folder / "crashes"
    backend = IsolatedBackend(
        crash_records=CrashRecords(records, keep=10_000),
        # What is measured here is the life after each death; three would end it.
        quarantine=Quarantine(None, QuarantineRules(deaths=10**9)),
        limits=limits,
    )
    reaper = _Reaper(backend, order, on_death)
    findings = Findings(deaths=reaper.deaths)
    coordinator = EmbeddedCoordinator(
        list(_tasks(order)),
        rules=LeaseRules(max_failures=1),
        heartbeat_interval_ms=500,
        on_event=reaper.on_coordinator,
    )
    async with backend, coordinator:
        tiny = _model("tiny", tiny_model)
        worker = Worker(
            backend,
            _Models(tiny, _model("spoiled", spoiled)),
            MemorySpool(),
            LinkOptions(url=coordinator.url),
            Attempts(Backoff(2000)),
            WorkerOptions(
                worker_id="mortal",
                engine=EngineOptions(n_ctx=4096, threads=1),
                preload=tiny,
                session=SessionOptions(min_retry=0.02),
            ),
            reaper.on_worker,
        )
        running = asyncio.create_task(worker.run())
        try:
            await coordinator.finished()
            history = list(coordinator.history)
        finally:
            worker.stop()
            await running
    findings.links = sum(event.kind is EventKind.REGISTERED for event in history)
    findings.drops = sum(event.kind is EventKind.DISCONNECTED for event in history)
    findings.heartbeats = reaper.heartbeats
    findings.records = len(list(records.iterdir()))
    answers = set()
    for number, death in enumerate(reaper.deaths):
        error = coordinator.outcomes[f"victim-{number}"].result.error
        if error is not None:
            death.code, death.retryable = error.code, error.retryable
        probe = coordinator.outcomes[f"probe-{number}"].result
        assert probe.fingerprint is not None, probe.error
        answers.add(probe.fingerprint.output_tokens_sha256)
    findings.answers = len(answers)
    return findings
