"""A level with floors as lines of text."""

from services.worker.bench import floor
from tests.unit.bench.test_floor import PLAIN, SMALL, level
from tokenloom.bench import words
from tokenloom.bench.stats import Decode, Spread, Steps

SPREAD = Spread(3, 2, 3, 3, 3)


def said(only=None, floors=True):
    steps = Steps(
        steps=5, decode_step_ms=SPREAD, decode_sequences_mean=3.5, decode_context_mean=8, decode_only=only,
        parts_ms={"prepare": 0.25, "launch": 0.0},
    )  # fmt: skip
    made = level(steps)
    return "\n".join(words.steps_lines([floor.beside(made, SMALL, PLAIN, (6, 3)) if floors else made]))


def test_a_decode_step_stands_beside_its_floor():
    text = said()
    least_ms = floor.decode_step(SMALL, PLAIN, 3.5, 8).step_ms
    assert f"2.000 ms = {2 / least_ms:.2f} × its floor of {least_ms:.3f} ms" in text
    assert "weights " in text
    assert "24 tokens/s out, 72 in and out; the floor is" in text
    assert "prepare 0.250 ms" in text
    assert "launch" not in text  # it took no time: it is not part of this engine's step


def test_without_a_known_machine_nothing_is_said_of_floors():
    text = said(floors=False)
    assert "floor" not in text
    assert "24 tokens/s out" in text


def test_steps_at_one_context_are_said_or_said_to_be_absent():
    only = Decode(batch=4, context=9, context_mean=9, steps=3, step_ms=SPREAD, tokens_per_s=2000)
    assert "4 sequences at context 9: 2,000 tokens/s, the median of 3 steps" in said(only)
    none = Decode(batch=4, context=9, context_mean=0, steps=0, step_ms=None, tokens_per_s=0)
    assert "no step had all of them decoding there" in said(none)
