"""What people and tools are shown: the snapshot of the core, and the same in the words of the contract."""

import pytest
from loom.batcher.v1 import batcher_pb2 as pb
from loom.inference.v1 import inference_pb2

from services.batcher.adapters import views
from services.batcher.core import snapshot
from services.batcher.core.messages import (
    PREFIX_TOKENS,
    Dispatch,
    ModelNews,
    ModelState,
    PrefixChanges,
    Reject,
    Usage,
)
from services.batcher.core.queue import PACE_GAPS_MIN
from services.batcher.core.snapshot import Place
from tests.unit.batcher.words import MODEL, OTHER, Desk, model_report, report, request


def shown(desk):
    return views.state(desk.scheduler.snapshot(desk.now, 10), unix_ms=77)


def test_a_queue_is_shown_by_band_with_its_depths_and_oldest_waits():
    desk = Desk()
    desk.report(free=0)
    for priority in (0, 1):
        desk.arrive(priority=priority, prompt=10)
    desk.now += 1
    for priority in (2, 4):
        desk.arrive(priority=priority, prompt=10)
    desk.now += 0.5
    state = shown(desk)
    (queue,) = state.queues
    assert state.unix_ms == 77
    assert (queue.model_version, queue.depth, queue.prompt_tokens) == (MODEL, 4, 40)
    assert queue.oldest_wait_ms == 1500
    assert dict(queue.depth_by_priority) == {"standard": 2, "interactive": 1, "sheddable": 1}
    waits = {"standard": 1500, "interactive": 1500, "sheddable": 500}
    assert dict(queue.oldest_wait_ms_by_priority) == waits


def test_a_queue_in_which_requests_only_run_is_shown_until_the_last_one_ends():
    desk = Desk()
    desk.report(free=1)
    ticket = desk.arrive()
    (queue,) = shown(desk).queues
    assert (queue.depth, queue.running) == (0, 1)
    desk.end(ticket)
    assert not shown(desk).queues


def test_the_deepest_flows_come_first_and_no_more_than_so_many(monkeypatch):
    monkeypatch.setattr(snapshot, "FLOWS_MAX", 2)
    desk = Desk(tenant_weights={"deep": 4.0})
    desk.report(free=0)
    for tenant, priority, count in (("one", 1, 1), ("deep", 3, 3), ("two", 2, 2)):
        for _ in range(count):
            desk.arrive(tenant=tenant, priority=priority)
    (queue,) = shown(desk).queues
    assert [(flow.tenant, flow.depth, flow.weight) for flow in queue.flows] == [("deep", 3, 4), ("two", 2, 1)]
    bands = [inference_pb2.PRIORITY_BATCH, inference_pb2.PRIORITY_STANDARD]
    assert [flow.priority for flow in queue.flows] == bands


def test_a_flow_shows_the_account_that_its_turn_is_taken_from():
    desk = Desk()
    desk.report(free=1)
    desk.arrive(tenant="acme")
    desk.arrive(tenant="acme")
    (queue,) = shown(desk).queues
    (flow,) = queue.flows
    # One prompt of 16 tokens and at most 8 of output, which cost twice as much, charged ahead.
    assert flow.virtual_tokens == 16 + 2 * 8


def test_the_dispatch_rate_is_shown_once_the_pace_is_known():
    desk = Desk()
    desk.report(free=0)
    for number in range(PACE_GAPS_MIN + 3):
        desk.arrive(name=f"r{number}")
    assert shown(desk).queues[0].dispatch_rate == 0
    for _ in range(PACE_GAPS_MIN + 1):
        desk.now += 0.25
        desk.report(free=1, load=report(model_report(free=1), active=[r for r, _ in desk.placed()]))
    assert shown(desk).queues[0].dispatch_rate == pytest.approx(4)


