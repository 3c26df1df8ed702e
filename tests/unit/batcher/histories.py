"""What random histories are made of: the limits kept, and strategies for requests and reports."""

from hypothesis import strategies as st

from services.batcher.core.messages import ModelState
from tests.unit.batcher.words import MODEL, OTHER, limits

THIRD = "sha256:" + "c" * 64
LIMITS = limits(
    hold_max_s=20.0,
    no_worker_hold_s=4.0,
    loading_hold_s=6.0,
    age_promote_s=2.0,
    affinity_hold_s=0.5,
    late_hold_s=1.5,
    report_stale_s=3.0,
    queue_depth_max=10,
    queue_prompt_tokens_max=9000,
    queue_bytes_max=3000,
    band_shares=(1.0, 1.0, 0.75, 0.5),
    tenant_share=0.8,
    tenant_weights={"a": 3.0, "b": 0.5},
    queues_max=2,
    tenants_max=3,
)
ENDPOINTS = ("w1", "w2", "w3")
TENANTS = ("a", "a", "b", "c", "d")
TOTAL_BLOCKS = 64

endpoints = st.sampled_from(ENDPOINTS)
tenants = st.sampled_from(TENANTS)
names = st.lists(st.integers(1, 6), max_size=4, unique=True)
pauses = st.sampled_from([0.0, 0.125, 0.125, 0.25, 0.25, 1.0, 4.0])
arrivals = st.fixed_dictionaries(
    {
        "model": st.sampled_from([*[MODEL] * 9, OTHER, OTHER, THIRD]),
        "priority": st.integers(0, 4),
        "since_ms": st.sampled_from([0, 0, 125, 1000]),
        "prompt": st.sampled_from([16, 1, 100, 300, 900, 16, 100, 4500]),
        "prefix": st.sampled_from([(), (), (1,), (1, 2), (1, 3, 4), (1, 3, 4, 6), (5,)]),
        "patience": st.sampled_from([*[1000.0] * 7, 3.0, 0.25, -1.0]),
        "slo_ms": st.sampled_from([0, 0, 0, 2000, 250]),
        "tenant": tenants,
        "size": st.sampled_from([0, 10, 1000]),
    }
)
rooms = st.fixed_dictionaries(
    {
        "free": st.sampled_from([4, 2, 1, 0]),
        "blocks": st.sampled_from([64, 64, 64, 30, 5, 0]),
        "ahead": st.sampled_from(
            [(0, 0, 0.0), (0, 512, 1000.0), (0, 512, 0.0), (600, 512, 1000.0), (100, 64, 1000.0)]
        ),
    }
)
states = st.sampled_from([*[ModelState.READY] * 3, *ModelState])
