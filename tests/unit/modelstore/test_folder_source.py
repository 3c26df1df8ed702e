"""Hugging Face folders: accepted, or refused by the name of the file that is wrong."""

import json

import pytest

from services.modelstore.core.folder_source import (
    inspect,
    read_license,
    refuse_unknown_file,
)
from services.modelstore.core.refusal import Refused
from services.modelstore.core.safetensors import check_index, check_safetensors
from tests.unit.modelstore.made import LLAMA, safetensors_file

CONFIG = json.dumps(LLAMA).encode()
GOOD = {"config.json": CONFIG, "tokenizer.json": b"{}", "model.safetensors": b"x"}


def look(files):
    return inspect("m", {name: len(data) for name, data in files.items()}, files)


def refused(files, reason="SOURCE_INVALID"):
    with pytest.raises(Refused) as caught:
        look(files)
    assert caught.value.reason == reason
    assert caught.value.message.startswith("m: ")
    return caught.value.message


def test_a_plain_folder_is_accepted():
    plan = look(GOOD)
    assert plan.weights == ("model.safetensors",)
    assert plan.used == ("config.json", "model.safetensors", "tokenizer.json")


def test_files_that_change_nothing_are_left_out():
    extra = {"README.md": b"---\nlicense: mit\n---\n", "notes.txt": b"", "pytorch_model.bin": b""}
    plan = look(GOOD | extra)
    assert plan.used == look(GOOD).used
    assert plan.license == "mit"


def test_sharded_weights_come_from_the_index():
    index = {"weight_map": {"a": "w-2.safetensors", "b": "w-1.safetensors"}}
    shards = {"w-1.safetensors": b"", "w-2.safetensors": b"", "other.safetensors": b""}
    files = {**GOOD, "model.safetensors.index.json": json.dumps(index).encode(), **shards}
    assert look(files).weights == ("w-1.safetensors", "w-2.safetensors")


def test_a_missing_shard_is_named():
    index = json.dumps({"weight_map": {"a": "w-1.safetensors"}}).encode()
    assert "w-1.safetensors, which is missing" in refused({**GOOD, "model.safetensors.index.json": index})


@pytest.mark.parametrize("index", [b"{}", b'{"weight_map": {}}', b'{"weight_map": []}'])
def test_an_index_without_a_map_is_refused(index):
    assert "no weight_map" in refused({**GOOD, "model.safetensors.index.json": index})


def test_several_weight_files_need_an_index():
    assert "index.json" in refused({**GOOD, "other.safetensors": b""})


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "consolidated.ckpt", "weights.pkl"])
def test_pickles_of_other_names_are_refused_with_the_reason(name):
    files = {"config.json": CONFIG, "tokenizer.json": b"{}", name: b""}
    message = refused(files)
    assert message == (
        f"m: {name} is a pickle by its name, and of those only pytorch_model.bin and the files of "
        "pytorch_model.bin.index.json are read; save the model as safetensors"
    )


def test_checkpoints_are_read_when_there_are_no_safetensors():
    index = json.dumps({"weight_map": {"a": "p-1.bin", "b": "p-2.bin"}}).encode()
    text = {"config.json": CONFIG, "tokenizer.json": b"{}"}
    single = look({**text, "pytorch_model.bin": b""})
    assert (single.format, single.weights) == ("pytorch", ("pytorch_model.bin",))
    sharded = look({**text, "pytorch_model.bin.index.json": index, "p-1.bin": b"", "p-2.bin": b""})
    assert (sharded.format, sharded.weights) == ("pytorch", ("p-1.bin", "p-2.bin"))
    both = look({**GOOD, "pytorch_model.bin.index.json": index, "p-1.bin": b"", "p-2.bin": b""})
    assert (both.format, both.weights) == ("safetensors", ("model.safetensors",))


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "a/b.safetensors", "w.bin", "", 3])
def test_an_index_names_plain_files_of_its_format_only(name):
    index = json.dumps({"weight_map": {"a": name}}).encode()
    assert "no file name .safetensors" in refused({**GOOD, "model.safetensors.index.json": index})


def test_json_that_is_nested_without_end_is_not_readable():
    assert "config.json is not readable as JSON" in refused({**GOOD, "config.json": b"[" * 100_000})


def test_other_formats_and_no_weights_at_all_are_refused():
    assert "tf_model.h5 is not read" in refused(
        {"config.json": CONFIG, "tokenizer.json": b"{}", "tf_model.h5": b""}
    )
    assert "no weights" in refused({"config.json": CONFIG, "tokenizer.json": b"{}"})


@pytest.mark.parametrize(
    ("name", "hint"), [("config.json", "config.json"), ("tokenizer.json", "tokenizer.json")]
)
def test_a_missing_file_is_named(name, hint):
    assert hint in refused({key: data for key, data in GOOD.items() if key != name})


