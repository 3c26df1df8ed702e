"""What a person reads when a source is refused before anything is converted: the whole message."""

import json
import struct

import pytest

from services.modelstore.adapters.sources import LocalSources
from services.modelstore.core import facts
from services.modelstore.core.refusal import Refused
from services.modelstore.core.support import FAMILIES
from services.modelstore.inspection import Inspector
from tests.unit.modelstore.made import (
    BLOCK_SIZES,
    F32,
    GGUF_METADATA,
    LLAMA,
    TYPE_NAMES,
    gguf_file,
    safetensors_file,
)

KNOWN = ", ".join(sorted(FAMILIES))
WEIGHTS = safetensors_file({"w": 4})


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(WEIGHTS)
    return path


def refusal(path):
    with pytest.raises(Refused) as caught:
        Inspector(LocalSources(None), BLOCK_SIZES, TYPE_NAMES).inspect(str(path))
    return caught.value


def config(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def remove(name):
    return lambda folder: (folder / name).unlink()


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


FOLDERS = {
    "no configuration": (
        remove("config.json"),
        "SOURCE_INVALID",
        "model: has no config.json: it is no Hugging Face model folder; give a GGUF file or such a folder",
    ),
    "code of its own": (
        config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
        "MODEL_UNSUPPORTED",
        "model: LlamaForCausalLM cannot be served: config.json has an auto_map: the model brings code of its "
        "own (trust_remote_code), which is never run; remove auto_map if transformers' own implementation is "
        "meant",
    ),
    "a tokenizer that is code": (
        write("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}'),
        "MODEL_UNSUPPORTED",
        "model: tokenizer_config.json has an auto_map: its tokenizer is code (trust_remote_code), which is "
        "never run; save it as tokenizer.json",
    ),
    "recurrent": (
        config(model_type="mamba", architectures=["MambaForCausalLM"]),
        "MODEL_UNSUPPORTED",
        "model: MambaForCausalLM cannot be served: its layers are recurrent, so sequences in one flattened "
        "batch would mix",
    ),
    "an unknown family": (
        config(model_type="brand_new", architectures=["BrandNewForCausalLM"]),
        "MODEL_UNSUPPORTED",
        "model: BrandNewForCausalLM cannot be served: model_type 'brand_new' is none of those checked: "
        + KNOWN,
    ),
    "another head": (
        config(architectures=["LlamaForSequenceClassification"]),
        "MODEL_UNSUPPORTED",
        "model: LlamaForSequenceClassification cannot be served: of model_type 'llama' only LlamaForCausalLM "
        "is served",
    ),
    "dynamic rotary positions": (
        config(rope_scaling={"rope_type": "dynamic", "factor": 2}),
        "MODEL_UNSUPPORTED",
        "model: LlamaForCausalLM cannot be served: its rotary frequencies are 'dynamic', which depend on the "
        "batch; fixed ones: default, linear, llama3, yarn",
    ),
    "quantised": (
        config(quantization_config={"quant_method": "gptq"}),
        "MODEL_UNSUPPORTED",
        "model: LlamaForCausalLM cannot be served: its weights are quantised; import the model in bfloat16, "
        "float16 or float32",
    ),
    "no tokenizer": (
        rename("tokenizer.json", "tokenizer.model"),
        "SOURCE_INVALID",
        "model: has no tokenizer.json (tokenizer.model alone is not read); save the tokenizer with "
        "transformers' AutoTokenizer.save_pretrained",
    ),
    "no context": (
        config(max_position_embeddings=None),
        "SOURCE_INVALID",
        "model: config.json: max_position_embeddings is None; it must be a whole number, 1 to 16777216",
    ),
    "an impossible context": (
        config(max_position_embeddings=1 << 30),
        "SOURCE_INVALID",
        "model: config.json: max_position_embeddings is 1073741824; it must be a whole number, 1 to 16777216",
    ),
    "no weights": (remove("model.safetensors"), "SOURCE_INVALID", "model: has no weights (*.safetensors)"),
    "a cut file": (
        write("model.safetensors", WEIGHTS[:-1]),
        "SOURCE_INVALID",
        f"model: model.safetensors is cut off or no safetensors file: its tensors need {len(WEIGHTS)} bytes, "
        f"the file has {len(WEIGHTS) - 1}; fetch it again",
    ),
    "a pickle by another name": (
        rename("model.safetensors", "model.pt"),
        "SOURCE_INVALID",
        "model: model.pt is a pickle by its name, and of those only pytorch_model.bin and the files of "
        "pytorch_model.bin.index.json are read; save the model as safetensors",
    ),
    "an old checkpoint": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "pytorch_model.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF"),
        ),
        "SOURCE_INVALID",
        "model: pytorch_model.bin is no checkpoint as PyTorch writes it since version 1.6; fetch it again, "
        "or save the model as safetensors",
    ),
    "a missing shard": (
        write("model.safetensors.index.json", b'{"weight_map": {"w": "model-1.safetensors"}}'),
        "SOURCE_INVALID",
        "model: model.safetensors.index.json names model-1.safetensors, which is missing; "
        "fetch the folder again",
    ),
    "a tensor that its shard does not hold": (
        write("model.safetensors.index.json", b'{"weight_map": {"x": "model.safetensors"}}'),
        "SOURCE_INVALID",
        "model: model.safetensors.index.json places tensor 'x' in model.safetensors, which does not hold it; "
        "fetch the folder again",
    ),
}


