"""The experiments of gRPC's C library that the kit names are ones that the pinned version knows."""

import subprocess
import sys

OPEN_A_CHANNEL = """
import os
import tokenloom.kit
import grpc
assert "event_engine" in os.environ["GRPC_EXPERIMENTS"]
grpc.channel_ready_future(grpc.insecure_channel("127.0.0.1:1")).cancel()
"""


def test_grpc_knows_every_experiment_that_is_named():
    environment = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", OPEN_A_CHANNEL], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
