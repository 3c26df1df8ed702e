"""A model on a CPU is in memory once: the files that it was packed from are let go."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from services.worker.engine import mapped
from services.worker.engine.mapped import MappedFiles
from tests.integration.engine.exactness import greedy, open_engine, reference, run
from tests.integration.engine.families import build

PROMPT = [5, 6, 7, 900, 15_000]


def resident_bytes(path: Path) -> int:
    """Of a file's mappings in this process."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if " kB" not in line:
            ours = str(path) in line if "-" in line.split()[0] else ours
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 MiB, 15 of them the embedding, which is the head as well."""
    shape = {"vocab_size": 20_000, "hidden_size": 192, "num_attention_heads": 12, "intermediate_size": 900}
    return build("llama", tmp_path_factory.mktemp("mapped"), **shape)


def test_packed_weights_are_let_go_and_the_model_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "model.safetensors"
    monkeypatch.setattr(mapped, "KEPT_BYTES_MAX", 1 << 20)
    engine = open_engine(folder)
    assert resident_bytes(path) < path.stat().st_size / 4
    tokens = run(engine, [greedy("one", PROMPT, 16)]).tokens["one"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert [tokens] == reference(model, [PROMPT], 16)


def test_nothing_is_let_go_before_enough_was_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, calls = MappedFiles(folder), []
    monkeypatch.setattr(files, "_mappings", lambda: calls.append(1) or [])
    files.was_read(mapped.KEPT_BYTES_MAX - 1)
    assert calls == []
    files.was_read(1)
    assert calls == [1]


def test_other_mappings_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, maps = tmp_path / "model.safetensors", tmp_path / "maps"
    weights.touch()
    maps.write_text(
        f"1000-3000 rw-p 00000000 fe:00 1    {weights}\n"
        f"3000-4000 rw-p 00000000 fe:00 1    {weights}.other\n"
        "4000-5000 rw-p 00000000 00:00 0 \n"
        "5000-6000 rw-p 00000000 00:00 0    [heap]\n"
    )
    monkeypatch.setattr(mapped, "MAPS", maps)
    assert MappedFiles(tmp_path)._mappings() == [(0x1000, 0x2000)]
