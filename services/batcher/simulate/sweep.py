"""All runs of a comparison, over policies and rates, spread over processes, and the answer they add up to.

A run is determined by its policy, rate and seed: it draws from nothing else. Each process reads the
trace once. Bound: `processes`; a search ends after a bounded number of halvings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from random import Random

import msgspec

from services.batcher.core.messages import Limits
from services.batcher.settings import BatcherSettings
from services.batcher.simulate.bound import Bound
from services.batcher.simulate.law import Profile
from services.batcher.simulate.mesh import Mesh
from services.batcher.simulate.metrics import Result, Slo, summarise
from services.batcher.simulate.policies import POLICIES
from services.batcher.simulate.search import RateSearch
from services.batcher.simulate.trace import Recorded, at_rate, recorded
from tokenloom.bench.traces import REQUESTS_MAX, TraceError, read
from tokenloom.kit.settings import load_settings

GOOD_SHARE_MIN = 0.9
"""What R90 asks for."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be run."""

    trace: str
    """A path."""
    profile: Profile
    workers: int
    policies: tuple[str, ...]
    rates: tuple[float, ...]
    seed: int
    slo: Slo
    search: bool
    """Find R90 of each policy too."""
    limits: Limits
    """Of our core."""


class BoundAt(msgspec.Struct, frozen=True):
    """What no policy exceeds at one rate."""

    good_share: float
    goodput: float


class PolicyResults(msgspec.Struct, frozen=True):
    """One policy: `r90` is None when it was not asked for."""

    r90: float | None
    rates: dict[str, Result]


class BoundResults(msgspec.Struct, frozen=True):
    """The bound, at every rate that was run."""

    r90: float | None
    rates: dict[str, BoundAt]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """All that came of a comparison."""

    trace: str
    workers: int
    profile: Profile
    seed: int
    slo: Slo
    policies: dict[str, PolicyResults]
    bound: BoundResults


def default_limits() -> Limits:
    """Those of a batcher with the settings of this process's environment."""
    return load_settings(BatcherSettings).limits()


class Runner:
    """Makes single runs; the trace is read once."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison
        self._trace = _read(comparison)

    def run(self, policy: str, rate: float) -> Result:
        """One policy at one rate."""
        of = self._comparison
        begun = time.monotonic()
        arrivals = at_rate(self._trace, rate, of.seed)
        chosen = POLICIES[policy](of.workers, of.profile, of.limits, Random(of.seed))
        record = Mesh(arrivals, chosen, of.profile, of.workers, of.slo.ttft_s).run()
        return summarise(policy, rate, arrivals, record, of.profile, of.slo, time.monotonic() - begun)

    def bound(self, rate: float) -> BoundAt:
        """What no policy exceeds at this rate."""
        of = self._comparison
        arrivals = at_rate(self._trace, rate, of.seed)
        bound = Bound(arrivals, of.profile, of.workers, of.slo)
        return BoundAt(bound.good_share(), bound.good_max() / max(arrivals[-1].at, 1e-9))

    def bound_r90(self) -> float:
        """The highest rate at which the bound allows what R90 asks for."""
        search = RateSearch(GOOD_SHARE_MIN)
        while rates := search.next_rates(1):
            search.note(rates[0], self.bound(rates[0]).good_share)
        return search.best


def compare(comparison: Comparison, processes: int, seen: Callable[[Result], None]) -> Outcome:
    """Run it all; `seen` is called in this process with each result as it comes."""
    results = {policy: dict[str, Result]() for policy in comparison.policies}
    searches = {policy: RateSearch(GOOD_SHARE_MIN) for policy in comparison.policies}
    together = max(1, processes // len(comparison.policies))
    pending: dict[Future[Result], str] = {}
    with ProcessPoolExecutor(processes, get_context("spawn"), _prepare, (comparison,)) as pool:

        def submit(policy: str, rates: tuple[float, ...] | list[float]) -> None:
            for rate in rates:
                pending[pool.submit(_run, policy, rate)] = policy

        for policy in comparison.policies:
            submit(policy, comparison.rates or searches[policy].next_rates(together))
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                policy, result = pending.pop(future), future.result()
                results[policy][str(float(result.rate))] = result
                searches[policy].note(result.rate, result.good_share)
                seen(result)
                if comparison.search and policy not in pending.values():
                    submit(policy, searches[policy].next_rates(together))
    return _outcome(comparison, results, searches)


def _outcome(
    comparison: Comparison, results: dict[str, dict[str, Result]], searches: dict[str, RateSearch]
) -> Outcome:
    runner = Runner(comparison)
    rates = sorted({result.rate for by_rate in results.values() for result in by_rate.values()})
    return Outcome(
        trace=Path(comparison.trace).name,
        workers=comparison.workers,
        profile=comparison.profile,
        seed=comparison.seed,
        slo=comparison.slo,
        policies={
            policy: PolicyResults(
                searches[policy].best if comparison.search else None,
                dict(sorted(by_rate.items(), key=lambda item: item[1].rate)),
            )
            for policy, by_rate in results.items()
        },
        bound=BoundResults(
            runner.bound_r90() if comparison.search else None,
            {str(float(rate)): runner.bound(rate) for rate in rates},
        ),
    )


def _read(comparison: Comparison) -> list[Recorded]:
    """Raises OSError, and TraceError for lines that are no requests or never fit into a worker."""
    with open(comparison.trace, "rb") as lines:
        trace = recorded(read(lines, REQUESTS_MAX))
    longest = max(each.prompt_tokens + each.output_tokens for each in trace)
    if longest > comparison.profile.kv_tokens - comparison.profile.block_tokens:
        raise TraceError(f"a request of {longest:,} tokens never fits into a worker's KV cache")
    return trace


# Inside a process of the pool.

_runner: list[Runner] = []


def _prepare(comparison: Comparison) -> None:
    _runner.append(Runner(comparison))


def _run(policy: str, rate: float) -> Result:
    return _runner[-1].run(policy, rate)
