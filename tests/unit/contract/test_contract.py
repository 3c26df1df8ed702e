"""Headers, model strings and prefix hashes, as every service reads them."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.contract import headers, prefix
from tokenloom.contract.headers import HeaderError, RequestHeaders
from tokenloom.contract.models import parse_model

names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=128)
requests = st.builds(
    RequestHeaders,
    request_id=names,
    arrival_unix_ms=st.integers(0, 1 << 53),
    deadline_unix_ms=st.integers(0, 1 << 53),
    model=names,
    tenant=names,
    priority=st.integers(0, 4),
    prompt_tokens=st.integers(1, 1 << 31),
    max_new_tokens=st.integers(1, 1 << 31),
    prefix=st.lists(st.integers(0, (1 << 64) - 1), max_size=256).map(tuple),
    attempt=st.integers(1, 1 << 16),
    ttft_slo_ms=st.integers(0, 3_600_000),
    size_bytes=st.integers(0, 1 << 31),
    model_bytes=st.integers(0, 1 << 50),
)


@given(requests)
def test_headers_survive_metadata(request):
    assert RequestHeaders.parse(dict(request.encode())) == request


@given(requests)
def test_headers_survive_a_proxys_base64_without_padding(request):
    pairs = dict(request.encode())
    if headers.PREFIX_BIN in pairs:
        pairs[headers.PREFIX_BIN] = base64.b64encode(pairs[headers.PREFIX_BIN]).decode().rstrip("=")
    assert RequestHeaders.parse(pairs) == request


GOOD = RequestHeaders("r", 1, 2, "sha256:0", "default", 2, 3, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (headers.REQUEST_ID, None),
        (headers.MODEL, "m" * 129),
        (headers.PRIORITY, "5"),
        (headers.PROMPT_TOKENS, "-1"),
        (headers.PROMPT_TOKENS, "0"),
        (headers.MAX_NEW_TOKENS, "many"),
        (headers.PREFIX_BIN, b"1234567"),
        (headers.PREFIX_BIN, "*"),
        (headers.TTFT_SLO_MS, "0"),
        (headers.TTFT_SLO_MS, "3600001"),
        (headers.BYTES, "0"),
        (headers.BYTES, "-5"),
        (headers.MODEL_BYTES, "0"),
    ],
)
def test_a_wrong_header_is_named(name, value):
    pairs = dict(GOOD.encode())
    if value is None:
        del pairs[name]
    else:
        pairs[name] = value
    with pytest.raises(HeaderError) as caught:
        RequestHeaders.parse(pairs)
    assert caught.value.field == name


def test_a_wish_and_a_size_are_left_out_where_there_are_none():
    names_of = {name for name, _ in GOOD.encode()}
    assert not names_of & {headers.TTFT_SLO_MS, headers.BYTES, headers.MODEL_BYTES, headers.PREFIX_BIN}
    parsed = RequestHeaders.parse(dict(GOOD.encode()))
    assert (parsed.ttft_slo_ms, parsed.size_bytes, parsed.prefix) == (0, 0, ())


def test_encoded_headers_stay_below_the_metadata_limit_of_grpc():
    full = RequestHeaders(
        "r" * 128, 1 << 53, 1 << 53, "m" * 128, "t" * 128, 4, 1 << 31, 1 << 31, ((1 << 64) - 1,) * 256,
        1 << 16, 3_600_000, 1 << 31,
    )  # fmt: skip
    wire = sum(len(k) + len(v) * (4 / 3 if isinstance(v, bytes) else 1) + 32 for k, v in full.encode())
    assert wire < 8 * 1024


@pytest.mark.parametrize(
    ("text", "name", "alias", "digest"),
    [
        ("smollm2", "smollm2", "stable", None),
        ("a.b-c_1@canary", "a.b-c_1", "canary", None),
        ("m@sha256:" + "0a" * 6, "m", None, "sha256:" + "0a" * 6),
    ],
)
def test_model_strings(text, name, alias, digest):
    ref = parse_model(text)
    assert (ref.name, ref.alias, ref.digest_prefix) == (name, alias, digest)
    assert str(parse_model(str(ref))) == str(ref)


@pytest.mark.parametrize("text", ["", "a b", "../x", "m@", "m@sha256:0a", "m@sha256:" + "G" * 12, "m" * 97])
def test_bad_model_strings_say_what_to_write(text):
    with pytest.raises(ValueError, match=r"use|give"):
        parse_model(text)


@given(st.lists(st.integers(0, 1 << 31), max_size=200), st.integers(0, 200))
def test_equal_prefixes_have_equal_hashes_and_only_those(ids, cut):
    root = prefix.root_hash("sha256:0", "")
    whole = prefix.block_hashes(ids, root)
    part = prefix.block_hashes(ids[:cut], root)
    assert len(whole) == len(ids) // prefix.BLOCK_TOKENS
    assert whole[: len(part)] == part
    if whole:
        other = [ids[0] + 1, *ids[1:]]
        assert not set(whole) & set(prefix.block_hashes(other, root))


def test_hashes_depend_on_version_and_salt():
    ids = list(range(16))
    roots = [prefix.root_hash(*pair) for pair in [("a", ""), ("b", ""), ("a", "s")]]
    assert len({prefix.block_hashes(ids, root)[0] for root in roots}) == 3


def test_the_wire_carries_one_hash_for_each_512_tokens():
    hashes = prefix.block_hashes(range(512 * 3 + 100), prefix.root_hash("a", ""))
    wire = prefix.wire_hashes(hashes)
    assert [number.to_bytes(8, "little") for number in wire] == [hashes[31], hashes[63], hashes[95]]


def test_wire_hashes_are_bounded():
    hashes = [number.to_bytes(8, "big") for number in range(32 * 300)]
    assert len(prefix.wire_hashes(hashes)) == headers.PREFIX_HASHES_MAX
