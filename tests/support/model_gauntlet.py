"""A real worker, its engine in a process of its own, and a coordinator that gives it bad models.

Every block names a model of its own. The worker's store makes the file when it is asked for it and
removes it with the next, so ten thousand of them take no room. What is measured is what the
coordinator sees: the answer to each block, how long it took, and whether the link ever dropped.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ujson

from ai4all.backend.base import EngineOptions
from ai4all.backend.crash_records import CrashRecords
from ai4all.backend.isolated import IsolatedBackend
from ai4all.backend.quarantine import Quarantine, QuarantineRules
from ai4all.backend.watchdog import WatchdogLimits
from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind, LeaseRules, TaskSpec
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.delivery.spool import MemorySpool
from ai4all.protocol.connection import LinkOptions
from ai4all.protocol.session import SessionOptions
from ai4all.types.model import ModelFile
from ai4all.types.task import ErrorCode, TaskResult
from ai4all.worker import Worker, WorkerOptions

__all__ = ["CLASSES", "Gauntlet", "Passage", "run_gauntlet"]

CLASSES = (
    "refused by the pre-check",
    "refused for its size",
    "refused by llama.cpp",
    "refused the request",
    "computed no numbers",
    "engine died",
    "engine hung",
    "answered",
)
"""What can become of a model."""

_PRE_CHECK = "the model's file: "


@dataclass(slots=True)
class Passage:
    """What became of one model.

    Attributes:
        name: The model.
        outcome: One of ``CLASSES``.
        seconds: From the assignment to the answer.
        code: The answer's error code, or None.
        message: Its text, or an empty one.
        died_of: Signal or assertion, where the engine died.
    """

    name: str
    outcome: str
    seconds: float
    code: str | None
    message: str
    died_of: str | None = None


@dataclass(slots=True)
class Gauntlet:
    """What a run came to.

    Attributes:
        passages: Every model, in order.
        links: How often the worker registered; 1 is: the link never dropped.
        drops: How often it disconnected before the end.
        heartbeats: Heartbeats that arrived.
        frames: What the worker said of its models, to be searched.
    """

    passages: list[Passage] = field(default_factory=list)
    links: int = 0
    drops: int = 0
    heartbeats: int = 0

    @property
    def classes(self) -> Counter[str]:
        """How many models came to what."""
        return Counter(passage.outcome for passage in self.passages)

    @property
    def slowest(self) -> Passage:
        """The model that took longest."""
        return max(self.passages, key=lambda passage: passage.seconds)


class _Models:
    """Makes files on demand, one at a time."""

    def __init__(self, folder: Path, make: Callable[[str], bytes], good: ModelFile) -> None:
        self._folder = folder
        self._make = make
        self._good = good
        self._last: Path | None = None

    def get(self, model_id: str) -> ModelFile:
        if model_id == self._good.model_id:
            return self._good
        content = self._make(model_id)
        digest = hashlib.sha256(content).hexdigest()
        path = self._folder / f"{digest}.gguf"
        path.write_bytes(content)
        if self._last is not None and self._last != path:
            self._last.unlink(missing_ok=True)
        self._last = path
        return ModelFile(model_id, path, digest, len(content))

    def list(self) -> Sequence[ModelFile]:
        return [self._good]


async def run_gauntlet(
    folder: Path,
    good: Path,
    names: Sequence[str],
    make: Callable[[str], bytes],
    *,
    system_prompts: bool = False,
    limits: WatchdogLimits | None = None,
    max_tokens: int = 4,
    advance: Callable[[], None] = lambda: None,
) -> Gauntlet:
    """Have a worker try every model, and one good one before and after.

    Args:
        folder: Where files go.
        good: A model that computes.
        names: What to call the others.
        make: Makes the file of one.
        system_prompts: Use the models' chat templates.
        limits: Of the watchdog.
        max_tokens: To generate with each.
        advance: Called after each.
    """
    records = folder / "crashes"
    backend = IsolatedBackend(
        crash_records=CrashRecords(records, keep=1_000_000),
        # Every model is another one; none dies three times.
        quarantine=Quarantine(None, QuarantineRules(deaths=10**9)),
        limits=limits,
    )
    fine = ModelFile("good", good, "0" * 64, good.stat().st_size)
    order = ["good", *names, "good"]
    begun: dict[str, float] = {}
    took: dict[str, float] = {}
    found = Gauntlet()

    def on_event(event: Event) -> None:
        now = time.monotonic()
        match event.kind:
            case EventKind.HEARTBEAT:
                found.heartbeats += 1
            case EventKind.ASSIGNED if event.block_id is not None:
                begun[event.block_id] = now
            case EventKind.FAILED | EventKind.DELIVERED if event.block_id is not None:
                took[event.block_id] = now - begun[event.block_id]
                advance()

    coordinator = EmbeddedCoordinator(
        list(_tasks(order, system_prompts, max_tokens)),
        rules=LeaseRules(max_failures=1),
        heartbeat_interval_ms=500,
        on_event=on_event,
    )
    async with backend, coordinator:
        worker = Worker(
            backend,
            _Models(folder, make, fine),
            MemorySpool(),
            LinkOptions(url=coordinator.url),
            Attempts(Backoff(2000)),
            WorkerOptions(
                worker_id="gauntlet",
                engine=EngineOptions(n_ctx=64, threads=1, prefix_cache_mb=0),
                session=SessionOptions(min_retry=0.01),
            ),
        )
        running = asyncio.create_task(worker.run())
        try:
            await coordinator.finished()
            history = list(coordinator.history)
        finally:
            worker.stop()
            await running
    found.links = sum(event.kind is EventKind.REGISTERED for event in history)
    found.drops = sum(event.kind is EventKind.DISCONNECTED for event in history)
    deaths = _assertions(records)
    for number, name in enumerate(order):
        block_id = f"b-{number}"
        result = coordinator.outcomes[block_id].result
        found.passages.append(_passage(name, result, took[block_id], deaths))
    return found


def _tasks(names: Iterable[str], system_prompts: bool, max_tokens: int) -> Iterable[TaskSpec]:
    for number, name in enumerate(names):
        task_input = {"prompt": "hello world", "max_tokens": max_tokens, "temperature": 0.0}
        if system_prompts:
            task_input["system_prompt"] = "be brief"
        yield TaskSpec(block_id=f"b-{number}", input=task_input, model_id=name)


def _assertions(records: Path) -> Mapping[str, str]:
    """What each record says the engine died of, by the name of its file."""
    if not records.is_dir():
        return {}
    found = {}
    for path in records.iterdir():
        record = ujson.loads(path.read_text())
        found[path.name] = record["assertion"] or record["fault"] or record["signal"] or "?"
    return found


def _passage(name: str, result: TaskResult, seconds: float, deaths: Mapping[str, str]) -> Passage:
    error = result.error
    if error is None:
        return Passage(name, "answered", seconds, None, "")
    details = error.details or {}
    outcome, died_of = "refused by llama.cpp", None
    if error.code is ErrorCode.ENGINE_HUNG:
        outcome = "engine hung"
    elif "crash_record" in details:
        outcome, died_of = "engine died", deaths.get(str(details["crash_record"]), "?")
    elif error.code is ErrorCode.ENGINE_CRASHED:
        outcome = "computed no numbers"
    elif error.code is ErrorCode.OUT_OF_MEMORY:
        outcome = "refused for its size"
    elif error.code in (ErrorCode.BAD_REQUEST, ErrorCode.CONTEXT_OVERFLOW):
        outcome = "refused the request"
    elif error.message.startswith(_PRE_CHECK):
        outcome = "refused by the pre-check"
    return Passage(name, outcome, seconds, error.code.value, error.message, died_of)


def place_of(died_of: str) -> str:
    """The file and line of an assertion, to group deaths by."""
    found = re.match(r"[^\s:]+:\d+", died_of)
    return found[0] if found else died_of
