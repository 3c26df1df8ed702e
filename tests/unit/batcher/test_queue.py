"""The order of one model's queue: bands, promotion, passing over, late wishes, positions."""

from hypothesis import given
from hypothesis import strategies as st

from services.batcher.core.entry import Entry
from services.batcher.core.queue import ModelQueue
from tests.unit.batcher.words import MODEL, Desk, model_report, report, request

BUSY = {"free": 0}


def entry(ticket, *, entered=0.0, **fields):
    return Entry(ticket, request(f"r{ticket}", **fields), entered)


def filled(*entries):
    queue = ModelQueue(MODEL, {}, 64)
    for each in entries:
        queue.push(each)
    return queue


def order(queue):
    """Tickets in the order in which they would be looked at, if all were passed over."""
    found = []
    while (head := queue.head()) is not None:
        found.append(head.ticket)
        queue.set_aside(head)
    queue.restore()
    return found


def counts(queue):
    bands = [(band.depth, band.prompt_tokens, band.size_bytes) for band in queue.bands]
    flows = {
        (number, name): (len(flow.keys), flow.prompt_tokens, flow.size_bytes, flow.virtual)
        for number, band in enumerate(queue.bands, 1)
        for name, flow in band.flows.items()
    }
    return len(queue), queue.prompt_tokens, queue.size_bytes, bands, flows


def test_an_interactive_request_goes_before_five_hundred_batch_ones():
    desk = Desk()
    desk.report("w1", **BUSY)
    for number in range(500):
        desk.arrive(name=f"batch {number}", priority=3, tenant=f"t{number % 7}")
    desk.arrive(name="interactive", priority=1)
    desk.report("w1", free=1)
    assert desk.placed() == [("interactive", "w1")]


# Earliest deadline.


def test_inside_a_tenant_the_earliest_deadline_goes_first():
    desk = Desk()
    desk.report("w1", **BUSY)
    for name, deadline in (("far", 500), ("near", 200), ("middle", 300)):
        desk.arrive(name=name, deadline=desk.now + deadline, deadline_unix_ms=deadline * 1000)
    desk.report("w1", free=3)
    assert [name for name, _ in desk.placed()] == ["near", "middle", "far"]


def wish(desk, name, slo_ms, **fields):
    """A request with a wish for its first token, far from its deadline."""
    now_ms = int(desk.now * 1000)
    last = {"deadline": desk.now + 1000, "deadline_unix_ms": now_ms + 1_000_000}
    return desk.arrive(name=name, arrival=now_ms, ttft_slo_ms=slo_ms, **last, **fields)


def test_a_wish_for_a_first_token_counts_as_a_deadline():
    desk = Desk(report_stale_s=60.0)
    desk.report("w1", **BUSY)
    for name, slo_ms in (("none", 0), ("slow", 9000), ("quick", 3000)):
        wish(desk, name, slo_ms)
    desk.report("w1", free=3)
    assert [name for name, _ in desk.placed()] == ["quick", "slow", "none"]


def test_those_that_are_late_go_behind_those_that_can_still_be_met():
    desk = Desk(report_stale_s=60.0)
    desk.report("w1", **BUSY)
    wish(desk, "late", 1000)
    wish(desk, "later", 1500)
    desk.wait(2.0)
    wish(desk, "in time", 2000)
    desk.report("w1", free=3)
    assert [name for name, _ in desk.placed()] == ["in time", "late", "later"]


def test_a_late_one_keeps_its_tenants_turn():
    desk = Desk(report_stale_s=60.0)
    desk.report("w1", **BUSY)
    wish(desk, "late", 1000, tenant="a")
    desk.wait(2.0)
    wish(desk, "in time", 2000, tenant="b")
    wish(desk, "next", 2000, tenant="b")
    desk.report("w1", free=2)
    assert {name for name, _ in desk.placed()} == {"late", "in time"}


# Promotion.


def test_a_long_wait_moves_a_request_up_a_band_at_a_time_and_never_into_the_first():
    desk = Desk(age_promote_s=5.0, report_stale_s=1e6)
    desk.report("w1", **BUSY)
    desk.arrive(name="old", priority=4)

    def band():
        (queue,) = desk.scheduler.snapshot(desk.now, 0).queues
        return list(queue.depth_by_priority)

    seen = [band()]
    for _ in range(4):
        desk.wait(5.0)
        seen.append(band())
    assert seen == [[4], [3], [2], [2], [2]]
    assert desk.scheduler.snapshot(desk.now, 0).counters.promoted == 2


