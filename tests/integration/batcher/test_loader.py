"""A worker is asked over gRPC to load a model, and every ask has one answer."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from loom.worker.v1 import worker_pb2 as pb

from services.batcher.adapters import loader as loader_module
from services.batcher.adapters.loader import DEFECT_RETRY_S, GrpcLoader
from tests.integration.batcher.harness import MODEL, WORKER_SERVICE
from tokenloom.kit.errors import CallError
from tokenloom.kit.server import GrpcServer

SIZES = {"needed_bytes": "3", "free_bytes": "2", "budget_bytes": "4"}
PATIENCE_S = 10.0


class Answers:
    """A `LoadListener`."""

    def __init__(self):
        self.queue = asyncio.Queue()

    def load_ended(self, endpoint, model, verdict):
        self.queue.put_nowait((endpoint, model, verdict))

    async def next(self):
        return await asyncio.wait_for(self.queue.get(), PATIENCE_S)


class Loading:
    """A worker that loads, or refuses."""

    def __init__(self, error=None, forever=False):
        self.error, self.forever = error, forever
        self.asked = asyncio.Queue()
        self.left = asyncio.Event()

    async def LoadModel(self, request, call):
        self.asked.put_nowait(request)
        if self.error is not None:
            raise self.error
        if self.forever:
            try:
                await asyncio.Event().wait()
            finally:
                self.left.set()
        return pb.LoadModelResponse()


@asynccontextmanager
async def asking(worker, timeout_s=PATIENCE_S):
    """(a loader, the worker's endpoint)"""
    server = GrpcServer("127.0.0.1", 0)
    server.add(WORKER_SERVICE, worker)
    endpoint = f"127.0.0.1:{await server.start()}"
    loader = GrpcLoader(timeout_s)
    try:
        yield loader, endpoint
    finally:
        await loader.close()
        await server.stop(0)


async def test_a_worker_is_asked_to_load_and_to_evict_for_it():
    worker, answers = Loading(), Answers()
    async with asking(worker) as (loader, endpoint):
        loader.load(endpoint, MODEL, answers)
        assert await answers.next() == (endpoint, MODEL, None)
    assert worker.asked.get_nowait() == pb.LoadModelRequest(version=MODEL, evict=True)


async def test_a_refusal_arrives_with_its_figures_and_its_hint():
    error = CallError("MODEL_MEMORY_BUSY", "needs 3, 2 are free", metadata=SIZES, retry_after_s=7.5)
    answers = Answers()
    async with asking(Loading(error)) as (loader, endpoint):
        loader.load(endpoint, MODEL, answers)
        *_, verdict = await answers.next()
    assert verdict == ("MODEL_MEMORY_BUSY", "needs 3, 2 are free", SIZES, 7.5)


async def test_a_worker_that_is_away_or_takes_too_long_is_an_answer_too():
    answers = Answers()
    async with asking(Loading(forever=True), timeout_s=0.2) as (loader, endpoint):
        loader.load(endpoint, MODEL, answers)
        assert (await answers.next())[2].reason == "DEADLINE_EXCEEDED"
        loader.load("127.0.0.1:1", MODEL, answers)
        assert (await answers.next())[2].reason in ("SERVICE_UNAVAILABLE", "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("where", ["open_channel", "_verdict"])
async def test_a_defect_of_ours_is_an_answer_too(monkeypatch, where):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(loader_module, where, broken)
    answers = Answers()
    async with asking(Loading(CallError("MODEL_TOO_LARGE", "no"))) as (loader, endpoint):
        loader.load(endpoint, MODEL, answers)
        assert await answers.next() == (
            endpoint,
            MODEL,
            ("SERVICE_UNAVAILABLE", f"{endpoint} cannot be asked: broken", {}, DEFECT_RETRY_S),
        )


async def test_beyond_the_bound_nobody_is_asked_until_others_are_done(monkeypatch):
    monkeypatch.setattr(loader_module, "LOADS_MAX", 1)
    worker, answers = Loading(forever=True), Answers()
    async with asking(worker) as (loader, endpoint):
        loader.load(endpoint, MODEL, answers)
        await asyncio.wait_for(worker.asked.get(), PATIENCE_S)
        loader.load(endpoint, "sha256:other", answers)
        verdict = (await answers.next())[2]
        assert (verdict.reason, verdict.retry_after_s) == ("QUEUE_FULL", 1.0)
        assert worker.asked.empty()


async def test_a_loader_that_closes_lets_go_and_says_nothing_more():
    worker, answers = Loading(forever=True), Answers()
    async with asking(worker) as (loader, endpoint):
        loader.load(endpoint, MODEL, answers)
        await asyncio.wait_for(worker.asked.get(), PATIENCE_S)
        await loader.close()
        await asyncio.wait_for(worker.left.wait(), PATIENCE_S)
        assert answers.queue.empty()
