"""The worker: asks for blocks, has them computed, and delivers each result once.

The loop is the first protocol's: register, ask, wait out ``NoWork``, compute, submit, await the
acknowledgement, forget. Every result is committed to the spool before it is sent, and sent again
after each reconnect until it is acknowledged. Nothing that a block or a coordinator does ends the
worker; only ``stop``, a link that failed for good, or a bug does.
"""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import structlog

from ai4all.backend.base import Completion, EngineOptions, InferenceBackend, LoadedModel
from ai4all.backend.devices import CPU
from ai4all.benchmark.speed_watch import LoadMeter, SpeedBaseline
from ai4all.blocks import Block, ModelGate, ModelSource, Slots, as_compute_error, run_block
from ai4all.clock import SYSTEM_CLOCK, Clock
from ai4all.delivery.spool import ResultSpool
from ai4all.errors import (
    Ai4allError,
    Cancelled,
    ComputeError,
    Preempted,
    ShuttingDown,
)
from ai4all.protocol.connection import (
    Connection,
    Dial,
    LinkOptions,
    ReconnectPolicy,
    dial_websocket,
)
from ai4all.protocol.events import (
    AssignmentUnfit,
    BadFrame,
    BlockCancelled,
    CloseLink,
    CoordinatorError,
    Drained,
    DuplicateAssignment,
    HeartbeatDue,
    RegistrationRefused,
    ResultAcknowledged,
    SessionEnded,
    SessionEvent,
    SessionStarted,
    UnknownFrame,
    VersionRefused,
    WorkAssigned,
    WorkDue,
)
from ai4all.protocol.messages import (
    ErrorDetail,
    ErrorStatus,
    WorkerCapabilities,
    WorkerStatus,
    envelope,
    working,
)
from ai4all.protocol.session import Session, SessionOptions
from ai4all.self_description import describe_usage, describe_worker, device_in_use
from ai4all.suspend import SuspendWatch
from ai4all.types.model import ModelFile
from ai4all.types.task import TaskResult
from ai4all.worker_delivery import Delivery, never_begun
from ai4all.worker_events import (
    BlockAcknowledged,
    BlockFinished,
    BlockStarted,
    BlockText,
    Degraded,
    LinkDown,
    LinkUp,
    WorkerEvent,
)
from ai4all.worker_health import WorkerHealth
from ai4all.worker_recovery import DeviceRecovery

__all__ = [
    "BlockAcknowledged",
    "BlockFinished",
    "BlockStarted",
    "BlockText",
    "Degraded",
    "LinkDown",
    "LinkUp",
    "Worker",
    "WorkerEvent",
    "WorkerOptions",
    "new_envelope",
]

_log = structlog.get_logger(__name__)

# How long results that were sent at the end may wait for their acknowledgements.
_LAST_ACKNOWLEDGEMENTS_S: Final = 3.0

# After a block whose deadline had passed when it came. A coordinator that has another idea of the
# time would have a hot loop otherwise.
_LATE_BLOCK_PAUSE_S: Final = 1.0

# From here on, two clocks that differ are worth a line in the log.
_CLOCK_DIFFERENCE_S: Final = 60.0

# How long an engine may take to let go of what was cancelled.
_LAST_CANCELLATION_S: Final = 3.0

