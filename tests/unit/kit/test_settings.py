"""Settings: all problems at once, unknown names refused, nothing read from elsewhere."""

import pytest
from pydantic import Field

from tokenloom.kit.settings import ServiceSettings, SettingsError, load_settings, settings_config


class Sample(ServiceSettings):
    model_config = settings_config("sample")
    port: int = Field(1, ge=1, le=65535)
    ratio: float = Field(0.5, ge=0, le=1)


def test_values_are_read_by_prefix_and_name():
    settings = load_settings(
        Sample, {"TOKENLOOM_SAMPLE_PORT": "81", "TOKENLOOM_OTHER_PORT": "9", "PATH": "/bin"}
    )
    assert (settings.port, settings.ratio) == (81, 0.5)


def test_all_problems_are_reported_together():
    environ = {
        "TOKENLOOM_SAMPLE_PORT": "0",
        "TOKENLOOM_SAMPLE_RATIO": "much",
        "TOKENLOOM_SAMPLE_PROT": "1",
    }
    with pytest.raises(SettingsError) as caught:
        load_settings(Sample, environ)
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    for part in (
        "SAMPLE_PROT: no such setting",
        "SAMPLE_PORT: Input should be greater",
        "SAMPLE_RATIO: Input",
    ):
        assert part in text


def test_the_process_environment_does_not_leak_in(monkeypatch):
    monkeypatch.setenv("TOKENLOOM_SAMPLE_PORT", "99")
    assert load_settings(Sample, {}).port == 1
    assert load_settings(Sample).port == 99
