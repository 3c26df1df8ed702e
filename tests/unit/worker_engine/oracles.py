"""Slow and plain: what the fast paths are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """One query [heads, dim] over all tokens up to its own: keys and values [tokens, kv_heads, dim].

    Everything in float64, one head and one token at a time.
    """
    tokens, kv_heads, _ = keys.shape
    heads = query.shape[0]
    out = torch.zeros(heads, values.shape[-1], dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // kv_heads)
        visible = [t for t in range(tokens) if not window or t > tokens - 1 - window]
        scores = []
        for token in visible:
            score = float(query[head].double() @ keys[token, group].double()) * scale
            scores.append(softcap * math.tanh(score / softcap) if softcap else score)
        weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
        for weight, token in zip(weights, visible, strict=True):
            out[head] += weight * values[token, group].double()
    return out


def kept_tokens(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
    """The tokens that survive the cuts, and their probabilities."""
    scaled = [logit / temperature for logit in logits]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    order = order[: top_k or len(order)]
    weights = {token: math.exp(scaled[token] - scaled[order[0]]) for token in order}
    total = sum(weights.values())
    kept, mass = [], 0.0
    for token in order:
        if mass < top_p * total or top_p >= 1:
            kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= min_p]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}
