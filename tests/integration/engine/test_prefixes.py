"""What a real engine's process says of its prefix cache, as a load report tells it, is what gateways hash."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from loom.worker.v1 import worker_pb2

from services.worker.adapters.engines import TorchEngines
from services.worker.adapters.memory import Device
from services.worker.front.admission import Admission
from services.worker.front.engine import Engine, EngineBounds
from services.worker.front.ports import ModelVersion
from services.worker.front.report import ReportBuilder
from services.worker.front.resident import Resident
from services.worker.front.sequence import Sequence
from services.worker.protocol import Sampling, Submit
from services.worker.settings import WorkerSettings
from tests.integration.engine.families import build
from tokenloom.contract.prefix import block_hashes, root_hash, wire_hashes
from tokenloom.kit.clock import SystemClock

VERSION = ModelVersion(f"sha256:{'c' * 64}", "tiny", 2048, 211)
BOUNDS = EngineBounds(restart_backoff_max_s=1, load_attempts_max=1, load_timeout_s=120, silence_max_s=120)
WAIT_S = 120


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a context of 2,048."""
    return build("llama", tmp_path_factory.mktemp("long-llama"), max_position_embeddings=2048)


@asynccontextmanager
async def resident(folder: Path, **settings: object) -> AsyncIterator[Resident]:
    """A front's model on the engine process that a worker of these settings starts."""
    values = {"device": "cpu", "dtype": "float32", "threads": 1, "kv_cache_bytes": 64 << 20, **settings}
    engines = TorchEngines(WorkerSettings(name="worker", **values), Device("cpu", 0))  # type: ignore[arg-type]
    launch = engines.launcher(VERSION, engines.reserve(VERSION, 0, whole=False))
    engine = Engine(
        model=VERSION.name,
        worker="127.0.0.1:9100",
        launch=launch,
        admission=Admission(0),
        clock=SystemClock(),
        bounds=BOUNDS,
        changed=lambda: None,
    )
    made = Resident(VERSION, engine)
    made.fetching = False
    engine.start(str(folder))
    try:
        await asyncio.wait_for(engine.wait_ready(), WAIT_S)
        yield made
    finally:
        await engine.stop()


async def run(model: Resident, name: str, prompt: list[int], new: int, salt: str) -> Sequence:
    submit = Submit(
        name, prompt, [], new, 0, [], Sampling(seed=1), prefix_root=root_hash(VERSION.digest, salt)
    )
    sequence = Sequence(submit, request_id=name, tenant="acme", leased=True, arrival_ms=0, received_ns=0)
    model.engine.submit(sequence)
    async with asyncio.timeout(WAIT_S):
        while (await sequence.next()).final is None:
            continue
    model.engine.served.count(sequence)
    return sequence


def report_of(builder: ReportBuilder, model: Resident) -> worker_pb2.ResidentModel:
    report = builder.build(residents=[model], held=[], draining=False, unix_ms=0)
    [said] = worker_pb2.WatchLoadResponse.FromString(report.changes().SerializeToString()).report.models
    return said


@pytest.mark.parametrize("depth", [1, 2], ids=["in turn", "ahead"])
async def test_the_gateways_hashes_of_a_prompt_are_those_that_are_reported(
    long_llama: Path, depth: int
) -> None:
    prompt = [(7 * position + position // 5) % 200 + 3 for position in range(1100)]
    wanted = {salt: set(wire_hashes(block_hashes(prompt, root_hash(VERSION.digest, salt)))) for salt in "ab"}
    async with resident(long_llama, pipeline_depth=depth, step_tokens_max=300) as model:
        builder = ReportBuilder("boot", lambda: 0)
        before = report_of(builder, model)
        assert (before.prefix.whole, list(before.prefix.stored)) == (True, [])
        assert before.step_tokens_max == 300
        await run(model, "one", prompt, 3, "a")
        stored = report_of(builder, model)
        assert (stored.prefix.whole, set(stored.prefix.stored)) == (False, wanted["a"])
        assert len(wanted["a"]) == 2
        again = await run(model, "two", prompt, 3, "a")
        assert again.cached_prompt_tokens == 1088
        assert not report_of(builder, model).HasField("prefix"), "what is found again is no news"
        await run(model, "three", prompt, 3, "b")
        assert set(report_of(builder, model).prefix.stored) == wanted["b"]
        [served] = model.engine.served.all()
        assert (served.tenant, served.prompt_tokens, served.generated_tokens) == ("acme", 1100 + 12 + 1100, 9)


async def test_what_a_small_cache_evicted_is_reported_and_is_found_no_more(long_llama: Path) -> None:
    prompts = [[first] * 1100 for first in (5, 6)]
    ours, theirs = (set(wire_hashes(block_hashes(p, root_hash(VERSION.digest, "")))) for p in prompts)
    # 90 blocks of 16 tokens: three layers, two heads of 16 numbers, keys and values, 4 bytes each.
    async with resident(long_llama, kv_cache_bytes=90 * 16 * 3 * 2 * 16 * 2 * 4) as model:
        builder = ReportBuilder("boot", lambda: 0)
        await run(model, "one", prompts[0], 1, "")
        assert set(report_of(builder, model).prefix.stored) == ours
        await run(model, "two", prompts[1], 1, "")
        changes = report_of(builder, model).prefix
        assert (set(changes.stored), set(changes.evicted)) == (theirs, ours)
        again = await run(model, "three", prompts[0], 1, "")
        assert again.cached_prompt_tokens < 512
