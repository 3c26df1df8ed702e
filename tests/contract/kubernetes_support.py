"""What the tests of the manifests read: the overlays as `kubectl kustomize` renders them.

Nothing here decides what is right; it finds things: objects, the environment that a container gets, who
calls whom.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenloom.kit.settings import ServiceSettings

ROOT = Path(__file__).resolve().parents[2]
KUSTOMIZE = ROOT / "deploy" / "kustomize"
OVERLAYS = ("dev", "perf", "prod")
SERVICES = ("gateway", "batcher", "worker", "modelstore")
ENVOYS = ("edge", "mesh")

# Stands in for what only a running pod has.
FIELDS = {"metadata.name": "pod-0", "status.podIP": "10.1.2.3"}
TARGET = re.compile(r"(?:dns:///)?([a-z][a-z0-9-]*):(\d+)")
DRAIN_FIELD = "drain_grace_s"

# Everything that 1.23 served and that could be of use here.
SERVED_BY_1_23 = {
    "v1": {"ConfigMap", "Namespace", "PersistentVolumeClaim", "Secret", "Service", "ServiceAccount"},
    "apps/v1": {"DaemonSet", "Deployment", "StatefulSet"},
    "autoscaling/v2": {"HorizontalPodAutoscaler"},
    "batch/v1": {"CronJob", "Job"},
    "networking.k8s.io/v1": {"Ingress", "NetworkPolicy"},
    "policy/v1": {"PodDisruptionBudget"},
}
# Fields of those kinds that came later, or were alpha in 1.23, and that the oldest schemas at hand let pass.
NEWER_THAN_1_23 = {
    "grpc", "sleep", "minDomains", "nodeAffinityPolicy", "nodeTaintsPolicy", "matchLabelKeys", "hostUsers",
    "podFailurePolicy", "persistentVolumeClaimRetentionPolicy", "unhealthyPodEvictionPolicy",
}  # fmt: skip

Object = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """Pods of `caller` connect to `port` of the Service `callee`."""

    caller: str
    callee: str
    port: int


class Rendered:
    """The objects of one overlay."""

    def __init__(self, overlay: str, objects: list[Object]) -> None:
        self.overlay = overlay
        self.objects = objects

    def of(self, *kinds: str) -> dict[str, Object]:
        """Objects of these kinds by name."""
        return {o["metadata"]["name"]: o for o in self.objects if o["kind"] in kinds}

    @cached_property
    def workloads(self) -> dict[str, Object]:
        """Whatever runs pods."""
        return self.of("Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob")

    def pod(self, workload: str) -> Object:
        """The pod's spec."""
        found: Object = self.workloads[workload]["spec"]["template"]["spec"]
        return found

    def container(self, workload: str) -> Object:
        """The container that is the workload."""
        found: Object = self.pod(workload)["containers"][0]
        return found

    def ports(self, workload: str) -> dict[str, int]:
        """Container ports by name."""
        return {p["name"]: p["containerPort"] for p in self.container(workload)["ports"]}

    def environment(self, workload: str, secret: Mapping[str, str] | None = None) -> dict[str, str]:
        """What the container's process finds, as the kubelet makes it: envFrom, then env, then $(NAME).

        `secret`: what is in the one that the container names.
        """
        container = self.container(workload)
        configs = self.of("ConfigMap")
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            found |= (
                configs[source["configMapRef"]["name"]]["data"] if "configMapRef" in source else secret or {}
            )
        for entry in container.get("env", []):
            if "value" in entry:
                found[entry["name"]] = expand(entry["value"], found)
            elif reference := entry["valueFrom"].get("secretKeyRef"):
                found[entry["name"]] = (secret or {})[reference["key"]]
            else:
                found[entry["name"]] = FIELDS[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        return found

    def selected(self, selector: Mapping[str, str]) -> list[str]:
        """Workloads whose pods have these labels."""
        return [
            name
            for name, workload in self.workloads.items()
            if selector.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
        ]

    def mounted(self, workload: str, folder: str) -> dict[str, str]:
        """Files, by name, of the ConfigMap that is mounted at `folder`."""
        (volume,) = (m["name"] for m in self.container(workload)["volumeMounts"] if m["mountPath"] == folder)
        (name,) = (v["configMap"]["name"] for v in self.pod(workload)["volumes"] if v["name"] == volume)
        data: dict[str, str] = self.of("ConfigMap")[name]["data"]
        return data

    def envoy_files(self, workload: str) -> dict[str, Object]:
        """Envoy's three files, parsed."""
        return {name: yaml.safe_load(text) for name, text in self.mounted(workload, "/etc/envoy").items()}

    def calls(self) -> Iterator[Call]:
        """Who calls whom: from the settings of the services and the clusters of the Envoys."""
        for service in SERVICES:
            for value in self.environment(service).values():
                if match := TARGET.fullmatch(value):
                    yield Call(service, match[1], int(match[2]))
        for envoy in ENVOYS:
            for cluster in self.envoy_files(envoy)["clusters.yaml"]["resources"]:
                for address in socket_addresses(cluster["load_assignment"]):
                    yield Call(envoy, address["address"], address["port_value"])


def expand(value: str, names: Mapping[str, str]) -> str:
    """Kubernetes' `$(NAME)`; what is not known stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda m: names.get(m[1], m[0]), value)


def socket_addresses(node: object) -> Iterator[Object]:
    """Every `socket_address` below a node of Envoy's configuration."""
    for key, value in walk(node):
        if key == "socket_address":
            yield value


def walk(node: object) -> Iterator[tuple[str, Any]]:
    """Every key and value below a node."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from walk(value)
    elif isinstance(node, list):
        for item in node:
            yield from walk(item)


def settings_class(service: str) -> type[ServiceSettings]:
    """The service's own settings."""
    found: type[ServiceSettings] = getattr(
        importlib.import_module(f"services.{service}.settings"), f"{service.capitalize()}Settings"
    )
    return found


@cache
def render(overlay: str) -> Rendered:
    """`kubectl kustomize` of one overlay."""
    return render_folder(KUSTOMIZE / "overlays" / overlay)


def render_folder(folder: Path) -> Rendered:
    """`kubectl kustomize` of a folder."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.fail(
            "kubectl is not on PATH: the manifests cannot be rendered (any version from 1.27 on will do)"
        )
    command = [kubectl, "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    # kustomize says there what it deprecates.
    assert done.stderr == ""
    return Rendered(folder.name, [o for o in yaml.load_all(done.stdout, yaml.CSafeLoader) if o])
