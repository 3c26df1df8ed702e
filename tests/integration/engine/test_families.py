"""Every supported family gives transformers' own greedy tokens, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.worker.engine import loader
from services.worker.engine.cpu.kernels import available
from services.worker.engine.support import FAMILIES as SUPPORTED
from tests.integration.engine.exactness import DEVICE, check_exact
from tests.integration.engine.families import FAMILIES, build, random_prompts


def test_every_supported_family_is_compared() -> None:
    assert set(FAMILIES) == SUPPORTED


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_tokens_equal_generate(monkeypatch, family: str, compiled: bool, tmp_path: Path) -> None:
    if compiled and not (available() and DEVICE == "cpu"):
        pytest.skip("no compiled CPU kernels: make kernels")
    monkeypatch.setattr(loader, "available", lambda: compiled)
    report = check_exact(build(family, tmp_path), random_prompts(8), 32, batch=6)
    assert not report.wrong, report.wrong
    assert len(report.ties) <= 2, report.ties
