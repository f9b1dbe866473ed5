"""A volunteer's machine: clocks, a disk, and the worker's process, which may die and return."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ujson

from ai4all.backend.base import EngineOptions
from ai4all.clock import Clock
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.errors import SpoolError
from ai4all.protocol.dialing import LinkOptions
from ai4all.worker import Worker, WorkerOptions
from simulation.disk import CrashPoint, Disk, Files, VirtualWriter, digest_of
from simulation.engine import SeededEngine, Store
from simulation.history import LEFT_RUNNING, Kind, Record
from simulation.network import Link, Network
from simulation.virtual_loop import Livelock, VirtualLoop
from simulation.world import EPOCH, World

# A worker that is asked to stop has this long, in seconds; goal O2.
STOPS_WITHIN_S: Final = 30.0

# How late a heartbeat may be, in seconds of the machine's own time.
_HEARTBEAT_SLACK_S: Final = 0.5

# Attempts to connect in a minute: far more than patience makes, far fewer than a hot loop.
_MOST_DIALS: Final = 25

_LINK: Final = LinkOptions(url="wss://coordinator.example")

# How frames begin.
_RESULT: Final = '{"type":"SubmitResult"'
_HEARTBEAT: Final = '{"type":"Heartbeat"'
_REQUEST: Final = '{"type":"RequestWork"'

# How a worker hands back what an earlier process left running.
_LEFT_RUNNING: Final = "the worker's process ended"

# A sleep this long breaks links, and is noticed this soon, in seconds of the machine's own time.
_BREAKING_SLEEP_S: Final = 6.0
_NOTICED_WITHIN_S: Final = 3.0

_SUPERVISOR_S: Final = 5.0
_MOST_ROUNDS_TO_DIE: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """How a machine's worker is set up."""

    max_concurrent_tasks: int = 1
    stop_grace: float = 20.0


