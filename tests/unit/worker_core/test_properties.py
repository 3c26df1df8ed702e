"""Whatever arrives and leaves: it drains, every block comes back, no step is too large, none is shared."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core.scheduler import Limits, Scheduler, Verdict
from services.worker.core.sequence import Sequence, State

STEPS_MAX = 4000


@dataclass
class Arrival:
    prompt: int
    output: int
    new: int
    priority: int
    at: int
    leaves_after: int | None
    stop_every: int


arrivals = st.builds(
    Arrival,
    prompt=st.integers(1, 60),
    output=st.integers(0, 6),
    new=st.integers(1, 30),
    priority=st.integers(1, 4),
    at=st.integers(0, 20),
    leaves_after=st.none() | st.integers(0, 12),
    stop_every=st.integers(2, 40),
)


@st.composite
def bounds(draw):
    block_tokens = draw(st.sampled_from([1, 3, 4, 16]))
    total_blocks = draw(st.integers(1, 30))
    sequences_max = draw(st.integers(1, 6))
    return Limits(
        total_blocks=total_blocks,
        block_tokens=block_tokens,
        sequences_max=sequences_max,
        step_tokens_max=sequences_max + draw(st.integers(0, 20)),
        context_length=draw(st.integers(1, total_blocks * block_tokens)),
        waiting_max=draw(st.integers(1, 50)),
    )


@dataclass
class World:
    """A scheduler and what must hold of it after every step."""

    scheduler: Scheduler
    alive: dict[str, Sequence] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)

    def arrive(self, name: str, arrival: Arrival) -> None:
        one = Sequence(
            id=name,
            tokens=list(range(arrival.prompt + arrival.output)),
            prompt_tokens=arrival.prompt,
            max_new_tokens=arrival.new,
            stop_token_ids=frozenset({arrival.stop_every}),
            priority=arrival.priority,
        )
        if self.scheduler.add(one, 0) is Verdict.ACCEPTED:
            self.alive[name] = one

    def leave(self, name: str) -> None:
        if self.scheduler.cancel(name) is not None:
            self.alive.pop(name)

    def step(self, number: int) -> None:
        plan = self.scheduler.plan(number)
        self.check_plan(plan)
        drawn = [number % 41 for chunk in plan.chunks if chunk.draws]
        for advance in self.scheduler.settle(plan, drawn, number):
            if advance.finish is not None:
                self.finished.add(advance.sequence.id)
                self.alive.pop(advance.sequence.id)
        self.check_blocks()

    def check_plan(self, plan) -> None:
        bound = self.scheduler.limits
        assert bool(plan) == bool(self.alive), "a step is empty only when nobody is here"
        assert plan.tokens == sum(chunk.count for chunk in plan.chunks) <= bound.step_tokens_max
        assert len({chunk.sequence.id for chunk in plan.chunks}) == len(plan.chunks) <= bound.sequences_max
        assert all(chunk.count == 1 for chunk in plan.chunks[: plan.decodes])
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.computed
            assert chunk.count >= 1
            assert chunk.start + chunk.count <= len(chunk.sequence.blocks) * bound.block_tokens

    def check_blocks(self) -> None:
        held = [block for one in self.alive.values() for block in one.blocks]
        assert len(held) == len(set(held)), "two sequences share a block"
        assert all(0 <= block < self.scheduler.limits.total_blocks for block in held)
        for one in self.alive.values():
            assert one.blocks == [] or one.state is State.RUNNING
            assert one.computed <= len(one.blocks) * self.scheduler.limits.block_tokens
            assert one.computed < len(one.tokens) <= self.scheduler.limits.context_length
        assert self.scheduler.limits.total_blocks - len(held) >= self.scheduler.room().free_blocks


@settings(max_examples=300, deadline=None)
@given(bounds(), st.lists(arrivals, max_size=14))
def test_any_pattern_of_arrivals_and_departures_drains(limits, coming):
    world = World(Scheduler(limits))
    number = 0
    while world.alive or number <= 40:
        for index, arrival in enumerate(coming):
            if arrival.at == number:
                world.arrive(str(index), arrival)
            if arrival.leaves_after is not None and arrival.at + arrival.leaves_after == number:
                world.leave(str(index))
        world.step(number)
        number += 1
        assert number < STEPS_MAX, "it does not drain"
    room = world.scheduler.room()
    assert (room.running, room.waiting, room.free_blocks) == (0, 0, limits.total_blocks)
    assert room.free_sequences == limits.sequences_max


@settings(max_examples=100, deadline=None)
@given(bounds(), st.lists(arrivals, min_size=2, max_size=10))
def test_the_first_in_rank_advances_in_every_step(limits, coming):
    world = World(Scheduler(limits))
    for index, arrival in enumerate(coming):
        world.arrive(str(index), arrival)
    for number in range(STEPS_MAX):
        if not world.alive:
            break
        first = min(world.alive.values(), key=lambda one: one.rank)
        before = (first.computed, first.preemptions)
        world.step(number)
        gone = first.id not in world.alive
        assert gone or (first.computed > before[0] and first.preemptions == before[1])
