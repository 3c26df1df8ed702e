"""A level as plain lines of text, for people without a terminal's tables too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tokenloom.bench.stats import Decode, Floor, Level, Spread, Steps


def load_of(level: Level) -> str:
    """`8` in flight, or `2.5/s`."""
    return str(level.max_concurrency) if level.request_rate is None else f"{level.request_rate:.3g}/s"


def ms(spread: Spread | None, point: str) -> str:
    """Milliseconds below a second, seconds from there on."""
    if spread is None:
        return "-"
    value: float = getattr(spread, point)
    if value >= 1000:
        return f"{value / 1e3:.2f} s"
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def steps_lines(levels: Sequence[Level]) -> list[str]:
    """What the steps of an engine took, for each level, beside their floors where these are known."""
    return [line for level in levels if level.steps is not None for line in _level(level, level.steps)]


def _level(level: Level, steps: Steps) -> Iterator[str]:
    yield (
        f"{load_of(level)}: {steps.steps} steps of {steps.step_tokens_mean:.1f} tokens; step p50 "
        f"{_exact(steps.step_ms, 'p50')}, p99 {_exact(steps.step_ms, 'p99')}; decode step p50 "
        f"{_exact(steps.decode_step_ms, 'p50')}, p99 {_exact(steps.decode_step_ms, 'p99')}; prefill "
        f"{steps.prefill_tokens_per_s:,.0f} tokens/s; {steps.preemptions} pre-emptions"
    )
    if parts := _parts(steps.parts_ms):
        yield f"   a step: {parts}"
    yield (
        f"   {level.output_throughput:,.0f} tokens/s out, {level.total_token_throughput:,.0f} in and out"
        f"{_whole(level)}"
    )
    if steps.decode_floor is not None and steps.decode_step_ms is not None:
        yield f"   decode step {_beside(steps.decode_step_ms, steps.decode_floor)}"
    if steps.prefill_floor_tokens_per_s is not None:
        yield f"   prefill could be {steps.prefill_floor_tokens_per_s:,.0f} tokens/s by itself"
    if steps.decode_only is not None:
        yield from _decode_only(steps.decode_only)


def _decode_only(decode: Decode) -> Iterator[str]:
    where = f"   decode only, {decode.batch} sequences at context {decode.context}"
    if decode.step_ms is None:
        yield f"{where}: no step had all of them decoding there"
        return
    yield f"{where}: {decode.tokens_per_s:,.0f} tokens/s, the median of {decode.steps} steps"
    if decode.floor is not None:
        yield f"      step {_beside(decode.step_ms, decode.floor)}"
    if parts := _parts(decode.parts_ms):
        yield f"      a step: {parts}"


def _whole(level: Level) -> str:
    """The whole level beside its floor."""
    if not level.floor_s or not level.duration_s:
        return ""
    could = level.total_output_tokens / level.floor_s
    return f"; the floor is {could:,.0f} out, of which this is {level.floor_s / level.duration_s:.1%}"


def _beside(spread: Spread, floor: Floor) -> str:
    terms = ", ".join(f"{name} {term.ms:.3f}" for name, term in floor.terms.items())
    return (
        f"{spread.p50:.3f} ms = {spread.p50 / floor.step_ms:.2f} × its floor of {floor.step_ms:.3f} ms "
        f"({terms}) at {floor.batch:.0f} sequences of {floor.context:.0f} tokens"
    )


def _parts(parts_ms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {took:.3f} ms" for name, took in parts_ms.items() if took)


def _exact(spread: Spread | None, point: str) -> str:
    return "-" if spread is None else f"{getattr(spread, point):.2f} ms"
