"""Where a request is sent: cost with prefixes, bursts between two reports, steps, waiting for a worker."""

from hypothesis import given, settings
from hypothesis import strategies as st

from services.batcher.core.entry import Entry
from services.batcher.core.fleet import Fleet
from services.batcher.core.messages import PREFIX_TOKENS
from services.batcher.core.pool import CANDIDATES_MAX, NOWHERE
from tests.unit.batcher.words import MODEL, Desk, model_report, report, request, stored

SPEED = 2000.0
TEN = tuple(range(1, 11))


def quick(free=8, *, step=2048, speed=SPEED, **rest):
    return model_report(free, step_tokens_max=step, prefill_tokens_per_s=speed, **rest)


def endpoints(desk):
    return [endpoint for _, endpoint in desk.placed()]


# The cheapest.


workers = st.fixed_dictionaries(
    {
        "free": st.integers(0, 8),
        "blocks": st.sampled_from([1000, 500, 40, 5]),
        "queued": st.sampled_from([0, 0, 300, 600, 3000]),
        "speed": st.sampled_from([500.0, 2000.0, 20_000.0]),
        "running": st.integers(0, 3),
        "names": st.lists(st.integers(1, 4), unique=True),
        "sent": st.lists(st.integers(16, 900), max_size=2),
    }
)


