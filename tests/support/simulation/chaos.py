"""What can go wrong, and a chooser that lets it go wrong by chance.

Each seed uses a part of the alphabet only, with weights of its own: a run in which everything
happens all the time never comes far enough to meet the rare things.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from simulation.coordinator import Coordinator
from simulation.disk import CrashPoint
from simulation.machine import Machine
from simulation.network import Link, Network, Refusal
from simulation.world import EPOCH

if TYPE_CHECKING:
    from simulation.world import World

HOUR: Final = 3600.0
YEAR: Final = 365.0 * 86_400.0

# How long a fault lasts at most, in pauses between two of them.
_LONGEST_FAULT: Final = 10.0

CRASH_POINTS: Final = tuple(
    CrashPoint(step, moment)
    for step in ("commit", "forget", "begin", "ended")
    for moment in ("before", "during", "after")
)

_NONSENSE: Final = (
    "{",
    "[]",
    '{"type": "Telegram", "text": "stop"}',
    '{"type": "ResultAck", "block_id": "nobody\'s", "accepted": true}',
    '{"type": "ResultAck", "block_id": 7}',
    '{"type": "Cancel", "block_id": "nobody\'s"}',
    '{"type": "Error", "code": "odd", "message": "just so"}',
    '{"type": "NoWork", "retry_after_ms": -1}',
    '{"type": "Registered", "session_id": "again", "heartbeat_interval_ms": 1}',
)


class Chaos:
    """Lets faults happen, and heals them all.

    Args:
        world: Where.
        network: What it can do to connections.
        coordinator: What it can do to the coordinator.
        machines: What it can do to workers.
        only: Names of faults to choose from; all by default.

    Attributes:
        counts: How often each fault happened.
    """

    def __init__(
        self,
        world: World,
        network: Network,
        coordinator: Coordinator,
        machines: list[Machine],
        only: tuple[str, ...] = (),
    ) -> None:
        self.counts: dict[str, int] = {}
        self._world = world
        self._network = network
        self._coordinator = coordinator
        self._machines = machines
        self._rng = rng = world.chance("chaos")
        self._is_over = False
        names = list(only or FAULTS)
        if not only:
            names = rng.sample(names, rng.randint(3, len(names)))
        self._names = names
        self._weights = [rng.expovariate(1.0) + 0.05 for _ in names]
        self._pause = rng.choice((1.0, 4.0, 15.0, 60.0))
        self._next()

    def _next(self) -> None:
        # What happens while everybody sleeps is of no interest, and sleeps are long.
        first = min(machine.awake_from for machine in self._machines)
        pause = self._rng.expovariate(1.0 / self._pause)
        self._world.at(max(first, self._world.now) + pause, self._strike)

    def _strike(self) -> None:
        if self._is_over:
            return
        if all(machine.is_asleep for machine in self._machines):
            self._next()
            return
        (name,) = self._rng.choices(self._names, self._weights)
        if FAULTS[name](self):
            self.counts[name] = self.counts.get(name, 0) + 1
            self._world.note("chaos", name)
        self._next()

    def heal(self) -> None:
        """End every fault, and let nothing go wrong any more."""
        self._is_over = True
        self._world.note("chaos", "is over")
        network, coordinator = self._network, self._coordinator
        network.slowness = 1.0
        network.is_lost = False
        coordinator.come_up()
        coordinator.refuses = None
        coordinator.slams = coordinator.rejects = False
        coordinator.acks_to_lose = coordinator.frames_to_double = 0
        coordinator.unstick()
        # Whoever was never told, or cannot hear, asks on a new connection.
        for link in list(network.links):
            link.cut()
        for machine in self._machines:
            machine.disk.is_full = False
            machine.disk.errors = 0
            machine.disk.slowness = 1.0
            machine.wall_offset = 0.0
            machine.wall_stands_at = None
            machine.trouble = 0.0
            machine.models.is_empty = False
            machine.wake()
            if machine.life is not None:
                machine.life.crash_point = None

    # Whom it hits, and for how long.

    def _machine(self) -> Machine:
        return self._rng.choice(self._machines)

    def _link(self) -> Link | None:
        links = self._network.links
        return self._rng.choice(links) if links else None

    def _for_a_while(self, end: Callable[[], object], most: float = 60.0) -> bool:
        # Mostly short, and none so long that nothing else would be seen of a run.
        most = min(most, _LONGEST_FAULT * self._pause)
        self._world.later(0.1 + most * self._rng.random() ** 2, end)
        return True

    # The network. Each says whether it made a difference.

    def cut(self) -> bool:
        """A connection is cut."""
        if (link := self._link()) is None:
            return False
        link.cut()
        return True

    def deaf(self) -> bool:
        """A connection loses everything in one direction or both, and nobody is told."""
        if (link := self._link()) is None:
            return False
        link.go_deaf(*self._rng.choice(((True, True), (True, False), (False, True))))
        return True

    def slow(self) -> bool:
        """Messages take long."""

        def end() -> None:
            self._network.slowness = 1.0

        if self._network.slowness > 1.0:
            return False
        self._network.slowness = self._rng.choice((5.0, 30.0, 200.0))
        return self._for_a_while(end)

    def unreachable(self) -> bool:
        """Nobody gets through to the coordinator; connections that are open stay."""

        def end() -> None:
            self._network.is_lost = False

        if self._network.is_lost:
            return False
        self._network.is_lost = True
        return self._for_a_while(end, 120.0)

    # The coordinator.

    def restart_whole(self) -> bool:
        """It restarts and knows everything."""
        return self._restart("all")

    def restart_from_journal(self) -> bool:
        """It restarts and knows what it wrote down."""
        return self._restart("journal")

    def restart_empty(self) -> bool:
        """It restarts and knows of no lease."""
        return self._restart("none")

    def _restart(self, memory: str) -> bool:
        if self._coordinator.is_down:
            return False
        self._coordinator.go_down(memory)
        return self._for_a_while(self._coordinator.come_up, self._rng.choice((1.0, 30.0, 300.0)))

    def refuse(self) -> bool:
        """Handshakes are refused with a status."""

        def end() -> None:
            self._coordinator.refuses = None

        if self._coordinator.refuses is not None:
            return False
        status = self._rng.choice((401, 403, 404, 429, 500, 503))
        after = self._rng.choice((None, 1, 30, 120)) if status in (429, 503) else None
        self._coordinator.refuses = Refusal(status, after)
        return self._for_a_while(end)

    def slam(self) -> bool:
        """It accepts connections and closes them."""

        def end() -> None:
            self._coordinator.slams = False

        if self._coordinator.slams:
            return False
        self._coordinator.slams = True
        self.cut()
        return self._for_a_while(end, 120.0)

    def reject(self) -> bool:
        """It answers ``Register`` with an error."""

        def end() -> None:
            self._coordinator.rejects = False

        if self._coordinator.rejects:
            return False
        self._coordinator.rejects = True
        self.cut()
        return self._for_a_while(end)

    def lose_acks(self) -> bool:
        """Acknowledgements are lost though the connection lives."""
        self._coordinator.acks_to_lose += self._rng.randint(1, 3)
        return True

    def double(self) -> bool:
        """It says everything twice for a while."""
        self._coordinator.frames_to_double += self._rng.randint(1, 6)
        return True

    def give_again(self) -> bool:
        """It gives a worker a block that it has."""
        return self._coordinator.give_again(self._machine().name)

    def stick(self) -> bool:
        """It reads nothing for a while."""
        if not self._coordinator.stick():
            return False
        return self._for_a_while(self._coordinator.unstick, 20.0)

    def babble(self) -> bool:
        """It says what is no message, or none that has a meaning here."""
        return self._coordinator.babble(self._machine().name, self._rng.choice(_NONSENSE))

    def cancel(self) -> bool:
        """It takes a block back."""
        held = self._coordinator.held_by(self._machine().name)
        if not held:
            return False
        self._coordinator.cancel(self._rng.choice(held))
        return True

    def drain(self) -> bool:
        """It wants no more requests on these connections."""
        if not self._coordinator.drain():
            return False
        # As a coordinator does that is about to go.
        return self._for_a_while(lambda: self._restart("all"), 30.0)

    # A machine.

    def kill(self) -> bool:
        """A worker is killed."""
        return self._machine().kill(power=False)

    def unplug(self) -> bool:
        """A machine loses its power."""
        return self._machine().kill(power=True)

    def crash_at_a_point(self) -> bool:
        """A machine will lose its power at a step of its persistence."""
        life = self._machine().life
        if life is None or life.crash_point is not None:
            return False
        point = life.crash_point = self._rng.choice(CRASH_POINTS)
        self._world.note(life.name, f"will die {point.moment} {point.step}")
        return True

    def stop(self) -> bool:
        """A worker is asked to stop, and perhaps once more."""
        machine = self._machine()
        if machine.life is None:
            return False
        machine.stop()
        if self._rng.random() < 0.3:
            self._world.later(self._rng.uniform(0.0, 10.0), machine.stop)
        return True

    def reload(self) -> bool:
        """A worker reads its settings again, and has another number of slots."""
        self._machine().reload(self._rng.choice((1, 2, 3)))
        return True

    def lose_models(self) -> bool:
        """The files of a machine's models are gone for a while."""
        models = self._machine().models

        def end() -> None:
            models.is_empty = False

        if models.is_empty:
            return False
        models.is_empty = True
        return self._for_a_while(end)

    def suspend(self) -> bool:
        """A machine sleeps."""
        seconds = self._rng.choice((3.0, 30.0, 300.0, 8 * HOUR, 10 * 86_400.0))
        return self._machine().suspend(self._rng.uniform(0.5, 1.0) * seconds)

    def set_clock(self) -> bool:
        """A machine's wall clock jumps."""
        machine = self._machine()
        machine.wall_stands_at = None
        match self._rng.randrange(6):
            case 0:
                machine.wall_offset = HOUR
            case 1:
                machine.wall_offset = -HOUR
            case 2:
                machine.wall_offset = 10 * YEAR
            case 3:
                machine.wall_stands_at = (self._world.now, 0.0)
            case 4:
                machine.wall_offset = self._rng.uniform(-90.0, 90.0)
            case _:
                machine.wall_offset = 0.0
        wall = EPOCH + self._world.now + machine.wall_offset
        at = 0.0 if machine.wall_stands_at is not None else wall
        self._world.note(machine.name, f"sets its clock to {at:.0f}")
        return True

    def fill_disk(self) -> bool:
        """A disk is full for a while."""
        disk = self._machine().disk

        def end() -> None:
            disk.is_full = False

        if disk.is_full:
            return False
        disk.is_full = True
        return self._for_a_while(end, 120.0)

    def fail_disk(self) -> bool:
        """A disk has an error or a few."""
        self._machine().disk.errors += self._rng.randint(1, 3)
        return True

    def slow_disk(self) -> bool:
        """A disk is slow for a while."""
        disk = self._machine().disk

        def end() -> None:
            disk.slowness = 1.0

        if disk.slowness > 1.0:
            return False
        disk.slowness = self._rng.choice((50.0, 1000.0))
        return self._for_a_while(end)

    def trouble(self) -> bool:
        """An engine crashes, hangs, is slow or has no room, for a while."""
        machine = self._machine()

        def end() -> None:
            machine.trouble = 0.0

        if machine.trouble > 0.0:
            return False
        machine.trouble = self._rng.choice((0.2, 0.6, 1.0))
        return self._for_a_while(end)


FAULTS: Final[dict[str, Callable[[Chaos], bool]]] = {
    fault.__name__: fault
    for fault in (
        Chaos.cut,
        Chaos.deaf,
        Chaos.slow,
        Chaos.unreachable,
        Chaos.restart_whole,
        Chaos.restart_from_journal,
        Chaos.restart_empty,
        Chaos.refuse,
        Chaos.slam,
        Chaos.reject,
        Chaos.lose_acks,
        Chaos.double,
        Chaos.give_again,
        Chaos.stick,
        Chaos.babble,
        Chaos.cancel,
        Chaos.drain,
        Chaos.kill,
        Chaos.unplug,
        Chaos.crash_at_a_point,
        Chaos.stop,
        Chaos.reload,
        Chaos.lose_models,
        Chaos.suspend,
        Chaos.set_clock,
        Chaos.fill_disk,
        Chaos.fail_disk,
        Chaos.slow_disk,
        Chaos.trouble,
    )
}