class MachineClock(Clock):
    """The clocks of a machine, as far as the world lets them."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        # A process that is dead ends on a time of its own.
        self.ahead = 0.0

    def monotonic(self) -> float:
        return self._machine.world.now - self._machine.slept + self.ahead

    def boottime(self) -> float:
        return self._machine.world.now + self.ahead

    def wall(self) -> float:
        machine = self._machine
        if machine.wall_stands_at is not None:
            since, at = machine.wall_stands_at
            return at + machine.world.now - since
        return EPOCH + machine.world.now + machine.wall_offset


class Machine:
    """One machine and its worker.

    Attributes:
        slept: Seconds that it has been suspended so far.
        wall_offset: By how much its wall clock is wrong.
        wall_stands_at: The world's time at which the wall clock was set, and to what.
        life: The process that runs now.
        trouble: Chance that a generation or a load fails.
        pace: Factor on the time that its engine takes.
        models: Its models.
        awake_from: When its last sleep ends or ended.
        faults: What went wrong that must not, here or on another machine.
        is_wanted: Whether its supervisor starts the worker again.
        lives: How often it was started.
        deaths: How it was killed, each time.
    """

    def __init__(
        self,
        world: World,
        name: str,
        folder: Path,
        network: Network,
        options: MachineOptions,
        history: Callable[[Record], None],
        faults: list[str],
    ) -> None:
        self.world = world
        self.name = name
        self.network = network
        self.options = options
        self.disk = Disk(world, name, folder, history)
        self.rng = world.chance(f"machine/{name}")
        self.slept = 0.0
        self.wall_offset = 0.0
        self.wall_stands_at: tuple[float, float] | None = None
        self.trouble = 0.0
        self.pace = self.rng.choice((0.2, 1.0, 1.0, 8.0))
        self.models = Store()
        self.life: Life | None = None
        self.faults = faults
        self.is_wanted = True
        self.lives = 0
        self.deaths: list[str] = []
        self.awake_from = 0.0
        self._asleep_since: float | None = None

    def fault(self, text: str) -> None:
        """Write down what must not happen."""
        self.faults.append(f"{self.world.now:.3f} {self.name}: {text}")

    # What is done to it.

    def start(self) -> None:
        """Start the worker, if it does not run."""
        if self.life is None and self.is_wanted and self._asleep_since is None:
            self.lives += 1
            self.world.note(self.name, f"starts its worker, number {self.lives}")
            self.life = Life(self)

    def restart_later(self, least: float, most: float) -> None:
        """Start the worker again after a while."""
        self.world.later(self.rng.uniform(least, most), self.start)

    def stop(self) -> None:
        """Ask the worker to stop, as SIGTERM does."""
        if self.life is not None:
            self.life.stop()

    def kill(self, *, power: bool) -> bool:
        """Kill the worker, or pull the machine's plug. Returns whether one ran."""
        if self.life is None:
            return False
        self.life.crash("power cut" if power else "killed", power=power)
        self.bury()
        return True

    def reload(self, max_concurrent_tasks: int) -> None:
        """Have the worker read settings that have changed, as SIGHUP does."""
        self.options = dataclasses.replace(self.options, max_concurrent_tasks=max_concurrent_tasks)
        if self.life is not None:
            self.life.reload()

    @property
    def is_asleep(self) -> bool:
        """Whether it sleeps."""
        return self._asleep_since is not None

    def suspend(self, seconds: float) -> bool:
        """Let the machine sleep. Returns whether it was awake."""
        if self._asleep_since is not None:
            return False
        self.world.note(self.name, f"sleeps for {seconds:.0f} s")
        self._asleep_since = self.world.now
        self.awake_from = self.world.now + seconds
        self.world.at(self.awake_from, self.wake)
        return True

    def wake(self) -> None:
        """End a sleep."""
        if self._asleep_since is not None:
            seconds = self.world.now - self._asleep_since
            self.slept += seconds
            self._asleep_since = None
            self.world.note(self.name, "wakes up")
            self.start()
            if seconds >= _BREAKING_SLEEP_S and self.life is not None:
                self._expect_new_links(self.life)

    def _expect_new_links(self, life: Life) -> None:
        """After a sleep, what was open is dead, whatever it looks like."""
        slept, old = self.slept, [link for link in life.links if link.close_code is None]

        def look() -> None:
            if self.slept > slept or self._asleep_since is not None or self.life is not life:
                return
            for link in old:
                if link.close_code is None:
                    self.fault(f"{link.name} is kept though the machine slept")

        self.world.later(_NOTICED_WITHIN_S, look)

    # The world's ``Sleeper``.

    def run_ready(self) -> None:
        life = self.life
        if life is None or self._asleep_since is not None or not life.loop.is_due:
            return
        life.run_ready()
        if life.is_dead:
            self.bury()
        elif life.is_over:
            self.life = None
            self._ended(life)

    def next_wake(self) -> float | None:
        life = self.life
        if life is None or self._asleep_since is not None:
            return None
        timer = life.loop.next_timer()
        if timer is None:
            return self.world.now if not life.loop.is_idle else None
        when = timer + self.slept
        # As the process computes its time, which must not be a rounding error too early.
        while when - self.slept < timer:
            when = math.nextafter(when, math.inf)
        return when

    def bury(self) -> None:
        """Let the process that died end without touching anything."""
        life, self.life = self.life, None
        if life is not None:
            life.decay()
            self.restart_later(1.0, 30.0)

    def _ended(self, life: Life) -> None:
        error = life.error
        self.world.note(self.name, f"its worker ends{f': {error!r}' if error else ''}")
        if isinstance(error, SpoolError) and self.disk.is_full:
            self.restart_later(_SUPERVISOR_S, _SUPERVISOR_S)
        elif error is not None:
            self.fault(f"the worker ended by itself: {error!r}")
        elif not life.stop_asked:
            self.fault("the worker ended without being asked")
        if life.loop.faults:
            self.fault(f"nobody caught: {life.loop.faults[0]}")
        self.restart_later(1.0, 60.0)


