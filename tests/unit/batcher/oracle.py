"""A slow model of what the scheduler may and must do, for random histories.

It keeps plain dictionaries and looks through all of them every time. It knows the rules (who may go
before whom, where a request may be sent, when it may be refused) and nothing of how they are kept. Where
a rule leaves room (how much of a prompt a cache is believed to hold), it asks only for what is sure.
"""

from dataclasses import dataclass, field

from services.batcher.core.load import AHEAD_S
from services.batcher.core.messages import COMING, LoadReport, ModelState, Request

BLOCK = 64
STRIDE = 512


@dataclass
class Stay:
    """One request here."""

    request: Request
    entered: float
    bands: set[int]
    """One, but for the moment in which it moves up."""
    band_since: float
    endpoint: str = ""
    listed: bool = False
    moved: bool = False

    def late(self, now):
        """Whether its wish for a first token cannot be met any more: what may be thought of it. It is so
        when that time is over, and may be before, for a prompt takes a while.
        """
        if not self.request.ttft_slo_ms:
            return {False}
        return {True} if now * 1000 >= self.due else {False, True}

    @property
    def due(self):
        wish = self.request.arrival_unix_ms + self.request.ttft_slo_ms
        last = self.request.deadline_unix_ms
        return min(last, wish) if self.request.ttft_slo_ms else last

    def computed_tokens(self):
        """(at least, at most) so much of its prompt is computed where it was sent."""
        prompt = self.request.prompt_tokens
        saved = 0 if self.moved else len(self.request.prefix) * STRIDE
        return max(prompt - saved, 1), prompt


@dataclass
class Peer:
    """One worker."""

    last: LoadReport | None = None
    connected: bool = False
    reported_at: float = 0.0
    holds: dict[int, Stay] = field(default_factory=dict)

    def model(self, version):
        """What it said of a model last; None when its stream is broken or it does not have it."""
        loads = self.last.models if self.connected and self.last is not None else ()
        return next((load for load in loads if load.version == version), None)

    def unlisted(self, version):
        """What was sent there and no report has listed."""
        return [stay for stay in self.holds.values() if not stay.listed and stay.request.model == version]


