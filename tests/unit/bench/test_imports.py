"""The bench of the engine also runs where gRPC, generated code and the command line are missing."""

import subprocess
import sys

ABSENT = ("grpc", "loom", "typer", "google.protobuf", "opentelemetry", "aiohttp", "structlog")
BLOCKED = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(absent + ".") for absent in {ABSENT!r}):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def load(code):
    """The top-level modules of a process of its own, where what is ABSENT cannot be imported."""
    code = BLOCKED + code + "\nprint(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_bench_of_the_engine_needs_nothing_of_the_mesh():
    assert "torch" in load("import services.worker.bench.measure, services.worker.bench.peer")


def test_reading_its_options_loads_no_torch():
    assert not load("import services.worker.bench.__main__") & {"torch", "transformers"}


def test_the_maths_load_no_library_but_msgspec():
    found = load("import tokenloom.bench.compare, tokenloom.bench.lines, tokenloom.bench.traces")
    assert not found & {"numpy", "torch", "yaml", "asyncio", "orjson"}
