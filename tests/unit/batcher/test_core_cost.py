"""The core's cost with hundreds of workers and 1,400 requests at once, in CPU time of this process."""

import time

from services.batcher.core.messages import Dispatch
from services.batcher.core.scheduler import Scheduler
from tests.unit.batcher.words import limits, model_report, report, request

WORKERS = 300
REQUESTS = 1_400
REQUEST_BUDGET_S = 0.2e-3
REPORT_BUDGET_S = 0.2e-3


def fleet(scheduler, now, free):
    loads = {f"10.0.0.{n}:9100": report(model_report(free, running=n % 7)) for n in range(WORKERS)}
    for endpoint, load in loads.items():
        scheduler.worker_found(endpoint)
        scheduler.load_reported(endpoint, load, now)
    return loads


def test_a_burst_into_free_capacity_costs_little_each():
    scheduler = Scheduler(limits(queue_depth_max=10_000), "lease")
    fleet(scheduler, 0.0, free=8)
    requests = [request(f"r{n}", arrival=n) for n in range(REQUESTS)]
    begun = time.process_time()
    for ticket, each in enumerate(requests):
        (effect,) = scheduler.request_arrived(ticket, each, 0.01)
        assert isinstance(effect, Dispatch)
        scheduler.response_seen(ticket, effect.endpoint, 0.02)
        scheduler.stream_ended(ticket, None, 0.03)
    assert (time.process_time() - begun) / REQUESTS < REQUEST_BUDGET_S


def test_a_held_burst_that_drains_report_by_report_costs_little_each():
    scheduler = Scheduler(limits(queue_depth_max=10_000, report_stale_s=1e6), "lease")
    loads = fleet(scheduler, 0.0, free=0)
    requests = [request(f"r{n}", arrival=n % 50) for n in range(REQUESTS)]
    begun = time.process_time()
    for ticket, each in enumerate(requests):
        assert scheduler.request_arrived(ticket, each, 0.01) == []
    placed: list[Dispatch] = []
    reports = 0
    now = 0.02
    while len(placed) < REQUESTS:
        for endpoint in loads:
            now += 1e-4
            reports += 1
            placed += scheduler.load_reported(endpoint, report(model_report(1), boot=f"b{reports}"), now)
        scheduler.tick(now)
    for dispatch in placed:
        assert scheduler.stream_ended(dispatch.ticket, None, now) == []
    spent = time.process_time() - begun
    assert spent < REQUESTS * REQUEST_BUDGET_S + reports * REPORT_BUDGET_S
