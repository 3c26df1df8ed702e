"""GGUF heads: read whole, and refused with the place where they break."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.modelstore.core.gguf import Counted, GgufError, data_end, parse
from services.modelstore.core.gguf_source import inspect
from services.modelstore.core.refusal import Refused
from tests.unit.modelstore.made import BLOCK_SIZES, F32, GGUF_METADATA, Q4_1, TYPE_NAMES, gguf_file

WHOLE = gguf_file()


def plan(data=WHOLE, size=None):
    return inspect("m.gguf", data, len(data) if size is None else size, BLOCK_SIZES, TYPE_NAMES)


def refused(reason, data=WHOLE, size=None):
    with pytest.raises(Refused) as caught:
        plan(data, size)
    assert caught.value.reason == reason
    assert caught.value.message.startswith("m.gguf: ")
    assert "\n" not in caught.value.message
    return caught.value.message


def without(key):
    return {k: v for k, v in GGUF_METADATA.items() if k != key}


def test_a_whole_head_is_read():
    header = parse(WHOLE)
    assert header.version == 3
    assert header.text("general.architecture") == "llama"
    assert header.number("llama.context_length") == 512
    assert header.metadata["tokenizer.ggml.tokens"] == Counted(3)
    assert [(t.name, t.shape, t.type_id) for t in header.tensors] == [("w", (32, 4), Q4_1)]
    assert header.data_start % 32 == 0
    assert data_end(header, BLOCK_SIZES) == (len(WHOLE), "w")


def test_an_accepted_file_says_what_its_conversion_needs():
    found = plan()
    assert (found.model_type, found.split, found.quantization) == ("llama", "digits", "Q4_1")
    assert (found.license, found.end_ids, found.add_bos) == ("apache-2.0", (2,), False)


def test_a_file_cut_off_anywhere_is_refused():
    for size in range(len(WHOLE)):
        assert "fetch the file again" in refused("SOURCE_INVALID", WHOLE[:size])


def test_a_cut_in_the_data_names_the_tensor_and_the_sizes():
    message = refused("SOURCE_INVALID", WHOLE[:-1])
    assert f"tensor 'w' ends at byte {len(WHOLE)}, the file has {len(WHOLE) - 1}" in message


def test_a_cut_in_the_head_names_the_place():
    assert "inside the header" in refused("SOURCE_INVALID", WHOLE[:10])
    assert "inside metadata entry 1 of 10" in refused("SOURCE_INVALID", WHOLE[:30])


def outcome(read):
    """What was read, or why it was refused."""
    try:
        return read()
    except GgufError as error:
        return str(error)


def is_one_line(text):
    return bool(text) and "\n" not in text


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    found = outcome(lambda: parse(b"GGUF" + struct.pack("<I", 3) + data).data_start)
    assert is_one_line(found) if isinstance(found, str) else found >= 0


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_one_changed_byte_never_crashes_the_reader(at, value):
    data = bytearray(WHOLE)
    data[at] = value
    found = outcome(lambda: data_end(parse(bytes(data)), BLOCK_SIZES)[0])
    assert is_one_line(found) if isinstance(found, str) else found >= 0


def test_wrong_magic_and_old_versions_are_named():
    assert "it is no GGUF file" in refused("SOURCE_INVALID", b"GGML" + WHOLE[4:])
    assert "version 1" in refused("SOURCE_INVALID", b"GGUF" + struct.pack("<I", 1) + WHOLE[8:])


def test_absurd_counts_are_refused_before_anything_is_allocated():
    data = b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1)
    assert "claims" in refused("SOURCE_INVALID", data)


@pytest.mark.parametrize("missing", ["tokenizer.ggml.tokens", "general.architecture"])
def test_a_file_without_tokenizer_or_architecture_is_refused_by_that_name(missing):
    assert missing in refused("SOURCE_INVALID", gguf_file(without(missing)))


def test_a_vocabulary_only_file_is_refused():
    assert "no tensors" in refused("SOURCE_INVALID", gguf_file(tensors=()))


def test_an_unknown_tensor_type_or_odd_shape_is_refused():
    assert "no whole number of blocks" in refused("SOURCE_INVALID", gguf_file(tensors=[("w", (33,), Q4_1)]))
    header = parse(gguf_file(tensors=[("w", (4,), F32)]))
    with pytest.raises(GgufError, match="unknown type 0"):
        data_end(header, {})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"general.architecture": "mamba"}, "recurrent"),
        ({"general.architecture": "command-r"}, "Hugging Face folder"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling"),
        ({"llama.attention.sliding_window": 4096}, "sliding window"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert'"),
        ({"tokenizer.ggml.pre": "brand-new"}, "tokenizer.ggml.pre 'brand-new'"),
    ],
)
def test_what_the_conversion_would_lose_is_refused(changes, word):
    assert word in refused("MODEL_UNSUPPORTED", gguf_file({**GGUF_METADATA, **changes}))


def test_rotary_factors_are_refused():
    tensors = [("w", (32, 4), Q4_1), ("rope_freqs.weight", (32,), F32)]
    assert "rope_freqs" in refused("MODEL_UNSUPPORTED", gguf_file(tensors=tensors))


@pytest.mark.parametrize(
    ("changes", "adds"),
    [
        ({"tokenizer.ggml.add_bos_token": True}, True),
        ({"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.model": "llama"}, False),
    ],
)
def test_a_stated_first_token_wins(changes, adds):
    assert plan(gguf_file({**GGUF_METADATA, **changes})).add_bos is adds


@pytest.mark.parametrize(
    ("changes", "adds"),
    [
        ({"tokenizer.ggml.model": "llama"}, True),
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.pre": "qwen2"}, False),
    ],
)
def test_an_unstated_first_token_follows_the_kind_of_vocabulary(changes, adds):
    metadata = {**without("tokenizer.ggml.add_bos_token"), **changes}
    assert plan(gguf_file(metadata)).add_bos is adds


def test_ends_of_turn_by_id_are_collected():
    metadata = {**GGUF_METADATA, "tokenizer.ggml.eot_token_id": 1}
    assert plan(gguf_file(metadata)).end_ids == (1, 2)