def blocks(request):
    return -(-request.prompt_tokens // BLOCK) + 1


class World:
    """Who waits, who runs, and what each worker said."""

    def __init__(self, limits, endpoints):
        self.limits = limits
        self.waiting: dict[int, Stay] = {}
        self.placed: dict[int, Stay] = {}
        self.peers = {endpoint: Peer() for endpoint in endpoints}
        self.answered: set[str] = set()
        """Models of which a request was answered."""
        self._placed_at: dict[str, float] = {}
        self._longest_gap_s: dict[str, float] = {}

    def of_model(self, model):
        return {ticket: stay for ticket, stay in self.waiting.items() if stay.request.model == model}

    # Where.

    def serves(self, endpoint, model, now):
        """Its report of the model, if it may be sent a request at all."""
        peer = self.peers[endpoint]
        load = peer.model(model)
        if load is None or peer.last.draining or peer.reported_at + self.limits.report_stale_s <= now:
            return None
        return load if load.state is ModelState.READY else None

    def can_start(self, endpoint, request, now, *, surely):
        """Whether a request may be sent there. `surely`: whatever caches are believed to hold."""
        load = self.serves(endpoint, request.model, now)
        if load is None:
            return False
        sent = self.peers[endpoint].unlisted(request.model)
        if load.free_sequences <= len(sent):
            return False
        if load.free_blocks < blocks(request) + sum(blocks(stay.request) for stay in sent):
            return False
        backlog = load.queued_prefill_tokens + sum(stay.computed_tokens()[surely] for stay in sent)
        step = max(load.step_tokens_max, AHEAD_S * load.prefill_tokens_per_s)
        return not (load.step_tokens_max and backlog) or backlog < step

    def may_be_passed_over(self, stay, now):
        """Whether there may be a busy worker for which it is worth to wait, though others are open: one with
        its prefix for a while, and any for longer if it is late.
        """
        limits = self.limits
        hold_s = limits.affinity_hold_s if stay.request.prefix else 0.0
        if True in stay.late(now):
            hold_s = max(hold_s, limits.late_hold_s)
        if now >= stay.entered + hold_s:
            return False
        for endpoint, peer in self.peers.items():
            load = peer.model(stay.request.model)
            if load is None or load.state is not ModelState.READY or peer.last.draining:
                continue
            if not self.can_start(endpoint, stay.request, now, surely=True):
                return True
        return False

    def readers(self, model, now):
        """Reports of those who serve the model: (surely, perhaps)."""
        perhaps = [
            load
            for peer in self.peers.values()
            if (load := peer.model(model)) is not None
            and load.state is ModelState.READY
            and not peer.last.draining
        ]
        surely = [load for endpoint in self.peers if (load := self.serves(endpoint, model, now))]
        return surely, perhaps

    def somebody_is_loading(self, model, now):
        return any(
            peer.connected
            and not peer.last.draining
            and peer.reported_at + self.limits.report_stale_s > now
            and (load := peer.model(model)) is not None
            and load.state in COMING
            for peer in self.peers.values()
        )

    # Who first.

    def before(self, ticket, other_ticket, now, *, guess):
        """Whether the first surely goes before the other. `guess`: nobody looked who is late now."""
        one, other = self.waiting[ticket], self.waiting[other_ticket]
        if one.request.model != other.request.model:
            return False
        if max(one.bands) < min(other.bands):
            return True
        if one.request.tenant != other.request.tenant or one.bands != other.bands or len(one.bands) > 1:
            return False

        def keys(stay, number):
            for late in stay.late(now) | ({False} if guess else set()):
                yield late, stay.due, stay.request.arrival_unix_ms, number

        return max(keys(one, ticket)) < min(keys(other, other_ticket))

    def idles(self, model, now):
        """Somebody waits who could start, and nobody is in the way."""
        waiting = self.of_model(model)
        excused = {t for t, stay in waiting.items() if self.may_be_passed_over(stay, now)}
        if len(excused) == len(waiting):
            return False
        for ticket, stay in waiting.items():
            if any(self.can_start(endpoint, stay.request, now, surely=True) for endpoint in self.peers):
                continue
            if all(t in excused or not self.before(t, ticket, now, guess=True) for t in waiting):
                return False
        return True

    # Who may wait.

    def broken_bound(self, request, band):
        """`tenant`, `band` or `queue`: the first bound that the request would break."""
        limits, stays = self.limits, list(self.of_model(request.model).values())
        scopes = []
        if limits.tenant_share < 1:
            scopes.append(
                ("tenant", [s for s in stays if s.request.tenant == request.tenant], limits.tenant_share)
            )
        if limits.band_shares[band - 1] < 1:
            scopes.append(("band", [s for s in stays if s.bands == {band}], limits.band_shares[band - 1]))
        scopes.append(("queue", stays, 1.0))
        for scope, held, share in scopes:
            if self.breaks(held, request, share):
                return scope
        return None

    def breaks(self, held, request, share=1.0):
        """Whether a request beside these is more than a share of what may wait."""
        limits = self.limits
        most = [limits.queue_depth_max, limits.queue_prompt_tokens_max, limits.queue_bytes_max]
        depth, tokens, size = (max(int(bound * share), 1) for bound in most)
        if len(held) + 1 > depth:
            return True
        if not held:
            return False
        requests = [request, *[stay.request for stay in held]]
        return (
            sum(each.prompt_tokens for each in requests) > tokens
            or sum(each.size_bytes for each in requests) > size
        )

    def shedding_helps(self, request, band):
        """Whether it could wait if everybody less urgent were dropped."""
        rest = [stay for stay in self.of_model(request.model).values() if min(stay.bands) <= band]
        return not self.breaks(rest, request)

    def first_to_shed(self, model):
        """Tickets of whom to drop first: the newest of a tenant with most requests in the last band."""
        waiting = self.of_model(model)
        last = max(max(stay.bands) for stay in waiting.values())
        by_tenant: dict[str, list[int]] = {}
        for ticket, stay in waiting.items():
            if stay.bands == {last}:
                by_tenant.setdefault(stay.request.tenant, []).append(ticket)
        most = max(len(tickets) for tickets in by_tenant.values())
        return {max(tickets) for tickets in by_tenant.values() if len(tickets) == most}

    def refusal_expected(self, request, band, now):
        """The reason for which a new request may not wait; an estimate may refuse it before."""
        if request.deadline <= now:
            return "DEADLINE_UNREACHABLE"
        waited_for = {stay.request.model for stay in self.waiting.values()}
        if request.model not in waited_for and len(waited_for) >= self.limits.queues_max:
            return "QUEUE_FULL"
        scope = self.broken_bound(request, band)
        if scope == "queue" and self.shedding_helps(request, band):
            return None
        return {None: None, "tenant": "TENANT_OVER_SHARE"}.get(scope, "QUEUE_FULL")

    # What is done.

    def judge_refusal(self, effect, now, *, at_arrival):
        """A request that waits, or has just come, may be refused for this reason."""
        limits, stay = self.limits, self.waiting[effect.ticket]
        model, waited_s = stay.request.model, now - stay.entered
        surely, perhaps = self.readers(model, now)
        if effect.reason == "DEADLINE_UNREACHABLE":
            if stay.request.deadline > now:
                assert at_arrival
                self.judge_estimate(stay.request, effect, now)
        elif effect.reason == "NO_CAPACITY":
            assert waited_s >= limits.no_worker_hold_s
            assert not surely
            assert not self.somebody_is_loading(model, now)
        elif effect.reason == "MODEL_NOT_READY":
            assert waited_s >= limits.loading_hold_s
            assert not surely
        elif effect.reason == "REQUEST_TOO_LARGE":
            assert perhaps
            assert all((load.total_blocks - 1) * BLOCK < stay.request.prompt_tokens for load in surely)
        elif effect.reason == "QUEUE_TIMEOUT":
            assert waited_s >= limits.hold_max_s
        elif effect.reason != "SHED":
            assert effect.reason in {"QUEUE_FULL", "TENANT_OVER_SHARE"}
            assert at_arrival

    def judge_estimate(self, request, effect, now):
        """A request is refused for its deadline only if queue and prefill may really take so long."""
        left_s = request.deadline - now
        assert int(effect.metadata["estimate_ms"]) >= int(left_s * 1000)
        ahead = len(self.of_model(request.model)) - 1
        # How long prompts take is learned from those that were answered.
        if request.model not in self.answered:
            assert left_s <= ahead * self._longest_gap_s.get(request.model, 0.0)

    def judge_dispatch(self, effect, now):
        """It is its turn, it is not too late, and the worker can start it now."""
        stay = self.waiting[effect.ticket]
        assert stay.request.deadline > now
        for ticket, waits in self.waiting.items():
            if self.before(ticket, effect.ticket, now, guess=False):
                assert self.may_be_passed_over(waits, now)
        assert self.can_start(effect.endpoint, stay.request, now, surely=False)

    def place(self, ticket, endpoint, now):
        """It runs there."""
        stay = self.placed[ticket] = self.waiting.pop(ticket)
        stay.endpoint, model = endpoint, stay.request.model
        self.peers[endpoint].holds[ticket] = stay
        gap_s = now - self._placed_at.get(model, now)
        self._longest_gap_s[model] = max(self._longest_gap_s.get(model, 0.0), gap_s)
        self._placed_at[model] = now

    # Time.

    def age(self, now):
        """Those who may move up now."""
        grown = [
            stay
            for stay in self.waiting.values()
            if min(stay.bands) > 2 and stay.band_since + self.limits.age_promote_s <= now
        ]
        for stay in grown:
            (band,) = stay.bands
            stay.bands = {band, band - 1}
        return grown

    def aged(self, grown, now):
        """They moved up. How many of them still waited is not known, and is the difference to make."""
        for stay in grown:
            stay.bands, stay.band_since = {min(stay.bands)}, now
