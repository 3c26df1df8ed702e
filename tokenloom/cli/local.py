"""Where the local mesh keeps its things, and how other commands find one that runs.

`TOKENLOOM_HOME` moves everything below one folder, so that several meshes can live side by side;
without it the XDG folders are used.
"""

from __future__ import annotations

import os
from pathlib import Path

from tokenloom.cli import state


def _home() -> Path | None:
    value = os.environ.get("TOKENLOOM_HOME")
    return Path(value).expanduser().absolute() if value else None


def _xdg(variable: str, default: str) -> Path:
    # The XDG specification has relative paths ignored.
    value = os.environ.get(variable, "")
    base = Path(value) if value.startswith("/") else Path.home() / default
    return base / "tokenloom"


def state_dir() -> Path:
    """State, logs, traces and Envoy's files of this user's mesh."""
    return _home() or _xdg("XDG_STATE_HOME", ".local/state")


def store_dir() -> Path:
    """The modelstore's folder."""
    home = _home()
    return home / "store" if home else _xdg("XDG_DATA_HOME", ".local/share") / "store"


def cache_dir() -> Path:
    """Where workers keep fetched weights; may be deleted whenever no mesh runs."""
    home = _home()
    return home / "cache" if home else _xdg("XDG_CACHE_HOME", ".cache") / "worker"


def logs_dir() -> Path:
    """One file for each process, `<name>.log`."""
    return state_dir() / "logs"


def envoy_dir() -> Path:
    """Envoy's files, written at each start."""
    return state_dir() / "envoy"


def traces_file() -> Path:
    """Spans, one JSON object a line."""
    return state_dir() / "traces.jsonl"


def state_file() -> Path:
    """What runs, as JSON."""
    return state_dir() / "mesh.json"


def lock_file() -> Path:
    """Held by the launcher as long as it lives."""
    return state_dir() / "lock"


def last_request_file() -> Path:
    """The request that `tokenloom generate` made last."""
    return state_dir() / "last.json"


def running() -> state.Mesh | None:
    """The mesh whose launcher lives, or None."""
    return state.read(state_file()) if state.is_locked(lock_file()) else None


def running_target(service: str) -> str | None:
    """`host:port` of a service's gRPC port in the running mesh, or None when no mesh runs."""
    mesh = running()
    process = mesh.process(service) if mesh else None
    if process is None:
        return None
    port = process.ports.get("grpc")
    return f"127.0.0.1:{port}" if port else None
