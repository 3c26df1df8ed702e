"""The runner of a CUDA device, without one: Triton's interpreter computes its kernels on the CPU.

What only a device has is absent here: graphs, pinned memory, a stream. Everywhere else it is the same
code, one step ahead of its tokens. The interpreter is slow, so prompts are few and short; on a GPU
test_families.py runs all that the CPU is asked for.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from services.worker.engine import loader
from services.worker.engine.cuda.runner import CudaRunner
from tests.integration.engine import exactness
from tests.integration.engine.exactness import Report, compare, greedy, load_reference, open_engine, reference
from tests.integration.engine.families import build

CASES = ["gemma3_text", "qwen3"]
"""Layers of transformers' own, some with a window; and plain ones with norms for each head."""
PROMPTS = [[5], list(range(3, 30)), list(range(90, 113)), list(range(3, 25)), [7, 9, 11]]
TOKENS = 5


@pytest.mark.parametrize("family", CASES)
def test_greedy_tokens_equal_generate(monkeypatch, family: str, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "available", lambda: False)
    monkeypatch.setattr(loader, "_on_triton", lambda device: True)
    folder = build(family, tmp_path)
    engine = open_engine(folder, sequences_max=3, step_tokens_max=16)
    assert isinstance(engine._runner, CudaRunner)
    submits = [greedy(f"s{number}", prompt, TOKENS) for number, prompt in enumerate(PROMPTS)]
    result = exactness.run(engine, submits, per_step=2, leavers=1)
    model, report = load_reference(folder), Report()
    got = [result.tokens[submit.id] for submit in submits]
    compare(model, PROMPTS, reference(model, PROMPTS, TOKENS), got, report)
    assert result.cached_prompt_tokens > 0, "a prompt was meant to begin like another one"
    assert not report.wrong, report.wrong
    assert not report.ties, report.ties
