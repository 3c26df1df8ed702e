"""Sequences and schedulers for these tests, with short names."""

from services.worker.core.scheduler import Advance, Limits, Plan, Scheduler
from services.worker.core.sequence import Sequence


def limits(**fields: int) -> Limits:
    """Small bounds that a test changes where it matters."""
    values = {
        "total_blocks": 8,
        "block_tokens": 4,
        "sequences_max": 4,
        "step_tokens_max": 16,
        "context_length": 32,
        "waiting_max": 100,
    }
    return Limits(**(values | fields))


def sequence(name: str, prompt: int, new: int = 4, *, output: int = 0, **fields) -> Sequence:
    """`prompt` tokens to continue by `new`; the tokens themselves are 10, 11, …"""
    return Sequence(
        id=name,
        tokens=list(range(10, 10 + prompt + output)),
        prompt_tokens=prompt,
        max_new_tokens=new,
        **fields,
    )


def step(scheduler: Scheduler, token: int = 99, now_ns: int = 1) -> tuple[Plan, list[Advance]]:
    """Plans and settles one step that draws `token` everywhere."""
    plan = scheduler.plan(now_ns)
    drawing = sum(chunk.draws for chunk in plan.chunks)
    return plan, scheduler.settle(plan, [token] * drawing, now_ns)


def planned(plan: Plan) -> list[tuple[str, int, int]]:
    """(id, start, count) of each chunk."""
    return [(chunk.sequence.id, chunk.start, chunk.count) for chunk in plan.chunks]
