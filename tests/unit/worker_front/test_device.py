"""What a machine can give to engines, and what a configuration adds to a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.worker.adapters import gpu, memory
from services.worker.adapters.engines import kernels_built
from services.worker.adapters.memory import Device, cpu_features, look
from services.worker.adapters.store import with_config
from services.worker.front.ports import ModelVersion
from services.worker.settings import WorkerSettings

MIB = 1 << 20
VERSION = ModelVersion("sha256:" + "a" * 64, "m", 1000, 512)


def settings(**values: Any) -> WorkerSettings:
    return WorkerSettings(name="worker", **values)


def one_gpu(uuid: str, free: str, mig: str = "Disabled", parts: str = "None") -> str:
    """As `nvidia-smi -q -x` of driver 575 has it, without what nobody reads here."""
    return f"""
	<gpu id="00000000:17:00.0">
		<product_name>NVIDIA H100 80GB HBM3</product_name>
		<mig_mode>
			<current_mig>{mig}</current_mig>
			<pending_mig>{mig}</pending_mig>
		</mig_mode>
		<mig_devices>
			{parts}
		</mig_devices>
		<uuid>{uuid}</uuid>
		<minor_number>0</minor_number>
		<fb_memory_usage>
			<total>81559 MiB</total>
			<reserved>551 MiB</reserved>
			<used>1 MiB</used>
			<free>{free}</free>
		</fb_memory_usage>
		<bar1_memory_usage>
			<total>131072 MiB</total>
			<used>1 MiB</used>
			<free>131071 MiB</free>
		</bar1_memory_usage>
	</gpu>"""


def one_part(index: int, free: str) -> str:
    return f"""<mig_device>
				<index>{index}</index>
				<gpu_instance_id>{index + 3}</gpu_instance_id>
				<compute_instance_id>0</compute_instance_id>
				<fb_memory_usage>
					<total>40448 MiB</total>
					<reserved>0 MiB</reserved>
					<used>298 MiB</used>
					<free>{free}</free>
				</fb_memory_usage>
			</mig_device>"""


def log_of(*gpus: str) -> str:
    return (
        '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>\n'
        "	<driver_version>575.57.08</driver_version>\n	<attached_gpus>2</attached_gpus>"
        + "".join(gpus)
        + "\n</nvidia_smi_log>\n"
    )


A, B = "GPU-feba7e40-d724-01ff-b00f-3a439a28a6c7", "GPU-f124aa59-d406-d45b-9481-8fcd694e6c9e"
PARTS = [
    "MIG-7839bf6f-ba33-59f0-89eb-01c8d8c4134d",
    "MIG-433a63e2-53a4-58c0-9b8d-a4dba3eb8f36",
    f"MIG-{B}/9/0",
]
TWO = log_of(one_gpu(A, "1000 MiB"), one_gpu(B, "2000 MiB"))
DIVIDED = log_of(
    one_gpu(A, "N/A", "Enabled", one_part(0, "300 MiB") + one_part(1, "400 MiB")),
    one_gpu(B, "[Insufficient Permissions]", "Enabled", one_part(0, "500 MiB")),
)
LISTED = f"""GPU 0: NVIDIA H100 NVL (UUID: {A})
  MIG 2g.24gb     Device  0: (UUID: {PARTS[0]})
  MIG 1g.12gb     Device  1: (UUID: {PARTS[1]})
GPU 1: A100-PCIE-40GB (UUID: {B})
  MIG 1g.5gb Device 0: (UUID: {PARTS[2]})
"""


def smi(folder: Path, xml: str, listed: str = "", status: int = 0) -> None:
    """An `nvidia-smi` in this folder that says so."""
    (folder / "xml").write_text(xml)
    (folder / "listed").write_text(listed)
    tool = folder / "nvidia-smi"
    tool.write_text(
        f'#!/bin/sh\ncase "$*" in "-q -x") cat {folder}/xml;; -L) cat {folder}/listed;; *) exit 2;; esac\n'
        f"exit {status}\n"
    )
    tool.chmod(0o755)


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs, 1,000 and 2,000 MiB free, as far as `nvidia-smi` says."""
    smi(tmp_path, TWO)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(memory.metadata, "version", lambda name: "2.13.0+cu130")
    return tmp_path


@pytest.mark.parametrize(
    ("number", "visible", "mib"),
    [
        (0, None, 1000),
        (1, None, 2000),
        (2, None, None),
        (0, "1,0", 2000),
        (1, "1, 0", 1000),
        (0, B, 2000),
        (1, f"{B},{A}", 1000),
        (0, "GPU-f12", 2000),
        (0, "GPU-f", None),  # of two
        (1, "1", None),
        (1, "1,-1,0", None),
        (1, "1,7,0", None),
        (0, "", None),
        (0, "-1", None),
        (0, "NoDevFiles", None),
    ],
)
def test_free_memory_of_a_gpu_is_that_of_the_one_the_engine_will_see(
    gpus: Path, number: int, visible: str | None, mib: int | None
) -> None:
    assert gpu.free_bytes(number, visible) == (None if mib is None else mib * MIB)


