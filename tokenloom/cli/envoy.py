"""Envoy's files for one machine, made from those in `deploy/envoy/`.

The listeners and clusters are the ones that run in Kubernetes: here they only get other addresses,
and one process carries both listeners. Pure functions over parsed YAML, and one that writes them.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "deploy" / "envoy"
LISTENER_FILES = ("edge.yaml", "mesh.yaml")
CLUSTER_FILES = ("clusters-kubernetes-edge.yaml", "clusters-kubernetes-mesh.yaml")
BOOTSTRAP_FILE = "bootstrap.yaml"

LOOPBACK = "127.0.0.1"
TRACE_FLUSH_MS = 500
"""Spans are wanted soon on one machine; the default is 5 s."""

PER_MILLION = 1_000_000

Resource = dict[str, Any]
Address = tuple[str, int]


@dataclass(frozen=True)
class EnvoyPorts:
    """Where one local Envoy listens. Only `edge` may be bound to more than loopback."""

    edge: int
    mesh: int
    admin: int
    probes: int
    edge_host: str = LOOPBACK

    def address_of(self, listener: str) -> Address:
        """Where the listener of this name is bound."""
        host = self.edge_host if listener == "edge" else LOOPBACK
        return host, int(getattr(self, listener))


def find_binary() -> Path | None:
    """The pinned Envoy of this checkout, else one on PATH, else None."""
    pinned = ROOT / ".tools" / "envoy"
    if pinned.is_file():
        return pinned
    found = shutil.which("envoy")
    return Path(found) if found else None


def load(name: str) -> Resource:
    """One of the files in `deploy/envoy/`, parsed."""
    parsed: Resource = yaml.safe_load((SOURCES / name).read_text())
    return parsed


def listeners(ports: EnvoyPorts, trace_ratio: float = 1.0) -> list[Resource]:
    """Both listeners as they are, but for their address and the share of requests that are traced."""
    rebound = []
    for name in LISTENER_FILES:
        for resource in load(name)["resources"]:
            host, port = ports.address_of(resource["name"])
            _sample(resource, trace_ratio)
            rebound.append(resource | {"address": _socket(host, port)})
    return rebound


def clusters(endpoints: Mapping[str, Sequence[Address]]) -> list[Resource]:
    """Every cluster once, as it is, but found at fixed addresses instead of through DNS.

    Raises KeyError for a cluster that `endpoints` does not name.
    """
    found: dict[str, Resource] = {}
    for name in CLUSTER_FILES:
        for resource in load(name)["resources"]:
            found.setdefault(resource["name"], _pointed(resource, endpoints[resource["name"]]))
    return list(found.values())


def bootstrap(ports: EnvoyPorts, folder: Path, *, trace_flush_ms: int = TRACE_FLUSH_MS) -> Resource:
    """The bootstrap with admin and probes on this machine's ports, and its files in `folder`."""
    made = copy.deepcopy(load(BOOTSTRAP_FILE))
    made["admin"]["address"] = _socket(LOOPBACK, ports.admin)
    for key, name in (("lds_config", "listeners.yaml"), ("cds_config", "clusters.yaml")):
        made["dynamic_resources"][key]["path_config_source"]["path"] = str(folder / name)
    static = made["static_resources"]
    static["listeners"][0]["address"] = _socket(LOOPBACK, ports.probes)
    static["clusters"][0] = _pointed(static["clusters"][0], [(LOOPBACK, ports.admin)])
    settings = made["layered_runtime"]["layers"][0]["static_layer"]
    settings["tracing.opentelemetry.flush_interval_ms"] = trace_flush_ms
    return made


def write(
    folder: Path, ports: EnvoyPorts, endpoints: Mapping[str, Sequence[Address]], *, trace_ratio: float = 1.0
) -> Path:
    """Write the three files into `folder`; the bootstrap's path."""
    folder.mkdir(parents=True, exist_ok=True)
    _dump(folder / "listeners.yaml", {"resources": listeners(ports, trace_ratio)})
    _dump(folder / "clusters.yaml", {"resources": clusters(endpoints)})
    _dump(folder / BOOTSTRAP_FILE, bootstrap(ports, folder))
    return folder / BOOTSTRAP_FILE


def command(binary: Path, bootstrap_file: Path, *, concurrency: int) -> list[str]:
    """How Envoy is started: one process, no shared memory with others, warnings in its log."""
    return [
        str(binary),
        *("--config-path", str(bootstrap_file)),
        *("--service-cluster", "tokenloom", "--service-node", "local"),
        *("--concurrency", str(concurrency)),
        *("--log-level", "warning", "--disable-hot-restart"),
    ]


def standalone(made: Resource, listener_list: list[Resource], cluster_list: list[Resource]) -> Resource:
    """One configuration without files beside it, for `envoy --mode validate`, which reads no others."""
    whole = copy.deepcopy(made)
    del whole["dynamic_resources"]
    for key, resources in (("listeners", listener_list), ("clusters", cluster_list)):
        whole["static_resources"][key] += [{k: v for k, v in r.items() if k != "@type"} for r in resources]
    return whole


def _sample(resource: Resource, trace_ratio: float) -> None:
    """Sets the ratio where a listener has one: the one that begins traces."""
    manager = resource["filter_chains"][0]["filters"][0]["typed_config"]
    sampler = manager["tracing"]["provider"]["typed_config"].get("sampler")
    if sampler is not None:
        sampler["typed_config"]["wrapped_sampler"]["typed_config"]["sampling_percentage"] = {
            "numerator": round(trace_ratio * PER_MILLION),
            "denominator": "MILLION",
        }


def _pointed(cluster: Resource, addresses: Sequence[Address]) -> Resource:
    """The same cluster, of fixed endpoints."""
    made = {k: v for k, v in cluster.items() if k != "cluster_type"}
    made["type"] = "STATIC"
    points = [{"endpoint": {"address": _socket(host, port)}} for host, port in addresses]
    made["load_assignment"] = {"cluster_name": cluster["name"], "endpoints": [{"lb_endpoints": points}]}
    return made


def _socket(host: str, port: int) -> Resource:
    return {"socket_address": {"address": host, "port_value": port}}


def _dump(path: Path, content: Resource) -> None:
    # Envoy must never read half a file: written beside, then moved.
    part = path.with_name(path.name + ".part")
    part.write_text(yaml.safe_dump(content, sort_keys=False))
    part.replace(path)
