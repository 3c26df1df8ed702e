"""Draws the next token of every sequence of a step at once.

Order: logit bias, penalties, forbidden stops (history.py); greedy rows take the largest logit; the others
are divided by their temperature and cut by top-k, top-p (of what top-k left) and min-p. Each cut is one
threshold on the logit, so tokens that tie with the last one kept stay. The draw inverts the distribution
function over the vocabulary in its own order, at the number that randomness.py gives for (seed,
position): a small change of the logits moves the draw only where it falls on a boundary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from services.worker.core.sequence import Sequence
from services.worker.engine.history import History, apply_history
from services.worker.engine.randomness import uniforms
from services.worker.protocol import Sampling, TokenLogprobs

Ints = NDArray[np.int64]

CANDIDATES = 1024
"""top-p looks at so many most likely tokens first; only a flatter row is sorted whole."""

SEGMENT = 256
"""Width of the pieces in which the distribution function is summed."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens of a step, and the log probabilities of those sequences that want them."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probabilities of the rows that want them, still on the device."""

    rows: list[int]
    own: Tensor
    """[rows], of the token that was drawn."""
    top: Tensor
    """[rows, top], the largest."""
    ids: Tensor
    """[rows, top], their tokens."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was drawn, still on the device."""

    tokens: Tensor
    """[rows], int64."""
    histories: list[History]
    logprobs: Logprobs | None

    def drawn(self, tokens: list[int] | None = None) -> Drawn:
        """Waits for the device, unless the tokens are here already, and notes them in the histories."""
        known: list[int] = self.tokens.tolist() if tokens is None else tokens
        logprobs = self._told()
        # Last: whatever runs out of memory before leaves the histories as they were.
        for history, token in zip(self.histories, known, strict=True):
            if history.seen is not None:
                history.seen.draw(token)
        return Drawn(known, logprobs)

    def _told(self) -> list[TokenLogprobs | None]:
        found: list[TokenLogprobs | None] = [None] * len(self.histories)
        if self.logprobs is not None:
            own = self.logprobs.own.tolist()
            top, ids = self.logprobs.top.tolist(), self.logprobs.ids.tolist()
            for place, row in enumerate(self.logprobs.rows):
                count = self.histories[row].sampling.logprobs
                found[row] = TokenLogprobs(own[place], ids[place][:count], top[place][:count])
        return found


