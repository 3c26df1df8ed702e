"""The workers as this replica knows them: what each reported, less what was sent there since.

It decides who can take a request now, and who of those is least loaded. It must not know who waits.
A lease is deducted from its worker's report until a report lists the request; after that the worker
counts it itself. Each model's open workers are one sorted list, so a choice costs the same with three
workers and with three hundred.

What workers say they computed for each tenant is passed on as `Charge`s: what is new since the report
before, less what was charged when its requests ended. The first report of a process is where its
account begins, for it may be older than this replica.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from services.batcher.core.entry import Entry
from services.batcher.core.load import Load
from services.batcher.core.messages import (
    PREFIX_TOKENS,
    PRIORITY_DEFAULT,
    PRIORITY_LAST,
    LoadReport,
    ModelNews,
    Served,
    Usage,
)
from services.batcher.core.pool import Pool

ACCOUNTS_MAX = 65_536
"""(model, tenant, band) triples remembered for one worker, ten times what it reports at once."""


class Charge(NamedTuple):
    """Tokens that a worker computed for a tenant since its last report."""

    model: str
    band: int
    tenant: str
    prompt_tokens: int
    generated_tokens: int


class Worker:
    """One endpoint. It can be chosen while its stream is open, its reports are fresh and it takes work."""

    __slots__ = (
        "accounts",
        "active",
        "boot_id",
        "connected",
        "draining",
        "endpoint",
        "free_memory_bytes",
        "index",
        "last_used",
        "leases",
        "loads",
        "loads_on_demand",
        "memory_budget_bytes",
        "reported_at",
        "stale",
        "unlisted",
        "watched",
    )

    def __init__(self, endpoint: str, index: int) -> None:
        self.endpoint = endpoint
        self.index = index
        self.connected = False
        self.stale = True
        """Also until the first report."""
        self.draining = False
        self.boot_id = ""
        self.reported_at = 0.0
        self.loads: dict[str, Load] = {}
        self.active: tuple[str, ...] = ()
        self.unlisted: dict[int, Entry] = {}
        """Leases that no report has listed yet, by ticket."""
        self.leases = 0
        self.last_used = 0
        self.memory_budget_bytes = 0
        """For all its models together; 0: not bounded, or not told."""
        self.free_memory_bytes = 0
        self.loads_on_demand = False
        self.watched = False
        """A timer looks after its silence."""
        self.accounts: dict[tuple[str, str, int], tuple[int, int]] | None = None
        """Tokens computed since its boot and charged, by (model, tenant, priority); None until it said
        so once."""

    @property
    def alive(self) -> bool:
        """Its stream is open and its reports are fresh."""
        return self.connected and not self.stale

    @property
    def usable(self) -> bool:
        return self.connected and not self.stale and not self.draining

    @property
    def state(self) -> str:
        """One word for people: lost, stale, draining or alive."""
        if not self.connected:
            return "lost"
        if self.stale:
            return "stale"
        return "draining" if self.draining else "alive"


class Fleet:
    """All workers, and the pool of each model. Methods return the models whose capacity may have changed."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.pools: dict[str, Pool] = {}
        self._indices = 0
        self._uses = 0

    def pool(self, model: str, now: float) -> Pool:
        """The model's pool; an empty one that is hopeless from now on when nobody knows the model."""
        pool = self.pools.get(model)
        if pool is None:
            pool = self.pools[model] = Pool(model, now)
        return pool

    def forget_pool(self, model: str) -> None:
        """Drop a pool that no worker is in."""
        pool = self.pools.get(model)
        if pool is not None and not pool.loads:
            del self.pools[model]

    # Workers come, report and go.

    def found(self, endpoint: str) -> None:
        """The worker exists; it can be chosen after its first report."""
        if endpoint not in self.workers:
            self._indices += 1
            self.workers[endpoint] = Worker(endpoint, self._indices)

    def lost(self, worker: Worker, now: float) -> set[str]:
        """The stream broke: nothing it reported counts any more. Its leases end with their own streams."""
        worker.connected = False
        worker.stale = True
        worker.active = ()
        return self._drop_loads(worker, list(worker.loads), now)

    def forget(self, endpoint: str) -> None:
        """The worker, lost before, left the discovered set."""
        worker = self.workers.pop(endpoint, None)
        if worker is not None:
            worker.watched = False

    def reported(self, worker: Worker, report: LoadReport, now: float) -> set[str]:
        """Take in a report. A new boot id means that whatever was sent to the old process is gone."""
        turned = not worker.usable or report.draining
        if worker.boot_id != report.boot_id:
            worker.boot_id = report.boot_id
            worker.unlisted.clear()
            worker.accounts = None
            for old in worker.loads.values():
                old.pool.prefixes.clear(old.holder)
        worker.connected = True
        worker.stale = False
        worker.draining = report.draining
        worker.reported_at = now
        worker.active = report.active_request_ids
        worker.memory_budget_bytes = report.memory_budget_bytes
        worker.free_memory_bytes = report.free_memory_bytes
        worker.loads_on_demand = report.loads_on_demand
        self._settle_leases(worker)
        touched: set[str] = set()
        for model_report in report.models:
            load = worker.loads.get(model_report.version)
            if load is None:
                pool = self.pool(model_report.version, now)
                load = worker.loads[model_report.version] = pool.join(worker, model_report)
            elif not (turned or load.pending or worker.unlisted) and load.stays(model_report, now):
                continue
            load.report = model_report
            self._deduct_again(load)
            load.refresh(now)
            touched.add(model_report.version)
        if len(report.models) != len(worker.loads):
            here = {model_report.version for model_report in report.models}
            touched |= self._drop_loads(worker, [v for v in worker.loads if v not in here], now)
        return touched

    def news(self, worker: Worker, news: Iterable[ModelNews]) -> list[Charge]:
        """Take in what a report, which was taken in before, said of prefixes and tenants."""
        charges: list[Charge] = []
        for each in news:
            load = worker.loads.get(each.version)
            if load is not None and each.prefix is not None:
                load.learn(each.prefix)
            if each.served:
                charges += self._charges(worker, each.version, each.served)
        return charges

    def _charges(self, worker: Worker, version: str, served: Iterable[Served]) -> list[Charge]:
        if worker.accounts is not None and len(worker.accounts) > ACCOUNTS_MAX:
            worker.accounts = None
        begun = worker.accounts is not None
        if worker.accounts is None:
            worker.accounts = {}
        charges: list[Charge] = []
        for line in served:
            if line.priority > PRIORITY_LAST:
                continue
            account = (version, line.tenant, line.priority)
            before = worker.accounts.get(account, (0, 0))
            now = (max(line.prompt_tokens, before[0]), max(line.generated_tokens, before[1]))
            worker.accounts[account] = now
            if begun and now != before:
                band = line.priority or PRIORITY_DEFAULT
                charges.append(Charge(version, band, line.tenant, now[0] - before[0], now[1] - before[1]))
        return charges

    def went_stale(self, worker: Worker, now: float) -> set[str]:
        """Too long without a report."""
        worker.stale = True
        for load in worker.loads.values():
            load.refresh(now)
        return set(worker.loads)

    # Leases.

    def lease(self, entry: Entry, load: Load, matched: int, now: float) -> None:
        """The request goes to this worker, which holds `matched` names of its prefix: deduct it until a
        report lists it.
        """
        request, pool = entry.request, load.pool
        self._uses += 1
        load.worker.last_used = self._uses
        entry.matched = matched
        entry.uncached_tokens = max(request.prompt_tokens - matched * PREFIX_TOKENS, 1)
        entry.first_there = not load.backlog_tokens
        self._attach(entry, load.worker)
        load.deduct(request.prompt_tokens, entry.uncached_tokens, 1)
        load.late += entry.late
        load.note_prompt(pool.pace.work(entry.uncached_tokens, request.prompt_tokens), now)
        pool.pace.sent(entry.uncached_tokens, request.prompt_tokens)
        pool.prefixes.expect(load.holder, request.prefix)
        load.refresh(now)

    def move(self, entry: Entry, served_by: str, now: float) -> set[str]:
        """The proxy had the request served by another worker."""
        touched = self.release(entry, now)
        entry.first_there = False
        worker = self.workers.get(served_by)
        if worker is None:
            return touched
        self._attach(entry, worker)
        if (load := worker.loads.get(entry.request.model)) is not None:
            load.late += entry.late
        entry.matched, entry.uncached_tokens = 0, entry.request.prompt_tokens
        if entry.request.request_id in worker.active:
            del worker.unlisted[entry.ticket]
        elif load is not None:
            load.deduct(entry.request.prompt_tokens, entry.uncached_tokens, 1)
            load.refresh(now)
        return touched

    def release(self, entry: Entry, now: float) -> set[str]:
        """The lease ended or moved. What a report already listed is given back by the next report."""
        worker, entry.worker = entry.worker, None
        if worker is None:
            return set()
        worker.leases -= 1
        unlisted = worker.unlisted.pop(entry.ticket, None) is not None
        load = worker.loads.get(entry.request.model)
        if load is None:
            return set()
        load.late = max(load.late - entry.late, 0)
        load.pool.prefixes.ended(load.holder, entry.request.prefix)
        if not unlisted:
            return set()
        load.deduct(entry.request.prompt_tokens, entry.uncached_tokens, -1)
        load.refresh(now)
        return {entry.request.model}

    def answered(self, entry: Entry, now: float) -> None:
        """Its first token came by."""
        entry.answered_at = now
        pool = self.pools.get(entry.request.model)
        if pool is not None and entry.first_there:
            pool.pace.prefilled(entry.uncached_tokens, entry.request.prompt_tokens, now - entry.leased_at)

    def decoded(self, entry: Entry, now: float) -> None:
        """Its last token came by."""
        pool = self.pools.get(entry.request.model)
        if pool is not None and entry.answered_at:
            pool.pace.decoded(now - entry.answered_at)

    def settle(self, entry: Entry, usage: Usage | None) -> None:
        """What a request cost is known, and charged to its tenant, before its worker's reports say so."""
        worker, request = entry.worker, entry.request
        if usage is None or worker is None:
            return
        if worker.accounts is not None:
            account = (request.model, request.tenant, request.priority)
            prompt_tokens, generated_tokens = worker.accounts.get(account, (0, 0))
            computed = usage.prompt_tokens - usage.cached_prompt_tokens
            worker.accounts[account] = (prompt_tokens + computed, generated_tokens + usage.completion_tokens)
        load = worker.loads.get(request.model)
        held = usage.cached_prompt_tokens // PREFIX_TOKENS
        if load is not None and held < entry.matched and not load.holder.tells:
            load.pool.prefixes.evicted(load.holder, request.prefix[held : entry.matched])

    def _attach(self, entry: Entry, worker: Worker) -> None:
        entry.worker = worker
        worker.leases += 1
        worker.unlisted[entry.ticket] = entry

    def _settle_leases(self, worker: Worker) -> None:
        if worker.unlisted:
            active = frozenset(worker.active)
            for ticket, entry in list(worker.unlisted.items()):
                if entry.request.request_id in active:
                    del worker.unlisted[ticket]

    def _deduct_again(self, load: Load) -> None:
        load.clear_deductions()
        for entry in load.worker.unlisted.values():
            if entry.request.model == load.pool.model:
                load.deduct(entry.request.prompt_tokens, entry.uncached_tokens, 1)

    def _drop_loads(self, worker: Worker, versions: Iterable[str], now: float) -> set[str]:
        touched: set[str] = set()
        for version in versions:
            worker.loads.pop(version).drop(now)
            touched.add(version)
            if worker.connected and worker.accounts:
                # Unloaded: should it be loaded again, its account begins at nothing.
                worker.accounts = {key: said for key, said in worker.accounts.items() if key[0] != version}
        return touched
