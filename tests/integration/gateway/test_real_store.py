"""The gateway's catalogue on a real modelstore process: followed, kept while it is away, followed again."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from loom.modelstore.v1 import modelstore_pb2 as pb
from loom.modelstore.v1 import modelstore_pb2_grpc

from services.gateway.adapters.modelstore import ModelstoreCatalogue
from tokenloom.kit.channels import open_channel

ROOT = Path(__file__).resolve().parents[3]


class Shop:
    """A modelstore process that can be killed and started again, and a catalogue that follows it."""

    def __init__(self, store, port, metrics_port):
        self.port = port
        names = {"PORT": port, "METRICS_PORT": metrics_port, "STORE_DIR": store, "HOST": "127.0.0.1"}
        self._environ = {f"TOKENLOOM_MODELSTORE_{name}": str(value) for name, value in names.items()}
        self._environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "gen")])
        self._process = None
        self._changed = asyncio.Condition()
        self._channel = open_channel(f"127.0.0.1:{port}")
        self.catalogue = ModelstoreCatalogue(self._channel, lambda _: None)
        self.stub = modelstore_pb2_grpc.ModelStoreServiceStub(self._channel)

    def start(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.modelstore"],
            env={**os.environ, **self._environ},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    async def names(self, wanted):
        """Return when the catalogue has these names."""
        async with asyncio.timeout(30):
            while self.catalogue.snapshot is None or self.catalogue.snapshot.names() != wanted:
                self.catalogue.arrived.clear()
                await self.catalogue.arrived.wait()

    async def import_sim(self):
        """The digest of the built-in model's one version."""
        events = [
            event
            async for event in self.stub.ImportModel(pb.ImportModelRequest(source="builtin:sim", name="m"))
        ]
        return events[-1].imported.version.digest

    async def set_alias(self, alias, digest):
        targets = [pb.AliasTarget(digest=digest, weight=1)]
        await self.stub.SetAlias(pb.SetAliasRequest(model="m", alias=alias, targets=targets))

    async def close(self):
        await self.catalogue.close()
        await self._channel.close(None)
        self.kill()


@pytest.fixture
async def shop(tmp_path, unused_tcp_port_factory):
    made = Shop(tmp_path / "store", unused_tcp_port_factory(), unused_tcp_port_factory())
    made.start()
    made.catalogue.start()
    yield made
    await made.close()


async def test_a_killed_modelstore_leaves_its_last_catalogue_and_is_followed_again(shop):
    await shop.names([])
    digest = await shop.import_sim()
    await shop.set_alias("canary", digest)
    await shop.names(["m", "m@canary"])
    shop.kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await shop.stub.ListModels(pb.ListModelsRequest(), timeout=5)
    assert shop.catalogue.snapshot.names() == ["m", "m@canary"]
    shop.start()
    await shop.stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True, timeout=30)
    await shop.set_alias("beta", digest)
    await shop.names(["m", "m@beta", "m@canary"])
