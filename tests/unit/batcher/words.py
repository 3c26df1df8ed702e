"""Short ways to say what the core is told in tests."""

from services.batcher.core.messages import (
    Dispatch,
    Limits,
    LoadReport,
    ModelNews,
    ModelReport,
    ModelState,
    PrefixChanges,
    Reject,
    Request,
    Served,
)
from services.batcher.core.scheduler import Scheduler

MODEL = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64
FAR = 1e9


def limits(**changes):
    values = {
        "hold_max_s": 60.0,
        "no_worker_hold_s": 5.0,
        "loading_hold_s": 30.0,
        "age_promote_s": 1e6,
        "affinity_hold_s": 1.0,
        "late_hold_s": 10.0,
        "report_stale_s": 0.2,
        "queue_depth_max": 1000,
        "queue_prompt_tokens_max": 1_000_000,
        "queue_bytes_max": 1_000_000_000,
        "band_shares": (1.0, 1.0, 1.0, 1.0),
        "tenant_share": 1.0,
        "tenant_weights": {},
        "queues_max": 64,
        "tenants_max": 64,
    }
    return Limits(**(values | changes))


def request(
    name="r", *, model=MODEL, arrival=0, deadline=FAR, prompt=16, priority=0, tenant="default", **rest
):
    values = {"max_new_tokens": 8} | rest
    return Request(
        request_id=name,
        model=model,
        tenant=tenant,
        priority=priority,
        arrival_unix_ms=arrival,
        deadline=deadline,
        prompt_tokens=prompt,
        **values,
    )


def model_report(free=1, *, model=MODEL, blocks=1000, state=ModelState.READY, **rest):
    values = {
        "free_sequences": free,
        "free_blocks": blocks,
        "block_tokens": 16,
        "total_blocks": 1000,
        "sequences_max": 8,
    }
    return ModelReport(version=model, state=state, **(values | rest))


def report(*models, boot="boot-1", draining=False, active=(), news=()):
    return LoadReport(
        boot_id=boot,
        draining=draining,
        models=models,
        active_request_ids=tuple(active),
        news=tuple(news),
    )


def stored(*names, model=MODEL, whole=False, evicted=()):
    """News of a worker's prefix cache."""
    return ModelNews(model, PrefixChanges(whole, names, tuple(evicted)))


def served(*lines, model=MODEL):
    """News of tokens computed; a line is (tenant, band, prompt tokens, generated tokens) since boot."""
    return ModelNews(model, None, tuple(Served(*line) for line in lines))


class Desk:
    """A scheduler, its clock, and everything it ever answered."""

    def __init__(self, **changes):
        self.scheduler = Scheduler(limits(**changes), "lease")
        self.now = 100.0
        self.effects = []
        self._tickets = 0

    def _take(self, effects):
        self.effects += effects
        return effects

    def arrive(self, req=None, **fields):
        """The ticket of a new request."""
        self._tickets += 1
        self._take(self.scheduler.request_arrived(self._tickets, req or request(**fields), self.now))
        return self._tickets

    def report(self, endpoint="w1", load=None, **fields):
        self.scheduler.worker_found(endpoint)
        load = load or report(model_report(**fields))
        return self._take(self.scheduler.load_reported(endpoint, load, self.now))

    def lose(self, endpoint="w1"):
        return self._take(self.scheduler.worker_lost(endpoint, self.now))

    def answer(self, ticket, served_by=""):
        return self._take(self.scheduler.response_seen(ticket, served_by, self.now))

    def end(self, ticket, usage=None):
        return self._take(self.scheduler.stream_ended(ticket, usage, self.now))

    def wait(self, seconds):
        """Let time pass, ticking whenever the scheduler asks to."""
        until = self.now + seconds
        while (wake := self.scheduler.next_wake()) is not None and wake <= until:
            self.now = max(wake, self.now)
            self._take(self.scheduler.tick(self.now))
        self.now = until
        self._take(self.scheduler.tick(self.now))

    def close(self):
        return self._take(self.scheduler.close(self.now))

    def dispatches(self):
        return [effect for effect in self.effects if isinstance(effect, Dispatch)]

    def rejects(self):
        return [effect for effect in self.effects if isinstance(effect, Reject)]

    def placed(self):
        """(request id, endpoint) in the order of placing."""
        return [(effect.request.request_id, effect.endpoint) for effect in self.dispatches()]

    def refused(self):
        """(request id, reason) in the order of refusing."""
        return [(effect.request.request_id, effect.reason) for effect in self.rejects()]
