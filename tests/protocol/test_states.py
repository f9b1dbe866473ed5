from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from ai4all.errors import LocalProtocolError, RemoteProtocolError
from ai4all.protocol.states import TRANSITIONS, Event, State, advance, draw

THEIRS = {
    Event.REGISTERED,
    Event.REFUSED,
    Event.ASSIGNED,
    Event.NO_WORK,
    Event.ACKNOWLEDGED,
    Event.COMPLAINED,
    Event.CANCELLED,
    Event.DRAINED,
}


def test_the_way_of_the_first_protocol() -> None:
    state = State.DISCONNECTED
    for event, expected in [
        (Event.CONNECT, State.CONNECTING),
        (Event.OPENED, State.CONNECTED),
        (Event.REGISTERED, State.REGISTERED),
        (Event.REQUEST_WORK, State.REGISTERED),
        (Event.ASSIGNED, State.WORKING),
        (Event.SUBMIT_RESULT, State.WORKING),
        (Event.ALL_DONE, State.REGISTERED),
        (Event.ACKNOWLEDGED, State.REGISTERED),
        (Event.CLOSED, State.DISCONNECTED),
    ]:
        state = advance(state, event)
        assert state is expected


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair_is_a_step_or_somebodys_fault(state: State, event: Event) -> None:
    if event in TRANSITIONS[state]:
        assert advance(state, event) is TRANSITIONS[state][event]
        return
    fault = RemoteProtocolError if event in THEIRS else LocalProtocolError
    with pytest.raises(fault, match=f"{event.value} while {state.value}"):
        advance(state, event)


def test_every_state_is_reached_and_left() -> None:
    targets = {target for steps in TRANSITIONS.values() for target in steps.values()}
    assert targets == set(TRANSITIONS) == set(State)
    assert all(Event.CLOSED in TRANSITIONS[s] for s in State if s is not State.DISCONNECTED)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[State.WORKING] = {}  # type: ignore[index]


def test_the_drawing_shows_the_table() -> None:
    drawn = set()
    for line in draw().splitlines()[2:]:
        match = re.fullmatch(r"    (\w+) --> (\w+): (.+)", line)
        assert match is not None, line
        drawn |= {(match[1], event, match[2]) for event in match[3].split(" · ")}
    assert drawn == {
        (state.value, event.value, target.value)
        for state, steps in TRANSITIONS.items()
        for event, target in steps.items()
    }
    assert draw().startswith("stateDiagram-v2\n    [*] --> Disconnected\n")


def test_the_documentation_shows_the_drawing() -> None:
    text = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{draw()}```\n" in text
