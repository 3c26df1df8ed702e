"""The walls between the rooms, read from the imports."""

import ast
import gc
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("batcher", "gateway", "modelstore", "worker")
SOURCES = sorted(p for top in ("tokenloom", "services", "tools") for p in (ROOT / top).rglob("*.py"))
CORES = [p for p in SOURCES if p.match("services/*/core/*.py") or "/core/" in p.as_posix()]

# What a sans-I/O core may not see: anything that waits, draws, tells the time or talks.
CORE_FORBIDDEN = {
    "asyncio", "google", "grpc", "logging", "loom", "msgspec", "os", "prometheus_client", "random", "socket",
    "structlog", "subprocess", "threading", "time", "torch", "transformers",
}  # fmt: skip
TORCH_ROOMS = ("services/worker/engine/", "services/worker/bench/", "services/modelstore/converter")


@cache
def tree(path):
    """A file's syntax, read once. CPython 3.11 fails now and then when it collects garbage meanwhile."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def imports(path):
    """(module, line) for every import in a file, also inside functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno


def name(path):
    return path.relative_to(ROOT).as_posix()


def broken(paths, forbidden):
    """Every import in `paths` for which `forbidden(path, module)` holds."""
    return [
        f"{name(path)}:{line} imports {module}"
        for path in paths
        for module, line in imports(path)
        if forbidden(name(path), module)
    ]


def test_there_is_something_to_check():
    assert len(SOURCES) > 40
    assert len(CORES) > 10


@pytest.mark.parametrize("service", SERVICES)
def test_services_never_import_each_other(service):
    others = tuple(f"services.{other}" for other in SERVICES if other != service)
    paths = [p for p in SOURCES if name(p).startswith(f"services/{service}/")]
    assert broken(paths, lambda _, module: module.startswith(others)) == []


def test_only_the_command_line_imports_services():
    paths = [p for p in SOURCES if not name(p).startswith(("services/", "tokenloom/cli/"))]
    assert broken(paths, lambda _, module: module.split(".")[0] == "services") == []


def test_the_kit_and_the_contract_import_neither_services_nor_the_command_line():
    kit = [p for p in SOURCES if name(p).startswith("tokenloom/kit/")]
    assert broken(kit, lambda _, m: m.startswith(("services", "tokenloom.cli", "tokenloom.contract"))) == []
    contract = [p for p in SOURCES if name(p).startswith("tokenloom/contract/")]
    assert (
        broken(contract, lambda _, m: m.startswith(("services", "tokenloom.cli", "tokenloom.kit", "loom")))
        == []
    )


def test_cores_are_sans_io():
    assert broken(CORES, lambda _, module: module.split(".")[0] in CORE_FORBIDDEN) == []


def test_cores_import_only_their_own_core_and_the_contract():
    def forbidden(path, module):
        own = "services." + path.split("/")[1] + ".core"
        ours = module.startswith(("services", "tokenloom"))
        return ours and not module.startswith((own, "tokenloom.contract"))

    assert broken(CORES, forbidden) == []


def test_torch_stays_in_its_rooms():
    def forbidden(path, module):
        return module.split(".")[0] in ("torch", "transformers") and not path.startswith(TORCH_ROOMS)

    assert broken(SOURCES, forbidden) == []


def test_the_engine_imports_no_grpc_and_no_generated_code():
    rooms = tuple(
        f"services/worker/{room}"
        for room in ("core/", "engine/", "bench/", "protocol.py", "link.py", "stepping.py")
    )
    rooms = (*rooms, "tokenloom/bench/")
    paths = [p for p in SOURCES if name(p).startswith(rooms)]
    generated = ("grpc", "google", "loom", "envoy", "xds", "tokenloom.kit")
    assert broken(paths, lambda _, module: module.startswith(generated)) == []


CHECKPOINTS = "services/modelstore/converter/checkpoints.py"


def test_nothing_unpickles_or_trusts_remote_code():
    guilty = [
        name(path)
        for path in SOURCES
        for needle in ("import pickle", "trust_remote_code=True", "torch.load(")
        if needle in path.read_text() and (name(path), needle) != (CHECKPOINTS, "torch.load(")
    ]
    assert guilty == []


def test_checkpoints_are_read_as_tensors_only():
    calls = [
        node
        for node in ast.walk(tree(ROOT / CHECKPOINTS))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) == 1
    assert {k.arg: ast.unparse(k.value) for k in calls[0].keywords}["weights_only"] == "True"


def test_files_stay_small_enough_to_read_in_one_go():
    long = {name(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}
