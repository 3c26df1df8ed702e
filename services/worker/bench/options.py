"""The command line of the bench process. Bounds that matter to people are checked by `tokenloom bench`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from services.worker.bench import shapes
from services.worker.engine.config import EngineConfig, decode_config, encode_config
from tokenloom.bench import traces
from tokenloom.bench.prompts import Item
from tokenloom.bench.stats import Objectives
from tokenloom.bench.workload import CONCURRENCY_MAX, REQUESTS_MAX, TOKENS_MAX, Lengths, fixed

Kind = Literal["ids", "text", "chat"]
"""`text` is what the load client sends to /v1/completions, `chat` what it sends to /v1/chat/completions."""


DEFAULTS = EngineConfig(model_dir="")
REPEATS_MAX = 100


@dataclass(frozen=True)
class Options:
    """What to measure, on which engine."""

    config: EngineConfig
    batches: tuple[int, ...]
    prompts: Kind
    requests: int | None
    lengths: Lengths
    prefix_tokens: int
    seed: int
    objectives: Objectives
    trace: Path | None = None
    """Its lengths and shared blocks instead of `lengths`; its times are not heeded."""
    fit: traces.Fit = field(default_factory=traces.Fit)
    shape: str | None = None
    """A model of this shape with random weights, instead of the folder in `config`."""
    waves: int | None = None
    """Requests of a level for each that is in flight, instead of `requests`; 1: all are sent at once."""
    repeats: int = 1
    """Levels of each batch, with prompts of their own, after one warm-up."""
    decode_context: int | None = None
    """Also measure by themselves the steps of a full batch that decode near this context."""
    profile: Path | None = None
    """A folder for traces and tables of one further short level."""
    bytes_per_s: float = 0.0
    flops: float = 0.0
    """Speeds of the machine, for floors; 0: what is known of it."""

    def count(self, batch: int) -> int:
        """Requests of a level."""
        if self.waves is not None:
            return self.waves * batch
        return self.requests or max(16, 4 * batch)

    def levels(self) -> list[tuple[int, range]]:
        """Each batch and the numbers of its levels, no number twice in a run."""
        each = self.repeats
        return [(batch, range(n * each, (n + 1) * each)) for n, batch in enumerate(self.batches)]

    def warm_up_count(self, batch: int, device: str) -> int:
        """Requests before the first level of a batch: on an accelerator its steps have their own shape."""
        return min(4, batch) if device == "cpu" else batch

    def items(self, batch: int) -> list[Item]:
        """The requests of a level. Raises TraceError, OSError."""
        if self.trace is None:
            return fixed("request", self.count(batch), self.lengths)
        with self.trace.open("rb") as lines:
            return traces.items(traces.read(lines, self.count(batch)), self.fit)


def parse(arguments: list[str] | None = None) -> Options:
    """Ends the process, naming the option, for what cannot be. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="services.worker.bench", description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model-dir", type=Path, help="a Hugging Face folder")
    model.add_argument("--shape", choices=sorted(shapes.SHAPES), help="random weights of a known shape")
    parser.add_argument(
        "--load-format", default="auto", choices=["auto", "dummy"], help="dummy: random weights"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kv-cache-bytes", type=int, default=0)
    parser.add_argument("--sequences-max", type=int, default=DEFAULTS.sequences_max)
    parser.add_argument("--step-tokens-max", type=int, default=DEFAULTS.step_tokens_max)
    parser.add_argument("--itl-max-ms", type=int, default=DEFAULTS.itl_max_ms)
    parser.add_argument("--pipeline-depth", type=int, default=DEFAULTS.pipeline_depth)
    parser.add_argument("--batch", type=_batches, default=(1,), help="sequences in flight: 1,8,32,64")
    parser.add_argument("--prompts", default="ids", choices=["ids", "text", "chat"])
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--requests", type=_whole(1, REQUESTS_MAX))
    count.add_argument("--waves", type=_whole(1, REQUESTS_MAX), help="requests for each in flight")
    parser.add_argument("--repeats", type=_whole(1, REPEATS_MAX), default=1, help="levels of each batch")
    parser.add_argument("--prompt-tokens", type=_whole(1, TOKENS_MAX), default=64)
    parser.add_argument("--output-tokens", type=_whole(1, TOKENS_MAX), default=64)
    parser.add_argument("--trace", type=Path, help="lengths and shared blocks of recorded requests")
    parser.add_argument("--length-scale", type=float, default=1.0)
    parser.add_argument("--input-max", type=_whole(1, TOKENS_MAX), default=TOKENS_MAX)
    parser.add_argument("--output-max", type=_whole(1, TOKENS_MAX), default=TOKENS_MAX)
    parser.add_argument("--prefix-cached", type=_whole(0, TOKENS_MAX), default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slo-ttft-ms", type=float)
    parser.add_argument("--slo-itl-ms", type=float)
    parser.add_argument("--decode-only", type=_whole(1, TOKENS_MAX), metavar="CONTEXT")
    parser.add_argument("--profile", type=Path, metavar="DIR")
    parser.add_argument("--memory-bandwidth", type=_speed, default=0.0, help="bytes per second")
    parser.add_argument("--flops", type=_speed, default=0.0, help="operations per second")
    given = parser.parse_args(arguments)
    if given.decode_only is not None and not _passes(given):
        parser.error("--decode-only: no answer passes this context: it must lie between the prompt's tokens "
                     "and those of prompt and answer together")  # fmt: skip
    return Options(
        config=_config(given),
        batches=given.batch,
        prompts=given.prompts,
        requests=given.requests,
        lengths=Lengths(given.prompt_tokens, given.output_tokens),
        prefix_tokens=given.prefix_cached,
        seed=given.seed,
        objectives=Objectives(given.slo_ttft_ms, given.slo_itl_ms),
        trace=given.trace,
        fit=traces.Fit(1.0, given.length_scale, given.input_max, given.output_max),
        shape=given.shape,
        waves=given.waves,
        repeats=given.repeats,
        decode_context=given.decode_only,
        profile=given.profile,
        bytes_per_s=given.memory_bandwidth,
        flops=given.flops,
    )


@contextmanager
def at_hand(options: Options) -> Iterator[Options]:
    """The options with a folder for their model: the one given, or one made for their shape."""
    if options.shape is None:
        yield options
        return
    with shapes.folder(options.shape) as folder:
        yield replace(options, config=msgspec.structs.replace(options.config, model_dir=str(folder)))


def _passes(given: argparse.Namespace) -> bool:
    longest: int = given.prompt_tokens + given.output_tokens
    return given.trace is not None or given.prompt_tokens <= given.decode_only <= longest


def _config(given: argparse.Namespace) -> EngineConfig:
    config = EngineConfig(
        model_dir=str(given.model_dir or ""),
        load_format="dummy" if given.shape else given.load_format,
        device=given.device,
        dtype=given.dtype,
        threads=given.threads,
        kv_cache_bytes=given.kv_cache_bytes,
        sequences_max=given.sequences_max,
        step_tokens_max=given.step_tokens_max,
        itl_max_ms=given.itl_max_ms,
        pipeline_depth=given.pipeline_depth,
    )
    # The bounds stand in the type and are checked when it is read.
    return decode_config(encode_config(config))


def _batches(text: str) -> tuple[int, ...]:
    return tuple(_whole(1, CONCURRENCY_MAX)(part) for part in text.split(","))


def _speed(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is no speed")
    return value


class _whole:
    """A whole number within bounds."""

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most

    def __call__(self, text: str) -> int:
        value = int(text)
        if not self._least <= value <= self._most:
            raise argparse.ArgumentTypeError(f"{value} is not from {self._least} to {self._most}")
        return value
