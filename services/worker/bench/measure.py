"""The bench itself: load, warm up, run each level beside its floor, compare cold and cached prompts."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from services.worker.bench import floor
from services.worker.bench.drive import Driver
from services.worker.bench.options import Options
from services.worker.bench.profile import Recorder
from services.worker.bench.prompts import Maker, maker
from services.worker.bench.stepper import Stepper
from services.worker.engine.engine import Engine
from services.worker.engine.host import spare_collections, use_threads
from services.worker.engine.loader import LoadedModel, load
from services.worker.engine.pipeline import depth_of
from services.worker.engine.room import fitted
from services.worker.engine.warmup import warm_up
from tokenloom.bench import lines, workload
from tokenloom.bench.report import Prefix, compare
from tokenloom.bench.stats import Level, Record, level
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
    loaded = fitted(loaded, options.config)
    engine = Engine(loaded, options.config, time.monotonic_ns)
    tell(lines.Note("warming up"))
    warm_up(engine)
    spare_collections()
    ready = engine.ready()
    make = maker(options.prompts, Path(options.config.model_dir), ready.vocab_size, options.seed)
    about: dict[str, str | int | float] = {
        "device": _device_name(ready.device),
        "dtype": ready.dtype,
        "load_format": options.config.load_format,
        "threads": threads,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "blocks": ready.total_blocks,
        "block_tokens": ready.block_tokens,
        "sequences_max": ready.sequences_max,
        "step_tokens_max": options.config.step_tokens_max,
        "pipeline_depth": depth_of(options.config, engine.ahead),
    }
    tell(lines.About(about, _workload(options), options.prompts))
    stepper = Stepper(engine, depth_of(options.config, engine.ahead))
    bench = Bench(options, stepper, make, _floors(options, loaded), tell)
    try:
        if options.prefix_tokens:
            tell(lines.Cached(_prefix(options, Driver(stepper, make))))
            return
        for batch, numbers in options.levels():
            bench.batch(batch, numbers, ready.device)
        if options.profile is not None:
            bench.profile(options.profile, ready.device, ready.context_length)
    finally:
        stepper.close()


@dataclass(frozen=True)
class Bench:
    """One engine, warm, and what to do with it."""

    options: Options
    stepper: Stepper
    make: Maker
    floors: Floors
    tell: Tell

    def batch(self, batch: int, numbers: range, device: str) -> None:
        """A warm-up, then each level of a batch."""
        options, driver = self.options, Driver(self.stepper, self.make)
        first = options.items(batch)[0]
        short = Lengths(first.prompt_tokens, min(first.output_tokens, WARM_UP_TOKENS))
        count = options.warm_up_count(batch, device)
        driver.run(workload.fixed("warm-up", count, short), batch, self._seed(numbers[0]))
        for number in numbers:
            self._level(driver, batch, self._seed(number))

    def profile(self, folder: Path, device: str, context_length: int) -> None:
        """One wave of the largest batch, its first steps of each kind recorded."""
        options, batch = self.options, max(self.options.batches)
        prompt_tokens = options.items(batch)[0].prompt_tokens
        recorder = Recorder(self.stepper, folder, batch, device)
        wanted = recorder.answer_tokens(prompt_tokens, options.config.step_tokens_max)
        lengths = Lengths(prompt_tokens, max(1, min(wanted, context_length - prompt_tokens)))
        self.tell(lines.Note(f"profiling {batch} sequences"))
        seed = self._seed(len(options.batches) * options.repeats)
        try:
            Driver(recorder, self.make).run(workload.fixed("profile", batch, lengths), batch, seed)
        finally:
            recorder.close()
        self.tell(lines.Note(f"profile: {', '.join(map(str, recorder.written)) or 'nothing was recorded'}"))

    def _level(self, driver: Driver, batch: int, seed: int) -> None:
        items, told_s = self.options.items(batch), 0.0

        def on_end(ended: int, tokens: int) -> None:
            nonlocal told_s
            if (now_s := time.perf_counter()) - told_s > TELL_S:
                told_s = now_s
                self.tell(lines.Progress(ended, len(items), tokens))

        records, run, steps = driver.run(items, batch, seed, on_end, self.options.decode_context)
        self.tell(lines.Measured(self.floors(level(records, run, self.options.objectives, steps))))

    def _seed(self, number: int) -> int:
        return self.options.seed + number * SEED_STEP


Floors = Callable[[Level], Level]
"""A level with its floors, or as it was where the work or the machine is not known."""


def _floors(options: Options, loaded: LoadedModel) -> Floors:
    bytes_ = loaded.shape.element_bytes
    size = floor.dimensions(loaded.model.config.to_dict(), bytes_)
    name = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else ""
    machine = floor.machine(name, bytes_, options.bytes_per_s, options.flops)
    if size is None or machine is None:
        return lambda level: level
    lengths = None if options.trace else (options.lengths.prompt, options.lengths.output)
    return lambda level: floor.beside(level, size, machine, lengths)


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
