"""The life of a connection as a table.

Every state, every event and every step from one to the other is in ``TRANSITIONS``; what is not
there is illegal. One function takes a step, another draws the table for the documentation, so
that the picture cannot differ from the code.

The first protocol has five states and a worker with one block at a time. Here ``Working`` means
that one block or more is active; blocks outlive a connection, so a worker may come from
``Connected`` to ``Working`` again by way of ``Registered`` without a new assignment.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ai4all.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["Event", "State", "TRANSITIONS", "advance", "draw"]


class State(enum.Enum):
    """Where a connection is. Connecting means the handshake; Connected waits for ``Registered``."""

    DISCONNECTED = "Disconnected"
    CONNECTING = "Connecting"
    CONNECTED = "Connected"
    REGISTERED = "Registered"
    WORKING = "Working"


class Event(enum.Enum):
    """What can happen to a connection."""

    # Done by us, or told to us by our own shell.
    CONNECT = "connect"
    OPENED = "opened"
    CLOSED = "closed"
    REQUEST_WORK = "RequestWork sent"
    HEARTBEAT = "Heartbeat sent"
    SUBMIT_RESULT = "SubmitResult sent"
    RESUMED = "blocks still active"
    ALL_DONE = "no block active"
    # Done by the coordinator.
    REGISTERED = "Registered"
    REFUSED = "Error in answer to Register"
    ASSIGNED = "Assignment"
    NO_WORK = "NoWork"
    ACKNOWLEDGED = "ResultAck"
    COMPLAINED = "Error"
    CANCELLED = "Cancel"
    DRAINED = "Drain"


_THEIRS: Final = frozenset(
    {
        Event.REGISTERED,
        Event.REFUSED,
        Event.ASSIGNED,
        Event.NO_WORK,
        Event.ACKNOWLEDGED,
        Event.COMPLAINED,
        Event.CANCELLED,
        Event.DRAINED,
    }
)

# What may happen in a running session without changing its state.
_STEADY = (
    Event.REQUEST_WORK,
    Event.HEARTBEAT,
    Event.SUBMIT_RESULT,
    Event.NO_WORK,
    Event.ACKNOWLEDGED,
    Event.COMPLAINED,
    Event.CANCELLED,
    Event.DRAINED,
)

TRANSITIONS: Final[Mapping[State, Mapping[Event, State]]] = MappingProxyType(
    {
        State.DISCONNECTED: {
            Event.CONNECT: State.CONNECTING,
        },
        State.CONNECTING: {
            Event.OPENED: State.CONNECTED,
            Event.CLOSED: State.DISCONNECTED,
        },
        State.CONNECTED: {
            Event.REGISTERED: State.REGISTERED,
            # The refusal is the last thing that is heeded; the shell closes the socket.
            Event.REFUSED: State.DISCONNECTED,
            Event.CLOSED: State.DISCONNECTED,
        },
        State.REGISTERED: {
            Event.ASSIGNED: State.WORKING,
            Event.RESUMED: State.WORKING,
            Event.CLOSED: State.DISCONNECTED,
            **dict.fromkeys(_STEADY, State.REGISTERED),
        },
        State.WORKING: {
            Event.ASSIGNED: State.WORKING,
            Event.ALL_DONE: State.REGISTERED,
            Event.CLOSED: State.DISCONNECTED,
            **dict.fromkeys(_STEADY, State.WORKING),
        },
    }
)


def advance(state: State, event: Event) -> State:
    """Take one step.

    Returns:
        The next state.

    Raises:
        LocalProtocolError: ``event`` is ours and illegal in ``state``.
        RemoteProtocolError: ``event`` is the coordinator's and illegal in ``state``.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        fault = RemoteProtocolError if event in _THEIRS else LocalProtocolError
        raise fault(f"{event.value} while {state.value}") from None


def draw() -> str:
    """Draw ``TRANSITIONS`` as a Mermaid state diagram, one arrow for each pair of states."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.DISCONNECTED.value}"]
    for origin, steps in TRANSITIONS.items():
        labels: dict[State, list[str]] = {}
        for event, target in steps.items():
            labels.setdefault(target, []).append(event.value)
        lines.extend(
            f"    {origin.value} --> {target.value}: {' · '.join(names)}"
            for target, names in labels.items()
        )
    return "\n".join(lines) + "\n"
