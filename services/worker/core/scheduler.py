"""Which tokens the next step computes: decodes first, then chunks of prompts, then new arrivals.

`plan()` books the blocks and the tokens of a step, the caller computes it, `settle()` takes the tokens
that it drew. The next plan may be made before this one is settled: then a decode feeds on a token that
is not known yet. Plans are computed and settled in the order in which they were made; `abandon()` takes
back what was not computed. Blocks that a plan still writes to are handed to nobody before it is settled.

Nothing deadlocks: the sequence of the first rank always goes on, because all others can be pre-empted
for it, and none is accepted that would not fit alone. A pre-empted sequence loses its blocks, keeps its
tokens and its rank, and is computed again, but for those blocks that are still found; it returns only
when there is a spare block for every sequence that runs, so that it is not thrown out again at once.

Bounds: `sequences_max` running, `waiting_max` waiting, `step_tokens_max` tokens a step, PLANS_MAX plans.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from services.worker.core.blocks import BlockPool, blocks_for
from services.worker.core.chunking import Chunking
from services.worker.core.plan import Advance, Chunk, Limits, Plan, Room, Verdict
from services.worker.core.prefix import Content, root, wire_stride
from services.worker.core.pressure import Pressure
from services.worker.core.sequence import Event, Sequence, State

PLANS_MAX = 2
"""Plans that are not settled yet."""

HERE = (State.WAITING, State.RUNNING)


@dataclass(slots=True)
class _Outstanding:
    """A plan that is not settled, and the blocks that are free when it is."""

    plan: Plan
    leaving: list[list[int]] = field(default_factory=list)


class Scheduler:
    """All sequences of one engine. Not thread-safe."""

    def __init__(self, limits: Limits, *, prefix_cache: bool = True, itl_max_ns: int = 0) -> None:
        self.limits = limits
        self._chunking = Chunking(limits.step_tokens_max, itl_max_ns)
        self._prefix_cache = prefix_cache
        self._pool = BlockPool(limits.total_blocks, wire_stride(limits.block_tokens))
        self._pressure = Pressure(limits.step_tokens_max, limits.sequences_max)
        self._sequences: dict[str, Sequence] = {}
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._outstanding: deque[_Outstanding] = deque()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def outstanding(self) -> int:
        """Plans that are not settled."""
        return len(self._outstanding)

    def add(self, sequence: Sequence, now_ns: int) -> Verdict:
        """Queues a sequence unless the verdict says why not."""
        verdict = self._judge(sequence)
        if verdict is Verdict.ACCEPTED:
            self._arrivals += 1
            sequence.arrival = self._arrivals
            sequence.arrived_ns = now_ns
            self._sequences[sequence.id] = sequence
            bisect.insort(self._waiting, sequence, key=_rank)
        return verdict

    def cancel(self, sequence_id: str) -> Sequence | None:
        """Forgets a sequence and frees its blocks; None when it is not here (any more)."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self._leave(sequence, Event.CANCEL)
        return sequence

    def plan(self, now_ns: int) -> Plan:
        """The next step. Empty when no sequence is here, or when all wait for what is not settled yet.

        Raises ValueError when PLANS_MAX plans are not settled.
        """
        if len(self._outstanding) >= PLANS_MAX:
            raise ValueError(f"{PLANS_MAX} plans are not settled")
        most = self._pressure.tokens
        chunks, short = self._decodes(most)
        decodes = len(chunks)
        budget = whole = self._chunking.budget(most - decodes, decodes)
        for sequence in self._running:
            if budget and sequence.pending > 1:
                chunks.append(_book(sequence, budget))
                budget -= chunks[-1].count
        while budget and not short and (admitted := self._admit(now_ns)) is not None:
            chunks.append(_book(admitted, budget))
            budget -= chunks[-1].count
        plan = Plan(chunks, decodes, decodes + whole - budget)
        if plan:
            self._outstanding.append(_Outstanding(plan))
        return plan

    def settle(self, plan: Plan, tokens: Seq[int], now_ns: int) -> list[Advance]:
        """Takes the results of the oldest plan: `tokens` in the order of the chunks that draw.

        Sequences that ended since `plan()` are passed over. Raises ValueError for another plan, or
        another number of tokens.
        """
        drawing = [chunk for chunk in plan.chunks if chunk.draws]
        if len(drawing) != len(tokens):
            raise ValueError(f"{len(drawing)} tokens were to be drawn, {len(tokens)} came")
        if not plan:
            return []
        if not self._outstanding or self._outstanding[0].plan is not plan:
            raise ValueError("only the oldest plan can be settled")
        leaving = self._outstanding.popleft().leaving
        self._pressure.ease()
        for number, chunk in enumerate(plan.chunks):
            sequence = chunk.sequence
            sequence.planned -= 1
            sequence.steps += 1
            sequence.prefilled += chunk.count if number >= plan.decodes else 0
            if self._prefix_cache and sequence.state is State.RUNNING:
                self._keep(sequence, chunk.start + chunk.count)
        advances = []
        for row, chunk in enumerate(drawing):
            chunk.sequence.in_flight -= 1
            if chunk.sequence.state in HERE:
                advances.append(self._advance(chunk.sequence, tokens[row], row, now_ns))
        for blocks in leaving:
            self._pool.release(blocks)
        return advances

    def took(self, plan: Plan, step_ns: int) -> None:
        """How long a settled plan took, for the size of the next ones."""
        self._chunking.note(plan.tokens - plan.decodes, plan.decodes, step_ns)

    def abandon(self, plan: Plan) -> None:
        """Takes back a plan that was not computed, and the one made after it.

        Raises ValueError for a plan that is not outstanding.
        """
        if all(outstanding.plan is not plan for outstanding in self._outstanding):
            raise ValueError("the plan is settled already")
        last = None
        while last is not plan:
            outstanding = self._outstanding.pop()
            last = outstanding.plan
            for chunk in last.chunks:
                chunk.sequence.planned -= 1
                chunk.sequence.in_flight -= int(chunk.draws)
                if chunk.sequence.state is State.RUNNING:
                    chunk.sequence.computed = chunk.start
            for blocks in outstanding.leaving:
                self._give_back(blocks, bool(self._outstanding))

    def out_of_memory(self, plan: Plan) -> Sequence | None:
        """A plan could not be computed for want of memory: takes it back and asks less of the next ones.

        Returns the sequence that cannot run even alone and token by token; it is forgotten.
        """
        self.abandon(plan)
        if not self._pressure.rise(plan.tokens, len(plan.chunks)):
            alone = plan.chunks[0].sequence
            return self.cancel(alone.id) if alone.state in HERE else None
        while len(self._running) > self._pressure.sequences:
            self._preempt(self._running[-1])
        return None

    def room(self) -> Room:
        """What is free, after what the waiting ones will take."""
        running, waiting = len(self._running), len(self._waiting)
        promised = sum(self._blocks_wanted(sequence) + 1 for sequence in self._waiting)
        prefilling = sum(pending for sequence in self._running if (pending := sequence.pending) > 1)
        return Room(
            running=running,
            waiting=waiting,
            free_sequences=max(0, self.limits.sequences_max - running - waiting),
            free_blocks=max(0, self._pool.free + self._coming() - promised),
            queued_prefill_tokens=prefilling + sum(sequence.pending for sequence in self._waiting),
            cached_blocks=self._pool.findable,
        )

    def prefix_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Whole prefixes of 512, 1,024, … tokens that can be found since the last call, and those that no
        longer can, by key; none where blocks are of another size than those that others hash.
        """
        return self._pool.take_changes()

    def _judge(self, sequence: Sequence) -> Verdict:
        length, context = len(sequence.tokens), self.limits.context_length
        if not sequence.tokens:
            return Verdict.EMPTY
        if sequence.prompt_tokens >= context or length > context:
            return Verdict.TOO_LONG
        if sequence.output_tokens >= sequence.max_new_tokens or length == context:
            return Verdict.COMPLETE
        if sequence.id in self._sequences:
            return Verdict.DUPLICATE
        if len(self._waiting) >= self.limits.waiting_max:
            return Verdict.FULL
        return Verdict.ACCEPTED

    def _decodes(self, most: int) -> tuple[list[Chunk], bool]:
        """One chunk for each sequence that decodes, oldest first, and whether blocks were short."""
        chunks: list[Chunk] = []
        rows = self._rows_in_flight()
        before, short = len(self._running), False
        context_length, size = self.limits.context_length, self.limits.block_tokens
        # Once a sequence and step, so without a call where none is needed.
        for sequence in list(self._running):
            if len(chunks) == most:
                break
            in_flight = sequence.in_flight
            length = len(sequence.tokens) + in_flight
            if length - sequence.computed != 1 or sequence.state is not State.RUNNING:
                continue
            if in_flight and sequence.ends_in_flight(context_length):
                continue
            if length <= len(sequence.blocks) * size or self._extend(sequence):
                chunks.append(Chunk(sequence, length - 1, 1, rows[sequence] if in_flight else -1))
                sequence.computed = length
                sequence.planned += 1
                sequence.in_flight = in_flight + 1
            else:
                short = True
        return chunks, short or len(self._running) < before

    def _rows_in_flight(self) -> dict[Sequence, int]:
        if not self._outstanding:
            return {}
        drawing = (chunk.sequence for chunk in self._outstanding[-1].plan.chunks if chunk.draws)
        return {sequence: row for row, sequence in enumerate(drawing)}

    def _extend(self, sequence: Sequence) -> bool:
        """One more block, at the cost of the newest; False when that is itself.

        Also False while blocks come free with the next plan that is settled.
        """
        while not self._pool.free:
            if self._coming():
                return False
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self._pool.take(1)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._leave(victim, Event.PREEMPT)
        victim.computed = victim.kept = 0
        victim.preemptions += 1
        bisect.insort(self._waiting, victim, key=_rank)

    def _admit(self, now_ns: int) -> Sequence | None:
        """The first waiting sequence, with blocks for all it has, if they and a spare one are free."""
        if not self._waiting or len(self._running) >= self._pressure.sequences:
            return None
        sequence = self._waiting[0]
        if sequence.planned:
            return None
        found = self._find(sequence) if self._prefix_cache else []
        wanted = self._blocks_wanted(sequence) - len(found)
        spare = len(self._running) if sequence.preemptions else min(1, len(self._running))
        idle = sum(not self._pool.references(block) for block in found)
        if wanted + spare > self._pool.free - idle:
            return None
        del self._waiting[0]
        sequence.apply(Event.ADMIT)
        self._pool.share(found)
        sequence.blocks = found + self._pool.take(wanted)
        sequence.kept = len(found)
        sequence.computed = len(found) * self.limits.block_tokens
        if not sequence.started_ns:
            sequence.started_ns = now_ns
            sequence.cached = min(sequence.computed, sequence.prompt_tokens)
        bisect.insort(self._running, sequence, key=_rank)
        return sequence

    def _find(self, sequence: Sequence) -> list[int]:
        """The blocks that hold its first tokens already; the last token is always computed."""
        found: list[int] = []
        for number in range((len(sequence.tokens) - 1) // self.limits.block_tokens):
            hit = self._pool.find(self._content(sequence, number))
            if hit is None:
                break
            found.append(hit[0])
            sequence.chain[number] = hit[1]
        return found

    def _keep(self, sequence: Sequence, written: int) -> None:
        """Makes the full blocks among the first `written` tokens findable."""
        while sequence.kept < written // self.limits.block_tokens:
            number = sequence.kept
            content = self._content(sequence, number)
            sequence.chain[number] = self._pool.note(sequence.blocks[number], content)
            sequence.kept += 1

    def _content(self, sequence: Sequence, number: int) -> Content:
        """What its block `number` holds when it is full; hashed once, when those before it were."""
        chain, size = sequence.chain, self.limits.block_tokens
        if number == len(chain):
            parent = chain[-1] if chain else root(sequence.prefix_root)
            chain.append(parent.then(sequence.tokens[number * size : (number + 1) * size]))
        return chain[number]

    def _advance(self, sequence: Sequence, token: int, row: int, now_ns: int) -> Advance:
        index = sequence.output_tokens
        sequence.tokens.append(token)
        sequence.first_token_ns = sequence.first_token_ns or now_ns
        finish = sequence.finish_after(token, self.limits.context_length)
        if finish is not None:
            del self._sequences[sequence.id]
            self._leave(sequence, Event.FINISH)
        return Advance(sequence, token, index, finish, row)

    def _leave(self, sequence: Sequence, event: Event) -> None:
        (self._running if sequence.state is State.RUNNING else self._waiting).remove(sequence)
        self._give_back(sequence.blocks, sequence.planned > 0)
        sequence.blocks = []
        sequence.apply(event)

    def _give_back(self, blocks: list[int], in_use: bool) -> None:
        """Frees blocks, those that a plan may still write to only when the last plan is settled."""
        if in_use:
            self._outstanding[-1].leaving.append(blocks)
        else:
            self._pool.release(blocks)

    def _coming(self) -> int:
        """Blocks that are free once all plans are settled."""
        leaving = (blocks for outstanding in self._outstanding for blocks in outstanding.leaving)
        return sum(self._pool.references(block) == 1 for blocks in leaving for block in blocks)

    def _blocks_wanted(self, sequence: Sequence) -> int:
        return blocks_for(sequence.length, self.limits.block_tokens)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _book(sequence: Sequence, budget: int) -> Chunk:
    """The next tokens of a prompt, at most `budget`, as computed from now on."""
    chunk = Chunk(sequence, sequence.computed, min(sequence.pending, budget))
    sequence.computed += chunk.count
    sequence.planned += 1
    sequence.in_flight += int(chunk.draws)
    return chunk
