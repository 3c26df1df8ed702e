"""Six real models, tiny and random, on a worker whose budget holds three of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from loom.inference.v1 import inference_pb2
from loom.modelstore.v1 import modelstore_pb2
from loom.worker.v1 import worker_pb2
from transformers import AutoModelForCausalLM

from services.worker.front.memory import CPU_PROCESS_BYTES
from tests.integration.engine.exactness import reference
from tests.integration.engine.families import COMMON, build, random_prompts
from tests.integration.worker.harness import FakeModelStore, Running, digest_of, run_worker
from tests.integration.worker.processes import engines_of, memory_of
from tokenloom.kit.errors import CallError

NAMES = tuple(f"tiny-{number}" for number in range(6))
LAYERS = {name: 2 + number % 3 for number, name in enumerate(NAMES)}
NEED_BYTES = CPU_PROCESS_BYTES + (8 << 20)
BUDGET_BYTES = 3 * NEED_BYTES
NEW_TOKENS = 12
PROMPTS = random_prompts(2, longest=40)


def add_real(store: FakeModelStore, name: str, folder: Path) -> str:
    """The folder's files as blobs, and a manifest as an import makes it."""
    layers, kv_heads, head_dim = LAYERS[name], COMMON["num_key_value_heads"], COMMON["head_dim"]
    manifest = modelstore_pb2.Manifest(
        name=name,
        architecture="LlamaForCausalLM",
        model_type="llama",
        dtype="float32",
        context_length=COMMON["max_position_embeddings"],
        vocab_size=COMMON["vocab_size"],
        weight_bytes=(folder / "model.safetensors").stat().st_size,
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * 4,
    )
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        store.blobs[digest_of(data)] = data
        manifest.files.add(path=path.name, digest=digest_of(data), size_bytes=len(data))
    version = digest_of(manifest.SerializeToString())
    store.models[name] = modelstore_pb2.Version(digest=version, manifest=manifest)
    return version


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@asynccontextmanager
async def worker_with(folders: dict[str, Path], cache_dir: Path) -> AsyncIterator[Running]:
    store = FakeModelStore()
    for name, folder in folders.items():
        add_real(store, name, folder)
    settings: dict[str, Any] = {
        "engine": "torch",
        "models": "",
        "memory_bytes": BUDGET_BYTES,
        "min_dwell_s": 0.5,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "sequences_max": 4,
        "cache_dir": str(cache_dir),
    }
    async with run_worker(store, **settings) as worker:
        yield worker


async def load(worker: Running, version: str) -> worker_pb2.ResidentModel:
    async with asyncio.timeout(120):
        while True:
            try:
                return await worker.client.load(version, evict=True)
            except CallError as error:
                if error.reason != "MODEL_MEMORY_BUSY":
                    raise
                await asyncio.sleep(error.retry_after_s or 0.0)


async def greedy(worker: Running, version: str, prompt: list[int]) -> list[int]:
    request = worker.client.request(
        model_version=version,
        prompt_token_ids=prompt,
        sampling=inference_pb2.SamplingParams(seed=1, temperature=0.0),
        max_new_tokens=NEW_TOKENS,
    )
    return await worker.client.tokens(request)


class Watch:
    """What the engine processes took together, sampled."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.samples = 0
        self.engines_max = 0

    async def run(self) -> None:
        while True:
            engines = engines_of(kind="services.worker.engine")
            taken = await asyncio.to_thread(lambda pids: sum(map(memory_of, pids)), engines)
            self.peak_bytes = max(self.peak_bytes, taken)
            self.engines_max = max(self.engines_max, len(engines))
            self.samples += 1
            await asyncio.sleep(0.15)


@pytest.mark.usefixtures("_one_thread")
async def test_six_models_take_turns_on_a_budget_for_three_and_each_answers_as_transformers_does(
    tmp_path: Path,
) -> None:
    folders = {
        name: build("llama", tmp_path / name, seed=number, num_hidden_layers=LAYERS[name])
        for number, name in enumerate(NAMES)
    }
    wanted = {}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wanted[name] = reference(model, PROMPTS, NEW_TOKENS)
    watch = Watch()
    async with worker_with(folders, tmp_path / "cache") as worker:
        watching = asyncio.create_task(watch.run())
        versions = {name: version.digest for name, version in worker.store.models.items()}
        # As many as fit are loaded at once; from then on each takes the place of another.
        await asyncio.gather(*(load(worker, versions[name]) for name in NAMES[:3]))
        for name in islice(cycle(NAMES), 7):
            resident = await load(worker, versions[name])
            assert NEED_BYTES - (8 << 20) < resident.memory_bytes <= NEED_BYTES
            answers = [await greedy(worker, versions[name], prompt) for prompt in PROMPTS]
            assert answers == wanted[name], name
        told = await worker.client.report_when(lambda report: True)
        assert [model.name for model in told.models] == ["tiny-4", "tiny-5", "tiny-0"]
        watching.cancel()
    assert watch.engines_max == 3
    assert watch.samples > 20
    assert BUDGET_BYTES / 3 < watch.peak_bytes <= BUDGET_BYTES
