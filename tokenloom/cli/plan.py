"""What a local mesh consists of: which processes, with which settings and ports. Pure.

The settings are those of Kubernetes, `TOKENLOOM_<SERVICE>_<NAME>`. A caller's own environment comes
first and can tune whatever is not decided here.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenloom.cli import envoy
from tokenloom.cli.ports import free_ports
from tokenloom.cli.processes import Spec

WORKERS_MAX = 64
ENVOY_CONCURRENCY_MAX = 4
OTLP_FLUSH_MS = 500
"""Spans are wanted soon on one machine, but each export costs every process that takes part."""

Engine = Literal["torch", "sim"]


@dataclass(frozen=True)
class Options:
    """What `tokenloom up` was asked for."""

    workers: int = 1
    engine: Engine = "torch"
    port: int = 8080
    host: str = envoy.LOOPBACK
    models: tuple[str, ...] = ()
    trace_ratio: float = 1.0
    """Share of the requests that are traced."""


@dataclass(frozen=True)
class Ports:
    """Every port of one mesh, by process."""

    otlp: int
    modelstore: Mapping[str, int]
    batcher: Mapping[str, int]
    gateway: Mapping[str, int]
    envoy: Mapping[str, int]
    workers: tuple[Mapping[str, int], ...]

    @classmethod
    def choose(cls, options: Options, rng: random.Random) -> Ports:
        """Free ones for everything but the public port. Raises OSError when there are too few."""
        numbers = iter(free_ports(12 + 2 * options.workers, rng, taken=[options.port]))

        def named(*names: str) -> dict[str, int]:
            return {name: next(numbers) for name in names}

        return cls(
            otlp=next(numbers),
            modelstore=named("grpc", "metrics"),
            batcher=named("grpc", "health", "metrics"),
            gateway=named("http", "grpc", "metrics"),
            envoy={"edge": options.port} | named("mesh", "admin", "metrics"),
            workers=tuple(named("grpc", "metrics") for _ in range(options.workers)),
        )


def threads_per_worker(cpus: int, workers: int) -> int:
    """The machine's CPUs, divided: workers that each take all of them take them from each other."""
    return max(1, cpus // workers)


def local(port: int) -> str:
    """`host:port` on loopback."""
    return f"{envoy.LOOPBACK}:{port}"


def environment(outer: Mapping[str, str]) -> dict[str, str]:
    """What every child gets: the caller's environment, and where the code is."""
    code = [str(envoy.ROOT), str(envoy.ROOT / "gen"), outer.get("PYTHONPATH", "")]
    direct = ",".join(filter(None, [outer.get("no_proxy", ""), envoy.LOOPBACK, "localhost"]))
    return dict(outer) | {
        "PYTHONPATH": os.pathsep.join(filter(None, code)),
        "PYTHONUNBUFFERED": "1",
        # Nothing between the processes of one machine goes through a proxy.
        "no_proxy": direct,
        "NO_PROXY": direct,
    }


@dataclass(frozen=True)
class Plan:
    """All that the specs are made of."""

    options: Options
    ports: Ports
    outer: Mapping[str, str]
    store: Path
    cache: Path
    cpus: int

    def modelstore(self) -> Spec:
        """The registry, which the rest needs first."""
        roots = "/"  # the caller's own files, read with the caller's own rights
        ports = self.ports.modelstore
        fields = {"PORT": ports["grpc"], "STORE_DIR": self.store, "IMPORT_ROOTS": roots}
        return self._service("modelstore", "modelstore", ports, fields)

    def serving(self, models: Sequence[str], envoy_command: Sequence[str]) -> list[Spec]:
        """Everything else; all of it may start at once."""
        return [
            *(self._worker(i, models) for i in range(self.options.workers)),
            self._batcher(),
            self._gateway(),
            Spec("envoy", tuple(envoy_command), environment(self.outer), self.ports.envoy),
        ]

    def endpoints(self) -> dict[str, list[envoy.Address]]:
        """Where Envoy's clusters are."""
        return {
            "worker": [(envoy.LOOPBACK, ports["grpc"]) for ports in self.ports.workers],
            "batcher": [(envoy.LOOPBACK, self.ports.batcher["grpc"])],
            "gateway_grpc": [(envoy.LOOPBACK, self.ports.gateway["grpc"])],
            "gateway_http": [(envoy.LOOPBACK, self.ports.gateway["http"])],
            "otlp": [(envoy.LOOPBACK, self.ports.otlp)],
        }

    def envoy_ports(self) -> envoy.EnvoyPorts:
        """Where Envoy listens."""
        ports = self.ports.envoy
        return envoy.EnvoyPorts(
            edge=ports["edge"],
            mesh=ports["mesh"],
            admin=ports["admin"],
            probes=ports["metrics"],
            edge_host=self.options.host,
        )

    def envoy_concurrency(self) -> int:
        """Threads of Envoy: one for four CPUs carries more than the workers of one machine make."""
        return max(1, min(ENVOY_CONCURRENCY_MAX, self.cpus // 4))

    def _worker(self, index: int, models: Sequence[str]) -> Spec:
        ports = self.ports.workers[index]
        fields: dict[str, object] = {
            "PORT": ports["grpc"],
            "ENGINE": self.options.engine,
            "MODELS": ",".join(models),
            "MODELSTORE_TARGET": local(self.ports.modelstore["grpc"]),
            "CACHE_DIR": self.cache,
            # The same machine: nothing is copied that can be linked.
            "STORE_DIR": self.store,
        }
        if "TOKENLOOM_WORKER_THREADS" not in self.outer:
            fields["THREADS"] = threads_per_worker(self.cpus, self.options.workers)
        return self._service("worker", f"worker-{index}", ports, fields)

    def _batcher(self) -> Spec:
        ports = self.ports.batcher
        workers = ",".join(local(worker["grpc"]) for worker in self.ports.workers)
        fields = {"PORT": ports["grpc"], "HEALTH_PORT": ports["health"], "WORKERS": workers}
        return self._service("batcher", "batcher", ports, fields)

    def _gateway(self) -> Spec:
        ports = self.ports.gateway
        fields: dict[str, object] = {
            "HTTP_PORT": ports["http"],
            "GRPC_PORT": ports["grpc"],
            "MESH_TARGET": local(self.ports.envoy["mesh"]),
            "MODELSTORE_TARGET": local(self.ports.modelstore["grpc"]),
            "BATCHER_TARGET": local(self.ports.batcher["grpc"]),
        }
        if "TOKENLOOM_GATEWAY_MESH_CHANNELS" not in self.outer:
            # One connection for each of Envoy's threads: what is ready together leaves in fewer writes.
            fields["MESH_CHANNELS"] = self.envoy_concurrency()
        return self._service("gateway", "gateway", ports, fields)

    def _service(
        self, service: str, name: str, ports: Mapping[str, int], fields: Mapping[str, object]
    ) -> Spec:
        common = {
            "NAME": name,
            "HOST": envoy.LOOPBACK,
            "METRICS_PORT": ports["metrics"],
            "OTLP_ENDPOINT": local(self.ports.otlp),
            "OTLP_FLUSH_MS": OTLP_FLUSH_MS,
        }
        prefix = f"TOKENLOOM_{service.upper()}_"
        settings = {prefix + key: str(value) for key, value in (common | dict(fields)).items()}
        command = (sys.executable, "-m", f"services.{service}")
        return Spec(name, command, environment(self.outer) | settings, ports)
