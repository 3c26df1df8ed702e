"""A modelstore and workers of a few lines each, served over gRPC, and a home in which they are a mesh."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
from grpc_status import rpc_status
from loom.modelstore.v1 import modelstore_pb2 as pb
from loom.modelstore.v1 import modelstore_pb2_grpc as store_rpc
from loom.worker.v1 import worker_pb2 as worker_pb
from loom.worker.v1 import worker_pb2_grpc as worker_rpc

from tokenloom.cli import local, state
from tokenloom.contract.models import parse_model
from tokenloom.kit.errors import CallError, status_proto

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")
BEGAN_S = 1_700_000_000


def version(digest=A, name="chat", *, weight_bytes=2_000_000, **fields):
    file = pb.File(path="model.safetensors", digest=f"sha256:{digest[-1] * 63}1", size_bytes=weight_bytes)
    manifest = pb.Manifest(
        name=name,
        architecture="LlamaForCausalLM",
        model_type="llama",
        dtype="bfloat16",
        context_length=8192,
        parameters=1_000_000,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=1000,
        files=[file],
        provenance={"source": "chat.gguf"},
    )
    manifest.created_at.seconds = BEGAN_S
    return pb.Version(digest=digest, manifest=manifest, **fields)


def answering(method):
    """A refusal travels as the kit sends it."""

    def call(self, request, context):
        try:
            return method(self, request)
        except CallError as error:
            context.abort_with_status(rpc_status.to_status(status_proto(error)))

    return call


def streaming(method):
    def call(self, request, context):
        try:
            yield from method(self, request)
        except CallError as error:
            context.abort_with_status(rpc_status.to_status(status_proto(error)))

    return call


class FakeStore(store_rpc.ModelStoreServiceServicer):
    """Versions and alias histories in memory, with the contract's refusals."""

    def __init__(self, *versions):
        self.versions = {each.digest: each for each in versions}
        self.changes: dict[tuple[str, str], list[pb.Alias]] = {}
        self.requests: list[object] = []
        self.garbage = pb.CollectGarbageResponse()
        self.verifying: list[pb.VerifyResponse] = []
        self.importing: list[pb.ImportModelResponse] = []

    def set(self, model, alias, **weights):
        """Record a change; `a=90, b=10` by the letter of the digest."""
        targets = [pb.AliasTarget(digest=f"sha256:{k * 64}", weight=w) for k, w in weights.items()]
        return self._record(model, alias, targets)

    def _record(self, model, alias, targets):
        changes = self.changes.setdefault((model, alias), [])
        change = pb.Alias(name=alias, targets=targets, sequence=len(changes) + 1)
        change.changed_at.seconds = BEGAN_S
        changes.append(change)
        return change

    def now(self, model, alias):
        """`{digest: weight}`."""
        return {t.digest: t.weight for t in self.changes[model, alias][-1].targets}

    def _check(self, request):
        self.requests.append(request)
        changes = self.changes.get((request.model, request.alias), [])
        if request.HasField("expected_sequence") and request.expected_sequence != len(changes):
            raise CallError("ALIAS_CONFLICT", f"{request.model}@{request.alias} was changed by somebody else")

    @answering
    def ListModels(self, request):
        names = sorted({each.manifest.name for each in self.versions.values()})
        return pb.ListModelsResponse(models=[self._model(name) for name in names])

    def _model(self, name):
        aliases = [c[-1] for (model, _), c in sorted(self.changes.items()) if model == name and c[-1].targets]
        versions = [each for each in self.versions.values() if each.manifest.name == name]
        return pb.Model(name=name, aliases=aliases, versions=versions)

    @answering
    def ResolveModel(self, request):
        wanted = parse_model(request.model)
        if wanted.alias is not None:
            changes = self.changes.get((wanted.name, wanted.alias))
            if not changes or not changes[-1].targets:
                raise CallError("MODEL_NOT_FOUND", f"no alias {wanted.alias!r} of {wanted.name!r}")
            digest = max(changes[-1].targets, key=lambda target: target.weight).digest
            return pb.ResolveModelResponse(version=self.versions[digest])
        for digest, found in self.versions.items():
            if found.manifest.name == wanted.name and digest.startswith(wanted.digest_prefix):
                return pb.ResolveModelResponse(version=found)
        raise CallError("MODEL_NOT_FOUND", f"no version {wanted.digest_prefix} of {wanted.name!r}")

    @answering
    def SetAlias(self, request):
        self._check(request)
        return pb.SetAliasResponse(alias=self._record(request.model, request.alias, request.targets))

    @answering
    def ListAliasHistory(self, request):
        if (request.model, request.alias) not in self.changes:
            raise CallError("MODEL_NOT_FOUND", f"{request.model!r} has no alias {request.alias!r}")
        changes = self.changes[request.model, request.alias]
        return pb.ListAliasHistoryResponse(changes=changes[::-1][: request.limit])

    @answering
    def DeleteAlias(self, request):
        self._check(request)
        if (request.model, request.alias) not in self.changes:
            raise CallError("MODEL_NOT_FOUND", f"{request.model!r} has no alias {request.alias!r}")
        self._record(request.model, request.alias, [])
        return pb.DeleteAliasResponse()

    @answering
    def SetDeprecation(self, request):
        self.requests.append(request)
        found = self.versions[request.digest]
        found.ClearField("deprecation")
        if request.deprecated:
            found.deprecation.message = request.message
            found.deprecation.since.seconds = BEGAN_S
        return pb.SetDeprecationResponse(version=found)

    @answering
    def DeleteVersion(self, request):
        self.requests.append(request)
        del self.versions[request.digest]
        return pb.DeleteVersionResponse()

    @answering
    def CollectGarbage(self, request):
        self.requests.append(request)
        return self.garbage

    @streaming
    def Verify(self, request):
        self.requests.append(request)
        yield from self.verifying

    @streaming
    def ImportModel(self, request):
        self.requests.append(request)
        yield from self.importing


