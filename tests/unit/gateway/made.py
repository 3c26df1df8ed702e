"""Small tokenizers of the two great families, made in the test, and shorthands for core values."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from services.gateway.core.catalogue import FileRef, ModelVersion
from services.gateway.core.choice import WorkerFinish, WorkerMessage
from services.gateway.core.request import Finish

TEXT = [
    "Paris is the capital of France, and the Seine runs through it.",
    "The quick brown fox jumps over the lazy dog; naïve façade, déjà vu!",
    "日本語のテキスト 中文文本 한국어 🎉👩‍👩‍👧 emoji",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    """Byte-level BPE: every byte has a token, so every text can be spelled and every split occurs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("two words", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """BPE as Llama 2 has it: U+2581 for spaces, `<0xNN>` for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz", *"ABCPS.,!", "▁the", "▁of", "▁Paris", "é"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def files_of(
    tokenizer: Tokenizer, config: dict[str, object] | None = None, **more: bytes
) -> dict[str, bytes]:
    """What a version of this tokenizer would be stored as; `more` are files by path, `_` for `.`."""
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    files["tokenizer_config.json"] = json.dumps(config or {}).encode()
    return files | {name.replace("__", "."): data for name, data in more.items()}


def version(name: str = "tiny", **changes: object) -> ModelVersion:
    """A model version of plain facts."""
    facts: dict[str, object] = {
        "name": name,
        "digest": "sha256:" + "ab" * 32,
        "context_length": 64,
        "vocab_size": 600,
        "stop_token_ids": (0,),
    }
    return ModelVersion(**(facts | changes))  # type: ignore[arg-type]


def file_ref(path: str, digest: str = "sha256:" + "0" * 64, size_bytes: int = 1) -> FileRef:
    return FileRef(path, digest, size_bytes)


def message(
    index: int, ids: list[int], finish: Finish | None = None, stop: int | None = None
) -> WorkerMessage:
    """A worker's message, without log probabilities."""
    word = None if finish is None else WorkerFinish(finish, stop)
    return WorkerMessage(index, ids, [], word, None, 0)
