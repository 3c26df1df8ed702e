"""The decode steps of a full batch at one context, picked out of a level's steps."""

import pytest

from services.worker.bench.account import CONTEXT_SLACK_TOKENS, Account, Around
from services.worker.bench.drive import Driver
from tests.unit.bench.test_drive import Clock, FakeEngine
from tokenloom.bench import prompts, workload
from tokenloom.bench.workload import Lengths


def driven(count, concurrency, lengths, context):
    clock = Clock()
    engine = FakeEngine(clock)
    driver = Driver(engine, lambda item, seed: prompts.token_ids(item, seed, 1000), clock)
    items = workload.fixed("request", count, lengths)
    return driver.run(items, concurrency, 1, decode_context=context)[2]


def test_only_full_batches_near_the_context_are_taken():
    # Three prompts, then 100 steps of three sequences; the first step attends to 11 tokens each.
    steps = driven(3, 3, Lengths(10, 101), 60)
    only = steps.decode_only
    assert (only.batch, only.context) == (3, 60)
    assert only.steps == 2 * CONTEXT_SLACK_TOKENS + 1
    assert only.context_mean == 60
    assert only.step_ms.p50 == 1000
    assert only.tokens_per_s == 3
    assert only.parts_ms == {"compute": 5}
    assert steps.decode_context_mean == pytest.approx(60.5)
    assert steps.decode_sequences_mean == 3


def test_a_context_that_no_step_reached_is_said_to_have_none():
    only = driven(2, 2, Lengths(10, 4), 500).decode_only
    assert (only.steps, only.step_ms, only.tokens_per_s, only.parts_ms) == (0, None, 0, {})


def test_a_batch_that_is_not_full_does_not_count():
    # Two at once of three: the third decodes alone.
    only = driven(3, 2, Lengths(10, 5), 12).decode_only
    alone = driven(1, 2, Lengths(10, 5), 12).decode_only
    assert only.steps == 4
    assert alone.batch == 1  # no more than there are requests
    assert alone.steps == 4


def test_the_context_of_sequences_that_have_ended_is_forgotten():
    steps = driven(6, 1, Lengths(10, 5), 12)
    assert steps.decode_context_mean == pytest.approx(12.5)
    assert steps.decode_only.steps == 6 * 4


def test_a_step_at_the_edge_of_the_range_is_inside_it():
    around = Around(100, 2)
    for distance in (-33, -32, 32, 33):
        around.note(1.0, 2, 2 * (100 + distance), {}, {})
    assert len(around.step_ms) == 2


def test_prompts_of_a_step_keep_it_out():
    account = Account(Around(10, 2))
    account.note(1.0, 3, 2, 20, {}, {})
    account.note(1.0, 2, 2, 20, {"a": 1}, {"a": 4, "b": 2})
    assert account.steps().decode_only.steps == 1
    assert account.around.parts_ns == {"a": 3, "b": 2}
