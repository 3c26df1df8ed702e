"""The mesh of `tools.bench_batcher`: real Envoy, real batcher, swarms of sim workers, one load process.

Envoy and the batcher are started from the same specs as `tokenloom up` starts them from. Three things are
the bench's own: Envoy writes a line for every request into a file, with the times that its ext_proc
filter measured; the batcher runs under `services.batcher.bench`, which adds up its core's time; and
batcher, Envoy and load are scheduled before the swarms, which stand for other machines (`tokenloom up` lets
them all step aside for an engine). Where a pick is timed the load steps aside as well, and both take only
what batcher and Envoy leave: on a cluster neither would share their cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import sys
import time
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import yaml

from tokenloom.cli import envoy
from tokenloom.cli.plan import Options, Plan, Ports
from tokenloom.cli.processes import GUARD, Spec, raise_file_limit
from tokenloom.cli.supervisor import Event, Supervisor
from tools.bench_batcher_load import Ask, Result, Seen
from tools.bench_batcher_load import Plan as LoadPlan

VERSION = "sha256:" + "5" * 64
MODEL = "sim"
SETTLE_S = 2.0
"""From when every process is ready: the batcher subscribes to all workers, and all report."""
LEAD_S = 2.0
"""For the load process to start before its first request is due."""
TIMEOUT_S = 120.0
FIRST_CHANNELS = 4
"""Connections to Envoy, as a gateway opens them."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CORE_TIMES_MAX_S = 5.0
AS_ON_A_CLUSTER = ("batcher", "envoy")
SWARM_NICE = 15
SWARMS_MAX = 2
"""Processes of sim workers. With one, the kernel leaves its thread behind batcher or Envoy half of the
time while the other core has nothing to do."""
EXT_PROC = "envoy.filters.http.ext_proc"
BYPASSED = "http.mesh.ext_proc.failure_mode_allowed"

CoreTimes = dict[str, tuple[int, float]]
"""Calls and CPU seconds inside the scheduler, by method."""

ACCESS_LOG = {
    "start": "%START_TIME(%s.%6f)%",
    "request_id": "%REQ(X-LOOM-REQUEST-ID)%",
    "lease": "%REQ(X-LOOM-LEASE)%",
    "queued_ms": "%REQ(X-LOOM-QUEUED-MS)%",
    "picked": "%REQ(X-GATEWAY-DESTINATION-ENDPOINT)%",
    "upstream": "%UPSTREAM_HOST%",
    "flags": "%RESPONSE_FLAGS%",
    "ext_proc": f"%FILTER_STATE({EXT_PROC})%",
}


@dataclass(frozen=True)
class Setup:
    """One mesh: how many workers, and settings of workers and batcher beside the defaults."""

    workers: int
    worker: dict[str, object] = field(default_factory=dict)
    batcher: dict[str, object] = field(default_factory=dict)
    aside: bool = False
    """Swarm and load, which stand for other machines, run only while batcher and Envoy leave a core free."""

    def environ(self) -> dict[str, str]:
        """As the caller of `tokenloom up` would set them."""
        given = {f"TOKENLOOM_WORKER_{key}": str(value) for key, value in self.worker.items()}
        return os.environ | given | {f"TOKENLOOM_BATCHER_{k}": str(v) for k, v in self.batcher.items()}


@dataclass(frozen=True)
class Access:
    """One line of Envoy's access log."""

    index: int
    """In the plan."""
    start_unix_s: float
    lease: str
    picked: str
    upstream: str
    pick_us: int | None
    """From Envoy's question to the pick, by Envoy's own clock; None when the batcher was not asked."""
    response_us: int
    """For the response's headers and trailers together, by the same."""

    @property
    def picked_unix_s(self) -> float:
        """When Envoy had the answer."""
        return self.start_unix_s + (self.pick_us or 0) / 1e6


@dataclass
class Outcome:
    """What a plan did to the mesh. CPU and core figures are of the window alone."""

    asks: list[Ask]
    seen: list[Seen]
    access: list[Access]
    start_unix_s: float
    window: tuple[float, float]
    cpu_s: dict[str, float]
    core: CoreTimes
    reports: int
    bypassed: int
    load_cpu_s: float

    @property
    def foreign_cores(self) -> float:
        """What else ran on this machine in the window, about."""
        ours_s = sum(s for name, s in self.cpu_s.items() if name != "machine") + self.load_cpu_s
        return (self.cpu_s["machine"] - ours_s) / (self.window[1] - self.window[0])

    @property
    def in_window(self) -> list[int]:
        """The requests that were sent in the window."""
        low, high = self.window
        return [i for i, seen in enumerate(self.seen) if low <= seen.sent_s < high]


