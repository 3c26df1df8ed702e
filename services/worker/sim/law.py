"""The two laws of the sim engine: how long a step takes, and which token comes where.

A token depends on the seed and its absolute position in prompt and output together, and on nothing
else: a stream that goes on elsewhere goes on identically.
"""

from __future__ import annotations

from services.worker.protocol import TokenLogprobs
from services.worker.sim.config import SimConfig

SPACE = ord(" ")
LETTERS = b"etaoinshrdlucmfwypvbgkjqxz"
WORD_CHARS = 6
"""One token in so many is a space."""
_MASK = (1 << 64) - 1


def mix(seed: int, position: int) -> int:
    """64 well-mixed bits (splitmix64; Steele, Lea and Flood, 2014)."""
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def token_at(seed: int, position: int, vocab_size: int) -> int:
    """The token at `position`: the byte of a space or a lower-case letter."""
    bits = mix(seed, position)
    byte = SPACE if bits % WORD_CHARS == 0 else LETTERS[(bits >> 32) % len(LETTERS)]
    return byte % vocab_size


def logprobs_at(seed: int, position: int, token: int, top: int, vocab_size: int) -> TokenLogprobs:
    """Log probabilities that look like some: the drawn token is the likeliest of `top`."""
    chosen = -1.0 - (mix(seed, position) & 0xFF) / 256
    ids = [(token + step) % vocab_size for step in range(min(top, vocab_size))]
    return TokenLogprobs(chosen, ids, [chosen - step for step in range(len(ids))])


def step_s(config: SimConfig, sequences: int, prefill_tokens: int) -> float:
    """Seconds that a step of so many sequences takes, `prefill_tokens` of their tokens being prompt."""
    fixed = config.step_ms / 1e3 + sequences * config.sequence_us / 1e6
    return fixed + prefill_tokens / config.prefill_tokens_per_s
