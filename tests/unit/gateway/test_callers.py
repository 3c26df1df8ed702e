"""Who asks: ids and tenants from headers."""

import pytest

from services.gateway.callers import request_id_of, tenant_of
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
