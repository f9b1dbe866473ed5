"""One run: a coordinator, its workers, a load of blocks, and faults, all from one seed."""

from __future__ import annotations

import gc
import itertools
import logging
import random
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import psutil
import structlog

from ai4all.coordinator.ledger import LeaseRules
from ai4all.coordinator.tasks import TaskSpec
from ai4all.protocol.messages import EXTENSIONS
from ai4all.types.task import TaskType
from simulation.chaos import Chaos
from simulation.checker import Checker
from simulation.coordinator import Coordinator, CoordinatorOptions
from simulation.history import Record
from simulation.machine import Machine, MachineOptions
from simulation.network import Network
from simulation.virtual_loop import generators_closed_by_their_loop
from simulation.world import World

# After the last fault all work must be done within so many seconds of virtual time.
DONE_WITHIN_S: Final = 1800.0

# Faults stop after this much virtual time even where little has happened: ten days of sleep count.
_LONGEST_S: Final = 40 * 86_400.0

# So long after the last fault comes a last block for each worker.
_PROBED_AFTER_S: Final = 30.0

_FASTEST_DISK: Final = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a run.

    Attributes:
        seed: Where it came from.
        events: Things that happened.
        seconds: Virtual time that passed.
        blocks: Blocks there were.
        delivered: Blocks whose result was accepted.
        lives: Times that a worker was started.
        healed_in: Seconds from the last fault until all work was done.
        deaths: How workers were killed, and how often.
        chaos: How often each fault happened.
        faults: What must not be.
        digest: Of the trace.
        trace: What happened, a line each.
        history: What happened to blocks and results.
    """

    seed: int
    events: int
    seconds: float
    blocks: int
    delivered: int
    lives: int
    healed_in: float
    deaths: dict[str, int]
    chaos: dict[str, int]
    faults: list[str]
    digest: str
    trace: list[str] = field(repr=False)
    history: list[Record] = field(repr=False)


def simulate(
    seed: int,
    events: int = 200,
    *,
    only: tuple[str, ...] = (),
    workers: int | None = None,
    done_within: float = DONE_WITHIN_S,
) -> Run:
    """Run one seed.

    Args:
        seed: From it all follows.
        events: Things that are to happen before the faults stop.
        only: Names of faults to choose from; all by default.
        workers: How many; by default as the seed has it.
        done_within: Seconds of virtual time after the last fault within which all must be done.
    """
    folder = _FASTEST_DISK if _FASTEST_DISK.is_dir() else None
    with tempfile.TemporaryDirectory(dir=folder, prefix="ai4all-sim-") as name, _determined(seed):
        return Simulation(seed, Path(name), only, workers).run(events, done_within)


class Simulation:
    """The world of one run."""

    def __init__(self, seed: int, folder: Path, only: tuple[str, ...], workers: int | None) -> None:
        self.world = world = World(seed)
        self.history: list[Record] = []
        self._checker = Checker()
        self._faults: list[str] = []
        self._rng = rng = world.chance("setting")
        options = CoordinatorOptions(
            heartbeat_ms=rng.choice((5_000, 10_000, 30_000)),
            retry_ms=rng.choice((1_000, 5_000, 30_000)),
            extensions=frozenset(
                rng.choice((EXTENSIONS, (), rng.sample(EXTENSIONS, rng.randint(1, 5))))
            ),
            strict_seed=rng.random() < 0.2,
            rules=LeaseRules(lease=rng.choice((20.0, 60.0, 300.0)), grace=rng.choice((5.0, 60.0))),
        )
        self.coordinator = Coordinator(world, options, self._record)
        self.network = Network(world, self.coordinator, self._record, options.heartbeat_ms / 1000.0)
        self.machines = [
            Machine(
                world,
                f"w{number}",
                _made(folder / f"w{number}"),
                self.network,
                MachineOptions(
                    max_concurrent_tasks=rng.choice((1, 1, 2, 3)),
                    stop_grace=rng.choice((0.5, 5.0, 20.0)),
                ),
                self._record,
                self._faults,
            )
            for number in range(workers or rng.choice((1, 1, 1, 2, 3)))
        ]
        world.sleepers.extend(self.machines)
        self._numbers = itertools.count(1)
        self._is_loading = True
        self._every = rng.choice((0.5, 5.0, 20.0))
        for machine in self.machines:
            machine.start()
        self.chaos = Chaos(world, self.network, self.coordinator, self.machines, only)
        self._load()

    def _record(self, record: Record) -> None:
        self.history.append(record)
        self._checker.read(record)

    def _load(self) -> None:
        """Add a block, and more later."""
        if self._is_loading:
            # No more than can be done: a run is to end.
            if self.coordinator.unfinished < 6:
                self.coordinator.add(*self._task())
            first = min(machine.awake_from for machine in self.machines)
            pause = self._rng.expovariate(1.0 / self._every)
            self.world.at(max(first, self.world.now) + pause, self._load)

    def _probe(self) -> None:
        for _ in self.machines:
            self.coordinator.add(*self._task())

    def _task(self) -> tuple[TaskSpec, float | None]:
        rng = self._rng
        number = next(self._numbers)
        kind, model = TaskType.TEXT_COMPLETION, "tiny"
        task_input: dict[str, Any] = {
            "prompt": f"prompt {number}",
            "max_tokens": rng.choice((1, 1, 2, 3, 5, 15)),
        }
        match rng.randrange(20):
            case 0:
                kind = TaskType.TRAINING_BATCH
            case 1:
                task_input = {"prompt": 7}
            case 2:
                model = "nowhere"
            case 3 | 4:
                model = "other"
            case 5 | 6:
                kind = TaskType.CLASSIFICATION
                task_input = {"text": f"text {number}", "labels": ["text", "other"]}
        deadline_ms = rng.choice((None, None, None, 1_000, 10_000))
        expires_in = rng.choice((None,) * 9 + (60.0,))
        task = TaskSpec(
            block_id=f"b{number}",
            task_type=kind,
            input=task_input,
            model_id=model,
            deadline_ms=deadline_ms,
        )
        return task, expires_in

    def run(self, events: int, done_within: float) -> Run:
        """Let things happen until there were enough, then let everything end well.

        It is over with the first fault.
        """
        try:
            return self._run(events, done_within)
        finally:
            # Only where something went wrong is there still one that lives.
            for machine in self.machines:
                machine.is_wanted = False
                machine.wake()
                machine.kill(power=False)

    def _run(self, events: int, done_within: float) -> Run:
        world = self.world
        while world.events < events and world.now < _LONGEST_S and not self._is_broken():
            assert world.step(), "there is always a next block"
        self.chaos.heal()
        self._is_loading = False
        healed = world.now
        # By then everybody has asked and was told that there is nothing.
        world.later(_PROBED_AFTER_S, self._probe)
        limit = healed + done_within
        while not self._is_broken() and (
            world.now < healed + _PROBED_AFTER_S or not self._is_done()
        ):
            if world.now > limit:
                self._fault(f"not done {done_within:.0f} s after the last fault")
                break
            if not world.step():
                self._fault("nothing will ever happen again")
                break
        healed_in = world.now - healed
        if not self._is_broken():
            self._stop()
            self._checker.close()
        return self._report(healed_in)

    def _report(self, healed_in: float) -> Run:
        world, machines = self.world, self.machines
        outcomes = self.coordinator.outcomes.values()
        return Run(
            seed=world.seed,
            events=world.events,
            seconds=world.now,
            blocks=len(self.coordinator.tasks),
            delivered=sum(outcome.result.success for outcome in outcomes),
            lives=sum(machine.lives for machine in machines),
            healed_in=healed_in,
            deaths=dict(Counter(why for machine in machines for why in machine.deaths)),
            chaos=self.chaos.counts,
            faults=[
                *self._faults,
                *self._checker.faults,
            ],
            digest=world.digest(),
            trace=list(world.trace),
            history=list(self.history),
        )

    def _is_broken(self) -> bool:
        return bool(self._faults or self._checker.faults)

    def _is_done(self) -> bool:
        return self.coordinator.unfinished == 0 and all(
            machine.life is not None
            and machine.life.worker is not None
            and machine.life.worker.session.is_registered
            and not machine.life.worker.session.running
            and not machine.life.worker.session.unacknowledged
            and not machine.life.stop_asked
            and machine.life.writer is not None
            and machine.life.writer.is_idle
            for machine in self.machines
        )

    def _stop(self) -> None:
        """Stop the workers; they end in time."""
        world = self.world
        for machine in self.machines:
            machine.is_wanted = False
            machine.stop()
        limit = world.now + 60.0
        while any(machine.life is not None for machine in self.machines):
            if world.now > limit or not world.step():
                self._fault("a worker does not stop")
                break

    def _fault(self, text: str) -> None:
        self._faults.append(f"{self.world.now:.3f} {text}")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _memory() -> SimpleNamespace:
    """What every machine says of its memory."""
    return SimpleNamespace(total=8 << 30, available=4 << 30)


@contextmanager
def _determined(seed: int) -> Iterator[None]:
    """Take away what differs from run to run: ids, the machine's memory, the collector's moments.

    Nothing is logged meanwhile: the trace says more.
    """
    rng = random.Random(f"{seed}/ids")

    def next_id() -> uuid.UUID:
        return uuid.UUID(int=rng.getrandbits(128), version=4)

    was_on, logs = gc.isenabled(), structlog.get_config()
    gc.disable()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        with (
            mock.patch.object(uuid, "uuid4", next_id),
            mock.patch.object(psutil, "virtual_memory", _memory),
            generators_closed_by_their_loop(),
        ):
            yield
    finally:
        structlog.configure(**logs)
        if was_on:
            gc.enable()
