"""The systems that `tools.bench_peers` compares: started, asked by one load client, stopped.

Servers stay up for the whole comparison and are asked in turn; what one of them burns while another is
measured is noted. Systems without a server are a process for each cell.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rich.console import Console

from tokenloom.bench.report import Report
from tokenloom.bench.stats import Level, Objectives
from tokenloom.bench.workload import Lengths
from tokenloom.cli import bench_engine, bench_mesh, bench_view, local
from tokenloom.cli.bench_engine import EngineLoad
from tokenloom.cli.bench_mesh import MeshLoad, Watcher
from tokenloom.cli.plan import environment
from tokenloom.cli.ports import free_ports
from tokenloom.cli.processes import children_of

START_MAX_S = 600.0
"""For a server from its start to its first answer; a model is loaded and compiled meanwhile."""
STOP_MAX_S = 30.0
IDLE_CORES_MAX = 0.01
"""A server that takes more than this while another is measured is stopped for as long."""
SETTLE_S = 1.0
"""For a server that was stopped, before it is measured: its parts have to hear of each other again."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
COMMAND = (sys.executable, "-m", "tokenloom.cli")


@dataclass(frozen=True)
class Ask:
    """One cell's load."""

    concurrency: int
    requests: int
    lengths: Lengths
    seed: int


class System(Protocol):
    """Something that can be measured."""

    name: str

    def measure(self, ask: Ask, watcher: Watcher) -> Level:
        """Raises CliError."""
        ...

    def describe(self) -> dict[str, str | int | float]:
        """Version, dtype and the like."""
        ...

    def cpu_s(self) -> float:
        """CPU seconds of its processes so far; 0 for one that runs only while it is measured."""
        ...

    def pause(self) -> None:
        """Another one is measured now."""
        ...

    def resume(self) -> None:
        """It is this one's turn."""
        ...


