"""Options of the benches, checked: every wrong one is named together with what it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from services.worker.bench.shapes import SHAPES
from tokenloom.bench import traces
from tokenloom.bench.prompts import Item
from tokenloom.bench.stats import Objectives
from tokenloom.bench.workload import CONCURRENCY_MAX, REQUESTS_MAX, TOKENS_MAX, Lengths
from tokenloom.cli.errors import CliError

LEVELS_MAX = 64
RATE_MAX = 100_000.0
SCALE_MAX = 1_000.0
SPEED_MAX = 1e18


@dataclass(frozen=True)
class TraceOptions:
    """Which part of a trace, and how it is fitted."""

    file: Path | None = None
    requests: int | None = None
    fit: traces.Fit = field(default_factory=traces.Fit)


def concurrencies(text: str, option: str = "--concurrency") -> tuple[int, ...]:
    """`1,8,32`. Raises CliError."""
    return tuple(int(value) for value in _numbers(text, option, 1, CONCURRENCY_MAX, whole=True))


def rates(text: str) -> tuple[float, ...]:
    """`0.5,2,4`. Raises CliError."""
    return _numbers(text, "--rate", 1e-6, RATE_MAX, whole=False)


def between(option: str, value: float, least: float, most: float) -> None:
    """Raises CliError, naming the option, for a value outside its bounds."""
    if not (least <= value <= most and math.isfinite(value)):
        raise CliError(f"{option} must be from {least:g} to {most:g}, not {value:g}", status=2)


def lengths(prompt: int, output: int) -> Lengths:
    """Raises CliError."""
    between("--prompt-tokens", prompt, 1, TOKENS_MAX)
    between("--output-tokens", output, 1, TOKENS_MAX)
    return Lengths(prompt, output)


def requests(count: int | None) -> int | None:
    """Raises CliError."""
    if count is not None:
        between("--requests", count, 1, REQUESTS_MAX)
    return count


def objectives(ttft_ms: float | None, itl_ms: float | None) -> Objectives:
    """Raises CliError."""
    for option, value in (("--slo-ttft-ms", ttft_ms), ("--slo-itl-ms", itl_ms)):
        if value is not None:
            between(option, value, 0, 1e9)
    return Objectives(ttft_ms, itl_ms)


def engine_extra(
    *, shape: str | None, load_format: str, waves: tuple[int, int | None] | None,
    decode_only: tuple[int, int, int] | None, speeds: tuple[float, float],
) -> dict[str, object]:  # fmt: skip
    """Options of the engine's bench for its process, by name. Raises CliError.

    `waves` comes with `--requests`, `decode_only` with the tokens of prompt and answer; `speeds` are bytes
    and operations per second.
    """
    if shape is not None and shape not in SHAPES:
        raise CliError(f"--shape must be one of {', '.join(sorted(SHAPES))}, not {shape!r}", status=2)
    if waves is not None and waves[1] is not None:
        raise CliError("give --requests or --waves, not both", status=2)
    for option, speed in zip(("--memory-bandwidth", "--flops"), speeds, strict=True):
        between(option, speed, 0, SPEED_MAX)
    if decode_only is not None:
        context, prompt, output = decode_only
        between("--decode-only", context, prompt, prompt + output)
    return {
        "load-format": load_format,
        "waves": waves and waves[0],
        "decode-only": decode_only and decode_only[0],
        "memory-bandwidth": speeds[0] or None,
        "flops": speeds[1] or None,
    }


def fit(rate_scale: float, length_scale: float, input_max: int | None, output_max: int | None) -> traces.Fit:
    """Raises CliError."""
    between("--rate-scale", rate_scale, 1 / SCALE_MAX, SCALE_MAX)
    between("--length-scale", length_scale, 1 / SCALE_MAX, SCALE_MAX)
    for option, value in (("--input-max", input_max), ("--output-max", output_max)):
        if value is not None:
            between(option, value, 1, TOKENS_MAX)
    return traces.Fit(rate_scale, length_scale, input_max or TOKENS_MAX, output_max or TOKENS_MAX)


def read_trace(options: TraceOptions) -> tuple[tuple[Item, ...], int]:
    """The workload of a trace file (empty without one), and how many requests were cut. Raises CliError."""
    if options.file is None:
        return (), 0
    try:
        with options.file.open("rb") as lines:
            entries = traces.read(lines, options.requests or REQUESTS_MAX)
    except OSError as error:
        raise CliError(f"--trace {options.file}: {error.strerror}", status=2) from None
    except traces.TraceError as error:
        raise CliError(f"--trace {options.file}: {error}", status=2) from None
    return tuple(traces.items(entries, options.fit)), traces.cut(entries, options.fit)


def address(text: str) -> str:
    """`http://host:port` of `host:port` or of an address with scheme. Raises CliError."""
    url = (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")) or not url.partition("://")[2]:
        raise CliError(f"--address must be host:port or http://host:port, not {text!r}", status=2)
    return url


def _numbers(text: str, option: str, least: float, most: float, whole: bool) -> tuple[float, ...]:
    found = []
    for part in text.split(","):
        try:
            found.append(float(int(part) if whole else float(part)))
        except ValueError:
            what = "whole numbers" if whole else "numbers"
            raise CliError(f"{option} takes {what} with commas between, not {text!r}", status=2) from None
        between(option, found[-1], least, most)
    if len(found) > LEVELS_MAX:
        raise CliError(f"{option} takes at most {LEVELS_MAX} values, not {len(found)}", status=2)
    return tuple(found)
