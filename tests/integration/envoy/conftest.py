from contextlib import AsyncExitStack

import pytest

from tests.integration.envoy.harness import Mesh


@pytest.fixture
async def mesh(tmp_path):
    """A mesh to be started with `await mesh.start(…)`; everything it started ends with the test."""
    async with AsyncExitStack() as stack:
        yield Mesh(stack, tmp_path)
