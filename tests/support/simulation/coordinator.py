"""A coordinator without a socket: the embedded one's ledger and reading of frames, on virtual time.

It keeps the rules of ``ai4all.coordinator.server`` and adds what a coordinator can do wrong: lose
its memory, lose an acknowledgement, say everything twice, give a block twice, accept and close.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from ai4all.coordinator.history import EventKind
from ai4all.coordinator.ledger import LeaseRules, Ledger, Outcome
from ai4all.coordinator.links import Violation, WorkerLink, read_frame
from ai4all.coordinator.results import digest_of
from ai4all.coordinator.tasks import TaskSpec
from ai4all.protocol.codec import DEFAULT_LIMITS, encode
from ai4all.protocol.messages import (
    Assignment,
    Cancel,
    ClientMessage,
    Decline,
    Drain,
    Error,
    Goodbye,
    Heartbeat,
    Message,
    NoWork,
    Progress,
    Reconcile,
    Register,
    Registered,
    RequestWork,
    ResultAck,
    SubmitResult,
    envelope,
)
from simulation.history import Kind, Record
from simulation.network import Link, Refusal
from simulation.world import EPOCH

if TYPE_CHECKING:
    from simulation.world import Plan, World

_SILENT_INTERVALS: Final = 3
_REGISTER_WITHIN_S: Final = 10.0
_REPLACED: Final = 4001
_POLICY: Final = 1008


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorOptions:
    """How a coordinator is.

    Attributes:
        heartbeat_ms: Told to workers.
        retry_ms: Told to workers for whom there is nothing.
        extensions: What it speaks.
        strict_seed: It knows the first protocol only.
        rules: Leases and retries.
    """

    heartbeat_ms: int
    retry_ms: int
    extensions: frozenset[str]
    strict_seed: bool
    rules: LeaseRules


class Coordinator:
    """The coordinator, through all its lives.

    Attributes:
        is_down: It refuses connections.
        refuses: How it refuses handshakes, or None.
        slams: It accepts connections and closes them.
        rejects: It answers ``Register`` with an error.
        is_stuck: It reads nothing; what comes is kept for later.
        acks_to_lose: Acknowledgements that are yet to be left out.
        frames_to_double: Frames that are yet to be sent twice.
        outcomes: How blocks ended.
        tasks: All tasks there are.
        links: Registered connections by worker.
    """

    def __init__(
        self, world: World, options: CoordinatorOptions, history: Callable[[Record], None]
    ) -> None:
        self.is_down = False
        self.refuses: Refusal | None = None
        self.slams = False
        self.rejects = False
        self.acks_to_lose = 0
        self.frames_to_double = 0
        self.outcomes: dict[str, Outcome] = {}
        self.tasks: dict[str, TaskSpec] = {}
        self.links: dict[str, WorkerLink] = {}
        self.options = options
        self._world = world
        self._history = history
        self._ledger = Ledger(options.rules)
        # The journal: who was given what, oldest first.
        self._given: list[tuple[str, str]] = []
        self._open: dict[Link, WorkerLink | None] = {}
        self._stuck: deque[tuple[Link, str]] | None = None
        self._number = 0
        self._timer: Plan | None = None
        self._timer_at = 0.0

    # For the simulation.

    @property
    def unfinished(self) -> int:
        """Blocks that have not ended."""
        return self._ledger.unfinished

    def held_by(self, worker: str) -> list[str]:
        """Blocks that a worker has."""
        return self._ledger.held_by(worker)

    def add(self, task: TaskSpec, expires_in: float | None = None) -> None:
        """Add a task."""
        assert task.block_id is not None
        self.tasks[task.block_id] = task
        self._tell(Kind.ADDED, block=task.block_id)
        self._ledger.add(
            task, expires_at=None if expires_in is None else self._world.now + expires_in
        )
        self._after()

    def cancel(self, block_id: str) -> None:
        """Give a block up."""
        if block_id in self.tasks and block_id not in self.outcomes:
            self._ledger.cancel(block_id, "not wanted", self._world.now)
            self._after()

    def drain(self) -> bool:
        """Ask all who understand to ask for no more. Returns whether there was any."""
        who = [link for link in self.links.values() if "drain" in link.extensions]
        for worker_link in who:
            self._say(worker_link, Drain(reason="maintenance"))
        return bool(who)

    def give_again(self, worker: str) -> bool:
        """Send a worker what it has already, if it has anything."""
        worker_link = self.links.get(worker)
        held = self._ledger.held_by(worker)
        if worker_link is None or not held:
            return False
        self._tell(Kind.GIVEN, worker, held[0])
        self._assign(worker_link, held[0], self.options.rules.lease)
        return True

    def babble(self, worker: str, frame: str) -> bool:
        """Say something that is not in the protocol to a worker, if it is there."""
        link = self._link_of(worker)
        if link is None:
            return False
        self._world.note("coordinator", f"babbles to {worker}")
        link.say(frame)
        return True

    def stick(self) -> bool:
        """Read nothing for a while. Returns whether it did before."""
        if self._stuck is not None or self.is_down:
            return False
        self._stuck = deque()
        return True

    def unstick(self) -> None:
        """Read again, first what has come meanwhile."""
        waiting, self._stuck = self._stuck, None
        for link, frame in waiting or ():
            self.heard(link, frame)

    def go_down(self, memory: str) -> None:
        """End, with all connections.

        Args:
            memory: "all": stopped and started in one process; "journal": what was on disk;
                "none": it knows of no lease any more.
        """
        self._world.note("coordinator", f"goes down, remembers {memory}")
        self.is_down = True
        self._stuck = None
        for link in list(self._open):
            self._forget_link(link, "the coordinator went down")
            link.cut()
        if memory == "all":
            return
        self._ledger = Ledger(self.options.rules)
        for block_id, task in self.tasks.items():
            if memory == "journal" or block_id not in self.outcomes:
                self._ledger.add(task)
        if memory == "none":
            self._tell(Kind.FORGOT)
            self._given.clear()
        for block_id, worker in self._given:
            self._ledger.restore_given(block_id, worker, self._world.now)
        for outcome in self.outcomes.values():
            if memory == "journal":
                self._ledger.restore_outcome(outcome, digest_of(outcome.result))
        self._ledger.events()

    def come_up(self) -> None:
        """Listen again."""
        if self.is_down:
            self._world.note("coordinator", "is up")
            self.is_down = False
            self._after()

    # What the network tells.

    def refusal(self) -> Refusal | None:
        """How a handshake ends now."""
        return Refusal() if self.is_down else self.refuses

    def opened(self, link: Link) -> None:
        """A connection was made."""
        if self.is_down:
            link.cut()
            return
        self._open[link] = None
        if self.slams:
            self._close(link, 1013, "try again later")
            return

        def give_up() -> None:
            if self._open.get(link, link) is None:
                self._close(link, _POLICY, "no Register came")

        self._world.later(_REGISTER_WITHIN_S, give_up)

    def heard(self, link: Link, frame: str) -> None:
        """A message came."""
        if link not in self._open:
            return
        if self._stuck is not None:
            self._stuck.append((link, frame))
            return
        worker_link = self._open[link]
        try:
            message = read_frame(
                frame, worker_link, DEFAULT_LIMITS, strict_seed=self.options.strict_seed
            )
        except Violation as exc:
            self._tell(Kind.VIOLATION, link.life.name, detail=exc.problem)
            self._send(link, Error(code=exc.code, message=exc.problem))
            return
        if worker_link is None:
            assert isinstance(message, Register)
            self._register(link, message)
        else:
            worker_link.last_heard = self._world.now
            self._handle(link, worker_link, message, frame)
        self._after()

    def ended(self, link: Link, reason: str) -> None:
        """A connection is gone."""
        self._forget_link(link, reason)
        self._after()

    # What the messages mean.

    def _register(self, link: Link, message: Register) -> None:
        worker = message.worker_id
        self._world.note("coordinator", f"< {worker} Register")
        if self.rejects:
            self._send(link, Error(code="busy", message="no room"))
            return
        older = self._link_of(worker)
        if older is not None:
            self._forget_link(older, "replaced")
            older.close_by_coordinator(_REPLACED, "a newer connection took over")
        self._number += 1
        spoken = self.options.extensions & frozenset(message.extensions or ())
        worker_link = WorkerLink(
            socket=link,  # type: ignore[arg-type]
            worker_id=worker,
            session_id=f"s-{self._number}",
            capabilities=message.capabilities,
            benchmark_score=message.benchmark_score,
            extensions=frozenset() if self.options.strict_seed else spoken,
            last_heard=self._world.now,
        )
        self._open[link] = self.links[worker] = worker_link
        self._ledger.returned(worker)
        self._say(
            worker_link,
            Registered(
                session_id=worker_link.session_id,
                heartbeat_interval_ms=self.options.heartbeat_ms,
                extensions=None if self.options.strict_seed else sorted(worker_link.extensions),
            ),
        )

    def _handle(
        self, link: Link, worker_link: WorkerLink, message: ClientMessage, frame: str
    ) -> None:
        worker, now, ledger = worker_link.worker_id, self._world.now, self._ledger
        digest = ""
        block = getattr(message, "block_id", "")
        if isinstance(message, SubmitResult):
            digest = hashlib.sha256(frame.encode()).hexdigest()
        said = " ".join(filter(None, (message.type, block, digest[:8])))
        self._world.note("coordinator", f"< {worker} {said}")
        match message:
            case Heartbeat():
                worker_link.status = message.status
            case RequestWork():
                self._give(worker_link)
            case SubmitResult():
                error = message.result.error
                code = error.code.value if error is not None else ""
                self._tell(Kind.SUBMITTED, worker, block, digest, code)
                verdict = ledger.submit(
                    worker, block, message.result, digest_of(message.result), now
                )
                self._after_events()
                if self.acks_to_lose > 0:
                    self.acks_to_lose -= 1
                    self._world.note("coordinator", f"loses the ack of {block}")
                    return
                self._say(
                    worker_link,
                    ResultAck(block_id=block, accepted=verdict.accepted, error=verdict.error),
                )
            case Decline():
                self._tell(Kind.DECLINED, worker, block, detail=message.error.code.value)
                ledger.decline(worker, block, message.error, now)
            case Progress():
                pass
            case Reconcile():
                ledger.reconcile(
                    worker,
                    worker_link.session_id,
                    message.running,
                    message.unacknowledged,
                    now,
                )
            case Goodbye():
                for left in message.abandoned:
                    self._tell(Kind.ABANDONED, worker, left)
                ledger.handed_back(worker, message.abandoned, now)
            case Register():
                raise AssertionError("refused when it was read")

    def _give(self, worker_link: WorkerLink) -> None:
        assigned = self._ledger.assign(
            worker_link.worker_id,
            worker_link.session_id,
            self._world.now,
            offers=worker_link.capabilities.supported_tasks,
            capacity=worker_link.capabilities.max_concurrent_tasks or 1,
        )
        if assigned is None:
            self._say(worker_link, NoWork(retry_after_ms=self.options.retry_ms))
            return
        self._given.append((assigned.block_id, worker_link.worker_id))
        self._after_events()
        self._tell(Kind.GIVEN, worker_link.worker_id, assigned.block_id)
        self._assign(worker_link, assigned.block_id, assigned.seconds)

    def _assign(self, worker_link: WorkerLink, block_id: str, seconds: float) -> None:
        task = self.tasks[block_id]
        self._say(
            worker_link,
            Assignment(
                block_id=block_id,
                task_type=task.task_type,
                input=task.input,
                deadline=self._utc() + timedelta(seconds=seconds),
                model_id=task.model_id,
            ),
        )

    # What follows.

    def _after(self) -> None:
        self._after_events()
        self._arm()

    def _after_events(self) -> None:
        for event in self._ledger.events():
            worker, block = event.worker_id or "", event.block_id or ""
            match event.kind:
                case EventKind.KEPT:
                    self._tell(Kind.KEPT, worker, block)
                case EventKind.REQUEUED:
                    self._tell(Kind.REQUEUED, worker, block, detail=event.detail)
                case EventKind.DELIVERED | EventKind.FAILED:
                    self.outcomes[block] = event.data["outcome"]
                    is_done = event.kind is EventKind.DELIVERED
                    kind = Kind.DELIVERED if is_done else Kind.FAILED
                    self._tell(kind, worker, block, detail=event.detail)
                    self._world.note("coordinator", f"{block} {kind} {event.detail}".rstrip())
                case EventKind.WITHDRAWN:
                    worker_link = self.links.get(worker)
                    if worker_link is not None and "cancel" in worker_link.extensions:
                        self._say(worker_link, Cancel(block_id=block, reason=event.detail))

    def _arm(self) -> None:
        times = [link.last_heard + self._patience() for link in self.links.values()]
        if (due := self._ledger.next_deadline()) is not None:
            times.append(due)
        if not times or self.is_down:
            return
        first = min(times)
        if self._timer is not None and not self._timer.is_over:
            if self._timer_at <= first:
                return
            self._timer.call_off()
        self._timer_at = first
        self._timer = self._world.at(first, self._expire)

    def _expire(self) -> None:
        if self.is_down:
            return
        now = self._world.now
        for worker, worker_link in list(self.links.items()):
            if worker_link.last_heard + self._patience() <= now:
                link = self._link_of(worker)
                assert link is not None
                self._world.note("coordinator", f"gives {worker} up")
                del self.links[worker]
                del self._open[link]
                self._ledger.disconnected(worker, now, grace=0.0)
                link.cut()
        self._ledger.expire(now)
        self._after()

    def _patience(self) -> float:
        return _SILENT_INTERVALS * self.options.heartbeat_ms / 1000.0

    def _forget_link(self, link: Link, reason: str) -> None:
        worker_link = self._open.pop(link, None)
        if worker_link is None or self.links.get(worker_link.worker_id) is not worker_link:
            return
        self._world.note("coordinator", f"lost {worker_link.worker_id}: {reason}")
        del self.links[worker_link.worker_id]
        self._ledger.disconnected(worker_link.worker_id, self._world.now)

    def _close(self, link: Link, code: int, reason: str) -> None:
        self._forget_link(link, reason)
        link.close_by_coordinator(code, reason)

    def _link_of(self, worker: str) -> Link | None:
        wanted = self.links.get(worker)
        if wanted is None:
            return None
        return next(link for link, one in self._open.items() if one is wanted)

    def _say(self, worker_link: WorkerLink, message: Message) -> None:
        link = worker_link.socket
        assert isinstance(link, Link)
        block = getattr(message, "block_id", "")
        said = " ".join(filter(None, (message.type, block)))
        self._world.note("coordinator", f"> {worker_link.worker_id} {said}")
        self._send(link, message)

    def _send(self, link: Link, message: Message) -> None:
        under = None
        if not self.options.strict_seed:
            self._number += 1
            under = envelope(f"c-{self._number}", self._utc())
        frame = encode(message, under)
        acknowledged = message.block_id if isinstance(message, ResultAck) else None
        link.say(frame, acknowledged)
        if self.frames_to_double > 0:
            self.frames_to_double -= 1
            if isinstance(message, Assignment):
                self._tell(Kind.GIVEN, link.life.name, message.block_id)
            link.say(frame, acknowledged)

    def _utc(self) -> datetime:
        return datetime.fromtimestamp(EPOCH + self._world.now, UTC)

    def _tell(
        self, kind: Kind, worker: str = "", block: str = "", digest: str = "", detail: str = ""
    ) -> None:
        self._history(Record(self._world.now, kind, worker, block, digest, detail))
