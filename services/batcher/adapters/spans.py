"""The batcher's two spans of a request, written when its stream has ended: not on the way to the pick.

`queue` is the time from arrival here to the decision, `pick` the choice of the worker. Their parent is
Envoy's own span of the ext_proc stream, which comes in the stream's gRPC metadata; the traceparent
among the request's headers belongs to the call that Envoy carries.
"""

from __future__ import annotations

from opentelemetry.context import Context

from services.batcher.core.messages import Reject
from services.batcher.stay import Stay
from tokenloom.kit import telemetry


def record(stay: Stay, context: Context, ended_ns: int) -> None:
    """`ended_ns` (epoch nanoseconds) ends the wait of a request whose caller left undecided."""
    request, decision = stay.request, stay.decision
    attributes: dict[str, str | int] = {
        "loom.request_id": request.request_id,
        "loom.model_version": request.model,
        "loom.tenant": request.tenant,
        "loom.priority": request.priority,
        "loom.attempt": request.attempt,
        "gen_ai.usage.input_tokens": request.prompt_tokens,
    }
    if decision is None:
        telemetry.record("queue", stay.arrived_ns, ended_ns, context, attributes, error="the caller left")
    elif isinstance(decision, Reject):
        attributes["error.type"] = decision.reason
        telemetry.record(
            "queue", stay.arrived_ns, stay.decided_ns, context, attributes, error=decision.message
        )
    else:
        telemetry.record("queue", stay.arrived_ns, stay.decided_ns, context, attributes)
        picked = {"loom.endpoint": decision.endpoint, "loom.lease": decision.lease_id}
        telemetry.record("pick", stay.pick_begun_ns, stay.decided_ns, context, picked)
