"""The engine's command line value."""

import pytest

from services.worker.engine.config import ConfigError, EngineConfig, decode_config, encode_config


def test_what_is_written_is_read():
    config = EngineConfig(model_dir="/m", device="cuda:1", dtype="bfloat16", sequences_max=8, threads=3)
    assert decode_config(encode_config(config)) == config


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "truncated"),
        ("{}", "model_dir"),
        ('{"model_dir": "/m", "sequence_max": 3}', "sequence_max"),
        ('{"model_dir": "/m", "sequences_max": 0}', "sequences_max"),
        ('{"model_dir": "/m", "dtype": "int4"}', "dtype"),
        ('{"model_dir": "/m", "sequences_max": 600}', r"step_tokens_max \(512\)"),
    ],
)
def test_a_bad_value_is_named_in_one_line(text, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        decode_config(text)
    assert "\n" not in str(caught.value)
