"""The least time of a step, held against sums over single tokens and figures known by hand."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.bench import floor, shapes
from services.worker.bench.floor import MACHINES, Dimensions, Machine
from tokenloom.bench.stats import Decode, Level, Spread, Steps

H100 = MACHINES["NVIDIA H100 80GB HBM3"]
LLAMA = floor.dimensions(shapes.SHAPES["llama-3-8b"], 2)
SMALL = Dimensions(
    hidden=8, layers=3, heads=4, kv_heads=2, head_dim=2, intermediate=12, vocab=20, element_bytes=2
)
PLAIN = Machine(1.0, 1.0)
"""Each byte and each operation takes a second."""

counts = st.integers(1, 500)


def test_the_matrices_are_those_of_llama_3_8b():
    norms = (2 * LLAMA.layers + 1) * LLAMA.hidden
    assert LLAMA.layers * LLAMA.products + 2 * LLAMA.vocab * LLAMA.hidden + norms == 8_030_261_248


def test_a_step_of_256_at_context_256_by_hand():
    found = floor.decode_step(LLAMA, H100, 256, 256)
    weights, attention, head = (found.terms[name] for name in ("weights", "attention", "head"))
    assert weights.bytes == 2 * 32 * 218_103_808
    assert weights.operations == 256 * weights.bytes  # two of each element of two bytes
    assert weights.ms == pytest.approx(1e3 * weights.bytes / 3.0e12)  # memory, barely
    assert attention.bytes == 256 * 257 * 131_072
    assert head.ms == pytest.approx(0.35 + 0.044, abs=0.01)
    assert found.step_ms == sum(term.ms for term in found.terms.values())
    assert 7.9 < found.step_ms < 8.5


def test_many_sequences_are_bound_by_operations_and_few_by_bytes():
    few, many = (floor.decode_step(LLAMA, H100, batch, 1).terms["weights"] for batch in (1, 1024))
    assert few.ms == pytest.approx(1e3 * few.bytes / H100.bytes_per_s)
    assert many.ms == pytest.approx(1e3 * many.operations / H100.flops)


@given(batch=counts, context=counts, window=st.integers(0, 300))
def test_a_decode_step_reads_what_its_sequences_may_see(batch, context, window):
    size = replace(SMALL, window=window)
    seen = min(context, window) if window else context
    term = floor.decode_step(size, PLAIN, batch, context).terms["attention"]
    token_bytes = 2 * 3 * 2 * 2 * 2
    assert term.bytes == batch * (seen * token_bytes + token_bytes)
    assert term.operations == batch * seen * 3 * 4 * 2 * 2 * 2


@given(prompts=st.integers(1, 5), length=st.integers(1, 60), window=st.integers(0, 70))
def test_a_prompt_attends_as_its_tokens_do_one_by_one(prompts, length, window):
    size = replace(SMALL, window=window)
    steps = [floor.decode_step(size, PLAIN, 1, place + 1) for place in range(length)]
    one_by_one = sum(step.terms["attention"].operations for step in steps)
    together = floor.prefill(size, PLAIN, prompts, length).terms
    assert together["attention"].operations == pytest.approx(prompts * one_by_one)
    products = floor.decode_step(size, PLAIN, prompts * length, 1).terms["weights"]
    assert together["weights"] == products


@given(batch=counts, context=counts)
def test_more_of_anything_never_takes_less(batch, context):
    here = floor.decode_step(LLAMA, H100, batch, context).step_ms
    assert floor.decode_step(LLAMA, H100, batch + 1, context).step_ms > here
    assert floor.decode_step(LLAMA, H100, batch, context + 1).step_ms > here


def test_a_whole_workload_is_its_prompts_and_then_its_steps():
    steps = [floor.decode_step(SMALL, PLAIN, 2, context).step_ms for context in (6, 7)]
    prompts = floor.prefill(SMALL, PLAIN, 4, 5).step_ms
    assert floor.workload_s(SMALL, PLAIN, 4, 2, (5, 3)) == pytest.approx((prompts + 2 * sum(steps)) / 1e3)
    # More places than requests help nobody.
    assert floor.workload_s(SMALL, PLAIN, 4, 9, (5, 3)) == floor.workload_s(SMALL, PLAIN, 4, 4, (5, 3))
    assert 23_000 < 256 * 256 / floor.workload_s(LLAMA, H100, 256, 256, (128, 256)) < 25_000


def test_what_is_not_known_has_no_floor():
    assert floor.dimensions(shapes.SHAPES["llama-3-8b"] | {"model_type": "mixtral"}, 2) is None
    name = "NVIDIA H100 80GB HBM3"
    assert floor.machine(name, 2, 0, 0) == H100
    assert floor.machine(name, 4, 0, 0) is None  # the known speed is that of 16 bits
    assert floor.machine("abacus", 2, 0, 1e9) is None
    assert floor.machine("abacus", 4, 1e6, 1e9) == Machine(1e6, 1e9)
    assert floor.machine(name, 2, 1e6, 0) == Machine(1e6, H100.flops)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "qwen2", "sliding_window": 64}, 0),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, 64),
    ],
)
def test_a_window_counts_where_the_family_heeds_it(config, window):
    assert floor.dimensions(shapes.SHAPES["tiny"] | config, 2).window == window


def test_a_level_carries_the_floors_of_its_own_means():
    spread = Spread(2, 2, 2, 2, 2)
    only = Decode(batch=4, context=9, context_mean=9.5, steps=3, step_ms=spread, tokens_per_s=2)
    steps = Steps(
        steps=5, decode_step_ms=spread, decode_sequences_mean=3.5, decode_context_mean=8, decode_only=only
    )
    found = floor.beside(level(steps), SMALL, PLAIN, (6, 3))
    assert found.steps.decode_floor == floor.decode_step(SMALL, PLAIN, 3.5, 8)
    assert found.steps.decode_only.floor == floor.decode_step(SMALL, PLAIN, 4, 9.5)
    assert found.floor_s == floor.workload_s(SMALL, PLAIN, 8, 4, (6, 3))
    least_ms = floor.prefill(SMALL, PLAIN, 8, 6).step_ms
    assert found.steps.prefill_floor_tokens_per_s == pytest.approx(48 / least_ms * 1e3)
    mixed = floor.beside(level(steps), SMALL, PLAIN, None)
    assert (mixed.floor_s, mixed.steps.prefill_floor_tokens_per_s) == (None, None)
    assert mixed.steps.decode_floor == found.steps.decode_floor


def test_a_level_without_decode_steps_has_no_floor_of_one():
    only = Decode(batch=4, context=9, context_mean=0, steps=0, step_ms=None, tokens_per_s=0)
    found = floor.beside(level(Steps(steps=1, decode_only=only)), SMALL, PLAIN, None)
    assert found.steps.decode_floor is None
    assert found.steps.decode_only.floor is None
    assert floor.beside(level(None), SMALL, PLAIN, (1, 1)).floor_s is None


def level(steps):
    return Level(
        max_concurrency=4, num_requests=8, completed=8, failed=0, duration_s=1.0, total_input_tokens=48,
        total_output_tokens=24, request_throughput=8, output_throughput=24, total_token_throughput=72,
        ttft_ms=None, itl_ms=None, tpot_ms=None, e2el_ms=None, chunks_per_token=1, steps=steps,
    )  # fmt: skip


def test_floors_go_through_json_unchanged():
    found = floor.decode_step(LLAMA, H100, 256, 256)
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found
