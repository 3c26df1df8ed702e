"""When a sequence ends, and which changes of state are legal."""

import pytest

from services.worker.core.sequence import TRANSITIONS, Event, Finish, IllegalTransition, State
from tests.unit.worker_core.made import sequence


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_only_what_the_table_names_is_legal(state, event):
    one = sequence("a", 3)
    one.state = state
    if event in TRANSITIONS[state]:
        one.apply(event)
        assert one.state is TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalTransition, match=f"a: {event.value} while {state.value}"):
            one.apply(event)


def test_nothing_follows_an_end():
    assert TRANSITIONS[State.FINISHED] == TRANSITIONS[State.CANCELLED] == {}


def ends(one, token, context_length=100):
    one.tokens.append(token)
    return one.finish_after(token, context_length)


def test_a_stop_token_ends_it():
    one = sequence("a", 3, stop_token_ids=frozenset({7}))
    assert ends(one, 5) is None
    assert ends(one, 7) is Finish.STOP


def test_a_stop_token_is_not_heeded_before_the_minimum():
    one = sequence("a", 3, new=9, min_new_tokens=2, stop_token_ids=frozenset({7}))
    assert [ends(one, 7) for _ in range(3)] == [None, None, Finish.STOP]


def test_the_maximum_ends_it_and_a_stop_token_there_is_still_a_stop():
    one, other = sequence("a", 3, new=1), sequence("b", 3, new=1, stop_token_ids=frozenset({7}))
    assert ends(one, 5) is Finish.LENGTH
    assert ends(other, 7) is Finish.STOP


def test_the_context_ends_it():
    assert ends(sequence("a", 3, new=50), 5, context_length=4) is Finish.LENGTH


def test_resumed_tokens_count_as_output():
    one = sequence("a", 3, new=3, output=2, min_new_tokens=2, stop_token_ids=frozenset({7}))
    assert one.output_tokens == 2
    assert ends(one, 5) is Finish.LENGTH
    other = sequence("b", 3, new=9, output=2, min_new_tokens=2, stop_token_ids=frozenset({7}))
    assert ends(other, 7) is Finish.STOP