class Server:
    """A server on a port; `pids` are its processes' ancestors."""

    def __init__(
        self, name: str, address: str, model: str, pids: Sequence[int], facts: dict[str, str | int | float]
    ) -> None:  # fmt: skip
        self.name = name
        self._load = MeshLoad(address=address, model=model, loop=bench_mesh.fast_loop("openai"))
        self._pids = list(pids)
        self._facts = facts
        self._stopped: list[int] = []
        self.burns = False
        """Whether it was seen to take CPU without being asked anything."""

    def measure(self, ask: Ask, watcher: Watcher) -> Level:
        load = replace(
            self._load,
            concurrency=(ask.concurrency,),
            requests=ask.requests,
            lengths=ask.lengths,
            seed=ask.seed,
        )
        return bench_mesh.run(load, watcher).levels[0]

    def describe(self) -> dict[str, str | int | float]:
        return self._facts

    def resolve(self, load: EngineLoad) -> None:
        """Asks a bare engine with the same settings what `auto` means here."""
        one = replace(load, prompts="ids", requests=1, lengths=Lengths(16, 1))
        self._facts |= bench_engine.run(one, bench_view.Display(Console(quiet=True))).engine

    def cpu_s(self) -> float:
        return sum(_cpu_s(pid) for pid in self._tree())

    def pause(self) -> None:
        if self.burns:
            self._stopped = self._tree()
            for pid in self._stopped:
                _signal(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self._stopped:
            _signal(pid, signal.SIGCONT)
        if self._stopped:
            time.sleep(SETTLE_S)
        self._stopped = []

    def _tree(self) -> list[int]:
        found: list[int] = []
        rest = list(self._pids)
        while rest:
            pid = rest.pop()
            found.append(pid)
            rest += children_of(pid)
        return found


class InProcess:
    """A process that loads the model, measures one level and ends."""

    def __init__(self, name: str, module: str, load: EngineLoad) -> None:
        self.name = name
        self._module = module
        self._load = load
        self._about: dict[str, str | int | float] = {}

    def measure(self, ask: Ask, watcher: Watcher) -> Level:
        load = replace(
            self._load,
            batches=(ask.concurrency,),
            requests=ask.requests,
            lengths=ask.lengths,
            seed=ask.seed,
        )
        report: Report = bench_engine.run(load, watcher, self._module)
        self._about = report.engine
        return report.levels[0]

    def describe(self) -> dict[str, str | int | float]:
        return self._about

    def cpu_s(self) -> float:
        return 0.0

    def pause(self) -> None:
        """It has ended already."""

    def resume(self) -> None:
        """It starts when it is measured."""


def engine_load(folder: Path, dtype: str, threads: int) -> EngineLoad:
    """The engine alone, with the limits that a worker has by default and the gateway's own prompts."""
    return EngineLoad(
        model=None,
        model_dir=folder,
        device="cpu",
        dtype=dtype,
        threads=threads,
        kv_cache_bytes=0,
        sequences_max=64,
        step_tokens_max=512,
        batches=(1,),
        prompts="chat",
        requests=None,
        lengths=Lengths(1, 1),
        prefix_tokens=0,
        seed=0,
        objectives=Objectives(),
    )


@contextmanager
def mesh(name: str, model: str, source: Path, dtype: str, threads: int) -> Iterator[Server]:
    """Ours, under the present TOKENLOOM_HOME and on a free port; `source` is imported unless it is there."""
    (port,) = free_ports(1, random.Random())
    known = subprocess.run([*COMMAND, "models", "show", model], env=_env(), capture_output=True, check=False)
    if known.returncode != 0:
        _command("models", "import", str(source), "--name", model)
    settings = {"TOKENLOOM_WORKER_DTYPE": dtype, "TOKENLOOM_WORKER_THREADS": str(threads)}
    # Untraced, as the peers are.
    _command("up", "--detach", "--port", str(port), "--model", model, "--trace-ratio", "0", **settings)
    try:
        running = local.running()
        if running is None:
            raise SystemExit("bench: the mesh is gone; see `tokenloom logs`")
        facts: dict[str, str | int | float] = {"dtype": dtype, "threads": threads, "trace_ratio": 0}
        yield Server(name, f"http://127.0.0.1:{port}", model, [running.launcher_pid], facts)
    finally:
        _command("down")


@contextmanager
def vllm(venv: Path, folder: Path, dtype: str, cache_gib: int, log: Path) -> Iterator[Server]:
    """vLLM's CPU server out of a virtual environment of its own."""
    (port,) = free_ports(1, random.Random())
    binary = venv / "bin" / "vllm"
    if not binary.exists():
        raise SystemExit(
            f"bench: there is no {binary}: give the virtual environment that vLLM is installed in"
        )
    command = [str(binary), "serve", str(folder), "--served-model-name", "smol", "--dtype", dtype]
    command += ["--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": str(cache_gib), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=env, start_new_session=True
        )
    try:
        _await_server(process, port, log)
        facts: dict[str, str | int | float] = {
            "version": _vllm_version(venv),
            "dtype": dtype,
            "command": " ".join(["vllm", *command[1:2], "MODEL", *command[3:]]),
        }
        yield Server("vllm", f"http://127.0.0.1:{port}", "smol", [process.pid], facts)
    finally:
        _end(process)


def _await_server(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    give_up_s = time.monotonic() + START_MAX_S
    while time.monotonic() < give_up_s:
        if process.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise SystemExit(f"bench: vLLM ended with status {process.returncode}:\n{tail}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"bench: vLLM did not answer within {START_MAX_S:.0f} s; its log is {log}")


def _vllm_version(venv: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('vllm'))"
    done = subprocess.run(
        [venv / "bin" / "python", "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout.strip() or "unknown"


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole session of a server: it has workers of its own."""
    for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if number is signal.SIGTERM:
            try:
                process.wait(STOP_MAX_S)
            except subprocess.TimeoutExpired:
                continue
    process.wait()


def _command(*arguments: str, **settings: str) -> None:
    status = subprocess.run([*COMMAND, *arguments], env=_env() | settings, check=False).returncode
    if status != 0:
        raise SystemExit(f"bench: tokenloom {' '.join(arguments)} ended with status {status}")


def _env() -> dict[str, str]:
    return environment(os.environ)


def _cpu_s(pid: int) -> float:
    """User and system time of one process; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
