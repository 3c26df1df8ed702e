"""Random histories against a slow oracle: what must hold of the scheduler whatever happens.

The oracle keeps plain dictionaries and looks through all of them after every event. It knows the rules
(who may be dispatched, where, and who must be) and nothing of how the scheduler keeps them.
"""

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from services.batcher.core.messages import Dispatch, LoadReport, ModelState, Reject, Request, Usage
from services.batcher.core.scheduler import Scheduler
from tests.unit.batcher.words import MODEL, OTHER, limits, model_report, report

STALE_S = 1.0
BLOCK = 16
LIMITS = limits(
    hold_max_s=20.0,
    no_worker_hold_s=5.0,
    report_stale_s=STALE_S,
    queue_depth_max=6,
    queue_prompt_tokens_max=2000,
    queues_max=2,
    tenants_max=3,
)
ENDPOINTS = ("w1", "w2", "w3")

models = st.sampled_from([MODEL, OTHER])
endpoints = st.sampled_from(ENDPOINTS)
STATES = st.sampled_from([*[ModelState.READY] * 6, *ModelState])
pauses = st.sampled_from([0.0, 0.0, 0.01, 0.01, 0.3, 1.0, 4.0])


@dataclass
class Stay:
    """One request as the oracle sees it."""

    request: Request
    entered: float
    endpoint: str = ""
    listed: bool = False


@dataclass
class Peer:
    """One worker as the oracle sees it."""

    last: LoadReport | None = None
    reported_at: float = 0.0
    holds: dict[int, Stay] = field(default_factory=dict)


