"""A whole mesh with the sim engine, started and stopped by the command that people type."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokenloom.cli import envoy
from tokenloom.cli.errors import CliError
from tokenloom.cli.main import app
from tokenloom.cli.ports import free_ports, is_free
from tokenloom.cli.traces import SERVICES, read_recent

WAIT_S = 120.0
PROCESSES = ["modelstore", "worker-0", "worker-1", "batcher", "gateway", "envoy"]


class Cli:
    """The command, with a home and a public port of its own.

    What starts or ends a mesh is a process, as people type it. The rest runs here: a process for each
    would spend most of its time on imports.
    """

    def __init__(self, home: Path) -> None:
        self.port = free_ports(1, random.Random())[0]
        paths = os.pathsep.join([str(envoy.ROOT), str(envoy.ROOT / "gen")])
        self.env = dict(os.environ, TOKENLOOM_HOME=str(home), PYTHONPATH=paths, COLUMNS="160")

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tokenloom.cli", *arguments]
        return subprocess.Popen(
            command, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, *arguments: str) -> str:
        """The output of a command that must succeed."""
        status, out = self.attempt(*arguments)
        assert status == 0, out
        return out

    def attempt(self, *arguments: str) -> tuple[int, str]:
        if arguments[0] not in ("up", "down"):
            return self.here(*arguments)
        process = self.popen(*arguments)
        out, _ = process.communicate(timeout=WAIT_S)
        return process.returncode, out

    def here(self, *arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, arguments, env=self.env)
        if isinstance(done.exception, CliError):
            return done.exception.status, f"{done.output}tokenloom: {done.exception}\n"
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.output

    def up(self, *more: str) -> list[str]:
        return ["up", "--engine", "sim", "--workers", "2", "--port", str(self.port), *more]

    def processes(self) -> dict[str, dict]:
        return {p["name"]: p for p in json.loads(self.run("status", "--json"))["processes"]}


def pids(processes: dict[str, dict]) -> set[int]:
    """Every process of a mesh, engines included."""
    found: set[int] = set()
    rest = list(processes.values())
    while rest:
        process = rest.pop()
        found.add(process["pid"])
        rest += process["children"]
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def until(holds, what: str) -> None:
    """Processes of others give no event when they come and go."""
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def came_back(process: dict) -> bool:
    return process["state"] == "ready" and process["restarts"] == 1


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    """A mesh that runs detached for all tests of this file."""
    made = Cli(tmp_path_factory.mktemp("home"))
    try:
        out = made.run(*made.up("--detach"))
        assert f"127.0.0.1:{made.port}" in out
        yield made
    finally:
        made.attempt("down")


def test_status_lists_every_process_ready_with_its_ports_and_engines(cli):
    processes = cli.processes()
    assert list(processes) == PROCESSES
    assert {p["state"] for p in processes.values()} == {"ready"}
    assert processes["envoy"]["ports"].keys() == {"edge", "mesh", "admin", "metrics"}
    assert processes["envoy"]["ports"]["edge"] == cli.port
    assert all(lives(pid) for pid in pids(processes))
    # One engine for the one model on each worker.
    engines = [[child["name"] for child in processes[f"worker-{i}"]["children"]] for i in (0, 1)]
    assert engines == [["services.worker.sim"], ["services.worker.sim"]]


def test_an_answer_streams_and_its_trace_shows_every_service_under_one_root(cli):
    answer = json.loads(cli.run("generate", "hello", "--max-tokens", "12", "--json"))
    assert (answer["completion_tokens"], answer["finish_reason"]) == (12, "length")
    assert answer["text"]
    trace = json.loads(cli.run("trace", "--last", "--json"))
    spans = {s["span_id"]: s for s in trace["spans"]}
    assert {s["service"] for s in spans.values()} >= {"edge", "gateway", "mesh", "batcher", "worker"}
    (root,) = [s for s in spans.values() if s["parent_id"] not in spans]
    assert (root["service"], root["parent_id"]) == ("edge", "")
    drawn = cli.run("trace", answer["request_id"])
    assert trace["trace_id"] in drawn
    assert re.search(r"└─ worker decode|├─ worker decode", drawn)


def test_every_process_of_a_mesh_leaves_the_cores_to_whoever_computes(cli):
    processes = {name: pids({name: found}) for name, found in cli.processes().items()}
    policies = {name: {os.sched_getscheduler(pid) for pid in found} for name, found in processes.items()}
    assert policies == {name: {os.SCHED_BATCH} for name in PROCESSES}


def test_a_second_mesh_and_a_taken_port_are_refused(cli, tmp_path):
    status, out = cli.attempt(*cli.up("--detach"))
    assert status == 1
    assert "already running" in out
    other = Cli(tmp_path)
    other.port = cli.port
    status, out = other.attempt(*other.up("--detach"))
    assert status == 1
    assert f"port {cli.port} is in use by envoy" in out


def test_the_running_mesh_tells_other_commands_where_its_modelstore_is(cli):
    (model,) = json.loads(cli.run("models", "list", "--json"))
    assert model["name"] == "sim"


def test_a_killed_worker_comes_back_on_its_port_and_the_mesh_goes_on(cli):
    before = cli.processes()["worker-1"]
    os.kill(before["pid"], signal.SIGKILL)
    # The other worker answers meanwhile.
    cli.run("generate", "hello", "--max-tokens", "3")
    until(lambda: came_back(cli.processes()["worker-1"]), "worker-1 is not back")
    after = cli.processes()["worker-1"]
    assert after["pid"] != before["pid"]
    assert after["ports"] == before["ports"]
    assert not any(lives(child["pid"]) for child in before["children"])
    assert "worker-1" in (said := cli.run("logs", "launcher"))
    assert "died: signal SIGKILL" in said


def test_down_leaves_nothing_behind(cli):
    everything = pids(cli.processes())
    assert cli.run("down") == "the mesh is down\n"
    assert not any(lives(pid) for pid in everything)
    assert cli.processes() == {}
    assert is_free(cli.port)


def test_a_mesh_starts_again_from_what_it_kept_and_with_a_ratio_of_0_traces_only_who_asks(cli):
    cli.attempt("down")
    assert "already" not in cli.run(*cli.up("--detach", "--trace-ratio", "0"))
    began_ns = time.time_ns()
    cli.run("generate", "hello", "--max-tokens", "2")
    wanted = f"{began_ns:032x}"
    request = urllib.request.Request(
        f"http://127.0.0.1:{cli.port}/v1/completions",
        json.dumps({"model": "sim", "prompt": "hello", "max_tokens": 2}).encode(),
        {"content-type": "application/json", "traceparent": f"00-{wanted}-00f067aa0ba902b7-01"},
    )
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 2
    path = Path(cli.env["TOKENLOOM_HOME"]) / "traces.jsonl"

    def fresh() -> dict[str, set[str]]:
        """Which services left spans of each trace since this test began."""
        traces = read_recent(path)
        return {
            trace_id: services
            for trace_id, trace in traces.items()
            if (services := {s.service for s in trace.spans if s.start_ns >= began_ns})
        }

    # Each sends its spans in order: when all have sent those of the second request, none kept the first's.
    until(lambda: fresh().get(wanted, set()) >= SERVICES, "the trace that was asked for")
    assert fresh().keys() == {wanted}


def test_with_the_launcher_killed_every_process_ends_and_the_next_mesh_starts(cli):
    from tokenloom.cli import state

    mesh = state.read(Path(cli.env["TOKENLOOM_HOME"]) / "mesh.json")
    everything = pids(cli.processes())
    os.kill(mesh.launcher_pid, signal.SIGKILL)
    until(lambda: not any(lives(pid) for pid in everything), "a process outlived the launcher")
    assert cli.processes() == {}


def test_ctrl_c_in_the_foreground_leaves_nothing_behind(cli):
    launcher = cli.popen(*cli.up())
    # One after the other appears as it is started.
    all_ready = dict.fromkeys(PROCESSES, "ready")
    until(lambda: {n: p["state"] for n, p in cli.processes().items()} == all_ready, "the mesh is up")
    everything = pids(cli.processes())
    assert len(everything) >= len(PROCESSES)
    launcher.send_signal(signal.SIGINT)
    out, _ = launcher.communicate(timeout=WAIT_S)
    assert launcher.returncode == 0, out
    assert "the mesh is down" in out
    assert not any(lives(pid) for pid in everything)
