"""`python -m services.worker.bench.calibrate --shape llama-3-8b --out FILE.json`: step times for a simulator.

Measures an engine's steps over a grid of decodes, contexts and chunks of prompts, as far as its KV cache
holds them, and fits the law of calibrate_fit.py to them. Prints each point beside the law; the file holds
the law, the engine's bounds and the points. Runs where the bench runs; torch is imported only after the
options were read and the environment set.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from services.worker.bench import calibrate_fit, shapes
from services.worker.bench.calibrate_fit import Errors, Law
from services.worker.bench.calibrate_grid import Grid, Point
from services.worker.engine.config import ConfigError, EngineConfig, decode_config, encode_config
from services.worker.engine.errors import EngineError
from services.worker.engine.host import keep_freed_memory, prepare_environment, spare_collections, use_threads

if TYPE_CHECKING:
    from services.worker.bench.calibrate_steps import Measured

GRID = Grid()
STEPS = 12
NUMBERS_MAX = 64
CONTEXT_SPARE_TOKENS = 64


@dataclass(frozen=True)
class Options:
    """What to measure, on which engine."""

    name: str
    shape: str | None
    config: EngineConfig
    points: list[Point]
    steps: int
    out: Path
    commit: str
    command: str


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status; 1, with one line, for what cannot be measured."""
    prepare_environment()
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        keep_freed_memory()
        with at_hand(options) as config:
            found = run(options, config)
    except EngineError as error:
        print(f"calibrate: {error.reason}: {error.message}", file=sys.stderr)
        return 1
    except (ConfigError, ValueError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0


def parse(arguments: Sequence[str]) -> Options:
    """Ends the process, naming the option, for what cannot be. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="services.worker.bench.calibrate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model-dir", type=Path, help="a Hugging Face folder; its weights are not read")
    model.add_argument("--shape", choices=sorted(shapes.SHAPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="in the file; by default the model's and the device's")
    parser.add_argument("--commit", default="unknown", help="what is noted of the checkout")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kv-cache-bytes", type=int, default=0)
    parser.add_argument("--sequences-max", type=int, default=256)
    parser.add_argument("--step-tokens-max", type=int, default=4096)
    parser.add_argument("--steps", type=_whole(1), default=STEPS, help="of each point, after its warm-up")
    parser.add_argument("--batches", type=_numbers(1), default=GRID.batches)
    parser.add_argument("--contexts", type=_numbers(1), default=GRID.contexts)
    parser.add_argument("--chunks", type=_numbers(1), default=GRID.chunks)
    parser.add_argument("--before", type=_numbers(0), default=GRID.before, help="tokens before a chunk")
    parser.add_argument("--mixed-decodes", type=_whole(1), default=GRID.mixed.decodes)
    parser.add_argument("--mixed-context", type=_whole(1), default=GRID.mixed.context)
    parser.add_argument("--mixed-chunks", type=_numbers(1), default=GRID.mixed_chunks)
    given = parser.parse_args(arguments)
    return Options(
        name=given.name or "",
        shape=given.shape,
        config=_config(given),
        points=_grid(given).points(),
        steps=given.steps,
        out=given.out,
        commit=given.commit,
        command=shlex.join(["python", "-m", "services.worker.bench.calibrate", *arguments]),
    )


@contextmanager
def at_hand(options: Options) -> Iterator[EngineConfig]:
    """The configuration with a folder for its model. A shape's context is made as long as the grid's."""
    if options.shape is None:
        yield options.config
        return
    with shapes.folder(options.shape) as folder:
        raw = json.loads((folder / "config.json").read_bytes())
        longest = max(point.length_max(options.steps) for point in options.points) + CONTEXT_SPARE_TOKENS
        raw["max_position_embeddings"] = max(raw["max_position_embeddings"], longest)
        (folder / "config.json").write_text(json.dumps(raw))
        yield msgspec.structs.replace(options.config, model_dir=str(folder))


def run(options: Options, config: EngineConfig) -> dict[str, Any]:
    """Measures, fits and prints; what the file holds. Raises EngineError, Stuck, ValueError."""
    from services.worker.bench.calibrate_steps import Meter, PlacedEngine
    from services.worker.bench.stepper import Stepper
    from services.worker.engine.loader import load
    from services.worker.engine.pipeline import depth_of
    from services.worker.engine.room import fitted
    from services.worker.engine.warmup import warm_up

    threads = use_threads(config.threads)
    loaded = fitted(load(config, lambda stage, _: _say(f"loading: {stage}")), config)
    engine = PlacedEngine(loaded, config, time.monotonic_ns)
    warm_up(engine)
    spare_collections()
    limits = engine.limits
    fitting = [point for point in options.points if point.fits(limits, options.steps)]
    _say(f"{len(fitting)} of {len(options.points)} points fit into {limits.total_blocks} blocks")
    stepper = Stepper(engine, depth_of(config, engine.ahead))
    try:
        meter = Meter(engine, stepper, options.steps)
        measured = [_said(meter.measure(point)) for point in fitting]
    finally:
        stepper.close()
    works, took_s = [one.work for one in measured], [one.step_s for one in measured]
    law = calibrate_fit.fit(works, took_s)
    show(measured, law, calibrate_fit.errors(law, works, took_s))
    device = _device_name(str(loaded.device))
    model = options.shape or Path(config.model_dir).name
    return {
        "name": options.name or f"{model} on {device}",
        "source": f"{device}, {threads} threads, {engine.ready().dtype}, {_versions()}, commit "
        f"{options.commit}, {options.command}, {datetime.now(UTC).date().isoformat()}",
        "step": asdict(law),
        "kv_tokens": limits.total_blocks * limits.block_tokens,
        "block_tokens": limits.block_tokens,
        "sequences_max": limits.sequences_max,
        "step_tokens_max": limits.step_tokens_max,
        "points": [told(one, law) for one in measured],
    }


def told(one: Measured, law: Law) -> dict[str, Any]:
    """A point as the file has it."""
    counted = {"steps": one.steps, "least_s": one.least_s, "most_s": one.most_s}
    times = {"measured_s": one.step_s, "predicted_s": law.step_s(one.work)}
    return {"kind": one.point.kind, **asdict(one.point), **asdict(one.work), **times, **counted}


def show(measured: Sequence[Measured], law: Law, errors: Errors) -> None:
    """A line for each point, and what the fit is worth."""
    print(f"{'step':8}{'decodes':>8}{'context':>8}{'chunk':>7}{'after':>7}{'measured':>11}{'law':>11}{'':8}")
    for one in measured:
        point, law_s = one.point, law.step_s(one.work)
        print(
            f"{point.kind:8}{point.decodes:8}{point.context:8}{point.chunk:7}{point.before:7}"
            f"{1e3 * one.step_s:8.3f} ms{1e3 * law_s:8.3f} ms{law_s / one.step_s - 1:+8.1%}"
        )
    print(", ".join(f"{name} {value:.4g}" for name, value in asdict(law).items()))
    print(f"relative error: median {errors.median:.1%}, largest {errors.largest:.1%}", flush=True)


def _grid(given: argparse.Namespace) -> Grid:
    mixed = Point(decodes=given.mixed_decodes, context=given.mixed_context)
    return Grid(given.batches, given.contexts, given.chunks, given.before, mixed, given.mixed_chunks)


def _config(given: argparse.Namespace) -> EngineConfig:
    config = EngineConfig(
        model_dir=str(given.model_dir or ""),
        load_format="dummy",
        device=given.device,
        dtype=given.dtype,
        threads=given.threads,
        kv_cache_bytes=given.kv_cache_bytes,
        sequences_max=given.sequences_max,
        step_tokens_max=given.step_tokens_max,
        prefix_cache=False,
    )
    # The bounds stand in the type and are checked when it is read.
    return decode_config(encode_config(config))


def _whole(least: int) -> Callable[[str], int]:
    """A whole number from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def _numbers(least: int) -> Callable[[str], tuple[int, ...]]:
    """`1,8,32`; nothing at all for an empty text."""

    def numbers(text: str) -> tuple[int, ...]:
        found = tuple(_whole(least)(part) for part in text.split(",") if part)
        if len(found) > NUMBERS_MAX:
            raise argparse.ArgumentTypeError(f"{len(found)} numbers are more than {NUMBERS_MAX}")
        return found

    return numbers


def _versions() -> str:
    import torch

    return f"torch {torch.__version__}, Python {platform.python_version()}"


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} CPU"


def _said(one: Measured) -> Measured:
    point = one.point
    what = f"{point.decodes} decodes at {point.context}, a chunk of {point.chunk} after {point.before}"
    _say(f"{what}: {1e3 * one.step_s:.3f} ms ({1e3 * one.least_s:.3f} to {1e3 * one.most_s:.3f})")
    return one


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