@pytest.mark.parametrize(("break_it", "reason", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_is_refused(folder, break_it, reason, message):
    break_it(folder)
    error = refusal(folder)
    assert (error.reason, error.message) == (reason, message)


def without(key):
    return gguf_file({k: v for k, v in GGUF_METADATA.items() if k != key})


def changed(**changes):
    return gguf_file({**GGUF_METADATA, **{k.replace("__", "."): v for k, v in changes.items()}})


GGUFS = {
    "another version": (
        b"GGUF" + struct.pack("<I", 9) + bytes(64),
        "SOURCE_INVALID",
        "m.gguf: is GGUF version 9; versions 2 and 3 are read; fetch the file again",
    ),
    "a cut file": (
        gguf_file()[:-1],
        "SOURCE_INVALID",
        f"m.gguf: is cut off: tensor 'w' ends at byte {len(gguf_file())}, "
        f"the file has {len(gguf_file()) - 1}; fetch the file again",
    ),
    "no context": (
        without("llama.context_length"),
        "SOURCE_INVALID",
        "m.gguf: llama.context_length is None; it must be a whole number, 1 to 16777216",
    ),
    "no tokenizer": (
        without("tokenizer.ggml.tokens"),
        "SOURCE_INVALID",
        "m.gguf: has no tokenizer (tokenizer.ggml.tokens); use a file that holds one",
    ),
    "a vocabulary of another model": (
        gguf_file(tensors=[("token_embd.weight", (32, 2), F32)]),
        "SOURCE_INVALID",
        "m.gguf: its tokenizer has 3 tokens, and token_embd.weight has 2 rows: they are of different models; "
        "fetch the file again",
    ),
    "a recurrent architecture": (
        changed(general__architecture="mamba"),
        "MODEL_UNSUPPORTED",
        "m.gguf: GGUF architecture 'mamba' cannot be served: its layers are recurrent, so sequences in one "
        "flattened batch would mix",
    ),
    "scaled positions": (
        changed(llama__rope__scaling__type="yarn"),
        "MODEL_UNSUPPORTED",
        "m.gguf: GGUF architecture 'llama' cannot be served: it states rotary scaling "
        "(llama.rope.scaling.type = 'yarn'), which the conversion from GGUF does not carry; "
        "import the model's Hugging Face folder",
    ),
    "a checkpoint": (
        b"PK\x03\x04" + bytes(30),
        "SOURCE_INVALID",
        "m.gguf: is a PyTorch checkpoint or another archive or pickle: give the folder that holds it, with "
        "config.json and tokenizer.json",
    ),
    "safetensors": (
        WEIGHTS,
        "SOURCE_INVALID",
        "m.gguf: is a safetensors file alone: give the folder that holds it, with config.json and "
        "tokenizer.json",
    ),
    "anything": (
        b"<html>",
        "SOURCE_INVALID",
        "m.gguf: begins with b'<htm', not with b'GGUF': give a GGUF file or a Hugging Face folder",
    ),
}


@pytest.mark.parametrize(("data", "reason", "message"), GGUFS.values(), ids=GGUFS)
def test_a_file_is_refused(tmp_path, data, reason, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    error = refusal(path)
    assert (error.reason, error.message) == (reason, message)


def test_the_sources_of_these_tests_are_whole_without_their_fault(folder, tmp_path):
    inspector = Inspector(LocalSources(None), BLOCK_SIZES, TYPE_NAMES)
    (tmp_path / "m.gguf").write_bytes(gguf_file(tensors=[("token_embd.weight", (32, 3), F32)]))
    assert inspector.inspect(str(folder)).kind == "folder"
    assert inspector.inspect(str(tmp_path / "m.gguf")).kind == "gguf"


def test_a_tokenizer_of_another_model_is_refused():
    facts.check_vocabulary("model", ("last", 299), 300)
    with pytest.raises(Refused) as caught:
        facts.check_vocabulary("model", ("<extra>", 300), 300)
    assert (caught.value.reason, caught.value.message) == (
        "SOURCE_INVALID",
        "model: the tokenizer has token '<extra>' with id 300, and the model's vocabulary ends at 299; "
        "use the tokenizer that belongs to the model",
    )


@pytest.mark.parametrize("wrote", ["4.57.0", "5.23.0", "5.99.0.dev0", "", "main", None, 6])
def test_a_configuration_of_this_major_version_or_an_older_one_is_read(wrote):
    facts.check_writer("model", wrote, "5.23.0")


def test_a_configuration_of_a_later_major_version_is_refused_with_both_versions():
    with pytest.raises(Refused) as caught:
        facts.check_writer("model", "6.0.1", "5.23.0")
    assert (caught.value.reason, caught.value.message) == (
        "MODEL_UNSUPPORTED",
        "model: config.json was written by transformers 6.0.1, and transformers 5.23.0 reads it here; "
        "save the model with transformers 5, or use a newer modelstore",
    )