# How long all of it may take together once the grace is over, whatever hangs.
_LEAVE_WITHIN_S: Final = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How a worker works.

    Attributes:
        worker_id: Its persistent name.
        benchmark_score: The benchmark's composite score, or None.
        max_concurrent_tasks: Blocks computed at once.
        engine: How to run models.
        engine_for: How to run a certain one; by default as ``engine`` says. May read a file.
        score_for: The composite score on a device; by default ``benchmark_score``. May read a file.
        baseline_for: What to compare the speed of a loaded model with. May read a file.
        health: What was promised; by default, what the backend has when the worker is made.
        preload: A model to load before the first block asks for it.
        stop_grace: Seconds that running blocks have after ``stop``.
        progress_interval: Least seconds between two ``Progress`` frames of a block.
        session: Patience and limits of the session.
    """

    worker_id: str
    benchmark_score: float | None = None
    max_concurrent_tasks: int = 1
    engine: EngineOptions = field(default_factory=EngineOptions)
    engine_for: Callable[[ModelFile], EngineOptions] | None = None
    score_for: Callable[[str], float | None] | None = None
    baseline_for: Callable[[LoadedModel], SpeedBaseline | None] | None = None
    health: WorkerHealth | None = None
    preload: ModelFile | None = None
    stop_grace: float = 20.0
    progress_interval: float = 0.1
    session: SessionOptions = field(default_factory=SessionOptions)


def new_envelope(clock: Clock = SYSTEM_CLOCK) -> str:
    """The envelope of a frame that is written now."""
    return envelope(uuid.uuid4(), clock.utc())


class Worker:
    """One worker on one machine, from ``run`` to ``stop``. Belongs to one event loop."""

    def __init__(
        self,
        backend: InferenceBackend,
        models: ModelSource,
        spool: ResultSpool,
        link: LinkOptions,
        policy: ReconnectPolicy,
        options: WorkerOptions,
        observer: Callable[[WorkerEvent], None] | None = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
        dial: Dial = dial_websocket,
    ) -> None:
        """Prepare; nothing happens before ``run``.

        Args:
            backend: What computes. Whoever made it closes it.
            models: What can be loaded.
            spool: What keeps results. Whoever opened it closes it.
            link: Where the coordinator is.
            policy: When to connect again.
            options: How to work.
            observer: Called with what happens, on the loop.
            clock: What tells the time.
            dial: What opens a connection.

        Raises:
            ConfigError: The coordinator's address cannot or should not be used.
            DeviceUnavailable: The device that the owner named is not to be had.
        """
        self._backend = backend
        self._models = models
        self._spool = spool
        self._options = options
        self._clock = clock
        self._observe = observer or (lambda event: None)
        self._blocks: dict[str, Block] = {}
        self._slots = Slots(options.max_concurrent_tasks)
        self._health = options.health or WorkerHealth(
            backend.capabilities(), options.engine, clock=clock
        )
        self._gate = ModelGate(backend, _options_for(options), self._health, options.baseline_for)
        self._recovery = DeviceRecovery(
            backend, self._health, self._gate, options.preload, self._on_recovery, clock
        )
        self._load_meter = LoadMeter(backend.cpu_seconds)
        self._background: set[asyncio.Task[None]] = set()
        self._session = Session(
            options.worker_id,
            self._describe(),
            self._score(),
            envelope=functools.partial(new_envelope, clock),
            options=options.session,
        )
        self._session.degraded = self._health.degraded
        self._max_frame = min(link.max_size, options.session.limits.max_bytes)
        self._connection = Connection(
            self._session, link, policy, self._on_event, clock=clock, dial=dial
        )
        self._delivery = Delivery(
            spool,
            self._session,
            self._max_frame,
            sent=self._connection.flush,
            recovered=self._go_on,
        )
        self._is_up = False
        self._stop_requests = 0
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._leave_by: float | None = None
        self._all_acknowledged = asyncio.Event()
        self._clock_is_compared = False
        # Bound once, and after a change of its level: the module's logger is made at each use.
        self._log = _log.bind()

    def _describe(self) -> WorkerCapabilities:
        return describe_worker(
            self._backend,
            self._models,
            self._options.engine,
            self._health,
            benchmark_score=self._score(),
            max_concurrent_tasks=self._options.max_concurrent_tasks,
        )

    def _score(self) -> float | None:
        if self._options.score_for is None:
            return self._options.benchmark_score
        return self._options.score_for(device_in_use(self._backend, self._health))

    # Life.

    async def run(self) -> None:
        """Work until ``stop``.

        Raises:
            LinkError: The link failed for good.
            ConfigError: The coordinator cannot be reached as configured.
        """
        self._delivery.take_over()
        if self._options.preload is not None:
            self._spawn(self._preload(self._options.preload))
        link = asyncio.ensure_future(self._connection.run())
        stopping = asyncio.ensure_future(self._stopping.wait())
        watching = asyncio.ensure_future(SuspendWatch(self._clock, self._on_sleep).run())
        try:
            await asyncio.wait({link, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not link.done():
                await self._wind_down()
                await asyncio.wait({link}, timeout=self._left())
            if link.done():
                link.result()
        finally:
            stopping.cancel()
            watching.cancel()
            await self._abandon(link)

    def stop(self) -> None:
        """Finish: ask for nothing more, give running blocks their grace, say goodbye.

        A second call ends the grace at once. May be called from a signal handler of the loop.
        """
        self._stop_requests += 1
        self._stopping.set()
        if self._stop_requests > 1:
            self._hurry.set()

    def reconfigure(self, options: WorkerOptions, link: LinkOptions) -> None:
        """Go on with other options.

        Limits count from now on, the way to run models from the next block on, the link's options
        from the next connection on, and the coordinator hears of it with the next registration.
        ``worker_id``, ``preload``, ``session`` and the longest message stay what they were.

        Raises:
            ConfigError: The coordinator's address cannot or should not be used.
            DeviceUnavailable: The device that the owner names now is not to be had.
        """
        self._connection.reconfigure(link)
        self._log = _log.bind()
        if options.engine != self._options.engine:
            self._gate.renew()
            self._health = options.health or WorkerHealth(
                self._backend.capabilities(), options.engine, clock=self._clock
            )
            self._gate.health = self._recovery.health = self._health
        self._gate.options_for = _options_for(options)
        self._slots.resize(options.max_concurrent_tasks)
        self._options = options
        self._look_at_health()
        self._session.capabilities = self._describe()
        self._session.benchmark_score = self._score()
        self._go_on()

    @property
    def session(self) -> Session:
        """The session, to look at."""
        return self._session

    async def _wind_down(self) -> None:
        """Let running blocks finish, hand back those that do not, and leave politely."""
        _log.info("worker_stopping", running=len(self._blocks))
        await self._until(self._blocks_done(), self._options.stop_grace, self._hurry)
        self._leave_by = asyncio.get_running_loop().time() + _LEAVE_WITHIN_S
        for block in list(self._blocks.values()):
            block.stop(ShuttingDown("the worker is stopping"))
        await self._until(self._blocks_done(), self._left(_LAST_CANCELLATION_S))
        self._note_acknowledged()
        if self._session.is_registered:
            patience = self._left(_LAST_ACKNOWLEDGEMENTS_S)
            await self._until(self._all_acknowledged.wait(), patience, self._hurry)
        await self._until(self._connection.close("shutdown"), self._left())

    def _left(self, limit: float = _LEAVE_WITHIN_S) -> float:
        """Seconds that are left of a stop, at most ``limit``.

        It is never nothing, so that what is ready can end.
        """
        if self._leave_by is None:
            return limit
        return max(0.1, min(limit, self._leave_by - asyncio.get_running_loop().time()))

    async def _blocks_done(self) -> None:
        while tasks := [block.task for block in self._blocks.values() if block.task is not None]:
            await asyncio.wait(tasks)

    async def _until(
        self,
        work: Coroutine[Any, Any, object],
        limit: float,
        interrupt: asyncio.Event | None = None,
    ) -> None:
        """Wait for ``work``, for ``limit`` seconds, or until ``interrupt``: whichever is first."""
        tasks = {asyncio.ensure_future(work)}
        if interrupt is not None:
            tasks.add(asyncio.ensure_future(interrupt.wait()))
        try:
            await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _abandon(self, link: asyncio.Task[None]) -> None:
        """End everything that is left, in the order that lets each part finish what it holds."""
        tasks = {block.task for block in self._blocks.values() if block.task is not None}
        for task in (link, *tasks):
            task.cancel()
        await self._settle({link, *tasks})
        if link.done() and not link.cancelled():
            link.exception()  # Taken: whoever wanted it has it by now.
        await self._recovery.close()
        await self._until(self._gate.close(), self._left())
        # Results that are acknowledged are forgotten before the spool is closed.
        await self._settle({*self._background, asyncio.ensure_future(self._delivery.close())})

    async def _settle(self, tasks: set[asyncio.Task[None]]) -> None:
        # An engine that hangs may not answer to cancellation either; the exit does not wait for it.
        if tasks:
            _, left = await asyncio.wait(set(tasks), timeout=self._left(_LAST_CANCELLATION_S))
            if left:
                _log.error("tasks_left_behind", count=len(left))

    async def _preload(self, model: ModelFile) -> None:
        try:
            async with self._gate.use(model) as load_ms:
                _log.info("model_ready", model_id=model.model_id, load_ms=round(load_ms, 1))
        except (Ai4allError, OSError) as exc:
            # The block that needs it will try again, and be answered with the reason.
            _log.warning("model_not_loaded", model_id=model.model_id, error=str(exc))
            self._look_at_health()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # What the session tells.

    def _on_event(self, event: SessionEvent) -> None:
        match event:
            case WorkAssigned(assignment):
                self._compare_clocks(assignment.timestamp)
                self._take(Block.received(assignment, self._clock))
            case AssignmentUnfit(block_id, error):
                _log.warning("assignment_unfit", block_id=block_id, code=error.code.value)
                self._spawn(self._refuse(block_id, never_begun(error)))
            case ResultAcknowledged(block_id, accepted, error_text):
                self._on_acknowledged(block_id, accepted, error_text)
            case HeartbeatDue():
                self._on_heartbeat_due()
            case SessionStarted(session_id):
                _log.info("registered", session_id=session_id, extensions=sorted(event.extensions))
                self._is_up = True
                self._clock_is_compared = False
                self._observe(LinkUp(session_id))
            case SessionEnded(code, reason):
                self._look_at_health()
                self._session.capabilities = self._describe()
                try:
                    self._session.benchmark_score = self._score()
                except (Ai4allError, OSError) as exc:
                    # The one before stands; it is no reason to stop.
                    _log.warning("score_not_read", error=str(exc))
                if self._is_up:
                    self._is_up = False
                    self._observe(LinkDown(reason or f"close code {code}"))
            case BlockCancelled(block_id, reason):
                _log.info("block_cancelled", block_id=block_id)
                if block_id in self._blocks:
                    self._blocks[block_id].stop(Cancelled(reason or "cancelled on request"))
            case _:
                _note(event)
        self._ask()

    def _compare_clocks(self, theirs: datetime | None) -> None:
        """Tell the owner, once a connection, when his clock is far from the coordinator's."""
        if theirs is None or self._clock_is_compared:
            return
        self._clock_is_compared = True
        ahead = (self._clock.utc() - theirs).total_seconds()
        if abs(ahead) >= _CLOCK_DIFFERENCE_S:
            _log.warning("clock_differs", ahead_of_coordinator_s=round(ahead))

    def _on_sleep(self, seconds: float) -> None:
        _log.warning("machine_slept", seconds=round(seconds, 1), running=len(self._blocks))
        for block in list(self._blocks.values()):
            block.machine_slept(seconds)
        self._connection.machine_slept()
        if self._health.promised != CPU:
            # Drivers do not always survive a sleep; asked now, no block finds it out.
            self._spawn(self._ask_for_devices())

    def _on_acknowledged(self, block_id: str, accepted: bool, error: str | None) -> None:
        if accepted:
            self._log.debug("result_accepted", block_id=block_id)
        else:
            _log.warning("result_refused", block_id=block_id, reason=error)
        self._observe(BlockAcknowledged(block_id, accepted, error))
        self._delivery.acknowledged(block_id)
        self._note_acknowledged()

    def _note_acknowledged(self) -> None:
        if not self._session.unacknowledged:
            self._all_acknowledged.set()
        else:
            self._all_acknowledged.clear()

    def _on_heartbeat_due(self) -> None:
        self._look_at_health()
        if not self._blocks:
            self._recovery.look_when_due()
        if not self._session.is_registered:
            return
        self._session.send_heartbeat(self._status(), describe_usage(self._backend.resource_usage()))

    def _look_at_health(self) -> None:
        self._health.look(self._backend.capabilities(), self._backend.loaded)
        reason = self._health.degraded
        if reason is not None and reason != self._session.degraded:
            self._observe(Degraded(reason, self._health.is_refusing))
        self._session.degraded = reason

    def _status(self) -> WorkerStatus:
        if self._delivery.problem is not None:
            return ErrorStatus(Error=ErrorDetail(message=self._delivery.problem))
        if self._health.is_refusing and not self._blocks:
            return ErrorStatus(Error=ErrorDetail(message=f"degraded: {self._health.degraded}"))
        # The first protocol can name one block; the oldest is the one most asked for.
        for block in self._blocks.values():
            return working(block.block_id, block.progress)
        return "Idle"

    def _ask(self) -> None:
        """Ask for as many blocks as there are free slots."""
        session = self._session
        free = self._options.max_concurrent_tasks - len(self._blocks)
        while (
            not self._stopping.is_set()
            and self._delivery.problem is None
            and not self._health.is_refusing
            and session.may_request_work
            and session.outstanding_requests < free
        ):
            session.send_request_work(self._connection.now())

    async def _ask_for_devices(self) -> None:
        try:
            await self._backend.devices()
        except Ai4allError as exc:
            _log.warning("devices_not_told", error=str(exc))
        self._look_at_health()

    def _on_recovery(self) -> None:
        self._look_at_health()
        self._go_on()

    def _go_on(self) -> None:
        self._ask()
        self._connection.flush()

    # One block.

    def _take(self, block: Block) -> None:
        if block.remaining is not None and block.remaining <= 0.0:
            self._session.pause_requests(self._connection.now() + _LATE_BLOCK_PAUSE_S)
        if self._stopping.is_set():
            refusal: ComputeError = ShuttingDown("the worker is stopping")
        elif self._delivery.problem is not None:
            refusal = Preempted(f"results cannot be kept here: {self._delivery.problem}")
        elif self._health.is_refusing:
            refusal = self._health.refusal()
        elif len(self._blocks) >= 2 * self._options.max_concurrent_tasks:
            # One block a slot may wait: a request that was asked twice is answered twice.
            refusal = Preempted("all slots are taken, and as many blocks wait")
        else:
            self._blocks[block.block_id] = block
            self._spool.begin(block.block_id, block.assignment.deadline.timestamp())
            block.task = asyncio.ensure_future(self._run(block))
            return
        self._spawn(self._refuse(block.block_id, block.failed(refusal)))

    async def _run(self, block: Block) -> None:
        assignment = block.assignment
        self._log.debug(
            "block_started",
            block_id=block.block_id,
            task_type=assignment.task_type.value,
            model_id=assignment.model_id,
        )
        self._observe(BlockStarted(block.block_id, assignment.task_type.value, assignment.model_id))
        stream = _ProgressStream(self._options.progress_interval, self._clock)
        begun = self._load_meter.mark() if self._health.is_watching else None

        def on_completion(completion: Completion) -> None:
            # What a GPU computes alone does not wait for the processor.
            ran = completion.fingerprint
            waits = CPU in ran.device.split("+")
            if begun is None or (waits and not self._load_meter.is_quiet_since(begun, ran.threads)):
                return
            self._health.saw(completion)

        def on_text(text: str, completion_tokens: int) -> None:
            self._observe(BlockText(block.block_id, text))
            stream.hold(text)
            if stream.is_due and self._session.takes_progress(block.block_id):
                self._session.send_progress(block.block_id, stream.held, completion_tokens)
                stream.sent()
                self._connection.flush()

        try:
            result = await run_block(
                block,
                self._backend,
                self._models,
                self._gate,
                self._slots,
                on_text,
                on_completion,
                self._max_frame,
            )
            has_begun = block.started_at is not None
            try:
                await self._answer(block.block_id, result, begun=has_begun)
            except Exception as exc:  # noqa: BLE001 - what cannot be sent is one more fault.
                result = block.failed(as_compute_error(exc))
                await self._delivery.submit(block.block_id, result)
        finally:
            self._blocks.pop(block.block_id, None)
        self._go_on()
        # Nobody waits for the log; the coordinator waits for the result, which is written now.
        asyncio.get_running_loop().call_soon(
            functools.partial(self._log_end, block.block_id, result, begun=has_begun)
        )

    async def _refuse(self, block_id: str, result: TaskResult) -> None:
        await self._answer(block_id, result)
        self._connection.flush()
        self._log_end(block_id, result)

    async def _answer(self, block_id: str, result: TaskResult, *, begun: bool = False) -> None:
        """Deliver what became of a block: refused where that can be said, else as a result.

        What it says goes out with the next ``flush``.
        """
        error = result.error
        self._observe(BlockFinished(block_id, result))
        if error is not None and not begun and self._session.send_decline(block_id, error):
            self._delivery.declined(block_id)
        else:
            await self._delivery.submit(block_id, result)

    def _log_end(self, block_id: str, result: TaskResult, *, begun: bool = False) -> None:
        self._log.info(
            "block_finished" if begun else "block_refused",
            block_id=block_id,
            success=result.success,
            code=result.error.code.value if result.error is not None else None,
            total_ms=round(result.metrics.total_time_ms, 1),
        )


