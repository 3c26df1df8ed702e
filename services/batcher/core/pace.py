"""What a pool's requests taught: how long prompts take and how long requests decode. Only numbers.

A prompt's time is not proportional to its length, because attention looks back: a token after z others
takes (a + b * z) seconds. Both are fitted to what was seen of prompts that found no other ahead of
them, by linear regression with exponential forgetting. `work` then says how many average tokens a prompt
is worth, which a worker's own measured tokens per second are divided into.
"""

from __future__ import annotations

SAMPLE_TOKENS_MIN = 1_024
"""A shorter prompt says more about the rest of a step than about itself."""
SAMPLE_WEIGHT = 0.01
"""Share of the newest prompt in the fit; the first hundred count alike."""
LOOK_BACK_MAX = 1e-3
"""Most that one token of context may add to a token's work, in tokens."""
DECODE_WEIGHT = 0.02
"""Share of the newest request in the mean decode time."""
DECODE_S_UNKNOWN = 4.0
"""Assumed until a request has ended."""


class Pace:
    """Of one model on one pool of workers."""

    __slots__ = ("_cross", "_samples", "_square", "_y", "_z", "decode_s", "look_back", "mean_work", "token_s")

    def __init__(self) -> None:
        self.decode_s = DECODE_S_UNKNOWN
        """Mean seconds from a request's first token to its last."""
        self.token_s = 0.0
        """Seconds of a prompt token that looks back at nothing; 0 until it is known."""
        self.look_back = 0.0
        """How much more a token takes for each one before it, as a share of `token_s`."""
        self.mean_work = 1.0
        """Mean work of the prompt tokens that were sent out."""
        self._samples = 0
        self._z = self._y = self._square = self._cross = 0.0

    def work(self, uncached_tokens: int, prompt_tokens: int) -> float:
        """How many average prompt tokens this much of a prompt is worth, the end of it being uncached."""
        return self._raw(uncached_tokens, prompt_tokens) / self.mean_work

    def prefill_s(self, uncached_tokens: int, prompt_tokens: int) -> float:
        """Seconds to the first token on a worker with nothing ahead; 0 while that is not known."""
        return self.token_s * self._raw(uncached_tokens, prompt_tokens)

    def sent(self, uncached_tokens: int, prompt_tokens: int) -> None:
        """A prompt goes to a worker."""
        weight = min(uncached_tokens / 1e6, 1.0)
        ratio = self._raw(uncached_tokens, prompt_tokens) / uncached_tokens
        self.mean_work += weight * (ratio - self.mean_work)

    def prefilled(self, uncached_tokens: int, prompt_tokens: int, took_s: float) -> None:
        """A prompt that found nothing ahead of it has its first token."""
        if uncached_tokens < SAMPLE_TOKENS_MIN or took_s <= 0:
            return
        self._samples += 1
        weight = max(SAMPLE_WEIGHT, 1 / self._samples)
        z, y = prompt_tokens - uncached_tokens / 2, took_s / uncached_tokens
        off_z, off_y = z - self._z, y - self._y
        self._z += weight * off_z
        self._y += weight * off_y
        self._square += weight * ((1 - weight) * off_z * off_z - self._square)
        self._cross += weight * ((1 - weight) * off_z * off_y - self._cross)
        slope = max(self._cross / self._square, 0.0) if self._square > 0 else 0.0
        base = max(self._y - slope * self._z, 0.1 * self._y)
        self.token_s = base
        self.look_back = min(slope / base, LOOK_BACK_MAX)

    def decoded(self, took_s: float) -> None:
        """A request got its last token so long after the first."""
        self.decode_s += DECODE_WEIGHT * (took_s - self.decode_s)

    def _raw(self, uncached_tokens: int, prompt_tokens: int) -> float:
        return uncached_tokens * (1 + self.look_back * (prompt_tokens - uncached_tokens / 2))
