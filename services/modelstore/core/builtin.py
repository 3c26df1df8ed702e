"""The built-in model `builtin:sim`: a tokenizer of 256 bytes, a chat template, and no weights.

Its token ids are byte values, so whatever draws ids draws text. It exists for load tests and for a mesh
without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from services.modelstore.core.manifest import Facts

PREFIX = "builtin:"
END = "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
CONTEXT_LENGTH = 32_768
KV_BYTES_PER_TOKEN = 1024
"""No cache is that large; the number lets block arithmetic work as with any model."""

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte value, as byte-level tokenizers spell bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def special_tokens() -> dict[str, int]:
    """Text to id: the end of a turn, then the markers of the roles."""
    return {text: 256 + i for i, text in enumerate([END, *(f"<|{role}|>" for role in ROLES)])}


def sim_files() -> Mapping[str, bytes]:
    """The files of the model, by path."""
    end = special_tokens()[END]
    return {
        "config.json": _json(
            {
                "architectures": ["Sim"],
                "eos_token_id": end,
                "max_position_embeddings": CONTEXT_LENGTH,
                "model_type": "sim",
                "vocab_size": _vocab_size(),
            }
        ),
        "generation_config.json": _json({"eos_token_id": [end]}),
        "tokenizer.json": _json(_tokenizer()),
        "tokenizer_config.json": _json(
            {
                "add_bos_token": False,
                "clean_up_tokenization_spaces": False,
                "eos_token": END,
                "model_max_length": CONTEXT_LENGTH,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        ),
        "chat_template.jinja": TEMPLATE.encode(),
    }


def sim_facts() -> Facts:
    """What its manifest states."""
    return Facts(
        architecture="Sim",
        model_type="sim",
        dtype="none",
        context_length=CONTEXT_LENGTH,
        vocab_size=_vocab_size(),
        parameters=0,
        weight_bytes=0,
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
        has_chat_template=True,
        stop_token_ids=(special_tokens()[END],),
        bos_token_id=None,
        license="Apache-2.0",
        checked_with={},
    )


def _vocab_size() -> int:
    return 256 + len(special_tokens())


def _tokenizer() -> dict[str, object]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for text, i in special_tokens().items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())},
            "merges": [],
        },
    }