class Life:
    """One run of the worker's process.

    Attributes:
        crash_point: Where it is to die, if anywhere.
        writer: What writes to its spool; set by the disk.
        is_dead: It was killed; nothing that it does counts any more.
        error: What it ended with.
        dials: When it tried to connect, of late.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.name = machine.name
        self.clock = MachineClock(machine)
        rng = machine.world.chance(f"life/{machine.name}/{machine.lives}")
        self._rng = rng
        self.loop = VirtualLoop(self.clock.monotonic, lambda: rng.uniform(0.0001, 0.003))
        self.crash_point: CrashPoint | None = None
        self.writer: VirtualWriter | None = None
        self.worker: Worker | None = None
        self.is_dead = False
        self.is_over = False
        self.error: BaseException | None = None
        self.stop_asked = 0
        self.links: list[Link] = []
        self.dials: deque[float] = deque(maxlen=_MOST_DIALS + 1)
        # What the process before left running and nobody has been told of.
        self._left_running: set[str] = set()
        self._last_beat: dict[Link, float] = {}
        self._stop_at: float | None = None
        self._main = self.loop.create_task(self._run())
        self._main.add_done_callback(self._done)

    def _options(self) -> WorkerOptions:
        machine = self.machine
        return WorkerOptions(
            worker_id=self.name,
            max_concurrent_tasks=machine.options.max_concurrent_tasks,
            engine=EngineOptions(n_slots=machine.options.max_concurrent_tasks),
            preload=None if machine.models.is_empty else machine.models.get("tiny"),
            stop_grace=machine.options.stop_grace,
        )

    async def _run(self) -> None:
        machine = self.machine
        async with contextlib.AsyncExitStack() as held:
            spool = await held.enter_async_context(machine.disk.open(self))
            self._left_running = {block for block in spool.interrupted if not spool.has(block)}
            engine = SeededEngine(self._rng, self.clock, lambda: machine.trouble, machine.pace)
            await held.enter_async_context(engine)
            self.worker = Worker(
                engine,
                machine.models,
                spool,
                _LINK,
                Attempts(Backoff(rng=self._rng)),
                self._options(),
                clock=self.clock,
                dial=self._dial,
            )
            if self.stop_asked:
                return
            await self.worker.run()

    async def _dial(self, options: LinkOptions) -> Link:
        now = self.clock.monotonic()
        self.dials.append(now)
        if len(self.dials) > _MOST_DIALS and now - self.dials[0] < 60.0:
            self.machine.fault(f"connected {len(self.dials)} times within a minute")
            self.dials.clear()
        link = await self.machine.network.dial(self, options)
        self.links = [one for one in self.links if one.close_code is None]
        self.links.append(link)
        return link

    def _done(self, task: asyncio.Task[None]) -> None:
        self.is_over = True
        if not task.cancelled():
            self.error = task.exception()
        elif not self.is_dead:
            self.error = asyncio.CancelledError()
        if self._stop_at is not None and not self.is_dead:
            took = self.clock.monotonic() - self._stop_at
            if took > STOPS_WITHIN_S:
                self.machine.fault(f"took {took:.1f} s to stop")

    # What happens to it.

    def note(self, what: str) -> None:
        """Add to the trace."""
        if not self.is_dead:
            self.machine.world.note(self.name, what)

    def run_ready(self) -> None:
        """Run what is due."""
        try:
            self.loop.run_ready()
        except Livelock as exc:
            self.machine.fault(f"does not stop computing: {exc}")
            self.crash("livelock", power=False)

    def sent(self, link: Link, message: str) -> None:
        """A message goes out: a result for the history, a heartbeat on time or late.

        Nobody asks for work before it told of all that was lost.
        """
        if message.startswith(_RESULT):
            self._sent_result(message)
        elif message.startswith(_HEARTBEAT):
            self._sent_heartbeat(link)
        elif message.startswith(_REQUEST) and self._left_running:
            self.machine.fault(f"asks for work and keeps quiet of {sorted(self._left_running)}")

    def _sent_result(self, message: str) -> None:
        frame = ujson.loads(message)
        error = frame["result"]["error"]
        code = "" if error is None else error["code"]
        if error is not None and error["message"].startswith(_LEFT_RUNNING):
            code = LEFT_RUNNING
            self._left_running.discard(frame["block_id"])
        digest = digest_of(message.encode())
        self.machine.disk.tell(Kind.SENT, frame["block_id"], digest, code)

    def _sent_heartbeat(self, link: Link) -> None:
        now = self.clock.monotonic()
        last = self._last_beat.get(link)
        interval = self.machine.network.heartbeat_s
        if last is not None and now - last > interval + _HEARTBEAT_SLACK_S:
            self.machine.fault(f"a heartbeat came {now - last:.1f} s after the one before")
        self._last_beat = {link: now}

    def stop(self) -> None:
        """Ask it to stop; asked again, it hurries."""
        self.note("is asked to stop")
        self.stop_asked += 1
        if self._stop_at is None:
            self._stop_at = self.clock.monotonic()
        if self.worker is not None:
            # As a signal handler of the loop does.
            self.loop.call_soon(self.worker.stop)

    def reload(self) -> None:
        """Go on with the machine's options as they are now."""
        self.note("reads its settings again")
        worker = self.worker
        if worker is not None:
            self.loop.call_soon(lambda: worker.reconfigure(self._options(), _LINK))

    def crash(self, why: str, *, power: bool, left: Files | None = None) -> None:
        """Die here and now.

        Args:
            why: For the trace.
            power: The machine died with it: only what was synced is left, and nobody is told.
            left: What is left on the disk, if that is known.
        """
        if self.is_dead or self.is_over:
            return
        self.note(f"dies: {why}")
        self.machine.deaths.append(why)
        self.is_dead = self.loop.halted = True
        if self.writer is not None:
            self.writer.die(power, left)
        for link in self.links:
            if link.close_code is None:
                link.die_with_worker(power)

    def decay(self) -> None:
        """Let the tasks of a dead process end, each in peace and without effect."""
        loop = self.loop
        loop.halted = False
        for task in loop.pending_tasks():
            task.cancel()
        for _ in range(_MOST_ROUNDS_TO_DIE):
            loop.run_ready()
            timer = loop.next_timer()
            if self._main.done() or timer is None:
                break
            self.clock.ahead += max(0.0, timer - self.clock.monotonic()) + 1e-6
        for task in loop.pending_tasks():
            task.cancel()
        loop.run_ready()
        loop.drop_timers()
