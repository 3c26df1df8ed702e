"""The most requests that any policy could serve in time: a relaxation, so surely a bound.

Take a window of arrivals [t, t + L) and ask which of them are good at the end. A good request has its
prompt computed by t + L + ttft_slo, and all its tokens by t + L + ttft_slo + itl_slo * (n - 1). So a set
of good requests is possible only if what it needs at the least fits into the seconds that all workers
together have until t + L + ttft_slo + D, where only answers with itl_slo * (n - 1) <= D count. Needed
at the least are:

- for each token, prompt or answer, `token_s`, and its share of `fixed_s` in a step as full as steps get
  (`max(weights_s, tokens * token_s)` is never less than `tokens * token_s`);
- for a prompt, the pairs that attention computes, which do not depend on how it is cut, and one row;
- for each token of an answer after the first, reading its own context, and one row;
- each whole block of a prompt once in the whole fleet, as if all workers had one cache that forgets
  nothing: its cost is shared evenly by the requests in reach that have it, which is the least that any
  subset of them pays together. A block that an earlier request had already costs nothing.

Seconds of workers are pooled and divisible, the future is known, and only the cheapest requests are
served. So at least `count - cheapest that fit` requests of each window fail, whatever the policy does.
Windows of one length share no request: their failures add up. The bound takes the worst of all lengths L
and delays D. What it leaves out: steps that are not full, the memory, and that a worker is one machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.batcher.simulate.kv import PAGE_TOKENS
from services.batcher.simulate.law import Profile
from services.batcher.simulate.metrics import Slo, in_reach
from services.batcher.simulate.trace import Arrival

WINDOWS_S = (1e9, 300.0, 100.0, 30.0, 10.0, 3.0)
"""Lengths of windows; the first is all in one."""
DELAYS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.06, 0.0)
"""How much longer than their prompts answers may take to be counted: parts of the longest answer's time."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Bound:
    """Of one run's requests on a fleet."""

    def __init__(self, arrivals: Sequence[Arrival], profile: Profile, workers: int, slo: Slo) -> None:
        self._workers, self._slo = workers, slo
        self._at: Floats = np.array([each.at for each in arrivals], dtype=np.float64)
        self._reach = np.zeros(len(arrivals), dtype=bool)
        self._reach[in_reach(arrivals, profile, slo)] = True
        gaps = np.array([each.output_tokens - 1 for each in arrivals], dtype=np.float64)
        prompts = np.array([each.prompt_tokens for each in arrivals], dtype=np.float64)
        pages = np.array([len(each.prefix) for each in arrivals], dtype=np.int64)
        token_s = profile.token_s + profile.fixed_s / profile.step_tokens_max
        tails = prompts - pages * PAGE_TOKENS
        pairs = tails * (pages * PAGE_TOKENS + tails / 2)
        self._tail_s: Floats = tails * token_s + pairs * profile.pair_s + profile.sequence_s
        contexts = gaps * prompts + gaps * (gaps + 1) / 2
        self._answer_s: Floats = gaps * (token_s + profile.sequence_s) + contexts * profile.kv_s
        self._answer_takes_s: Floats = gaps * slo.itl_s
        self._owner: Ints = np.repeat(np.arange(len(arrivals), dtype=np.int64), pages)
        names = np.array([page for each in arrivals for page in each.prefix], dtype=np.uint64)
        self._page: Ints = np.unique(names, return_inverse=True)[1].astype(np.int64)
        depth = np.arange(len(self._owner), dtype=np.float64) - np.repeat(np.cumsum(pages) - pages, pages)
        page_pairs = PAGE_TOKENS * (depth * PAGE_TOKENS + PAGE_TOKENS / 2)
        self._page_s: Floats = PAGE_TOKENS * token_s + page_pairs * profile.pair_s

    def good_max(self) -> int:
        """No policy has more good requests than this."""
        in_all = int(self._reach.sum())
        return in_all - max((self._failures(length) for length in WINDOWS_S), default=0)

    def good_share(self) -> float:
        """The same as a share of the requests in reach; 1 when there are none."""
        in_all = int(self._reach.sum())
        return self.good_max() / in_all if in_all else 1.0

    def _failures(self, length_s: float) -> int:
        """Requests that fail at the least, with windows of this length; of all delays the worst."""
        window = np.floor(self._at / length_s).astype(np.int64)
        prompt_s = self._tail_s + self._pages_s(window)
        order = np.argsort(window, kind="stable")
        order = order[self._reach[order]]
        cuts = np.flatnonzero(np.diff(window[order])) + 1
        groups = np.split(order, cuts)
        worst = 0
        longest_s = float(self._answer_takes_s.max(initial=0.0))
        for delay_s in (part * longest_s for part in DELAYS):
            needed = prompt_s + np.where(self._answer_takes_s <= delay_s, self._answer_s, 0.0)
            span_s = min(length_s, float(self._at[-1])) if len(self._at) else 0.0
            capacity_s = self._workers * (span_s + self._slo.ttft_s + delay_s)
            worst = max(worst, sum(_left_over(needed[group], capacity_s) for group in groups))
        return worst

    def _pages_s(self, window: Ints) -> Floats:
        """What each request pays for the whole blocks of its prompt that are new in its window."""
        count = int(self._page.max()) + 1 if len(self._page) else 0
        first = np.full(count, np.iinfo(np.int64).max, dtype=np.int64)
        np.minimum.at(first, self._page, window[self._owner])
        paid = self._reach[self._owner] & (window[self._owner] == first[self._page])
        payers = np.bincount(self._page[paid], minlength=count)
        shares = self._page_s[paid] / payers[self._page[paid]]
        paid_s: Floats = np.zeros(len(self._at))
        np.add.at(paid_s, self._owner[paid], shares)
        return paid_s


def _left_over(needed: Floats, capacity_s: float) -> int:
    """How many do not fit when the cheapest go first."""
    return len(needed) - int(np.searchsorted(np.cumsum(np.sort(needed)), capacity_s, side="right"))
