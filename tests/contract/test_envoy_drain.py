"""The preStop hook of both Envoys, as a pod runs it, against a real Envoy that carries a stream."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack

import pytest

from tests.contract.kubernetes_support import KUSTOMIZE, render
from tests.integration.envoy.harness import WAIT_S, Mesh
from tokenloom.cli import envoy

SCRIPT = KUSTOMIZE / "base" / "drain.sh"


@pytest.fixture
async def mesh(tmp_path, monkeypatch):
    arguments = render("prod").container("mesh")["args"]
    how_to_drain = arguments[arguments.index("--drain-strategy") :]
    command = envoy.command
    monkeypatch.setattr(envoy, "command", lambda *a, **k: command(*a, **k) + how_to_drain)
    async with AsyncExitStack() as stack:
        yield await Mesh(stack, tmp_path).start()


async def drain(mesh, *, forget_s=0, drain_max_s=60):
    return await asyncio.create_subprocess_exec(
        *("bash", str(SCRIPT), str(mesh.ports.admin), str(forget_s), str(drain_max_s)),
        stdout=sys.stderr,
    )


async def test_the_hook_ends_when_the_last_stream_has_ended(mesh):
    stream = asyncio.create_task(mesh.call(tokens=5, hold_at=2))
    await mesh.workers[0].saw("holding")
    hook = await drain(mesh)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(hook.wait(), 1.5)
    mesh.workers[0].tell(release=True)
    answer = await stream
    assert len(answer.tokens) == 5
    assert await asyncio.wait_for(hook.wait(), WAIT_S) == 0


async def test_the_hook_does_not_wait_longer_than_it_may(mesh):
    stream = asyncio.create_task(mesh.call(hold_at=1))
    await mesh.workers[0].saw("holding")
    hook = await drain(mesh, drain_max_s=1)
    assert await asyncio.wait_for(hook.wait(), WAIT_S) == 0
    assert not stream.done()
    stream.cancel()


async def test_calls_that_still_come_are_served_and_told_to_go_elsewhere(mesh):
    before = await mesh.call()
    hook = await drain(mesh)
    assert await asyncio.wait_for(hook.wait(), WAIT_S) == 0
    during = await mesh.call()
    assert len(before.tokens) == len(during.tokens) == 3
    assert await mesh.stat("http.mesh.downstream_cx_drain_close") == 1
