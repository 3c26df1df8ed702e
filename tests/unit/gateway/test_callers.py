"""Who asks, and what for: ids, tenants and wishes from headers."""

import pytest

from services.gateway.callers import request_id_of, session_key_of, tenant_of, ttft_slo_ms_of
from services.gateway.core.refusal import Refusal


def test_an_id_is_taken_or_made():
    assert request_id_of({"x-request-id": "abc"}) == "abc"
    assert request_id_of({}) != request_id_of({})
    assert len(request_id_of({"x-request-id": ""})) == 32


@pytest.mark.parametrize("value", ["x" * 129, "a b", "é", "tab\t"])
def test_an_id_that_cannot_travel_in_headers_is_refused(value):
    with pytest.raises(Refusal, match="x-request-id: must be at most 128 printable ASCII"):
        request_id_of({"x-request-id": value})


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ({}, "default"),
        ({"x-llm-d-inference-fairness-id": "new"}, "new"),
        ({"x-gateway-inference-fairness-id": "old"}, "old"),
        ({"x-llm-d-inference-fairness-id": "new", "x-gateway-inference-fairness-id": "old"}, "new"),
    ],
)
def test_the_tenant_is_the_fairness_id_or_its_older_name(headers, tenant):
    assert tenant_of(headers) == tenant


def test_the_session_is_its_header_or_nothing():
    assert session_key_of({"x-session-id": "s-1"}) == "s-1"
    assert session_key_of({}) == session_key_of({"x-session-id": ""}) == ""
    with pytest.raises(Refusal, match="x-session-id: must be at most 128 printable ASCII"):
        session_key_of({"x-session-id": "two words"})


@pytest.mark.parametrize(
    ("headers", "wish"),
    [
        ({}, 0),
        ({"x-llm-d-slo-ttft-ms": "1"}, 1),
        ({"x-slo-ttft-ms": b"3600000"}, 3_600_000),
        ({"x-llm-d-slo-ttft-ms": "250", "x-slo-ttft-ms": "9"}, 250),
    ],
)
def test_the_wished_time_to_the_first_token_is_read_under_both_names(headers, wish):
    assert ttft_slo_ms_of(headers) == wish


@pytest.mark.parametrize("name", ["x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"])
@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "soon", "3600001", "²", "9" * 5000, b"\xff"])
def test_a_wish_that_cannot_be_meant_is_refused_by_the_name_of_its_header(name, value):
    with pytest.raises(
        Refusal, match=f"^{name}: must be a whole number of milliseconds from 1 to 3600000"
    ) as no:
        ttft_slo_ms_of({name: value})
    assert (no.value.reason, no.value.metadata) == ("FIELD_INVALID", {"field": name})
