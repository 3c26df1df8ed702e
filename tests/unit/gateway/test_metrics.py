"""The metrics that are kept by hand, against the library's own histogram."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry, Histogram

from services.gateway import metrics

NAME = "tokenloom_gateway_inter_token_latency_seconds"


@given(st.lists(st.one_of(st.floats(0, 20), st.sampled_from(metrics._GAPS)), max_size=30))
def test_gaps_read_as_a_histogram_of_the_library_would(seconds):
    oracle = Histogram("oracle", "x", buckets=metrics._GAPS, registry=(registry := CollectorRegistry()))
    meters = metrics.of_model("oracle-model")
    meters.inter_token = metrics.Gaps()
    for gap_s in seconds:
        oracle.observe(gap_s)
        meters.inter_token.observe(gap_s)
    bounds = [*(str(float(bound)) for bound in metrics._GAPS), "+Inf"]
    for bound in bounds:
        got = REGISTRY.get_sample_value(f"{NAME}_bucket", {"model": "oracle-model", "le": bound})
        assert got == registry.get_sample_value("oracle_bucket", {"le": bound})
    for end in ("count", "sum"):
        got = REGISTRY.get_sample_value(f"{NAME}_{end}", {"model": "oracle-model"})
        assert got == registry.get_sample_value(f"oracle_{end}")


def test_a_models_meters_are_made_once():
    assert metrics.of_model("made-once") is metrics.of_model("made-once")
