"""What the core's driver needs from outside, as the adapters must offer it."""

from __future__ import annotations

from typing import Protocol

from services.batcher.core.messages import LoadReport, Verdict


class FleetListener(Protocol):
    """Whoever wants to know about workers. Called on the event loop; must not block."""

    def found(self, endpoint: str) -> None:
        """A worker was discovered at `ip:port`."""
        ...

    def reported(self, endpoint: str, report: LoadReport) -> None:
        """It sent a report."""
        ...

    def lost(self, endpoint: str) -> None:
        """Its stream broke. Called once for each stream that delivered a report."""
        ...

    def removed(self, endpoint: str) -> None:
        """It is not discovered any more."""
        ...


class FleetWatch(Protocol):
    """Finds the workers and keeps a stream of load reports open to each."""

    def start(self, listener: FleetListener) -> None:
        """Begin; returns at once."""
        ...

    @property
    def discovered(self) -> bool:
        """Discovery has answered at least once."""
        ...

    async def close(self) -> None:
        """End every stream; the listener is not called any more."""
        ...


class LoadListener(Protocol):
    """Whoever wants to know what came of a load. Called on the event loop; must not block."""

    def load_ended(self, endpoint: str, model: str, verdict: Verdict | None) -> None:
        """The worker has the model, or said why not."""
        ...


class ModelLoader(Protocol):
    """Asks workers to load models."""

    def load(self, endpoint: str, model: str, listener: LoadListener) -> None:
        """Returns at once; the listener hears the end later."""
        ...

    async def close(self) -> None:
        """End every call; no listener is called any more."""
        ...


class Discovery(Protocol):
    """Says which workers there are."""

    async def endpoints(self) -> frozenset[str]:
        """`ip:port` of each. Raises OSError when it cannot be known now."""
        ...
