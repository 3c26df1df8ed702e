"""`python -m services.batcher` as an operator meets it."""

import asyncio
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WAIT_S = 20.0
EXIT_SETTINGS = 78


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def start(**settings):
    environ = {f"TOKENLOOM_BATCHER_{key.upper()}": str(value) for key, value in settings.items()}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.batcher"),
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "PATH": os.environ["PATH"], **environ},
        stderr=asyncio.subprocess.PIPE,
    )


async def finish(process):
    """(exit status, what it said)."""
    async with asyncio.timeout(WAIT_S):
        _, said = await process.communicate()
    return process.returncode, said.decode()


def get(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


async def test_it_serves_and_ends_on_sigterm():
    metrics = free_port()
    process = await start(port=0, health_port=0, metrics_port=metrics, workers="127.0.0.1:1")
    try:
        async with asyncio.timeout(WAIT_S):
            while b'"serving"' not in (line := await process.stderr.readline()):
                assert line
            while await asyncio.to_thread(get, metrics, "/readyz") != "ok\n":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        shown = await asyncio.to_thread(get, metrics, "/metrics")
        assert 'tokenloom_batcher_workers{state="lost"} 1.0' in shown
        process.send_signal(signal.SIGTERM)
        status, said = await finish(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (status, "Traceback" in said) == (0, False)


@pytest.mark.parametrize("taken", ["port", "health_port", "metrics_port"])
async def test_a_port_in_use_is_one_line_that_names_it(taken):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        ports = {"port": 0, "health_port": 0, "metrics_port": 0, taken: busy.getsockname()[1]}
        status, said = await finish(await start(workers="127.0.0.1:1", **ports))
    assert status == 1
    assert str(ports[taken]) in said
    assert "Traceback" not in said


async def test_bad_settings_are_named_and_end_the_process():
    status, said = await finish(await start(workers="worker:9100", hold_max=1))
    assert status == EXIT_SETTINGS
    assert "TOKENLOOM_BATCHER_WORKERS" in said
    assert "TOKENLOOM_BATCHER_HOLD_MAX" in said
