"""One worker in virtual time: continuous batching, first come first served, as our engine and vLLM do it.

A step takes one token of every decode, then prompt chunks up to `step_tokens_max`: first the prompts
that run, then arrivals, each admitted only when blocks for all of it are free. When a decode finds no
block the newest sequence is pre-empted and computed again later.

Steps without prompts only add one token to each decode, so they are not walked: a stretch of them takes
a sum that has a closed form, until a sequence ends, blocks run out, or something lands. `stretch_max`
1 walks them one by one, for tests. Between calls, `due` is the time at which `step_ended` is to be called.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from math import inf, sqrt

from services.batcher.simulate.kv import PAGE_TOKENS, KvCache
from services.batcher.simulate.law import Profile, chunk_pairs
from services.batcher.simulate.sequence import Happening, Seen, Sequence
from services.batcher.simulate.speeds import Speeds

STRETCH_MAX = 1 << 30
"""Decode steps that are taken at once."""


class Worker:
    """All sequences of one simulated engine. Times given to it never go back."""

    def __init__(self, profile: Profile, *, stretch_max: int = STRETCH_MAX) -> None:
        self.profile = profile
        self.kv = KvCache(profile.total_blocks, profile.block_tokens)
        self.due = inf
        self.waiting: deque[Sequence] = deque()
        self.speeds = Speeds()
        self.steps = 0
        self.busy_s = 0.0
        self.prompt_tokens = 0
        """Of sequences begun here."""
        self.hit_tokens = 0
        """Of those, found in the cache."""
        self.computed_prompt_tokens = 0
        self.generated_tokens = 0
        self.prefilling: list[Sequence] = []
        """Running prompts, the oldest first."""
        self.prefill_left = 0
        """Tokens that running and waiting prompts still need."""
        self.promised_blocks = 0
        """That the waiting ones will take, with one for the next token."""
        self._stretch_max = stretch_max
        self._page_blocks = PAGE_TOKENS // profile.block_tokens
        self._landed = 0
        self._ends: list[tuple[int, int, Sequence]] = []
        """Decodes by the step that brings their last token: a heap of (step, order, sequence)."""
        self._context_base = 0
        """Sum over decodes of their context less the count of steps: the context of all is it + n * steps."""
        self._phases = [0] * profile.block_tokens
        """Decodes by (context - count of steps) modulo a block: who needs a block at which step."""
        self._chunks: list[tuple[Sequence, int]] = []
        """Of the present step; none: it is a stretch of decode steps."""
        self._stretch = 0
        self._reserved = 0
        """Blocks that the decodes of the next step have already."""
        self._begun_at = 0.0

    @property
    def running(self) -> int:
        return len(self._ends) + len(self.prefilling)

    def sequences(self) -> list[Sequence]:
        """All that are here."""
        return [*self.waiting, *self.prefilling, *(each[2] for each in self._ends)]

    def land(self, sequence: Sequence, now: float) -> None:
        """A request arrives. Raises ValueError for one that would not fit alone."""
        if self._blocks(sequence.prompt_tokens + sequence.output_tokens) > self.kv.total_blocks:
            raise ValueError(
                f"a sequence of {sequence.prompt_tokens} + {sequence.output_tokens} tokens never fits"
            )
        self._landed += 1
        sequence.order = self._landed
        self.waiting.append(sequence)
        self.prefill_left += sequence.target
        self.promised_blocks += self._blocks(sequence.target) + 1
        if self.due == inf:
            self._begin(now)
        elif not self._chunks and self._stretch > 1:
            # Steps are not cut: the stretch ends with the one that runs.
            self._stretch = self._steps_until(now)
            self.due = self._begun_at + self._stretch_s(self._stretch)

    def observe(self, now: float) -> None:
        """Take the steps of a stretch that are over into account."""
        if self._chunks or self._stretch <= 1:
            return
        over = self._steps_until(now)
        if self._begun_at + self._stretch_s(over) > now:
            over -= 1
        over = min(over, self._stretch - 1)
        if over > 0:
            left, took = self._stretch - over, self._stretch_s(over)
            self._advance(over, took)
            self._begun_at += took
            self._stretch = left

    def step_ended(self) -> list[Seen]:
        """The steps that were to end at `due` are over. The next begin."""
        now, seen = self.due, list[Seen]()
        if self._chunks:
            chunks, self._chunks = self._chunks, []
            self._advance(1, now - self._begun_at, sum(count for _, count in chunks))
            for sequence, count in chunks:
                self._chunk_ended(sequence, count, seen)
        else:
            self._advance(self._stretch, now - self._begun_at)
        while self._ends and self._ends[0][0] == self.steps:
            sequence = heappop(self._ends)[2]
            self._leave_decodes(sequence)
            self._free(sequence, sequence.prompt_tokens + sequence.output_tokens - 1)
            seen.append(Seen(Happening.ENDED, sequence))
        self._begin(now)
        return seen

    # The end of steps.

    def _advance(self, steps: int, took_s: float, prefilled: int = 0) -> None:
        """Every decode has `steps` tokens more; their blocks are taken."""
        decodes = len(self._ends)
        if decodes:
            self.kv.take(self._blocks_for_steps(steps) - self._reserved)
            self._reserved = 0
            self.generated_tokens += decodes * steps
        self.speeds.note(prefilled, decodes * steps, took_s)
        self.steps += steps
        self.busy_s += took_s

    def _chunk_ended(self, sequence: Sequence, count: int, seen: list[Seen]) -> None:
        sequence.computed += count
        self.prefill_left -= count
        self.computed_prompt_tokens += count
        pages = min(sequence.computed // PAGE_TOKENS, len(sequence.prefix))
        while sequence.held < pages:
            self.kv.keep(sequence.prefix[sequence.held])
            sequence.held += 1
        if sequence.computed < sequence.target:
            return
        self.prefilling.remove(sequence)
        sequence.generated += 1
        self.generated_tokens += 1
        if sequence.generated == 1:
            seen.append(Seen(Happening.FIRST_TOKEN, sequence))
        if sequence.generated == sequence.output_tokens:
            self._free(sequence, sequence.target)
            seen.append(Seen(Happening.ENDED, sequence))
        else:
            self._join_decodes(sequence)

    def _join_decodes(self, sequence: Sequence) -> None:
        base = sequence.target - self.steps
        sequence.joined_at_step = self.steps
        self._context_base += base
        self._phases[base % len(self._phases)] += 1
        last = self.steps + sequence.output_tokens - sequence.generated
        heappush(self._ends, (last, sequence.order, sequence))

    def _leave_decodes(self, sequence: Sequence) -> None:
        base = sequence.target - sequence.joined_at_step
        self._context_base -= base
        self._phases[base % len(self._phases)] -= 1
        sequence.generated += self.steps - sequence.joined_at_step

    def _free(self, sequence: Sequence, context: int) -> None:
        """It has `context` tokens in the cache, and needs them no more."""
        self.kv.give_back(self._blocks(context) - sequence.held * self._page_blocks)
        self.kv.let_go(sequence.prefix[: sequence.held])
        sequence.held = 0

    # The beginning of steps.

    def _begin(self, now: float) -> None:
        """Plan what runs next, if anything can."""
        preempted = self._make_room()
        decodes = len(self._ends)
        self._reserved = self._blocks_for_steps(1)
        self.kv.take(self._reserved)
        budget = self.profile.step_tokens_max - decodes
        chunks = self._chunks
        for sequence in self.prefilling:
            if not budget:
                break
            budget -= self._chunk(sequence, budget)
        while budget and not preempted and (admitted := self._admit()) is not None:
            budget -= self._chunk(admitted, budget)
        self._begun_at = now
        if chunks:
            self.due = now + self._mixed_step_s(decodes)
        elif decodes:
            self._stretch = min(self._ends[0][0] - self.steps, self._stretch_max)
            self._stretch = self._steps_that_fit(self._stretch)
            self.due = now + self._stretch_s(self._stretch)
        else:
            self.due = inf

    def _make_room(self) -> bool:
        """Pre-empt the newest until every decode has a block for its next token."""
        preempted = False
        while self._blocks_for_steps(1) > self.kv.free:
            newest = max((*self.prefilling, *(each[2] for each in self._ends)), key=lambda each: each.order)
            self._preempt(newest)
            preempted = True
        return preempted

    def _preempt(self, sequence: Sequence) -> None:
        if sequence.joined_at_step < 0:
            self.prefilling.remove(sequence)
            self._free(sequence, sequence.target)
            self.prefill_left += sequence.computed
        else:
            self._ends = [each for each in self._ends if each[2] is not sequence]
            self._ends.sort()
            self._leave_decodes(sequence)
            self._free(sequence, sequence.prompt_tokens + sequence.generated - 1)
            sequence.target = sequence.prompt_tokens + sequence.generated
            sequence.joined_at_step = -1
            self.prefill_left += sequence.target
        sequence.computed = 0
        sequence.preemptions += 1
        self.promised_blocks += self._blocks(sequence.target) + 1
        self.waiting.appendleft(sequence)

    def _admit(self) -> Sequence | None:
        """The first of those waiting, if all its blocks are free and one more for who runs beside it."""
        if not self.waiting or self.running >= self.profile.sequences_max:
            return None
        sequence = self.waiting[0]
        pages, idle = self.kv.found(sequence.prefix, (sequence.target - 1) // PAGE_TOKENS)
        wanted = self._blocks(sequence.target)
        spare = self.running if sequence.preemptions else min(1, self.running)
        if wanted - pages * self._page_blocks + idle + spare > self.kv.free:
            return None
        self.waiting.popleft()
        self.promised_blocks -= wanted + 1
        self.kv.share(sequence.prefix[:pages])
        self.kv.take(wanted - pages * self._page_blocks)
        sequence.held = pages
        sequence.computed = pages * PAGE_TOKENS
        self.prefill_left -= sequence.computed
        if not sequence.started:
            sequence.started = True
            sequence.cached = sequence.computed
            self.prompt_tokens += sequence.prompt_tokens
            self.hit_tokens += sequence.cached
        self.prefilling.append(sequence)
        self.prefilling.sort(key=lambda each: each.order)
        return sequence

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        count = min(budget, sequence.target - sequence.computed)
        self._chunks.append((sequence, count))
        return count

    # How long, and how many blocks.

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.profile.block_tokens)

    def _mixed_step_s(self, decodes: int) -> float:
        tokens, pairs = decodes, 0.0
        for sequence, count in self._chunks:
            tokens += count
            pairs += chunk_pairs(sequence.computed, count)
        context = self._context_base + decodes * (self.steps + 1)
        return self.profile.step_s(tokens, context, pairs, decodes + len(self._chunks))

    def _stretch_s(self, steps: int) -> float:
        """The next `steps` decode steps together. Each reads one token of every decode more than the last."""
        decodes, profile = len(self._ends), self.profile
        first = profile.step_s(decodes, self._context_base + decodes * (self.steps + 1), 0, decodes)
        return steps * first + profile.kv_s * decodes * (steps * (steps - 1) / 2)

    def _steps_until(self, now: float) -> int:
        """The least number of steps of the stretch that are not over before `now`; at least one."""
        elapsed = now - self._begun_at
        first = self._stretch_s(1)
        growth = self.profile.kv_s * len(self._ends)
        # steps * first + growth * steps * (steps - 1) / 2 = elapsed
        if growth:
            half = first - growth / 2
            guess = (sqrt(half * half + 2 * growth * elapsed) - half) / growth
        else:
            guess = elapsed / first
        steps = min(max(int(guess), 1), self._stretch)
        while steps > 1 and self._stretch_s(steps - 1) >= elapsed:
            steps -= 1
        while steps < self._stretch and self._stretch_s(steps) < elapsed:
            steps += 1
        return steps

    def _blocks_for_steps(self, steps: int) -> int:
        """Blocks that the decodes take in the next `steps` steps."""
        phases = self._phases
        size = len(phases)
        if steps == 1:
            return phases[-self.steps % size]
        whole, rest = divmod(steps, size)
        first = self.steps
        return whole * len(self._ends) + sum(phases[-(first + step) % size] for step in range(rest))

    def _steps_that_fit(self, steps: int) -> int:
        """The most of the next `steps` steps that free blocks allow; the first always fits."""
        free = self.kv.free + self._reserved
        if self._blocks_for_steps(steps) <= free:
            return steps
        low, high = 1, steps
        while high - low > 1:
            middle = (low + high) // 2
            if self._blocks_for_steps(middle) <= free:
                low = middle
            else:
                high = middle
        return low
