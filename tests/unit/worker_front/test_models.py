"""Residency: what is fetched, loaded, awaited, unloaded."""

from __future__ import annotations

import asyncio

import pytest

from services.worker.front.resident import Stage
from tests.unit.worker_front.fakes import READY, make_sequence, until
from tests.unit.worker_front.world import World, version
from tokenloom.kit.errors import CallError

A, B, C = (version(letter, 1 << 30) for letter in "abc")


async def test_model_passes_through_its_stages() -> None:
    world = World()
    world.may_fetch.clear()
    world.models.start(["a"])
    await until(lambda: (known := world.models.get(A.digest)) is not None and known.progress > 0)
    [resident] = world.models.all()
    assert (resident.stage, resident.progress) == (Stage.FETCHING, 0.5)
    assert world.models.missing() == "model a is fetching, 50% done"
    world.may_fetch.set()
    link = await world.launch.next()
    assert resident.stage is Stage.LOADING
    assert world.models.missing() == "model a is loading, 0% done"
    link.say(READY)
    assert resident.stage is Stage.READY
    assert world.models.missing() == ""
    await world.close()


async def test_second_load_waits_for_the_first() -> None:
    world = World()
    both = [asyncio.create_task(world.models.load(A.digest)) for _ in range(2)]
    (await world.launch.next()).say(READY)
    one, two = await asyncio.gather(*both)
    assert one is two
    assert world.launch.count == 1
    await world.close()


async def test_load_goes_on_when_its_caller_leaves() -> None:
    world = World()
    loading = asyncio.create_task(world.models.load(A.digest))
    link = await world.launch.next()
    loading.cancel()
    link.say(READY)
    resident = await world.models.load(A.digest)
    assert resident.stage is Stage.READY
    await world.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CallError("DIGEST_MISMATCH", "wrong bytes"), "DIGEST_MISMATCH"),
        (OSError("disk full"), "MODEL_LOAD_FAILED"),
    ],
)
async def test_failed_fetch_fails_the_model_until_it_is_loaded_again(
    error: CallError | OSError, reason: str
) -> None:
    world = World()
    world.weights_error = error
    with pytest.raises(CallError) as failed:
        await world.models.load(A.digest)
    assert failed.value.reason == reason
    resident = world.models.get(A.digest)
    assert resident is not None
    assert resident.stage is Stage.FAILED
    assert world.models.missing() == "", "a load by command says nothing about the worker"
    world.weights_error = None
    assert (await world.load(A)).stage is Stage.READY
    await world.close()


async def test_configured_models_are_awaited_by_name() -> None:
    world = World()
    del world.known["b"]
    world.models.start(["a", "b"])
    (await world.launch.next()).say(READY)
    await until(lambda: world.models.missing() == "model b: no model b")
    world.known["b"] = B
    (await world.launch.next()).say(READY)
    assert world.models.missing() == ""
    await world.close()


async def test_two_names_of_one_version_share_an_engine() -> None:
    world = World()
    world.known["again"] = A
    world.models.start(["a", "again"])
    (await world.launch.next()).say(READY)
    await until(lambda: world.models.missing() == "")
    assert world.launch.count == 1
    await world.close()


async def test_models_max_is_kept() -> None:
    world = World(models_max=1)
    await world.load(A)
    with pytest.raises(CallError) as full:
        await world.models.load(B.digest)
    assert full.value.reason == "MODEL_MEMORY_BUSY"
    assert full.value.message == (
        "this worker holds models_max (1) models, so b has no place: unload a model first, or load this one "
        "with evict"
    )
    await world.close()


async def test_unload_waits_for_the_last_sequence() -> None:
    world = World()
    resident = await world.load(A)
    sequence = make_sequence()
    resident.engine.submit(sequence)
    unloading = asyncio.create_task(world.models.unload(A.digest))
    for _ in range(5):
        await asyncio.sleep(0)
    assert resident.stage is Stage.DRAINING
    assert not unloading.done()
    resident.engine.cancel(sequence)
    for _ in range(5):
        await asyncio.sleep(0)
    assert resident.engine._link is not None
    resident.engine._link.kill()
    await unloading
    assert world.models.get(A.digest) is None
    with pytest.raises(CallError, match="not resident"):
        await world.models.unload(A.digest)


