"""A real batcher in this process, workers that report what they are told to, and Envoy's side of ext_proc."""

import asyncio
import base64
import uuid
from contextlib import asynccontextmanager

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext
from google.rpc import status_pb2
from loom.batcher.v1 import batcher_pb2_grpc
from loom.worker.v1 import worker_pb2 as worker
from prometheus_client import CollectorRegistry

from services.batcher.app import BatcherApp
from services.batcher.settings import BatcherSettings
from tokenloom.contract import headers as names
from tokenloom.contract.headers import RequestHeaders
from tokenloom.kit.channels import open_channel
from tokenloom.kit.clock import SystemClock
from tokenloom.kit.errors import CallError, from_status
from tokenloom.kit.server import GrpcServer

MODEL = "sha256:" + "a" * 64
PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
WORKER_SERVICE = worker.DESCRIPTOR.services_by_name["WorkerService"]
PATIENCE_S = 10.0


class FakeWorker:
    """Reports what it is told to, on change and as a heartbeat."""

    HEARTBEAT_S = 0.05

    def __init__(self):
        self.port = 0
        self.report = worker.LoadReport(boot_id=uuid.uuid4().hex)
        self._changed = asyncio.Condition()
        self._server = None
        self.full = False
        self.calls = []
        """Metadata of each Generate."""
        self.release = asyncio.Event()
        self.release.set()

    @property
    def endpoint(self):
        return f"127.0.0.1:{self.port}"

    async def start(self):
        self._server = GrpcServer("127.0.0.1", self.port)
        self._server.add(WORKER_SERVICE, self, quiet={"WatchLoad"})
        self.port = await self._server.start()
        return self

    async def stop(self):
        await self._server.stop(None)

    async def WatchLoad(self, request, call):
        while True:
            self.report.sequence += 1
            yield worker.WatchLoadResponse(report=self.report)
            async with self._changed:
                try:
                    async with asyncio.timeout(self.HEARTBEAT_S):
                        await self._changed.wait()
                except TimeoutError:
                    continue

    async def Generate(self, request, call):
        self.calls.append(call.metadata)
        if self.full:
            raise CallError("WORKER_FULL", "no room", metadata={"worker": self.endpoint})
        await self.release.wait()
        call.set_initial([(names.WORKER, self.endpoint)])
        usage = worker.Usage(prompt_tokens=len(request.prompt_token_ids), completion_tokens=1)
        call.set_trailing([(names.USAGE_BIN, usage.SerializeToString())])
        yield worker.GenerateResponse(tokens=worker.Tokens(token_ids=[7]))

    async def say(self, free, *, state=worker.MODEL_STATE_READY, active=(), draining=False, progress=0.0):
        """Report this from now on."""
        del self.report.models[:]
        self.report.models.add(
            version=MODEL,
            state=state,
            progress=progress,
            free_sequences=free,
            free_blocks=10_000,
            total_blocks=10_000,
            block_tokens=16,
            sequences_max=64,
        )
        self.report.active_request_ids[:] = active
        self.report.draining = draining
        async with self._changed:
            self._changed.notify_all()


class Exchange:
    """One ext_proc stream, as Envoy opens it for one request."""

    def __init__(self, channel, metadata=()):
        method = channel.stream_stream(
            PROCESS, ext.ProcessingRequest.SerializeToString, ext.ProcessingResponse.FromString
        )
        self.call = method(metadata=metadata)
        self.held_s = None

    async def send(self, **fields):
        await self.call.write(ext.ProcessingRequest(**fields))

    async def answer(self):
        """The next answer but those that only ask for time."""
        while True:
            async with asyncio.timeout(PATIENCE_S):
                response = await self.call.read()
            if not response or not response.HasField("override_message_timeout"):
                return response
            self.held_s = response.override_message_timeout.ToMilliseconds() / 1000

    async def until_held(self):
        async with asyncio.timeout(PATIENCE_S):
            response = await self.call.read()
        assert response.HasField("override_message_timeout"), response
        self.held_s = response.override_message_timeout.ToMilliseconds() / 1000
        return self

    async def response_headers(self, served_by):
        await self.send(response_headers=http_headers({names.WORKER: served_by, ":status": "200"}))
        assert (await self.answer()).HasField("response_headers")

    async def response_trailers(self, usage):
        encoded = base64.b64encode(usage.SerializeToString()).decode().rstrip("=")
        trailers = header_map({names.USAGE_BIN: encoded, "grpc-status": "0"})
        await self.send(response_trailers=ext.HttpTrailers(trailers=trailers))
        assert (await self.answer()).HasField("response_trailers")

    async def end(self):
        """Envoy is done with this request."""
        await self.call.done_writing()
        async with asyncio.timeout(PATIENCE_S):
            assert not await self.call.read()