def test_an_old_tokenizer_alone_is_named_with_the_cure():
    files = {"config.json": CONFIG, "model.safetensors": b"", "tokenizer.model": b""}
    message = refused(files)
    assert "tokenizer.model alone" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff"])
def test_unreadable_json_names_its_file(name, data):
    assert name in refused({**GOOD, name: data})


def test_models_and_tokenizers_with_code_of_their_own_are_refused():
    config = json.dumps({**LLAMA, "auto_map": {"AutoConfig": "x.X"}}).encode()
    assert "trust_remote_code" in refused({**GOOD, "config.json": config}, "MODEL_UNSUPPORTED")
    tokenizer = json.dumps({"auto_map": {"AutoTokenizer": "x.X"}}).encode()
    assert "trust_remote_code" in refused({**GOOD, "tokenizer_config.json": tokenizer}, "MODEL_UNSUPPORTED")


@pytest.mark.parametrize(
    ("readme", "license_"),
    [
        (b"---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        (b'---\nlicense: "mit"\n---', "mit"),
        (b"---\nlanguage: en\n---\nlicense: mit", ""),
        (b"# a model\nlicense: mit", ""),
        (b"", ""),
        (b"\xff\xfe", ""),
    ],
)
def test_the_licence_is_the_one_of_the_front_matter(readme, license_):
    assert read_license(readme) == license_


WEIGHTS = safetensors_file({"a": 4, "b": 2})


def test_a_whole_safetensors_file_names_its_tensors():
    assert check_safetensors("m", "w.safetensors", WEIGHTS, len(WEIGHTS)) == {"a", "b"}


def test_a_safetensors_file_cut_off_anywhere_is_refused():
    for size in range(len(WEIGHTS)):
        with pytest.raises(Refused, match=r"w\.safetensors is cut off.*; fetch it again"):
            check_safetensors("m", "w.safetensors", WEIGHTS[:size], size)


def test_a_safetensors_file_with_bytes_too_many_is_refused():
    with pytest.raises(Refused, match="its tensors need"):
        check_safetensors("m", "w", WEIGHTS + b"!", len(WEIGHTS) + 1)


@pytest.mark.parametrize("header", [b"[]", b"{}}", b'{"a": 1}', b'{"a": {"data_offsets": [0]}}', b"\xff\xff"])
def test_a_malformed_safetensors_header_is_refused(header):
    data = len(header).to_bytes(8, "little") + header
    with pytest.raises(Refused, match="no safetensors file"):
        check_safetensors("m", "w", data, len(data))


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"PK\x03\x04", "PyTorch checkpoint"),
        (b"\x80\x02}q", "PyTorch checkpoint"),
        (b"\x10\0\0\0\0\0\0\0{", "safetensors file alone"),
        (b"root", "GGUF"),
    ],
)
def test_a_single_file_of_another_kind_is_refused(head, word):
    error = refuse_unknown_file("m.pt", head)
    assert error.reason == "SOURCE_INVALID"
    assert word in error.message


def raw_safetensors(tensors, size):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize(
    ("tensors", "size", "word"),
    [
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [1], [4, 8])}, 8, "lies at bytes 4 to 8"),
        ({"a": ("F32", [2], [4, 12])}, 12, "lies at bytes 4 to 12"),
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [1], [12, 16])}, 16, "the one before it ends at 8"),
        ({"a": ("F32", [3], [0, 8])}, 8, "has 8 bytes, not 12"),
        ({"a": ("BF16", [-2], [0, 4])}, 4, "has the shape [-2]"),
        ({"a": ("F32", None, [0, 4])}, 4, "has the shape None"),
        ({"a": ("F32", [1], [4, 0])}, 0, "lies at bytes 4 to 0"),
    ],
)
def test_tensors_that_overlap_or_are_not_as_long_as_they_say_are_refused(tensors, size, word):
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": span}
        for name, (dtype, shape, span) in tensors.items()
    }
    data = raw_safetensors(header, size)
    with pytest.raises(Refused) as caught:
        check_safetensors("m", "w.safetensors", data, len(data))
    assert word in caught.value.message
    assert caught.value.message.endswith("; fetch it again") or "shape" in word


def test_an_index_and_its_files_have_to_agree():
    files = {"1.safetensors": frozenset({"a"}), "2.safetensors": frozenset({"b", "extra"})}
    check_index("m", "index", {"a": "1.safetensors", "b": "2.safetensors"}, files)
    with pytest.raises(Refused) as caught:
        check_index("m", "index", {"a": "1.safetensors", "c": "2.safetensors"}, files)
    assert caught.value.message == (
        "m: index places tensor 'c' in 2.safetensors, which does not hold it; fetch the folder again"
    )
    with pytest.raises(Refused) as caught:
        check_index("m", "index", {"a": "1.safetensors"}, {**files, "3.safetensors": frozenset({"b"})})
    assert caught.value.message == (
        "m: tensor 'b' lies in 2.safetensors and again in 3.safetensors; fetch the folder again"
    )
