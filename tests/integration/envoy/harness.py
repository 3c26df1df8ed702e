"""Starts the fakes and a real Envoy with the project's own files, and calls through it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import urllib.request
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from tokenloom.cli import envoy, ports

GENERATE = "/loom.worker.v1.WorkerService/Generate"
WAIT_S = 60.0
"""The longest that any one event is waited for."""

Metadata = list[tuple[str, str | bytes]]


class Fake:
    """One fake process: its events so far, and a way to wait for more."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self.events: list[dict] = []
        self._changed = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, kind: str, port: int, **settings: object) -> Fake:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.integration.envoy.fakes", kind, str(port), json.dumps(settings)),
            cwd=envoy.ROOT,
            env={"PYTHONPATH": f"{envoy.ROOT}:{envoy.ROOT / 'gen'}"},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        fake = cls(process, port)
        await fake.saw("ready")
        return fake

    async def _read(self) -> None:
        while line := await self.process.stdout.readline():
            async with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()

    def of(self, name: str) -> list[dict]:
        return [e for e in self.events if e["event"] == name]

    async def saw(self, name: str, count: int = 1) -> list[dict]:
        """The events of this name, once there are `count`."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: len(self.of(name)) >= count)
        return self.of(name)

    def tell(self, **command: object) -> None:
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reader


@dataclass
class Answer:
    """How one call ended."""

    tokens: list[bytes] = field(default_factory=list)
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    initial: dict = field(default_factory=dict)
    trailing: dict = field(default_factory=dict)
    took_s: float = 0.0

    @property
    def worker(self) -> str:
        return self.initial.get("x-loom-worker", "")


class Mesh:
    """A real Envoy between a gRPC client and fakes."""

    def __init__(self, stack: AsyncExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self.workers: list[Fake] = []
        self.batchers: list[Fake] = []
        self.ports: envoy.EnvoyPorts
        self._envoy: asyncio.subprocess.Process
        self.channel: grpc.aio.Channel

    async def fake(self, kind: str, port: int, **settings: object) -> Fake:
        fake = await Fake.start(kind, port, **settings)
        self._stack.push_async_callback(fake.kill)
        return fake

    async def start(
        self,
        *,
        workers: int = 2,
        batchers: int = 1,
        change: Callable[[dict, str], None] | None = None,
        endpoints: dict[str, list[envoy.Address]] | None = None,
        trace_ratio: float = 1.0,
        **batcher: object,
    ) -> Mesh:
        """Start everything; the batcher picks worker 0 unless told otherwise.

        `change(resource, name)` may break a listener or cluster, to show what goes wrong without it.
        """
        numbers = ports.free_ports(4 + workers + batchers + 1, random.Random())
        self.ports = envoy.EnvoyPorts(*numbers[:4])
        worker_ports, batcher_ports = numbers[4 : 4 + workers], numbers[4 + workers : -1]
        batcher.setdefault("picks", [f"127.0.0.1:{port}" for port in worker_ports[:1]])
        self.workers = await asyncio.gather(*(self.fake("worker", port) for port in worker_ports))
        self.batchers = await asyncio.gather(*(self.fake("batcher", p, **batcher) for p in batcher_ports))
        places = {
            "worker": [("127.0.0.1", port) for port in worker_ports],
            "batcher": [("127.0.0.1", port) for port in batcher_ports],
            "gateway_grpc": [("127.0.0.1", numbers[-1])],
            "gateway_http": [("127.0.0.1", numbers[-1])],
            "otlp": [("127.0.0.1", numbers[-1])],
        } | (endpoints or {})
        bootstrap = envoy.write(self._folder, self.ports, places, trace_ratio=trace_ratio)
        if change is not None:
            self._change(change)
        await self._run(bootstrap)
        self.channel = self.open(self.ports.mesh)
        return self

    def _change(self, change: Callable[[dict, str], None]) -> None:
        for name in ("listeners.yaml", "clusters.yaml"):
            path = self._folder / name
            content = envoy.yaml.safe_load(path.read_text())
            for resource in content["resources"]:
                change(resource, resource["name"])
            path.write_text(envoy.yaml.safe_dump(content))

    async def _run(self, bootstrap: Path) -> None:
        binary = envoy.find_binary()
        assert binary is not None, "no Envoy: run make install"
        log = (self._folder / "envoy.log").open("wb")
        self._stack.callback(log.close)
        process = self._envoy = await asyncio.create_subprocess_exec(
            *envoy.command(binary, bootstrap, concurrency=1), stdout=log, stderr=log
        )

        async def stop() -> None:
            if process.returncode is None:
                process.kill()
            await process.wait()

        self._stack.push_async_callback(stop)
        async with asyncio.timeout(WAIT_S):
            # There is no event for it: Envoy says that it is ready only when asked.
            while await self.get("/readyz", self.ports.probes) != "LIVE\n":
                assert process.returncode is None, (self._folder / "envoy.log").read_text()[-3000:]
                await asyncio.sleep(0.05)

    async def logged(self) -> list[dict]:
        """The lines of the access log. Ends Envoy: only then it writes all that it has."""
        self._envoy.terminate()
        async with asyncio.timeout(WAIT_S):
            await self._envoy.wait()
        lines = (self._folder / "envoy.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def open(self, port: int) -> grpc.aio.Channel:
        """One connection to one of Envoy's ports."""
        channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{port}",
            options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 1 << 24)],
        )
        self._stack.push_async_callback(channel.close)
        return channel

    async def get(self, path: str, port: int | None = None) -> str:
        """The body of a GET on Envoy's admin (or another) port; empty when it cannot be reached."""
        url = f"http://127.0.0.1:{port or self.ports.admin}{path}"
        try:
            return await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
        except OSError:
            return ""

    async def stat(self, name: str) -> int:
        """One counter or gauge of Envoy's, 0 when it does not exist yet."""
        for line in (await self.get(f"/stats?filter=^{name}$")).splitlines():
            return int(line.rpartition(": ")[2])
        return 0

    async def until(self, name: str, holds: Callable[[int], bool]) -> int:
        """The value of a counter or gauge once `holds` is true of it: Envoy tells only who asks."""
        async with asyncio.timeout(WAIT_S):
            while True:
                value = await self.stat(name)
                if holds(value):
                    return value
                await asyncio.sleep(0.05)

    async def call(
        self,
        metadata: Metadata | None = None,
        *,
        method: str = GENERATE,
        channel: grpc.aio.Channel | None = None,
        padding: int = 0,
        **ask: object,
    ) -> Answer:
        """One call to its end; the worker does as `ask` says."""
        answer = Answer()
        loop = asyncio.get_running_loop()
        began = loop.time()
        stub = (channel or self.channel).unary_stream(method)
        call = stub(json.dumps(ask | {"padding": "x" * padding}).encode(), metadata=metadata or ())
        try:
            async with asyncio.timeout(WAIT_S):
                answer.initial = dict(await call.initial_metadata())
                async for token in call:
                    answer.tokens.append(token)
                answer.trailing = dict(await call.trailing_metadata())
                answer.code = await call.code()
                answer.details = await call.details()
        except grpc.aio.AioRpcError as error:
            answer.code = error.code()
            answer.details = error.details() or ""
            answer.initial = dict(error.initial_metadata() or ())
            answer.trailing = dict(error.trailing_metadata() or ())
        finally:
            call.cancel()
        answer.took_s = loop.time() - began
        return answer

    async def calls(self, count: int, **ask: object) -> list[Answer]:
        """`count` calls at once, on one connection."""
        return await asyncio.gather(*(self.call(**ask) for _ in range(count)))
