"""From the wire to a `Submit`, with every field checked, and from a `Batch` back to the wire.

A refusal names each field that is wrong and its bounds. Nothing is decided here but validity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

from loom.inference.v1 import inference_pb2
from loom.worker.v1 import worker_pb2 as pb

from services.worker.front.sequence import Batch, Sequence
from services.worker.protocol import Output, Sampling, Submit
from tokenloom.contract.headers import DEFAULT_TENANT, NAME_CHARS_MAX
from tokenloom.contract.prefix import root_hash
from tokenloom.kit.errors import CallError, field_invalid

STOP_TOKEN_IDS_MAX = 256
"""The caller's (at most 64) and the model's own."""
TOP_LOGPROBS_MAX = 20
LOGIT_BIAS_MAX = 300
CACHE_SALT_CHARS_MAX = 64
PRIORITY_DEFAULT = inference_pb2.PRIORITY_STANDARD
PRIORITY_MAX = inference_pb2.PRIORITY_SHEDDABLE

FINISH_REASONS = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
}

# name, default, low, high, whether low itself is outside; bounds of loom.inference.v1.SamplingParams.
_FLOATS = (
    ("temperature", 1.0, 0.0, 2.0, False),
    ("top_p", 1.0, 0.0, 1.0, True),
    ("min_p", 0.0, 0.0, 1.0, False),
    ("repetition_penalty", 1.0, 0.0, 10.0, True),
    ("presence_penalty", 0.0, -2.0, 2.0, False),
    ("frequency_penalty", 0.0, -2.0, 2.0, False),
)


class Checks:
    """Collects what is wrong, so that one answer names all of it."""

    def __init__(self) -> None:
        self.violations: list[tuple[str, str]] = []

    def need(self, good: bool, field: str, why: str) -> None:
        """Note a violation of `field` unless `good`."""
        if not good:
            self.violations.append((field, why))

    def ids(self, ids: Seq[int], vocab_size: int, field: str) -> None:
        """Every id must be one of the vocabulary's."""
        if ids and (worst := max(ids)) >= vocab_size:
            self.need(False, field, f"id {worst} is outside the vocabulary of {vocab_size}")

    def done(self) -> None:
        """Raises FIELD_INVALID when something was noted."""
        if self.violations:
            raise field_invalid(*self.violations)


def to_submit(request: pb.GenerateRequest, key: str, *, context_length: int, vocab_size: int) -> Submit:
    """The sequence that `request` asks for. Raises FIELD_INVALID or CONTEXT_LENGTH_EXCEEDED."""
    prompt_tokens, resumed = len(request.prompt_token_ids), len(request.output_token_ids)
    checks = Checks()
    _check_texts(checks, request)
    checks.need(prompt_tokens > 0, "prompt_token_ids", "must hold at least one token")
    checks.need(request.max_new_tokens > 0, "max_new_tokens", "must be at least 1")
    if request.max_new_tokens:
        left = request.max_new_tokens - resumed
        checks.need(
            left > 0, "output_token_ids", "holds max_new_tokens tokens already: nothing is left to do"
        )
    low = request.min_new_tokens <= request.max_new_tokens
    checks.need(low, "min_new_tokens", "must not be larger than max_new_tokens")
    stops = len(request.stop_token_ids)
    many = f"must hold at most {STOP_TOKEN_IDS_MAX} ids, not {stops}"
    checks.need(stops <= STOP_TOKEN_IDS_MAX, "stop_token_ids", many)
    checks.done()
    _check_context(request, context_length)

    prompt, output = list(request.prompt_token_ids), list(request.output_token_ids)
    stop_ids = list(request.stop_token_ids)
    checks.ids(prompt, vocab_size, "prompt_token_ids")
    checks.ids(output, vocab_size, "output_token_ids")
    checks.ids(stop_ids, vocab_size, "stop_token_ids")
    sampling = _sampling(checks, request, vocab_size)
    checks.done()
    return Submit(
        id=key,
        prompt=prompt,
        output=output,
        max_new_tokens=request.max_new_tokens,
        min_new_tokens=request.min_new_tokens,
        stop_token_ids=stop_ids,
        sampling=sampling,
        priority=request.priority or PRIORITY_DEFAULT,
        prefix_root=root_hash(request.model_version, request.cache_salt),
    )


def tenant_of(request: pb.GenerateRequest) -> str:
    """Who is charged."""
    return request.tenant or DEFAULT_TENANT


