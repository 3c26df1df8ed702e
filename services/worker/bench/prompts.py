"""Prompts as token ids: random ones, or the load client's own texts, tokenised as the gateway does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from services.worker.bench.options import Kind
from tokenloom.bench import prompts
from tokenloom.bench.prompts import Calibration, Item

Maker = Callable[[Item, int], list[int]]
"""Token ids of an item, with this seed."""


def maker(kind: Kind, folder: Path, vocab_size: int, seed: int) -> Maker:
    """Raises ValueError when the model has no tokenizer, or no template, for the kind."""
    if kind == "ids":
        return lambda item, seed: prompts.token_ids(item, seed, vocab_size)
    encode = _encoder(folder, kind)
    few, many = (len(encode(prompts.probe_text(words, seed))) for words in prompts.PROBE_WORDS)
    calibration = Calibration.fit((few, many))
    return lambda item, seed: encode(prompts.text(item, seed, calibration))


def _encoder(folder: Path, kind: Kind) -> Callable[[str], list[int]]:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--prompts {kind} needs the model's tokenizer: {error}") from None
    if kind == "text":
        return lambda text: list(tokenizer(text).input_ids)
    if not tokenizer.chat_template:
        raise ValueError("--prompts chat needs a chat template, and the model has none")

    def chat(text: str) -> list[int]:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(rendered, add_special_tokens=False).input_ids)

    return chat
