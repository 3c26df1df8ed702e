"""How far a load is: the share of the weights that was copied to the device, or packed on a CPU.

Libraries and the configuration come before the weights, warming up after them; how long those take depends
on the model little, so each has a fixed share. Bound: told `TOLD_EVERY` of the whole apart at least.
"""

from __future__ import annotations

from collections.abc import Callable

STARTED = 0.05
"""The libraries are loaded."""
WEIGHTS_FROM, WEIGHTS_TO = 0.1, 0.9
TOLD_EVERY = 0.01

Tell = Callable[[str, float], None]
"""Hears the stage, and 0 to 1 of the whole load."""


class WeightsProgress:
    """Counts the bytes of a model's weights, of which there are `total_bytes`."""

    def __init__(self, tell: Tell, total_bytes: int) -> None:
        self._tell = tell
        self._total_bytes = max(1, total_bytes)
        self._done_bytes = 0
        self._told = WEIGHTS_FROM
        tell("weights", WEIGHTS_FROM)

    def came(self, size_bytes: int) -> None:
        """So many more are where they are used from."""
        self._done_bytes += size_bytes
        share = min(1.0, self._done_bytes / self._total_bytes)
        fraction = WEIGHTS_FROM + (WEIGHTS_TO - WEIGHTS_FROM) * share
        if fraction - self._told >= TOLD_EVERY:
            self._told = fraction
            self._tell("weights", fraction)
