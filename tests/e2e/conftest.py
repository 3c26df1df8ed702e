"""Two meshes, each for the one module that uses it: one of sim workers, one with the real model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.mesh import Mesh
from tools.fetch import fetch_model


@pytest.fixture(scope="module")
def sim_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two sim workers of 64 sequences, 10 ms a step."""
    mesh = Mesh(
        tmp_path_factory.mktemp("sim"),
        TOKENLOOM_WORKER_SIM_STEP_MS="10",
        TOKENLOOM_WORKER_SEQUENCES_MAX="64",
    )
    mesh.up("--engine", "sim", "--workers", "2")
    yield mesh
    mesh.down()


@pytest.fixture(scope="module")
def model_home(tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    """A home whose store holds SmolLM2-135M-Instruct as `smollm2`; nothing runs in it yet."""
    mesh = Mesh(tmp_path_factory.mktemp("real"))
    mesh.ok("models", "import", str(fetch_model()), "--name", "smollm2", timeout_s=300)
    return mesh


@pytest.fixture(scope="module")
def real_mesh(model_home: Mesh) -> Iterator[Mesh]:
    """One torch worker with the real model in float32, where equal tokens may be claimed."""
    model_home.environ["TOKENLOOM_WORKER_DTYPE"] = "float32"
    model_home.up()
    yield model_home
    model_home.down()
