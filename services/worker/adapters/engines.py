"""What both kinds of engine take and how they are started: the settings and a version, put together."""

from __future__ import annotations

from services.worker.adapters.memory import Device
from services.worker.adapters.process import ProcessLaunch
from services.worker.engine.config import EngineConfig, encode_config
from services.worker.engine.cpu import build
from services.worker.engine.support import PLAIN_TYPES
from services.worker.front.memory import Terms, reserve
from services.worker.front.ports import Launch, ModelVersion
from services.worker.front.reservation import Reservation
from services.worker.settings import WorkerSettings
from services.worker.sim.config import SimConfig, encode_sim_config

SIM_CONTEXT_LENGTH = 8192
"""For a manifest that states none."""
SIM_VOCAB_SIZE = 512


def kernels_built(features: frozenset[str]) -> bool:
    """Whether the engine finds compiled kernels for a processor with these features."""
    runs = bool({"avx2", "asimd"} & features)
    return runs and any(build.library_path(variant).exists() for variant in build.variants())


class TorchEngines:
    """Engines that run the model: `services.worker.engine`."""

    def __init__(self, settings: WorkerSettings, device: Device) -> None:
        self._settings = settings
        self._terms = Terms(
            device=device.kind,
            dtype=settings.dtype,
            kv_cache_bytes=settings.kv_cache_bytes,
            sequences_max=settings.sequences_max,
            step_tokens=settings.step_tokens,
            block_tokens=settings.block_tokens,
            process_bytes=settings.process_bytes,
            fast_bf16=device.fast_bf16,
            widening_types=PLAIN_TYPES if kernels_built(device.cpu_features) else frozenset(),
        )

    def reserve(self, version: ModelVersion, budget_bytes: int, *, whole: bool) -> Reservation:
        """`whole`: on a GPU whose memory nobody bounded, the only model of the settings has all of it."""
        whole = whole and not self._settings.memory_bytes and self._terms.device == "cuda"
        return reserve(version, self._terms, budget_bytes, whole=whole)

    def launcher(self, version: ModelVersion, reservation: Reservation) -> Launch:
        """How to start this version's engine."""
        s = self._settings

        def argv(folder: str) -> list[str]:
            config = EngineConfig(
                model_dir=folder,
                device=s.device,
                dtype=s.dtype,
                kv_cache_bytes=reservation.kv_cache_bytes,
                sequences_max=s.sequences_max,
                step_tokens_max=s.step_tokens,
                itl_max_ms=s.itl_max_ms,
                block_tokens=s.block_tokens,
                prefix_cache=s.prefix_cache,
                pipeline_depth=s.pipeline_depth,
                threads=s.threads,
            )
            return ["-m", "services.worker.engine", "--config", encode_config(config)]

        return ProcessLaunch(version.name, argv)


class SimEngines:
    """Engines that only pretend: `services.worker.sim`."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings

    def reserve(self, version: ModelVersion, budget_bytes: int, *, whole: bool) -> Reservation:
        """What it pretends to take: weights, and the KV cache where the settings state one."""
        cache_bytes = self._settings.kv_cache_bytes
        return Reservation(
            weights_bytes=version.stored_bytes, cache_bytes=cache_bytes, kv_cache_bytes=cache_bytes
        )

    def launcher(self, version: ModelVersion, reservation: Reservation) -> Launch:
        """How to start this version's engine; it reads no files."""
        config = encode_sim_config(self.config(version))
        return ProcessLaunch(version.name, lambda _: ["-m", "services.worker.sim", "--config", config])

    def config(self, version: ModelVersion) -> SimConfig:
        """As many blocks as `kv_cache_bytes` gives, or enough for every sequence's whole context."""
        s = self._settings
        context_length = version.context_length or SIM_CONTEXT_LENGTH
        whole_contexts = s.sequences_max * (-(-context_length // s.block_tokens) + 1)
        block_bytes = s.block_tokens * version.kv_bytes_per_token
        blocks = s.kv_cache_bytes // block_bytes if s.kv_cache_bytes and block_bytes else whole_contexts
        return SimConfig(
            step_ms=s.sim_step_ms,
            sequence_us=s.sim_sequence_us,
            prefill_tokens_per_s=s.sim_prefill_tokens_per_s,
            load_s=s.sim_load_s,
            sequences_max=s.sequences_max,
            step_tokens_max=s.step_tokens,
            block_tokens=s.block_tokens,
            prefix_cache=s.prefix_cache,
            total_blocks=max(1, blocks),
            context_length=context_length,
            vocab_size=version.vocab_size or SIM_VOCAB_SIZE,
        )
