"""Bytes of a worker's memory that one engine may take, by what for, and bytes in words."""

from __future__ import annotations

from dataclasses import dataclass

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Reservation:
    """Bytes that one engine may take, by what for."""

    weights_bytes: int = 0
    cache_bytes: int = 0
    step_bytes: int = 0
    loading_bytes: int = 0
    """Beside the others, until the model is loaded, and again when its engine is restarted."""
    process_bytes: int = 0
    rest_bytes: int = 0
    """All that is left, for an engine that sizes its own cache."""
    kv_cache_bytes: int = 0
    """What the engine is told; 0: it chooses."""

    @property
    def total_bytes(self) -> int:
        """What the budget is charged."""
        parts = (self.weights_bytes, self.cache_bytes, self.step_bytes, self.loading_bytes)
        return sum(parts) + self.process_bytes + self.rest_bytes

    def __str__(self) -> str:
        named = {
            "weights": self.weights_bytes,
            "KV cache": self.cache_bytes,
            "a step": self.step_bytes,
            "loading": self.loading_bytes,
            "process": self.process_bytes,
            "cache of its own choice": self.rest_bytes,
        }
        return ", ".join(f"{what} {in_words(size)}" for what, size in named.items() if size)


def in_words(size_bytes: int) -> str:
    """`1.50 GiB (1,610,612,736 bytes)`, or only the bytes where they are few."""
    exact = f"{size_bytes:,} bytes"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.2f} {name} ({exact})"
    return exact
