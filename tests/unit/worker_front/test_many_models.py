"""Many models under one budget: eviction, drain, hand-back, failures, and the words of each refusal."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.front.resident import Resident, Stage
from services.worker.protocol import Failed
from tests.unit.worker_front.fakes import READY, FakeLink, make_sequence, until
from tests.unit.worker_front.world import World, version
from tokenloom.kit.errors import CallError

GIB = 1 << 30
A, B, C, D = (version(letter, GIB) for letter in "abcd")
DWELL_S = 100.0


def world(*, budget_bytes: int = 3 * GIB, **bounds: float) -> World:
    return World(8, A, B, C, D, budget_bytes=budget_bytes, **bounds)


async def full_world(**bounds: float) -> World:
    """Three models that were used, a first and c last, past their dwell: no room for d."""
    made = world(**bounds)
    for one in (A, B, C):
        resident = await made.load(one)
        use(made, one.name)
        assert resident.stage is Stage.READY
    made.clock.advance(DWELL_S)
    return made


def use(made: World, name: str) -> None:
    """One sequence, begun and ended."""
    made.clock.advance(1)
    sequence = make_sequence()
    engine = made.resident(name).engine
    engine.submit(sequence)
    engine.cancel(sequence)
    made.clock.advance(1)


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_evicted_model_is_gone_before_the_new_engine_starts() -> None:
    made = await full_world()
    made.may_fetch.clear()
    loading = asyncio.create_task(made.models.load(D.digest, evict=True))
    await until(lambda: made.models.get(D.digest) is not None)
    assert made.resident("a").stage is Stage.DRAINING
    assert (made.resident("d").stage, made.resident("d").reserved_bytes) == (Stage.FETCHING, 0)
    made.may_fetch.set()
    await until(lambda: made.resident("d").stage is Stage.LOADING)
    assert made.launch.count == 3, "its files are here, and its memory is not"
    await made.gone("a")
    (await made.launch.next()).say(READY)
    assert (await loading).stage is Stage.READY
    assert (made.resident("d").reserved_bytes, made.models.free_bytes) == (GIB, 0)
    await made.close()


async def test_files_that_fit_only_once_the_evicted_model_is_gone_are_fetched_then() -> None:
    made = await full_world()
    made.weights_error = CallError("MODEL_MEMORY_BUSY", "the cache is full", retry_after_s=10)
    loading = asyncio.create_task(made.models.load(D.digest, evict=True))
    await turns()
    assert made.resident("d").stage is Stage.FETCHING, "a leaves, and its files with it"
    made.weights_error = None
    await made.gone("a")
    (await made.launch.next()).say(READY)
    assert (await loading).stage is Stage.READY
    await made.close()


async def test_files_that_do_not_fit_though_nobody_leaves_fail_the_load_at_once() -> None:
    made = world()
    made.weights_error = CallError("MODEL_MEMORY_BUSY", "the cache is full", retry_after_s=10)
    with pytest.raises(CallError, match="the cache is full"):
        await made.models.load(A.digest, evict=True)
    await made.close()


async def test_files_are_in_use_until_the_engine_process_is_gone() -> None:
    made = world()
    await made.load(A)
    await made.load(B)
    made.links["a"].die("killed by SIGKILL")
    (await made.launch.next()).say(READY)
    assert made.folders == {"a", "b"}, "its next process reads them again"
    unloading = asyncio.create_task(made.models.unload(B.digest))
    await until(lambda: made.resident("b").stage is Stage.DRAINING)
    assert made.folders == {"a", "b"}
    await made.gone("b")
    await unloading
    assert made.folders == {"a"}
    made.weights_error = CallError("DIGEST_MISMATCH", "wrong bytes")
    with pytest.raises(CallError, match="wrong bytes"):
        await made.models.load(C.digest)
    assert made.folders == {"a"}
    await made.close()


async def test_model_that_waits_names_what_it_waits_for() -> None:
    made = world(budget_bytes=GIB)
    await made.load(A)
    unloading = asyncio.create_task(made.models.unload(A.digest))
    made.models.start(["d"])
    await until(lambda: "waits" in made.models.missing())
    assert made.models.missing() == "model d waits for the memory of a"
    await made.gone("a")
    await unloading
    (await made.launch.next()).say(READY)
    await until(lambda: made.models.missing() == "")
    await made.close()


async def test_running_sequence_of_an_evicted_model_may_end_and_a_waiting_one_is_handed_back() -> None:
    made = world(budget_bytes=GIB)
    engine = (await made.load(A)).engine
    one, other, waiting = make_sequence(), make_sequence(), make_sequence(leased=False)
    for sequence in (one, other, waiting):
        engine.submit(sequence)
    made.clock.advance(DWELL_S)
    loading = asyncio.create_task(made.models.load(D.digest, evict=True))
    with pytest.raises(CallError) as back:
        await waiting.next()
    assert back.value.message == (
        "model a leaves worker 1.2.3.4:9100 to make room for another; send the request again"
    )
    assert (back.value.reason, back.value.retriable) == ("DRAINING", True)
    await turns()
    assert list(engine.admission.active.values()) == [one, other]
    assert made.links["a"].commands[-1].id == other.key, "neither a cancel nor an end"
    engine.cancel(one)
    await turns()
    assert made.launch.count == 1
    engine.cancel(other)
    await made.gone("a")
    (await made.launch.next()).say(READY)
    await loading
    await made.close()


async def test_sequence_that_outlasts_the_grace_is_handed_back() -> None:
    made = await full_world(evict_grace_s=0.0)
    running = make_sequence()
    for name in "abc":
        made.resident(name).engine.submit(running if name == "a" else make_sequence())
    loading = asyncio.create_task(made.models.load(D.digest, evict=True))
    with pytest.raises(CallError) as back:
        await running.next()
    assert back.value.reason == "DRAINING"
    assert running.key in made.links["a"].cancelled
    await made.gone("a")
    (await made.launch.next()).say(READY)
    await loading
    await made.close()


async def test_unload_by_command_takes_its_time_until_somebody_waits_for_the_memory() -> None:
    made = world(budget_bytes=GIB, evict_grace_s=0.0)
    await made.load(A)
    running = make_sequence()
    made.resident("a").engine.submit(running)
    unloading = asyncio.create_task(made.models.unload(A.digest))
    await turns(30)
    assert made.resident("a").engine.busy, "inside its dwell, and still it leaves: an operator said so"
    loading = asyncio.create_task(made.models.load(D.digest))
    with pytest.raises(CallError, match="leaves worker"):
        await running.next()
    await made.gone("a")
    (await made.launch.next()).say(READY)
    await asyncio.gather(unloading, loading)
    await made.close()


async def test_version_that_is_leaving_is_loaded_again_afterwards() -> None:
    made = world()
    await made.load(A)
    unloading = asyncio.create_task(made.models.unload(A.digest))
    await until(lambda: made.resident("a").stage is Stage.DRAINING)
    loading = asyncio.create_task(made.models.load(A.digest))
    await turns()
    assert made.launch.count == 1
    await until(lambda: bool(made.links["a"].commands))
    made.links["a"].die("exit status 0")
    (await made.launch.next()).say(READY)
    assert (await loading).stage is Stage.READY
    await unloading
    await made.close()


async def test_what_never_fits_is_refused_with_its_figures() -> None:
    made = world(budget_bytes=GIB // 2)
    with pytest.raises(CallError) as refused:
        await made.models.load(A.digest, evict=True)
    assert refused.value.message == (
        "model a needs 1.00 GiB (1,073,741,824 bytes) (weights 1.00 GiB (1,073,741,824 bytes)) and this "
        "worker has 512.00 MiB (536,870,912 bytes) in all: raise memory_bytes, or lower kv_cache_bytes"
    )
    assert refused.value.reason == "MODEL_TOO_LARGE"
    assert refused.value.metadata == {"needed_bytes": str(GIB), "available_bytes": str(GIB // 2)}
    assert (made.models.get(A.digest), made.launch.count) == (None, 0)
    made.models.start(["a"])
    await until(lambda: made.models.missing().startswith("failed: model a: model a needs 1.00 GiB"))
    await made.close()


async def test_model_that_must_wait_for_a_dwell_is_refused_with_the_time() -> None:
    made = world(budget_bytes=3 * GIB // 2)
    await made.load(A)
    made.clock.advance(DWELL_S - 7.25)
    with pytest.raises(CallError) as refused:
        await made.models.load(B.digest, evict=True)
    assert refused.value.message == (
        "model b needs 1.00 GiB (1,073,741,824 bytes) and 512.00 MiB (536,870,912 bytes) of 1.50 GiB "
        "(1,610,612,736 bytes) are free: no model that would make room may be evicted for another 7.2 s "
        "(min_dwell_s is 100); try again then, or unload one"
    )
    assert (refused.value.reason, refused.value.retriable) == ("MODEL_MEMORY_BUSY", True)
    assert refused.value.retry_after_s == pytest.approx(7.25)
    assert refused.value.metadata == {
        "needed_bytes": str(GIB),
        "free_bytes": str(GIB // 2),
        "budget_bytes": str(3 * GIB // 2),
    }
    assert made.resident("a").stage is Stage.READY
    await made.close()


async def test_load_that_may_not_evict_is_refused_with_the_cure() -> None:
    made = await full_world()
    with pytest.raises(CallError) as refused:
        await made.models.load(D.digest)
    assert refused.value.message == (
        "model d needs 1.00 GiB (1,073,741,824 bytes) and 0 bytes of 3.00 GiB (3,221,225,472 bytes) are "
        "free: unload a model first, or load this one with evict"
    )
    assert refused.value.reason == "MODEL_MEMORY_BUSY"
    await made.close()


async def test_full_worker_inside_its_dwells_says_so() -> None:
    made = World(1, A, B, budget_bytes=0)
    await made.load(A)
    with pytest.raises(CallError) as refused:
        await made.models.load(B.digest, evict=True)
    assert refused.value.message == (
        "this worker holds models_max (1) models, so b has no place: no model that would make room may be "
        "evicted for another 100.0 s (min_dwell_s is 100); try again then, or unload one"
    )
    await made.close()


async def test_worker_that_loads_nothing_on_demand_says_so() -> None:
    made = world(loads_on_demand=False)
    made.models.start(["a"])
    (await made.launch.next()).say(READY)
    assert (await made.models.load(A.digest)).stage is Stage.READY, "it is here already"
    with pytest.raises(CallError) as refused:
        await made.models.load(B.digest)
    assert refused.value.message == (
        f"this worker does not have model {B.digest!r} and loads none by command (loads_on_demand is off): "
        "name the model in its setting models"
    )
    assert refused.value.reason == "PERMISSION_DENIED"
    await made.close()


async def test_failed_load_holds_no_memory_and_is_forgotten() -> None:
    made = world(failed_keep_s=0.05)
    made.weights_error = CallError("DIGEST_MISMATCH", "wrong bytes")
    with pytest.raises(CallError):
        await made.models.load(A.digest)
    await until(lambda: made.models.free_bytes == 3 * GIB)
    assert (made.resident("a").stage, made.resident("a").reserved_bytes) == (Stage.FAILED, 0)
    before = made.changes
    await until(lambda: made.models.get(A.digest) is None)
    assert made.changes > before
    await made.close()


async def test_failed_loads_are_bounded() -> None:
    made = World(2, A, B, C, D, budget_bytes=GIB)
    made.weights_error = OSError("disk full")
    for one in (A, B, C, D):
        with pytest.raises(CallError, match="disk full"):
            await made.models.load(one.digest)
        await until(lambda: made.models.free_bytes == GIB)
    await turns()
    assert [resident.version.name for resident in made.models.all()] == ["c", "d"]
    await made.close()


async def test_engine_that_cannot_start_gives_its_memory_to_who_waits() -> None:
    made = world(budget_bytes=GIB)
    first = asyncio.create_task(made.models.load(A.digest))
    link = await made.launch.next()
    assert made.models.free_bytes == 0
    link.say(Failed("MODEL_UNSUPPORTED", "an odd layer", {"architecture": "Odd", "cause": "odd"}))
    link.die()
    with pytest.raises(CallError, match="odd layer"):
        await first
    await until(lambda: made.models.free_bytes == GIB)
    await made.load(B)
    await made.close()


async def test_engine_that_dies_keeps_its_memory_while_it_is_restarted() -> None:
    made = world(budget_bytes=GIB)
    resident = await made.load(A)
    made.links["a"].die("killed by SIGKILL")
    link = await made.launch.next()
    assert resident.stage is Stage.LOADING
    assert (made.models.free_bytes, resident.reserved_bytes) == (0, GIB)
    made.clock.advance(DWELL_S - 1)
    with pytest.raises(CallError, match="needs"):
        await made.models.load(B.digest, evict=True)
    link.say(READY)
    made.clock.advance(1)
    assert resident.dwell_left_s == 0, "its dwell is that of the model, not of the process"
    await made.close()


async def test_fifty_loads_of_one_version_are_one() -> None:
    made = await full_world()
    loads = [asyncio.create_task(made.models.load(D.digest, evict=True)) for _ in range(50)]
    await until(lambda: made.models.get(D.digest) is not None)
    await made.gone("a")
    (await made.launch.next()).say(READY)
    assert {id(one) for one in await asyncio.gather(*loads)} == {id(made.resident("d"))}
    assert made.launch.count == 4
    assert sorted(r.version.name for r in made.models.all()) == ["b", "c", "d"]
    await made.close()


DWELL_OF_PLAY_S = 10.0
MOVES = st.sampled_from(
    ["load"] * 4 + ["ready"] * 4 + ["time"] * 2 + ["unload", "end", "crash", "fail", "use"]
)


class Play:
    """Random moves on one worker, and what must hold after each."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        names = "abcdef"
        self.versions = [version(name, self.random.randint(1, 4)) for name in names]
        self.world = World(
            4,
            *self.versions,
            budget_bytes=6,
            min_dwell_s=DWELL_OF_PLAY_S,
            evict_grace_s=0.0,
            failed_keep_s=0.0,
        )
        self.loads: list[tuple[str, asyncio.Task[object]]] = []
        self.unloads: list[asyncio.Task[None]] = []
        self.unloaded: set[Resident] = set()
        self.leaving: set[Resident] = set()
        self.evictions = 0

    async def move(self, kind: str) -> None:
        world, pick = self.world, self.random.choice(self.versions)
        resident = world.models.get(pick.digest)
        link = resident.engine._link if resident is not None else None
        assert link is None or isinstance(link, FakeLink)
        if kind == "load":
            evict = self.random.random() < 0.8
            task: asyncio.Task[object] = asyncio.create_task(world.models.load(pick.digest, evict=evict))
            self.loads.append((pick.name, task))
        elif kind == "unload" and resident is not None:
            self.unloaded.add(resident)
            self.unloads.append(asyncio.create_task(world.models.unload(pick.digest)))
        elif kind == "ready" and link is not None and resident.stage is Stage.LOADING:
            link.say(READY)
        elif kind == "fail" and link is not None and resident.stage is Stage.LOADING:
            link.say(Failed("MODEL_UNSUPPORTED", "an odd layer", {"architecture": "Odd", "cause": "odd"}))
            link.die()
        elif kind in ("end", "crash") and link is not None:
            link.die(kind)
        elif kind == "use" and resident is not None and resident.stage is Stage.READY:
            resident.engine.submit(make_sequence())
        elif kind == "time":
            world.clock.advance(self.random.uniform(0, 12))
        await asyncio.sleep(0)
        self.check()
        await turns(self.random.randint(0, 12))
        self.check()

    def check(self) -> None:
        world = self.world
        held = sum(resident.reserved_bytes for resident in world.models.all())
        assert held == world.models._residency.budget.used_bytes <= 6
        running = [r for r in world.models.all() if r.engine._link is not None]
        assert sum(r.version.weight_bytes for r in running) <= 6, "an engine runs on what is its own"
        leaving = {resident for resident in world.models.all() if resident.draining}
        for resident in leaving - self.leaving - self.unloaded:
            ready_s = resident.engine.ready_s
            assert ready_s is not None, "evicted while it was loaded"
            assert world.clock.monotonic() - ready_s >= DWELL_OF_PLAY_S
            self.evictions += 1
        self.leaving |= leaving
        starts = sum(1 + engine.restarts for engine in world.engines)
        assert world.launch.count <= starts, "an engine is started once a load, and again when it died"

    async def settle(self) -> None:
        """Every engine does what it is asked to: then each load has an end, or is somebody's second."""
        for _ in range(400):
            for resident in list(self.world.models.all()):
                link = resident.engine._link
                if isinstance(link, FakeLink):
                    if resident.stage is Stage.DRAINING:
                        link.die("exit status 0")
                    elif resident.stage is Stage.LOADING:
                        link.say(READY)
            await asyncio.sleep(0.002 if any(not task.done() for _, task in self.loads) else 0)
            self.check()
            if all(task.done() for _, task in self.loads) and all(task.done() for task in self.unloads):
                return
        stuck = [
            (name, self.world.models.get(f"sha256:{name * 64}")) for name, t in self.loads if not t.done()
        ]
        raise AssertionError(f"loads without an end: {stuck}")


@settings(max_examples=40, deadline=None)
@given(moves=st.lists(MOVES, min_size=5, max_size=40), seed=st.integers(0, 1 << 30))
def test_any_history_keeps_the_budget_and_ends_every_load(moves: list[str], seed: int) -> None:
    async def history() -> None:
        play = Play(seed)
        for kind in moves:
            await play.move(kind)
        await play.settle()
        for _, task in play.loads:
            error = task.exception()
            assert error is None or isinstance(error, CallError), error
        await play.world.close()

    asyncio.run(history())
