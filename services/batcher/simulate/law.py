"""How long one step of a worker takes: constants of a machine and a model, kept in a profile file.

    step_s = fixed_s + max(weights_s, tokens * token_s) + kv_tokens * kv_s + pairs * pair_s
             + sequences * sequence_s

`tokens` are all tokens of the step, `kv_tokens` the context that decodes read, `pairs` the sum over
prompt chunks of n * (context before + n / 2), `sequences` the rows of the step. A step reads all
weights once, so its linear layers take `weights_s` until they are bound by arithmetic instead.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

PROFILES = Path(__file__).parent / "profiles"


class ProfileError(ValueError):
    """No such profile, or a file that is none; the message says which and why."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The constants of one machine with one model."""

    name: str
    source: dict[str, str]
    """Where each constant comes from, for people."""
    fixed_s: float
    weights_s: float
    token_s: float
    kv_s: float
    pair_s: float
    sequence_s: float
    kv_tokens: int
    """Tokens that the KV cache holds."""
    block_tokens: int
    sequences_max: int
    step_tokens_max: int

    def __post_init__(self) -> None:
        constants = (self.fixed_s, self.weights_s, self.token_s, self.kv_s, self.pair_s, self.sequence_s)
        if min(constants) < 0 or self.token_s <= 0:
            raise ValueError("constants are positive seconds")
        if self.block_tokens < 1 or self.kv_tokens < self.block_tokens:
            raise ValueError("the KV cache holds at least one block")
        if not 1 <= self.sequences_max <= self.step_tokens_max:
            raise ValueError("a step holds one token of every sequence at least")

    @property
    def total_blocks(self) -> int:
        return self.kv_tokens // self.block_tokens

    def step_s(self, tokens: int, kv_tokens: int, pairs: float, sequences: int) -> float:
        """Seconds of one step; see the module's head."""
        return (
            self.fixed_s
            + max(self.weights_s, tokens * self.token_s)
            + kv_tokens * self.kv_s
            + pairs * self.pair_s
            + sequences * self.sequence_s
        )

    def cold_prefill_s(self, prompt_tokens: int) -> float:
        """Seconds until the first token of a prompt that is alone on a worker with an empty cache."""
        whole, rest = divmod(prompt_tokens, self.step_tokens_max)
        steps = whole * self.step_s(self.step_tokens_max, 0, 0, 1)
        if rest:
            steps += self.step_s(rest, 0, 0, 1)
        return steps + self.pair_s * prompt_tokens * prompt_tokens / 2


def chunk_pairs(before: int, tokens: int) -> float:
    """Pairs of positions that a chunk of a prompt attends to, after `before` tokens of context."""
    return tokens * (before + tokens / 2)


def load(name_or_path: str) -> Profile:
    """A profile of this package by its name, or any file by its path. Raises ProfileError."""
    path = PROFILES / f"{name_or_path}.json"
    if not path.exists():
        path = Path(name_or_path)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        known = ", ".join(sorted(each.stem for each in PROFILES.glob("*.json")))
        raise ProfileError(f"no profile {name_or_path!r} ({error.strerror}); there are: {known}") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProfileError(f"{path}: {error}") from None
