"""One output of a request, from the worker's messages to what its caller is shown.

Decides which tokens count, which text may go out, and when the output ends. Survives a change of
worker: it never learns that there was one, for the journal lets each token in once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.core.detokenise import Detokeniser
from services.gateway.core.journal import Journal
from services.gateway.core.request import Finish
from services.gateway.core.stops import StopScanner


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Natural logarithms at one position; `top` is sorted, most likely first."""

    chosen: float
    top_ids: tuple[int, ...]
    top: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class WorkerFinish:
    """The worker's last word on an output."""

    reason: Finish
    stop_token_id: int | None = None
    waiting_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0


@dataclass(slots=True)
class WorkerMessage:
    """One step's news of one output. `index` is the position of `token_ids[0]`."""

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[PositionLogprobs]
    finish: WorkerFinish | None
    worker: str | None
    """Set in the first message of an attempt only."""
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class End:
    """How an output ended."""

    reason: Finish
    matched_stop: str | None = None
    stop_token_id: int | None = None


@dataclass(slots=True)
class Event:
    """What one step lets the caller see of one output."""

    choice: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[PositionLogprobs]
    end: End | None


@dataclass(frozen=True, slots=True)
class ChoiceRules:
    """When an output ends and what its text leaves out."""

    max_new_tokens: int
    min_new_tokens: int
    stop_token_ids: frozenset[int]
    include_stop: bool


class Choice:
    """The state of one output."""

    def __init__(
        self, index: int, rules: ChoiceRules, detokeniser: Detokeniser, scanner: StopScanner | None
    ) -> None:
        self.index = index
        self.journal = Journal()
        self.end: End | None = None
        self._rules = rules
        self._detokeniser = detokeniser
        self._scanner = scanner

    def take(self, message: WorkerMessage) -> Event | None:
        """What this message shows the caller; None when that is nothing. Sets `end` with the last one.

        Raises TokenGap when tokens are missing before this message.
        """
        known, ids = self.journal.accept(message.index, message.token_ids)
        logprobs = message.logprobs[known:] if known else message.logprobs
        stop_id = self._stop_token(ids, message.finish)
        shown = ids if stop_id is None or self._rules.include_stop else ids[:-1]
        text, matched = self._text_of(shown)
        self.end = self._end_of(matched, stop_id, message.finish)
        if self.end is not None and matched is None and self._scanner is not None:
            text += self._scanner.flush()
        if not (text or ids or self.end):
            return None
        return Event(self.index, text, ids, logprobs, self.end)

    def end_by_journal(self) -> Event | None:
        """The end, when the tokens already say so: the stream broke between them and its last word."""
        tokens, rules = self.journal.tokens, self._rules
        if self.end is None and tokens:
            if self._stops_at(len(tokens), tokens[-1]):
                self.end = End(Finish.STOP, stop_token_id=tokens[-1])
            elif len(tokens) >= rules.max_new_tokens:
                self.end = End(Finish.LENGTH)
        if self.end is None:
            return None
        return Event(self.index, self._scanner.flush() if self._scanner else "", (), (), self.end)

    def _stops_at(self, count: int, token_id: int) -> bool:
        return count > self._rules.min_new_tokens and token_id in self._rules.stop_token_ids

    def _stop_token(self, ids: Sequence[int], finish: WorkerFinish | None) -> int | None:
        """The stop token that ends `ids`, by the worker's word or by the rules."""
        if not ids:
            return None
        if finish is not None and finish.stop_token_id == ids[-1] and finish.reason is Finish.STOP:
            return ids[-1]
        return ids[-1] if self._stops_at(len(self.journal.tokens), ids[-1]) else None

    def _text_of(self, ids: Sequence[int]) -> tuple[str, str | None]:
        """(text that may go out, the stop string that ended it)."""
        if self._scanner is None:
            return self._detokeniser.push(ids) if ids else "", None
        # Text of the first min_new_tokens is not searched: no stop is heeded there.
        before = len(self.journal.tokens) - len(ids)
        free = max(0, min(len(ids), self._rules.min_new_tokens - before))
        unsearched = self._detokeniser.push(ids[:free]) if free else ""
        searched = self._detokeniser.push(ids[free:]) if free < len(ids) else ""
        scan = self._scanner.push(searched)
        return unsearched + scan.text, scan.matched

    def _end_of(self, matched: str | None, stop_id: int | None, finish: WorkerFinish | None) -> End | None:
        if matched is not None:
            return End(Finish.STOP, matched_stop=matched)
        if stop_id is not None:
            return End(Finish.STOP, stop_token_id=stop_id)
        if finish is not None:
            return End(finish.reason)
        if len(self.journal.tokens) >= self._rules.max_new_tokens:
            return End(Finish.LENGTH)
        return None
