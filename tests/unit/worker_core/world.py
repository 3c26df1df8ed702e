"""A scheduler under traffic, with a model of what lies in its cache.

A cell of the cache holds the chain of all tokens up to its position, and every plan is checked when it
is "computed": what a sequence reads must be its own chain, what it writes must be its own block.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import strategies as st

from services.worker.core.plan import Chunk, Limits, Plan, Verdict
from services.worker.core.scheduler import HERE, Scheduler
from services.worker.core.sequence import Sequence, State

STEPS_MAX = 4000
VOCABULARY = 41
FAMILY_TOKENS = 5
ROOTS = (b"", b"tenant")


@dataclass
class Arrival:
    family: int
    """Prompts of one family are prefixes of each other."""
    prompt: int
    output: int
    new: int
    priority: int
    at: int
    leaves_after: int | None
    stop: int
    root: bytes


arrivals = st.builds(
    Arrival,
    family=st.integers(0, 2),
    prompt=st.integers(1, 60),
    output=st.integers(0, 6),
    new=st.integers(1, 30),
    priority=st.integers(1, 4),
    at=st.integers(0, 20),
    leaves_after=st.none() | st.integers(0, 12),
    stop=st.integers(2, VOCABULARY),
    root=st.sampled_from(ROOTS),
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


def token_at(family: int, position: int) -> int:
    """What a prompt of this family has, or a step draws, at a position: families differ at first only."""
    return (family * 17 * (position < FAMILY_TOKENS) + position * position * 5 + position // 3) % VOCABULARY


def sequence_of(name: str, arrival: Arrival) -> Sequence:
    length = arrival.prompt + arrival.output
    return Sequence(
        id=name,
        tokens=[token_at(arrival.family, position) for position in range(length)],
        prompt_tokens=arrival.prompt,
        max_new_tokens=arrival.new,
        stop_token_ids=frozenset({arrival.stop}),
        priority=arrival.priority,
        prefix_root=arrival.root,
    )


def wanted(arrival: Arrival, context_length: int) -> list[int]:
    """The tokens that a sequence draws if nothing else is there."""
    drawn: list[int] = []
    position, left = arrival.prompt + arrival.output, arrival.new - arrival.output
    while len(drawn) < left and position < context_length:
        drawn.append(token_at(arrival.family, position))
        position += 1
        if drawn[-1] == arrival.stop:
            break
    return drawn


def chain(sequence: Sequence, end: int) -> tuple[object, ...]:
    """What the cell of position end - 1 holds."""
    return (sequence.prefix_root, *sequence.tokens[:end])


@dataclass
class World:
    """A scheduler, up to `depth` plans ahead of what is computed, and what must hold all the time."""

    scheduler: Scheduler
    depth: int = 1
    alive: dict[str, Sequence] = field(default_factory=dict)
    families: dict[Sequence, int] = field(default_factory=dict)
    drawn: dict[str, list[int]] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    cells: dict[tuple[int, int], object] = field(default_factory=dict)
    plans: deque[tuple[Plan, list[list[int]]]] = field(default_factory=deque)
    last: list[int] = field(default_factory=list)
    fed: int = 0
    """Tokens that were planned before they were known."""

    def arrive(self, name: str, arrival: Arrival) -> None:
        one = sequence_of(name, arrival)
        if self.scheduler.add(one, 0) is Verdict.ACCEPTED:
            self.alive[name], self.families[one], self.drawn[name] = one, arrival.family, []

    def leave(self, name: str) -> None:
        if self.scheduler.cancel(name) is not None:
            self.alive.pop(name)
            self.check_blocks()

    def plan(self, number: int) -> bool:
        """Plans one step; whether there was anything to compute."""
        plan = self.scheduler.plan(number)
        self.check_plan(plan)
        if plan:
            self.plans.append((plan, [list(chunk.sequence.blocks) for chunk in plan.chunks]))
        self.check_blocks()
        return bool(plan)

    def settle(self, number: int) -> None:
        """Computes and settles the oldest plan."""
        plan, blocks = self.plans.popleft()
        for chunk, held in zip(plan.chunks, blocks, strict=True):
            self.compute(chunk, held)
        self.last = [
            token_at(self.families[chunk.sequence], chunk.start + chunk.count)
            for chunk in plan.chunks
            if chunk.draws
        ]
        for advance in self.scheduler.settle(plan, self.last, number):
            self.drawn[advance.sequence.id].append(advance.token)
            if advance.finish is not None:
                self.finished.add(advance.sequence.id)
                self.alive.pop(advance.sequence.id)
        self.check_blocks()

    def fail(self) -> None:
        """The oldest plan cannot be computed for want of memory; some of it was written."""
        plan, blocks = self.plans[0]
        for chunk, held in zip(plan.chunks[::2], blocks[::2], strict=True):
            self.write(chunk, held, spoiled=True)
        self.plans.clear()
        gone = self.scheduler.out_of_memory(plan)
        if gone is not None:
            self.failed.add(gone.id)
            self.alive.pop(gone.id)
        self.check_blocks()

    def step(self, number: int) -> None:
        """Plans ahead as far as may be, then settles the oldest plan."""
        while len(self.plans) < self.depth and self.plan(number):
            pass
        if self.plans:
            self.settle(number)
        else:
            assert not self.alive, "a step is empty only when nobody is here"

    def drain(self, coming: list[Arrival]) -> None:
        """Steps until all have come and gone; who leaves does so between a plan and its settling."""
        number = 0
        while self.alive or self.plans or number <= 40:
            for index, arrival in enumerate(coming):
                if arrival.at == number:
                    self.arrive(str(index), arrival)
            if len(self.plans) < self.depth:
                self.plan(number)
            for index, arrival in enumerate(coming):
                if arrival.leaves_after is not None and arrival.at + arrival.leaves_after == number:
                    self.leave(str(index))
            self.step(number)
            number += 1
            assert number < STEPS_MAX, "it does not drain"

    def compute(self, chunk: Chunk, blocks: list[int]) -> None:
        """Reads what lies before the chunk and writes it."""
        sequence, size = chunk.sequence, self.scheduler.limits.block_tokens
        if sequence.state in HERE:
            for position in range(chunk.start):
                cell = self.cells.get((blocks[position // size], position % size))
                assert cell == chain(sequence, position + 1), (
                    f"{sequence.id} reads foreign keys at {position}"
                )
            if chunk.feeds_from >= 0:
                self.fed += 1
                assert self.last[chunk.feeds_from] == sequence.tokens[chunk.start]
        self.write(chunk, blocks)

    def write(self, chunk: Chunk, blocks: list[int], spoiled: bool = False) -> None:
        sequence, size = chunk.sequence, self.scheduler.limits.block_tokens
        for position in range(chunk.start, chunk.start + chunk.count):
            block = blocks[position // size]
            assert self.scheduler._pool.references(block) == 1, "a shared or free block is written"
            assert not any(block in one.blocks for one in self.alive.values() if one is not sequence)
            good = position < len(sequence.tokens) and not spoiled
            self.cells[block, position % size] = chain(sequence, position + 1) if good else "spoiled"

    def check_plan(self, plan: Plan) -> None:
        bound = self.scheduler.limits
        if self.depth == 1 and not self.plans:
            assert bool(plan) == bool(self.alive), "a step is empty only when nobody is here"
        assert plan.tokens == sum(chunk.count for chunk in plan.chunks) <= bound.step_tokens_max
        assert len({chunk.sequence.id for chunk in plan.chunks}) == len(plan.chunks) <= bound.sequences_max
        assert all(chunk.count == 1 for chunk in plan.chunks[: plan.decodes])
        for chunk in plan.chunks:
            assert chunk.count >= 1
            assert chunk.start + chunk.count <= len(chunk.sequence.blocks) * bound.block_tokens
            assert (chunk.feeds_from >= 0) == (chunk.start + chunk.count > len(chunk.sequence.tokens))

    def check_blocks(self) -> None:
        size, pool = self.scheduler.limits.block_tokens, self.scheduler._pool
        for one in self.alive.values():
            assert len(one.blocks) == len(set(one.blocks))
            assert one.blocks == [] or one.state is State.RUNNING
            assert one.kept * size <= one.computed <= len(one.blocks) * size
            assert one.computed < one.length <= self.scheduler.limits.context_length
        held = [block for one in self.alive.values() for block in one.blocks]
        leaving = [block for out in self.scheduler._outstanding for gone in out.leaving for block in gone]
        for block in range(pool.total):
            assert pool.references(block) == held.count(block) + leaving.count(block)
        assert pool.free == pool.total - len({*held, *leaving})
        assert pool.total - len(set(held)) >= self.scheduler.room().free_blocks

    def check_empty(self) -> None:
        room, limits = self.scheduler.room(), self.scheduler.limits
        assert (room.running, room.waiting, room.free_blocks) == (0, 0, limits.total_blocks)
        assert room.free_sequences == limits.sequences_max
        assert self.scheduler.outstanding == 0
