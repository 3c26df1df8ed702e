"""The command line of the bench process. Bounds that matter to people are checked by `tokenloom bench`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from services.worker.engine.config import EngineConfig, decode_config, encode_config
from tokenloom.bench import traces
from tokenloom.bench.prompts import Item
from tokenloom.bench.stats import Objectives
from tokenloom.bench.workload import CONCURRENCY_MAX, REQUESTS_MAX, TOKENS_MAX, Lengths, fixed

Kind = Literal["ids", "text", "chat"]
"""`text` is what the load client sends to /v1/completions, `chat` what it sends to /v1/chat/completions."""


DEFAULTS = EngineConfig(model_dir="")


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

    def count(self, batch: int) -> int:
        """Requests of a level."""
        return self.requests or max(16, 4 * batch)

    def items(self, batch: int) -> list[Item]:
        """The requests of a level. Raises TraceError, OSError."""
        if self.trace is None:
            return fixed("request", self.count(batch), self.lengths)
        with self.trace.open("rb") as lines:
            return traces.items(traces.read(lines, self.count(batch)), self.fit)


def parse(arguments: list[str] | None = None) -> Options:
    """Ends the process, naming the option, for what cannot be. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="services.worker.bench", description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kv-cache-bytes", type=int, default=0)
    parser.add_argument("--sequences-max", type=int, default=DEFAULTS.sequences_max)
    parser.add_argument("--step-tokens-max", type=int, default=DEFAULTS.step_tokens_max)
    parser.add_argument("--pipeline-depth", type=int, default=DEFAULTS.pipeline_depth)
    parser.add_argument("--batch", type=_batches, default=(1,), help="sequences in flight: 1,8,32,64")
    parser.add_argument("--prompts", default="ids", choices=["ids", "text", "chat"])
    parser.add_argument("--requests", type=_whole(1, REQUESTS_MAX))
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
    given = parser.parse_args(arguments)
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
    )


def _config(given: argparse.Namespace) -> EngineConfig:
    config = EngineConfig(
        model_dir=str(given.model_dir),
        device=given.device,
        dtype=given.dtype,
        threads=given.threads,
        kv_cache_bytes=given.kv_cache_bytes,
        sequences_max=given.sequences_max,
        step_tokens_max=given.step_tokens_max,
        pipeline_depth=given.pipeline_depth,
    )
    # The bounds stand in the type and are checked when it is read.
    return decode_config(encode_config(config))


def _batches(text: str) -> tuple[int, ...]:
    return tuple(_whole(1, CONCURRENCY_MAX)(part) for part in text.split(","))


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