class FakeWorker(worker_rpc.WorkerServiceServicer):
    """Holds what it is told to hold."""

    def __init__(self, *models, budget_bytes=10_000_000, refuse=None):
        self.models = {each.version: each for each in models}
        self.budget_bytes = budget_bytes
        self.refuse = refuse
        self.requests: list[object] = []

    def report(self):
        models = list(self.models.values())
        free = self.budget_bytes - sum(each.memory_bytes for each in models)
        return worker_pb.LoadReport(
            models=models, memory_budget_bytes=self.budget_bytes, free_memory_bytes=free
        )

    @answering
    def ListModels(self, request):
        return worker_pb.ListModelsResponse(models=self.models.values())

    @streaming
    def WatchLoad(self, request):
        yield worker_pb.WatchLoadResponse(report=self.report())

    @answering
    def LoadModel(self, request):
        self.requests.append(request)
        if self.refuse is not None:
            raise self.refuse
        self.models[request.version] = resident(request.version)
        return worker_pb.LoadModelResponse(model=self.models[request.version])

    @answering
    def UnloadModel(self, request):
        self.requests.append(request)
        if self.refuse is not None:
            raise self.refuse
        del self.models[request.version]
        return worker_pb.UnloadModelResponse()


def resident(digest=A, name="chat", state="READY", memory_bytes=4_000_000, **fields):
    return worker_pb.ResidentModel(
        version=digest,
        name=name,
        state=worker_pb.ModelState.Value(f"MODEL_STATE_{state}"),
        memory_bytes=memory_bytes,
        **fields,
    )


@contextmanager
def served(servicer) -> Iterator[int]:
    """The port on which it answers."""
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        is_store = isinstance(servicer, FakeStore)
        add = (
            store_rpc.add_ModelStoreServiceServicer_to_server
            if is_store
            else worker_rpc.add_WorkerServiceServicer_to_server
        )
        add(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield port
        finally:
            server.stop(0).wait()


@contextmanager
def mesh(store, *workers) -> Iterator[None]:
    """They are the running mesh of this home, workers named worker-0, worker-1, …"""
    with ExitStack() as stack:
        services = {"modelstore": store} | {f"worker-{i}": worker for i, worker in enumerate(workers)}
        processes = []
        for name, servicer in services.items():
            # A number: nobody answers there.
            port = servicer if isinstance(servicer, int) else stack.enter_context(served(servicer))
            processes.append(state.Process(name, os.getpid(), {"grpc": port}, state.READY))
        local.state_dir().mkdir(parents=True, exist_ok=True)
        state.write(
            local.state_file(), state.Mesh(os.getpid(), "127.0.0.1:1", "sim", ["chat"], "", 0, processes)
        )
        stack.enter_context(state.lock(local.lock_file()))
        yield