def test_a_promoted_request_goes_before_younger_ones_of_its_old_band():
    desk = Desk(age_promote_s=5.0, report_stale_s=1e6)
    desk.report("w1", **BUSY)
    desk.arrive(name="young sheddable", priority=4, tenant="a", deadline=5e8)
    desk.wait(1.0)
    desk.arrive(name="old batch", priority=3, tenant="a", deadline=6e8)
    desk.wait(4.0)
    desk.arrive(name="young batch", priority=3, tenant="a", deadline=4e8)
    desk.wait(1.5)
    desk.arrive(name="standard", priority=2, tenant="a", deadline=3e8)
    desk.report("w1", free=4)
    assert [name for name, _ in desk.placed()] == [
        "standard",
        "old batch",
        "young batch",
        "young sheddable",
    ]


def test_requests_are_still_promoted_after_the_queue_was_empty_for_a_while():
    desk = Desk(age_promote_s=5.0, report_stale_s=1e6)
    desk.report("w1", **BUSY)
    desk.arrive(name="a", priority=4)
    desk.report("w1", free=1)
    desk.report("w1", report(model_report(0), active=["a"]))
    desk.wait(6.0)
    desk.arrive(name="b", priority=4)
    desk.wait(6.0)
    assert desk.scheduler.snapshot(desk.now, 0).counters.promoted == 1


def test_a_promoted_request_that_fits_where_the_head_did_not_is_placed_at_once():
    desk = Desk(age_promote_s=5.0, report_stale_s=1e6)
    desk.report("w1", free=4, blocks=0)
    desk.arrive(name="small", priority=3, tenant="b")
    desk.now += 1.0
    # It stands behind the other tenant, which was served less.
    desk.arrive(name="big", priority=3, tenant="a", prompt=1600)
    queue = desk.scheduler._ledger.queues[MODEL]
    queue.charge(3, "b", 10_000, 0)
    desk.report("w1", free=4, blocks=3)
    assert desk.placed() == []
    desk.wait(4.5)
    assert desk.placed() == [("small", "w1")]


# Passing over.


entries = st.lists(
    st.tuples(
        st.integers(1, 4), st.sampled_from("abc"), st.integers(0, 9), st.integers(1, 50), st.booleans()
    ),
    max_size=12,
)


@given(made=entries, passed=st.integers(0, 12))
def test_those_passed_over_come_back_to_exactly_their_places(made, passed):
    waiting = [
        entry(ticket, priority=band, tenant=tenant, arrival=arrival, prompt=prompt, size_bytes=prompt)
        for ticket, (band, tenant, arrival, prompt, _) in enumerate(made)
    ]
    queue = filled(*waiting)
    for band in range(1, 5):
        for served, tenant in enumerate("cab"):
            queue.charge(band, tenant, 1000 * served, 0)
    for each, (*_, late) in zip(waiting, made, strict=True):
        if late:
            queue.turn_late(each)
    by_turn = sorted(waiting, key=lambda each: (each.band, "cab".index(each.request.tenant), each.key))
    before = counts(queue)
    assert order(queue) == [each.ticket for each in by_turn]
    for _ in range(min(passed, len(waiting))):
        queue.set_aside(queue.head())
    queue.restore()
    assert counts(queue) == before
    assert order(queue) == [each.ticket for each in by_turn]


@given(made=entries)
def test_a_queue_that_everybody_left_counts_nothing(made):
    waiting = [
        entry(ticket, priority=band, tenant=tenant, arrival=arrival, prompt=prompt, size_bytes=prompt)
        for ticket, (band, tenant, arrival, prompt, _) in enumerate(made)
    ]
    queue = filled(*waiting)
    queue.promote(1.0, 5.0)
    for each in waiting:
        queue.remove(each)
        queue.let_go(each)
    size, tokens, held, bands, flows = counts(queue)
    assert (size, tokens, held) == (0, 0, 0)
    assert bands == [(0, 0, 0)] * 4
    assert all(flow[:3] == (0, 0, 0) for flow in flows.values())
    assert queue.head() is None


def test_the_queues_of_models_that_nobody_asks_for_any_more_are_forgotten():
    desk = Desk()
    for number in range(40):
        model = f"sha256:{number:064x}"
        desk.report("w1", report(model_report(1, model=model)))
        desk.end(desk.arrive(model=model, name=f"r{number}"))
    assert desk.scheduler._ledger.queues == {}
    assert len(desk.scheduler._fleet.pools) == 1
