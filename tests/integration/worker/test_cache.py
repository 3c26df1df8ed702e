"""The worker's cache in processes of its own, killed, in pairs, and in a folder that is too small."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from loom.modelstore.v1 import modelstore_pb2

from tests.integration.worker.harness import STORE_SERVICE, FakeModelStore, digest_of, serve_store
from tests.integration.worker.processes import until
from tokenloom.kit.server import Call, GrpcServer

CHUNK_BYTES = 32 * 1024
MIB = 1024 * 1024
KILLS = 10
ROOT = Path(__file__).resolve().parents[3]


class Store(FakeModelStore):
    """Sends slowly, counts what it sends, and stops before some blobs while it is told to."""

    def __init__(self, **models: list[bytes]) -> None:
        super().__init__()
        self.sent = 0
        self.resolved = 0
        self.pause_s = 0.0
        self.held: set[str] = set()
        self.open = asyncio.Event()
        for name, blobs in models.items():
            self.add_sim(name, digest_of(name.encode()))
            for index, data in enumerate(blobs):
                self.blobs[digest_of(data)] = data
                self.models[name].manifest.files.add(
                    path=f"{index}.bin", digest=digest_of(data), size_bytes=len(data)
                )

    async def ResolveModel(
        self, request: modelstore_pb2.ResolveModelRequest, call: Call
    ) -> modelstore_pb2.ResolveModelResponse:
        self.resolved += 1
        return await super().ResolveModel(request, call)

    async def FetchBlob(
        self, request: modelstore_pb2.FetchBlobRequest, call: Call
    ) -> AsyncIterator[modelstore_pb2.FetchBlobResponse]:
        data = self.blobs[request.digest]
        for start in range(request.offset, request.offset + request.length, CHUNK_BYTES):
            if request.digest in self.held:
                await self.open.wait()
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
            piece = data[start : min(start + CHUNK_BYTES, request.offset + request.length)]
            self.sent += len(piece)
            yield modelstore_pb2.FetchBlobResponse(data=piece)


def _has_sent(store: Store, count: int) -> bool:
    return store.sent >= count


def some_bytes(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


STARTED: list[asyncio.subprocess.Process] = []


@pytest.fixture(autouse=True)
async def nobody_is_left() -> AsyncIterator[None]:
    yield
    for process in STARTED:
        if process.returncode is None:
            await kill(process)
    STARTED.clear()


async def start(target: str, cache: Path, model: str, **settings: object) -> asyncio.subprocess.Process:
    """The real cache, fetching one model."""
    values = {"MODELSTORE_TARGET": target, "CACHE_DIR": cache, "MODELS": model, **settings}
    env = {key: value for key, value in os.environ.items() if not key.startswith("TOKENLOOM_")}
    env |= {f"TOKENLOOM_WORKER_{key}": str(value) for key, value in values.items()}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "gen")])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.worker.prefetch"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    STARTED.append(process)
    return process


async def folder_of(process: asyncio.subprocess.Process) -> Path:
    """Where it says that the model is, once it ended well."""
    async with asyncio.timeout(60):
        out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return Path(json.loads(out)["folder"])


async def kill(process: asyncio.subprocess.Process) -> None:
    process.send_signal(signal.SIGKILL)
    await process.communicate()


def check_nothing_wrong_is_served(cache: Path) -> None:
    """What has a blob's name has its digest; what a version's folder holds is such a blob."""
    blobs = [path for path in (cache / "blobs" / "sha256").glob("*") if not path.suffix]
    for blob in blobs:
        assert digest_of(blob.read_bytes()) == f"sha256:{blob.name}"
    for file in (cache / "models").glob("*/*"):
        assert any(file.samefile(blob) for blob in blobs)


async def test_a_worker_killed_at_random_moments_goes_on_where_it_was(tmp_path: Path) -> None:
    blobs = [some_bytes(size, size) for size in (8 * MIB + 5, 3 * MIB, 70)]
    total, rng = sum(map(len, blobs)), random.Random(7)
    store = Store(m=blobs)
    store.pause_s = 0.002
    async with serve_store(store) as target:
        for _ in range(KILLS):
            process = await start(target, tmp_path, "m")
            await until(partial(_has_sent, store, store.sent + rng.randrange(1, total // KILLS)), 60)
            await kill(process)
            check_nothing_wrong_is_served(tmp_path)
        before = store.sent
        store.pause_s = 0.0
        folder = await folder_of(await start(target, tmp_path, "m"))
    check_nothing_wrong_is_served(tmp_path)
    assert [(folder / f"{i}.bin").read_bytes() for i in range(3)] == blobs
    assert store.sent - before < total * 3 // 4, "the last life found what the killed ones left"
    assert store.sent < total * 2, "a kill loses what was on its way, no more"


async def test_two_processes_at_once_fetch_each_byte_once(tmp_path: Path) -> None:
    blobs = [some_bytes(2 * MIB, seed) for seed in range(3)]
    store = Store(m=blobs)
    store.pause_s = 0.001
    async with serve_store(store) as target:
        both = [await start(target, tmp_path, "m") for _ in range(2)]
        folders = [await folder_of(process) for process in both]
    assert folders[0] == folders[1]
    assert [(folders[0] / f"{i}.bin").read_bytes() for i in range(3)] == blobs
    assert store.sent == sum(map(len, blobs))


async def test_who_waits_for_a_killed_process_takes_over_what_it_left(tmp_path: Path) -> None:
    blob = some_bytes(6 * MIB, 1)
    store = Store(m=[blob])
    store.pause_s = 0.002
    async with serve_store(store) as target:
        first = await start(target, tmp_path, "m")
        await until(lambda: store.sent > 2 * MIB, 60)
        store.held = {digest_of(blob)}
        second = await start(target, tmp_path, "m")
        await until(lambda: store.resolved == 2, 60)
        await kill(first)
        store.open.set()
        folder = await folder_of(second)
    assert (folder / "0.bin").read_bytes() == blob
    assert store.sent < len(blob) * 3 // 2


async def test_a_store_that_restarts_is_fetched_on_from(tmp_path: Path) -> None:
    blob = some_bytes(6 * MIB, 2)
    store = Store(m=[blob])
    store.pause_s = 0.002
    first = GrpcServer("127.0.0.1", 0)
    first.add(STORE_SERVICE, store)
    port = await first.start()
    process = await start(f"127.0.0.1:{port}", tmp_path, "m")
    await until(lambda: store.sent > 2 * MIB, 60)
    await first.stop(0)
    second = GrpcServer("127.0.0.1", port)
    second.add(STORE_SERVICE, store)
    await second.start()
    folder = await folder_of(process)
    await second.stop(0)
    assert (folder / "0.bin").read_bytes() == blob
    assert store.sent < len(blob) * 3 // 2


async def test_the_least_used_version_leaves_and_never_one_that_a_living_process_uses(tmp_path: Path) -> None:
    blobs = {name: some_bytes(MIB, seed) for seed, name in enumerate("abc")}
    store = Store(**{name: [data] for name, data in blobs.items()})
    store.held = {digest_of(blobs["a"])}
    bound = {"CACHE_BYTES_MAX": 2 * MIB}

    def whole() -> set[str]:
        names = {path.name for path in (tmp_path / "blobs" / "sha256").glob("*") if not path.suffix}
        return {name for name, data in blobs.items() if digest_of(data).removeprefix("sha256:") in names}

    async with serve_store(store) as target:
        using = await start(target, tmp_path, "a", **bound)
        await until(lambda: bool(list(tmp_path.glob("blobs/sha256/*.part"))), 60)
        await folder_of(await start(target, tmp_path, "b", **bound))
        await folder_of(await start(target, tmp_path, "c", **bound))
        assert whole() == {"c"}
        store.open.set()
        assert ((await folder_of(using)) / "0.bin").read_bytes() == blobs["a"]
        assert whole() == {"a", "c"}
        await folder_of(await start(target, tmp_path, "b", **bound))
        assert whole() == {"a", "b"}, "c was used before a"


@pytest.mark.parametrize(
    ("model", "bytes_max", "says"),
    [
        ("m", 1000, "more than the cache may hold: raise TOKENLOOM_WORKER_CACHE_BYTES_MAX"),
        ("absent", 0, "no model absent"),
    ],
)
async def test_what_cannot_be_had_ends_with_one_line(
    tmp_path: Path, model: str, bytes_max: int, says: str
) -> None:
    async with serve_store(Store(m=[some_bytes(MIB, 0)])) as target:
        process = await start(target, tmp_path, model, CACHE_BYTES_MAX=bytes_max)
        _, errors = await process.communicate()
    assert process.returncode == 1
    lines = errors.decode().strip().splitlines()
    assert len(lines) == 1
    assert says in lines[0]


async def test_the_bench_measures_a_real_modelstore(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = ["-m", "tools.bench_fetch", "--rounds", "1", "--bytes", str(3 * MIB), "--dir", str(tmp_path)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *command, "--json", str(figures), "--network-mb-per-s", "500"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    STARTED.append(process)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    (rates,) = json.loads(figures.read_text())["mb_per_s"]
    assert set(rates) == {"dd", "http", "http+fsync", "fetch", "direct", "again"}
    assert all(rate > 0 for rate in rates.values())
