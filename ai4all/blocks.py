"""One block from its assignment to its result: admission, model, computation, figures.

Nothing here knows the wire's session or the spool; ``worker`` does.
"""

from __future__ import annotations

import asyncio
import functools
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from ai4all.backend.base import Completion, EngineOptions, InferenceBackend, LoadedModel
from ai4all.benchmark.speed_watch import SpeedBaseline
from ai4all.clock import SYSTEM_CLOCK, Clock
from ai4all.errors import (
    ComputeError,
    DeadlineExceeded,
    DeviceUnavailable,
    EngineCrashed,
    EngineError,
    EngineHung,
    InvalidModelFile,
    LoadFailed,
    ModelChecksumMismatch,
    ModelError,
    OutOfMemory,
)
from ai4all.models.memory import load_model
from ai4all.protocol.messages import Assignment
from ai4all.tasks import Computed, Job, compute, parse_input
from ai4all.types.model import ModelFile
from ai4all.types.task import BlockMetrics, TaskResult
from ai4all.worker_health import WorkerHealth

__all__ = ["Block", "ModelGate", "ModelSource", "Slots", "as_compute_error", "run_block"]

_log = structlog.get_logger(__name__)

# The engine enforces a deadline itself. One that is silent for this long after it, hangs.
_HANG_SLACK_S: Final = 2.0

# How long a load that was cancelled may take to end.
_LAST_LOAD_S: Final = 3.0

# Reading the memory of two processes takes longer than the rest of a small block's figures.
_MEMORY_FOR_S: Final = 1.0

# Two clocks that are read one after the other differ by less than this.
_LEAST_SLEEP_MS: Final = 1000.0

# A deadline further away than this is none; native clocks count nanoseconds in 64 bits.
_MAX_DEADLINE_S: Final = 30 * 86_400.0


class ModelSource(Protocol):
    """Where models come from; ``ai4all.models.store.ModelStore`` is the one in use."""

    def get(self, model_id: str) -> ModelFile:
        """Find a model by name.

        Raises:
            ModelNotFound: There is none.
        """

    def list(self) -> Sequence[ModelFile]:
        """All models that are here."""


