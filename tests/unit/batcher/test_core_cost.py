"""The core's cost with hundreds of workers and 1,400 requests at once, in CPU time of this process.

`pytest -s` shows the figures.
"""

import time
from itertools import count

import pytest

from services.batcher.core.messages import Dispatch, LoadReport, Reject, Usage
from services.batcher.core.scheduler import Scheduler
from tests.unit.batcher.words import limits, model_report, report, request, served, stored

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
    spent = time.process_time() - begun
    print(f"\nburst into free capacity: {spent / REQUESTS * 1e6:.0f} µs a request")
    assert spent / REQUESTS < REQUEST_BUDGET_S


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
    print(f"\nheld burst: {spent * 1e3:.0f} ms for {REQUESTS} requests and {reports} reports")
    assert spent < REQUESTS * REQUEST_BUDGET_S + reports * REPORT_BUDGET_S


# As it is in service: sessions with long prefixes, tenants, full steps, news in every report.

BUSY_WORKERS = 100
TENANTS = 10
SESSIONS = 200
NAMES = 24
PROMPT_TOKENS = NAMES * 512 + 300
RATE_PER_S = 300
DURATION_S = 6
REPORT_INTERVAL_S = 0.05
NEW_NAMES = 2


class Busy:
    """Virtual workers that run each request for `runs_s`, and the time that the scheduler takes."""

    def __init__(self, runs_s):
        self.runs_s = runs_s
        weights = {f"t{number}": 1.0 + number % 3 for number in range(TENANTS)}
        bounds = {"queue_depth_max": 10_000, "queue_prompt_tokens_max": 1 << 40}
        self.scheduler = Scheduler(limits(tenant_weights=weights, **bounds), "lease")
        self.running = {f"10.0.0.{number}:9100": {} for number in range(BUSY_WORKERS)}
        self.served = dict.fromkeys(self.running, 0)
        self.names = count(1 << 40)
        self.spent = {"request": 0.0, "report": 0.0}
        self.calls = {"request": 0, "report": 0}
        self.ends = []
        self.waits = set()
        self.refused = 0
        for endpoint in self.running:
            self.scheduler.worker_found(endpoint)

    def timed(self, what, method, *args):
        begun = time.process_time()
        effects = method(*args)
        self.spent[what] += time.process_time() - begun
        return effects

    def arrive(self, number, now):
        session = number * 7919 % SESSIONS
        known = [session << 8 | name for name in range(NAMES - 2)]
        names = (*known, next(self.names), next(self.names))
        now_ms = int(now * 1000)
        asked = request(
            f"r{number}", tenant=f"t{number % TENANTS}", prompt=PROMPT_TOKENS, prefix=names, arrival=now_ms,
            deadline=now + 30, deadline_unix_ms=now_ms + 30_000, ttft_slo_ms=2_000, max_new_tokens=200,
        )  # fmt: skip
        self.calls["request"] += 1
        self.waits.add(number)
        self.perform(self.timed("request", self.scheduler.request_arrived, number, asked, now), now)

    def perform(self, effects, now):
        for effect in effects:
            if isinstance(effect, Dispatch):
                self.waits.remove(effect.ticket)
                self.running[effect.endpoint][effect.ticket] = effect.request
                self.ends.append((now + self.runs_s, effect.ticket, effect.endpoint))
                self.timed("request", self.scheduler.response_seen, effect.ticket, effect.endpoint, now)
            elif isinstance(effect, Reject):
                self.waits.discard(effect.ticket)
                self.refused += 1

    def end_until(self, now):
        while self.ends and self.ends[0][0] <= now:
            _, ticket, endpoint = self.ends.pop(0)
            del self.running[endpoint][ticket]
            usage = Usage(PROMPT_TOKENS, PROMPT_TOKENS - 1324, 100)
            self.perform(self.timed("request", self.scheduler.stream_ended, ticket, usage, now), now)

    def report(self, endpoint, now):
        running = self.running[endpoint]
        self.served[endpoint] += 100
        lines = [(f"t{number}", 2, self.served[endpoint], self.served[endpoint]) for number in range(TENANTS)]
        new = [next(self.names) for _ in range(NEW_NAMES)]
        held = [name for each in list(running.values())[-1:] for name in each.prefix]
        load = model_report(
            max(8 - len(running), 0), running=len(running), step_tokens_max=2048,
            queued_prefill_tokens=300 * (len(running) % 4), prefill_tokens_per_s=20_000.0 + len(running),
            blocks=4000, total_blocks=8000,
        )  # fmt: skip
        news = [stored(*held, *new, evicted=new[:1]), served(*lines)]
        sent: LoadReport = report(load, active=[f"r{ticket}" for ticket in running], news=news)
        self.calls["report"] += 1
        self.perform(self.timed("report", self.scheduler.load_reported, endpoint, sent, now), now)

    def run(self):
        endpoints = list(self.running)
        for endpoint in endpoints:
            self.report(endpoint, 0.0)
        reports = count()
        reported = REPORT_INTERVAL_S / BUSY_WORKERS
        for number in range(RATE_PER_S * DURATION_S):
            now = 0.001 + number / RATE_PER_S
            while (due := next(reports) * reported) < now:
                self.end_until(due)
                self.report(endpoints[round(due / reported) % BUSY_WORKERS], max(due, 0.0))
                wake = self.scheduler.next_wake()
                if wake is not None and wake <= due:
                    self.perform(self.timed("request", self.scheduler.tick, due), due)
            self.arrive(number, now)


@pytest.mark.parametrize(("load", "runs_s"), [("half full", 1.5), ("overloaded", 4.0)])
def test_long_prefixes_many_tenants_and_news_in_every_report_cost_little_each(load, runs_s):
    busy = Busy(runs_s)
    busy.run()
    each_s = {what: spent / busy.calls[what] for what, spent in busy.spent.items()}
    reports_s = busy.spent["report"] / busy.calls["request"]
    print(
        f"\n{load}: {each_s['request'] * 1e6:.0f} µs a request, {each_s['report'] * 1e6:.0f} µs a report, "
        f"{busy.calls['request']} requests, {busy.calls['report']} reports "
        f"({reports_s * 1e6:.0f} µs of reports for each request), "
        f"{len(busy.waits)} still wait, {busy.refused} refused"
    )
    assert busy.calls["request"] == RATE_PER_S * DURATION_S
    assert each_s["request"] < REQUEST_BUDGET_S
    assert each_s["report"] < REPORT_BUDGET_S
