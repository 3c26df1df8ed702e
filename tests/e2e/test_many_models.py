"""Two real models and six tiny ones on one worker whose memory holds three with a real one: each exact.

The two real ones are SmolLM2 stored in float32 and in float16: other weights, other answers.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from loom.batcher.v1 import batcher_pb2
from loom.batcher.v1 import batcher_pb2_grpc as batcher_rpc

from services.modelstore.app import export_offline, import_offline
from tests.e2e.client import connected, greedy
from tests.e2e.mesh import Mesh
from tests.integration.modelstore.converting import converting_here
from tests.integration.modelstore.made import hf_folder, weights
from tokenloom.cli.processes import children_of
from tokenloom.kit.channels import open_channel
from tools.fetch import fetch_model

REAL = {"smol-a": "float32", "smol-b": "float16"}
TINY = [f"tiny-{number}" for number in range(6)]
MODELS = [*REAL, *TINY]
BUDGET_BYTES = 3 * 1024**3
TOKENS = 8
PROMPTS = ([72, 101, 108, 108, 111], [84, 104, 101, 32, 115, 107, 121], [50, 43, 50, 61])
"""Token ids that all eight vocabularies have."""
ANSWER_S = 240


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Eight models in the store, one of them loaded, and a worker whose budget holds three."""
    folder = tmp_path_factory.mktemp("many")
    mesh = Mesh(
        folder / "home",
        TOKENLOOM_WORKER_DTYPE="float32",
        TOKENLOOM_WORKER_MEMORY_BYTES=str(BUDGET_BYTES),
        TOKENLOOM_WORKER_MIN_DWELL_S="0.5",
        TOKENLOOM_WORKER_SEQUENCES_MAX="8",
    )
    mesh.home.mkdir()
    gguf = str(fetch_model())
    with ThreadPoolExecutor(len(REAL)) as pool:
        real = [pool.submit(bring, mesh, gguf, name, dtype) for name, dtype in REAL.items()]
        with converting_here():
            for seed, name in enumerate(TINY):
                source = hf_folder(folder / name, weights(seed))
                import_offline(mesh.home / "store", str(source), name, "float32")
        for each in real:
            each.result()
    mesh.up("--model", TINY[0])
    yield mesh
    mesh.down()


def bring(mesh: Mesh, source: str, name: str, dtype: str) -> None:
    mesh.ok("models", "import", source, "--name", name, "--dtype", dtype, timeout_s=300)


@pytest.fixture(scope="module")
def expected(crowded: Mesh, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """What transformers' own `generate` gives for each model and prompt, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    answers: dict[str, list[list[int]]] = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp("export") / name
        export_offline(crowded.home / "store", name, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        answers[name] = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            limits = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "eos_token_id": -1}
            whole = model.generate(ids, do_sample=False, pad_token_id=0, **limits)
            answers[name].append(whole[0, len(prompt) :].tolist())
    return answers


def loads(mesh: Mesh) -> float:
    """Loads on demand that the batcher asked for and that ended well."""
    port = mesh.port_of("batcher", "metrics")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = re.findall(r'^tokenloom_batcher_model_loads_total\{outcome="loaded",\S*\} (\S+)$', text, re.M)
    return sum(map(float, found))


def engines_bytes(mesh: Mesh) -> int:
    """Memory of all engine processes, shared pages counted by their share."""
    total = 0
    for child in children_of(mesh.pid("worker-0")):
        try:
            text = Path(f"/proc/{child}/smaps_rollup").read_text()
        except OSError:
            continue
        total += 1024 * int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1])
    return total


async def sampled(mesh: Mesh, most: list[int], stop: asyncio.Event) -> None:
    while not stop.is_set():
        most.append(await asyncio.to_thread(engines_bytes, mesh))
        try:
            await asyncio.wait_for(stop.wait(), 0.5)
        except TimeoutError:
            continue


async def test_requests_over_all_eight_are_answered_exactly_inside_the_budget(crowded, expected):
    most: list[int] = []
    stop = asyncio.Event()
    watching = asyncio.create_task(sampled(crowded, most, stop))
    async with connected(crowded.target, 4) as client:
        asked = [(name, number) for number in range(len(PROMPTS)) for name in MODELS]
        requests = [greedy(PROMPTS[number], TOKENS, name) for name, number in asked]
        answers = await client.generate_all(requests, ANSWER_S)
    stop.set()
    await watching
    assert [answer.error for answer in answers if answer.error] == []
    for (name, number), answer in zip(asked, answers, strict=True):
        assert answer.token_ids == expected[name][number], name
    assert 0 < max(most) <= BUDGET_BYTES


async def test_two_hot_models_with_room_for_both_cause_no_further_loads(crowded, expected):
    hot = ("smol-a", TINY[3])
    async with connected(crowded.target) as client:
        for name in hot:
            await client.generate(greedy(PROMPTS[0], TOKENS, name), ANSWER_S)
        before = loads(crowded)
        for _ in range(10):
            answers = await client.generate_all([greedy(PROMPTS[0], TOKENS, name) for name in hot], ANSWER_S)
            assert [a.token_ids for a in answers] == [expected[name][0] for name in hot]
    assert loads(crowded) == before


async def test_fifty_requests_for_a_model_that_nobody_has_cause_one_load_and_see_it(crowded, expected):
    state = json.loads(crowded.ok("models", "list", "--json"))
    assert {model["name"] for model in state} == set(MODELS)
    name = await not_resident(crowded)
    before = loads(crowded)
    # At the public port: the gateway asks the batchers.
    channel = open_channel(crowded.target)
    async with connected(crowded.target, 4) as client:
        requests = [greedy(PROMPTS[1], TOKENS, name) for _ in range(50)]
        known = f"seen-{os.getpid()}"
        asking = asyncio.create_task(client.generate(requests[0], ANSWER_S, request_id=known))
        seen = asyncio.create_task(events(channel, known))
        answers = [*await client.generate_all(requests[1:], ANSWER_S), await asking]
    kinds = await seen
    await channel.close(None)
    assert [answer.error for answer in answers if answer.error] == []
    assert all(answer.token_ids == expected[name][1] for answer in answers)
    assert loads(crowded) == before + 1
    assert kinds[0] == "queued"
    assert "loading" in kinds
    assert kinds[-1] == "dispatched"


async def not_resident(mesh: Mesh) -> str:
    """A model that the worker does not hold now."""
    channel = open_channel(f"127.0.0.1:{mesh.port_of('batcher', 'grpc')}")
    answer = await batcher_rpc.BatcherServiceStub(channel).GetState(batcher_pb2.GetStateRequest(), timeout=10)
    await channel.close(None)
    here = {model.model_version for worker in answer.state.workers for model in worker.models}
    for model in json.loads(mesh.ok("models", "list", "--json")):
        if not here & {version["digest"] for version in model["versions"]}:
            return str(model["name"])
    raise AssertionError("every model is resident")


async def events(channel: grpc.aio.Channel, request_id: str) -> list[str]:
    """What a watcher of a request is told, by kind."""
    stub = batcher_rpc.BatcherServiceStub(channel)
    call = stub.WatchRequest(batcher_pb2.WatchRequestRequest(request_id=request_id), timeout=ANSWER_S)
    return [str(message.WhichOneof("event")) async for message in call]