@given(
    made=st.lists(workers, min_size=1, max_size=CANDIDATES_MAX),
    prompt=st.integers(1, 4000),
    prefix=st.sampled_from([(), (1,), (1, 2), (1, 2, 3, 4), (3,)]),
)
@settings(deadline=None)
def test_a_request_goes_where_it_costs_least_of_all_workers_that_can_start_it(made, prompt, prefix):
    fleet = Fleet()
    for number, each in enumerate(made):
        fleet.found(f"w{number}")
        worker = fleet.workers[f"w{number}"]
        load = model_report(
            each["free"], blocks=each["blocks"], queued_prefill_tokens=each["queued"],
            prefill_tokens_per_s=each["speed"], running=each["running"], step_tokens_max=512,
        )  # fmt: skip
        news = [stored(*each["names"], whole=True)]
        fleet.reported(worker, report(load), 0.0)
        fleet.news(worker, news)
        for ticket, tokens in enumerate(each["sent"]):
            entry = Entry(100 * number + ticket, request(f"s{number}-{ticket}", prompt=tokens), 0.0)
            fleet.lease(entry, worker.loads[MODEL], 0, 0.0)
    pool = fleet.pools[MODEL]
    prompt = max(prompt, PREFIX_TOKENS * len(prefix))

    def cost(number):
        held = made[number]["names"]
        matched = next((n for n, name in enumerate(prefix) if name not in held), len(prefix))
        load = pool.loads[f"w{number}"]
        return load.cost_s(pool.pace.work(max(prompt - PREFIX_TOKENS * matched, 1), prompt))

    def starts(number):
        each, load = made[number], pool.loads[f"w{number}"]
        backlog = each["queued"] + sum(each["sent"])
        return (
            each["free"] > len(each["sent"])
            and load.free_blocks >= -(-prompt // 16) + 1
            and (not backlog or backlog < max(512, 0.05 * load.tokens_per_s))
        )

    costs = {number: cost(number) for number in range(len(made)) if starts(number)}
    choice = pool.choose(request(prompt=prompt, prefix=prefix), patience_s=0.0, late=False)
    if not costs:
        assert choice == NOWHERE
    else:
        chosen = int(choice.load.worker.endpoint[1:])
        assert cost(chosen) == min(costs.values())
        assert chosen in costs


def test_the_least_loaded_of_hundreds_of_equal_workers_is_found():
    desk = Desk()
    for number in range(300):
        desk.report(f"w{number}", report(quick(queued_prefill_tokens=300 - number if number != 77 else 0)))
    desk.arrive(prompt=100)
    assert endpoints(desk) == ["w77"]


def test_a_worker_that_holds_the_prompt_is_found_among_hundreds_that_are_less_loaded():
    desk = Desk()
    for number in range(300):
        desk.report(f"w{number}", report(quick()))
    desk.report("w200", report(quick(queued_prefill_tokens=500), news=[stored(*TEN, whole=True)]))
    desk.arrive(prompt=5200, prefix=TEN)
    assert endpoints(desk) == ["w200"]


def test_a_faster_worker_is_worth_more_than_a_free_one_for_a_long_prompt():
    desk = Desk()
    desk.report("slow", report(quick(8, speed=100.0)))
    desk.report("fast", report(quick(7, speed=100_000.0)))
    desk.arrive(prompt=10_000)
    assert endpoints(desk) == ["fast"]


def test_a_long_prompt_goes_where_fewer_decode_and_would_be_held_up():
    desk = Desk()
    desk.report("queue", report(quick(queued_prefill_tokens=1500)))
    desk.report("decodes", report(quick(running=3)))
    desk.arrive(prompt=4000)
    assert endpoints(desk) == ["queue"]


def test_a_cached_prefix_is_worth_less_than_a_queue_that_takes_longer():
    for ahead, expected in ((1000, "hot"), (9000, "cold")):
        desk = Desk(affinity_hold_s=0.0)
        hot = quick(step=10_000, queued_prefill_tokens=ahead)
        desk.report("hot", report(hot, news=[stored(*TEN, whole=True)]))
        desk.report("cold", report(quick()))
        desk.arrive(prompt=5200, prefix=TEN)
        assert endpoints(desk) == [expected]


def test_the_longest_match_is_chosen_among_equal_workers():
    desk = Desk()
    for endpoint, names in (("short", TEN[:3]), ("long", TEN[:7]), ("other", (99,))):
        desk.report(endpoint, report(quick(), news=[stored(*names, whole=True)]))
    desk.arrive(prompt=5200, prefix=TEN)
    assert endpoints(desk) == ["long"]


def test_a_prefix_that_the_worker_evicted_draws_nobody():
    desk = Desk()
    desk.report("w1", report(quick(7), news=[stored(*TEN, whole=True)]))
    desk.report("w2", report(quick(8)))
    desk.report("w1", report(quick(7), news=[stored(evicted=TEN)]))
    desk.arrive(prompt=5200, prefix=TEN)
    assert endpoints(desk) == ["w2"]


def test_a_restarted_worker_holds_nothing_any_more():
    desk = Desk()
    desk.report("w1", report(quick(7), news=[stored(*TEN, whole=True)]))
    desk.report("w2", report(quick(8)))
    desk.report("w1", report(quick(7), boot="boot-2"))
    desk.arrive(prompt=5200, prefix=TEN)
    assert endpoints(desk) == ["w2"]


def test_a_session_comes_back_to_its_worker():
    desk = Desk()
    for endpoint in ("w1", "w2", "w3"):
        desk.report(endpoint, report(quick()))
    for turn in range(1, 6):
        desk.end(desk.arrive(prompt=PREFIX_TOKENS * turn + 100, prefix=TEN[:turn]))
    assert len(set(endpoints(desk))) == 1


# Bursts.


def test_what_was_sent_counts_at_once_and_no_worker_gets_the_whole_burst():
    desk = Desk()
    for endpoint in ("w1", "w2", "w3", "w4"):
        desk.report(endpoint, report(quick(50, step=100_000)))
    for number in range(40):
        desk.arrive(name=f"r{number}", prompt=200 + number % 3)
    sent = endpoints(desk)
    assert {sent.count(endpoint) for endpoint in ("w1", "w2", "w3", "w4")} == {10}


def test_the_burst_is_still_counted_after_a_report_that_does_not_list_it_yet():
    desk = Desk()
    desk.report("w1", report(quick(50, step=100_000)))
    desk.report("w2", report(quick(50, step=100_000)))
    desk.arrive(name="a", prompt=3000)
    (first,) = endpoints(desk)
    desk.report(first, report(quick(50, step=100_000)))
    desk.arrive(name="b", prompt=3000)
    assert len(set(endpoints(desk))) == 2


def test_a_burst_fills_the_next_step_of_one_worker_and_then_goes_to_the_next():
    desk = Desk()
    # Four of eight sequences run on the second one: it costs more until the first one's step is full.
    desk.report("w1", report(quick(8, step=1024, speed=20_000.0)))
    desk.report("w2", report(quick(4, step=1024, speed=20_000.0, running=4)))
    for number in range(8):
        desk.arrive(name=f"r{number}", prompt=256)
    assert endpoints(desk) == ["w1"] * 4 + ["w2"] * 4


def test_what_no_step_has_room_for_waits_and_can_still_be_ordered():
    desk = Desk()
    desk.report("w1", report(quick(8, step=1000)))
    for number in range(6):
        desk.arrive(name=f"r{number}", prompt=500, arrival=number)
    assert desk.scheduler.waiting == 4
    desk.arrive(name="urgent", prompt=500, priority=1)
    active = [name for name, _ in desk.placed()]
    desk.report("w1", report(quick(6, step=1000), active=active))
    assert [name for name, _ in desk.placed()] == ["r0", "r1", "urgent", "r2"]


def test_requests_that_share_a_prefix_go_together_before_any_report():
    desk = Desk()
    for endpoint in ("w1", "w2", "w3"):
        desk.report(endpoint, report(quick(8, step=8192)))
    for number in range(9):
        family = number % 3
        names = tuple(100 * family + name for name in range(1, 5))
        desk.arrive(name=f"r{number}", prompt=2100, prefix=names)
    families = {}
    for name, endpoint in desk.placed():
        families.setdefault(int(name[1:]) % 3, set()).add(endpoint)
    assert sorted(map(sorted, families.values())) == [["w1"], ["w2"], ["w3"]]


def test_a_prompt_that_is_in_the_cache_leaves_room_in_the_step_for_others():
    desk = Desk()
    desk.report("w1", report(quick(8, step=1024), news=[stored(*TEN, whole=True)]))
    for number in range(3):
        desk.arrive(name=f"r{number}", prompt=5200, prefix=TEN)
    assert endpoints(desk) == ["w1"] * 3


# Waiting for a busy worker.


def hot_and_cold(ahead=1024, **changes):
    """Worker `hot` holds all of TEN and has a step's work ahead; `cold` is free."""
    desk = Desk(report_stale_s=1e6, **changes)
    hot = quick(step=512, queued_prefill_tokens=ahead)
    desk.report("hot", report(hot, news=[stored(*TEN, whole=True)]))
    desk.report("cold", report(quick(step=512)))
    return desk


def test_waiting_for_a_busy_worker_with_the_prefix_is_worth_it_when_that_is_quicker():
    desk = hot_and_cold()
    desk.arrive(prompt=5200, prefix=TEN)
    assert desk.placed() == []
    desk.report("hot", report(quick(step=512)))
    assert endpoints(desk) == ["hot"]


def test_nobody_waits_for_a_prefix_when_computing_it_elsewhere_is_quicker():
    desk = hot_and_cold(ahead=9000, affinity_hold_s=60.0)
    desk.arrive(prompt=5200, prefix=TEN)
    assert endpoints(desk) == ["cold"]


def test_nobody_in_time_waits_for_a_busy_worker_that_holds_nothing_of_it():
    desk = hot_and_cold()
    desk.report("cold", report(quick(step=512, speed=100.0)))
    desk.arrive(prompt=5200)
    assert endpoints(desk) == ["cold"]


def test_a_request_waits_for_a_prefix_only_for_so_long():
    desk = hot_and_cold(affinity_hold_s=1.0)
    desk.arrive(prompt=5200, prefix=TEN)
    desk.wait(0.9)
    assert desk.placed() == []
    desk.wait(0.2)
    assert endpoints(desk) == ["cold"]


def test_those_behind_one_that_waits_for_a_prefix_are_placed():
    desk = hot_and_cold()
    desk.arrive(name="first", prompt=5200, prefix=TEN, arrival=1)
    desk.arrive(name="second", prompt=100, arrival=2)
    assert desk.placed() == [("second", "cold")]


def test_so_many_do_not_wait_for_one_prefix_that_the_last_would_be_quicker_elsewhere():
    desk = hot_and_cold(affinity_hold_s=60.0)
    for number in range(8):
        desk.arrive(name=f"r{number}", prompt=5120 + 2048, prefix=TEN, arrival=number)
    assert "cold" in endpoints(desk)
    assert desk.scheduler.waiting > 0


def test_of_many_that_are_looked_at_together_not_all_wait_for_one_prefix():
    desk = hot_and_cold(affinity_hold_s=60.0)
    desk.report("cold", report(quick(step=512, queued_prefill_tokens=1024)))
    for number in range(8):
        desk.arrive(name=f"r{number}", prompt=5120 + 2048, prefix=TEN, arrival=number)
    desk.report("cold", report(quick(step=512)))
    assert endpoints(desk) == ["cold"]


def test_when_the_worker_that_it_waits_for_goes_it_is_placed_at_once():
    for gone in ("lost", "draining", "stale"):
        desk = hot_and_cold(affinity_hold_s=60.0)
        desk.arrive(prompt=5200, prefix=TEN)
        assert desk.placed() == []
        if gone == "lost":
            desk.lose("hot")
        elif gone == "draining":
            desk.report("hot", report(quick(), draining=True))
        else:
            desk = Desk(report_stale_s=0.25, affinity_hold_s=60.0)
            desk.report(
                "hot", report(quick(step=512, queued_prefill_tokens=1024), news=[stored(*TEN, whole=True)])
            )
            desk.now += 0.125
            desk.report("cold", report(quick(step=512)))
            desk.arrive(prompt=5200, prefix=TEN)
            assert desk.placed() == []
            desk.wait(0.125)
        assert endpoints(desk) == ["cold"]


def test_a_head_that_stopped_waiting_for_a_prefix_is_not_overtaken():
    desk = hot_and_cold(affinity_hold_s=1.0)
    desk.arrive(name="big", prompt=5200, prefix=TEN, arrival=1)
    assert desk.placed() == []
    desk.report("cold", report(quick(step=512, blocks=10, total_blocks=10)))
    desk.wait(2.0)
    desk.arrive(name="small", arrival=2)
    assert desk.placed() == []


def late(desk, **fields):
    """A request that missed its wish for a first token."""
    now_ms = int(desk.now * 1000)
    return desk.arrive(
        arrival=now_ms - 1000, deadline=desk.now + 1000, deadline_unix_ms=now_ms + 1_000_000,
        ttft_slo_ms=500, **fields,
    )  # fmt: skip


def test_a_late_request_may_wait_longer_and_not_without_end():
    desk = hot_and_cold(affinity_hold_s=1.0, late_hold_s=5.0)
    late(desk, prompt=5200, prefix=TEN)
    desk.wait(4.0)
    assert desk.placed() == []
    desk.wait(1.5)
    assert endpoints(desk) == ["cold"]


def test_a_request_that_turns_late_while_it_waits_does_not_wait_without_end_either():
    desk = hot_and_cold(affinity_hold_s=1.0, late_hold_s=3.0)
    now_ms = int(desk.now * 1000)
    desk.arrive(
        prompt=5200, prefix=TEN, arrival=now_ms, deadline=desk.now + 100,
        deadline_unix_ms=now_ms + 100_000, ttft_slo_ms=500,
    )  # fmt: skip
    assert desk.placed() == []
    desk.wait(3.5)
    assert endpoints(desk) == ["cold"]


def test_a_late_request_looks_again_when_the_worker_that_it_waits_for_only_gets_busier():
    desk = hot_and_cold(late_hold_s=60.0)
    late(desk, prompt=5200, prefix=TEN)
    assert desk.placed() == []
    desk.report("hot", report(quick(step=512, queued_prefill_tokens=40_000)))
    desk.wait(2.0)
    assert endpoints(desk) == ["cold"]
