"""The cases of `tools.bench_batcher`: which mesh, which requests, and what is to be read from the outcome.

Nothing here starts anything. Every case returns figures and its bars; a bar is `(figure, "<=", bound)`.
Seeds are fixed: two runs of one case send the same requests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tokenloom.bench.schedule import poisson
from tokenloom.bench.stats import Spread, percentile
from tools.bench_batcher_load import Ask, Seen
from tools.bench_batcher_mesh import Outcome, Setup

INTERACTIVE, STANDARD, BATCH = 1, 2, 3
"""loom.inference.v1.Priority."""
PLUG = "plug"
"""A tenant that fills every place while the others' requests gather."""
TENANTS = tuple(f"tenant-{number}" for number in range(10))

Figures = dict[str, float | int | str | dict[str, float]]
Bar = tuple[str, str, float]


@dataclass(frozen=True)
class Case:
    """What to run, and when its figures are taken: seconds after the first request is due."""

    name: str
    setup: Setup
    asks: list[Ask]
    window: tuple[float, float]
    facts: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Workers of few places, so that requests have to wait, and the law of their steps."""

    workers: int = 4
    sequences: int = 8
    step_ms: float = 20.0
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Sequences that run at once."""
        return self.workers * self.sequences

    def setup(self) -> Setup:
        """The mesh of these places."""
        batcher: dict[str, object] = {"TENANT_WEIGHTS": json.dumps(self.weights)} if self.weights else {}
        worker: dict[str, object] = {"SEQUENCES_MAX": self.sequences, "SIM_STEP_MS": self.step_ms}
        return Setup(self.workers, worker, batcher)

    def plug(self, seconds: float) -> list[Ask]:
        """Fills every place for so long."""
        return [Ask(0.0, PLUG, STANDARD, 16, round(seconds * 1e3 / self.step_ms)) for _ in range(self.count)]


# pick and burst


def pick(workers: int, rate: float, seconds: float, warm_s: float, step_ms: float, tokens: int) -> Case:
    """Room for everybody: what a pick takes is all that a request waits for."""
    rng = random.Random(0)
    times = poisson(rate, round(rate * (warm_s + seconds)), rng)
    asks = [Ask(due_s, rng.choice(TENANTS), STANDARD, rng.randint(32, 256), tokens) for due_s in times]
    facts = {"workers": workers, "rate": rate, "seconds": seconds, "new_tokens": tokens, "step_ms": step_ms}
    return Case(
        "pick",
        Setup(workers, {"SIM_STEP_MS": step_ms}, aside=True),
        asks,
        (warm_s, warm_s + seconds),
        dict(facts),
    )


def pick_figures(outcome: Outcome) -> tuple[Figures, list[Bar]]:
    """Latency as Envoy saw it, and what the batcher's process took for each request."""
    sent = set(outcome.in_window)
    picks = [a.pick_us / 1e3 for a in outcome.access if a.index in sent and a.pick_us is not None]
    spread = Spread.of(picks)
    after = Spread.of(a.response_us / 1e3 for a in outcome.access if a.index in sent)
    late = Spread.of(1e3 * (outcome.seen[i].sent_s - outcome.asks[i].due_s) for i in sent)
    count, seconds = max(len(sent), 1), outcome.window[1] - outcome.window[0]
    core_s = sum(took_s for _, took_s in outcome.core.values())
    figures: Figures = {
        "requests": len(sent),
        "failed": sum(bool(seen.error) for seen in outcome.seen),
        "past_the_batcher": outcome.bypassed,
        "pick_p50_ms": spread.p50 if spread else float("nan"),
        "pick_p90_ms": spread.p90 if spread else float("nan"),
        "pick_p99_ms": spread.p99 if spread else float("nan"),
        "pick_max_ms": spread.max if spread else float("nan"),
        "answer_p50_ms": after.p50 if after else float("nan"),
        "answer_p99_ms": after.p99 if after else float("nan"),
        "sent_late_p50_ms": late.p50 if late else float("nan"),
        "sent_late_p99_ms": late.p99 if late else float("nan"),
        "batcher_ms_per_request": outcome.cpu_s["batcher"] * 1e3 / count,
        "core_ms_per_request": core_s * 1e3 / count,
        "core_us_by_method": {
            name: took_s * 1e6 / count for name, (calls, took_s) in outcome.core.items() if calls
        },
        "reports_per_s": outcome.reports / seconds,
        "cores": {name: cpu_s / seconds for name, cpu_s in outcome.cpu_s.items()},
        "foreign_cores": outcome.foreign_cores,
    }
    return figures, [
        ("pick_p50_ms", "<=", 2.0),
        ("pick_p99_ms", "<=", 10.0),
        ("batcher_ms_per_request", "<=", 2.0),
        ("core_ms_per_request", "<=", 0.2),
        ("failed", "<=", 0),
        ("past_the_batcher", "<=", 0),
    ]