class SchedulerMachine(RuleBasedStateMachine):
    tickets = Bundle("tickets")

    def __init__(self):
        super().__init__()
        self.now = 50.0
        self.scheduler = Scheduler(LIMITS, "lease")
        self.waiting: dict[int, Stay] = {}
        self.placed: dict[int, Stay] = {}
        self.outcomes: dict[int, str] = {}
        self.peers = {endpoint: Peer() for endpoint in ENDPOINTS}
        self.count = 0
        for endpoint in ENDPOINTS:
            self.scheduler.worker_found(endpoint)

    # What happens.

    @rule(
        target=tickets,
        model=models,
        priority=st.integers(0, 4),
        arrival=st.integers(0, 50),
        prompt=st.sampled_from([1, 16, 100, 300, 900]),
        patience=st.sampled_from([-1.0, 0.2, 3.0, 1000.0, 1000.0, 1000.0]),
        tenant=st.sampled_from(["a", "b", "c", "d", "e"]),
    )
    def arrive(self, model, priority, arrival, prompt, patience, tenant):
        self.count += 1
        request = Request(
            f"r{self.count}", model, tenant, priority, arrival, self.now + patience, prompt, max_new_tokens=4
        )
        depth = sum(stay.request.model == model for stay in self.waiting.values())
        tokens = sum(s.request.prompt_tokens for s in self.waiting.values() if s.request.model == model)
        self.waiting[self.count] = Stay(request, self.now)
        effects = self.scheduler.request_arrived(self.count, request, self.now)
        full = depth >= LIMITS.queue_depth_max or (
            depth > 0 and tokens + prompt > LIMITS.queue_prompt_tokens_max
        )
        if patience > 0:
            assert full == any(isinstance(e, Reject) and e.reason == "QUEUE_FULL" for e in effects)
        self.take(effects)
        return self.count

    @rule(ticket=consumes(tickets), used=st.booleans())
    def stream_ends(self, ticket, used):
        if ticket not in self.waiting and ticket not in self.placed:
            assert not self.scheduler.holds(ticket)
            return
        usage = Usage(10, 2, 3) if used else None
        self.forget(ticket)
        self.take(self.scheduler.stream_ended(ticket, usage, self.now))

    @rule(ticket=tickets, served_by=st.sampled_from([*ENDPOINTS, "elsewhere", ""]))
    def response_comes(self, ticket, served_by):
        stay = self.placed.get(ticket)
        if stay is None or self.outcomes[ticket] == "answered":
            return
        self.outcomes[ticket] = "answered"
        if served_by and served_by != stay.endpoint:
            if stay.endpoint in self.peers:
                self.peers[stay.endpoint].holds.pop(ticket, None)
            stay.endpoint, stay.listed = served_by, False
            if served_by in self.peers:
                peer = self.peers[served_by]
                peer.holds[ticket] = stay
                stay.listed = (
                    peer.last is not None and stay.request.request_id in peer.last.active_request_ids
                )
        self.take(self.scheduler.response_seen(ticket, served_by, self.now))

    @rule(
        endpoint=endpoints,
        free=st.sampled_from([2, 1, 4, 0]),
        blocks=st.sampled_from([64, 20, 3, 0]),
        states=st.sampled_from([2, 1, 0]).flatmap(lambda n: st.lists(STATES, min_size=n, max_size=n)),
        draining=st.sampled_from([False] * 8 + [True]),
        boot=st.sampled_from(["b1"] * 6 + ["b2"]),
        data=st.data(),
    )
    def worker_reports(self, endpoint, free, blocks, states, draining, boot, data):
        peer = self.peers[endpoint]
        names = [stay.request.request_id for stay in peer.holds.values()]
        active = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
        loads = [
            model_report(free, model=model, blocks=blocks, total_blocks=64, state=state)
            for model, state in zip((MODEL, OTHER), states, strict=False)
        ]
        sent = report(*loads, boot=boot, draining=draining, active=active)
        if peer.last is not None and peer.last.boot_id != boot:
            for stay in peer.holds.values():
                stay.listed = True
        for stay in peer.holds.values():
            stay.listed = stay.listed or stay.request.request_id in active
        peer.last, peer.reported_at = sent, self.now
        self.take(self.scheduler.load_reported(endpoint, sent, self.now))

    @rule(endpoint=endpoints, again=st.sampled_from(["same process", "new process"]))
    def worker_repeats_its_report(self, endpoint, again):
        peer = self.peers[endpoint]
        if peer.last is None:
            return
        if again == "new process":
            peer.last = peer.last._replace(boot_id=peer.last.boot_id + "+")
            for stay in peer.holds.values():
                stay.listed = True
        peer.reported_at = self.now
        self.take(self.scheduler.load_reported(endpoint, peer.last, self.now))

    @rule(endpoint=endpoints)
    def worker_is_lost(self, endpoint):
        # The boot id outlives the stream: the process may still be there.
        peer = self.peers[endpoint]
        if peer.last is not None:
            peer.last = LoadReport(peer.last.boot_id, False, ())
        self.take(self.scheduler.worker_lost(endpoint, self.now))

    @rule(pause=pauses)
    def time_passes(self, pause):
        until = self.now + pause
        while (wake := self.scheduler.next_wake()) is not None and wake <= until:
            self.now = max(wake, self.now)
            self.take(self.scheduler.tick(self.now))
        self.now = until

    @rule(pause=pauses)
    def time_passes_unnoticed(self, pause):
        self.now += pause

    @precondition(lambda self: self.count > 5)
    @rule()
    def everybody_leaves(self):
        for ticket in [*self.waiting, *self.placed]:
            if ticket in self.waiting or ticket in self.placed:
                self.forget(ticket)
                self.take(self.scheduler.stream_ended(ticket, None, self.now))
        self.nothing_is_left()

    # What must be so.

    def take(self, effects):
        for effect in effects:
            if isinstance(effect, Dispatch):
                self.dispatched(effect)
            elif isinstance(effect, Reject):
                stay = self.waiting.pop(effect.ticket)
                assert effect.ticket not in self.outcomes
                self.outcomes[effect.ticket] = "refused"
                if effect.reason == "DEADLINE_UNREACHABLE":
                    assert stay.request.deadline <= self.now
                if effect.reason == "NO_CAPACITY":
                    assert stay.entered + LIMITS.no_worker_hold_s <= self.now

    def dispatched(self, effect):
        stay = self.waiting[effect.ticket]
        assert effect.ticket not in self.outcomes
        assert stay.request.deadline > self.now
        assert not [t for t, s in self.waiting.items() if self.before(t, s, effect.ticket, stay)]
        assert self.can_start(effect.endpoint, stay.request)
        del self.waiting[effect.ticket]
        self.outcomes[effect.ticket] = "placed"
        stay.endpoint = effect.endpoint
        self.placed[effect.ticket] = stay
        self.peers[effect.endpoint].holds[effect.ticket] = stay

    def before(self, ticket, stay, other_ticket, other):
        def key(number, request):
            return (request.priority or 2, request.arrival_unix_ms, number)

        same = stay.request.model == other.request.model
        return same and key(ticket, stay.request) < key(other_ticket, other.request)

    def can_start(self, endpoint, request):
        peer = self.peers[endpoint]
        if peer.last is None or peer.last.draining or peer.reported_at + STALE_S <= self.now:
            return False
        for load in peer.last.models:
            if load.version == request.model and load.state is ModelState.READY:
                unlisted = [
                    s for s in peer.holds.values() if not s.listed and s.request.model == request.model
                ]
                spent = sum(self.blocks(s.request) for s in unlisted)
                return load.free_sequences - len(unlisted) >= 1 and load.free_blocks - spent >= self.blocks(
                    request
                )
        return False

    def blocks(self, request):
        return -(-request.prompt_tokens // BLOCK) + 1

    def forget(self, ticket):
        stay = self.waiting.pop(ticket, None) or self.placed.pop(ticket)
        if stay.endpoint in self.peers:
            self.peers[stay.endpoint].holds.pop(ticket, None)
        self.outcomes.setdefault(ticket, "left")

    def nothing_is_left(self):
        assert self.scheduler.waiting == self.scheduler.leased == 0
        snapshot = self.scheduler.snapshot(self.now, 100)
        assert snapshot.queues == []
        assert all(worker.leases == 0 for worker in snapshot.workers)
        assert all(tenant.queued == tenant.running == 0 for tenant in snapshot.tenants)
        assert len(snapshot.tenants) <= LIMITS.tenants_max
        for endpoint, peer in self.peers.items():
            (worker,) = [worker for worker in snapshot.workers if worker.endpoint == endpoint]
            reported = {load.version: load.free_sequences for load in (peer.last.models if peer.last else ())}
            assert {load.model: load.free_sequences for load in worker.loads} == reported

    @invariant()
    def accounts_agree(self):
        assert self.scheduler.waiting == len(self.waiting)
        assert self.scheduler.leased == len(self.placed)
        counters = self.scheduler.snapshot(self.now, 0).counters
        refused = sum(counters.refused.values())
        assert counters.arrived == counters.dispatched + counters.cancelled + refused + len(self.waiting)
        assert counters.dispatched == counters.completed + len(self.placed)
        assert refused == sum(outcome == "refused" for outcome in self.outcomes.values())

    @invariant()
    def nobody_waits_who_could_start(self):
        for model in (MODEL, OTHER):
            waiting = {t: s for t, s in self.waiting.items() if s.request.model == model}
            assert len(waiting) <= LIMITS.queue_depth_max
            heads = [
                stay
                for ticket, stay in waiting.items()
                if not any(self.before(t, s, ticket, stay) for t, s in waiting.items())
            ]
            for head in heads:
                startable = any(self.can_start(endpoint, head.request) for endpoint in ENDPOINTS)
                assert not startable or head.request.deadline <= self.now

    @invariant()
    def positions_are_true(self):
        for ticket, stay in self.waiting.items():
            place = self.scheduler.place_of(stay.request.request_id, self.now)
            ahead = sum(self.before(t, s, ticket, stay) for t, s in self.waiting.items())
            assert (place.ticket, place.position) == (ticket, ahead)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=200,
    stateful_step_count=60,
    deadline=None,
    # A busy machine is slow, and that says nothing about the scheduler.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
