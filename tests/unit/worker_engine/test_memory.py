"""What fits, and the numbers that say why not."""

import pytest

from services.worker.engine.errors import EngineError
from services.worker.engine.memory import (
    CPU_CACHE_BYTES_MAX,
    Shape,
    cache_blocks,
    device_blocks,
    host_available_bytes,
)

GIB = 1 << 30


def shape(**fields):
    values = {"weight_bytes": GIB, "layers": 10, "kv_heads": 2, "head_dim": 64, "element_bytes": 2,
              "context_length": 4096, "vocab_size": 1000}  # fmt: skip
    return Shape(**(values | fields))


def blocks(available_bytes, *, wanted_bytes=0, on_device=False, made=None, sequences_max=16):
    return cache_blocks(
        made or shape(),
        available_bytes=available_bytes,
        wanted_bytes=wanted_bytes,
        sequences_max=sequences_max,
        block_tokens=16,
        step_tokens_max=512,
        on_device=on_device,
    )


def test_a_token_takes_keys_and_values_in_every_layer():
    assert shape().kv_token_bytes == 2 * 10 * 2 * 64 * 2


def test_what_is_asked_for_is_taken():
    assert blocks(4 * GIB, wanted_bytes=shape().kv_token_bytes * 16 * 100) == 100


def test_never_more_than_all_sequences_could_use():
    assert blocks(100 * GIB, on_device=True) == 16 * 4096 // 16
    assert blocks(100 * GIB, wanted_bytes=50 * GIB) == 16 * 4096 // 16


def test_without_a_wish_a_share_is_taken():
    big = shape(context_length=1 << 20)
    host, device = blocks(9 * GIB, made=big), blocks(9 * GIB, made=big, on_device=True)
    assert 0 < host < device
    block_bytes = big.kv_token_bytes * 16
    assert device * block_bytes < 8 * GIB
    assert blocks(1000 * GIB, made=big) == CPU_CACHE_BYTES_MAX // block_bytes


@pytest.mark.parametrize("wanted_bytes", [0, 4 * GIB])
def test_what_does_not_fit_is_refused_with_the_numbers(wanted_bytes):
    with pytest.raises(EngineError) as caught:
        blocks(GIB // 2, wanted_bytes=wanted_bytes)
    assert caught.value.reason == "MODEL_TOO_LARGE"
    assert int(caught.value.metadata["needed_bytes"]) > GIB + wanted_bytes
    assert caught.value.metadata["available_bytes"] == str(GIB // 2)
    assert f"{GIB // 2:,}" in caught.value.message


def test_a_wish_smaller_than_a_block_is_refused():
    with pytest.raises(EngineError, match="one block of the KV cache"):
        blocks(4 * GIB, wanted_bytes=100)


def test_this_machine_has_memory():
    assert host_available_bytes() > 0


LLAMA = Shape(16 << 30, 32, 8, 128, 2, 8192, 128256)
H100 = {"total_bytes": 80 << 30, "step_bytes": 2 << 30, "sequences_max": 256, "block_tokens": 16}


def test_a_devices_cache_is_what_weights_step_and_head_room_leave():
    taken = device_blocks(LLAMA, free_bytes=62 << 30, **H100) * 16 * LLAMA.kv_token_bytes
    assert 0 <= (62 << 30) - (2 << 30) - int(0.05 * (80 << 30)) - taken < 16 * LLAMA.kv_token_bytes
    assert device_blocks(LLAMA, free_bytes=62 << 30, **H100 | {"sequences_max": 2}) == 2 * 512


def test_a_device_without_room_for_a_block_is_refused_with_the_numbers():
    with pytest.raises(EngineError, match="2,147,483,648") as caught:
        device_blocks(LLAMA, free_bytes=6 << 30, **H100)
    assert caught.value.reason == "MODEL_TOO_LARGE"