def burst(workers: int, requests: int, sequences: int) -> Case:
    """All at once, more than there are places for."""
    rng = random.Random(0)
    asks = [Ask(0.0, rng.choice(TENANTS), STANDARD, rng.randint(32, 256), 8) for _ in range(requests)]
    setup = Setup(workers, {"SEQUENCES_MAX": sequences, "SIM_STEP_MS": 50})
    facts = {"workers": workers, "places": workers * sequences}
    return Case("burst", setup, asks, (0.0, 5.0), dict(facts))


def burst_figures(outcome: Outcome) -> tuple[Figures, list[Bar]]:
    """Every request is served, under a lease."""
    served = [seen for seen in outcome.seen if not seen.error]
    first = [seen.first_s for seen in served if seen.first_s is not None]
    errors = sorted({seen.error for seen in outcome.seen if seen.error})
    figures: Figures = {
        "requests": len(outcome.asks),
        "not_served": len(outcome.asks) - len(served),
        "errors": ", ".join(errors) or "none",
        "past_the_batcher": outcome.bypassed,
        "without_lease": len(outcome.asks) - sum(bool(access.lease) for access in outcome.access),
        "served_elsewhere": sum(access.picked != access.upstream for access in outcome.access),
        "first_token_p50_s": percentile(sorted(first), 0.5) if first else float("nan"),
        "first_token_max_s": max(first, default=float("nan")),
        "all_served_s": max((seen.ended_s for seen in outcome.seen), default=float("nan")),
    }
    return figures, [(name, "<=", 0) for name in ("not_served", "past_the_batcher", "without_lease")]


# behind


def behind(queued: int) -> Case:
    """One worker, its places taken; then batch requests; then one interactive request."""
    places = Places(workers=1, sequences=4)
    gather_s = 0.5 + queued / 250
    asks = places.plug(gather_s + 1.0)
    asks += [Ask(0.3 + index / 500, "batch", BATCH, 16, 2) for index in range(queued)]
    asks.append(Ask(gather_s, "person", INTERACTIVE, 16, 2))
    return Case("behind", places.setup(), asks, (0.0, gather_s), {"queued": queued})


def behind_figures(outcome: Outcome) -> tuple[Figures, list[Bar]]:
    """How many of those that were queued before it were picked before it."""
    by_index = {access.index: access for access in outcome.access}
    (person,) = (i for i, ask in enumerate(outcome.asks) if ask.tenant == "person")
    others = [by_index[i] for i, ask in enumerate(outcome.asks) if ask.tenant == "batch" and i in by_index]
    own = by_index[person]
    waiting = [access for access in others if access.start_unix_s < own.start_unix_s < access.picked_unix_s]
    earlier = [access for access in others if access.picked_unix_s < own.picked_unix_s]
    queued = sum(outcome.asks[access.index].tenant == "batch" for access in waiting)
    figures: Figures = {
        "queued_before_it": queued,
        "picked_before_it": len(earlier),
        "waited_ms": (own.picked_unix_s - own.start_unix_s) * 1e3,
        "past_the_batcher": outcome.bypassed,
        "failed": sum(bool(seen.error) for seen in outcome.seen),
    }
    bars = [(name, "<=", 0.0) for name in ("picked_before_it", "past_the_batcher", "failed")]
    return figures, [("queued_before_it", ">=", float(len(others))), *bars]


# fairness