def _check_texts(checks: Checks, request: pb.GenerateRequest) -> None:
    named = 1 <= len(request.request_id) <= NAME_CHARS_MAX and _is_printable_ascii(request.request_id)
    checks.need(named, "request_id", f"must be 1 to {NAME_CHARS_MAX} printable ASCII characters")
    short = len(request.tenant) <= NAME_CHARS_MAX
    checks.need(short, "tenant", f"must have at most {NAME_CHARS_MAX} characters")
    salted = len(request.cache_salt) <= CACHE_SALT_CHARS_MAX
    checks.need(salted, "cache_salt", f"must have at most {CACHE_SALT_CHARS_MAX} characters")
    known = 0 <= request.priority <= PRIORITY_MAX
    checks.need(known, "priority", f"must be a loom.inference.v1.Priority, not {request.priority}")


def _is_printable_ascii(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _check_context(request: pb.GenerateRequest, context_length: int) -> None:
    prompt_tokens, new = len(request.prompt_token_ids), request.max_new_tokens
    if prompt_tokens + new > context_length:
        raise CallError(
            "CONTEXT_LENGTH_EXCEEDED",
            f"prompt_token_ids ({prompt_tokens}) and max_new_tokens ({new}) do not fit in the context of "
            f"{context_length} tokens: shorten one of them",
            metadata={
                "prompt_tokens": str(prompt_tokens),
                "max_new_tokens": str(new),
                "context_length": str(context_length),
            },
        )


def _sampling(checks: Checks, request: pb.GenerateRequest, vocab_size: int) -> Sampling:
    params = request.sampling
    given = {field.name for field, _ in params.ListFields()}
    values: dict[str, float] = {}
    for name, default, low, high, low_open in _FLOATS:
        value = getattr(params, name) if name in given else default
        inside = math.isfinite(value) and low <= value <= high and not (low_open and value == low)
        bounds = f"must be in {'(' if low_open else '['}{low:g}, {high:g}], not {value:g}"
        checks.need(inside, f"sampling.{name}", bounds)
        values[name] = value
    checks.need(params.HasField("seed"), "sampling.seed", "must be set: a resumed stream depends on it")
    top_k = f"must be 0 (off) to the vocabulary's size, {vocab_size}"
    checks.need(params.top_k <= vocab_size, "sampling.top_k", top_k)
    bias = dict(params.logit_bias)
    few = len(bias) <= LOGIT_BIAS_MAX
    checks.need(few, "sampling.logit_bias", f"must have at most {LOGIT_BIAS_MAX} entries")
    mild = all(-100 <= value <= 100 for value in bias.values())
    checks.need(mild, "sampling.logit_bias", "must be in [-100, 100] for each token")
    checks.ids(list(bias), vocab_size, "sampling.logit_bias")
    top = request.top_logprobs
    checks.need(top <= TOP_LOGPROBS_MAX, "top_logprobs", f"must be at most {TOP_LOGPROBS_MAX}")
    checks.need(request.logprobs or not top, "top_logprobs", "needs logprobs to be set")
    return Sampling(
        **values,
        top_k=params.top_k,
        seed=params.seed,
        logit_bias=bias,
        logprobs=top if request.logprobs else -1,
    )


def to_response(batch: Batch, sequence: Sequence, endpoint: str) -> pb.GenerateResponse:
    """One message: what a read of the sequence gave."""
    response = pb.GenerateResponse()
    if batch.first:
        response.started.worker = endpoint
        response.started.cached_prompt_tokens = sequence.cached_prompt_tokens
    if batch.tokens:
        tokens = response.tokens
        tokens.index = batch.start
        tokens.token_ids.extend(batch.tokens)
        for entry in batch.logprobs:
            tokens.logprobs.add(chosen=entry.chosen, top_token_ids=entry.top_ids, top=entry.top)
    if batch.final is not None:
        response.finished.CopyFrom(_finished(batch.final, sequence))
    return response


def _finished(final: Output, sequence: Sequence) -> pb.Finished:
    queued_ns = max(0, sequence.submitted_ns - sequence.received_ns)
    finished = pb.Finished(
        reason=FINISH_REASONS[final.finish],
        usage=usage_of(sequence, final),
        timings=pb.Timings(
            waiting_ns=queued_ns + final.waiting_ns,
            prefill_ns=final.prefill_ns,
            decode_ns=final.decode_ns,
            steps=final.steps,
            preemptions=final.preemptions,
        ),
    )
    if final.stop_token_id >= 0:
        finished.stop_token_id = final.stop_token_id
    return finished


def usage_of(sequence: Sequence, final: Output) -> pb.Usage:
    """What the sequence cost; `completion_tokens` counts those of earlier workers too."""
    return pb.Usage(
        prompt_tokens=sequence.prompt_tokens,
        cached_prompt_tokens=sequence.cached_prompt_tokens,
        completion_tokens=sequence.completion_tokens,
        computed_prompt_tokens=final.computed_prompt_tokens,
    )
