"""What listeners put together of load reports is what the engine's cache holds, whatever happens.

A sim engine under random prompts, whose process dies now and then; a real publisher; listeners that come,
go, and read late.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from hypothesis import given, settings
from hypothesis import strategies as st
from loom.worker.v1 import worker_pb2 as pb

from services.worker.front.engine import Engine
from services.worker.front.ports import ModelVersion
from services.worker.front.prefixes import Prefixes
from services.worker.front.publisher import Published, Publisher
from services.worker.front.report import Report, ReportBuilder
from services.worker.front.resident import Resident
from services.worker.protocol import Sampling, Step, Submit, decode_event, encode
from services.worker.sim.config import SimConfig
from services.worker.sim.engine import SimEngine
from tests.unit.worker_front.fakes import FakeLaunch, make_engine
from tokenloom.contract.prefix import WIRE_STRIDE, block_hashes, numbers, root_hash, wire_hashes
from tokenloom.kit.clock import SystemClock

VERSION = ModelVersion(f"sha256:{'a' * 64}", "m", 4096, 512)
ROOT = root_hash(VERSION.digest, "")
CONFIG = SimConfig(total_blocks=4 * WIRE_STRIDE + 7, context_length=2048, step_tokens_max=1024)
LISTENERS = 3

prompts = st.tuples(st.just("run"), st.integers(0, 3), st.sampled_from([100, 530, 1030, 1600]))
moves = st.lists(
    prompts
    | st.tuples(st.sampled_from(["read", "join", "leave"]), st.integers(0, LISTENERS - 1))
    | st.tuples(st.sampled_from(["publish", "publish", "die"])),
    max_size=30,
)


def prompt_of(family: int, tokens: int) -> list[int]:
    """Prompts of a family begin alike; those of families 0 and 1 share their first 512 tokens."""
    first = family // 2
    return [(first if position < 512 else family) + position % 7 for position in range(tokens)]


class Machine:
    """A sim engine's process, told to a front as its socket would."""

    def __init__(self, front: Engine) -> None:
        self.front = front
        self.boot()

    def boot(self) -> None:
        self._sim = SimEngine(CONFIG)
        self.front._on_event(decode_event(encode(self._sim.ready())[4:]))

    def die(self) -> None:
        self.front._bury("killed")

    def run(self, prompt: list[int]) -> None:
        """One sequence from its first step to its last."""
        self._sim.submit(Submit("s", prompt, [], 1, 0, [], Sampling(), prefix_root=ROOT), 0)
        while plan := self._sim.plan(0):
            self._say(self._sim.tell(self._sim.settle(plan, 0)))
        self._say(self._sim.tell([]))

    def _say(self, step: Step) -> None:
        self.front._on_event(decode_event(encode(step)[4:]))

    def findable(self) -> set[int]:
        """By looking at every block of the engine's pool."""
        pool = self._sim._scheduler._pool
        contents = [pool._contents[block] for block in pool._found.values()]
        return set(numbers([c.key for c in contents if c.depth % WIRE_STRIDE == 0]))


class Listener:
    """A subscription, and what it knows."""

    def __init__(self, publisher: Publisher) -> None:
        self._reports: AsyncGenerator[Published, None] = publisher.listen()
        self.known: set[int] | None = None
        self.number = 0

    async def read(self) -> None:
        published = await asyncio.wait_for(anext(self._reports), 5)
        report = pb.WatchLoadResponse.FromString(published.SerializeToString()).report
        self.number = report.sequence
        changes = report.models[0].prefix
        assert changes.whole or self.known is not None, "a subscription begins with everything"
        if changes.whole:
            self.known = set()
        assert self.known is not None
        assert not self.known & set(changes.stored)
        assert set(changes.evicted) <= self.known
        self.known = (self.known | set(changes.stored)) - set(changes.evicted)

    async def leave(self) -> None:
        await self._reports.aclose()


class Play:
    """The whole, and what each report ought to say."""

    def __init__(self) -> None:
        self.resident = Resident(VERSION, make_engine(FakeLaunch()))
        self.resident.fetching = False
        self.machine = Machine(self.resident.engine)
        self.builder = ReportBuilder("boot", lambda: 0)
        self.publisher = Publisher(self.build, SystemClock(), report_interval_s=600, heartbeat_s=600)
        self.listeners: dict[int, Listener] = {}
        self.ought: set[int] = set()
        self.latest = 0
        self.died_since = False

    def build(self) -> Report:
        self.ought, self.died_since = self.machine.findable(), False
        report = self.builder.build(residents=[self.resident], held=[], draining=False, unix_ms=0)
        self.latest = report.number
        return report

    async def move(self, kind: str, *what: int) -> None:
        if kind == "run":
            self.machine.run(prompt_of(*what))
        elif kind == "die":
            self.machine.die()
            self.machine.boot()
            self.died_since = True
        elif kind == "publish":
            if self.listeners:
                self.publisher._publish()
        elif kind == "join" and what[0] not in self.listeners:
            self.listeners[what[0]] = Listener(self.publisher)
            await self.read(what[0])
        elif kind == "read" and what[0] in self.listeners:
            await self.read(what[0])
        elif kind == "leave" and (gone := self.listeners.pop(what[0], None)) is not None:
            await gone.leave()

    async def read(self, number: int) -> None:
        listener = self.listeners[number]
        if listener.number == self.latest:
            return
        await listener.read()
        assert listener.number == self.latest or self.latest == 0
        # What an engine that died since had is told to nobody any more.
        gone = listener.known == set() and self.died_since
        assert listener.known == self.ought or gone


async def play(history: list[tuple[object, ...]]) -> None:
    stage = Play()
    for kind, *what in history:
        await stage.move(kind, *what)  # type: ignore[arg-type]
    for number in range(LISTENERS):
        await stage.move("join", number)
    await stage.move("publish")
    for number, listener in stage.listeners.items():
        await stage.read(number)
        assert listener.known == stage.machine.findable()
        await listener.leave()
    await stage.publisher.close()


@settings(max_examples=80, deadline=None)
@given(moves)
def test_a_listener_knows_exactly_what_the_cache_holds(history: list[tuple[object, ...]]) -> None:
    asyncio.run(play(history))


def test_prompts_of_this_test_evict_each_other() -> None:
    machine = Machine(make_engine(FakeLaunch()))
    machine.run(prompt_of(0, 1600))
    three = set(wire_hashes(block_hashes(prompt_of(0, 1600), ROOT)))
    assert machine.findable() == set(machine.front.prefixes.take().stored) == three  # type: ignore[union-attr]
    machine.run(prompt_of(2, 1600))
    assert machine.findable() != three
    assert machine.front.prefixes.take().evicted  # type: ignore[union-attr]


def test_prefixes_are_told_once_whatever_an_engine_repeats() -> None:
    prefixes = Prefixes()
    prefixes.begin(10 * WIRE_STRIDE)
    prefixes.apply([1, 1], [])
    assert prefixes.take() == (True, [1], [])
    prefixes.apply([1], [9])
    assert prefixes.take() is None
    prefixes.apply([2], [1])
    prefixes.apply([1], [2])
    assert prefixes.take() is None
