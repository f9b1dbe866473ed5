"""A coordinator for one machine: honest enough to test a worker against and to show one off.

``server`` speaks the protocol on a socket, ``ledger`` knows what becomes of each block, ``tasks``
reads what there is to do, ``results`` keeps what came of it.
"""

from __future__ import annotations

from ai4all.coordinator.history import Event, EventKind
from ai4all.coordinator.ledger import LeaseRules, Outcome
from ai4all.coordinator.server import EmbeddedCoordinator
from ai4all.coordinator.tasks import TaskSpec, read_tasks

__all__ = [
    "EmbeddedCoordinator",
    "Event",
    "EventKind",
    "LeaseRules",
    "Outcome",
    "TaskSpec",
    "read_tasks",
]
