"""Who may wait: the bounds of a queue, of each band and of each tenant in it, and whether a deadline can
still be met. It decides by what is there now and changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from services.batcher.core.entry import Entry
from services.batcher.core.messages import Limits, Request
from services.batcher.core.pool import Pool
from services.batcher.core.queue import ModelQueue

NEAR_S = 60.0
"""For a deadline further away than this the prompt's own prefill is not looked at."""


class Held(NamedTuple):
    """What waits somewhere, or may."""

    requests: int
    prompt_tokens: int
    size_bytes: int


class Full(NamedTuple):
    """A bound that one more request would break."""

    scope: str
    """`queue`, `band` or `tenant`."""
    what: str
    limit: int


WHAT = ("requests waiting", "prompt tokens waiting", "bytes waiting")


def full(limits: Limits, queue: ModelQueue, band: int, request: Request) -> Full | None:
    """The first bound that a request would break, the narrowest first."""
    most = Held(limits.queue_depth_max, limits.queue_prompt_tokens_max, limits.queue_bytes_max)
    lane, share = queue.bands[band - 1], limits.band_shares[band - 1]
    bound = None
    # A whole share is no bound of its own: then the queue's own counts.
    if limits.tenant_share < 1:
        bound = _broken(
            "tenant", _of_tenant(queue, request.tenant), _part(most, limits.tenant_share), request
        )
    if bound is None and share < 1:
        held = Held(lane.depth, lane.prompt_tokens, lane.size_bytes)
        bound = _broken("band", held, _part(most, share), request)
    return bound or _broken("queue", Held(len(queue), queue.prompt_tokens, queue.size_bytes), most, request)


def shedding_helps(limits: Limits, queue: ModelQueue, band: int, request: Request) -> bool:
    """Would the queue have room for a request if everybody less urgent were dropped?"""
    most = Held(limits.queue_depth_max, limits.queue_prompt_tokens_max, limits.queue_bytes_max)
    stay = queue.bands[:band]
    held = Held(
        sum(lane.depth for lane in stay),
        sum(lane.prompt_tokens for lane in stay),
        sum(lane.size_bytes for lane in stay),
    )
    return _broken("queue", held, most, request) is None


def estimate_s(queue: ModelQueue | None, pool: Pool | None, entry: Entry, now: float) -> float:
    """The least that a new request is likely to wait for its first token; 0 when nothing is known."""
    request = entry.request
    wait_s = queue.gap_s * queue.ahead_of_new(entry) if queue else 0.0
    if pool is None or request.deadline - now > NEAR_S:
        return wait_s
    return wait_s + pool.prefill_s(request)


def _of_tenant(queue: ModelQueue, tenant: str) -> Held:
    flows = [flow for lane in queue.bands if (flow := lane.flows.get(tenant)) is not None]
    return Held(
        sum(len(flow.keys) for flow in flows),
        sum(flow.prompt_tokens for flow in flows),
        sum(flow.size_bytes for flow in flows),
    )


def _part(most: Held, share: float) -> Held:
    return Held(*(max(int(bound * share), 1) for bound in most))


def _broken(scope: str, held: Held, most: Held, request: Request) -> Full | None:
    after = Held(
        held.requests + 1, held.prompt_tokens + request.prompt_tokens, held.size_bytes + request.size_bytes
    )
    for number, what in enumerate(WHAT):
        # One request may always wait, however large it is.
        if after[number] > most[number] and (held.requests or number == 0):
            return Full(scope, what, most[number])
    return None
