"""A worker's load report in the core's words, and when the next one is due.

Reports leave on a change, `REPORT_INTERVAL_S` apart at least, and `HEARTBEAT_S` apart at most, much as
those of a real worker do. Between two changes of who runs, blocks fill with every step; that alone sends no
report before the heartbeat.
"""

from __future__ import annotations

from services.batcher.core.messages import (
    LoadReport,
    ModelNews,
    ModelReport,
    ModelState,
    PrefixChanges,
    Served,
)
from services.batcher.simulate.worker import Worker

REPORT_INTERVAL_S = 0.02
HEARTBEAT_S = 0.08
SERVED_INTERVAL_S = 0.25
"""Between two reports of what was computed for whom."""

MODEL = "sha256:" + "5" * 64
TENANT = "trace"
PRIORITY = 2


class Reporter:
    """Makes the reports of one worker."""

    def __init__(self, worker: Worker, index: int, names: list[str]) -> None:
        """`names` are the request ids by number."""
        self._worker = worker
        self._boot_id = f"boot-{index}"
        self._names = names
        self._whole = True
        self._served_due = 0.0
        self._served: Served | None = None

    def report(self, now: float) -> LoadReport:
        """What the worker would say now."""
        worker = self._worker
        worker.observe(now)
        names = self._names
        return LoadReport(
            boot_id=self._boot_id,
            draining=False,
            models=(self._model(worker),),
            active_request_ids=tuple([names[sequence.number] for sequence in worker.sequences()]),
            news=self._news(now),
        )

    def _model(self, worker: Worker) -> ModelReport:
        profile, waiting, running = worker.profile, len(worker.waiting), worker.running
        return ModelReport(
            version=MODEL,
            state=ModelState.READY,
            progress=1.0,
            free_sequences=max(0, profile.sequences_max - running - waiting),
            free_blocks=max(0, worker.kv.free - worker.promised_blocks),
            block_tokens=profile.block_tokens,
            total_blocks=profile.total_blocks,
            running=running,
            waiting=waiting,
            queued_prefill_tokens=worker.prefill_left,
            prefill_tokens_per_s=worker.speeds.prefill_tokens_per_s,
            sequences_max=profile.sequences_max,
            decode_tokens_per_s=worker.speeds.decode_tokens_per_s,
            step_tokens_max=profile.step_tokens_max,
            prefix_queried_tokens=worker.prompt_tokens,
            prefix_hit_tokens=worker.hit_tokens,
        )

    def _news(self, now: float) -> tuple[ModelNews, ...]:
        came, went = self._worker.kv.changes()
        whole, self._whole = self._whole, False
        prefix = PrefixChanges(whole, came, went) if came or went or whole else None
        served = self._served_now(now)
        return (ModelNews(MODEL, prefix, served),) if prefix or served else ()

    def _served_now(self, now: float) -> tuple[Served, ...]:
        if now < self._served_due:
            return ()
        served = Served(TENANT, PRIORITY, self._worker.computed_prompt_tokens, self._worker.generated_tokens)
        if served == self._served:
            return ()
        self._served, self._served_due = served, now + SERVED_INTERVAL_S
        return (served,)
