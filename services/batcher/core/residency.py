"""Which worker is asked to load a model that is waited for and that nobody has.

A request for such a model waits like any other. Here its model is wanted: one worker is asked to load it,
however many requests wait, and another one when the first cannot. The cost of a worker, in seconds:

- the time to load again what has to leave for it, as far as that is likely to be wanted again: certainly
  when requests for it run or wait, less and less the longer nobody asked for it;
- the wait until what has to leave may, for a worker keeps each model for a while after it was loaded;
- the requests that it serves already, which share its device with the load.

The worker decides what leaves, and refuses what does not fit; this module only foretells it. What a model
takes there is a guess until the worker said it, with a refusal or by having loaded it. A refusal that stands
for good (the model is too large, cannot be run, its files are damaged) is remembered for `VERDICT_KEEP_S`;
when all workers that load on demand have one, those who wait are refused with it. Other refusals are tried
again when the worker says so.

It knows nothing of clocks or calls. Bounds: `wants_max` models that are wanted, and as many whose needs are
known, on the workers that there are; a look every `LOOK_S` at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, inf
from typing import NamedTuple

from services.batcher.core.fleet import Fleet, Worker
from services.batcher.core.load import Load
from services.batcher.core.messages import LoadModel, ModelState, Verdict

LOOK_S = 0.5
"""Between two looks for a worker, at most: memory and new workers are seen this late."""
VERDICT_KEEP_S = 30.0
RETRY_S = 1.0
"""After a refusal without a hint."""
FINAL = frozenset({
    "MODEL_TOO_LARGE", "MODEL_UNSUPPORTED", "MODEL_LOAD_FAILED", "MODEL_NOT_FOUND", "DIGEST_MISMATCH",
    "FIELD_INVALID",
})  # fmt: skip
"""Reasons that the next try would meet again."""
BEGIN_S = 5.0
"""An engine's start, about."""
BYTES_PER_S = 0.5e9
"""Weights from store to device, about."""
RECENT_S = 300.0
"""A model that nobody asked for during this long is wanted again in a third of all cases."""
LEASE_S = 0.05
"""What a request that a worker serves adds to the cost of a load there."""
NEED_SHARE = 1.25
NEED_BYTES = 512 * 1024 * 1024
"""A model takes this share of its weights, and this much beside; only the worker knows it exactly."""
NEED_DIGITS_MAX = 18
"""Of a number of bytes that a worker wrote."""


class Want:
    """A model that somebody waits for and that nobody has, and what workers said about loading it."""

    __slots__ = (
        "endpoint", "hopeful_at", "looked_at", "model", "model_bytes", "refusal", "since", "timed",
        "verdicts", "waits_for",
    )  # fmt: skip

    def __init__(self, model: str, model_bytes: int, now: float) -> None:
        self.model = model
        self.model_bytes = model_bytes
        self.since = now
        """When it began to be waited for."""
        self.endpoint = ""
        """Who was asked to load it and has not answered yet."""
        self.waits_for = ""
        """Whose memory is waited for."""
        self.refusal: Verdict | None = None
        """What all who could have loaded it agreed on at the latest look."""
        self.hopeful_at = -inf
        """When somebody was last loading it, or was going to."""
        self.looked_at = -inf
        self.timed = False
        """A timer looks again."""
        self.verdicts: dict[str, tuple[Verdict, float]] = {}
        """By endpoint, a refusal and until when it stands."""

    @property
    def plausible(self) -> bool:
        """It is being loaded, or will be when there is room."""
        return bool(self.endpoint or self.waits_for)

    def verdict(self, endpoint: str, now: float) -> Verdict | None:
        """What this worker said, while that stands."""
        said = self.verdicts.get(endpoint)
        return said[0] if said is not None and said[1] > now else None


class Outlook(NamedTuple):
    """What loading a model on one worker would take."""

    cost_s: float
    wait_s: float
    """Until enough of what is there may leave."""


