"""A request's life as data: what is not in the table is a defect and raises.

waiting --placed--> leased --answered--> serving --closed--> ended
   |                   '------closed------------------------^
   '--refused, answered or closed---------------------------^
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class State(Enum):
    """Where a request is."""

    WAITING = "waiting"
    LEASED = "leased"
    """A worker was picked; nothing came back yet."""
    SERVING = "serving"
    """Response headers were seen."""
    ENDED = "ended"


class Happening(Enum):
    """What moves it."""

    PLACED = "placed"
    REFUSED = "refused"
    ANSWERED = "answered"
    """Response headers. While waiting, only the proxy itself can have made them: it gave up."""
    CLOSED = "closed"
    """The stream ended, whatever the cause."""


TRANSITIONS: Mapping[State, Mapping[Happening, State]] = {
    State.WAITING: {
        Happening.PLACED: State.LEASED,
        Happening.REFUSED: State.ENDED,
        Happening.ANSWERED: State.ENDED,
        Happening.CLOSED: State.ENDED,
    },
    State.LEASED: {
        Happening.ANSWERED: State.SERVING,
        Happening.CLOSED: State.ENDED,
    },
    State.SERVING: {
        Happening.CLOSED: State.ENDED,
    },
    State.ENDED: {},
}


class IllegalTransition(Exception):
    """A defect in the caller: this cannot happen in this state."""


def after(state: State, happening: Happening) -> State:
    """The next state. Raises IllegalTransition for what the table does not hold."""
    try:
        return TRANSITIONS[state][happening]
    except KeyError:
        raise IllegalTransition(f"a request that is {state.value} cannot be {happening.value}") from None
