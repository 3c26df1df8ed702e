"""A deprecation in a response header: ASCII, one line, bounded, readable."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.gateway.core.catalogue import Deprecation
from services.gateway.core.notices import NOTICE_BYTES_MAX, deprecation_headers, header_value
from tests.unit.gateway.made import version


@given(st.text(max_size=600) | st.text(alphabet="é %\n🎉a", max_size=600))
@example("é" * 512)
@example("a" + "🎉" * 512)
def test_every_text_becomes_a_bounded_line_of_ascii_that_reads_as_the_text_or_its_beginning(text):
    value = header_value(text, "deprecated")
    assert value.isascii()
    assert value.isprintable()
    assert 1 <= len(value) <= NOTICE_BYTES_MAX
    assert value == value.strip()
    words = " ".join(text.split())
    if not words:
        assert value == "deprecated"
    elif "\ufffd" not in unquote(value):
        assert words.startswith(unquote(value))
        assert unquote(value) == words or len(value) > NOTICE_BYTES_MAX - 16


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("use tiny-2 instead", "use tiny-2 instead"),
        ("gone  in\nMay", "gone in May"),
        ("50% off: é", "50%25 off: %C3%A9"),
        ("", "deprecated"),
    ],
)
def test_plain_words_stay_as_they_are(text, value):
    assert header_value(text, "deprecated") == value


def test_only_a_deprecated_version_has_a_header():
    assert deprecation_headers(version()) == []
    told = deprecation_headers(version(deprecation=Deprecation("use tiny-2")))
    assert told == [("x-loom-model-deprecated", "use tiny-2")]
