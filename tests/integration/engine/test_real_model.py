"""SmolLM2-135M-Instruct as the modelstore keeps it: greedy output equals transformers' `generate`.

`TOKENLOOM_TEST_MODEL_DIR` names another folder of safetensors with a tokenizer.json to compare instead.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.integration.engine.exactness import check_exact
from tests.integration.modelstore.conftest import running
from tools.fetch import fetch_model

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8,",
    "Water boils at",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are",
    "Q: What is 17 times 3?\nA:",
    "SELECT name, age FROM",
    "Die Hauptstadt von Deutschland ist",
    "In 1969, the first humans",
    "To bake bread you need",
    "The mitochondria is",
    "import numpy as np\n\nx = np.",
    "<html>\n<head>",
    "My favourite colour is",
    "Roses are red,",
    "The quick brown fox",
    "According to the theory of relativity, " * 6,
    "A",
]


@pytest.fixture(scope="session")
def model_dir_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of safetensors; both sides load it in float32."""
    if named := os.environ.get("TOKENLOOM_TEST_MODEL_DIR"):
        return Path(named)
    return asyncio.run(_imported(fetch_model(), tmp_path_factory.mktemp("smollm2")))


async def _imported(source: Path, folder: Path) -> Path:
    """What a worker would fetch: every file of the version that an import of `source` makes."""
    async with running(folder / "store", str(source.parent)) as house:
        imported, _ = await house.import_model(source, "smollm2")
        target = folder / "model"
        target.mkdir()
        for file in imported.version.manifest.files:
            (target / file.path).write_bytes(await house.fetch(file.digest))
    return target


@pytest.fixture
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_two_threads")
def test_greedy_tokens_equal_generate(model_dir_f32: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir_f32 / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]
    report = check_exact(model_dir_f32, prompts, 64)
    for tie in report.ties:
        print("a tie:", tie)
    assert not report.wrong, report.wrong
    assert report.compared == 3 * len(PROMPTS)
    assert len(report.ties) <= 2
