"""`tokenloom bench engine`: a process with torch measures, this one shows what it says.

The model is a folder, or a version of this user's store that is laid out as one for as long as the
measurement takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec

from tokenloom.bench import lines
from tokenloom.bench.report import Prefix, Report
from tokenloom.bench.stats import Level, Objectives, Record
from tokenloom.bench.traces import Fit
from tokenloom.bench.workload import Lengths
from tokenloom.cli import bench_facts, local
from tokenloom.cli.bench_load import OnEnd
from tokenloom.cli.bench_mesh import Watcher
from tokenloom.cli.errors import CliError
from tokenloom.cli.plan import environment

ENGINE = "services.worker.bench"
PEER = "services.worker.bench.peer"
"""Processes that measure: our engine, and transformers' own continuous batching."""
ENDING_S = 10.0
"""How long the process may take to end once it was told to."""


@dataclass(frozen=True)
class EngineLoad:
    """Which engine, and what to run on it."""

    model: str | None
    model_dir: Path | None
    device: str
    dtype: str
    threads: int
    kv_cache_bytes: int
    sequences_max: int
    step_tokens_max: int
    batches: tuple[int, ...]
    prompts: str
    requests: int | None
    lengths: Lengths
    prefix_tokens: int
    seed: int
    objectives: Objectives
    pipeline_depth: int | None = None
    itl_max_ms: int | None = None
    """None: as the engine has it."""
    trace: Path | None = None
    fit: Fit = field(default_factory=Fit)
    shape: str | None = None
    """Instead of a model."""
    more: Mapping[str, object] = field(default_factory=dict)
    """Further options of the process, by name; None: not given."""

    def arguments(self, folder: Path | None) -> list[str]:
        """For the process that measures."""
        given: dict[str, object] = {
            "model-dir": folder,
            "shape": self.shape,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "kv-cache-bytes": self.kv_cache_bytes,
            "sequences-max": self.sequences_max,
            "step-tokens-max": self.step_tokens_max,
            "pipeline-depth": self.pipeline_depth,
            "itl-max-ms": self.itl_max_ms,
            "batch": ",".join(map(str, self.batches)),
            "prompts": self.prompts,
            "requests": self.requests,
            "prompt-tokens": self.lengths.prompt,
            "output-tokens": self.lengths.output,
            "trace": self.trace and self.trace.absolute(),
            "length-scale": self.fit.length_scale,
            "input-max": self.fit.input_max,
            "output-max": self.fit.output_max,
            "prefix-cached": self.prefix_tokens,
            "seed": self.seed,
            "slo-ttft-ms": self.objectives.ttft_ms,
            "slo-itl-ms": self.objectives.itl_ms,
            **self.more,
        }
        return [f"--{name}={value}" for name, value in given.items() if value is not None]


def run(load: EngineLoad, watcher: Watcher, module: str = ENGINE) -> Report:
    """Raises CliError."""
    began = time.time()
    machine = bench_facts.machine()
    with _weights(load) as (name, folder):
        heard = _Heard(watcher)
        command = [sys.executable, "-m", module, *load.arguments(folder)]
        _listen(command, heard)
        return Report(
            kind="engine",
            target=str(load.shape or load.model_dir or local.store_dir()),
            model=name,
            protocol=f"in process, {heard.about.protocol}",
            seed=load.seed,
            started_unix_s=began,
            workload=heard.about.workload,
            machine=machine,
            engine=heard.about.engine,
            levels=heard.levels,
            prefix=heard.prefix,
        )


