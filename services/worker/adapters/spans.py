"""The worker's part of a request's trace: attributes of the server span, and its two children.

`prefill` lasts from the engine's taking the sequence to its first token, `decode` from there to its
last. Both are recorded when the sequence is over: a token costs nothing here.
"""

from __future__ import annotations

from services.worker.front.resident import Resident
from services.worker.front.sequence import Sequence
from tokenloom.kit.server import Call
from tokenloom.kit.telemetry import record

GOOD = frozenset({"stop", "length"})


def record_sequence(sequence: Sequence, resident: Resident, outcome: str, call: Call) -> None:
    """Finish the trace of a sequence that ended as `outcome`."""
    span = call.span
    if not span.is_recording():
        return
    model = resident.version.name
    span.set_attributes(
        {
            "gen_ai.provider.name": "tokenloom",
            "gen_ai.request.model": model,
            "gen_ai.response.id": sequence.request_id,
            "gen_ai.response.model": f"{model}@{resident.version.digest}",
            "gen_ai.response.finish_reasons": (outcome,),
            "gen_ai.usage.input_tokens": sequence.prompt_tokens,
            "gen_ai.usage.output_tokens": sequence.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": sequence.cached_prompt_tokens,
            "tokenloom.tenant": sequence.tenant,
            "tokenloom.leased": sequence.leased,
            "tokenloom.resumed_tokens": sequence.resumed_tokens,
        }
    )
    if not sequence.submitted_ns:
        return
    error = "" if outcome in GOOD else outcome
    ended_ns = sequence.last_ns or sequence.submitted_ns
    record(
        "prefill",
        sequence.submitted_ns,
        sequence.first_ns or ended_ns,
        call.context,
        {
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": sequence.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": sequence.cached_prompt_tokens,
        },
        error="" if sequence.started else error,
    )
    if sequence.started:
        record(
            "decode",
            sequence.first_ns,
            sequence.last_ns,
            call.context,
            {"gen_ai.request.model": model, "gen_ai.usage.output_tokens": sequence.received},
            error=error,
        )