def backlog(per_tenant: int = 60, flood: int = 10) -> Case:
    """Ten tenants, all backlogged, one with ten times the requests of another."""
    counts = dict.fromkeys(TENANTS, per_tenant) | {TENANTS[-1]: per_tenant * flood}
    return _backlogged("backlog", Places(), counts)


def weights(unit: int = 360) -> Case:
    """Weights 1:2:4, everybody with more than can be served in the time."""
    shares = {"one": 1.0, "two": 2.0, "four": 4.0}
    counts = {tenant: round(unit * max(share, 2.0)) for tenant, share in shares.items()}
    return _backlogged("weights", Places(weights=shares), counts)


def _backlogged(name: str, places: Places, counts: dict[str, int]) -> Case:
    """All requests wait before the first is served: a plug holds the places until then."""
    rng = random.Random(0)
    order = [tenant for tenant, count in counts.items() for _ in range(count)]
    rng.shuffle(order)
    gather_s = 0.5 + len(order) / 250
    asks = places.plug(gather_s + 1.0)
    asks += [
        Ask(0.3 + index / 500, tenant, STANDARD, rng.randint(32, 256), rng.randint(4, 16))
        for index, tenant in enumerate(order)
    ]
    facts = {"places": places.count, "requests": len(order), "plugged_s": gather_s + 1.0}
    return Case(name, places.setup(), asks, (0.0, gather_s), dict(facts))


def served_tokens(outcome: Outcome) -> tuple[dict[str, float], float]:
    """Tokens by tenant while every tenant had a request waiting, and how long that was.

    It begins with the first token of a request that had waited, and ends when the first tenant's last
    request has one. A prompt counts when its first token comes.
    """
    tenants = {ask.tenant for ask in outcome.asks} - {PLUG}
    firsts: dict[str, list[float]] = {tenant: [] for tenant in tenants}
    for ask, seen in zip(outcome.asks, outcome.seen, strict=True):
        if ask.tenant in tenants:
            firsts[ask.tenant].append(seen.first_s if seen.first_s is not None else float("inf"))
    begin_s = min(min(times) for times in firsts.values())
    end_s = min(max(times) for times in firsts.values())
    tokens = dict.fromkeys(sorted(tenants), 0.0)
    for ask, seen in zip(outcome.asks, outcome.seen, strict=True):
        if ask.tenant in tenants:
            tokens[ask.tenant] += _tokens_between(ask, seen, begin_s, end_s)
    return tokens, end_s - begin_s


def _tokens_between(ask: Ask, seen: Seen, begin_s: float, end_s: float) -> int:
    first_s = seen.first_s
    prompt = ask.prompt_tokens if first_s is not None and begin_s <= first_s <= end_s else 0
    return prompt + sum(count for at_s, count in seen.tokens if begin_s <= at_s <= end_s)


def jain(values: Iterable[float]) -> float:
    """(Σx)² / (n Σx²): 1 when all are equal, 1/n when one has everything."""
    x = list(values)
    return sum(x) ** 2 / (len(x) * sum(v * v for v in x)) if any(x) else float("nan")


def backlog_figures(outcome: Outcome) -> tuple[Figures, list[Bar]]:
    """Equal tokens for all, whatever they ask for."""
    tokens, lasted_s = served_tokens(outcome)
    figures = _common(outcome) | {"jain": jain(tokens.values()), "lasted_s": lasted_s, "tokens": tokens}
    return figures, [("jain", ">=", 0.98), ("failed", "<=", 0), ("past_the_batcher", "<=", 0)]


def weights_figures(outcome: Outcome) -> tuple[Figures, list[Bar]]:
    """Tokens in the proportion of the weights: the worst tenant's distance from its share."""
    tokens, lasted_s = served_tokens(outcome)
    shares: dict[str, float] = {"one": 1.0, "two": 2.0, "four": 4.0}
    total, weight = sum(tokens.values()), sum(shares.values())
    off = {
        t: tokens[t] / (total * share / weight) - 1 if total else float("nan") for t, share in shares.items()
    }
    figures = _common(outcome) | {
        "off_share_max": max(abs(value) for value in off.values()),
        "lasted_s": lasted_s,
        "tokens": tokens,
        "off_share": off,
    }
    return figures, [("off_share_max", "<=", 0.03), ("failed", "<=", 0), ("past_the_batcher", "<=", 0)]


