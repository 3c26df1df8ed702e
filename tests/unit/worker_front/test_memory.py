"""What a version reserves, and the ledger of who has what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.adapters.engines import SimEngines, TorchEngines
from services.worker.adapters.memory import Device
from services.worker.front import memory
from services.worker.front.memory import CACHE_SHARE, Budget, Terms, reserve
from services.worker.front.ports import FileRef, ModelVersion
from services.worker.front.reservation import GIB, MIB, Reservation, in_words
from services.worker.settings import WorkerSettings

PARAMETERS, VOCABULARY, HIDDEN = 134_515_008, 49_152, 576
EMBEDDING = VOCABULARY * HIDDEN
SMOL = ModelVersion(
    digest=f"sha256:{'a' * 64}",
    name="smollm2",
    context_length=8192,
    vocab_size=VOCABULARY,
    kv_bytes_per_token=2 * 30 * 3 * 64 * 2,
    model_type="llama",
    dtype="bfloat16",
    weight_bytes=2 * PARAMETERS,
    hidden_size=HIDDEN,
)
PLAIN = frozenset({"llama"})
CPU = Terms("cpu", "auto", 0, sequences_max=64, step_tokens=512, block_tokens=16, widening_types=PLAIN)
CUDA = replace(CPU, device="cuda")


@pytest.mark.parametrize(
    ("version", "terms", "element_bytes"),
    [
        (SMOL, CPU, 2),
        (replace(SMOL, model_type="gemma"), CPU, 4),
        (SMOL, replace(CPU, fast_bf16=True), 2),
        (SMOL, replace(CPU, dtype="float32", widening_types=frozenset()), 4),
        (replace(SMOL, dtype="float32", weight_bytes=4 * PARAMETERS), CPU, 4),
        (replace(SMOL, dtype="float32", weight_bytes=4 * PARAMETERS), replace(CPU, dtype="bfloat16"), 2),
        (replace(SMOL, dtype="float16"), CPU, 4),
    ],
)
def test_weights_on_a_cpu_are_counted_as_the_engine_holds_them_with_embedding_and_head(
    version: ModelVersion, terms: Terms, element_bytes: int
) -> None:
    asked = reserve(version, terms, 20 * GIB)
    assert asked.weights_bytes == element_bytes * (PARAMETERS + EMBEDDING)
    untied = reserve(replace(version, tied=False), terms, 20 * GIB)
    assert untied.weights_bytes == element_bytes * PARAMETERS


def test_head_of_an_unknown_configuration_counts_as_all_weights() -> None:
    assert reserve(replace(SMOL, hidden_size=0), CPU, 20 * GIB).weights_bytes == 2 * 2 * PARAMETERS


def test_weights_that_no_manifest_states_are_those_of_the_files() -> None:
    files = (FileRef("config.json", "d", 7), FileRef("model.safetensors", "d", 1000))
    assert reserve(replace(SMOL, weight_bytes=0, files=files), CUDA, GIB).weights_bytes == 1000


def test_change_of_dtype_has_the_stored_weights_beside_the_held_ones_while_loading() -> None:
    stored = replace(SMOL, dtype="float32", weight_bytes=4 * PARAMETERS)
    assert reserve(stored, replace(CPU, dtype="bfloat16"), GIB).loading_bytes == 4 * PARAMETERS
    assert reserve(stored, CPU, GIB).loading_bytes == 2 * 4 * EMBEDDING
    assert reserve(SMOL, CUDA, GIB).loading_bytes == 0
    half = replace(SMOL, dtype="float16")
    assert reserve(half, replace(CPU, fast_bf16=True), GIB).loading_bytes == 2 * PARAMETERS


def test_cache_is_enough_for_all_sequences_at_a_moderate_length() -> None:
    short = replace(SMOL, context_length=256)
    assert reserve(short, CUDA, 100 * GIB).kv_cache_bytes == 64 * 256 * SMOL.kv_bytes_per_token
    long = reserve(SMOL, CUDA, 100 * GIB).kv_cache_bytes
    assert long == 64 * memory.MODERATE_TOKENS * SMOL.kv_bytes_per_token


def test_cache_shrinks_with_the_budget_to_one_whole_context() -> None:
    budget_bytes = 5 * GIB
    asked = reserve(SMOL, CUDA, budget_bytes)
    beside = asked.total_bytes - asked.cache_bytes
    assert asked.kv_cache_bytes == int((budget_bytes - beside) * CACHE_SHARE)
    least = 8192 * SMOL.kv_bytes_per_token
    assert [reserve(SMOL, CUDA, size).kv_cache_bytes for size in (1, 3 * GIB)] == [least, least]
    endless = replace(SMOL, context_length=1 << 20)
    assert reserve(endless, CUDA, 1).kv_cache_bytes == least


def test_cache_on_a_cpu_has_the_numbers_that_are_computed_with_and_a_bound() -> None:
    assert reserve(SMOL, CPU, 1).kv_cache_bytes == 8192 * 2 * SMOL.kv_bytes_per_token
    assert reserve(SMOL, CPU, 100 * GIB).kv_cache_bytes == memory.CPU_CACHE_BYTES_MAX
    padded = reserve(SMOL, replace(CPU, block_tokens=8), 1)
    assert padded.cache_bytes == 2 * padded.kv_cache_bytes


def test_stated_cache_is_taken_as_it_is() -> None:
    asked = reserve(SMOL, replace(CPU, kv_cache_bytes=77 * MIB), GIB)
    assert asked.kv_cache_bytes == asked.cache_bytes == 77 * MIB


def test_stated_process_is_taken_as_it_is() -> None:
    for terms, usual in ((CPU, memory.CPU_PROCESS_BYTES), (CUDA, memory.CUDA_PROCESS_BYTES)):
        assert reserve(SMOL, terms, 20 * GIB).process_bytes == usual
        assert reserve(SMOL, replace(terms, process_bytes=MIB), 20 * GIB).process_bytes == MIB
    engines = TorchEngines(settings(process_bytes=7 * MIB), Device("cuda", 70 * GIB))
    assert engines.reserve(SMOL, 70 * GIB, whole=False).process_bytes == 7 * MIB


def test_only_model_of_a_gpu_has_all_of_it_and_sizes_its_own_cache() -> None:
    asked = reserve(SMOL, CUDA, 70 * GIB, whole=True)
    assert (asked.total_bytes, asked.kv_cache_bytes) == (70 * GIB, 0)
    small = reserve(SMOL, CUDA, GIB, whole=True)
    assert small.total_bytes > GIB, "what does not fit is not made to"
    assert reserve(SMOL, CUDA, 0, whole=True).kv_cache_bytes == 0


@given(
    budget_bytes=st.integers(0, 1 << 45),
    weight_bytes=st.integers(1, 1 << 40),
    context=st.integers(1, 1 << 21),
    token_bytes=st.integers(0, 1 << 20),
    on_cpu=st.booleans(),
    block_tokens=st.sampled_from([1, 8, 16, 24, 256]),
)
def test_larger_budget_never_makes_a_model_that_fitted_too_large(
    budget_bytes: int, weight_bytes: int, context: int, token_bytes: int, on_cpu: bool, block_tokens: int
) -> None:
    version = replace(SMOL, weight_bytes=weight_bytes, context_length=context, kv_bytes_per_token=token_bytes)
    terms = replace(CPU if on_cpu else CUDA, block_tokens=block_tokens)
    small, large = (reserve(version, terms, size) for size in (budget_bytes, 2 * budget_bytes))
    if 0 < small.total_bytes <= budget_bytes:
        assert large.total_bytes <= 2 * budget_bytes
    assert small.kv_cache_bytes >= min(context, memory.LEAST_TOKENS) * token_bytes


def test_reservation_is_told_by_its_parts() -> None:
    asked = Reservation(weights_bytes=3 * GIB // 2, cache_bytes=10 * MIB, process_bytes=5)
    told = "weights 1.50 GiB (1,610,612,736 bytes), KV cache 10.00 MiB (10,485,760 bytes), process 5 bytes"
    assert str(asked) == told
    assert in_words(0) == "0 bytes"


def settings(**values: Any) -> WorkerSettings:
    return WorkerSettings(name="worker", **values)


def test_only_an_unbounded_gpu_is_given_whole() -> None:
    for kind, given_bytes, whole in (("cuda", 0, True), ("cuda", 70 * GIB, False), ("cpu", 0, False)):
        engines = TorchEngines(settings(memory_bytes=given_bytes), Device(kind, 70 * GIB))  # type: ignore[arg-type]
        assert (engines.reserve(SMOL, 70 * GIB, whole=True).kv_cache_bytes == 0) is whole
        assert engines.reserve(SMOL, 70 * GIB, whole=False).kv_cache_bytes


def test_sim_engine_pretends_to_take_weights_and_the_stated_cache() -> None:
    asked = SimEngines(settings(kv_cache_bytes=1000)).reserve(SMOL, GIB, whole=True)
    assert asked.total_bytes == SMOL.weight_bytes + 1000


@given(
    total=st.integers(1, 100),
    moves=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 60), st.booleans())),
)
def test_budget_is_never_exceeded(total: int, moves: list[tuple[str, int, bool]]) -> None:
    budget, held = Budget(total), dict[str, int]()
    for key, size, giving_back in moves:
        if giving_back:
            assert budget.release(key) == held.pop(key, 0)
        elif key in held:
            with pytest.raises(ValueError, match="already"):
                budget.reserve(key, size)
        else:
            fits = sum(held.values()) + size <= total
            assert budget.reserve(key, size) is fits
            if fits:
                held[key] = size
        assert budget.used_bytes == sum(held.values()) <= total
        assert budget.free_bytes == total - budget.used_bytes
        assert all(budget.of(one) == held.get(one, 0) for one in "abcdef")


def test_budget_without_a_bound_takes_everything() -> None:
    budget = Budget(0)
    assert budget.reserve("a", 1 << 60)
    assert budget.free_bytes == 0
