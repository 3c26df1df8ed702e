"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.gateway.core.choice import PositionLogprobs

LOGPROB_MIN = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

TokenBytes = Callable[[int], bytes]


def chat_entries(
    ids: Sequence[int], logprobs: Sequence[PositionLogprobs], token_bytes: TokenBytes
) -> list[dict[str, object]]:
    """`choices[].logprobs.content`: one entry a token, with its alternatives."""
    entries = []
    for token_id, position in zip(ids, logprobs, strict=False):
        entry = _entry(token_bytes(token_id), position.chosen)
        alternatives = zip(position.top_ids, position.top, strict=False)
        entry["top_logprobs"] = [_entry(token_bytes(i), value) for i, value in alternatives]
        entries.append(entry)
    return entries


class TextLogprobs:
    """`choices[].logprobs` of a text completion; counts character offsets over one output."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._offset = 0

    def columns(self, ids: Sequence[int], logprobs: Sequence[PositionLogprobs]) -> dict[str, list[object]]:
        """Parallel lists for the next tokens."""
        columns: dict[str, list[object]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, position in zip(ids, logprobs, strict=False):
            text = _text(self._token_bytes(token_id))
            alternatives = zip(position.top_ids, position.top, strict=False)
            columns["tokens"].append(text)
            columns["token_logprobs"].append(_finite(position.chosen))
            columns["top_logprobs"].append(
                {_text(self._token_bytes(i)): _finite(value) for i, value in alternatives} or None
            )
            columns["text_offset"].append(self._offset)
            self._offset += len(text)
        return columns


def _entry(spelling: bytes, logprob: float) -> dict[str, object]:
    return {"token": _text(spelling), "logprob": _finite(logprob), "bytes": list(spelling)}


def _text(spelling: bytes) -> str:
    return spelling.decode("utf-8", "replace")


def _finite(value: float) -> float:
    return value if value > LOGPROB_MIN else LOGPROB_MIN
