"""Settings that depend on each other say so."""

import pytest
from pydantic import ValidationError

from services.worker.adapters.engines import SimEngines
from services.worker.front.ports import ModelVersion
from services.worker.settings import STEP_TOKENS, WorkerSettings

VERSION = ModelVersion(f"sha256:{'a' * 64}", "m", 1000, 512)


def settings(**fields: object) -> WorkerSettings:
    return WorkerSettings(**{"name": "w", "host": "127.0.0.1", **fields})  # type: ignore[arg-type]


def test_more_sequences_raise_the_tokens_of_a_step() -> None:
    assert settings().step_tokens == STEP_TOKENS
    assert settings(sequences_max=1000).step_tokens == 1000
    assert settings(sequences_max=1000, step_tokens_max=2000).step_tokens == 2000


def test_too_few_tokens_for_the_sequences_are_refused_by_both_names() -> None:
    with pytest.raises(ValidationError, match=r"step_tokens_max \(600\) .* sequences_max \(1000\)"):
        settings(sequences_max=1000, step_tokens_max=600)


def test_engines_are_told_of_the_cache() -> None:
    for on in (True, False):
        config = SimEngines(settings(prefix_cache=on, sequences_max=700)).config(VERSION)
        assert (config.prefix_cache, config.step_tokens_max) == (on, 700)
