"""The bench itself: load, warm up, run each level, compare cold and cached prompts."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from services.worker.bench.drive import Driver
from services.worker.bench.options import Options
from services.worker.bench.prompts import maker
from services.worker.bench.stepper import Stepper
from services.worker.engine.engine import Engine
from services.worker.engine.host import use_threads
from services.worker.engine.loader import load
from services.worker.engine.warmup import warm_up
from tokenloom.bench import lines, workload
from tokenloom.bench.report import Prefix, compare
from tokenloom.bench.stats import Record, level
from tokenloom.bench.workload import SEED_STEP, Lengths

WARM_UP_TOKENS = 16
PAIRS = 4
"""Cold and cached prompts compared when no number of requests was asked for."""
TELL_S = 0.25
"""The least time between two words about progress."""

Tell = Callable[[lines.Line], None]


def measure(options: Options, tell: Tell) -> None:
    """Raises EngineError, Stuck, and ValueError for options that do not fit the model."""
    threads = use_threads(options.config.threads)
    loaded = load(options.config, lambda stage, _: tell(lines.Note(f"loading: {stage}")))
    engine = Engine(loaded, options.config, time.monotonic_ns)
    tell(lines.Note("warming up"))
    warm_up(engine)
    ready = engine.ready()
    make = maker(options.prompts, Path(options.config.model_dir), ready.vocab_size, options.seed)
    about: dict[str, str | int | float] = {
        "device": _device_name(ready.device),
        "dtype": ready.dtype,
        "threads": threads,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "blocks": ready.total_blocks,
        "block_tokens": ready.block_tokens,
        "sequences_max": ready.sequences_max,
        "step_tokens_max": options.config.step_tokens_max,
        "pipeline_depth": options.config.pipeline_depth,
    }
    tell(lines.About(about, _workload(options), options.prompts))
    stepper = Stepper(engine, options.config.pipeline_depth)
    try:
        _measured(options, Driver(stepper, make), tell)
    finally:
        stepper.close()


def _measured(options: Options, driver: Driver, tell: Tell) -> None:
    if options.prefix_tokens:
        tell(lines.Cached(_prefix(options, driver)))
        return
    for number, batch in enumerate(options.batches):
        _level(options, driver, batch, options.seed + number * SEED_STEP, tell)


def _level(options: Options, driver: Driver, batch: int, seed: int, tell: Tell) -> None:
    items = options.items(batch)
    short = Lengths(items[0].prompt_tokens, min(items[0].output_tokens, WARM_UP_TOKENS))
    driver.run(workload.fixed("warm-up", min(4, batch), short), batch, seed)
    told_s = 0.0

    def on_end(ended: int, tokens: int) -> None:
        nonlocal told_s
        if (now_s := time.perf_counter()) - told_s > TELL_S:
            told_s = now_s
            tell(lines.Progress(ended, len(items), tokens))

    records, run, steps = driver.run(items, batch, seed, on_end)
    tell(lines.Measured(level(records, run, options.objectives, steps)))


def _prefix(options: Options, driver: Driver) -> Prefix:
    """Pairs of prompts with the same beginning, one after the other."""
    cold: list[Record] = []
    warm: list[Record] = []
    pairs = workload.pairs("pair", options.requests or PAIRS, options.prefix_tokens, options.lengths)
    short = Lengths(pairs[0][0].prompt_tokens, 2)
    driver.run(workload.fixed("warm-up", 1, short), 1, options.seed)
    for pair in pairs:
        for side, item in zip((cold, warm), pair, strict=True):
            side += driver.run([item], 1, options.seed)[0]
    return compare(options.prefix_tokens, cold, warm)


def _workload(options: Options) -> dict[str, str | int | float]:
    if options.trace is not None:
        return {"trace": options.trace.name, "length_scale": options.fit.length_scale}
    given = asdict(options.lengths)
    said: dict[str, str | int | float] = {f"{name}_tokens": value for name, value in given.items()}
    return said | {"prefix_tokens": options.prefix_tokens} if options.prefix_tokens else said


def _device_name(device: str) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device
