"""Metrics: what is counted under which labels, and that no caller can add one."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from services.batcher import metrics as module
from services.batcher.core.messages import PREFIX_TOKENS, Dispatch, Reject, Usage
from services.batcher.core.queue import PACE_GAPS_MIN
from services.batcher.core.refusals import BANDS
from services.batcher.metrics import SECONDS, BatcherMetrics
from tests.unit.batcher.words import Desk, model_report, report, request
from tokenloom.kit.clock import FakeClock
from tokenloom.kit.errors import REASONS


class Meters:
    """Metrics in a registry of their own, and of a desk if there is one."""

    def __init__(self, desk=None, tenants=()):
        self.registry = CollectorRegistry()
        self.metrics = BatcherMetrics(self.registry, tenants)
        if desk is not None:
            self.metrics.watch(desk.scheduler, _Now(desk))

    def read(self, name, **labels):
        return self.registry.get_sample_value(f"tokenloom_batcher_{name}", labels)

    def requests(self, outcome, band, reason=""):
        return self.read("requests_total", outcome=outcome, reason=reason, band=band)

    def labels(self, name):
        """Every value of each label of a metric."""
        found = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if sample.name == f"tokenloom_batcher_{name}":
                    for key, value in sample.labels.items():
                        found.setdefault(key, set()).add(value)
        return found


class _Now(FakeClock):
    def __init__(self, desk):
        super().__init__()
        self._desk = desk

    def monotonic(self):
        return self._desk.now


def dispatched(waited_s=0.0, **fields):
    return Dispatch(1, request(**fields), "w1", "lease", waited_s)


def refused(reason, waited_s=0.0, **fields):
    return Reject(1, request(**fields), reason, "why", {}, None, waited_s)


def test_every_request_is_counted_by_outcome_reason_and_the_band_that_it_asked_for():
    meters = Meters()
    meters.metrics.decided(dispatched(priority=1))
    meters.metrics.decided(dispatched(priority=0))
    meters.metrics.decided(refused("QUEUE_FULL", priority=3))
    meters.metrics.decided(refused("SHED", waited_s=0.2, priority=4))
    meters.metrics.cancelled(request(priority=2))
    assert meters.requests("dispatched", "interactive") == meters.requests("dispatched", "standard") == 1
    assert meters.requests("refused", "batch", "QUEUE_FULL") == 1
    assert meters.requests("evicted", "sheddable", "SHED") == 1
    assert meters.requests("cancelled", "standard") == 1
    assert sum(meters.requests("dispatched", band) for band in BANDS) == 2


def test_labels_are_closed_sets_whatever_callers_name():
    desk = Desk(queue_depth_max=2, tenant_share=0.5)
    meters = Meters(desk, tenants=["acme"])
    desk.report(free=0)
    for number in range(6):
        desk.arrive(name=f"r{number}", tenant=f"tenant-{number % 3}", priority=number % 5, deadline=130.0)
    desk.wait(200)
    for decision in (*desk.dispatches(), *desk.rejects()):
        meters.metrics.decided(decision)
        meters.metrics.ended(decision.request, Usage(1, 0, 1))
    labels = meters.labels("requests_total")
    assert labels["band"] == set(BANDS)
    assert labels["outcome"] == {"dispatched", "cancelled", "refused", "evicted"}
    assert {"", "TENANT_OVER_SHARE", "NO_CAPACITY"} <= labels["reason"] <= {"", *REASONS}
    assert meters.labels("served_tokens_total")["tenant"] == {"acme", "other"}
    assert meters.labels("tenant_requests")["tenant"] == {"acme", "other"}


def test_waits_fall_into_the_bucket_of_their_band():
    meters = Meters()
    waits = (0.0, 0.0005, 0.0006, 1.0, 599.0, 601.0)
    for waited_s in waits:
        meters.metrics.decided(dispatched(waited_s, priority=3))
    read = {
        bound: meters.read("queue_duration_seconds_bucket", band="batch", le=str(float(bound)))
        for bound in SECONDS
    }
    assert read == {bound: sum(wait <= bound for wait in waits) for bound in SECONDS}
    assert meters.read("queue_duration_seconds_bucket", band="batch", le="+Inf") == len(waits)
    assert meters.read("queue_duration_seconds_count", band="batch") == len(waits)
    assert meters.read("queue_duration_seconds_sum", band="batch") == pytest.approx(sum(waits))
    assert meters.read("queue_duration_seconds_count", band="interactive") == 0


def test_served_tokens_are_kept_for_named_tenants_and_together_for_the_others():
    meters = Meters(tenants=["acme"])
    for tenant in ("acme", "x", "y"):
        meters.metrics.ended(request(tenant=tenant), Usage(100, 60, 7))
    meters.metrics.ended(request(tenant="acme"), None)
    for kind, tokens in (("prompt", 40), ("cached_prompt", 60), ("completion", 7)):
        assert meters.read("served_tokens_total", tenant="acme", kind=kind) == tokens
        assert meters.read("served_tokens_total", tenant="other", kind=kind) == 2 * tokens
    assert meters.read("leases_ended_total") == 4


def test_tenants_beyond_the_bound_are_counted_with_the_others(monkeypatch):
    monkeypatch.setattr(module, "TENANTS_MAX", 1)
    meters = Meters(tenants=["first", "second"])
    meters.metrics.ended(request(tenant="second"), Usage(1, 0, 0))
    assert meters.labels("served_tokens_total")["tenant"] == {"first", "other"}
    assert meters.read("served_tokens_total", tenant="other", kind="prompt") == 1


def test_queue_gauges_are_by_band_over_all_models():
    desk = Desk()
    meters = Meters(desk)
    desk.report(free=0)
    desk.arrive(priority=1, prompt=10)
    desk.now += 2
    desk.arrive(priority=1, prompt=5)
    desk.arrive(priority=3, prompt=7, model="sha256:" + "c" * 64)
    desk.now += 1
    shown = {
        band: tuple(
            meters.read(f"queue_{name}", band=band)
            for name in ("size", "prompt_tokens", "oldest_wait_seconds", "estimated_wait_seconds")
        )
        for band in BANDS
    }
    assert shown == {
        "interactive": (2, 15, 3, 0),
        "standard": (0, 0, 0, 0),
        "batch": (1, 7, 1, 0),
        "sheddable": (0, 0, 0, 0),
    }


def test_the_estimated_wait_of_a_band_counts_those_above_it():
    desk = Desk()
    meters = Meters(desk)
    desk.report(free=0)
    for number in range(4 * PACE_GAPS_MIN):
        desk.arrive(name=f"r{number}", priority=2 if number % 2 else 4)
    for _ in range(PACE_GAPS_MIN + 1):
        desk.now += 0.5
        desk.report(load=report(model_report(free=1), active=[name for name, _ in desk.placed()]))
    waiting = [meters.read("queue_size", band=band) for band in BANDS]
    assert waiting == [0, PACE_GAPS_MIN - 1, 0, 2 * PACE_GAPS_MIN]
    waits = [meters.read("queue_estimated_wait_seconds", band=band) for band in BANDS]
    assert waits == pytest.approx([0, *(0.5 * sum(waiting[:ahead]) for ahead in (2, 3, 4))])


def test_saturation_is_the_share_of_what_serves_that_cannot_take_more():
    desk = Desk()
    meters = Meters(desk)
    assert meters.read("pool_saturation") == 1
    for endpoint, free in (("w1", 1), ("w2", 1), ("w3", 0), ("w4", 0)):
        desk.report(endpoint, free=free)
    assert (meters.read("pool_ready"), meters.read("pool_open"), meters.read("pool_saturation")) == (
        4,
        2,
        0.5,
    )
    desk.arrive()
    assert meters.read("pool_saturation") == 0.75
    assert meters.read("workers", state="alive") == 4
    desk.lose("w4")
    assert (meters.read("workers", state="lost"), meters.read("pool_ready")) == (1, 3)


def test_tenants_show_who_waits_and_who_runs():
    desk = Desk()
    meters = Meters(desk, tenants=["acme"])
    desk.report(free=1)
    for tenant in ("acme", "acme", "x", "y"):
        desk.arrive(tenant=tenant)
    shown = {
        (tenant, state): meters.read("tenant_requests", tenant=tenant, state=state)
        for tenant in ("acme", "other")
        for state in ("queued", "running")
    }
    expected = {
        ("acme", "queued"): 1,
        ("acme", "running"): 1,
        ("other", "queued"): 2,
        ("other", "running"): 0,
    }
    assert shown == expected


def test_promotions_and_expected_cache_hits_are_shown():
    desk = Desk(age_promote_s=5.0)
    meters = Meters(desk)
    desk.report(free=2)
    for name in "ab":
        desk.arrive(request(name, prompt=PREFIX_TOKENS + 1)._replace(prefix=(9,)))
    desk.arrive(priority=4)
    desk.wait(5.0)
    assert meters.read("promoted_total") == 1
    assert meters.read("dispatched_prompt_tokens_total") == 2 * (PREFIX_TOKENS + 1)
    assert meters.read("dispatched_matched_tokens_total") == PREFIX_TOKENS


def test_a_closed_batcher_leaves_nothing_in_the_registry():
    meters = Meters(Desk())
    assert b"tokenloom_batcher_queue_size" in generate_latest(meters.registry)
    meters.metrics.close()
    assert list(meters.registry.collect()) == []


def test_every_metric_is_explained_in_the_reference():
    meters = Meters(Desk())
    page = (Path(__file__).parents[3] / "docs/reference/batcher-metrics.md").read_text()
    named = set(re.findall(r"`([a-z_]+)`", page))
    shown = set()
    for family in meters.registry.collect():
        suffix = "_total" if family.type == "counter" else ""
        shown.add(family.name.removeprefix("tokenloom_batcher_") + suffix)
    assert shown - named == set()
    assert {name for name in named if name.endswith("_total")} <= shown
