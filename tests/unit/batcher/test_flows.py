"""Whose turn it is inside a band: virtual counters, weights, leads, and what reports charge."""

import pytest

from services.batcher.core.entry import Entry
from services.batcher.core.fleet import Charge, Fleet
from services.batcher.core.flows import (
    OUTPUT_COST,
    OUTPUT_TOKENS_UNKNOWN,
    OUTPUT_WEIGHT,
    PROMPT_COST,
    Flow,
)
from services.batcher.core.messages import Usage
from services.batcher.core.queue import ModelQueue
from tests.unit.batcher.words import MODEL, OTHER, Desk, model_report, report, request, served, stored

COST = 100


class Line:
    """One band of one model's queue."""

    def __init__(self, flows_max=64, **weights):
        self.queue = ModelQueue(MODEL, weights, flows_max)
        self.tickets = 0

    def wait(self, tenant, prompt=COST, count=1):
        for _ in range(count):
            self.tickets += 1
            req = request(f"r{self.tickets}", tenant=tenant, prompt=prompt, max_new_tokens=0)
            self.queue.push(Entry(self.tickets, req, 0.0))

    def place(self, count=1):
        """The tenants whose turn it was; nobody ends."""
        return [self.start().request.tenant for _ in range(count)]

    def start(self):
        entry = self.queue.head()
        self.queue.remove(entry)
        cost = entry.flow.expected_cost(entry.uncached_tokens, entry.request.max_new_tokens)
        self.queue.placed(entry, cost)
        return entry

    def flow(self, tenant):
        return self.queue.flow(2, tenant)


def test_the_tenant_with_the_least_counter_is_next():
    line = Line()
    for tenant in ("a", "b", "c"):
        line.wait(tenant)
    line.queue.charge(2, "a", 500, 0)
    line.queue.charge(2, "c", 100, 0)
    assert line.place(3) == ["b", "c", "a"]


def test_tenants_of_equal_counters_take_turns_and_who_came_first_begins():
    line = Line()
    for tenant in ("a", "b"):
        line.wait(tenant, count=3)
    assert line.place(6) == ["a", "b"] * 3


def test_who_comes_back_goes_before_a_flood_of_the_same_counter_in_the_order_of_coming_back():
    line = Line()
    line.wait("flood", count=10)
    line.place(3)
    for tenant in ("a", "b", "c"):
        line.wait(tenant)
    assert {line.flow(tenant).virtual for tenant in ("flood", "a", "b", "c")} == {3 * COST}
    assert line.place(4) == ["a", "b", "c", "flood"]


def test_who_was_chosen_goes_behind_those_of_equal_counters_even_when_it_cost_nothing():
    line = Line()
    for tenant in ("a", "b"):
        line.wait(tenant, prompt=0, count=2)
    assert line.place(4) == ["a", "b"] * 2


def test_ten_times_the_requests_do_not_bring_ten_times_the_turns():
    line = Line()
    line.wait("greedy", count=100)
    line.wait("modest", count=10)
    assert line.place(20).count("modest") == 10


def test_a_large_prompt_costs_its_tenant_as_many_turns_as_small_ones_would():
    line = Line()
    line.wait("large", prompt=10 * COST, count=10)
    line.wait("small", prompt=COST, count=100)
    placed = line.place(55)
    assert (placed.count("large"), placed.count("small")) == (5, 50)


def test_weights_are_shares():
    line = Line(a=1.0, b=2.0, c=4.0)
    for tenant in ("a", "b", "c"):
        line.wait(tenant, count=100)
    placed = line.place(70)
    assert [placed.count(tenant) for tenant in ("a", "b", "c")] == [10, 20, 40]


def test_tokens_cost_what_the_paper_says():
    flow = Flow("a", 2.0, 10.0, 1)
    flow.serve(30, 7)
    assert flow.virtual == 10.0 + (30 * PROMPT_COST + 7 * OUTPUT_COST) / 2.0


def test_an_idle_tenant_earns_no_credit():
    line = Line()
    line.wait("busy", count=50)
    line.place(30)
    line.wait("idle until now", count=20)
    placed = line.place(20)
    assert placed.count("idle until now") == 10


def test_a_tenant_that_returns_after_everybody_left_earns_no_credit_either():
    line = Line()
    line.wait("busy", count=50)
    line.place(50)
    line.wait("idle until now", count=20)
    line.wait("busy", count=20)
    assert 10 <= line.place(20).count("idle until now") <= 11


