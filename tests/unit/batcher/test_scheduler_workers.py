"""Which worker is chosen, what is deducted from its report, and who counts as alive."""

from services.batcher.core.messages import ServedElsewhere, Usage, WorkerTurned
from tests.unit.batcher.words import MODEL, OTHER, Desk, model_report, report


def free_of(desk, endpoint="w1", model=MODEL):
    snapshot = desk.scheduler.snapshot(desk.now, 100)
    (worker,) = [worker for worker in snapshot.workers if worker.endpoint == endpoint]
    (load,) = [load for load in worker.loads if load.model == model]
    return load.free_sequences, load.free_blocks


def test_the_less_loaded_worker_is_chosen():
    desk = Desk()
    desk.report("w1", free=2)
    desk.report("w2", free=6)
    desk.arrive(name="a")
    assert desk.placed() == [("a", "w2")]


def test_a_worker_with_fewer_free_blocks_counts_as_fuller():
    desk = Desk()
    desk.report("w1", free=4, blocks=900)
    desk.report("w2", free=4, blocks=300)
    desk.arrive(name="a")
    assert desk.placed() == [("a", "w1")]


def test_prompt_tokens_ahead_weigh_by_the_workers_own_speed():
    desk = Desk()
    desk.report("w1", free=4, queued_prefill_tokens=1000, prefill_tokens_per_s=10_000.0)
    desk.report("w2", free=4, queued_prefill_tokens=500, prefill_tokens_per_s=1_000.0)
    desk.arrive(name="a")
    assert desk.placed() == [("a", "w1")]


def test_equal_workers_take_turns():
    desk = Desk()
    for endpoint in ("w1", "w2", "w3"):
        desk.report(endpoint, free=8)
    for number in range(6):
        ticket = desk.arrive(name=f"r{number}")
        desk.end(ticket)
    assert [endpoint for _, endpoint in desk.placed()] == ["w1", "w2", "w3"] * 2


def test_a_burst_is_spread_before_any_new_report():
    desk = Desk()
    for endpoint in ("w1", "w2", "w3", "w4"):
        desk.report(endpoint, free=8)
    for number in range(8):
        desk.arrive(name=f"r{number}")
    chosen = [endpoint for _, endpoint in desk.placed()]
    assert {endpoint: chosen.count(endpoint) for endpoint in set(chosen)} == dict.fromkeys(
        ("w1", "w2", "w3", "w4"), 2
    )


def test_no_more_is_sent_than_was_reported_free():
    desk = Desk()
    desk.report("w1", free=2)
    for name in "abc":
        desk.arrive(name=name)
    assert [name for name, _ in desk.placed()] == ["a", "b"]


def test_a_report_that_does_not_list_a_lease_yet_leaves_it_deducted():
    desk = Desk()
    desk.report(free=2)
    desk.arrive(name="a", prompt=32)
    desk.report(free=2)
    assert free_of(desk) == (1, 997)


def test_a_report_that_lists_a_lease_counts_it_itself():
    desk = Desk()
    desk.report(free=2)
    desk.arrive(name="a", prompt=32)
    desk.report("w1", report(model_report(1, blocks=997), active=["a"]))
    assert free_of(desk) == (1, 997)


def test_a_lease_once_listed_is_not_deducted_again_when_the_worker_is_done_with_it():
    desk = Desk()
    desk.report(free=1)
    desk.arrive(name="a")
    desk.report("w1", report(model_report(0), active=["a"]))
    desk.report("w1", report(model_report(1)))
    assert free_of(desk) == (1, 1000)


def test_a_lease_that_ends_before_any_report_lists_it_gives_its_room_back_at_once():
    desk = Desk()
    desk.report(free=1)
    first = desk.arrive(name="a")
    desk.arrive(name="b")
    assert desk.placed() == [("a", "w1")]
    desk.end(first)
    assert desk.placed() == [("a", "w1"), ("b", "w1")]


