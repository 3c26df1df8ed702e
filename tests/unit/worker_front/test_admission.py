"""Who starts, who waits, who is refused; and that promised blocks always exist."""

from __future__ import annotations

import asyncio

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core.scheduler import Limits, Scheduler
from services.worker.core.sequence import Sequence as EngineSequence
from services.worker.front.admission import Admission, Offer, blocks_needed
from services.worker.front.sequence import Sequence
from services.worker.protocol import Load, Output
from tests.unit.worker_front.fakes import READY, load, make_sequence


def opened(queue_max: int = 4, **changes: int) -> Admission:
    admission = Admission(queue_max)
    admission.open(msgspec.structs.replace(READY, **changes))
    return admission


def test_nobody_starts_before_the_engine_is_ready() -> None:
    admission = Admission(4)
    assert admission.offer(make_sequence()) is Offer.FULL
    assert admission.offer(make_sequence(leased=False)) is Offer.FULL
    assert (admission.free_sequences(), admission.free_blocks()) == (0, 0)


def test_leased_sequence_starts_at_once_or_not_at_all() -> None:
    admission = opened()
    offers = [admission.offer(make_sequence()) for _ in range(3)]
    assert offers == [Offer.START, Offer.START, Offer.FULL]
    assert admission.free_sequences() == 0


def test_unleased_sequences_wait_up_to_the_bound() -> None:
    admission = opened(queue_max=2)
    offers = [admission.offer(make_sequence(leased=False)) for _ in range(5)]
    assert offers == [Offer.START, Offer.START, Offer.QUEUE, Offer.QUEUE, Offer.FULL]
    assert (admission.queued, admission.waiting) == (2, 4)


def test_queue_is_left_by_urgency_and_then_by_age() -> None:
    admission = opened(sequences_max=1)
    running = make_sequence()
    admission.offer(running)
    late = make_sequence(leased=False, arrival_ms=20)
    early = make_sequence(leased=False, arrival_ms=10)
    urgent = make_sequence(leased=False, arrival_ms=30, priority=1)
    for sequence in (late, early, urgent):
        assert admission.offer(sequence) is Offer.QUEUE
    order = []
    admission.leave(running.key)
    while admitted := admission.admit():
        order += admitted
        admission.leave(admitted[0].key)
    assert order == [urgent, early, late]


def test_unleased_sequence_never_overtakes_the_queue() -> None:
    admission = opened(sequences_max=2)
    admission.offer(make_sequence(prompt=16 * 30))
    big = make_sequence(prompt=16 * 20, leased=False)
    assert admission.offer(big) is Offer.QUEUE
    assert admission.offer(make_sequence(leased=False)) is Offer.QUEUE
    assert admission.offer(make_sequence(leased=True)) is Offer.START


def test_blocks_bound_admission_as_well_as_sequences() -> None:
    admission = opened(sequences_max=10)
    assert admission.offer(make_sequence(prompt=16 * 37)) is Offer.START
    assert admission.free_blocks() == 2
    assert admission.offer(make_sequence(prompt=17)) is Offer.FULL
    assert admission.offer(make_sequence(prompt=16)) is Offer.START


def test_idle_engine_takes_what_its_whole_cache_holds() -> None:
    assert opened().offer(make_sequence(prompt=16 * 40 - 1)) is Offer.START


def test_blocks_that_sequences_share_are_counted_once_the_engine_says_so() -> None:
    admission = opened(sequences_max=10)
    for _ in range(3):
        sequence = make_sequence(prompt=16 * 11)
        assert admission.offer(sequence) is Offer.START
        sequence.push(Output(sequence.key, [1], 0), 1)
    admission.settle(load(running=3, free_blocks=0))
    assert admission.free_blocks() == 1
    admission.settle(load(running=3, free_blocks=25))
    assert admission.free_blocks() == 25


def test_what_was_sent_since_the_report_is_deducted() -> None:
    admission = opened(sequences_max=10)
    admission.settle(load(running=0, free_blocks=40))
    admission.offer(make_sequence(prompt=16 * 9))
    assert admission.free_blocks() == 30


def test_engine_that_ends_leaves_nobody_behind() -> None:
    admission = opened(sequences_max=1)
    held, waits = make_sequence(), make_sequence(leased=False)
    admission.offer(held)
    admission.offer(waits)
    assert admission.shut() == ([held], [waits])
    assert (admission.waiting, admission.free_sequences(), admission.offer(held)) == (0, 0, Offer.FULL)


def test_leave_says_whether_the_engine_must_hear_of_it() -> None:
    admission = opened(sequences_max=1)
    held, waits = make_sequence(), make_sequence(leased=False)
    admission.offer(held)
    admission.offer(waits)
    assert admission.leave(waits.key) is False
    assert admission.leave(held.key) is True
    assert admission.leave(held.key) is False
    assert admission.admit() == []


class Oracle:
    """The real scheduler, which knows exactly."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(Limits(40, 16, 6, 64, 600))
        self.clock = 0

    def submit(self, sequence: Sequence) -> None:
        assert sequence.submit is not None
        tokens = sequence.submit.prompt + sequence.submit.output
        self.scheduler.add(EngineSequence(sequence.key, tokens, len(sequence.submit.prompt), 20), self.clock)

    def step(self, sequences: dict[str, Sequence]) -> Load:
        self.clock += 1
        plan = self.scheduler.plan(self.clock)
        drawn = [1] * sum(chunk.draws for chunk in plan.chunks)
        for advance in self.scheduler.settle(plan, drawn, self.clock):
            sequence = sequences[advance.sequence.id]
            sequence.push(Output(sequence.key, [1], advance.index), self.clock)
            if advance.finish is not None:
                del sequences[sequence.key]
        room = self.scheduler.room()
        return Load(room.running, room.waiting, room.free_sequences, room.free_blocks, 0, 0.0, 0.0)


actions = st.one_of(
    st.tuples(st.just("arrive"), st.integers(1, 200), st.booleans()),
    st.tuples(st.just("step"), st.integers(1, 5), st.booleans()),
    st.tuples(st.just("cancel"), st.integers(0, 5), st.booleans()),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(actions, max_size=60))
def test_promised_blocks_exist_in_the_real_scheduler(script: list[tuple[str, int, bool]]) -> None:
    admission, oracle = opened(queue_max=3, sequences_max=6, context_length=600), Oracle()

    async def play() -> None:
        for what, number, leased in script:
            if what == "arrive":
                sequence = make_sequence(prompt=number, leased=leased)
                if admission.offer(sequence) is Offer.START:
                    oracle.submit(sequence)
            elif what == "step":
                for _ in range(number):
                    admission.settle(oracle.step(admission.active))
                    for sequence in admission.admit():
                        oracle.submit(sequence)
            elif admission.active:
                key = list(admission.active)[number % len(admission.active)]
                admission.leave(key)
                oracle.scheduler.cancel(key)
            room = oracle.scheduler.room()
            assert admission.free_blocks() <= room.free_blocks
            assert admission.free_sequences() <= room.free_sequences
            assert len(admission.active) <= 6
            assert admission.queued <= 3

    asyncio.run(play())


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_blocks_needed_leave_one_to_grow_into(tokens: int, block_tokens: int) -> None:
    blocks = blocks_needed(tokens, block_tokens)
    assert (blocks - 1) * block_tokens >= tokens > (blocks - 2) * block_tokens