@dataclass(slots=True)
class Block:
    """A block that this worker has taken.

    Attributes:
        assignment: What the coordinator sent.
        received_at: Monotonic time of its receipt.
        deadline: Monotonic time of its deadline, or None when it is far away.
        asleep_before: What ``clock.asleep()`` gave at its receipt.
        clock: What tells the time.
        task: What runs it.
        job: What computes it, once that has begun.
        started_at: Monotonic time when computing began, or None.
        stopped_by: Why it was stopped from outside, or None.
        is_computing: Whether it is at work.
        is_over: Whether it is done, and stopping it means nothing any more.
    """

    assignment: Assignment
    received_at: float
    deadline: float | None
    asleep_before: float
    clock: Clock = SYSTEM_CLOCK
    task: asyncio.Task[None] | None = None
    job: Job | None = None
    started_at: float | None = None
    stopped_by: ComputeError | None = field(default=None)
    is_computing: bool = False
    is_over: bool = False
    _alarm: asyncio.TimerHandle | None = None

    @classmethod
    def received(cls, assignment: Assignment, clock: Clock = SYSTEM_CLOCK) -> Block:
        """Take an assignment now: its wall-clock deadline becomes one that no clock jump moves.

        Who sets the deadline tells the time: this machine's clock counts only for a frame without
        a timestamp.
        """
        now = clock.monotonic()
        remaining = (assignment.deadline - (assignment.timestamp or clock.utc())).total_seconds()
        # One that has long passed has passed; how long ago need not fit anybody's clock.
        remaining = max(remaining, -_MAX_DEADLINE_S)
        deadline = now + remaining if remaining < _MAX_DEADLINE_S else None
        return cls(assignment, now, deadline, clock.asleep(), clock)

    @property
    def block_id(self) -> str:
        """The coordinator's name for it."""
        return self.assignment.block_id

    @property
    def progress(self) -> float:
        """Share that is done, 0 to 1."""
        return self.job.progress if self.job is not None else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline; negative when it has passed."""
        return None if self.deadline is None else self.deadline - self.clock.monotonic()

    @property
    def suspended_ms(self) -> float | None:
        """Milliseconds that the machine slept since its receipt; None when it did not."""
        slept = (self.clock.asleep() - self.asleep_before) * 1000.0
        return slept if slept >= _LEAST_SLEEP_MS else None

    def machine_slept(self, seconds: float) -> None:
        """Move the deadline to where it is after a sleep. No timer and no engine knows of that."""
        if self.deadline is None:
            return
        self.deadline -= seconds
        late = DeadlineExceeded("the deadline passed in a sleep of the machine or soon after it")
        self.rest()
        loop = asyncio.get_running_loop()
        self._alarm = loop.call_later(
            max(0.0, self.deadline - self.clock.monotonic()), self.stop, late
        )

    def rest(self) -> None:
        """Let go of what would still happen at its deadline."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def stop(self, why: ComputeError) -> None:
        """Have it answered with ``why`` instead of a result. Too late, does nothing."""
        if self.is_over or self.stopped_by is not None:
            return
        self.stopped_by = why
        # One whose task has not taken its first step sees for itself; that step must be taken.
        if self.is_computing and self.task is not None:
            self.task.cancel()

    def failed(self, error: ComputeError) -> TaskResult:
        """The result of a block that could not be computed. Times are those of this process."""
        now = self.clock.monotonic()
        started = self.started_at if self.started_at is not None else now
        return TaskResult(
            success=False,
            output=None,
            error=error.info(),
            metrics=BlockMetrics(
                queue_time_ms=(started - self.received_at) * 1000.0,
                execution_time_ms=(now - started) * 1000.0,
                total_time_ms=(now - self.received_at) * 1000.0,
                suspended_ms=self.suspended_ms,
            ),
        )


