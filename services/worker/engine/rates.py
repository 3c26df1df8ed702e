"""Measured speeds, for the load report: a decaying mean over what the last seconds computed."""

from __future__ import annotations

from dataclasses import dataclass, field

HALF_LIFE_S = 2.0


@dataclass(slots=True)
class _Mean:
    """Tokens over seconds, both decaying with the time that was measured."""

    tokens: float = 0.0
    seconds: float = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        kept = 0.5 ** (seconds / HALF_LIFE_S)
        self.tokens = self.tokens * kept + tokens
        self.seconds = self.seconds * kept + seconds

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Rates:
    """Tokens a second; 0 until something was measured."""

    _prefill: _Mean = field(default_factory=_Mean)
    _decode: _Mean = field(default_factory=_Mean)

    def note(self, prefilled: int, decoded: int, duration_ns: int) -> None:
        """One step. The time of a mixed one is shared by tokens, which flatters decodes a little."""
        total = prefilled + decoded
        for mean, tokens in ((self._prefill, prefilled), (self._decode, decoded)):
            if tokens and duration_ns:
                mean.note(tokens, duration_ns / 1e9 * tokens / total)

    @property
    def prefill_tokens_per_s(self) -> float:
        return self._prefill.rate

    @property
    def decode_tokens_per_s(self) -> float:
        return self._decode.rate
