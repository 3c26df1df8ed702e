"""One conversion from start to end: configuration, weights, text, facts."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoConfig

from services.modelstore.converter import text as text_files
from services.modelstore.converter import weights
from services.modelstore.converter.checkpoints import Checkpoints, SafetensorsFiles
from services.modelstore.converter.gguf_weights import GgufTensors
from services.modelstore.converter.shards import ShardWriter
from services.modelstore.core import facts
from services.modelstore.core.folder_source import CONFIG
from services.modelstore.core.gguf_source import GGUF_NAME
from services.modelstore.core.manifest import Facts
from services.modelstore.core.ports import ConversionJob, Converted
from services.modelstore.core.support import check_config

_NOT_STORED = (
    "_name_or_path",
    "_model_name_or_path",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
)


def run(job: ConversionJob, on_bytes: weights.OnBytes) -> Converted:
    """Raises Refused; whatever else the libraries raise is the source's doing too."""
    if job.threads:
        torch.set_num_threads(job.threads)
    source = Path(job.source)
    output = Path(job.output_dir)
    config, stored = _gguf_config(source) if job.kind == "gguf" else _folder_config(job.label, source)
    expected = weights.expect(config)
    stored |= {"architectures": [type(expected.model).__name__], "dtype": job.dtype}
    resolved = {**config.to_dict(), **stored}
    check_config(job.label, resolved)
    shape = facts.read_shape(job.label, resolved)
    text = _text(job, source)
    token_facts = text_files.tokenizer_facts(text)
    facts.check_vocabulary(job.label, text_files.last_token(text), shape.vocab_size)
    # Of what the source says, not of the class's defaults: those name tokens of another model.
    stop_ids = facts.stop_token_ids(stored, text.generation_config, token_facts, shape.vocab_size)
    writer = ShardWriter(output, job.shard_bytes_max)
    with ExitStack() as stack:
        tensors = _tensors(job, source, expected, stack)
        files = weights.write(job.label, tensors, expected, job.dtype, writer, on_bytes)
    files += text_files.write(text, output, stop_ids, stored)
    text_files.write_json(output / CONFIG, stored)
    weights.check_by_loading(job.label, output, expected, job.dtype)
    found = Facts(
        architecture=type(expected.model).__name__,
        model_type=str(resolved["model_type"]),
        dtype=job.dtype,
        context_length=shape.context_length,
        vocab_size=shape.vocab_size,
        parameters=writer.elements,
        weight_bytes=writer.size_bytes,
        kv_bytes_per_token=shape.kv_bytes_per_token(job.dtype),
        has_chat_template=bool(text.template),
        stop_token_ids=stop_ids,
        bos_token_id=facts.bos_token_id(token_facts, text.tokenizer_config, shape.vocab_size),
        license=job.license,
        checked_with={"transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
    )
    return Converted(found.to_json(), [*files, CONFIG])


def _folder_config(label: str, source: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' reading of config.json, and what is stored: the file itself."""
    stated = json.loads((source / CONFIG).read_bytes())
    facts.check_writer(label, stated.get("transformers_version"), transformers.__version__)
    return AutoConfig.from_pretrained(source), _without(stated)


def _gguf_config(source: Path) -> tuple[Any, dict[str, Any]]:
    config = AutoConfig.from_pretrained(source, gguf_file=GGUF_NAME)
    return config, _without(json.loads(config.to_json_string()))


def _without(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NOT_STORED}


def _text(job: ConversionJob, source: Path) -> text_files.Text:
    if job.kind != "gguf":
        return text_files.from_folder(job.label, source)
    ends = tuple(int(i) for i in json.loads(job.options["end_ids"]))
    add_bos = job.options["add_bos"] == "true"
    return text_files.from_gguf(source / GGUF_NAME, job.options["split"], add_bos, ends)


def _tensors(
    job: ConversionJob, source: Path, expected: weights.Expected, stack: ExitStack
) -> weights.Tensors:
    if job.kind == "gguf":
        return GgufTensors(job.label, source / GGUF_NAME, expected.model)
    files = sorted(source.glob("*.safetensors"))
    if files:
        return weights.FolderTensors(job.label, SafetensorsFiles(files, stack), expected)
    return weights.FolderTensors(job.label, Checkpoints(job.label, sorted(source.glob("*.bin"))), expected)
