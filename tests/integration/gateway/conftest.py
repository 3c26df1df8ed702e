"""The real gateway in this process, between a fake modelstore and a fake worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import grpc
import openai
import pytest
from loom.inference.v1 import inference_pb2_grpc

from services.gateway.app import GatewayService
from services.gateway.settings import GatewaySettings
from tests.integration.gateway.fakes import FakeModelstore, FakeWorker
from tests.unit.gateway.made import CHAT_TEMPLATE, byte_level, files_of
from tokenloom.kit.settings import load_settings

SENTENCE = "Paris is the capital of France. 🎉 Déjà vu!"
TOKENIZER = byte_level()
SCRIPT = TOKENIZER.encode(SENTENCE).ids


@dataclass
class House:
    """Everything that a test talks to."""

    gateway: GatewayService
    modelstore: FakeModelstore
    worker: FakeWorker
    stub: inference_pb2_grpc.InferenceServiceStub
    http: aiohttp.ClientSession
    client: openai.AsyncOpenAI

    async def catalogue_changed(self) -> None:
        """Push the modelstore's catalogue and wait until the gateway has it."""
        self.gateway.catalogue.arrived.clear()
        await self.modelstore.change()
        await self.gateway.catalogue.arrived.wait()


@pytest.fixture
def environ() -> dict[str, str]:
    """Settings beside the ports; a test module may override it."""
    return {}


@pytest.fixture
async def house(environ) -> AsyncIterator[House]:
    modelstore, worker = FakeModelstore(), FakeWorker(SCRIPT)
    modelstore.add("tiny", files_of(TOKENIZER, {"chat_template": CHAT_TEMPLATE}), has_chat_template=True)
    modelstore.add("plain", files_of(TOKENIZER))
    names = {
        "HTTP_PORT": "0",
        "GRPC_PORT": "0",
        "MODELSTORE_TARGET": await modelstore.start(),
        "MESH_TARGET": await worker.start(),
        "BACKOFF_INITIAL_MS": "1",
        "BACKOFF_MAX_MS": "5",
    } | environ
    settings = load_settings(GatewaySettings, {f"TOKENLOOM_GATEWAY_{k}": v for k, v in names.items()})
    gateway = GatewayService(settings)
    await gateway.start()
    await gateway.catalogue.arrived.wait()
    base = f"http://127.0.0.1:{gateway.http_port}"
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel,
        aiohttp.ClientSession(base) as http,
        openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        yield House(gateway, modelstore, worker, stub, http, client)
    await gateway.close()
    await worker.stop()
    await modelstore.stop()
