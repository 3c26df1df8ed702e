"""Resuming a file over HTTP: what is asked for, and what an answer means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.modelstore.core.transfer import (
    Held,
    Verdict,
    judge,
    request_headers,
    still_there,
    whole_headers,
)

TAG = '"abc"'
PART = Held(40, 100, TAG)
WHOLE = Held(100, 100, TAG)
IDENTITY = {"Accept-Encoding": "identity"}


def partial(start=40, total="100", tag=TAG):
    return {"Content-Range": f"bytes {start}-99/{total}", "ETag": tag}


def test_nothing_held_asks_for_the_whole():
    assert request_headers(Held()) == IDENTITY
    # Bytes without a validator may be of another state of the file.
    assert request_headers(Held(40, 100, "")) == IDENTITY


def test_a_part_asks_for_the_rest_if_the_file_is_the_same():
    assert request_headers(PART) == IDENTITY | {"Range": "bytes=40-", "If-Range": TAG}


def test_a_whole_file_asks_whether_it_changed():
    assert request_headers(WHOLE) == IDENTITY | {"If-None-Match": TAG}


def test_a_date_is_compared_and_never_asked_with_because_an_older_file_may_have_come():
    held = Held(100, 100, CHANGED, CHANGED)
    assert request_headers(held) == IDENTITY
    headers = {"Content-Length": "100", "Date": "Wed, 21 Oct 2026 07:28:01 GMT"}
    assert judge(200, headers | {"Last-Modified": CHANGED}, held).verdict is Verdict.UNCHANGED
    for changed in ("Wed, 21 Oct 2015 07:27:00 GMT", "Wed, 21 Oct 2015 07:29:00 GMT"):
        assert judge(200, headers | {"Last-Modified": changed}, held).verdict is Verdict.BEGIN
    other_length = headers | {"Last-Modified": CHANGED, "Content-Length": "99"}
    assert judge(200, other_length, held).verdict is Verdict.BEGIN


def test_a_server_that_sends_the_same_file_again_unasked_is_not_listened_to():
    assert judge(200, {"ETag": TAG, "Content-Length": "100"}, WHOLE).verdict is Verdict.UNCHANGED
    assert judge(200, {"ETag": TAG}, WHOLE).verdict is Verdict.UNCHANGED
    assert judge(200, {"ETag": '"new"', "Content-Length": "100"}, WHOLE).verdict is Verdict.BEGIN
    assert judge(200, {"ETag": TAG, "Content-Length": "100"}, PART).verdict is Verdict.BEGIN


@pytest.mark.parametrize(
    ("status", "headers", "held", "verdict"),
    [
        (200, {"Content-Length": "100", "ETag": TAG}, Held(), Verdict.BEGIN),
        (200, {"Content-Length": "100", "ETag": '"new"'}, PART, Verdict.BEGIN),
        (200, {"Content-Encoding": "gzip"}, Held(), Verdict.REFUSED),
        (206, partial(), PART, Verdict.GO_ON),
        (206, partial(total="*"), PART, Verdict.GO_ON),
        (206, {"Content-Range": "bytes 40-99/100"}, PART, Verdict.GO_ON),
        (206, partial(start=41), PART, Verdict.DISCARD),
        (206, partial(tag='"new"'), PART, Verdict.DISCARD),
        (206, partial(total="101"), PART, Verdict.DISCARD),
        (206, {}, PART, Verdict.DISCARD),
        (206, partial(start=100), WHOLE, Verdict.DISCARD),
        (304, {}, WHOLE, Verdict.UNCHANGED),
        (304, {}, PART, Verdict.DISCARD),
        (416, {}, PART, Verdict.DISCARD),
        (404, {}, PART, Verdict.ABSENT),
        (410, {}, Held(), Verdict.ABSENT),
        (503, {}, PART, Verdict.AGAIN),
        (429, {}, Held(), Verdict.AGAIN),
        (400, {}, Held(), Verdict.REFUSED),
        (204, {}, Held(), Verdict.REFUSED),
    ],
)
def test_an_answer_means(status, headers, held, verdict):
    assert judge(status, headers, held).verdict is verdict


@pytest.mark.parametrize("status", [401, 403, 407])
def test_credentials_are_never_sent_and_the_answer_says_what_helps(status):
    answer = judge(status, {}, Held())
    assert answer.why == (
        f"answers {status}: it wants credentials, which are never sent; fetch it and give its path"
    )


CHANGED = "Wed, 21 Oct 2015 07:28:00 GMT"


@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        ({"ETag": TAG, "Last-Modified": CHANGED}, TAG),
        ({"ETag": "W/" + TAG}, ""),
        ({"ETag": "abc"}, ""),
        ({"Last-Modified": CHANGED, "Date": "Wed, 21 Oct 2015 07:28:01 GMT"}, CHANGED),
        # In the second in which it was written, a file may change again and keep its date.
        ({"Last-Modified": CHANGED, "Date": CHANGED}, ""),
        ({"Last-Modified": CHANGED}, ""),
        ({"Last-Modified": "never", "Date": CHANGED}, ""),
        ({}, ""),
    ],
)
def test_only_what_changes_with_the_file_is_a_validator(headers, validator):
    assert judge(200, headers, Held()).validator == validator


@given(
    st.sampled_from([200, 206, 304, 404, 416, 500]),
    st.integers(0, 100),
    st.integers(0, 100),
    st.sampled_from([TAG, '"new"', ""]),
    st.integers(1, 100),
)
def test_bytes_are_added_only_to_bytes_of_the_same_file(status, start, size, tag, total):
    held = Held(size, 100, TAG)
    headers = {"Content-Range": f"bytes {start}-{max(start, total - 1)}/{total}"} | (
        {"ETag": tag} if tag else {}
    )
    answer = judge(status, headers, held)
    if answer.verdict is Verdict.GO_ON:
        assert start == size
        assert tag in (TAG, "")
        assert total == 100


NOW = "Wed, 21 Oct 2026 07:28:00 GMT"
LATER = "Wed, 21 Oct 2026 07:28:05 GMT"
BARE = Held(100, 100)


@pytest.mark.parametrize(
    ("status", "headers", "held", "verdict"),
    [
        (304, {}, WHOLE, Verdict.UNCHANGED),
        (200, {"ETag": TAG, "Content-Length": "100"}, WHOLE, Verdict.UNCHANGED),
        (200, {"ETag": '"new"', "Content-Length": "100"}, WHOLE, Verdict.CHANGED),
        (200, {"ETag": TAG, "Content-Length": "99"}, WHOLE, Verdict.CHANGED),
        (200, {"Content-Length": "100"}, WHOLE, Verdict.UNCHANGED),
        (200, {}, WHOLE, Verdict.UNCHANGED),
        (404, {}, WHOLE, Verdict.CHANGED),
        (404, {}, None, Verdict.UNCHANGED),
        (410, {}, None, Verdict.UNCHANGED),
        (200, {}, None, Verdict.CHANGED),
        (503, {}, WHOLE, Verdict.AGAIN),
        (429, {}, None, Verdict.AGAIN),
        (403, {}, WHOLE, Verdict.REFUSED),
        # Too weak to go on with, strong enough to tell that it is another one.
        (200, {"ETag": 'W/"b"'}, Held(100, 100, "", 'W/"a"'), Verdict.CHANGED),
        (200, {"ETag": 'W/"a"'}, Held(100, 100, "", 'W/"a"'), Verdict.UNCHANGED),
        (200, {"Last-Modified": CHANGED, "Date": NOW}, Held(100, 100, "", NOW), Verdict.CHANGED),
        (200, {"Last-Modified": NOW, "Date": NOW}, Held(100, 100, CHANGED, CHANGED), Verdict.CHANGED),
        # Every answer is dated with its own time: nothing is told.
        (200, {"Last-Modified": LATER, "Date": LATER}, Held(100, 100, "", NOW), Verdict.UNCHANGED),
        (200, {"Content-Length": "100"}, BARE, Verdict.UNCHANGED),
        (200, {"Content-Length": "101"}, BARE, Verdict.CHANGED),
        (200, {"Content-Length": "0"}, BARE, Verdict.CHANGED),
        (200, {"Content-Length": "0"}, Held(), Verdict.UNCHANGED),
    ],
)
def test_a_file_is_still_there_or_changed(status, headers, held, verdict):
    assert still_there(status, headers, held).verdict is verdict


def test_a_weak_tag_is_asked_with_and_a_date_is_not():
    assert whole_headers(Held(9, 9, "", 'W/"a"')) == IDENTITY | {"If-None-Match": 'W/"a"'}
    # What was noted before marks were.
    assert whole_headers(Held(9, 9, TAG)) == IDENTITY | {"If-None-Match": TAG}
    for held in (Held(9, 9, CHANGED, CHANGED), Held(9, 9, "", "abc"), BARE):
        assert whole_headers(held) == IDENTITY