class Slots:
    """Room for as many blocks as are computed at once; how many that is can change.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken = 0
        self._changed = asyncio.Event()

    def resize(self, count: int) -> None:
        """Have another number of them. What runs beyond it is left to finish."""
        self._count = count
        self._changed.set()

    async def __aenter__(self) -> None:
        while self._taken >= self._count:
            self._changed.clear()
            await self._changed.wait()
        self._taken += 1

    async def __aexit__(self, *exc_info: object) -> None:
        self._taken -= 1
        self._changed.set()


class ModelGate:
    """Lets blocks of one model run together and changes the model when they are done.

    First come, first served: a block that wants another model is not overtaken by blocks that
    want the one that is loaded.

    Args:
        backend: What holds the model.
        options_for: How to run a model; may read a file. May be set anew: see ``renew``.
        health: What says whether a model may run where it would. May be set anew, too.
        baseline_for: What to compare the speed of a loaded model with; may read a file.
    """

    def __init__(
        self,
        backend: InferenceBackend,
        options_for: Callable[[ModelFile], EngineOptions],
        health: WorkerHealth,
        baseline_for: Callable[[LoadedModel], SpeedBaseline | None] | None = None,
    ) -> None:
        self._backend = backend
        self.options_for = options_for
        self.health = health
        self._baseline_for = baseline_for
        self._turn = asyncio.Lock()
        self._users = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_stale = False
        self._loading: asyncio.Task[LoadedModel] | None = None
        self._memory_mb = 0
        self._memory_until = 0.0

    def use(self, model: ModelFile) -> AbstractAsyncContextManager[float]:
        """Hold ``model`` loaded; gives the milliseconds of the load that this took, or 0.

        Raises:
            LoadFailed: The file could not be loaded.
            DeviceUnavailable: It would not run on the device that was promised.
            OutOfMemory: It does not fit.
        """
        return _Use(self, model)

    async def take(self, model: ModelFile) -> float:
        """Have ``model`` loaded until ``release``; see ``use``."""
        async with self._turn:
            load_ms = await self._ensure(model)
            self._users += 1
            self._idle.clear()
        return load_ms

    def release(self) -> None:
        """Let another model have its turn."""
        self._users -= 1
        if self._users == 0:
            self._idle.set()

    def memory_mb(self) -> int:
        """What the backend's processes have resident, in MiB; a second old at most."""
        now = asyncio.get_running_loop().time()
        if now >= self._memory_until:
            self._memory_mb = self._backend.memory_mb()
            self._memory_until = now + _MEMORY_FOR_S
        return self._memory_mb

    def renew(self) -> None:
        """Have the model loaded anew for the next block: how it shall be run has changed."""
        self._is_stale = True

    async def close(self) -> None:
        """End a load that nobody waits for any more."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait({self._loading}, timeout=_LAST_LOAD_S)

    async def _ensure(self, model: ModelFile) -> float:
        if self._loading is not None:
            await asyncio.wait({self._loading})
        loaded = self._backend.loaded
        if loaded is not None and loaded.file.sha256 == model.sha256 and not self._is_stale:
            # After a restart of the engine it may run elsewhere.
            self.health.confirm(loaded)
            return 0.0
        await self._idle.wait()
        stale, self._is_stale = self._is_stale, False
        # A load is not given up with the block that asked for it: the next may want it, too.
        self._loading = asyncio.ensure_future(self._load(model))
        self._loading.add_done_callback(functools.partial(self._loaded, stale))
        return (await asyncio.shield(self._loading)).load_ms

    async def _load(self, model: ModelFile) -> LoadedModel:
        options = await asyncio.to_thread(self.options_for, model)
        try:
            loaded = await load_model(self._backend, model, options, approve=self.health.approve)
        except (LoadFailed, OutOfMemory) as error:
            self.health.could_not_load(model, error)
            raise
        try:
            self.health.confirm(loaded)
        except DeviceUnavailable:
            await self._backend.unload()
            raise
        if self._baseline_for is not None:
            self.health.expect(await asyncio.to_thread(self._baseline_for, loaded))
        return loaded

    def _loaded(self, stale: bool, task: asyncio.Task[LoadedModel]) -> None:
        self._loading = None
        self._memory_until = 0.0
        # The exception is taken, so that nobody warns when the block has gone.
        if task.cancelled() or task.exception() is not None:
            # What is still loaded may run as it no longer shall.
            self._is_stale |= stale


class _Use:
    """What ``ModelGate.use`` gives; as a generator it would cost three times as much."""

    def __init__(self, gate: ModelGate, model: ModelFile) -> None:
        self._gate = gate
        self._model = model

    async def __aenter__(self) -> float:
        return await self._gate.take(self._model)

    async def __aexit__(self, *exc_info: object) -> None:
        self._gate.release()


async def run_block(
    block: Block,
    backend: InferenceBackend,
    models: ModelSource,
    gate: ModelGate,
    slots: Slots,
    on_text: Callable[[str, int], None],
    on_completion: Callable[[Completion], None] | None = None,
    max_result_bytes: int | None = None,
) -> TaskResult:
    """Compute a block. Whatever goes wrong becomes a failed result.

    Args:
        block: What to compute; its ``task`` is the one that runs this.
        backend: What computes.
        models: Where its model comes from.
        gate: Lets it have the model.
        slots: One for each block that may be computed at once.
        on_text: Called with text that became certain and the count of tokens so far.
        on_completion: Called with each generation that ended well.
        max_result_bytes: Longest message that can tell the result.

    Raises:
        asyncio.CancelledError: The task was cancelled by other means than ``Block.stop``.
    """
    block.is_computing = True
    try:
        if block.stopped_by is not None:
            return block.failed(block.stopped_by)
        return await _attempt(
            block, backend, models, gate, slots, on_text, on_completion, max_result_bytes
        )
    except asyncio.CancelledError:
        if block.stopped_by is None:
            raise
        if block.task is not None:
            block.task.uncancel()
        return block.failed(block.stopped_by)
    except Exception as exc:  # noqa: BLE001 - a block's fault must never be the worker's end.
        return block.failed(as_compute_error(exc))
    finally:
        block.is_computing, block.is_over = False, True
        block.rest()


async def _attempt(
    block: Block,
    backend: InferenceBackend,
    models: ModelSource,
    gate: ModelGate,
    slots: Slots,
    on_text: Callable[[str, int], None],
    on_completion: Callable[[Completion], None] | None,
    max_result_bytes: int | None,
) -> TaskResult:
    assignment = block.assignment
    remaining = block.remaining
    if remaining is not None and remaining <= 0.0:
        raise DeadlineExceeded("the deadline had passed when the block arrived")
    parsed = parse_input(assignment.task_type, assignment.input)
    job = Job(
        assignment.task_type,
        parsed,
        backend,
        block.deadline,
        on_text,
        on_completion,
        max_result_bytes,
    )
    try:
        async with asyncio.timeout(remaining) as limit, slots:
            model = _loaded_under(assignment.model_id, backend)
            if model is None:
                # A look at the disk, and perhaps a hash of the whole file: not on the loop.
                model = await asyncio.to_thread(models.get, assignment.model_id)
            async with gate.use(model) as load_ms:
                block.job = job
                block.started_at = block.clock.monotonic()
                remaining = block.remaining
                if remaining is not None:
                    late = max(0.0, remaining) + _HANG_SLACK_S
                    limit.reschedule(asyncio.get_running_loop().time() + late)
                computed = await compute(job)
    except TimeoutError as exc:
        # Some of the backend's errors are timeouts too, and say more than ours would.
        if isinstance(exc, ComputeError):
            raise
        if block.started_at is None:
            raise DeadlineExceeded("the deadline passed before the block was begun") from None
        raise EngineHung("the engine did not answer at the deadline") from None
    return TaskResult(
        success=True,
        output=computed.output,
        error=None,
        metrics=_metrics(computed, load_ms, gate.memory_mb(), block.suspended_ms),
        fingerprint=computed.fingerprint,
    )


def _loaded_under(model_id: str, backend: InferenceBackend) -> ModelFile | None:
    loaded = backend.loaded
    return loaded.file if loaded is not None and loaded.file.model_id == model_id else None


def _metrics(
    computed: Computed, load_ms: float, memory_mb: int, suspended_ms: float | None
) -> BlockMetrics:
    """The figures of the native loop; a load that the block had to wait for is added to them."""
    timings = computed.timings
    return BlockMetrics(
        queue_time_ms=timings.queue_ms,
        execution_time_ms=timings.total_ms - timings.queue_ms - timings.load_ms,
        total_time_ms=timings.total_ms + load_ms,
        load_time_ms=timings.load_ms + load_ms,
        prompt_time_ms=timings.prompt_ms,
        time_to_first_token_ms=timings.time_to_first_token_ms,
        tokens_processed=computed.usage.total_tokens,
        tokens_per_second=timings.decode_tokens_per_second,
        peak_memory_mb=memory_mb,
        suspended_ms=suspended_ms,
    )


def as_compute_error(exc: Exception) -> ComputeError:
    """The failure as the wire can say it. What nobody foresaw is ours, and is logged.

    The log has the places, never the values: a value may be a prompt.
    """
    match exc:
        case ComputeError():
            return exc
        # The texts of these name files; where a machine keeps its files is its owner's business.
        case InvalidModelFile(problem=problem):
            return LoadFailed(f"the model's file: {problem}")
        case ModelChecksumMismatch(expected=expected, actual=actual):
            return LoadFailed(f"the model's file: sha256 is {actual}, expected {expected}")
        case ModelError():
            return LoadFailed(f"the model cannot be used here ({type(exc).__name__})")
        case EngineError():
            return EngineCrashed(str(exc))
    places = [
        f"{frame.filename}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(exc.__traceback__)
    ]
    _log.error("block_failed_unexpectedly", error=type(exc).__name__, places=places)
    return EngineCrashed(f"an unexpected {type(exc).__name__} in the worker")
