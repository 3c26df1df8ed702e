"""The gateway as a process: what it imports, how it starts and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(code, **environ):
    path = os.pathsep.join([str(ROOT), str(ROOT / "gen")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_gateway_imports_neither_torch_nor_transformers():
    code = (
        "import sys, services.gateway.app, services.gateway.__main__, tokenizers;"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers')))"
    )
    done = run(code)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_a_misspelt_setting_is_named_and_ends_the_start():
    done = run("import runpy; runpy.run_module('services.gateway', run_name='__main__')",
               TOKENLOOM_GATEWAY_HTP_PORT="1", TOKENLOOM_GATEWAY_MESH_CHANNELS="0")  # fmt: skip
    assert done.returncode == 78
    assert "TOKENLOOM_GATEWAY_HTP_PORT: no such setting" in done.stderr
    assert "TOKENLOOM_GATEWAY_MESH_CHANNELS" in done.stderr


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


@pytest.fixture
def process(unused_tcp_port_factory):
    ports = [unused_tcp_port_factory() for _ in range(3)]
    names = {"HTTP_PORT": ports[0], "GRPC_PORT": ports[1], "METRICS_PORT": ports[2]}
    environ = {f"TOKENLOOM_GATEWAY_{name}": str(port) for name, port in names.items()}
    environ |= {"TOKENLOOM_GATEWAY_MODELSTORE_TARGET": "127.0.0.1:1"}
    environ |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "gen")])}
    started = subprocess.Popen(
        [sys.executable, "-m", "services.gateway"], env={**os.environ, **environ}, stderr=subprocess.PIPE
    )
    yield started, ports
    started.kill()
    started.wait(10)
    started.stderr.close()


def test_a_gateway_without_a_catalogue_lives_is_not_ready_and_stops_when_told(process):
    started, (http, _, metrics) = process
    give_up = time.monotonic() + 30
    while get(f"http://127.0.0.1:{metrics}/livez")[0] != 200 and time.monotonic() < give_up:
        time.sleep(0.05)
    assert get(f"http://127.0.0.1:{metrics}/readyz") == (503, "no catalogue from the modelstore yet\n")
    status, body = get(f"http://127.0.0.1:{http}/v1/models")
    assert status == 503
    assert "service_unavailable" in body
    assert "tokenloom_gateway_requests_open 0.0" in get(f"http://127.0.0.1:{metrics}/metrics")[1]
    started.send_signal(signal.SIGTERM)
    assert started.wait(15) == 0
