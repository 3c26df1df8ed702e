"""What the steps of a level took: sums and lists that cost a step little, turned into figures at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenloom.bench.stats import Decode, Spread, Steps

CONTEXT_SLACK_TOKENS = 32
"""How far the mean context of a step may be from the one that is asked for."""


@dataclass(slots=True)
class Around:
    """The decode steps of a full batch whose mean context is near the one that is asked for."""

    context: int
    batch: int
    step_ms: list[float] = field(default_factory=list)
    contexts: int = 0
    parts_ns: dict[str, int] = field(default_factory=dict)

    def note(
        self, took_ms: float, decodes: int, context: int, before: Mapping[str, int], after: Mapping[str, int]
    ) -> None:
        """A step of decodes alone; the parts are those counted before and after it."""
        slack = CONTEXT_SLACK_TOKENS * decodes
        if decodes != self.batch or abs(context - self.context * decodes) > slack:
            return
        self.step_ms.append(took_ms)
        self.contexts += context
        for name, ns in after.items():
            self.parts_ns[name] = self.parts_ns.get(name, 0) + ns - before.get(name, 0)

    def figures(self) -> Decode:
        count, spread = len(self.step_ms), Spread.of(self.step_ms)
        return Decode(
            batch=self.batch,
            context=self.context,
            context_mean=self.contexts / (count * self.batch) if count else 0.0,
            steps=count,
            step_ms=spread,
            tokens_per_s=1e3 * self.batch / spread.p50 if spread and spread.p50 else 0.0,
            parts_ms=_means_ms(self.parts_ns, count),
        )


@dataclass(slots=True)
class Account:
    """Every step of a level."""

    around: Around | None = None
    all_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    decodes: int = 0
    """Tokens of the steps that only decode, and the contexts of their sequences, summed."""
    contexts: int = 0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    preemptions: int = 0
    parts_ns: dict[str, int] = field(default_factory=dict)

    def note(
        self, took_s: float, tokens: int, decodes: int, context: int,
        before: Mapping[str, int], after: Mapping[str, int],
    ) -> None:  # fmt: skip
        """One step of `tokens` tokens; all but `decodes` of them belong to prompts.

        `context`: the tokens that those which decode attend to, their own included, summed. The parts
        are nanoseconds counted since the beginning, before and after the step.
        """
        took_ms = took_s * 1e3
        self.all_ms.append(took_ms)
        self.tokens += tokens
        if tokens > decodes:
            self.prefill_tokens += tokens - decodes
            self.prefill_s += took_s
            return
        self.decode_ms.append(took_ms)
        self.decodes += decodes
        self.contexts += context
        if self.around is not None:
            self.around.note(took_ms, decodes, context, before, after)

    def steps(self) -> Steps:
        count = len(self.all_ms)
        return Steps(
            steps=count,
            step_ms=Spread.of(self.all_ms),
            decode_step_ms=Spread.of(self.decode_ms),
            decode_sequences_mean=self.decodes / max(1, len(self.decode_ms)),
            decode_context_mean=self.contexts / max(1, self.decodes),
            step_tokens_mean=self.tokens / count if count else 0.0,
            prefill_tokens_per_s=self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0,
            preemptions=self.preemptions,
            parts_ms=_means_ms(self.parts_ns, count),
            decode_only=self.around.figures() if self.around else None,
        )


def _means_ms(parts_ns: Mapping[str, int], steps: int) -> dict[str, float]:
    return {name: ns / 1e6 / max(1, steps) for name, ns in parts_ns.items()}
