"""Tokenizer, chat template and generation defaults as files that need nothing but `tokenizers` and Jinja."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from services.modelstore.core import facts
from services.modelstore.core.folder_source import GENERATION_CONFIG, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from services.modelstore.core.refusal import source_invalid


@dataclass(frozen=True)
class Text:
    """What was found in the source."""

    tokenizer: Tokenizer
    raw_tokenizer: bytes
    """tokenizer.json as it is stored."""
    tokenizer_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    template: str
    end_ids: tuple[int, ...] = ()


def from_folder(label: str, folder: Path) -> Text:
    """Raises Refused when tokenizer.json is not readable."""
    raw = (folder / TOKENIZER).read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except Exception as error:
        raise source_invalid(label, f"tokenizer.json is not readable: {error}") from error
    config = _read_json(folder / TOKENIZER_CONFIG)
    jinja = folder / TEMPLATE
    template = facts.pick_template(jinja.read_text() if jinja.exists() else None, config)
    return Text(tokenizer, raw, config, _read_json(folder / GENERATION_CONFIG), template)


def from_gguf(file: Path, split: str, add_bos: bool, end_ids: tuple[int, ...]) -> Text:
    """The tokenizer that a GGUF file's vocabulary describes."""
    loaded = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer: Tokenizer = loaded.backend_tokenizer
    if split == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokens = {key: getattr(loaded, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    config = {key: token for key, token in tokens.items() if token} | {
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizer.post_processor = _bos_processor(tokenizer, config["bos_token"] if add_bos else "")
    return Text(
        tokenizer, tokenizer.to_str(pretty=True).encode(), config, {}, loaded.chat_template or "", end_ids
    )


def _bos_processor(tokenizer: Tokenizer, bos: str) -> Any:
    if not bos:
        return processors.ByteLevel(trim_offsets=False)
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def tokenizer_facts(text: Text) -> facts.TokenizerFacts:
    """What the core needs to know about special tokens."""
    added = text.tokenizer.get_added_tokens_decoder()
    encoding = text.tokenizer.encode("a")
    first = encoding.ids[0] if encoding.ids and encoding.special_tokens_mask[0] else None
    return facts.TokenizerFacts(
        eos_token=facts.token_text(text.tokenizer_config.get("eos_token")),
        special_tokens={token.content: i for i, token in added.items() if token.special},
        chat_template=text.template,
        declared_end_ids=text.end_ids,
        first_token_id=first,
    )


def last_token(text: Text) -> tuple[str, int]:
    """The token with the largest id that text can become, and that id.

    Special tokens that were added and are never written count not: some families name such a token beyond
    their vocabulary, and whoever asks for it is refused.
    """
    added = text.tokenizer.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    vocabulary = text.tokenizer.get_vocab(with_added_tokens=True)
    return max(
        ((token, i) for token, i in vocabulary.items() if token not in special),
        key=lambda item: item[1],
        default=("", 0),
    )


def write(text: Text, folder: Path, stop_ids: tuple[int, ...], config: Mapping[str, Any]) -> list[str]:
    """Write the files and name them. The template is a file of its own and in no other place."""
    (folder / TOKENIZER).write_bytes(text.raw_tokenizer)
    tokenizer_config = {k: v for k, v in text.tokenizer_config.items() if k != "chat_template"}
    write_json(folder / TOKENIZER_CONFIG, tokenizer_config)
    generation = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    write_json(
        folder / GENERATION_CONFIG, {**generation, **text.generation_config, "eos_token_id": list(stop_ids)}
    )
    files = [TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG]
    if text.template:
        (folder / TEMPLATE).write_text(text.template)
        files.append(TEMPLATE)
    return files


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The same bytes for the same value."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return value