def test_a_tenant_that_runs_but_does_not_wait_earns_no_credit():
    line = Line()
    line.wait("one long request")
    line.place()
    line.wait("busy", count=50)
    line.place(30)
    line.wait("one long request", count=20)
    assert line.place(20).count("one long request") == 10


def test_who_was_served_ahead_does_not_begin_anew_by_leaving():
    line = Line()
    line.wait("a", count=10)
    line.wait("b", count=10)
    line.queue.charge(2, "a", 5 * COST, 0)
    for ticket in range(1, 11):
        line.queue.remove(line.queue.by_ticket[ticket])
    line.wait("a", count=10)
    assert line.place(5) == ["b"] * 5


def test_what_is_placed_is_charged_ahead_so_that_a_burst_is_shared_before_any_report():
    line = Line()
    line.wait("first", count=8)
    line.wait("second", count=8)
    assert line.place(8).count("second") == 4


def test_the_lead_is_given_back_at_the_end_and_what_was_served_is_not_charged_twice():
    line = Line()
    line.wait("a", prompt=100)
    entry = line.start()
    flow = line.flow("a")
    assert flow.virtual == 100
    line.queue.charge(2, "a", 60, 0)
    assert flow.virtual == 160
    line.queue.ended(entry)
    assert flow.virtual == 160
    line.queue.charge(2, "a", 40, 0)
    assert flow.virtual == 160, "the last 40 were part of what was expected"
    line.queue.charge(2, "a", 70, 0)
    assert flow.virtual == 170


def test_a_counter_never_falls_when_a_request_cost_less_than_expected():
    flow = Flow("a", 1.0, 0.0, 1)
    flow.lead(500.0)
    flow.lead(-500.0)
    assert flow.virtual == 500.0
    flow.serve(499, 0)
    assert flow.virtual == 500.0


def test_the_expected_output_is_the_tenants_mean_and_at_most_what_the_caller_allows():
    flow = Flow("a", 1.0, 0.0, 1)
    assert flow.expected_cost(10, 1000) == 10 * PROMPT_COST + OUTPUT_TOKENS_UNKNOWN * OUTPUT_COST
    assert flow.expected_cost(10, 5) == 10 * PROMPT_COST + 5 * OUTPUT_COST
    flow.note_output(400)
    assert flow.expected_cost(0, 1000) == 400 * OUTPUT_COST
    flow.note_output(300)
    assert flow.expected_cost(0, 1000) == pytest.approx((400 - 100 * OUTPUT_WEIGHT) * OUTPUT_COST)


def test_only_the_uncached_part_of_a_prompt_is_charged_ahead():
    desk = Desk()
    desk.report("w1", report(model_report(1), news=[stored(1, 2, whole=True)]))
    desk.arrive(name="runs", prompt=1100, prefix=(1, 2), max_new_tokens=0, tenant="a")
    desk.arrive(name="waits", prompt=16, tenant="a")
    assert virtual(desk) == {"a": 1100 - 1024}


def test_idle_tenants_beyond_the_bound_are_forgotten_and_those_with_work_are_not():
    line = Line(flows_max=4)
    line.wait("waits", count=2)
    for number in range(20):
        line.wait(f"t{number}")
        while (entry := line.start()).request.tenant != f"t{number}":
            line.wait("waits")
        line.queue.ended(entry)
        assert len(line.queue.bands[1].flows) <= 4
    assert "waits" in line.queue.bands[1].flows


# What workers report.


def virtual(desk, band=2):
    """By tenant, the counters of those who wait."""
    (queue,) = desk.scheduler.snapshot(desk.now, 0).queues
    return {flow.tenant: flow.virtual_tokens for flow in queue.flows if flow.band == band}


def full(*lines, boot="b", model=MODEL):
    return report(model_report(0, model=model), boot=boot, news=[served(*lines, model=model)])


def begun(**first):
    """A desk where tenants a and b wait and the worker told its counts once."""
    desk = Desk(**first)
    desk.report("w1", full(("a", 2, 1000, 0)))
    desk.arrive(tenant="a")
    desk.arrive(tenant="b")
    return desk


def test_the_first_report_of_a_boot_charges_nobody():
    assert virtual(begun()) == {"a": 0.0, "b": 0.0}


def test_reports_charge_what_is_new_since_the_one_before():
    desk = begun()
    desk.report("w1", full(("a", 2, 1010, 5), ("b", 2, 3, 0)))
    assert virtual(desk) == {"a": 10 + 5 * OUTPUT_COST, "b": 3.0}
    desk.report("w1", full(("a", 2, 1010, 5), ("b", 2, 4, 0)))
    assert virtual(desk) == {"a": 10 + 5 * OUTPUT_COST, "b": 4.0}


