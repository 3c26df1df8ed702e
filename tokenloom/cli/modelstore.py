"""A modelstore for commands: the running mesh's, one that is named, or the store itself.

Without a mesh the service's own methods run in this process, on the folder or URL; so every command works the
same either way, and fails with the same errors.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message
from loom.modelstore.v1 import modelstore_pb2_grpc as rpc

from tokenloom.cli import local
from tokenloom.cli.errors import CliError
from tokenloom.kit import logs
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError, from_rpc_error

CALL_S = 30.0
"""How long a call may take that is not a stream, unless it is known to take longer."""


@dataclass(frozen=True)
class Place:
    """Where the modelstore is: exactly one of the two."""

    target: str | None
    store: str | None
    """A folder, or a URL of buckets."""

    def __str__(self) -> str:
        return self.target or str(self.store)


class Modelstore(Protocol):
    """Calls of loom.modelstore.v1.ModelStoreService, by name. They raise CallError."""

    async def call(self, method: str, request: Message, *, timeout_s: float = CALL_S) -> Any:
        """The response of a unary method."""
        ...

    def stream(self, method: str, request: Message) -> AsyncIterator[Any]:
        """The responses of a server stream."""
        ...


def find_modelstore(target: str | None, store: str | None) -> Place:
    """What was asked for, else the running mesh's, else this user's folder. Raises CliError for both."""
    if target and store:
        raise CliError("give --store or --target, not both", status=2)
    if store is None:
        target = target or local.running_target("modelstore")
        return Place(target, None) if target else Place(None, str(local.store_dir()))
    return Place(None, store)


def is_of_running_mesh(place: Place) -> bool:
    """Whether the running mesh's workers have their models from there."""
    target = local.running_target("modelstore")
    if target is None:
        return False
    if place.store is not None:
        return Path(place.store).absolute() == local.store_dir().absolute()
    return place.target == target


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Modelstore]:
    """Raises CliError for a store that cannot be used."""
    if place.target is None:
        yield await _open_store(place.store or str(local.store_dir()))
        return
    channel = open_channel(place.target)
    try:
        yield _Remote(rpc.ModelStoreServiceStub(channel))
    finally:
        await channel.close(None)


async def _open_store(store: str) -> Modelstore:
    # Only here: it takes a while, and a running mesh does not need it.
    from services.modelstore.app import open_offline

    logs.setup("cli", "cli", level="error", fmt="console")
    try:
        return _Offline(await open_offline(store))
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())
        raise CliError(f"the store {store}: {why}") from None


class _Remote:
    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def call(self, method: str, request: Message, *, timeout_s: float = CALL_S) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def stream(self, method: str, request: Message) -> AsyncIterator[Any]:
        call = getattr(self._stub, method)(request)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()


class _Offline:
    def __init__(self, servicer: Any) -> None:
        self._servicer = servicer

    async def call(self, method: str, request: Message, *, timeout_s: float = CALL_S) -> Any:
        # Nobody to wait for: the work is done in this process, and takes as long as it takes.
        return await getattr(self._servicer, method)(request, None)

    async def stream(self, method: str, request: Message) -> AsyncIterator[Any]:
        async with aclosing(getattr(self._servicer, method)(request, None)) as responses:
            async for response in responses:
                yield response


def explain(error: CallError, place: Place) -> str:
    """One line that names the cure where there is one."""
    if error.reason == "SERVICE_UNAVAILABLE" and place.target:
        return f"the modelstore at {place} does not answer: {error.message}"
    return f"{error.reason}: {error.message}"
