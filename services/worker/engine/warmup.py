"""The first steps, so that no request pays for what a first run costs: kernels, buffers, page faults."""

from __future__ import annotations

from services.worker.engine.attention import UnknownArgument
from services.worker.engine.engine import Engine
from services.worker.engine.errors import EngineError, load_failed, unsupported
from services.worker.protocol import Sampling, Submit

STEPS = 4
SEQUENCES = 4
PROMPT_TOKENS_MAX = 128


def warm_up(engine: Engine) -> None:
    """A few sequences of both kinds of sampling, forgotten afterwards. Raises EngineError."""
    limits = engine.limits
    length = max(1, min(PROMPT_TOKENS_MAX, limits.context_length // 2, limits.step_tokens_max))
    names = [f"warm-up-{number}" for number in range(min(SEQUENCES, limits.sequences_max))]
    for number, name in enumerate(names):
        sampling = Sampling(temperature=float(number % 2), top_p=0.9, seed=number)
        engine.submit(Submit(name, [0] * length, [], STEPS, 0, [], sampling))
    try:
        for _ in range(STEPS):
            _step(engine)
        engine.warm_up()
    except UnknownArgument as error:
        raise unsupported(engine.architecture, str(error)) from error
    except RuntimeError as error:
        raise load_failed(f"the first steps failed: {error}") from error
    for name in names:
        engine.cancel(name)
    engine.forget_rates()


def largest_step(engine: Engine) -> None:
    """As many tokens as a step may have, of as many sequences as there may be, sampled at full length.

    Raises EngineError MODEL_TOO_LARGE. Nothing of it is left behind.
    """
    limits = engine.limits
    sequences = min(limits.sequences_max, limits.step_tokens_max)
    length = max(1, min(limits.step_tokens_max // sequences, limits.context_length - STEPS))
    names = [f"largest-{number}" for number in range(sequences)]
    for number, name in enumerate(names):
        sampling = Sampling(temperature=1.0, top_p=0.9, seed=number, logprobs=1)
        engine.submit(Submit(name, [number % 2] * length, [], STEPS, 0, [], sampling))
    for _ in range(2):
        _step(engine)
    for name in names:
        engine.cancel(name)


def _step(engine: Engine) -> None:
    """As `Engine.step`, but a step that runs out of memory is not taken back and tried smaller."""
    flight = engine.begin()
    if flight is None:
        return
    drawn = engine.compute(flight)
    if drawn is None:
        raise EngineError(
            "MODEL_TOO_LARGE", f"memory ran out in a first step of {flight.plan.tokens} tokens: see the log"
        )
    engine.tell(engine.settle(drawn))
