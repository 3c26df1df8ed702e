"""The engine also runs where gRPC and generated code are missing."""

import subprocess
import sys

PROBE = """
import sys
import services.worker.engine.loop, services.worker.engine.__main__
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
LIGHT = """
import sys
import services.worker.engine.config, services.worker.engine.support, services.worker.core.scheduler
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def loaded(code: str) -> set[str]:
    """The top-level modules of a process of its own that ran `code`."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


def test_the_engine_loads_neither_grpc_nor_generated_code():
    found = loaded(PROBE)
    assert "torch" in found
    assert not found & {"grpc", "loom", "envoy", "xds", "opentelemetry"}


def test_what_the_front_shares_with_it_loads_no_torch():
    assert not loaded(LIGHT) & {"torch", "transformers", "numpy", "grpc", "loom"}