class Batch:
    """Sampling parameters of the sequences that a step draws for, as tensors.

    A run of steps with the same sequences needs only one.
    """

    def __init__(self, histories: Seq[History], device: torch.device) -> None:
        self.histories = list(histories)
        self.device = device
        parameters = [history.sampling for history in histories]
        drawn = [number for number, p in enumerate(parameters) if p.temperature > 0]
        chosen = [parameters[number] for number in drawn]
        self.drawn = torch.tensor(drawn, dtype=torch.int64, device=device)
        self.drawn_rows = np.array(drawn, dtype=np.int64)
        self.all_drawn = len(drawn) == len(parameters)
        self.greedy = not drawn
        self.seeds = np.array([p.seed for p in chosen], dtype=np.uint64)
        self.temperature = self._column([p.temperature for p in chosen])
        self.cut = Cut.of(chosen, self._column)
        self.wanting = [number for number, p in enumerate(parameters) if p.logprobs >= 0]
        self.top = max((parameters[number].logprobs for number in self.wanting), default=0)
        self.plain = not any(h.sampling.logit_bias or h.looks_back for h in histories)
        self.simple = self.plain and self.greedy and not self.wanting
        """Whether each token is just the one of the largest logit."""

    def is_for(self, sequences: Seq[Sequence]) -> bool:
        """Whether these are the same sequences in the same order."""
        return len(sequences) == len(self.histories) and all(
            sequence is history.sequence for sequence, history in zip(sequences, self.histories, strict=True)
        )

    def _column(self, values: Seq[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Cut:
    """What each row keeps, [rows, 1] each; `top_k` 0, `top_p` 1 and `min_p` 0 keep all."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    ranked: bool
    """Whether any row needs its largest logits in order."""
    widest: int
    """How many of them to look at first."""

    @classmethod
    def of(cls, parameters: Seq[Sampling], column: Callable[[Seq[float]], Tensor]) -> Cut:
        top_k = [p.top_k for p in parameters]
        nucleus = any(p.top_p < 1 and not p.top_k for p in parameters)
        return cls(
            top_k=column(top_k).long(),
            top_p=column([p.top_p if p.top_p < 1 else math.inf for p in parameters]),
            min_p=column([p.min_p for p in parameters]),
            ranked=any(p.top_k or p.top_p < 1 for p in parameters),
            widest=max([*top_k, CANDIDATES if nucleus else 0]),
        )


def sample(logits: Tensor, batch: Batch) -> Drawn:
    """[rows, vocabulary] logits of the last tokens, in the order of the batch; they may be overwritten."""
    positions = np.array([len(history.sequence.tokens) for history in batch.histories], dtype=np.int64)
    return choose(logits, batch, positions).drawn()


def choose(logits: Tensor, batch: Batch, positions: Ints) -> Choice:
    """As `sample`, without waiting for the device. `positions`: where each token will stand.

    Histories that look back must know all tokens before.
    """
    if batch.simple:
        return Choice(_largest(logits), batch.histories, None)
    logits = logits.float()
    raw = logits[batch.wanting].clone() if batch.wanting else None
    if not batch.plain:
        apply_history(logits, batch.histories)
    if batch.greedy:
        chosen = _largest(logits)
    elif batch.all_drawn:
        chosen = _draw(logits, batch, positions)
    else:
        chosen = _largest(logits)
        chosen[batch.drawn] = _draw(logits[batch.drawn], batch, positions[batch.drawn_rows])
    return Choice(chosen, batch.histories, None if raw is None else _logprobs(raw, chosen, batch))


def _largest(logits: Tensor) -> Tensor:
    """The first largest of each row. On the CPU numpy takes a tenth of the time that torch does."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.argmax(logits.float().numpy(), axis=-1))
    return logits.argmax(-1)


def _draw(logits: Tensor, batch: Batch, positions: Ints) -> Tensor:
    points = torch.from_numpy(uniforms(batch.seeds, positions)).to(logits.device)
    scaled = (logits - logits.amax(-1, keepdim=True)) / batch.temperature
    weights = scaled.exp()
    weights = weights.masked_fill(scaled < _threshold(scaled, weights, batch.cut), 0.0)
    return invert(weights, points)


def _threshold(scaled: Tensor, weights: Tensor, cut: Cut) -> Tensor:
    """The smallest logit that each row keeps, [rows, 1], for logits whose largest is 0."""
    threshold = cut.min_p.log()
    if cut.ranked:
        vocabulary = scaled.shape[-1]
        ranked, enough = _ranked(scaled, weights, cut, min(cut.widest, vocabulary))
        if not enough:
            ranked, _ = _ranked(scaled, weights, cut, vocabulary)
        threshold = torch.maximum(threshold, ranked)
    return threshold


def _ranked(scaled: Tensor, weights: Tensor, cut: Cut, width: int) -> tuple[Tensor, bool]:
    """The threshold by top-k and top-p among the `width` largest, and whether those were enough."""
    vocabulary = scaled.shape[-1]
    limit = torch.where(cut.top_k > 0, cut.top_k, vocabulary)
    largest = scaled.topk(width).values
    allowed = torch.arange(width, device=scaled.device) < limit
    kept = largest.exp() * allowed
    mass = torch.where(cut.top_k > 0, kept.sum(-1, keepdim=True), weights.sum(-1, keepdim=True))
    inside = ((kept.cumsum(-1) - kept < cut.top_p * mass) & allowed).sum(-1, keepdim=True)
    unbounded = (limit == vocabulary) & torch.isinf(cut.top_p)
    threshold = largest.gather(1, inside - 1).masked_fill(unbounded, -math.inf)
    enough = (inside < width) | (limit <= width) | unbounded
    return threshold, bool(enough.all())


def invert(weights: Tensor, points: Tensor) -> Tensor:
    """The first index whose cumulated weight exceeds point · total: [rows, n] and [rows] to [rows].

    `points` are in (0, 1). A weight of 0 is never drawn.
    """
    rows, size = weights.shape
    pieces = functional.pad(weights, (0, -size % SEGMENT)).view(rows, -1, SEGMENT)
    sums = pieces.sum(-1).double()
    ends = sums.cumsum(-1)
    target = points.unsqueeze(1) * ends[:, -1:]
    piece = torch.searchsorted(ends, target, right=True).clamp(max=sums.shape[1] - 1)
    rest = (target - ends.gather(1, piece) + sums.gather(1, piece)) / sums.gather(1, piece)
    inner = pieces[torch.arange(rows, device=weights.device), piece.squeeze(1)].double().cumsum(-1)
    goal = rest.clamp(0.0, 1.0 - 1e-12) * inner[:, -1:]
    place = torch.searchsorted(inner, goal, right=True)
    return (piece * SEGMENT + place).squeeze(1).clamp(max=size - 1)


def _logprobs(raw: Tensor, chosen: Tensor, batch: Batch) -> Logprobs:
    """Of the raw logits, for the rows that want them."""
    total = raw.logsumexp(-1, keepdim=True)
    own = (raw.gather(1, chosen[batch.wanting].unsqueeze(1)) - total).squeeze(1)
    top = raw.topk(batch.top)
    return Logprobs(batch.wanting, own, top.values - total, top.indices)