class _Mesh:
    """The processes, while they run."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._aside = setup.aside
        self._swarm_count = min(SWARMS_MAX, setup.workers)
        self._access = folder / "access.log"
        self._core = folder / "core.json"
        options = Options(workers=setup.workers, engine="sim", trace_ratio=0.0)
        self._ports = Ports.choose(options, random.Random())
        outer = setup.environ()
        plan = Plan(
            options, self._ports, outer, folder / "store", folder / "cache", len(os.sched_getaffinity(0))
        )
        self._supervisor = Supervisor(folder, self._note)
        self._specs = self._choose(plan)

    async def start(self) -> None:
        """Returns when all are ready, and the workers have reported."""
        for path in (self._access, self._core):
            path.unlink(missing_ok=True)
        await self._supervisor.start(self._specs)
        for name in AS_ON_A_CLUSTER:
            _schedule_normally(self._pid(name))
        for name in self._swarms:
            _step_back(self._pid(name), aside=self._aside)
        await asyncio.sleep(SETTLE_S)

    async def stop(self) -> None:
        """Envoy first: its log is complete when it has ended."""
        await self._supervisor.stop(("envoy",))

    @property
    def target(self) -> str:
        """Where the mesh listens."""
        return f"{envoy.LOOPBACK}:{self._ports.envoy['mesh']}"

    def cpu_s(self) -> dict[str, float]:
        """User and system time so far, by process; of the whole machine, with the time stolen from it."""
        ours = {child.spec.name: _cpu_s(child.pid) for child in self._supervisor.children}
        return ours | {"machine": _machine_s()}

    def reports(self) -> int:
        """Load reports that the batcher took in."""
        text = _get(self._ports.batcher["metrics"], "/metrics")
        found = re.search(r"^tokenloom_batcher_load_reports_total (\S+)$", text, re.MULTILINE)
        return int(float(found[1])) if found else 0

    def bypassed(self) -> int:
        """Requests that Envoy let past the batcher."""
        text = _get(self._ports.envoy["admin"], f"/stats?filter=^{BYPASSED}$")
        return int(text.rpartition(": ")[2] or 0)

    async def core(self) -> CoreTimes:
        """What the scheduler took so far."""
        self._core.unlink(missing_ok=True)
        os.kill(self._pid("batcher"), signal.SIGUSR1)
        async with asyncio.timeout(CORE_TIMES_MAX_S):
            while not self._core.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        sums: dict[str, list[int]] = json.loads(self._core.read_text())
        return {name: (calls, took_ns / 1e9) for name, (calls, took_ns) in sums.items()}

    def access(self) -> list[Access]:
        """Every request, once Envoy has ended."""
        lines = self._access.read_text().splitlines()
        return [access for line in lines if (access := _access_of(json.loads(line))) is not None]

    def _pid(self, name: str) -> int:
        (pid,) = (child.pid for child in self._supervisor.children if child.spec.name == name)
        return pid

    def _choose(self, plan: Plan) -> list[Spec]:
        bootstrap = envoy.write(self._folder, plan.envoy_ports(), plan.endpoints(), trace_ratio=0.0)
        self._log_every_request(self._folder / "listeners.yaml")
        command = envoy.command(envoy_binary(), bootstrap, concurrency=plan.envoy_concurrency())
        specs = {spec.name: spec for spec in plan.serving([MODEL], command)}
        batcher = specs["batcher"]
        measured = (sys.executable, "-m", "services.batcher.bench", str(self._core))
        return [
            replace(batcher, command=measured, env=_untraced(batcher.env)),
            *(self._swarm(specs, number) for number in range(self._swarm_count)),
            specs["envoy"],
        ]

    @property
    def _swarms(self) -> list[str]:
        return [f"swarm-{number}" for number in range(self._swarm_count)]

    def _swarm(self, specs: dict[str, Spec], number: int) -> Spec:
        """Every `_swarm_count`th worker, in one process with the settings of the first of them."""
        worker = specs[f"worker-{number}"]
        ports = ",".join(str(each["grpc"]) for each in self._ports.workers[number :: self._swarm_count])
        swarm = {"TOKENLOOM_WORKER_SWARM_PORTS": ports, "TOKENLOOM_WORKER_SWARM_VERSION": VERSION}
        quiet = {"TOKENLOOM_WORKER_LOG_LEVEL": "warning"}
        command = (sys.executable, "-m", "services.worker.sim.swarm")
        return Spec(self._swarms[number], command, _untraced(worker.env) | swarm | quiet, worker.ports)

    def _log_every_request(self, path: Path) -> None:
        content = yaml.safe_load(path.read_text())
        (mesh,) = (each for each in content["resources"] if each["name"] == "mesh")
        manager = mesh["filter_chains"][0]["filters"][0]["typed_config"]
        kind = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog"
        config = {"@type": kind, "path": str(self._access), "log_format": {"json_format": ACCESS_LOG}}
        manager["access_log"].append({"name": "envoy.access_loggers.file", "typed_config": config})
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    def _note(self, event: Event) -> None:
        if event.kind in ("died", "failed"):
            print(f"bench: {event.name} {event.kind}: {event.detail}", file=sys.stderr)


async def run(setup: Setup, asks: list[Ask], window: tuple[float, float], folder: Path) -> Outcome:
    """One mesh, one plan. `window`: seconds after the plan's start between which CPU is measured."""
    raise_file_limit()
    mesh = _Mesh(setup, folder)
    try:
        await mesh.start()
        start_unix_s = time.time() + LEAD_S
        load = await _load(mesh.target, asks, start_unix_s, folder, aside=setup.aside)
        low, high = window
        await asyncio.sleep(max(start_unix_s + low - time.time(), 0))
        reports, core, cpu = mesh.reports(), await mesh.core(), mesh.cpu_s()
        await asyncio.sleep(max(start_unix_s + high - time.time(), 0))
        cpu = {name: after - cpu[name] for name, after in mesh.cpu_s().items()}
        core = _since(core, await mesh.core())
        reports = mesh.reports() - reports
        if await load.wait() != 0:
            raise SystemExit(f"bench: the load failed; see {folder / 'load.log'}")
        bypassed = mesh.bypassed()
    finally:
        await mesh.stop()
    result = msgspec.json.decode((folder / "result.json").read_bytes(), type=Result)
    return Outcome(
        asks=asks,
        seen=result.seen,
        access=mesh.access(),
        start_unix_s=start_unix_s,
        window=window,
        cpu_s=cpu,
        core=core,
        reports=reports,
        bypassed=bypassed,
        load_cpu_s=result.cpu_s,
    )


