"""`python -m tools.gpu_bench --out FILE`: what a bare machine with a GPU says of the engine, part by part.

    kernels   each kernel beside its reference           services.worker.bench.kernels
    exact     greedy tokens equal transformers' own      tests/integration/engine/test_families.py
    bench     the engine alone, level after level        services.worker.bench
    profile   a few recorded steps                       services.worker.bench --profile
    peer      transformers' continuous batching          services.worker.bench.peer

Each part is a process with a time limit; one that fails or takes too long leaves what it has said so far,
and the next one runs. Needs what the bench needs (torch, transformers, msgspec), triton for `kernels`,
pytest for `exact`. With `--device cpu --shape tiny` it is its own dry run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import IO, Literal

import msgspec

from tokenloom.bench import lines, words
from tokenloom.bench.stats import Level

ROOT = Path(__file__).resolve().parents[1]
LIMITS_S = {"kernels": 120.0, "exact": 240.0, "bench": 240.0, "profile": 120.0, "peer": 240.0}
ENDING_S = 10.0
"""How long a part may take to end once it was told to."""
SAID_CHARS_MAX = 6000
EXACT = "tests/integration/engine/test_families.py"
PROFILE_LINES = 16
"""Of each of a profile's tables, shown; the whole ones are in its folder."""
GPU_FACTS = "name,driver_version,clocks.max.sm,power.limit"

Status = Literal["passed", "failed", "too long", "absent"]


class Part(msgspec.Struct, kw_only=True):
    """What one part left."""

    name: str
    status: Status
    took_s: float
    command: list[str]
    said: str
    """The end of what it printed besides its levels."""
    about: dict[str, str | int | float] = {}
    levels: list[Level] = []


class Found(msgspec.Struct, kw_only=True):
    """The document that is written."""

    schema: str = "tokenloom.gpu_bench/1"
    started_unix_s: float
    machine: dict[str, str]
    parts: list[Part] = []


def main(arguments: list[str] | None = None) -> int:
    """1 when a part failed or took too long."""
    options = _options(arguments)
    found = Found(started_unix_s=time.time(), machine=_machine())
    for name in options.parts:
        part = _absent(name) or _run(name, COMMANDS[name](options), options)
        found.parts.append(part)
        # After every part: whoever is cut off has what there was until then.
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
        print(f"=== {name}: {part.status} in {part.took_s:.1f} s\n{part.said}", flush=True)
        print("\n".join(_details(part, options)), flush=True)
    print("\n".join(summary(found)), flush=True)
    return int(any(part.status in ("failed", "too long") for part in found.parts))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.gpu_bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=_parts, default=list(LIMITS_S), help="names with commas between")
    parser.add_argument("--limit-s", type=_limits, default={}, help="e.g. bench=300,peer=60")
    parser.add_argument("--out", type=Path, required=True, help="JSON; the profile's files lie beside it")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--batch", default="256,128,32,1")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--peer-repeats", type=int, default=1)
    parser.add_argument("--step-tokens-max", type=int, default=8192)
    parser.add_argument("--pipeline-depth", type=int, default=2)
    parser.add_argument("--families", default="", help="pytest's -k for `exact`; default: all of them")
    parser.add_argument(
        "--kernels", default="", metavar="=ARGUMENTS", help="of `kernels`: --kernels=--errors"
    )
    parser.add_argument("--engine", nargs=argparse.REMAINDER, default=[], help="the last: the bench's own")
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    return options


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in LIMITS_S]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not among {', '.join(LIMITS_S)}")
    return names


def _limits(text: str) -> dict[str, float]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    _parts(",".join(name for name, _, _ in pairs))
    return {name: float(limit_s) for name, _, limit_s in pairs}


def _kernels(options: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", "services.worker.bench.kernels", *options.kernels.split()]


def _exact(options: argparse.Namespace) -> list[str]:
    bare = ["-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-q"]
    chosen = ["-k", options.families] if options.families else []
    return [sys.executable, "-m", "pytest", *bare, *chosen, EXACT]


def _bench(options: argparse.Namespace) -> list[str]:
    middle = options.prompt_tokens + options.output_tokens // 2
    return [
        *_measured("services.worker.bench", options, options.batch, options.output_tokens),
        f"--repeats={options.repeats}",
        f"--decode-only={middle}",
        *options.engine,
    ]


def _profile(options: argparse.Namespace) -> list[str]:
    largest = str(max(map(int, options.batch.split(","))))
    return [
        *_measured("services.worker.bench", options, largest, min(8, options.output_tokens)),
        f"--profile={_profile_folder(options)}",
        *options.engine,
    ]


def _profile_folder(options: argparse.Namespace) -> Path:
    folder: Path = options.out.parent / "profile"
    return folder


def _peer(options: argparse.Namespace) -> list[str]:
    asked = _measured("services.worker.bench.peer", options, options.batch, options.output_tokens)
    return [*asked, f"--repeats={options.peer_repeats}"]


def _measured(module: str, options: argparse.Namespace, batch: str, output_tokens: int) -> list[str]:
    """One wave of each batch, the same for ours and its peer."""
    largest = max(map(int, batch.split(",")))
    given = {
        "shape": options.shape,
        "device": options.device,
        "dtype": options.dtype,
        "batch": batch,
        "waves": 1,
        "prompt-tokens": options.prompt_tokens,
        "output-tokens": output_tokens,
        "sequences-max": largest,
        "step-tokens-max": max(largest, options.step_tokens_max),
        "pipeline-depth": options.pipeline_depth,
    }
    return [sys.executable, "-m", module, *(f"--{name}={value}" for name, value in given.items())]


COMMANDS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "kernels": _kernels, "exact": _exact, "bench": _bench, "profile": _profile, "peer": _peer,
}  # fmt: skip