class Residency:
    """All models that are wanted."""

    def __init__(self, fleet: Fleet, wants_max: int) -> None:
        self._fleet = fleet
        self._wants_max = wants_max
        self.wants: dict[str, Want] = {}
        self._needs: dict[str, dict[str, int]] = {}
        """By model and endpoint, bytes that the worker reserves for it; what was learned last comes last."""

    def want(self, model: str, model_bytes: int, now: float) -> Want:
        """The model is waited for, and nobody has it or is loading it."""
        want = self.wants.get(model)
        if want is None:
            self._make_room(now)
            want = self.wants[model] = Want(model, model_bytes, now)
        elif want.since == inf:
            want.since = now
        want.model_bytes = max(want.model_bytes, model_bytes)
        return want

    def rest(self, model: str, now: float) -> None:
        """Nobody waits for it, or somebody has it: what workers said is kept as long as it stands."""
        want = self.wants.get(model)
        if want is None or want.endpoint:
            return
        want.since, want.waits_for = inf, ""
        if not want.timed and all(until <= now for _, until in want.verdicts.values()):
            del self.wants[model]

    def seek(self, want: Want, busy: Iterable[str], now: float) -> LoadModel | None:
        """Who is to load it now. None: everybody refused (`want.refusal`), or look again later.

        `busy`: models that somebody waits for.
        """
        want.looked_at, want.waits_for, want.refusal = now, "", None
        candidates = [worker for worker in self._fleet.workers.values() if worker.loads_on_demand]
        candidates = [worker for worker in candidates if worker.usable]
        final: Verdict | None = None
        best, chosen = Outlook(inf, 0.0), ""
        wanted = frozenset(busy)
        for worker in sorted(candidates, key=lambda each: _rank(want.model, each)):
            said = want.verdict(worker.endpoint, now)
            if said is not None:
                final = said if said.reason in FINAL and final is None else final
                want.waits_for = want.waits_for or ("" if said.reason in FINAL else worker.endpoint)
                continue
            there = worker.loads.get(want.model)
            if there is not None and there.report.state is ModelState.DRAINING:
                want.waits_for = want.waits_for or worker.endpoint
                continue
            outlook = outlook_on(worker, self._need_bytes(want, worker), wanted)
            if outlook.cost_s < best.cost_s:
                best, chosen = outlook, worker.endpoint
        if chosen and best.wait_s <= 0:
            want.endpoint, want.waits_for = chosen, ""
            return LoadModel(chosen, want.model)
        want.waits_for = chosen or want.waits_for
        want.refusal = final if not want.waits_for else None
        if want.waits_for:
            want.hopeful_at = now
        return None

    def ended(self, endpoint: str, model: str, verdict: Verdict | None, now: float) -> Want | None:
        """The worker answered: it has the model, or says why not. None for one that was not asked."""
        want = self.wants.get(model)
        if want is None or want.endpoint != endpoint:
            return None
        want.endpoint, want.hopeful_at = "", now
        self._learn(endpoint, model, verdict)
        if verdict is None:
            # Its report says so too, or will before the next look.
            want.looked_at = now
            want.verdicts.pop(endpoint, None)
        else:
            want.looked_at = -inf
            keep_s = VERDICT_KEEP_S if verdict.reason in FINAL else verdict.retry_after_s or RETRY_S
            standing = {at: said for at, said in want.verdicts.items() if said[1] > now}
            want.verdicts = {**standing, endpoint: (verdict, now + keep_s)}
        return want

    def _need_bytes(self, want: Want, worker: Worker) -> float:
        """What this worker said, else what another one said last, else a guess."""
        known = self._needs.get(want.model)
        if not known:
            return guess_bytes(worker, want.model_bytes)
        return known.get(worker.endpoint) or known[next(reversed(known))]

    def _learn(self, endpoint: str, model: str, verdict: Verdict | None) -> None:
        """Remember what the worker reserved for the model, or said that it would."""
        worker = self._fleet.workers.get(endpoint)
        need_bytes = 0
        if verdict is not None:
            said = verdict.metadata.get("needed_bytes", "")
            need_bytes = int(said) if said.isdecimal() and len(said) <= NEED_DIGITS_MAX else 0
        elif worker is not None and (load := worker.loads.get(model)) is not None:
            need_bytes = load.report.memory_bytes
        if worker is None or not need_bytes:
            return
        known = self._needs.pop(model, {})
        others = {w: need for w, need in known.items() if w != endpoint and w in self._fleet.workers}
        self._needs[model] = {**others, endpoint: need_bytes}
        if len(self._needs) > self._wants_max:
            del self._needs[next(iter(self._needs))]

    def _make_room(self, now: float) -> None:
        """Forget the one that was looked at first of those that nobody is loading."""
        if len(self.wants) >= self._wants_max:
            idle = [want for want in self.wants.values() if not want.endpoint]
            if idle:
                del self.wants[min(idle, key=lambda want: (want.since != inf, want.looked_at)).model]


def outlook_on(worker: Worker, need_bytes: float, wanted: frozenset[str]) -> Outlook:
    """What a load would take there; dear where there is no room.

    `wanted`: models that somebody waits for.
    """
    cost_s = LEASE_S * worker.leases
    if not worker.memory_budget_bytes:
        return Outlook(cost_s, 0.0)
    if need_bytes > worker.memory_budget_bytes:
        # No waiting helps. It is asked last of all, at once: it knows better, or says so in figures.
        return Outlook(cost_s + VERDICT_KEEP_S, 0.0)
    missing = need_bytes - worker.free_memory_bytes
    wait_s = 0.0
    for load in sorted(worker.loads.values(), key=_leaves_first):
        if missing <= 0:
            break
        if load.report.state is not ModelState.READY:
            # It is leaving, or coming and then kept: what it holds is not to be had now.
            continue
        missing -= load.report.memory_bytes
        wait_s = max(wait_s, load.report.dwell_left_s)
        cost_s += _again_s(load, wanted)
    if missing > 0:
        # What leaves or comes changes it, and the guess may be too high: the worker is asked last of all.
        leaving = any(load.report.state is not ModelState.READY for load in worker.loads.values())
        return Outlook(cost_s + VERDICT_KEEP_S, LOOK_S if leaving else wait_s)
    return Outlook(cost_s + wait_s, wait_s)


def guess_bytes(worker: Worker, model_bytes: int) -> float:
    """What a model takes, by its weights; without them as much as the largest that is there."""
    if model_bytes:
        return NEED_SHARE * model_bytes + NEED_BYTES
    return max((load.report.memory_bytes for load in worker.loads.values()), default=0)


def _leaves_first(load: Load) -> tuple[float, float]:
    """The worker evicts what may leave, the longest unused first."""
    return load.report.dwell_left_s, -load.report.idle_s


def _again_s(load: Load, wanted: frozenset[str]) -> float:
    """Seconds that it costs to load it again, by how likely that is."""
    reload_s = BEGIN_S + load.report.memory_bytes / BYTES_PER_S
    if load.running or load.pool.model in wanted:
        return reload_s
    return reload_s * exp(-load.report.idle_s / RECENT_S)


def _rank(model: str, worker: Worker) -> tuple[int, int, str]:
    """Among equals the emptiest, and then the same one for every replica, another for each model."""
    return len(worker.loads), sum((model + worker.endpoint).encode()) % 251, worker.endpoint