@pytest.mark.parametrize(
    ("number", "visible", "mib"),
    [
        (0, None, 300),
        (1, None, None),  # CUDA shows one
        (0, "1", 500),
        (0, PARTS[1], 400),
        (0, PARTS[2], 500),
        (1, f"{PARTS[2]},{PARTS[0]}", 300),
        (0, f"MIG-{A}/3/0", None),
        (0, A, 300),
    ],
)
def test_free_memory_of_a_divided_gpu_is_that_of_the_part(
    gpus: Path, number: int, visible: str | None, mib: int | None
) -> None:
    smi(gpus, DIVIDED, LISTED)
    assert gpu.free_bytes(number, visible) == (None if mib is None else mib * MIB)


def test_gpu_beside_a_lost_one_is_still_found(gpus: Path) -> None:
    smi(gpus, TWO, status=15)
    assert gpu.free_bytes(1, None) == 2000 * MIB


@pytest.mark.parametrize(
    "said", ["", "No devices were found\n", "NVIDIA-SMI has failed because", "<nvidia_smi_log>", "<a/>"]
)
def test_what_is_no_answer_names_no_gpu(gpus: Path, said: str) -> None:
    smi(gpus, said, status=9)
    assert gpu.free_bytes(0, None) is None


def test_tool_that_hangs_is_given_up(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gpus / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(gpu, "SMI_TIMEOUT_S", 0.05)
    assert gpu.free_bytes(0, None) is None


def test_budget_is_a_share_of_what_is_free_where_the_engines_run(gpus: Path) -> None:
    assert look(settings()).budget_bytes == int(1000 * MIB * 0.95)
    assert look(settings(device="cuda:1")).budget_bytes == int(2000 * MIB * 0.95)
    assert look(settings()).kind == "cuda"
    host = look(settings(device="cpu"))
    assert host.kind == "cpu"
    free_bytes = memory.available_bytes()
    assert free_bytes is not None
    assert 0.7 * free_bytes < host.budget_bytes < free_bytes
    assert look(settings(engine="sim")).kind == "cpu"
    assert look(settings(memory_bytes=77)).budget_bytes == 77


def test_gpu_that_others_fill_has_a_budget_for_nothing_and_not_one_without_bound(gpus: Path) -> None:
    smi(gpus, log_of(one_gpu(A, "0 MiB")))
    assert (look(settings()).kind, look(settings()).budget_bytes) == ("cuda", 1)


def test_gpu_that_torch_cannot_use_is_none(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.metadata, "version", lambda name: "2.13.0+cpu")
    assert (look(settings()).kind, look(settings(device="cuda")).kind) == ("cpu", "cuda")


def test_gpu_that_nobody_can_ask_is_not_bounded(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu, "has_driver", lambda visible: False)
    assert look(settings(device="cuda")).budget_bytes == 0
    assert look(settings()).kind == "cpu"
    monkeypatch.setattr(gpu, "has_driver", lambda visible: True)
    found = look(settings())
    assert (found.kind, found.budget_bytes) == ("cuda", 0), "the engine will see it"
    assert look(settings(memory_bytes=77)).budget_bytes == 77


def test_driver_is_known_by_its_device_file(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    assert not gpu.has_driver(None, tmp_path)
    (tmp_path / "nvidia3").touch()
    assert gpu.has_driver(None, tmp_path)
    assert gpu.has_driver("0", tmp_path)
    assert not gpu.has_driver("", tmp_path)
    assert not gpu.has_driver("-1", tmp_path)


def test_processor_says_what_it_can(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor: 1\nflags: fpu\n")
    assert cpu_features(file) == {"fpu", "avx2", "avx512_bf16"}
    assert Device("cpu", 1, cpu_features(file)).fast_bf16
    assert not Device("cpu", 1, frozenset({"avx2"})).fast_bf16
    assert cpu_features(tmp_path / "none") == frozenset()
    assert not kernels_built(frozenset())


@pytest.mark.parametrize(
    ("config", "hidden_size", "tied"),
    [
        (b'{"hidden_size": 576, "tie_word_embeddings": false}', 576, False),
        (b'{"hidden_size": 576, "tie_word_embeddings": true}', 576, True),
        (b'{"hidden_size": 576}', 576, True),
        (b'{"hidden_size": "x", "tie_word_embeddings": false}', 0, True),
        (b"[]", 0, True),
        (b"\xff{", 0, True),
    ],
)
def test_configuration_that_cannot_be_read_leaves_the_larger_guess(
    config: bytes, hidden_size: int, tied: bool
) -> None:
    found = with_config(VERSION, config)
    assert (found.hidden_size, found.tied) == (hidden_size, tied)
