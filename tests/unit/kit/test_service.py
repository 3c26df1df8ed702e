"""The life of a service as a real process: settings refused, probes answered, drained on SIGTERM."""

import asyncio
import json
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

PROGRAM = Path(__file__).with_name("sample_service.py")
ROOT = PROGRAM.parents[3]


async def start(**settings):
    environ = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
        **{f"TOKENLOOM_SAMPLE_{k.upper()}": v for k, v in settings.items()},
    }
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROGRAM),
        env=environ,
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )


async def serving(process):
    """The log line that says where the probes are."""
    while line := await asyncio.wait_for(process.stderr.readline(), 20):
        event = json.loads(line)
        if event["event"] == "serving":
            return event
    raise AssertionError("the service ended before it served")


def get(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_a_service_answers_its_probes_and_drains_on_sigterm():
    process = await start(metrics_port="0")
    event = await serving(process)
    port = event["metrics_port"]
    assert event["service"] == "sample"
    assert await asyncio.to_thread(get, port, "/livez") == (200, "ok\n")
    assert await asyncio.to_thread(get, port, "/readyz") == (503, "not ready yet: the sample never is\n")
    status, text = await asyncio.to_thread(get, port, "/metrics")
    assert status == 200
    assert "process_cpu_seconds_total" in text
    process.send_signal(signal.SIGTERM)
    output, _ = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, output.decode().split()) == (0, ["drained", "closed"])


async def test_a_second_signal_ends_the_drain_at_once():
    process = await start(metrics_port="0", drain="slow")
    await serving(process)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.stdout.readline(), 20) == b"draining\n"
    process.send_signal(signal.SIGTERM)
    output, _ = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, output.decode().split()) == (0, ["closed"])


async def test_refused_settings_exit_with_every_problem_in_words():
    process = await start(metrics_port="no", drian="x")
    _, errors = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 78
    assert b"TOKENLOOM_SAMPLE_METRICS_PORT" in errors
    assert b"TOKENLOOM_SAMPLE_DRIAN: no such setting" in errors


async def test_a_taken_port_ends_the_process_with_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = await start(metrics_port=str(taken.getsockname()[1]))
        _, errors = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert "cannot start" in json.loads(errors.decode().splitlines()[-1])["event"]