def test_a_listed_lease_that_ends_gives_its_room_back_with_the_next_report_only():
    desk = Desk()
    desk.report(free=1)
    first = desk.arrive(name="a")
    desk.report("w1", report(model_report(0), active=["a"]))
    desk.arrive(name="b")
    desk.end(first)
    assert desk.placed() == [("a", "w1")]
    desk.report(free=1)
    assert desk.placed() == [("a", "w1"), ("b", "w1")]


def test_deductions_of_one_model_leave_another_alone():
    desk = Desk()
    desk.report("w1", report(model_report(2), model_report(2, model=OTHER)))
    desk.arrive(name="a", model=OTHER)
    assert (free_of(desk), free_of(desk, model=OTHER)) == ((2, 1000), (1, 998))


def test_an_engine_without_blocks_is_bounded_by_sequences_alone():
    desk = Desk()
    desk.report(free=1, blocks=0, block_tokens=0, total_blocks=0)
    desk.arrive(name="a", prompt=1_000_000)
    assert desk.placed() == [("a", "w1")]


def test_a_silent_worker_is_not_chosen_until_it_reports():
    desk = Desk(report_stale_s=0.2)
    desk.report(free=1)
    desk.wait(0.2)
    assert WorkerTurned("w1", "stale") in desk.effects
    desk.arrive(name="a")
    assert desk.placed() == []
    desk.report(free=1)
    assert desk.placed() == [("a", "w1")]


def test_a_silent_worker_is_not_chosen_even_before_the_timer_says_so():
    desk = Desk(report_stale_s=0.2)
    desk.report("w1", free=8)
    desk.now += 0.15
    desk.report("w2", free=1)
    desk.now += 0.1
    desk.arrive(name="a")
    assert desk.placed() == [("a", "w2")]


def test_heartbeats_keep_a_worker_alive():
    desk = Desk(report_stale_s=0.2)
    for _ in range(20):
        desk.report(free=1)
        desk.wait(0.1)
    assert desk.scheduler.worker_states() == ["alive"]
    assert [e for e in desk.effects if isinstance(e, WorkerTurned)] == [WorkerTurned("w1", "alive")]


def test_a_lost_worker_is_not_chosen_and_its_requests_go_elsewhere():
    desk = Desk()
    desk.report("w1", free=8)
    desk.report("w2", free=0)
    desk.lose("w1")
    desk.arrive(name="a")
    assert desk.placed() == []
    desk.report("w2", free=1)
    assert desk.placed() == [("a", "w2")]


def test_leases_of_a_lost_worker_end_with_their_own_streams():
    desk = Desk()
    desk.report("w1", free=1)
    ticket = desk.arrive(name="a")
    desk.lose("w1")
    assert desk.scheduler.leased == 1
    desk.end(ticket)
    assert desk.scheduler.leased == 0


def test_a_reconnected_worker_is_still_charged_for_what_it_does_not_list():
    desk = Desk()
    desk.report(free=2)
    desk.arrive(name="a")
    desk.lose()
    desk.report(free=2)
    assert free_of(desk)[0] == 1


def test_a_restarted_worker_is_not_charged_for_what_its_old_process_held():
    desk = Desk()
    desk.report(free=2)
    desk.arrive(name="a")
    desk.lose()
    desk.report("w1", report(model_report(2), boot="boot-2"))
    assert free_of(desk)[0] == 2


def test_a_worker_that_restarts_between_two_equal_reports_is_charged_anew():
    desk = Desk()
    desk.report(free=1)
    desk.arrive(name="a")
    desk.report("w1", report(model_report(1), boot="boot-2"))
    assert free_of(desk)[0] == 1


def test_a_draining_worker_gets_nothing_new():
    desk = Desk()
    desk.report("w1", report(model_report(8), draining=True))
    desk.arrive(name="a")
    assert desk.placed() == []
    assert desk.scheduler.worker_states() == ["draining"]
    desk.report("w1", report(model_report(8)))
    assert desk.placed() == [("a", "w1")]


