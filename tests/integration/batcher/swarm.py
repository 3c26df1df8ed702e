"""The real batcher behind the real Envoy, and one real worker front with the sim engine.

The worker has few places. A plug holds every place until a test has its requests queued:
what comes then is a matter of order, not of time.
"""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

from loom.inference.v1 import inference_pb2
from loom.worker.v1 import worker_pb2, worker_pb2_grpc
from prometheus_client import CollectorRegistry

from services.batcher.app import BatcherApp
from services.batcher.settings import BatcherSettings
from services.worker.sim.swarm import SwarmSettings, SwarmWorker
from tests.integration.batcher.harness import MODEL, PATIENCE_S, Mesh
from tests.integration.envoy.harness import Mesh as EnvoyMesh
from tokenloom.contract.headers import RequestHeaders
from tokenloom.kit.clock import SystemClock

BYPASSED = "http.mesh.ext_proc.failure_mode_allowed"
INTERACTIVE, STANDARD, BATCH = 1, 2, 3
PLUG_TOKENS = 8_000
WAVE = 100
"""Requests sent at once: the batcher must answer each within Envoy's second, on a busy machine too."""
STEP_MS = 20.0


class House:
    """The mesh, and what is sent through it."""

    def __init__(self, made, envoy, places):
        self.made = made
        self.envoy = envoy
        self.places = places
        self.stub = worker_pb2_grpc.WorkerServiceStub(envoy.channel)
        self.started = []
        """Names in the order of their first tokens."""
        self.failed = []
        self._more = asyncio.Condition()
        self._sent = 0

    def call(self, tenant, *, priority=STANDARD, prompt=16, new=2):
        """One request, as a gateway sends it."""
        self._sent += 1
        request_id, now_ms = f"{tenant}-{self._sent}", SystemClock().unix_ms()
        metadata = RequestHeaders(
            request_id=request_id,
            arrival_unix_ms=now_ms,
            deadline_unix_ms=now_ms + 120_000,
            model=MODEL,
            tenant=tenant,
            priority=priority,
            prompt_tokens=prompt,
            max_new_tokens=new,
        ).encode()
        request = worker_pb2.GenerateRequest(
            request_id=request_id,
            model_version=MODEL,
            prompt_token_ids=[self._sent % 256, self._sent // 256 % 256] * (prompt // 2),
            max_new_tokens=new,
            sampling=inference_pb2.SamplingParams(seed=1),
            priority=priority,
            tenant=tenant,
        )
        return self.stub.Generate(request, metadata=metadata)

    async def follow(self, name, call):
        """Read one to its end."""
        tokens = 0
        try:
            async for response in call:
                if not tokens:
                    async with self._more:
                        self.started.append(name)
                        self._more.notify_all()
                tokens += len(response.tokens.token_ids)
        finally:
            if not tokens:
                self.failed.append(name)
            call.cancel()

    @asynccontextmanager
    async def plugged(self):
        """Every place is taken; leaving frees them all."""
        calls = [self.call("plug", new=PLUG_TOKENS) for _ in range(self.places)]
        try:
            for call in calls:
                async with asyncio.timeout(PATIENCE_S):
                    await call.read()
            yield
        finally:
            for call in calls:
                call.cancel()

    async def queue(self, asks):
        """Send (name, keywords) pairs and return when all of them wait; the tasks that follow them."""
        tasks, before = [], await self.depth()
        for first in range(0, len(asks), WAVE):
            for name, keywords in asks[first : first + WAVE]:
                tasks.append(asyncio.create_task(self.follow(name, self.call(name, **keywords))))
            wanted = before + len(tasks)
            await self.made.until(lambda state, wanted=wanted: _depth(state) >= wanted)
        return tasks

    async def first(self, count, tasks):
        """The names of the first so many that were served; the others of `tasks` are called off."""
        async with asyncio.timeout(PATIENCE_S), self._more:
            await self._more.wait_for(lambda: len(self.started) >= count)
        names, failed = self.started[:count], list(self.failed)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert failed == []
        return names

    async def depth(self):
        """Requests that wait."""
        return _depth(await self.made.state())


def _depth(state):
    return sum(queue.depth for queue in state.queues)


@asynccontextmanager
async def house(tmp_path, places, **settings):
    """One worker with so many places, and everything before it, up to the gateway's side."""
    common = {
        "host": "127.0.0.1",
        "engine": "sim",
        "models": "sim",
        "swarm_ports": "1",
        "swarm_version": MODEL,
    }
    worker = SwarmWorker(SwarmSettings(**common, sequences_max=places, sim_step_ms=STEP_MS), 0)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(worker.close)
        await worker.start()
        values = {
            "port": 0,
            "health_port": 0,
            "workers": f"127.0.0.1:{worker.port}",
            "report_stale_ms": 5_000,
        }
        app = BatcherApp(BatcherSettings(**(values | settings)), CollectorRegistry())
        stack.push_async_callback(app.close)
        await app.start()
        made = Mesh(app, [])
        stack.push_async_callback(made.channel.close, None)
        envoy = EnvoyMesh(stack, tmp_path)
        at = {"worker": [("127.0.0.1", worker.port)], "batcher": [("127.0.0.1", app.port)]}
        await envoy.start(workers=0, batchers=0, endpoints=at, trace_ratio=0.0)
        await made.until(lambda state: any(m.free_sequences for w in state.workers for m in w.models))
        yield House(made, envoy, places)
