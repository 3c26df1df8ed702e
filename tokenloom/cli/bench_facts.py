"""What a figure was measured on: machine, load, commit."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from tokenloom.cli.envoy import ROOT

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
"""Instructions that decide how fast small matrix products are."""
GIT_S = 10

Facts = dict[str, str | int | float | list[str]]


def machine() -> Facts:
    """Of this machine, now."""
    cpu = _read("/proc/cpuinfo")
    flags = set((_field(cpu, "flags")).split())
    return {
        "cpu": _field(cpu, "model name") or platform.processor() or platform.machine(),
        "cpu_model": _field(cpu, "model"),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cpu_flags_absent": [flag for flag in CPU_FLAGS if flag not in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "tokenloom": metadata.version("tokenloom"),
        "commit": commit(),
    }


def commit() -> str:
    """Of the checkout, with `+` when files differ from it; `unknown` outside one."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return "unknown"

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            [git, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=GIT_S, check=False
        )
        return done.stdout.strip()

    changed = "+" if ask("status", "--porcelain") else ""
    return (ask("rev-parse", "--short=12", "HEAD") or "unknown") + changed


def brief(facts: Facts) -> str:
    """One line for a person."""
    flags = facts.get("cpu_flags", [])
    named = ", ".join(flags) if isinstance(flags, list) else ""
    return (
        f"{facts['cpu']} (model {facts['cpu_model']}), {facts['cores']} cores, {facts['memory_gib']} GiB, "
        f"{named or 'no vector extension of note'}; load {facts['load_average_1m']}; commit {facts['commit']}"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(cpuinfo: str, name: str) -> str:
    found = re.search(rf"^{re.escape(name)}\s*: (.*)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else ""