def test_unspecified_priority_is_the_standard_band_and_an_unknown_one_is_left_out():
    desk = begun()
    desk.report("w1", full(("a", 0, 7, 0), ("b", 5, 9, 0)))
    assert virtual(desk) == {"a": 7.0, "b": 0.0}


def test_a_reconnected_worker_is_charged_for_only_once():
    desk = begun()
    desk.report("w1", full(("a", 2, 1010, 0)))
    desk.lose("w1")
    desk.report("w1", full(("a", 2, 1010, 0), ("b", 2, 0, 0)))
    assert virtual(desk) == {"a": 10.0, "b": 0.0}
    desk.report("w1", full(("a", 2, 1012, 0)))
    assert virtual(desk) == {"a": 12.0, "b": 0.0}


def test_a_new_process_begins_a_new_account():
    desk = begun()
    desk.report("w1", full(("a", 2, 500, 0), boot="b2"))
    assert virtual(desk) == {"a": 0.0, "b": 0.0}
    desk.report("w1", full(("a", 2, 530, 0), boot="b2"))
    assert virtual(desk) == {"a": 30.0, "b": 0.0}


def test_a_report_that_says_less_than_the_one_before_adds_nothing():
    desk = begun()
    desk.report("w1", full(("a", 2, 1100, 0)))
    desk.report("w1", full(("a", 2, 900, 0)))
    assert virtual(desk) == {"a": 100.0, "b": 0.0}


def test_tokens_of_several_workers_and_models_are_counted_apart():
    desk = begun()
    desk.report("w2", full(("a", 2, 5000, 0)))
    desk.report("w2", full(("a", 2, 5001, 0)))
    desk.report("w3", full(("a", 2, 1, 0), model=OTHER))
    desk.report("w3", full(("a", 2, 900, 0), model=OTHER))
    assert virtual(desk) == {"a": 1.0, "b": 0.0}


def test_work_that_another_replica_sent_counts_as_well():
    desk = begun()
    desk.report("w1", full(("b", 2, 200, 0)))
    desk.report("w1", report(model_report(1), boot="b"))
    assert [dispatch.request.tenant for dispatch in desk.dispatches()] == ["a"]


def test_what_a_request_cost_is_charged_when_it_ends():
    desk = runs_and_waits(report(model_report(0), boot="b"))
    desk.end(1, Usage(prompt_tokens=100, cached_prompt_tokens=40, completion_tokens=7))
    assert virtual(desk)["a"] == 100 - 40 + 7 * OUTPUT_COST


def test_a_report_does_not_charge_again_what_was_charged_at_an_end():
    desk = runs_and_waits(full(("a", 0, 1000, 0)))
    desk.report("w1", full(("a", 0, 1060, 0)))
    desk.end(1, Usage(prompt_tokens=100, cached_prompt_tokens=40, completion_tokens=7))
    charged = virtual(desk)["a"]
    desk.report("w1", full(("a", 0, 1060, 7)))
    assert virtual(desk)["a"] == charged
    desk.report("w1", full(("a", 0, 1120, 7)))
    assert virtual(desk)["a"] == charged, "60 were charged twice for a while"
    desk.report("w1", full(("a", 0, 1125, 7)))
    assert virtual(desk)["a"] == charged + 5


def runs_and_waits(first):
    """Ticket 1 of tenant a runs and its tenant waits."""
    desk = Desk()
    desk.report("w1", first)
    desk.arrive(tenant="a")
    desk.report("w1", report(model_report(1), boot="b"))
    desk.report("w1", report(model_report(0), boot="b", active=["r"]))
    desk.arrive(tenant="a")
    return desk


def test_the_accounts_of_one_worker_are_bounded(monkeypatch):
    monkeypatch.setattr("services.batcher.core.fleet.ACCOUNTS_MAX", 2)
    fleet = Fleet()
    fleet.found("w1")
    worker = fleet.workers["w1"]
    fleet.reported(worker, report(model_report(1)), 0.0)
    for number in range(10):
        fleet.news(worker, [served((f"t{number}", 2, 10, 0))])
        assert len(worker.accounts) <= 3
    # The account began anew: what was told before is not charged again.
    monkeypatch.setattr("services.batcher.core.fleet.ACCOUNTS_MAX", 0)
    assert fleet.news(worker, [served(("t9", 2, 11, 0))]) == []
    monkeypatch.undo()
    assert fleet.news(worker, [served(("t9", 2, 12, 0))]) == [Charge(MODEL, 2, "t9", 1, 0)]
