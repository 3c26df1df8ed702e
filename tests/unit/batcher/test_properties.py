"""Random histories against a slow oracle: what must hold of the scheduler whatever happens.

Requests come, leave and are answered (also by other workers than the one picked), workers report, tell of
caches and of tokens served, fall silent, restart and go, and time passes. After every event all the
rules of `oracle.py` are asked. Times are eighths of seconds, which floats hold exactly.
"""

from dataclasses import asdict

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from services.batcher.core.messages import Dispatch, LoadReport, ModelState, Reject, Request, Usage
from services.batcher.core.scheduler import Scheduler
from tests.unit.batcher.histories import (
    ENDPOINTS,
    LIMITS,
    THIRD,
    TOTAL_BLOCKS,
    arrivals,
    endpoints,
    names,
    pauses,
    rooms,
    states,
    tenants,
)
from tests.unit.batcher.oracle import BLOCK, STRIDE, Stay, World
from tests.unit.batcher.words import MODEL, OTHER, model_report, report, served, stored

COUNTS = st.tuples(tenants, st.integers(0, 5), st.integers(0, 900), st.integers(0, 50))


class SchedulerMachine(RuleBasedStateMachine):
    tickets = Bundle("tickets")

    def __init__(self):
        super().__init__()
        self.now = 64.0
        self.scheduler = Scheduler(LIMITS, "lease")
        self.world = World(LIMITS, ENDPOINTS)
        self.outcomes: dict[int, str] = {}
        self.counters: dict[str, int] = {}
        self.virtual: dict[tuple[str, int, str], float] = {}
        self.served: dict[tuple[str, str, int], tuple[int, int]] = {}
        self.count = 0
        for endpoint in ENDPOINTS:
            self.scheduler.worker_found(endpoint)

    @initialize(first=st.lists(rooms, min_size=3, max_size=3), data=st.data())
    def workers_are_there(self, first, data):
        for endpoint, room in zip(ENDPOINTS, first, strict=True):
            self.say(endpoint, room, [ModelState.READY] * 2, data)

    # Requests.

    @rule(target=tickets, burst=st.lists(arrivals, min_size=1, max_size=4))
    def requests_arrive(self, burst):
        return multiple(*[self.arrive(**fields) for fields in burst])

    def arrive(self, model, priority, since_ms, prompt, prefix, patience, slo_ms, tenant, size):
        self.count += 1
        deadline = self.now + patience
        request = Request(
            f"r{self.count}", model, tenant, priority, int(self.now * 1000) - since_ms, deadline,
            prompt + STRIDE * len(prefix), 4, 1, prefix, int(deadline * 1000), slo_ms, size,
        )  # fmt: skip
        band = priority or 2
        expected = self.world.refusal_expected(request, band, self.now)
        effects = self.scheduler.request_arrived(self.count, request, self.now)
        shed = [e for e in effects if isinstance(e, Reject) and e.reason == "SHED"]
        assert effects[: len(shed)] == shed
        for effect in shed:
            assert self.world.broken_bound(request, band) == "queue"
            assert self.world.shedding_helps(request, band)
            assert min(self.world.waiting[effect.ticket].bands) > band
            assert effect.ticket in self.world.first_to_shed(model)
            self.refused(effect)
        effects = effects[len(shed) :]
        self.world.waiting[self.count] = Stay(request, self.now, {band}, self.now)
        mine = [e.reason for e in effects if isinstance(e, Reject) and e.ticket == self.count]
        if expected is None:
            assert mine[:1] not in (["QUEUE_FULL"], ["TENANT_OVER_SHARE"])
        elif mine != ["DEADLINE_UNREACHABLE"]:
            assert mine == [expected]
        self.take(effects, arrived=self.count)
        return self.count

    @rule(target=tickets, burst=st.lists(arrivals, min_size=1, max_size=3), room=rooms, data=st.data())
    def requests_arrive_and_a_worker_has_room(self, burst, room, data):
        came = [self.arrive(**fields) for fields in burst]
        self.say(data.draw(endpoints), room, [ModelState.READY] * 2, data, told=False)
        return multiple(*came)

    @rule(
        target=tickets, endpoint=endpoints, burst=st.lists(arrivals, min_size=1, max_size=3), data=st.data()
    )
    def requests_arrive_whose_prefix_a_busy_worker_holds(self, endpoint, burst, data):
        room = {"free": 4, "blocks": TOTAL_BLOCKS, "ahead": (600, 512, 1000.0)}
        self.say(endpoint, room, [ModelState.READY] * 2, data, told=False)
        sent = self.world.peers[endpoint].last._replace(news=(stored(1, 3, 4, 6, whole=True),))
        self.take(self.scheduler.load_reported(endpoint, sent, self.now))
        shared = {"model": MODEL, "prefix": (1, 3, 4, 6)}
        return multiple(*[self.arrive(**(fields | shared)) for fields in burst])

    @rule(ticket=consumes(tickets), used=st.booleans())
    def stream_ends(self, ticket, used):
        if ticket not in self.world.waiting and ticket not in self.world.placed:
            assert not self.scheduler.holds(ticket)
            return
        self.forget(ticket)
        self.take(self.scheduler.stream_ended(ticket, Usage(10, 2, 3) if used else None, self.now))

    @rule(ticket=tickets, served_by=st.sampled_from([*ENDPOINTS, "elsewhere", ""]))
    def response_comes(self, ticket, served_by):
        if ticket in self.world.waiting:
            # The proxy answered by itself.
            self.forget(ticket)
        elif ticket in self.world.placed and self.outcomes[ticket] == "placed":
            self.outcomes[ticket] = "answered"
            self.world.answered.add(self.world.placed[ticket].request.model)
            self.moved(ticket, served_by)
        else:
            return
        self.take(self.scheduler.response_seen(ticket, served_by, self.now))

    def moved(self, ticket, served_by):
        stay = self.world.placed[ticket]
        if served_by in {"", stay.endpoint}:
            return
        self.world.peers[stay.endpoint].holds.pop(ticket)
        stay.endpoint, stay.moved, stay.listed = served_by, True, False
        if (peer := self.world.peers.get(served_by)) is not None:
            peer.holds[ticket] = stay
            listed = peer.last.active_request_ids if peer.last is not None and peer.connected else ()
            stay.listed = stay.request.request_id in listed

    # Workers.

    @rule(endpoint=endpoints, room=rooms, told=st.booleans(), data=st.data())
    def worker_reports(self, endpoint, room, told, data):
        self.say(endpoint, room, [ModelState.READY] * 2, data, told=told)

    @rule(
        endpoint=endpoints,
        room=rooms,
        odd=st.lists(states, max_size=3),
        draining=st.sampled_from([False] * 4 + [True]),
        boot=st.sampled_from(["b1"] * 4 + ["b2"]),
        data=st.data(),
    )
    def worker_reports_something_odd(self, endpoint, room, odd, draining, boot, data):
        self.say(endpoint, room, odd, data, draining=draining, boot=boot)

    def say(self, endpoint, room, said, data, *, draining=False, boot="b1", told=True):
        peer = self.world.peers[endpoint]
        held = [stay.request.request_id for stay in peer.holds.values()]
        active = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
        queued, step, speed = room["ahead"]
        loads = [
            model_report(
                room["free"], model=model, blocks=room["blocks"], total_blocks=TOTAL_BLOCKS,
                block_tokens=BLOCK, state=state, queued_prefill_tokens=queued, step_tokens_max=step,
                prefill_tokens_per_s=speed,
            )
            for model, state in zip((MODEL, OTHER, THIRD), said, strict=False)
        ]  # fmt: skip
        told = [load.version for load in loads] if told else []
        news = [each for model in told for each in self.news(endpoint, boot, model, data)]
        sent = report(*loads, boot=boot, draining=draining, active=active, news=news)
        self.heard(peer, sent)
        self.take(self.scheduler.load_reported(endpoint, sent, self.now))

    def news(self, endpoint, boot, model, data):
        """What a worker says of one model's cache and of the tokens that it computed."""
        whole, came, went = data.draw(st.tuples(st.booleans(), names, names))
        yield stored(*came, model=model, whole=whole, evicted=went)
        lines = []
        for tenant, band, prompt, output in data.draw(st.lists(COUNTS, max_size=3)):
            account = (endpoint + boot + model, tenant, band)
            before = self.served.get(account, (0, 0))
            self.served[account] = (before[0] + prompt, before[1] + output)
            # A report that says less than one before adds nothing.
            lines.append((tenant, band, *(self.served[account] if output else (0, 0))))
        yield served(*lines, model=model)

    def heard(self, peer, sent):
        if peer.last is None or peer.last.boot_id != sent.boot_id:
            # What was sent to the old process, or before the worker said anything, is gone or listed.
            for stay in peer.holds.values():
                stay.listed = True
        for stay in peer.holds.values():
            stay.listed = stay.listed or stay.request.request_id in sent.active_request_ids
        peer.last, peer.reported_at, peer.connected = sent, self.now, True

    def repeat(self, endpoint, **changes):
        peer = self.world.peers[endpoint]
        if peer.last is not None:
            sent = peer.last._replace(news=(), **changes)
            self.heard(peer, sent)
            self.take(self.scheduler.load_reported(endpoint, sent, self.now))

    @rule(endpoint=endpoints, what=st.sampled_from(["repeats", "repeats", "restarts", "is lost"]))
    def worker_goes_on(self, endpoint, what):
        peer = self.world.peers[endpoint]
        if what == "repeats":
            self.repeat(endpoint)
        elif what == "restarts" and peer.last is not None:
            self.repeat(endpoint, boot_id=peer.last.boot_id + "+")
        elif what == "is lost":
            # The boot id outlives the stream: the process may still be there.
            peer.connected = False
            if peer.last is not None:
                peer.last = LoadReport(peer.last.boot_id, False, ())
            self.take(self.scheduler.worker_lost(endpoint, self.now))

    # Time.

    @rule(pause=pauses, noticed=st.sampled_from([True, True, False]))
    def time_passes(self, pause, noticed):
        if noticed:
            self.pass_until(self.now + pause)
        else:
            self.now += pause

    @rule(halves=st.integers(1, 8))
    def time_passes_and_workers_stay_awake(self, halves):
        self.stay_awake(halves)

    @rule(
        state=st.sampled_from([ModelState.LOADING, ModelState.FAILED]),
        halves=st.integers(1, 16),
        data=st.data(),
    )
    def nobody_serves_for_a_while(self, state, halves, data):
        for endpoint in ENDPOINTS:
            self.say(endpoint, {"free": 0, "blocks": 0, "ahead": (0, 0, 0.0)}, [state] * 2, data, told=False)
        self.stay_awake(halves)

    def stay_awake(self, halves):
        for _ in range(halves):
            self.pass_until(self.now + 0.5)
            for endpoint, peer in self.world.peers.items():
                if peer.connected:
                    self.repeat(endpoint)

    def pass_until(self, until):
        while (wake := self.scheduler.next_wake()) is not None and wake <= until:
            self.now = max(wake, self.now)
            self.tick()
        self.now = until

    def tick(self):
        before = self.scheduler.snapshot(self.now, 0).counters.promoted
        grown = self.world.age(self.now)
        self.take(self.scheduler.tick(self.now))
        moved = self.scheduler.snapshot(self.now, 0).counters.promoted - before
        # Those who went in the same moment may have moved up before.
        stayed = sum(stay in self.world.waiting.values() for stay in grown)
        assert stayed <= moved <= len(grown)
        self.world.aged(grown, self.now)

    @precondition(lambda self: self.count > 5)
    @rule()
    def everybody_leaves(self):
        for ticket in [*self.world.waiting, *self.world.placed]:
            if ticket in self.world.waiting or ticket in self.world.placed:
                self.forget(ticket)
                self.take(self.scheduler.stream_ended(ticket, None, self.now))
        self.nothing_is_left()

    # What must be so.

    def take(self, effects, arrived=None):
        for effect in effects:
            if isinstance(effect, Dispatch):
                self.dispatched(effect)
            elif isinstance(effect, Reject):
                self.refused(effect, at_arrival=effect.ticket == arrived)
        self.counters_never_go_backwards()

    def refused(self, effect, *, at_arrival=False):
        world, ticket = self.world, effect.ticket
        assert ticket not in self.outcomes
        self.outcomes[ticket] = "refused"
        world.judge_refusal(effect, self.now, at_arrival=at_arrival)
        del world.waiting[ticket]

    def dispatched(self, effect):
        world, ticket = self.world, effect.ticket
        assert ticket not in self.outcomes
        self.outcomes[ticket] = "placed"
        world.judge_dispatch(effect, self.now)
        world.place(ticket, effect.endpoint, self.now)

    def forget(self, ticket):
        stay = self.world.waiting.pop(ticket, None) or self.world.placed.pop(ticket)
        if stay.endpoint in self.world.peers:
            self.world.peers[stay.endpoint].holds.pop(ticket, None)
        self.outcomes.setdefault(ticket, "left")

    def nothing_is_left(self):
        assert self.scheduler.waiting == self.scheduler.leased == 0
        snapshot = self.scheduler.snapshot(self.now, 100)
        assert snapshot.queues == []
        assert all(worker.leases == 0 for worker in snapshot.workers)
        assert all(tenant.queued == tenant.running == 0 for tenant in snapshot.tenants)
        assert len(snapshot.tenants) <= LIMITS.tenants_max

    @invariant()
    def accounts_agree(self):
        waiting, placed = self.world.waiting, self.world.placed
        assert self.scheduler.waiting == len(waiting)
        assert self.scheduler.leased == len(placed)
        snapshot = self.scheduler.snapshot(self.now, 100)
        counters = snapshot.counters
        refused = sum(counters.refused.values())
        assert counters.arrived == counters.dispatched + counters.cancelled + refused + len(waiting)
        assert counters.dispatched == counters.completed + len(placed)
        assert refused == sum(outcome == "refused" for outcome in self.outcomes.values())
        assert len({lease.lease_id for lease in snapshot.leases}) == len(placed)
        for tenant in snapshot.tenants:
            for counted, stays in ((tenant.queued, waiting), (tenant.running, placed)):
                assert counted == sum(stay.request.tenant == tenant.name for stay in stays.values())

    def counters_never_go_backwards(self):
        """Asked after every event: a tenant that waits before and after was not forgotten between."""
        snapshot = self.scheduler.snapshot(self.now, 0)
        counters = asdict(snapshot.counters)
        counters |= counters.pop("refused")
        for name, count in self.counters.items():
            assert counters[name] >= count
        self.counters = counters
        virtual = {
            (queue.model, flow.band, flow.tenant): flow.virtual_tokens
            for queue in snapshot.queues
            for flow in queue.flows
        }
        for flow, tokens in self.virtual.items():
            assert virtual.get(flow, tokens) >= tokens
        self.virtual = virtual

    @invariant()
    def workers_are_charged_for_what_they_do_not_list(self):
        for worker in self.scheduler.snapshot(self.now, 0).workers:
            peer = self.world.peers[worker.endpoint]
            assert worker.leases == len(peer.holds)
            assert {load.model for load in worker.loads} == {
                load.version for load in (peer.last.models if peer.last else ())
            }
            for load in worker.loads:
                sent = len(peer.unlisted(load.model))
                assert load.free_sequences == max(peer.model(load.model).free_sequences - sent, 0)

    @invariant()
    def nobody_waits_who_could_start(self):
        wake = self.scheduler.next_wake()
        if wake is None or wake > self.now:
            for model in (MODEL, OTHER, THIRD):
                assert not self.world.idles(model, self.now)

    @invariant()
    def bounds_hold(self):
        for model in (MODEL, OTHER, THIRD):
            waiting = list(self.world.of_model(model).values())
            assert len(waiting) <= LIMITS.queue_depth_max
            if len(waiting) > 1:
                tokens = sum(stay.request.prompt_tokens for stay in waiting)
                assert tokens <= LIMITS.queue_prompt_tokens_max
                assert sum(stay.request.size_bytes for stay in waiting) <= LIMITS.queue_bytes_max
        assert len({stay.request.model for stay in self.world.waiting.values()}) <= LIMITS.queues_max

    @invariant()
    def positions_are_possible(self):
        for ticket, stay in self.world.waiting.items():
            place = self.scheduler.place_of(stay.request.request_id, self.now)
            surely = sum(
                self.world.before(other, ticket, self.now, guess=True) for other in self.world.waiting
            )
            others = len(self.world.of_model(stay.request.model)) - 1
            assert place.ticket == ticket
            assert surely <= place.position <= others


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=100,
    stateful_step_count=60,
    deadline=None,
    # A busy machine is slow, and that says nothing about the scheduler.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
