"""One output: which tokens count, which text goes out, when it ends, and what a new worker changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.adapters.pieces import Spelling
from services.gateway.core.choice import Choice, ChoiceRules, PositionLogprobs, WorkerMessage
from services.gateway.core.detokenise import ByteDetokeniser
from services.gateway.core.journal import Journal, TokenGap
from services.gateway.core.request import Finish
from services.gateway.core.stops import StopScanner
from tests.unit.gateway.made import byte_level, message

TOKENIZER = byte_level()
SPELLING = Spelling(TOKENIZER)
END = TOKENIZER.token_to_id("<|end|>")
WORD = TOKENIZER.token_to_id("Paris")


def ids_of(text):
    return TOKENIZER.encode(text).ids


def choice(*stops, max_new=100, min_new=0, stop_ids=(END,), include_stop=False):
    rules = ChoiceRules(max_new, min_new, frozenset(stop_ids), include_stop)
    scanner = StopScanner(stops, include_stop=include_stop) if stops else None
    return Choice(0, rules, ByteDetokeniser(SPELLING.plain_pieces), scanner)


def feed(target, ids, size=1, start=0, finish=None):
    """Text of all events for `ids` in messages of `size` tokens, until the output ends."""
    text = ""
    for at in range(0, len(ids), size):
        part = list(ids[at : at + size])
        last = finish if at + size >= len(ids) else None
        event = target.take(message(start + at, part, last))
        text += event.text if event is not None else ""
        if target.end is not None:
            break
    return text


def test_text_comes_out_and_the_worker_ends_it():
    out = choice()
    assert feed(out, ids_of("Paris is the capital."), finish=Finish.LENGTH) == "Paris is the capital."
    assert out.end is not None
    assert out.end.reason is Finish.LENGTH


def test_the_stop_tokens_text_is_left_out_and_its_id_reported():
    out = choice(stop_ids=(WORD,))
    event = out.take(message(0, [*ids_of("The "), WORD], Finish.STOP, WORD))
    assert event.text == "The "
    assert event.token_ids[-1] == WORD
    assert (event.end.reason, event.end.stop_token_id) == (Finish.STOP, WORD)


def test_the_stop_tokens_text_stays_when_asked_for():
    out = choice(stop_ids=(WORD,), include_stop=True)
    assert out.take(message(0, [WORD], Finish.STOP, WORD)).text == "Paris"


def test_a_stop_token_ends_the_output_even_when_the_worker_does_not_say_so():
    out = choice()
    assert out.take(message(0, [END])).end.reason is Finish.STOP


def test_a_stop_token_is_not_heeded_before_min_new_tokens():
    out = choice(min_new=3)
    assert out.take(message(0, [END, WORD, END])).end is None
    assert out.take(message(3, [END])).end is not None


def test_reaching_max_new_tokens_ends_the_output_even_when_the_worker_does_not_say_so():
    out = choice(max_new=2)
    assert out.take(message(0, [WORD])).end is None
    assert out.take(message(1, [WORD])).end.reason is Finish.LENGTH


def test_a_stop_string_over_several_tokens_never_leaks_its_beginning():
    out = choice("\n\nUser:")
    assert feed(out, ids_of("Hello\n\nUser: hi")) == "Hello"
    assert (out.end.reason, out.end.matched_stop) == (Finish.STOP, "\n\nUser:")


def test_text_that_was_held_back_comes_with_the_end():
    out = choice("STOP")
    assert feed(out, ids_of("the ST"), finish=Finish.LENGTH) == "the ST"


def test_a_stop_string_inside_the_first_min_new_tokens_is_not_heeded():
    ids = ids_of("a.b.c")
    out = choice(".", min_new=ids.index(ids_of(".")[0]) + 1)
    assert feed(out, ids) == "a.b"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_min_new_tokens_does_not_depend_on_how_tokens_are_grouped(size):
    ids = ids_of("a.b.c.d")
    one_by_one = choice(".", min_new=3)
    grouped = choice(".", min_new=3)
    assert feed(grouped, ids, size=size) == feed(one_by_one, ids)


def test_a_character_that_the_end_cuts_in_two_is_left_out():
    out = choice()
    assert feed(out, ids_of("ok 🎉")[:-1], finish=Finish.LENGTH) == "ok "


def test_a_message_without_news_is_no_event():
    assert choice().take(WorkerMessage(0, [], [], None, "worker-0", 0)) is None


def test_tokens_seen_before_are_not_shown_twice():
    out, ids = choice(), ids_of("Paris is the capital of France")
    first = feed(out, ids[:4])
    again = out.take(message(2, ids[2:6]))
    rest = feed(out, ids[6:], start=6)
    assert first + again.text + rest == "Paris is the capital of France"
    assert out.journal.tokens == ids


def test_logprobs_of_tokens_seen_before_are_dropped_with_them():
    out = choice()
    out.take(message(0, [WORD]))
    marks = [PositionLogprobs(-1.0, (), ()), PositionLogprobs(-2.0, (), ())]
    event = out.take(WorkerMessage(0, [WORD, WORD], marks, None, None, 0))
    assert [position.chosen for position in event.logprobs] == [-2.0]


def test_a_gap_is_an_error_and_accepts_nothing():
    out = choice()
    out.take(message(0, [WORD]))
    with pytest.raises(TokenGap):
        out.take(message(2, [WORD]))
    assert out.journal.tokens == [WORD]


@settings(max_examples=200, deadline=None)
@given(st.text("ab.é🎉 ", max_size=30), st.lists(st.integers(0, 40), max_size=4), st.integers(0, 3))
def test_a_resumed_output_is_the_same_text_whatever_broke_and_overlapped(text, breaks, overlap):
    ids = ids_of(text)
    whole, broken = choice("..", max_new=len(ids) + 1), choice("..", max_new=len(ids) + 1)
    expected = feed(whole, ids)
    got = ""
    for stop_at in [*sorted(min(b, len(ids)) for b in breaks), len(ids)]:
        start = max(0, len(broken.journal.tokens) - overlap)
        if broken.end is None and stop_at > start:
            got += feed(broken, ids[start:stop_at], start=start)
    assert got == expected
    assert broken.end == whole.end


def test_an_output_that_broke_after_its_last_token_is_complete():
    full = choice(max_new=1)
    full.journal.accept(0, [WORD])
    assert full.end_by_journal().end.reason is Finish.LENGTH
    stopped = choice("STOP")
    stopped.take(message(0, ids_of("ST")))
    stopped.journal.accept(len(ids_of("ST")), [END])
    last = stopped.end_by_journal()
    assert (last.text, last.end.reason) == ("ST", Finish.STOP)


def test_an_output_that_broke_in_the_middle_is_not_complete():
    out = choice()
    assert out.end_by_journal() is None
    out.take(message(0, [WORD]))
    assert out.end_by_journal() is None


def test_the_journal_counts_attempts_resumes_and_fruitless_tries():
    journal = Journal()
    journal.begin_attempt()
    journal.begin_attempt()
    assert (journal.attempts, journal.resumes, journal.fruitless) == (2, 0, 2)
    journal.begun_and_broken()
    journal.accept(0, [1])
    assert (journal.fruitless, journal.breaks, journal.broken) == (0, 0, True)
    journal.begin_attempt()
    assert (journal.resumes, journal.fruitless) == (1, 1)


@given(st.lists(st.integers(0, 9), max_size=30), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9))))
def test_the_journal_holds_each_token_once_whatever_is_sent_again(ids, sends):
    journal = Journal()
    for index, size in sends:
        part = ids[index : index + size]
        try:
            known, new = journal.accept(index, part)
        except TokenGap:
            assert index > len(journal.tokens)
        else:
            assert list(new) == part[known:]
        assert journal.tokens == ids[: len(journal.tokens)]
