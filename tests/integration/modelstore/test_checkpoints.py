"""PyTorch checkpoints: only tensors come out of one, and what it holds beside them is refused in words."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from services.modelstore.converter import checkpoints, convert
from services.modelstore.core.ports import ConversionJob
from services.modelstore.core.refusal import Refused
from tests.integration.modelstore import made

CURE = "save the model as safetensors where you trust it (save_pretrained with transformers 4.30 or newer)"


def tensors(seed=0):
    return {name: torch.from_numpy(array) for name, array in made.weights(seed).items()}


def checkpoint_folder(path, found, shards=1, **config):
    """A folder as `made.hf_folder` makes it, with checkpoints in the place of safetensors."""
    made.hf_folder(path, **config)
    (path / "model.safetensors").unlink()
    if shards == 1:
        torch.save(found, path / "pytorch_model.bin")
        return path
    weight_map = {}
    for number in range(shards):
        part = dict(list(found.items())[number::shards])
        name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def run(source, tmp_path, dtype="float32"):
    output = tmp_path / "output"
    output.mkdir()
    job = ConversionJob("folder", "m", str(source), str(output), dtype, 1 << 30, 0, "", {})
    convert.run(job, lambda *_: None)
    return output / "model.safetensors"


def refusal(source, tmp_path):
    with pytest.raises(Refused) as caught:
        run(source, tmp_path)
    assert caught.value.reason == "SOURCE_INVALID"
    return caught.value.message


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_gives_the_same_bytes_as_the_same_weights_in_safetensors(tmp_path, shards, dtype):
    plain = run(made.hf_folder(tmp_path / "plain", made.weights()), tmp_path / made_dir(tmp_path, "a"), dtype)
    source = checkpoint_folder(tmp_path / "torch", tensors(), shards)
    stored = run(source, tmp_path / made_dir(tmp_path, "b"), dtype)
    assert stored.read_bytes() == plain.read_bytes()


def made_dir(tmp_path, name):
    (tmp_path / name).mkdir()
    return name


def test_two_names_of_one_tensor_are_stored_once_when_the_configuration_ties_them(tmp_path):
    found = tensors()
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    stored = load_file(run(checkpoint_folder(tmp_path / "tied", found), tmp_path))
    assert set(stored) == set(made.weights())


def test_either_of_two_tied_names_will_do(tmp_path):
    found = tensors()
    found["lm_head.weight"] = found.pop("model.embed_tokens.weight")
    stored = load_file(run(checkpoint_folder(tmp_path / "tied", found), tmp_path))
    assert set(stored) == set(made.weights())
    assert np.array_equal(
        stored["model.embed_tokens.weight"].numpy(), made.weights()["model.embed_tokens.weight"]
    )


def test_two_names_of_one_tensor_are_stored_twice_when_the_configuration_wants_two(tmp_path):
    found = tensors()
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    source = checkpoint_folder(tmp_path / "untied", found, tie_word_embeddings=False)
    stored = load_file(run(source, tmp_path))
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_a_piece_of_a_larger_tensor_is_stored_without_the_rest(tmp_path):
    found = tensors()
    large = torch.zeros(64)
    large[:32] = found["model.norm.weight"]
    found["model.norm.weight"] = large[:32]
    stored = load_file(run(checkpoint_folder(tmp_path / "view", found), tmp_path))
    assert torch.equal(stored["model.norm.weight"], large[:32])


def test_tied_tensors_that_differ_are_refused(tmp_path):
    found = tensors()
    found["lm_head.weight"] = found["model.embed_tokens.weight"] + 1
    assert refusal(checkpoint_folder(tmp_path / "odd", found), tmp_path) == (
        "m: config.json makes 'lm_head.weight' and 'model.embed_tokens.weight' one tensor, and the files "
        "hold two different ones; set tie_word_embeddings to false in config.json"
    )


class Evil:
    """What a pickle can do that is read without care."""

    def __reduce__(self):
        return (os.system, ("touch " + self.path,))

    def __init__(self, path):
        self.path = str(path)


def test_a_checkpoint_with_code_is_refused_and_the_code_is_not_run(tmp_path):
    found = {**tensors(), "x": Evil(tmp_path / "ran")}
    message = refusal(checkpoint_folder(tmp_path / "evil", found), tmp_path)
    assert message == f"m: pytorch_model.bin holds code (posix.system), which is never run; {CURE}"
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_a_whole_module_is_refused_as_code(tmp_path):
    message = refusal(checkpoint_folder(tmp_path / "module", torch.nn.Linear(2, 2)), tmp_path)
    assert message == (
        "m: pytorch_model.bin holds code (torch.nn.modules.linear.Linear), which is never run; " + CURE
    )


def test_code_that_the_first_look_does_not_see_is_refused_by_the_second(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "get_unsafe_globals_in_checkpoint", lambda _: [])
    found = {**tensors(), "x": Evil(tmp_path / "ran")}
    message = refusal(checkpoint_folder(tmp_path / "evil", found), tmp_path)
    assert message == (
        f"m: pytorch_model.bin holds code (it asks for more than tensors), which is never run; {CURE}"
    )
    assert not (tmp_path / "ran").exists()


def test_a_torchscript_program_is_refused_as_code(tmp_path):
    source = checkpoint_folder(tmp_path / "script", {})
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/code/__torch__.py", b"")
    assert refusal(source, tmp_path) == (
        f"m: pytorch_model.bin holds code (it is a TorchScript program), which is never run; {CURE}"
    )


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path):
    source = checkpoint_folder(tmp_path / "packed", {})
    with zipfile.ZipFile(source / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(1 << 20))
    assert refusal(source, tmp_path) == f"m: pytorch_model.bin is a compressed archive; {CURE}"


@pytest.mark.parametrize(
    ("found", "what"),
    [
        ([torch.zeros(1)], f"holds a list, not tensors by name; {CURE}"),
        (
            {"state_dict": {"w": torch.zeros(1)}},
            "holds a dict under 'state_dict', not a plain tensor; " + CURE,
        ),
        ({"epoch": 3}, f"holds a int under 'epoch', not a plain tensor; {CURE}"),
        ({3: torch.zeros(1)}, f"holds a Tensor under '3', not a plain tensor; {CURE}"),
    ],
    ids=["list", "nested", "number", "key"],
)
def test_a_checkpoint_of_other_things_than_tensors_is_refused(tmp_path, found, what):
    source = checkpoint_folder(tmp_path / "other", found)
    assert refusal(source, tmp_path) == f"m: pytorch_model.bin {what}"


def test_a_checkpoint_cut_off_anywhere_is_refused(tmp_path):
    source = checkpoint_folder(tmp_path / "cut", tensors())
    file = source / "pytorch_model.bin"
    whole = file.read_bytes()
    for number, size in enumerate((0, 100, len(whole) // 2, len(whole) - 1)):
        file.write_bytes(whole[:size])
        place = tmp_path / str(number)
        place.mkdir()
        message = refusal(source, place)
        assert message.startswith("m: pytorch_model.bin is cut off or no checkpoint")
        assert message.endswith("; fetch it again")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    source = checkpoint_folder(tmp_path / "twice", tensors(), shards=2)
    second = source / "pytorch_model-00002-of-00002.bin"
    torch.save(tensors(), second)
    assert "and in an earlier file" in refusal(source, tmp_path)