def test_a_worker_shows_its_speeds_its_backlog_and_what_its_cache_holds():
    desk = Desk()
    load = report(
        model_report(
            free=4,
            queued_prefill_tokens=1000,
            prefill_tokens_per_s=500.0,
            decode_tokens_per_s=80.0,
            prefix_queried_tokens=300,
            prefix_hit_tokens=120,
        )
    )
    load = load._replace(news=(ModelNews(MODEL, PrefixChanges(True, (1, 2, 3))),))
    desk.report(load=load)
    desk.arrive(prompt=100)
    (worker,) = shown(desk).workers
    (model,) = worker.models
    assert (worker.alive, worker.leases, model.state) == (True, 1, "ready")
    # What was sent since the report counts, too.
    assert (model.queued_prefill_tokens, model.free_sequences) == (1100, 3)
    assert (model.prefill_tokens_per_s, model.decode_tokens_per_s) == (500, 80)
    assert (model.known_prefixes, model.prefix_queried_tokens, model.prefix_hit_tokens) == (3, 300, 120)
    assert 2.2 < model.delay_s < 3


def test_a_model_that_is_not_served_has_no_delay():
    desk = Desk()
    desk.report(load=report(model_report(state=ModelState.LOADING, free=0)))
    (worker,) = shown(desk).workers
    assert (worker.models[0].state, worker.models[0].delay_s) == ("loading", 0)


def test_tenants_show_weight_and_cached_tokens_apart_from_computed_ones():
    desk = Desk(tenant_weights={"acme": 2.5})
    desk.report(free=1)
    ticket = desk.arrive(tenant="acme")
    desk.end(ticket, Usage(prompt_tokens=100, cached_prompt_tokens=60, completion_tokens=7))
    (tenant,) = shown(desk).tenants
    expected = pb.Tenant(
        name="acme", weight=2.5, served_prompt_tokens=40, served_cached_tokens=60, served_generated_tokens=7
    )
    assert tenant == expected


def test_tenants_with_work_are_listed_when_not_all_can_be(monkeypatch):
    monkeypatch.setattr(snapshot, "TENANTS_MAX", 1)
    desk = Desk()
    desk.report(free=2)
    idle = desk.arrive(tenant="idle")
    desk.arrive(tenant="busy")
    desk.end(idle)
    assert [tenant.name for tenant in shown(desk).tenants] == ["busy"]


def test_counters_show_refusals_by_reason_and_promotions():
    desk = Desk(queue_depth_max=2, age_promote_s=5.0)
    desk.report(free=0)
    for priority in (3, 4, 4, 1):
        desk.arrive(priority=priority)
    desk.wait(5.0)
    counters = shown(desk).counters
    assert dict(counters.refused) == {"QUEUE_FULL": 1, "SHED": 1}
    assert (counters.arrived, counters.promoted) == (4, 1)


def test_the_core_counts_the_prompt_tokens_that_it_expected_to_be_cached():
    desk = Desk()
    desk.report(free=8)
    prefix = (1, 2)
    first = request("a", prompt=2 * PREFIX_TOKENS + 10)._replace(prefix=prefix)
    desk.arrive(first)
    desk.arrive(first._replace(request_id="b"))
    # A caller may name more than its prompt holds.
    desk.arrive(request("c", prompt=5, model=MODEL)._replace(prefix=prefix))
    desk.report(endpoint="other", load=report(model_report(free=1, model=OTHER)))
    gauges = desk.scheduler.gauges(desk.now)
    assert gauges.placed_tokens == 2 * (2 * PREFIX_TOKENS + 10) + 5
    assert gauges.matched_tokens == 2 * PREFIX_TOKENS + 5


def test_a_watcher_is_told_place_load_dispatch_and_refusal():
    queued, loading = views.news(Place(1, 4, 0.25, 0, "w1", 0.5))
    assert (queued.queued.position, queued.queued.waited_ms, queued.queued.priority) == (4, 250, 2)
    assert (loading.loading.endpoint, loading.loading.progress) == ("w1", 0.5)
    (placed,) = views.news(Place(1, None, 1.0, 2, "w1"))
    (dispatched,) = views.news(Dispatch(1, request(), "w1", "lease", 1.0))
    assert placed == dispatched
    assert dispatched.dispatched.waited_ms == 1000
    (refused,) = views.news(Reject(1, request(), "SHED", "why", {}, None, 0.0))
    assert (refused.refused.reason, refused.refused.message) == ("SHED", "why")
