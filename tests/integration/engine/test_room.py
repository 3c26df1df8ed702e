"""The step that a device's memory is planned for, on the CPU; the figures themselves need a device."""

from __future__ import annotations

import time
from pathlib import Path

from services.worker.engine.config import EngineConfig
from services.worker.engine.engine import Engine
from services.worker.engine.loader import load
from services.worker.engine.room import fitted
from services.worker.engine.warmup import largest_step


def test_the_largest_step_is_as_large_as_a_step_can_be_and_leaves_nothing(tiny_llama: Path) -> None:
    config = EngineConfig(
        model_dir=str(tiny_llama), device="cpu", dtype="float32", sequences_max=6, step_tokens_max=50
    )
    engine = Engine(load(config, lambda stage, fraction: None), config, time.monotonic_ns)
    steps: list[tuple[int, int]] = []
    launch = engine.launch

    def noting(flight):
        steps.append((flight.plan.tokens, len(flight.flat.sequences)))
        return launch(flight)

    engine.launch = noting  # type: ignore[method-assign]
    before = engine.load().free_blocks
    largest_step(engine)
    assert steps[0] == (48, 6), "every sequence has a part of the step's tokens, and all draw"
    assert engine.idle
    assert engine.load().free_blocks == before


def test_on_the_cpu_the_cache_stays_as_it_was_planned(tiny_llama: Path) -> None:
    config = EngineConfig(model_dir=str(tiny_llama), device="cpu", dtype="float32")
    loaded = load(config, lambda stage, fraction: None)
    assert fitted(loaded, config) is loaded
