"""What callers may ask for; all problems of a request come together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.modelstore.core.aliases import Target
from services.modelstore.core.conversion import decode_event, decode_job, encode_event, encode_job
from services.modelstore.core.ports import ConversionJob, Converted, Progress
from services.modelstore.core.refusal import Refused
from services.modelstore.core.requests import (
    ImportRequest,
    check_alias,
    check_digest,
    check_import,
    check_range,
)

DIGEST = "sha256:" + "a" * 64


def fields(problems):
    return [field for field, _ in problems]


def test_a_good_request_has_no_problem():
    assert check_import(ImportRequest("/models/x.gguf", "smollm2", "bfloat16", ("stable",))) == []
    assert check_alias("smollm2", "stable", [Target(DIGEST)]) == []


def test_all_problems_are_reported_together():
    request = ImportRequest("", "bad name", "int4", ("good", "also bad"))
    assert fields(check_import(request)) == ["source", "name", "dtype", "aliases"]


@pytest.mark.parametrize("source", ["", "a\0b", "x" * 5000, "https://user:word@example.org/model.gguf"])
def test_impossible_sources_name_the_field(source):
    assert fields(check_import(ImportRequest(source, "m"))) == ["source"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("s3://bucket/model", "s3:// is not read: fetch it and give its path, or an http(s) URL"),
        (
            "https://user:word@example.org/m.gguf",
            "is a URL with credentials, which are never sent: fetch it and give its path",
        ),
        ("https:///m.gguf", "is a URL without a host"),
        ("https://example.org:port/m.gguf", "is no URL: Port could not be cast to integer value as 'port'"),
        (
            "https://example.org/a b",
            "is a URL with a space or another character that URLs do not have: percent-encode it",
        ),
        (
            "https://example.org/model/?token=x",
            "is a folder's URL with a query, which its files would not get: leave it out",
        ),
        (
            "https://example.org/model.tar.gz?x",
            "'model.tar.gz' is an archive, which is not read: unpack it and give the folder",
        ),
        ("/models/model.ZIP", "'model.ZIP' is an archive, which is not read: unpack it and give the folder"),
    ],
)
def test_a_source_that_is_not_read_is_told_what_to_do(source, why):
    assert check_import(ImportRequest(source, "m")) == [("source", why)]


def test_urls_and_digests_of_files_are_accepted():
    for source in ("https://example.org/model.gguf?sig=x", "http://127.0.0.1:1/a/"):
        assert check_import(ImportRequest(source, "m", source_digest=DIGEST)) == []


def test_a_source_digest_is_whole_and_not_for_built_in_models():
    assert fields(check_import(ImportRequest("/m.gguf", "m", source_digest="sha256:abc"))) == [
        "source_digest"
    ]
    assert fields(check_import(ImportRequest("builtin:sim", "m", source_digest=DIGEST))) == ["source_digest"]


def test_too_many_aliases_are_refused():
    request = ImportRequest("x", "m", aliases=tuple(f"a{n}" for n in range(17)))
    assert check_import(request) == [("aliases", "at most 16")]


def test_an_alias_needs_whole_digests():
    assert fields(check_alias("m", "stable", [Target("sha256:abc")])) == ["targets.digest"]
    assert fields(check_alias("m", "stable", [])) == ["targets"]
    assert check_digest("digest", DIGEST) == []


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_a_range_is_accepted_exactly_when_it_lies_in_the_blob(offset, length, size):
    assert (check_range(offset, length, size) == []) == (offset + length <= size)


JOB = ConversionJob("gguf", "m", "/s", "/o", "bfloat16", 1, 0, "mit", {"split": "digits"})


def test_jobs_and_events_survive_the_pipe():
    assert decode_job(encode_job(JOB)) == JOB
    for event in (Progress("convert", 1, 2), Converted({"a": 1}, ["x"])):
        assert decode_event(encode_event(event)) == event
    refusal = decode_event(encode_event(Refused("SOURCE_INVALID", "m: no", source="m")))
    assert isinstance(refusal, Refused)
    assert (refusal.reason, refusal.message, refusal.metadata) == ("SOURCE_INVALID", "m: no", {"source": "m"})


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b'{"event": "strange"}', b"\xff"])
def test_other_lines_are_errors(line):
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        decode_event(line)