def _absent(name: str) -> Part | None:
    """A part whose program this machine does not have."""
    needed = {"kernels": "triton", "exact": "pytest"}.get(name)
    if needed is None or importlib.util.find_spec(needed) is not None:
        return None
    return Part(name=name, status="absent", took_s=0.0, command=[], said=f"there is no {needed} here")


def _run(name: str, command: list[str], options: argparse.Namespace) -> Part:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, TOKENLOOM_TEST_DEVICE=options.device, HF_HUB_OFFLINE="1",
                       PYTHONPATH=os.pathsep.join(paths))  # fmt: skip
    limit_s, began_s = options.limit_s.get(name, LIMITS_S[name]), time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit_s)
            status: Status = "failed" if process.returncode else "passed"
        except subprocess.TimeoutExpired:
            status = "too long"
        finally:
            _end(process)
        took_s = time.monotonic() - began_s
        return _heard(Part(name=name, status=status, took_s=took_s, command=command, said=""), out, errors)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and all that it has started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        try:
            process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            continue


def _heard(part: Part, out: IO[bytes], errors: IO[bytes]) -> Part:
    """The part with its levels; what is no line of a bench is kept as it is."""
    said = []
    out.seek(0)
    for line in out:
        try:
            heard = lines.decode(line)
        except msgspec.MsgspecError:
            said.append(line.decode("utf-8", "replace").rstrip())
            continue
        match heard:
            case lines.Measured(level):
                part.levels.append(level)
            case lines.About(engine):
                part.about = engine
            case lines.Note(text):
                said.append(text)
            case lines.Failed(message):
                said.append(message)
                part.status = "failed"
    if part.status != "passed":
        errors.seek(0)
        said.append(errors.read().decode("utf-8", "replace").rstrip())
    part.said = "\n".join(said)[-SAID_CHARS_MAX:]
    return part


def _machine() -> dict[str, str]:
    facts = {"python": platform.python_version(), "system": platform.platform()}
    try:
        query = ["nvidia-smi", f"--query-gpu={GPU_FACTS}", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return facts
    return facts | {"gpu": told.stdout.strip()}


def summary(found: Found) -> list[str]:
    """A short table: every part, then every level of the bench beside its floor and the peer."""
    by_name = {part.name: part for part in found.parts}
    said = ["", f"machine: {', '.join(found.machine.values())}"]
    said += [f"{part.name:8} {part.status:8} {part.took_s:7.1f} s" for part in found.parts]
    peers: dict[int, list[float]] = {}
    for level in _levels(by_name, "peer"):
        peers.setdefault(level.max_concurrency, []).append(level.output_throughput)
    head = ("sequences", "tokens/s", "in and out", "TTFT p50", "decode ms", "floor ms", "× floor",
            "of its floor", "decode only", "failed", "peer", "× peer")  # fmt: skip
    rows = [head, *(_row(level, peers) for level in _levels(by_name, "bench"))]
    if len(rows) == 1:
        rows += [(str(batch), *("-",) * 9, f"{median(rates):,.0f}", "-") for batch, rates in peers.items()]
    if len(rows) > 1:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        said += [
            "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
    return said


def _details(part: Part, options: argparse.Namespace) -> list[str]:
    """What a part's levels say besides the summary, or the heads of a profile's tables."""
    if part.name != "profile":
        return words.steps_lines(part.levels)
    tables = sorted(_profile_folder(options).glob("*.txt"))
    return [line for table in tables for line in table.read_text().splitlines()[:PROFILE_LINES]]


def _levels(by_name: dict[str, Part], name: str) -> Sequence[Level]:
    return by_name[name].levels if name in by_name else []


def _row(level: Level, peers: dict[int, list[float]]) -> tuple[str, ...]:
    steps = level.steps
    decode = steps.decode_step_ms.p50 if steps and steps.decode_step_ms else None
    floor = steps.decode_floor.step_ms if steps and steps.decode_floor else None
    only = steps.decode_only.tokens_per_s if steps and steps.decode_only else None
    peer = median(peers[level.max_concurrency]) if level.max_concurrency in peers else None
    return (
        str(level.max_concurrency),
        f"{level.output_throughput:,.0f}",
        f"{level.total_token_throughput:,.0f}",
        words.ms(level.ttft_ms, "p50"),
        _number(decode, ".3f"),
        _number(floor, ".3f"),
        _number(decode / floor if decode and floor else None, ".2f"),
        _number(level.floor_s / level.duration_s if level.floor_s and level.duration_s else None, ".1%"),
        _number(only, ",.0f"),
        str(level.failed),
        _number(peer, ",.0f"),
        _number(level.output_throughput / peer if peer else None, ".2f"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
