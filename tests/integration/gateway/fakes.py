"""A modelstore and a worker of a few lines each, served over real gRPC by the kit."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable

from loom.inference.v1 import inference_pb2
from loom.modelstore.v1 import modelstore_pb2
from loom.worker.v1 import worker_pb2

from tokenloom.kit.errors import CallError
from tokenloom.kit.server import Call, GrpcServer

STOP = inference_pb2.FINISH_REASON_STOP
LENGTH = inference_pb2.FINISH_REASON_LENGTH


class FakeModelstore:
    """Serves what `add` put in; `change` pushes the catalogue again."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.models: dict[str, modelstore_pb2.Model] = {}
        self.blobs: dict[str, bytes] = {}
        self.fetches = 0
        self._pushes = 0
        self._changed = asyncio.Condition()
        self._server = GrpcServer("127.0.0.1", port)
        self._server.add(modelstore_pb2.DESCRIPTOR.services_by_name["ModelStoreService"], self)

    async def start(self) -> str:
        self.port = await self._server.start()
        return f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        await self._server.stop(0)

    def add(self, name: str, files: dict[str, bytes], **facts: object) -> str:
        """A model of one version made of `files`, its alias `stable`; the version's digest."""
        self.models[name] = modelstore_pb2.Model(name=name)
        version = self.release(name, files, **facts)
        self.point(name, "stable", {version: 1})
        return version

    def release(self, name: str, files: dict[str, bytes], **facts: object) -> str:
        """One more version of a model, which no alias names; its digest."""
        manifest = modelstore_pb2.Manifest(
            **({"name": name, "context_length": 512, "vocab_size": 600, "stop_token_ids": [0]} | facts)
        )
        for path, data in files.items():
            digest = "sha256:" + hashlib.sha256(data).hexdigest()
            self.blobs[digest] = data
            manifest.files.add(path=path, digest=digest, size_bytes=len(data))
        version = "sha256:" + hashlib.sha256(manifest.SerializeToString()).hexdigest()
        self.models[name].versions.add(digest=version, manifest=manifest)
        return version

    def point(self, name: str, alias: str, weights: dict[str, int]) -> None:
        """Set an alias to these digests."""
        aliases = self.models[name].aliases
        changed = next((known for known in aliases if known.name == alias), None) or aliases.add(name=alias)
        changed.sequence += 1
        del changed.targets[:]
        for digest, weight in weights.items():
            changed.targets.add(digest=digest, weight=weight)

    def version(self, name: str, digest: str) -> modelstore_pb2.Version:
        """A version, to be changed in place."""
        return next(version for version in self.models[name].versions if version.digest == digest)

    async def change(self) -> None:
        """Push the catalogue as it is now."""
        async with self._changed:
            self._pushes += 1
            self._changed.notify_all()

    async def WatchModels(self, request, call: Call) -> AsyncIterator[modelstore_pb2.WatchModelsResponse]:
        while True:
            seen = self._pushes
            yield modelstore_pb2.WatchModelsResponse(models=self.models.values())
            async with self._changed:
                await self._changed.wait_for(lambda seen=seen: self._pushes > seen)

    async def FetchBlob(self, request, call: Call) -> AsyncIterator[modelstore_pb2.FetchBlobResponse]:
        self.fetches += 1
        data = self.blobs.get(request.digest)
        if data is None:
            raise CallError("BLOB_NOT_FOUND", "no such blob", metadata={"digest": request.digest})
        for at in range(request.offset, len(data), 1 << 16):
            yield modelstore_pb2.FetchBlobResponse(data=data[at : at + (1 << 16)])


Responses = AsyncIterator[worker_pb2.GenerateResponse]
Attempt = Callable[["FakeWorker", worker_pb2.GenerateRequest, Call], Responses]


class FakeWorker:
    """Answers each call with the next of `attempts`, and with `answer` once those are used up.

    `script` holds the ids that every output consists of, so that a resumed one goes on where it was.
    """

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.attempts: list[Attempt] = []
        self.answer: Attempt = serve
        self.requests: list[worker_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.open = 0
        self.freed = asyncio.Event()
        """Set when a call was cancelled."""
        self.begun = asyncio.Event()
        self.tokens_max: int | None = None
        self._server = GrpcServer("127.0.0.1", 0)
        self._server.add(worker_pb2.DESCRIPTOR.services_by_name["WorkerService"], self)

    async def start(self) -> str:
        return f"127.0.0.1:{await self._server.start()}"

    async def stop(self) -> None:
        await self._server.stop(0)

    async def left_alone(self) -> None:
        """Return when the call that was cut has been cancelled here too, if it came this far at all."""
        if self.open:
            await asyncio.wait_for(self.freed.wait(), 5)

    async def Generate(self, request, call: Call) -> Responses:
        self.requests.append(request)
        self.metadata.append(call.metadata)
        attempt = self.attempts.pop(0) if self.attempts else self.answer
        self.open += 1
        self.begun.set()
        try:
            async for response in attempt(self, request, call):
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            self.freed.set()
            raise
        finally:
            self.open -= 1


def response(worker: FakeWorker, request, position: int, last: bool) -> worker_pb2.GenerateResponse:
    """The message for one token of the script, with the beginning and the end where they belong."""
    message = worker_pb2.GenerateResponse()
    if position == len(request.output_token_ids):
        message.started.worker = "worker-0"
        message.started.cached_prompt_tokens = 1
    token = worker.script[position % len(worker.script)]
    message.tokens.index = position
    message.tokens.token_ids.append(token)
    if request.logprobs:
        entry = message.tokens.logprobs.add(chosen=-0.25)
        entry.top_token_ids.extend([token, token + 1][: request.top_logprobs])
        entry.top.extend([-0.25, -3.0][: request.top_logprobs])
    stopped = token in request.stop_token_ids and position + 1 > request.min_new_tokens
    if stopped:
        message.finished.stop_token_id = token
    if stopped or last:
        message.finished.reason = STOP if stopped else LENGTH
        message.finished.timings.prefill_ns = 1_000
    return message


async def serve(worker, request, call) -> Responses:
    """The rest of the output, one token a message."""
    for position in range(len(request.output_token_ids), request.max_new_tokens):
        message = response(worker, request, position, position + 1 == request.max_new_tokens)
        yield message
        if message.HasField("finished"):
            return


def breaks_after(tokens: int, error: Exception) -> Attempt:
    """Serves `tokens` tokens and then fails; with 0, before anything was sent."""

    async def attempt(worker, request, call):
        begin = len(request.output_token_ids)
        for position in range(begin, begin + tokens):
            yield response(worker, request, position, False)
        raise error

    return attempt


def resets_after(tokens: int) -> Attempt:
    """Serves `tokens` tokens, then the stream is reset without a status of ours."""

    async def attempt(worker, request, call):
        begin = len(request.output_token_ids)
        for position in range(begin, begin + tokens):
            yield response(worker, request, position, False)
        import grpc

        await call._grpc.abort(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2")

    return attempt


async def hangs(worker, request, call) -> Responses:
    """Sends nothing, for ever."""
    await asyncio.Event().wait()
    yield worker_pb2.GenerateResponse()


def hangs_after(tokens: int) -> Attempt:
    """Serves `tokens` tokens and then nothing more."""

    async def attempt(worker, request, call):
        for position in range(tokens):
            yield response(worker, request, position, False)
        await asyncio.Event().wait()

    return attempt