def _options_for(options: WorkerOptions) -> Callable[[ModelFile], EngineOptions]:
    return options.engine_for or (lambda _: options.engine)


class _ProgressStream:
    """Gathers text so that a fast model does not send a frame for each token."""

    def __init__(self, interval: float, clock: Clock) -> None:
        self._interval = interval
        self._clock = clock
        self._held: list[str] = []
        self._sent_at = self._clock.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the interval has passed since the last frame."""
        return self._clock.monotonic() - self._sent_at >= self._interval

    @property
    def held(self) -> str:
        """The text since then."""
        return "".join(self._held)

    def hold(self, text: str) -> None:
        """Take text."""
        self._held.append(text)

    def sent(self) -> None:
        """The held text is on its way."""
        self._held.clear()
        self._sent_at = self._clock.monotonic()


def _note(event: SessionEvent) -> None:
    """Log what asks for nothing else."""
    match event:
        case BadFrame(problem):
            _log.warning("bad_frame", problem=problem)
        case UnknownFrame(kind):
            _log.warning("unknown_frame", type=kind)
        case CoordinatorError(code, message):
            _log.warning("coordinator_error", code=code, message=message)
        case DuplicateAssignment(block_id, resent):
            _log.warning("duplicate_assignment", block_id=block_id, resent=resent)
        case RegistrationRefused(code, message):
            _log.error("registration_refused", code=code, message=message)
        case VersionRefused(theirs, ours):
            _log.error("version_refused", theirs=theirs, ours=ours)
        case Drained(reason):
            _log.info("drained", reason=reason)
        case CloseLink(code_number, reason):
            _log.info("closing_link", code=code_number, reason=reason)
        case WorkDue():
            _log.debug("work_due")