def header_map(pairs):
    headers = [base_pb2.HeaderValue(key=key, raw_value=value.encode()) for key, value in pairs.items()]
    return base_pb2.HeaderMap(headers=headers)


def http_headers(pairs):
    return ext.HttpHeaders(headers=header_map(pairs))


def request_headers(request_id="r", *, timeout_s=60.0, **changes):
    """A gateway's metadata, as Envoy copies it."""
    now_ms = SystemClock().unix_ms()
    values = {
        "request_id": request_id,
        "arrival_unix_ms": now_ms,
        "deadline_unix_ms": now_ms + int(timeout_s * 1000),
        "model": MODEL,
        "tenant": "default",
        "priority": 0,
        "prompt_tokens": 10,
        "max_new_tokens": 5,
        "prefix": (0x3736353433323130,),
    }
    encoded = {}
    for key, value in RequestHeaders(**(values | changes)).encode():
        encoded[key] = base64.b64encode(value).decode().rstrip("=") if isinstance(value, bytes) else value
    return {":path": "/loom.worker.v1.WorkerService/Generate", "te": "trailers", **encoded}


def picked(response):
    """(endpoint, set headers) of a pick."""
    mutation = response.request_headers.response.header_mutation
    added = {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}
    assert list(mutation.remove_headers) == [names.PREFIX_BIN]
    lb = response.dynamic_metadata.fields["envoy.lb"].struct_value
    assert lb.fields[names.DESTINATION].string_value == added[names.DESTINATION]
    return added[names.DESTINATION], added


def refused(response):
    """(the error as a gateway reads it, set headers) of a refusal."""
    immediate = response.immediate_response
    added = {option.header.key: option.header.raw_value.decode() for option in immediate.headers.set_headers}
    details = added["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(details + "=" * (-len(details) % 4)))
    assert status.code == immediate.grpc_status.status
    return from_status(status), added


class Mesh:
    """A batcher, its workers, and channels to it."""

    def __init__(self, app, workers):
        self.app = app
        self.workers = workers
        self.channel = open_channel(f"127.0.0.1:{app.port}")
        self.stub = batcher_pb2_grpc.BatcherServiceStub(self.channel)

    async def open(self, request_id="r", *, metadata=(), **changes):
        """A request as it reaches the batcher."""
        exchange = Exchange(self.channel, metadata)
        await exchange.send(request_headers=http_headers(request_headers(request_id, **changes)))
        return exchange

    async def hold(self, request_id="r", **changes):
        """A request that the batcher holds."""
        return await (await self.open(request_id, **changes)).until_held()

    async def state(self):
        from loom.batcher.v1 import batcher_pb2

        return (await self.stub.GetState(batcher_pb2.GetStateRequest())).state

    async def until(self, condition):
        """Look at the state whenever it changes, until `condition(state)` holds."""
        from loom.batcher.v1 import batcher_pb2

        call = self.stub.WatchState(batcher_pb2.WatchStateRequest(interval_ms=20))
        try:
            async with asyncio.timeout(PATIENCE_S):
                async for response in call:
                    if condition(response.state):
                        return response.state
        finally:
            call.cancel()
        raise AssertionError("the state ended")


@asynccontextmanager
async def mesh(workers=1, free=0, **settings):
    """Started, with every worker seen alive."""
    fakes = [await FakeWorker().start() for _ in range(workers)]
    for fake in fakes:
        await fake.say(free)
    listed = ",".join(fake.endpoint for fake in fakes) or "127.0.0.1:1"
    values = {"port": 0, "health_port": 0, "workers": listed, "name": "batcher-test"}
    app = BatcherApp(BatcherSettings(**(values | settings)), CollectorRegistry())
    await app.start()
    made = Mesh(app, fakes)
    try:
        await made.until(lambda state: sum(each.alive for each in state.workers) == workers)
        yield made
    finally:
        await made.channel.close(None)
        await app.close()
        for fake in fakes:
            await fake.stop()
