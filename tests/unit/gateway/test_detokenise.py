"""Incremental text equals the whole decode, whatever the tokens and however they are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.adapters.pieces import Spelling
from services.gateway.core.detokenise import ByteDetokeniser, WindowDetokeniser
from tests.unit.gateway.made import byte_fallback, byte_level

BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()
LEVEL = Spelling(BYTE_LEVEL)
FALLBACK = Spelling(BYTE_FALLBACK)

level_ids = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=60)
fallback_ids = st.lists(st.integers(0, BYTE_FALLBACK.get_vocab_size() - 1), max_size=60)
cuts = st.lists(st.integers(1, 5), max_size=60)


def chunks(ids, sizes):
    """`ids` cut into pieces of these sizes, the rest one by one."""
    at = 0
    for size in sizes:
        if at >= len(ids):
            return
        yield ids[at : at + size]
        at += size
    yield from ([i] for i in ids[at:])


def without_cut_character(whole, spelled):
    """The whole decode without the U+FFFD that stands for a character which the end cut in two."""
    return whole[: len(spelled)] if whole[len(spelled) :].strip("\ufffd") == "" else whole


@settings(max_examples=300, deadline=None)
@given(level_ids, cuts, st.booleans())
def test_byte_level_text_in_pieces_equals_the_whole_decode(ids, sizes, keep_special):
    pieces = LEVEL.all_pieces if keep_special else LEVEL.plain_pieces
    detokeniser = ByteDetokeniser(pieces)
    text = "".join(detokeniser.push(chunk) for chunk in chunks(ids, sizes))
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=not keep_special)
    assert text == without_cut_character(whole, text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), cuts)
def test_byte_fallback_text_in_pieces_equals_the_whole_decode(text, sizes):
    ids = BYTE_FALLBACK.encode("a" + text, add_special_tokens=False).ids
    detokeniser = ByteDetokeniser(FALLBACK.plain_pieces, strip_first_space=True)
    got = "".join(detokeniser.push(chunk) for chunk in chunks(ids, sizes))
    assert got == BYTE_FALLBACK.decode(ids)


@settings(max_examples=200, deadline=None)
@given(fallback_ids, cuts)
def test_byte_fallback_text_does_not_depend_on_the_cuts(ids, sizes):
    whole = b"".join(FALLBACK.plain_pieces[i] for i in ids).decode("utf-8", "replace")
    detokeniser = ByteDetokeniser(FALLBACK.plain_pieces)
    text = "".join(detokeniser.push(chunk) for chunk in chunks(ids, sizes))
    assert text == without_cut_character(whole, text)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_no_piece_of_valid_text_ever_holds_half_a_character(text):
    detokeniser = ByteDetokeniser(LEVEL.plain_pieces)
    pieces = [detokeniser.push([i]) for i in BYTE_LEVEL.encode(text).ids]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30), cuts)
def test_a_window_gives_the_same_text_as_the_table(text, sizes):
    ids = BYTE_LEVEL.encode(text).ids
    window = WindowDetokeniser(lambda ids: BYTE_LEVEL.decode(list(ids)))
    assert "".join(window.push(chunk) for chunk in chunks(ids, sizes)) == text


def test_an_emoji_comes_out_whole_with_its_last_byte():
    ids = [BYTE_LEVEL.token_to_id(token) for token in "ðŁİī"]
    detokeniser = ByteDetokeniser(LEVEL.plain_pieces)
    assert [detokeniser.push([i]) for i in ids] == ["", "", "", "🎉"]


def test_a_window_gives_up_on_bytes_that_never_become_a_character():
    broken = BYTE_LEVEL.token_to_id("ð")
    window = WindowDetokeniser(lambda ids: BYTE_LEVEL.decode(list(ids)))
    texts = [window.push([broken]) for _ in range(40)]
    assert "".join(texts).startswith("\ufffd" * 16)


def test_special_tokens_show_only_when_asked_for():
    end, word = BYTE_LEVEL.token_to_id("<|end|>"), BYTE_LEVEL.encode("Paris").ids
    assert ByteDetokeniser(LEVEL.plain_pieces).push([*word, end]) == "Paris"
    assert ByteDetokeniser(LEVEL.all_pieces).push([*word, end]) == "Paris<|end|>"


def test_added_tokens_stand_for_themselves():
    ids = BYTE_LEVEL.encode("<think>two words").ids
    assert ByteDetokeniser(LEVEL.plain_pieces).push(ids) == BYTE_LEVEL.decode(ids) == "<think>two words"


def test_a_continued_text_keeps_the_space_before_its_first_word():
    paris = BYTE_FALLBACK.token_to_id("▁Paris")
    assert ByteDetokeniser(FALLBACK.plain_pieces).push([paris]) == " Paris"
    assert ByteDetokeniser(FALLBACK.plain_pieces, strip_first_space=True).push([paris]) == "Paris"


@pytest.mark.parametrize("spelling", [LEVEL, FALLBACK])
def test_an_id_outside_the_vocabulary_spells_nothing_and_takes_no_memory(spelling):
    before = len(spelling.all_pieces)
    assert spelling.all_pieces[10_000_000] == b""
    assert len(spelling.all_pieces) == before


def test_tokenizers_that_only_join_by_themselves_have_no_table():
    tokenizer = byte_level()
    tokenizer.decoder = None  # type: ignore[assignment]
    assert not Spelling(tokenizer).by_bytes