FLOOD_PLACES = Places(workers=8, step_ms=100.0)
FLOOD_TOKENS = (4, 12)
"""From and to; with one length for all, sequences that began together would free their places together."""
FLOOD_PROMPT = 64
PACE_JITTER = 0.2
FLOOD_SETTLE_S = 2.0
"""At the beginning of each half, not counted."""


def flood(half_s: float = 15.0) -> Case:
    """Nine tenants at half their share; in the second half the tenth asks for ten times its own.

    The nine are evenly paced, so that none is above its share for a moment; the flood is random.
    """
    places = FLOOD_PLACES
    # A token a step, and one step more: a place that falls free is taken when the next has begun.
    request_s = (sum(FLOOD_TOKENS) / 2 + 1) * places.step_ms / 1e3
    share_per_s = places.count / request_s / len(TENANTS)
    rng = random.Random(0)
    asks: list[Ask] = []
    for tenant in TENANTS[:-1]:
        times = paced(share_per_s / 2, 2 * half_s, rng)
        asks += [_of_flood(due_s, tenant, rng) for due_s in times]
    times = poisson(share_per_s * 10, round(share_per_s * 10 * half_s), rng)
    asks += [_of_flood(half_s + due_s, TENANTS[-1], rng) for due_s in times]
    facts = {"places": places.count, "share_per_s": share_per_s, "half_s": half_s}
    return Case("flood", places.setup(), asks, (half_s, 2 * half_s), dict(facts))


def paced(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Arrival times from a random beginning on; gaps vary by `PACE_JITTER` around `1 / rate`."""
    times, due_s = [], rng.random() / rate
    while due_s < seconds:
        times.append(due_s)
        due_s += rng.uniform(1 - PACE_JITTER, 1 + PACE_JITTER) / rate
    return times


def _of_flood(due_s: float, tenant: str, rng: random.Random) -> Ask:
    return Ask(due_s, tenant, STANDARD, FLOOD_PROMPT, rng.randint(*FLOOD_TOKENS))


def flood_figures(outcome: Outcome) -> tuple[Figures, list[Bar]]:
    """What the flood does to the first token of those who keep to their share."""
    half_s = outcome.window[0]
    calm = _ttft_ms(outcome, FLOOD_SETTLE_S, half_s)
    flooded = _ttft_ms(outcome, half_s + FLOOD_SETTLE_S, 2 * half_s)
    allowed_ms = calm.p99 * 1.2 + FLOOD_PLACES.step_ms
    figures = _common(outcome) | {
        "calm_p50_ms": calm.p50,
        "calm_p99_ms": calm.p99,
        "flooded_p50_ms": flooded.p50,
        "flooded_p99_ms": flooded.p99,
        "allowed_p99_ms": allowed_ms,
    }
    return figures, [("flooded_p99_ms", "<=", allowed_ms), ("failed", "<=", 0), ("past_the_batcher", "<=", 0)]


def _ttft_ms(outcome: Outcome, begin_s: float, end_s: float) -> Spread:
    spread = Spread.of(_first_tokens_ms(outcome.asks, outcome.seen, begin_s, end_s))
    if spread is None:
        raise SystemExit("bench: no request was sent in the time that is measured")
    return spread


def _first_tokens_ms(asks: Sequence[Ask], seen: Sequence[Seen], begin_s: float, end_s: float) -> list[float]:
    """Of the nine, from when a request was due; one that got nothing counts to its end."""
    return [
        ((one.first_s if one.first_s is not None else one.ended_s) - ask.due_s) * 1e3
        for ask, one in zip(asks, seen, strict=True)
        if ask.tenant != TENANTS[-1] and begin_s <= ask.due_s < end_s
    ]


def _common(outcome: Outcome) -> Figures:
    return {
        "requests": len(outcome.asks),
        "failed": sum(bool(seen.error) for seen in outcome.seen),
        "past_the_batcher": outcome.bypassed,
        "foreign_cores": outcome.foreign_cores,
    }
