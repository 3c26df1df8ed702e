"""`tokenloom status`: what runs, asked of the processes themselves."""

from __future__ import annotations

import asyncio
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenloom.cli import local, state
from tokenloom.cli.processes import children_of, probe, program_of

DEPTH_MAX = 8
"""Generations of child processes that are listed."""


def snapshot() -> dict[str, Any]:
    """`{"processes": [{"name", "pid", "ports", "state", "children"}]}`; no processes when no mesh runs."""
    mesh = local.running()
    processes = mesh.processes if mesh else []
    states = asyncio.run(_states(processes))
    return {"processes": [describe(p, *s) for p, s in zip(processes, states, strict=True)]}


def describe(process: state.Process, current: str, detail: str) -> dict[str, Any]:
    """One process as `status --json` shows it."""
    return {
        "name": process.name,
        "pid": process.pid,
        "ports": process.ports,
        "state": current,
        "detail": detail,
        "restarts": process.restarts,
        "children": descendants(process.pid),
    }


def descendants(pid: int, depth: int = 0) -> list[dict[str, Any]]:
    """Child processes, each with its own."""
    if depth == DEPTH_MAX:
        return []
    return [
        {
            "name": program_of(child),
            "pid": child,
            "ports": {},
            "state": "running",
            "children": descendants(child, depth + 1),
        }
        for child in children_of(pid)
    ]


async def _states(processes: list[state.Process]) -> list[tuple[str, str]]:
    return await asyncio.gather(*(_state(p) for p in processes))


async def _state(process: state.Process) -> tuple[str, str]:
    """`ready`, `starting` or `restarting`, and for the second why."""
    if process.state == state.RESTARTING:
        return process.state, ""
    ready, what = await probe(process.ports["metrics"])
    return (state.READY, "") if ready else (state.STARTING, what)


def show(console: Console) -> bool:
    """A table; False when no mesh runs."""
    mesh = local.running()
    if mesh is None:
        return False
    table = Table(box=None, pad_edge=False)
    for title in ("process", "state", "pid", "ports", "restarts", "children"):
        table.add_column(title, overflow="fold")
    for process in snapshot()["processes"]:
        style = "green" if process["state"] == state.READY else "yellow"
        ports = " ".join(f"{name}:{port}" for name, port in process["ports"].items())
        children = " ".join(str(child["pid"]) for child in process["children"])
        table.add_row(
            process["name"],
            Text(": ".join(filter(None, [process["state"], process["detail"]])), style),
            str(process["pid"]),
            ports,
            str(process["restarts"]),
            children,
        )
    console.print(f"mesh at {mesh.address}, engine {mesh.engine}, models {', '.join(mesh.models)}")
    console.print(table)
    for line in asyncio.run(_queues(mesh)):
        console.print(line)
    return True


async def _queues(mesh: state.Mesh) -> list[str]:
    """Each batcher that answers, in one line."""
    # Imported late: other commands that come by here do without gRPC.
    from tokenloom.cli import watch
    from tokenloom.cli.watch_view import summary

    batchers = watch.replicas(mesh)
    states = await asyncio.gather(*(watch.look(process) for process in batchers))
    return [
        f"{process.name}: {summary(seen)}"
        for process, seen in zip(batchers, states, strict=True)
        if seen is not None
    ]