def test_a_model_that_leaves_the_report_is_not_served_any_more():
    desk = Desk()
    desk.report("w1", report(model_report(8), model_report(8, model=OTHER)))
    desk.report("w1", report(model_report(8, model=OTHER)))
    desk.arrive(name="a", model=MODEL)
    assert desk.placed() == []


def test_reports_of_a_removed_worker_are_ignored():
    desk = Desk()
    desk.report("w1", free=8)
    desk.scheduler.worker_removed("w1", desk.now)
    assert desk.scheduler.load_reported("w1", report(model_report(8)), desk.now) == []
    desk.arrive(name="a")
    assert desk.placed() == []
    assert desk.scheduler.worker_states() == []


def test_a_discovered_worker_is_lost_until_it_reports():
    desk = Desk()
    desk.scheduler.worker_found("w1")
    assert desk.scheduler.worker_states() == ["lost"]
    assert desk.lose() == []


def test_a_call_that_the_proxy_moved_is_charged_where_it_runs():
    desk = Desk()
    desk.report("w1", free=2)
    desk.report("w2", free=1)
    ticket = desk.arrive(name="a")
    assert desk.placed() == [("a", "w1")]
    assert desk.answer(ticket, "w2") == [ServedElsewhere(ticket, "w1", "w2")]
    assert (free_of(desk, "w1")[0], free_of(desk, "w2")[0]) == (2, 0)
    snapshot = desk.scheduler.snapshot(desk.now, 10)
    assert (snapshot.leases[0].endpoint, snapshot.leases[0].served_by) == ("w2", "w2")
    assert snapshot.counters.served_elsewhere == 1
    assert {worker.endpoint: worker.leases for worker in snapshot.workers} == {"w1": 0, "w2": 1}


def test_a_moved_call_that_its_worker_lists_already_is_not_charged_twice():
    desk = Desk()
    desk.report("w1", free=4)
    ticket = desk.arrive(name="a")
    desk.report("w2", report(model_report(3), active=["a"]))
    desk.answer(ticket, "w2")
    assert free_of(desk, "w2")[0] == 3


def test_a_call_served_by_a_worker_that_nobody_knows_is_only_counted():
    desk = Desk()
    desk.report("w1", free=1)
    ticket = desk.arrive(name="a")
    desk.answer(ticket, "10.0.0.9:9100")
    assert free_of(desk)[0] == 1
    desk.end(ticket)
    assert desk.scheduler.leased == 0


def test_room_freed_by_a_moved_call_is_used_at_once():
    desk = Desk()
    desk.report("w1", free=1)
    first = desk.arrive(name="a")
    desk.arrive(name="b")
    desk.answer(first, "elsewhere:1")
    assert desk.placed() == [("a", "w1"), ("b", "w1")]


def test_usage_is_charged_to_the_tenant():
    desk = Desk()
    desk.report(free=1)
    ticket = desk.arrive(name="a", tenant="acme")
    desk.end(ticket, Usage(prompt_tokens=100, cached_prompt_tokens=60, completion_tokens=7))
    (tenant,) = desk.scheduler.snapshot(desk.now, 10).tenants
    assert tenant == ("acme", 0, 0, 40, 7, 1.0, 60)


def test_a_snapshot_lists_queues_and_at_most_so_many_leases():
    desk = Desk()
    desk.report(free=3)
    for number in range(5):
        desk.arrive(name=f"r{number}", priority=1 + number % 2, prompt=10)
    desk.now += 2
    snapshot = desk.scheduler.snapshot(desk.now, leases_max=2)
    (queue,) = snapshot.queues
    assert (queue.depth, queue.prompt_tokens, queue.oldest_wait_s) == (2, 20, 2)
    assert queue.depth_by_priority == {1: 1, 2: 1}
    assert (len(snapshot.leases), snapshot.lease_count) == (2, 3)