def envoy_binary() -> Path:
    """Raises SystemExit when there is none."""
    binary = envoy.find_binary()
    if binary is None:
        raise SystemExit("bench: no Envoy; run `make install`")
    return binary


async def _load(
    target: str, asks: list[Ask], start_unix_s: float, folder: Path, *, aside: bool
) -> asyncio.subprocess.Process:
    plan = LoadPlan(target, VERSION, start_unix_s, TIMEOUT_S, FIRST_CHANNELS, aside, asks)
    plan_file, result_file = folder / "plan.json", folder / "result.json"
    plan_file.write_bytes(msgspec.json.encode(plan))
    with (folder / "load.log").open("wb") as sink:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(GUARD), str(os.getpid())),
            *(sys.executable, "-m", "tools.bench_batcher_load", str(plan_file), str(result_file)),
            cwd=envoy.ROOT,
            env=os.environ | {"PYTHONPATH": f"{envoy.ROOT}{os.pathsep}{envoy.ROOT / 'gen'}"},
            stdout=sink,
            stderr=sink,
        )


def _untraced(env: Any) -> dict[str, str]:
    """Nothing collects spans here."""
    return {key: value for key, value in env.items() if not re.fullmatch(r"TOKENLOOM_\w+_OTLP_\w+", key)}


def _since(before: CoreTimes, after: CoreTimes) -> CoreTimes:
    return {
        name: (after[name][0] - calls, after[name][1] - took_s) for name, (calls, took_s) in before.items()
    }


def _access_of(line: dict[str, Any]) -> Access | None:
    """None for a request that is not the bench's."""
    request_id = line.get("request_id") or ""
    if not request_id.startswith("bench-"):
        return None
    times = line.get("ext_proc") or {}
    response_us = sum(int(times.get(f"response_{part}_latency_us", 0)) for part in ("header", "trailer"))
    pick = times.get("request_header_latency_us")
    return Access(
        index=int(request_id.removeprefix("bench-")),
        start_unix_s=float(line["start"]),
        lease=line.get("lease") or "",
        picked=line.get("picked") or "",
        upstream=line.get("upstream") or "",
        pick_us=None if pick is None else int(pick),
        response_us=response_us,
    )


def _schedule_normally(pid: int) -> None:
    """SCHED_OTHER for every thread; threads that come later have it from them."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def _step_back(pid: int, *, aside: bool) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(task.name), SWARM_NICE)
        if aside:
            os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))


def _machine_s() -> float:
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://{envoy.LOOPBACK}:{port}{path}", timeout=10) as response:
        return str(response.read().decode())
