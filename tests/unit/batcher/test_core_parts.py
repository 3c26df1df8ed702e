"""The small parts of the core: lifecycle table, timers, tenants, the pool's order."""

import math

import pytest

from services.batcher.core.fleet import Fleet
from services.batcher.core.lifecycle import TRANSITIONS, Happening, IllegalTransition, State, after
from services.batcher.core.messages import Usage
from services.batcher.core.pool import NOWHERE
from services.batcher.core.tenants import Tenants
from services.batcher.core.timers import SWEEP_MIN, Timers
from tests.unit.batcher.words import MODEL, model_report, report, request


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("happening", Happening)
def test_what_the_table_does_not_hold_raises(state, happening):
    if happening in TRANSITIONS[state]:
        assert after(state, happening) is TRANSITIONS[state][happening]
    else:
        with pytest.raises(IllegalTransition, match=state.value):
            after(state, happening)


def test_every_state_reaches_the_end_and_nothing_leaves_it():
    for state in State:
        seen, frontier = set(), {state}
        while frontier:
            seen |= frontier
            frontier = {n for s in frontier for n in TRANSITIONS[s].values()} - seen
        assert State.ENDED in seen
    assert TRANSITIONS[State.ENDED] == {}


def test_timers_come_due_in_order_and_forget_what_does_not_matter():
    alive = {"a", "b"}
    timers = Timers(lambda name: name in alive)
    for when, name in ((3.0, "a"), (1.0, "b"), (2.0, "gone")):
        timers.at(when, name)
    assert timers.next() == 1.0
    assert list(timers.due(2.5)) == ["b"]
    assert list(timers.due(3.0)) == ["a"]
    assert timers.next() is None


def test_timers_of_things_long_gone_do_not_pile_up():
    timers = Timers(lambda _: False)
    for number in range(20 * SWEEP_MIN):
        timers.at(float(number), number)
        assert len(timers) <= SWEEP_MIN + 1


def test_idle_tenants_beyond_the_bound_are_forgotten_and_busy_ones_are_not():
    tenants = Tenants(2, {})
    tenants.queued("busy")
    for name in ("a", "b", "c"):
        tenants.queued(name)
        tenants.placed(name)
        tenants.ended(name, Usage(1, 0, 1))
    assert [tenant.name for tenant in tenants] == ["busy", "c"]


def test_a_tenant_that_comes_back_keeps_its_counters():
    tenants = Tenants(8, {"a": 3.0})
    for _ in range(2):
        tenants.queued("a")
        tenants.placed("a")
        tenants.ended("a", Usage(10, 4, 5))
    (tenant,) = tenants
    assert (tenant.prompt_tokens, tenant.cached_tokens, tenant.generated_tokens) == (12, 8, 10)
    assert tenant.weight == 3.0


def test_a_measured_speed_that_is_no_number_does_not_break_the_order():
    fleet = Fleet()
    for endpoint in ("w1", "w2"):
        fleet.found(endpoint)
        worker = fleet.workers[endpoint]
        fleet.reported(worker, report(model_report(4, prefill_tokens_per_s=math.nan)), 0.0)
        fleet.reported(worker, report(model_report(5, prefill_tokens_per_s=math.nan)), 0.0)
    pool = fleet.pools[MODEL]
    for late in (False, True):
        assert pool.choose(request(), patience_s=1.0, late=late).load is not None
    for worker in fleet.workers.values():
        fleet.lost(worker, 1.0)
    assert pool.choose(request(), patience_s=1.0, late=False) == NOWHERE


def test_the_largest_prompt_follows_workers_that_leave():
    fleet = Fleet()
    for endpoint, blocks in (("small", 11), ("large", 101)):
        fleet.found(endpoint)
        fleet.reported(fleet.workers[endpoint], report(model_report(1, total_blocks=blocks)), 0.0)
    pool = fleet.pools[MODEL]
    assert pool.largest_tokens == 1600
    fleet.lost(fleet.workers["large"], 1.0)
    assert pool.largest_tokens == 160
