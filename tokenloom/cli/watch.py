"""`tokenloom status --watch`: the batcher's state as it changes, of every replica of the local mesh.

A stream that breaks is opened again as long as the mesh runs. Bound: a replica that says nothing for
`SILENT_MAX_S` ends the command.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message
from loom.batcher.v1 import batcher_pb2 as pb
from loom.batcher.v1 import batcher_pb2_grpc as rpc
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule

from tokenloom.cli import local
from tokenloom.cli.errors import CliError
from tokenloom.cli.state import Mesh, Process
from tokenloom.cli.watch_history import History
from tokenloom.cli.watch_view import frame
from tokenloom.kit.channels import open_channel

INTERVAL_MIN_S = 0.02
INTERVAL_MAX_S = 60.0
INTERVAL_DEFAULT_S = 1.0
RETRY_S = 0.2
SILENT_MAX_S = 15.0
"""Time for a batcher that died to be started again."""
LOOK_S = 1.0
"""How long one look at a replica may take."""
ROWS_MAX = 50
"""Of one table, where nothing bounds the height."""
ROWS_MIN = 4
LINES_OF_HEADS = 20
"""Lines of a frame that are not rows of its three large tables."""
SERVICE = "batcher"

Tell = Callable[[str, pb.State], None]


def replicas(mesh: Mesh) -> list[Process]:
    """The mesh's batchers."""
    return [
        each for each in mesh.processes if each.name.partition("-")[0] == SERVICE and "grpc" in each.ports
    ]


def chosen(mesh: Mesh, number: int | None) -> list[Process]:
    """All batchers, or the one with this number. Raises CliError when there is none such."""
    found = replicas(mesh)
    wanted = found if number is None else found[number : number + 1]
    if not wanted:
        there = f"they are numbered 0 to {len(found) - 1}" if found else "it has none"
        raise CliError(f"no such batcher in the running mesh: {there}", status=2)
    return wanted


def run(console: Console, interval_s: float, number: int | None, *, as_json: bool) -> None:
    """Show states until interrupted. Raises CliError when the mesh goes away."""
    mesh = local.running()
    if mesh is None:
        raise CliError("no mesh is running: start one with `tokenloom up`")
    watched = chosen(mesh, number)
    view: Screen | Pages | Lines = Lines() if as_json else (Screen if console.is_terminal else Pages)(console)
    try:
        with view:
            asyncio.run(_watch_all(watched, mesh.launcher_pid, round(interval_s * 1000), view.tell))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return


async def look(process: Process) -> pb.State | None:
    """A replica's state now; None when it does not answer within `LOOK_S`."""
    channel = open_channel(_target(process))
    try:
        answer = await rpc.BatcherServiceStub(channel).GetState(pb.GetStateRequest(), timeout=LOOK_S)
        return answer.state
    except grpc.aio.AioRpcError:
        return None
    finally:
        await channel.close(None)


class Screen:
    """A whole terminal, drawn anew with each state; the last frame stays when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._histories: dict[str, History] = {}
        self._live = Live(console=console, screen=True, auto_refresh=False)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._histories:
            self._console.print(self._frames(ROWS_MAX))

    def tell(self, name: str, state: pb.State) -> None:
        _note(self._histories, name, state)
        rows = (self._console.height // len(self._histories) - LINES_OF_HEADS) // 3
        self._live.update(self._frames(max(rows, ROWS_MIN)), refresh=True)

    def _frames(self, rows_max: int) -> RenderableType:
        width = self._console.width
        parts: list[RenderableType] = []
        for name, history in sorted(self._histories.items()):
            parts += [Rule(style="dim")] if parts else []
            parts.append(frame(name, history, width=width, rows_max=rows_max))
        return Group(*parts)


class Pages:
    """Plain text, one frame after the other."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._histories: dict[str, History] = {}

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def tell(self, name: str, state: pb.State) -> None:
        history = _note(self._histories, name, state)
        self._console.print(frame(name, history, width=self._console.width, rows_max=ROWS_MAX), end="\n\n")
        self._console.file.flush()


class Lines:
    """One JSON object a line: `{"replica": …, "state": …}`, fields named as in the contract."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def tell(self, name: str, state: pb.State) -> None:
        print(json.dumps({"replica": name, "state": plain(state)}), flush=True)


def plain(message: Message) -> dict[str, Any]:
    """Every field, numbers as numbers: protobuf's own JSON writes the large ones as text."""
    return {field.name: _value(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_one(field, each) for each in value]
    return _one(field, value)


def _one(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


def _note(histories: dict[str, History], name: str, state: pb.State) -> History:
    if name in histories:
        histories[name].add(state)
    else:
        histories[name] = History(state)
    return histories[name]


def _target(process: Process) -> str:
    return f"127.0.0.1:{process.ports['grpc']}"


async def _watch_all(watched: Sequence[Process], launcher_pid: int, interval_ms: int, tell: Tell) -> None:
    tasks = [asyncio.create_task(_watch(each, launcher_pid, interval_ms, tell)) for each in watched]
    running = asyncio.current_task()
    assert running is not None, "a coroutine runs in a task"
    # A handler of the loop wakes it whichever thread the signal reaches; while nothing changes, nothing
    # else would.
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, running.cancel)
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _watch(process: Process, launcher_pid: int, interval_ms: int, tell: Tell) -> None:
    """One replica's states, over as many streams as it takes."""
    loop = asyncio.get_running_loop()
    channel = open_channel(_target(process))
    stub = rpc.BatcherServiceStub(channel)
    silent_since: float | None = None
    try:
        while True:
            try:
                async for answer in stub.WatchState(pb.WatchStateRequest(interval_ms=interval_ms)):
                    silent_since = None
                    tell(process.name, answer.state)
            except grpc.aio.AioRpcError as error:
                why = error.details() or error.code().name
            else:
                why = "its stream ended"
            mesh = local.running()
            if mesh is None or mesh.launcher_pid != launcher_pid:
                raise CliError("the mesh went away while it was watched: start one with `tokenloom up`")
            silent_since = silent_since or loop.time()
            if loop.time() - silent_since > SILENT_MAX_S:
                raise CliError(f"{process.name} does not answer ({why}); see `tokenloom logs {process.name}`")
            await asyncio.sleep(RETRY_S)
    finally:
        await channel.close(None)
