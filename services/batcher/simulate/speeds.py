"""What a worker reports of its own speed: a decaying mean over the last seconds, as the engine keeps it."""

from __future__ import annotations

HALF_LIFE_S = 2.0


class Speeds:
    """Tokens a second; 0 until something was measured. A mixed step's time is shared by tokens."""

    __slots__ = ("_decode_s", "_decode_tokens", "_prefill_s", "_prefill_tokens")

    def __init__(self) -> None:
        self._prefill_tokens = self._prefill_s = self._decode_tokens = self._decode_s = 0.0

    def note(self, prefilled: int, decoded: int, took_s: float) -> None:
        """One step, or a stretch of alike ones."""
        total = prefilled + decoded
        if prefilled:
            share_s = took_s * prefilled / total
            kept = 0.5 ** (share_s / HALF_LIFE_S)
            self._prefill_tokens = self._prefill_tokens * kept + prefilled
            self._prefill_s = self._prefill_s * kept + share_s
        if decoded:
            share_s = took_s * decoded / total
            kept = 0.5 ** (share_s / HALF_LIFE_S)
            self._decode_tokens = self._decode_tokens * kept + decoded
            self._decode_s = self._decode_s * kept + share_s

    @property
    def prefill_tokens_per_s(self) -> float:
        return self._prefill_tokens / self._prefill_s if self._prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self._decode_tokens / self._decode_s if self._decode_s else 0.0