class _Heard:
    """What the process said so far."""

    def __init__(self, watcher: Watcher) -> None:
        self.about = lines.About({}, {}, "")
        self.levels: list[Level] = []
        self.prefix: Prefix | None = None
        self._watcher = watcher
        self._on_end: OnEnd | None = None
        self._before = (0, 0)

    def take(self, line: lines.Line) -> None:
        """Raises CliError when it is a failure."""
        match line:
            case lines.Note(text):
                self._watcher.note(text)
            case lines.About():
                self.about = line
            case lines.Progress(done, total, tokens):
                self._progress(done, total, tokens)
            case lines.Measured(level):
                self._on_end = None
                self.levels.append(level)
                self._watcher.measured(level)
            case lines.Cached(prefix):
                self.prefix = prefix
            case lines.Failed(message):
                raise CliError(message)

    def _progress(self, done: int, total: int, tokens: int) -> None:
        if self._on_end is None:
            self._on_end, self._before = self._watcher.begin(f"level {len(self.levels) + 1}", total), (0, 0)
        ended, counted = self._before
        for number in range(done - ended):
            self._on_end(Record(output_tokens=tokens - counted if number == 0 else 0))
        self._before = (done, tokens)


def _listen(command: list[str], heard: _Heard) -> None:
    """Run the process to its end. Raises CliError."""
    with tempfile.TemporaryFile() as noise, _child(command, noise) as process:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                heard.take(lines.decode(line))
            except msgspec.MsgspecError:
                noise.write(line)
        if process.wait() != 0:
            raise CliError(f"the bench process ended with status {process.returncode}:\n{_tail(noise)}")


@contextmanager
def _child(command: list[str], noise: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=noise, env=environment(os.environ)
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(ENDING_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _tail(noise: IO[bytes], count: int = 8) -> str:
    noise.seek(0)
    return "\n".join(noise.read().decode("utf-8", "replace").strip().splitlines()[-count:])


@contextmanager
def _weights(load: EngineLoad) -> Iterator[tuple[str, Path | None]]:
    """Name and folder of what is measured; a shape needs none. Raises CliError."""
    if load.shape is None:
        with model_folder(load.model, load.model_dir) as found:
            yield found
    elif load.model is not None or load.model_dir is not None:
        raise CliError("give --shape, or a model, not both", status=2)
    else:
        yield load.shape, None


@contextmanager
def model_folder(model: str | None, model_dir: Path | None) -> Iterator[tuple[str, Path]]:
    """Name and Hugging Face folder of a model. Raises CliError."""
    if model is not None and model_dir is not None:
        raise CliError("give --model or --model-dir, not both", status=2)
    if model_dir is not None:
        if not (model_dir / "config.json").is_file():
            raise CliError(f"--model-dir {model_dir}: there is no config.json in it", status=2)
        yield model_dir.name, model_dir.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="tokenloom-bench-") as folder:
        yield _export(model, Path(folder)), Path(folder)


def _export(model: str | None, folder: Path) -> str:
    """Lay a version of the store out in `folder`; its name. Raises CliError."""
    # Only here: it takes a while, and a folder that is given does not need it.
    from loom.modelstore.v1 import modelstore_pb2 as pb

    from services.modelstore.app import export_offline, open_offline
    from tokenloom.kit import logs
    from tokenloom.kit.errors import CallError

    logs.setup("cli", "cli", level="error", fmt="console")
    store = local.store_dir()

    async def names() -> list[str]:
        servicer: Any = await open_offline(store)
        listed = await servicer.ListModels(pb.ListModelsRequest(), None)
        return sorted(found.name for found in listed.models if found.versions)

    import asyncio

    try:
        there = asyncio.run(names())
        if model is None and len(there) != 1:
            raise CliError(_which(there, store))
        version = export_offline(store, model or there[0], folder)
    except CallError as error:
        raise CliError(f"{error.reason}: {error.message}") from None
    except OSError as error:
        raise CliError(f"store folder {store}: {error.strerror or error}") from None
    if not (folder / "config.json").exists():
        raise CliError(f"{model or there[0]} has no weights: the engine cannot run it")
    return str(version.manifest.name)


def _which(there: list[str], store: Path) -> str:
    if there:
        return f"say which model with --model; there are: {', '.join(there)}"
    return (
        f"no model in {store}: import one with `tokenloom models import SRC --name NAME`, or give --model-dir"
    )
