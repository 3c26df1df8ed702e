"""Children are started, watched, restarted on their own ports, and never left behind."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tokenloom.cli import processes, state
from tokenloom.cli.ports import free_ports, is_free
from tokenloom.cli.processes import Backoff, Spec
from tokenloom.cli.supervisor import Event, StartFailed, Supervisor, describe_status, last_lines

WAIT_S = 20.0

# A child that answers /readyz, and one process of its own that would live on if nobody ended it.
CHILD = """
import http.server, subprocess, sys
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("inner", inner.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok\\n")
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
# A child that lives and says that it will never be ready.
HOPELESS = CHILD.replace("send_response(200)", "send_response(503)").replace(
    'b"ok\\n"', 'b"failed: model big: needs 90 bytes of 80\\n"'
)
BROKEN = "import sys; print('the reason', file=sys.stderr); sys.exit(int(sys.argv[2]))"


class Events:
    """What the supervisor reported, and a way to wait for more."""

    def __init__(self):
        self.all: list[Event] = []
        self._more = asyncio.Event()

    def __call__(self, event):
        self.all.append(event)
        self._more.set()

    async def saw(self, kind, count=1):
        async with asyncio.timeout(WAIT_S):
            while len(found := [e for e in self.all if e.kind == kind]) < count:
                self._more.clear()
                await self._more.wait()
        return found[count - 1]


def spec(name="child", code=CHILD, port=None, *more):
    port = port or free_ports(1, random.Random())[0]
    command = (sys.executable, "-c", code, str(port), *more)
    return Spec(name, command, dict(os.environ), {"metrics": port})


@asynccontextmanager
async def supervised(tmp_path, *specs, backoff=None):
    events = Events()
    supervisor = Supervisor(tmp_path, events, backoff or Backoff(first_s=0.01, max_s=0.05))
    try:
        await supervisor.start(specs)
        yield supervisor, events
    finally:
        await supervisor.stop()


def inner_pids(log: Path):
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("inner ")]


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


async def gone(pid):
    async with asyncio.timeout(WAIT_S):
        while lives(pid):  # noqa: ASYNC110  (no event is to be had of a process that is not ours)
            await asyncio.sleep(0.01)


async def test_start_returns_when_all_are_ready_and_stop_leaves_nothing_behind(tmp_path):
    async with supervised(tmp_path, spec("one"), spec("two")) as (supervisor, events):
        assert {e.name for e in events.all if e.kind == "ready"} == {"one", "two"}
        assert [c.state for c in supervisor.children] == [state.READY] * 2
        pids = [c.pid for c in supervisor.children]
        pids += inner_pids(tmp_path / "one.log") + inner_pids(tmp_path / "two.log")
        assert len(pids) == 4
    for pid in pids:
        await gone(pid)
    assert all(is_free(c.spec.ports["metrics"]) for c in supervisor.children)


async def test_a_child_that_says_it_has_given_up_is_not_waited_for(tmp_path):
    with pytest.raises(StartFailed, match="hopeless gave up: model big: needs 90 bytes of 80; its log is"):
        async with asyncio.timeout(WAIT_S), supervised(tmp_path, spec(), spec("hopeless", HOPELESS)):
            pass
    (left_behind,) = inner_pids(tmp_path / "hopeless.log")
    await gone(left_behind)


async def test_a_child_that_dies_is_restarted_on_its_port_and_said_so(tmp_path):
    async with supervised(tmp_path, spec()) as (supervisor, events):
        (child,) = supervisor.children
        first = child.pid
        (left_behind,) = inner_pids(tmp_path / "child.log")
        os.kill(first, signal.SIGKILL)
        died = await events.saw("died")
        assert (died.name, died.pid, died.detail) == ("child", first, "signal SIGKILL")
        await events.saw("ready", 2)
        assert child.pid != first
        assert (await processes.probe(child.spec.ports["metrics"])) == (True, "ok")
        assert child.describe().restarts == 1
        # What the dead one had started does not keep its memory, nor a port.
        await gone(left_behind)


async def test_a_child_that_never_becomes_ready_fails_the_start_with_the_end_of_its_log(tmp_path):
    with pytest.raises(StartFailed, match=r"(?s)child ended with exit status 3.*the reason"):
        async with supervised(tmp_path, spec("child", BROKEN, None, "3")):
            pass


async def test_refused_settings_are_not_tried_again(tmp_path):
    events = Events()
    supervisor = Supervisor(tmp_path, events)
    with pytest.raises(StartFailed, match="exit status 78"):
        await supervisor.start([spec("child", BROKEN, None, "78")])
    assert [e.kind for e in events.all].count("died") == 1
    await supervisor.stop()


async def test_a_program_that_does_not_exist_fails_the_start(tmp_path):
    missing = Spec("child", ("/no/such/program",), {}, {"metrics": 1})
    with pytest.raises(StartFailed):
        async with supervised(tmp_path, missing):
            pass


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenloom.cli.supervisor.STOP_GRACE_S", 0.2)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + CHILD
    async with supervised(tmp_path, spec(code=stubborn)) as (supervisor, _):
        pid = supervisor.children[0].pid
    assert not lives(pid)


async def test_children_die_with_a_launcher_that_is_killed(tmp_path):
    port = free_ports(1, random.Random())[0]
    script = f"""
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {str(Path.cwd())!r})
from tests.unit.cli.test_supervisor import spec
from tokenloom.cli.supervisor import Supervisor
async def main():
    supervisor = Supervisor(Path({str(tmp_path)!r}), lambda event: None)
    await supervisor.start([spec(port={port})])
    print(supervisor.children[0].pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    launcher = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=subprocess.PIPE, env=environment
    )
    async with asyncio.timeout(WAIT_S):
        child = int(await launcher.stdout.readline())
    assert lives(child)
    launcher.kill()
    await launcher.wait()
    await gone(child)
    # The kernel ends what the launcher started; what that had started is for it to end.
    for pid in inner_pids(tmp_path / "child.log"):
        os.kill(pid, signal.SIGKILL)


def test_the_delay_before_a_restart_doubles_and_is_bounded():
    backoff = Backoff(first_s=0.1, max_s=5)
    assert [backoff.delay_s(n) for n in (1, 2, 3, 7, 1000)] == [0.1, 0.2, 0.4, 5, 5]


def test_ends_are_described_in_words():
    assert [describe_status(s) for s in (0, 1, -9, -64)] == [
        "exit status 0",
        "exit status 1",
        "signal SIGKILL",
        "signal SIGRTMAX",
    ]


def test_a_log_that_has_grown_too_long_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LOG_BYTES_MAX", 10)
    log = tmp_path / "x.log"
    processes.roll(log)
    log.write_text("0123456789")
    processes.roll(log)
    assert log.read_text() == "0123456789"
    log.write_text("0123456789a")
    processes.roll(log)
    assert log.read_text() == ""
    assert (tmp_path / "x.log.1").read_text() == "0123456789a"


def test_the_last_lines_leave_blank_ones_out(tmp_path):
    path = tmp_path / "x.log"
    assert last_lines(path, 2) == ""
    path.write_text("a\n\nb\nb\n\n")
    assert last_lines(path, 2) == "b\nb"


async def test_a_probe_of_nobody_says_starting():
    (port,) = free_ports(1, random.Random())
    assert await processes.probe(port) == (False, "starting")
