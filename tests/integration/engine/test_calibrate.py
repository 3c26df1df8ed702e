"""Step times for a simulator, from real engines: on the CPU, one step ahead, and with the CUDA runner."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

import pytest

from services.worker.bench.calibrate_fit import Law, Work
from services.worker.bench.calibrate_grid import Point
from services.worker.bench.calibrate_steps import Measured, Meter, PlacedEngine
from services.worker.bench.stepper import Stepper
from services.worker.engine import loader
from services.worker.engine.config import EngineConfig
from services.worker.engine.cuda.runner import CudaRunner
from services.worker.engine.loader import load

POINTS = [Point(3, 40), Point(chunk=5, before=20), Point(chunk=9), Point(2, 30, 7, 0)]
STEPS = 5


def opened(folder: Path) -> PlacedEngine:
    config = EngineConfig(
        model_dir=str(folder), load_format="dummy", device="cpu", dtype="float32", sequences_max=8,
        step_tokens_max=32, prefix_cache=False,
    )  # fmt: skip
    return PlacedEngine(load(config, lambda stage, fraction: None), config, time.monotonic_ns)


def measured(engine: PlacedEngine, depth: int, points: list[Point] = POINTS) -> list[Measured]:
    before, stepper = engine.load().free_blocks, Stepper(engine, depth)
    try:
        meter = Meter(engine, stepper, STEPS)
        found = [meter.measure(point) for point in points]
    finally:
        stepper.close()
    assert engine.idle
    assert engine.load().free_blocks == before, "nothing of a point is left behind"
    return found


def check(found: list[Measured]) -> None:
    """The steps were those that were asked for; of decodes, around the context that was asked for."""
    for one in found:
        point, work = one.point, one.work
        assert 0 < one.least_s <= one.step_s <= one.most_s
        assert (one.steps, work.tokens, work.sequences) == (
            STEPS, point.decodes + point.chunk, point.decodes + bool(point.chunk),
        )  # fmt: skip
        assert work.kv_tokens == pytest.approx(point.decodes * point.context, abs=3 * point.decodes)
        assert work.pairs == point.chunk * (point.before + point.chunk / 2)


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_are_of_the_kind_that_was_asked_for(tiny_llama: Path, depth: int) -> None:
    check(measured(opened(tiny_llama), depth))


def test_so_they_are_where_steps_are_launched_ahead(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "available", lambda: False)
    monkeypatch.setattr(loader, "_on_triton", lambda device: True)
    engine = opened(tiny_llama)
    assert isinstance(engine._runner, CudaRunner)
    assert engine.ahead
    check(measured(engine, 2, [Point(2, 20, 3, 4)]))


def test_a_step_that_was_not_asked_for_is_no_measurement(tiny_llama: Path) -> None:
    engine = opened(tiny_llama)
    place = engine.placed.place
    engine.placed.place = lambda name, pending: place(name, pending + 1)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="were to be a step"):
        measured(engine, 1, [Point(chunk=5, before=6)])


def test_the_file_holds_the_law_the_bounds_and_the_points(tmp_path: Path) -> None:
    out = tmp_path / "found" / "tiny.json"
    asked = ["--shape", "tiny", "--device", "cpu", "--threads", "1", "--steps", "3", "--out", str(out)]
    asked += ["--batches", "1,4,300", "--contexts", "32", "--chunks", "16,64", "--before", "0,1500"]
    asked += ["--mixed-decodes", "2", "--mixed-context", "40", "--mixed-chunks", "8", "--commit", "abc"]
    done = subprocess.run(
        [sys.executable, "-m", "services.worker.bench.calibrate", *asked],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_bytes())
    assert found["name"] == "tiny on " + found["source"].split(",")[0]
    assert "commit abc, python -m services.worker.bench.calibrate --shape tiny" in found["source"]
    assert (found["sequences_max"], found["step_tokens_max"], found["block_tokens"]) == (256, 4096, 16)
    assert found["kv_tokens"] % 16 == 0
    # 300 sequences at once are more than the engine has places for.
    assert [point["kind"] for point in found["points"]] == ["decode"] * 2 + ["prefill"] * 4 + ["mixed"]
    law = Law(**found["step"])
    assert min(astuple(law)) >= 0
    for point in found["points"]:
        work = Work(*(point[name] for name in ("tokens", "kv_tokens", "pairs", "sequences")))
        assert point["predicted_s"] == pytest.approx(law.step_s(work))
    assert "relative error: median" in done.stdout
    assert len(done.stdout.splitlines()) == 1 + len(found["points"]) + 3


def test_what_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    asked = ["--model-dir", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "x.json")]
    done = subprocess.run(
        [sys.executable, "-m", "services.worker.bench.calibrate", *asked],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "calibrate: MODEL_LOAD_FAILED: loading the model failed: config.json" in done.stderr
    assert "Traceback" not in done.stderr
