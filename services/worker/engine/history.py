"""What a sequence's past does to its next logits: biases, penalties, forbidden stop tokens.

Each sequence keeps flat arrays of the token ids concerned; a step joins those of the whole batch into
(row, id) pairs and changes all of them with a few indexed operations, however many sequences there are.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.worker.core.sequence import Sequence
from services.worker.protocol import Sampling


class Seen:
    """Distinct tokens of one sequence, and how often each is in its output."""

    def __init__(self, tokens: Seq[int], prompt_tokens: int) -> None:
        self.size = 0
        self._ids: NDArray[np.int64] = np.empty(256, dtype=np.int64)
        self._counts: NDArray[np.float32] = np.empty(256, dtype=np.float32)
        self._places: dict[int, int] = {}
        for number, token in enumerate(tokens):
            self._note(token, int(number >= prompt_tokens))

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: self.size]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: self.size]

    def draw(self, token: int) -> None:
        """Counts one more token of the output."""
        self._note(token, 1)

    def _note(self, token: int, output: int) -> None:
        place = self._places.setdefault(token, self.size)
        if place == self.size:
            if self.size == len(self._ids):
                self._ids = np.resize(self._ids, 2 * self.size)
                self._counts = np.resize(self._counts, 2 * self.size)
            self._ids[place], self._counts[place] = token, 0
            self.size += 1
        self._counts[place] += output


@dataclass(slots=True, eq=False)
class History:
    """One sequence's part: `seen` only where a penalty needs it."""

    sequence: Sequence
    sampling: Sampling
    seen: Seen | None

    @classmethod
    def of(cls, sequence: Sequence, sampling: Sampling) -> History:
        penalised = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
        seen = Seen(sequence.tokens, sequence.prompt_tokens) if penalised else None
        return cls(sequence, sampling, seen)

    @property
    def looks_back(self) -> bool:
        """Whether the next draw depends on what was drawn before."""
        return self.seen is not None or bool(self.sequence.min_new_tokens and self.sequence.stop_token_ids)

    @property
    def stops_forbidden(self) -> bool:
        """Whether the next token may not be a stop token yet."""
        return self.sequence.output_tokens < self.sequence.min_new_tokens


def apply_history(logits: Tensor, histories: Seq[History]) -> None:
    """Changes [batch, vocabulary] logits in place: bias, repetition, presence and frequency, stops.

    The repetition penalty concerns prompt and output, the other two the output alone.
    """
    biased = [(row, h.sampling.logit_bias) for row, h in enumerate(histories) if h.sampling.logit_bias]
    if biased:
        ids = [token for _, bias in biased for token in bias]
        rows = [row for row, bias in biased for _ in bias]
        values = [value for _, bias in biased for value in bias.values()]
        where = (_indices(rows, logits), _indices(ids, logits))
        logits[where] += torch.tensor(values, dtype=logits.dtype, device=logits.device)
    penalised = [(row, h.sampling, h.seen) for row, h in enumerate(histories) if h.seen and h.seen.size]
    if penalised:
        _penalise(logits, [(row, sampling, seen) for row, sampling, seen in penalised])
    forbidden = [
        (row, token)
        for row, h in enumerate(histories)
        if h.stops_forbidden
        for token in h.sequence.stop_token_ids
    ]
    if forbidden:
        rows, ids = [list(part) for part in zip(*forbidden, strict=True)]
        logits[_indices(rows, logits), _indices(ids, logits)] = float("-inf")


def _penalise(logits: Tensor, parts: Seq[tuple[int, Sampling, Seen]]) -> None:
    sizes = [seen.size for _, _, seen in parts]
    counts = np.concatenate([seen.counts for _, _, seen in parts])
    per_row = np.array(
        [(row, s.repetition_penalty, s.presence_penalty, s.frequency_penalty) for row, s, _ in parts]
    ).repeat(sizes, axis=0)
    taken = per_row[:, 2] * (counts > 0) + per_row[:, 3] * counts
    ids = _indices(np.concatenate([seen.ids for _, _, seen in parts]), logits)
    where = (_indices(per_row[:, 0].astype(np.int64), logits), ids)
    factor = torch.from_numpy(per_row[:, 1].astype(np.float32)).to(logits.device)
    old = logits[where]
    new = torch.where(old > 0, old / factor, old * factor)
    logits[where] = new - torch.from_numpy(taken.astype(np.float32)).to(logits.device)


def _indices(values: Seq[int] | NDArray[np.int64], logits: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64).to(logits.device)
