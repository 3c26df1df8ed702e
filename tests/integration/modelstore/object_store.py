"""A real object store on this machine: SeaweedFS, in one process, spoken to over S3."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
import pytest
from obstore.store import from_url

from tools.fetch import fetch_weed

if TYPE_CHECKING:
    from obstore.store import RetryConfig

STARTS_S = 60
KEY, SECRET = "test-key", "test-secret"
PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)


@dataclass(frozen=True)
class ObjectStore:
    """Where it is and who may write there, in the words of an environment."""

    environment: Mapping[str, str]


@contextmanager
def running(folder: Path) -> Iterator[ObjectStore]:
    """A store that answers. Skips the test when its program cannot be had."""
    try:
        program = fetch_weed()
    except (SystemExit, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs SeaweedFS, which cannot be fetched: {error}")
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    folder.mkdir()
    command = [program, "server", f"-dir={folder}", *_options(folder), *_port_options(ports)]
    environment = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield ObjectStore(environment)
        finally:
            # Its data goes with the folder, and a good end takes it a quarter of a minute.
            process.kill()
            process.wait()


def await_ready() -> None:
    """Return when a first object could be written, with the environment as it is now."""
    pause, patience = timedelta(seconds=0.5), timedelta(seconds=STARTS_S)
    retry: RetryConfig = {
        "max_retries": 10 * STARTS_S,
        "backoff": {"max_backoff": pause},
        "retry_timeout": patience,
    }
    obstore.put(from_url("s3://models/ready", retry_config=retry), "ready", b"")


def _options(folder: Path) -> list[str]:
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    return [
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        f"-s3.config={folder}/s3.json",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.volumeSizeLimitMB=64",
        "-master.telemetry=false",
        "-volume.max=16",
        "-volume.preStopSeconds=0",
    ]


def _port_options(ports: Mapping[str, int]) -> list[str]:
    return [f"-{name}={port}" for name, port in ports.items()]


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