async def test_unload_ends_a_load_that_is_on_its_way() -> None:
    world = World()
    world.may_fetch.clear()
    loading = asyncio.create_task(world.models.load(A.digest))
    await until(lambda: world.models.get(A.digest) is not None)
    await world.models.unload(A.digest)
    with pytest.raises(CallError) as ended:
        await loading
    assert ended.value.reason == "MODEL_NOT_FOUND"


async def test_configured_model_that_failed_for_good_is_named_first_and_stays() -> None:
    world = World(failed_keep_s=0)
    world.weights_error = CallError("DIGEST_MISMATCH", "wrong bytes")
    world.models.start(["none", "a"])
    await until(lambda: world.models.missing() == "failed: model a: wrong bytes")
    for _ in range(5):
        await asyncio.sleep(0)
    assert world.models.missing() == "failed: model a: wrong bytes"
    await world.close()


async def test_worker_without_configured_models_is_ready_whatever_it_loads() -> None:
    world = World()
    world.models.start([])
    assert world.models.missing() == ""
    world.may_fetch.clear()
    loading = asyncio.create_task(world.models.load(A.digest))
    await until(lambda: world.models.get(A.digest) is not None)
    assert world.models.missing() == ""
    loading.cancel()
    await world.close()


async def test_configured_model_whose_fetch_broke_off_is_tried_again_by_itself() -> None:
    world = World(failed_keep_s=0.05)
    world.known[f"a@{A.digest}"] = A
    why = "the modelstore at 1.2.3.4:9200 cannot be reached"
    world.weights_error = CallError("SERVICE_UNAVAILABLE", why)
    world.models.start(["a"])
    await until(lambda: "tried again" in world.models.missing())
    assert world.models.missing() == f"model a: {why}; it is tried again"
    world.weights_error = None
    (await world.launch.next()).say(READY)
    await until(lambda: world.models.missing() == "")
    assert world.resident("a").configured
    assert not world.models._obtaining, "nothing is left of the tries"
    await world.close()


async def test_configured_model_that_a_command_failed_to_load_is_loaded_and_awaited() -> None:
    world = World(failed_keep_s=0.0)
    world.weights_error = CallError("DIGEST_MISMATCH", "wrong bytes")
    with pytest.raises(CallError, match="wrong bytes"):
        await world.models.load(A.digest)
    world.weights_error = None
    world.models.start(["a"])
    link = await world.launch.next()
    assert "a is loading" in world.models.missing()
    link.say(READY)
    await until(lambda: world.models.missing() == "")
    assert world.resident("a").stage is Stage.READY
    await world.close()


async def test_configured_model_that_is_leaving_is_loaded_again() -> None:
    world = World()
    await world.load(A)
    unloading = asyncio.create_task(world.models.unload(A.digest))
    await until(lambda: world.resident("a").stage is Stage.DRAINING)
    world.models.start(["a"])
    await world.gone("a")
    await unloading
    assert world.models.missing() != ""
    (await world.launch.next()).say(READY)
    await until(lambda: world.models.missing() == "")
    await world.close()


async def test_configured_models_that_fit_only_one_by_one_are_refused_with_their_figures() -> None:
    two = World(2, version("a", 3 << 30), version("b", 2 << 30), budget_bytes=4 << 30)
    two.models.start(["a"])
    (await two.launch.next()).say(READY)
    two.models.start(["b"])
    await until(lambda: two.models.missing().startswith("failed: "))
    assert two.models.missing() == (
        "failed: model b: the models of the settings need 5.00 GiB (5,368,709,120 bytes) together "
        "(a 3.00 GiB (3,221,225,472 bytes), b 2.00 GiB (2,147,483,648 bytes)) and this worker has 4.00 GiB "
        "(4,294,967,296 bytes) in all: name fewer in models, raise memory_bytes, or lower kv_cache_bytes"
    )
    assert two.resident("a").stage is Stage.READY, "what fits is served"
    await two.close()


async def test_configured_model_has_the_memory_before_one_that_came_by_command() -> None:
    world = World(3, A, B, C, budget_bytes=2 << 30, min_dwell_s=10.0)
    world.models.start(["a"])
    world.links["a"] = await world.launch.next()
    world.links["a"].say(READY)
    await world.load(B)
    world.clock.advance(9)
    world.models.start(["c"])
    await until(lambda: "may be evicted for another 1.0 s" in world.models.missing())
    world.clock.advance(1)
    await world.gone("b")
    (await world.launch.next()).say(READY)
    await until(lambda: world.models.missing() == "")
    assert sorted(one.version.name for one in world.models.all()) == ["a", "c"]
    await world.close()
