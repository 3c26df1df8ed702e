"""What the front needs from outside: a model store, a place for weights, engine processes.

Adapters implement these; tests bring their own. Types here are plain values, so that neither
generated code nor a transport enters the front's state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from services.worker.front.reservation import Reservation
from services.worker.protocol import Command, Event


@dataclass(frozen=True, slots=True)
class FileRef:
    """One file of a version: a relative path and the blob that it is."""

    path: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """What the front must know of a version before its engine runs."""

    digest: str
    """`sha256:…`"""
    name: str
    context_length: int
    vocab_size: int
    kv_bytes_per_token: int = 0
    """Over all layers, at `dtype`."""
    files: tuple[FileRef, ...] = ()
    model_type: str = ""
    """transformers' name of the family."""
    dtype: str = ""
    """Of the stored weights."""
    weight_bytes: int = 0
    """Of the stored weights; 0: not stated."""
    hidden_size: int = 0
    """Of the model's configuration; 0: not known."""
    tied: bool = True
    """Whether the head is the embedding; assumed where it is not known."""

    @property
    def stored_bytes(self) -> int:
        """The weights as they are stored; by the files where the manifest states nothing."""
        files = (file.size_bytes for file in self.files if file.path.endswith(".safetensors"))
        return self.weight_bytes or sum(files)


class ModelStore(Protocol):
    """Where versions come from."""

    async def resolve(self, model: str) -> ModelVersion:
        """The version that `name`, `name@alias` or `name@sha256:…` stands for. Raises CallError."""
        ...

    async def get_version(self, digest: str) -> ModelVersion:
        """One version by its whole digest. Raises CallError."""
        ...


class Weights(Protocol):
    """Where a version's files lie on this machine."""

    async def folder(self, version: ModelVersion, progress: Callable[[float], None]) -> str:
        """Bring every file here and return the folder; `progress` hears 0 to 1. Raises CallError.

        The folder stays until `release`, or the end of this process.
        """
        ...

    def release(self, digest: str) -> None:
        """The version's folder is no longer used: it may go. Harmless when it never was."""
        ...


class EngineLink(Protocol):
    """One running engine process. Its events go to the callback that it was launched with."""

    @property
    def ended(self) -> asyncio.Future[str]:
        """Done when the process is gone; its result says how, in a few words."""
        ...

    @property
    def pid(self) -> int:
        """The process id, for logs."""
        ...

    def send(self, command: Command) -> bool:
        """Hand a command over at once. False when the engine no longer takes any."""
        ...

    def kill(self) -> None:
        """End the process now. Harmless when it is gone."""
        ...


class Launch(Protocol):
    """Starts one engine process of one model."""

    async def __call__(self, folder: str, on_event: Callable[[Event], None]) -> EngineLink:
        """Raises OSError when no process can be started."""
        ...


class Engines(Protocol):
    """Knows the engines of this worker: what one takes, and how it is started."""

    def reserve(self, version: ModelVersion, budget_bytes: int, *, whole: bool) -> Reservation:
        """What this version's engine may take out of a budget for all engines (0: no bound).

        `whole`: it is the only model of the settings.
        """
        ...

    def launcher(self, version: ModelVersion, reservation: Reservation) -> Launch:
        """How to start this version's engine so that it keeps to its reservation."""
        ...
