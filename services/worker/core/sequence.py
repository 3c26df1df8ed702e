"""One sequence: its tokens, how far they are computed, and the states it may be in.

The legal changes of state are the table below and nothing else; what is absent raises. How the next
token is drawn is not known here, only when the sequence ends.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from services.worker.core.prefix import Content


class State(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"


class Event(enum.Enum):
    """What can happen to a sequence."""

    ADMIT = "admit"
    PREEMPT = "preempt"
    FINISH = "finish"
    CANCEL = "cancel"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.WAITING: {
        Event.ADMIT: State.RUNNING,
        # Pre-empted while a step that draws for it is computed: the token counts and may be the last.
        Event.FINISH: State.FINISHED,
        Event.CANCEL: State.CANCELLED,
    },
    State.RUNNING: {
        Event.PREEMPT: State.WAITING,
        Event.FINISH: State.FINISHED,
        Event.CANCEL: State.CANCELLED,
    },
    State.FINISHED: {},
    State.CANCELLED: {},
}


class Finish(enum.Enum):
    """Why a sequence ended by itself. The values travel to the front."""

    STOP = "stop"
    LENGTH = "length"


class IllegalTransition(RuntimeError):
    """An event that the table does not allow in this state: a defect of the caller."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens to continue. Times are nanoseconds of one monotonic clock that the caller reads."""

    id: str
    tokens: list[int]
    """The prompt, then the output; grows by one with each token drawn."""
    prompt_tokens: int
    """How many of `tokens` are the prompt. Resumed output tokens are output."""
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 2
    """Smaller is more urgent."""
    arrival: int = 0
    """Order of arrival; set by the scheduler."""
    state: State = State.WAITING
    computed: int = 0
    """Tokens whose keys and values are in `blocks`, or will be once the plans made so far are computed."""
    blocks: list[int] = field(default_factory=list)
    planned: int = 0
    """Plans that hold it and are not settled yet."""
    in_flight: int = 0
    """Tokens that those plans draw: they follow `tokens` and are not known yet."""
    prefix_root: bytes = b""
    """Only sequences of the same root share cached blocks."""
    chain: list[Content] = field(default_factory=list)
    """What its first full blocks hold, as far as somebody asked."""
    kept: int = 0
    """How many of `blocks` can be found by their content."""
    cached: int = 0
    """Tokens of the prompt whose blocks were found when it began."""
    arrived_ns: int = 0
    started_ns: int = 0
    first_token_ns: int = 0
    steps: int = 0
    preemptions: int = 0
    prefilled: int = 0
    """Tokens computed as part of a prompt; more than the prompt after a pre-emption or a resume."""

    @property
    def length(self) -> int:
        """Tokens, those included that are not known yet."""
        return len(self.tokens) + self.in_flight

    @property
    def pending(self) -> int:
        """Tokens that no plan has computed yet; 1 while decoding."""
        return len(self.tokens) + self.in_flight - self.computed

    @property
    def output_tokens(self) -> int:
        """Tokens drawn so far, resumed ones included."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Most urgent first, then oldest first."""
        return (self.priority, self.arrival)

    def apply(self, event: Event) -> None:
        """Raises IllegalTransition for what TRANSITIONS does not name."""
        try:
            self.state = TRANSITIONS[self.state][event]
        except KeyError:
            raise IllegalTransition(f"{self.id}: {event.value} while {self.state.value}") from None

    def ends_in_flight(self, context_length: int) -> bool:
        """Whether a token that is not known yet is the last one, whatever it will be."""
        if not self.in_flight:
            return False
        length = self.length
        return length - self.prompt_tokens >= self.max_new_tokens or length >= context_length

    def finish_after(self, token: int, context_length: int) -> Finish | None:
        """Whether the sequence ends with `token`, which has just become its last one."""
        if token in self.stop_token_ids and self.output_tokens > self.min_new_tokens:
            return Finish.STOP
        if self.output_tokens >= self.max_new_tokens or len(self.tokens) >= context_length:
            return Finish.LENGTH
        return None
