"""An engine driven in this process: so many sequences always in flight, each step's time noted.

TTFT counts from `submit` to the end
of the step that gave the first token, so what a front, a socket and a gateway add is absent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from services.worker.bench.account import Account, Around
from services.worker.protocol import Output, Sampling, Step, Submit
from tokenloom.bench.prompts import Item
from tokenloom.bench.stats import Record, Run, Steps

STILL_STEPS_MAX = 1000
"""Steps in a row without an output and without computed tokens: the engine hangs."""

Maker = Callable[[Item, int], list[int]]
OnEnd = Callable[[int, int], None]
"""Told how many sequences have ended, and the tokens of all of them."""


class Stuck(RuntimeError):
    """The engine has sequences and does not go on: its defect."""


class EngineLike(Protocol):
    """What a bench needs of an engine."""

    @property
    def idle(self) -> bool: ...

    @property
    def parts_ns(self) -> dict[str, int]: ...

    def submit(self, command: Submit) -> Output | None: ...

    def step(self) -> Step: ...


class Driver:
    """One level on one engine."""

    def __init__(
        self, engine: EngineLike, make: Maker, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._engine = engine
        self._make = make
        self._clock = clock
        self._live: dict[str, Record] = {}
        self._submitted = 0
        self._context = 0
        """Tokens of the sequences that have begun to answer, prompts included."""

    def run(
        self, items: Sequence[Item], concurrency: int, seed: int, on_end: OnEnd = lambda *_: None,
        decode_context: int | None = None,
    ) -> tuple[list[Record], Run, Steps]:  # fmt: skip
        """All items, `concurrency` at once; steps at `decode_context` also by themselves. Raises Stuck."""
        commands = [self._command(item, self._make(item, seed)) for item in items]
        records = [Record(wanted_tokens=item.output_tokens) for item in items]
        rest = iter(zip(commands, records, strict=True))
        full = min(concurrency, len(items))
        account = Account(None if decode_context is None else Around(decode_context, full))
        ended, tokens, still = 0, 0, 0
        at_first = after = dict(self._engine.parts_ns)
        now_s = self._clock()
        while ended < len(items):
            while len(self._live) < concurrency and (pair := next(rest, None)) is not None:
                ended += self._submit(*pair)
            # From the end of one step to the end of the next: with a thread that computes, both overlap.
            began_s, step, now_s = now_s, self._engine.step(), self._clock()
            before, after = after, dict(self._engine.parts_ns)
            context = self._context
            decodes, closed = self._take(step.outputs, now_s, account)
            if step.step_tokens:
                account.note(now_s - began_s, step.step_tokens, decodes, context, before, after)
            still = 0 if step.outputs or step.step_tokens else still + 1
            if still > STILL_STEPS_MAX:
                raise Stuck(f"{STILL_STEPS_MAX} steps did nothing, and {len(self._live)} sequences wait")
            if closed:
                ended += len(closed)
                tokens += sum(record.output_tokens for record in closed)
                on_end(ended, tokens)
        self._drain()
        account.parts_ns = {name: ns - at_first.get(name, 0) for name, ns in self._engine.parts_ns.items()}
        return records, Run(concurrency), account.steps()

    def _drain(self) -> None:
        """Steps that were begun for sequences which have ended meanwhile."""
        for _ in range(STILL_STEPS_MAX):
            if self._engine.idle:
                return
            self._engine.step()
        raise Stuck("all sequences have ended, and the engine goes on")

    def _command(self, item: Item, prompt: list[int]) -> Submit:
        self._submitted += 1
        length = item.output_tokens
        greedy = Sampling(temperature=0.0)
        return Submit(f"bench-{self._submitted}", prompt, [], length, length, [], greedy)

    def _submit(self, command: Submit, record: Record) -> int:
        """1 when the sequence was refused and has ended already."""
        record.due_s = self._clock()
        record.prompt_tokens = len(command.prompt)
        refused = self._engine.submit(command)
        if refused is None:
            self._live[command.id] = record
            return 0
        record.ended_s = self._clock()
        record.error = (refused.error or refused.finish or "refused").upper().replace(" ", "_")
        return 1

    def _take(self, outputs: Sequence[Output], now_s: float, account: Account) -> tuple[int, list[Record]]:
        """Books a step's outputs: how many went on from an earlier token, and which have ended."""
        decodes, closed = 0, []
        for output in outputs:
            record = self._live.get(output.id)
            if record is None:
                continue
            decodes += bool(record.pieces_s)
            if output.tokens:
                self._context += (
                    len(output.tokens) if record.pieces_s else record.prompt_tokens + len(output.tokens)
                )
                record.pieces_s.append(now_s)
                record.output_tokens += len(output.tokens)
            record.cached_prompt_tokens = max(record.cached_prompt_tokens, output.cached_prompt_tokens)
            if output.finish:
                record.ended_s = now_s
                record.error = output.error.upper().replace(" ", "_") if output.finish == "error" else ""
                account.preemptions += output.preemptions
                self._context -= record.prompt_tokens + record.output_tokens if record.pieces_s else 0
                closed.append(self._live.pop(output.id))
        return decodes, closed
