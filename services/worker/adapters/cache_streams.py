"""Who may have a stream: a bound over all blobs, shared evenly between those that want one.

With several files under way each is better off with one stream than one of them with all: its bytes come in
order, so its hash keeps up, and its writers do not wait for each other.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Streams:
    """At most `streams_max` at once."""

    def __init__(self, streams_max: int) -> None:
        self.max = streams_max
        self._active: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def one(self, blob: str) -> AsyncIterator[None]:
        """A stream of this blob, as long as the block lasts."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((blob, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._active[blob] -= 1
                self._active += Counter()
            else:
                self._waiting.remove((blob, turn))
            self._admit()

    def _admit(self) -> None:
        """Those who wait, as long as there are streams: the blob with the fewest first."""
        while self._active.total() < self.max:
            # One that was cancelled is still listed until its task runs again.
            waiting = [entry for entry in self._waiting if not entry[1].done()]
            if not waiting:
                return
            entry = min(waiting, key=lambda entry: self._active[entry[0]])
            self._waiting.remove(entry)
            self._active[entry[0]] += 1
            entry[1].set_result(None)
