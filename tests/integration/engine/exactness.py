"""Greedy output against transformers' own `generate`, token for token.

`check_exact(folder)` is the whole claim for one model: alone, and in a mixed batch in which sequences
join and leave between steps, with prompts cut into chunks, with pre-emption, and again on what the prefix
cache kept. Both sides load the same safetensors in float32. A mismatch where the reference's two best
logits are closer than TIE is a tie: reported, not counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from services.worker.engine.config import EngineConfig
from services.worker.engine.engine import Engine
from services.worker.engine.loader import load
from services.worker.engine.pipeline import Launches
from services.worker.protocol import Output, Sampling, Submit

TIE = 1e-4
DEVICE = os.environ.get("TOKENLOOM_TEST_DEVICE", "cpu")
"""Where both sides compute."""


@dataclass
class Report:
    """What a comparison found; `wrong` must stay empty."""

    compared: int = 0
    ties: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Run:
    """What an engine gave: tokens and the last Output of each sequence."""

    tokens: dict[str, list[int]]
    final: dict[str, Output]
    steps: int

    @property
    def preemptions(self) -> int:
        return sum(output.preemptions for output in self.final.values())

    @property
    def cached_prompt_tokens(self) -> int:
        return sum(output.cached_prompt_tokens for output in self.final.values())


def open_engine(folder: Path, **settings: object) -> Engine:
    """An engine in this process; `blocks` sets the size of its cache."""
    blocks = settings.pop("blocks", None)
    settings = {"device": DEVICE, "dtype": "float32", "kv_cache_bytes": 64 << 20, **settings}
    config = EngineConfig(model_dir=str(folder), **settings)  # type: ignore[arg-type]
    loaded = load(config, lambda stage, fraction: None)
    if blocks is not None:
        loaded = loaded.with_blocks(int(str(blocks)))
    engine = Engine(loaded, config, time.monotonic_ns)
    engine.warm_up()
    return engine


def greedy(name: str, prompt: list[int], count: int, output: list[int] | None = None) -> Submit:
    """A greedy sequence without stop tokens."""
    return Submit(name, prompt, output or [], count, 0, [], Sampling(temperature=0.0))


def run(engine: Engine, submits: list[Submit], *, per_step: int = 1000, leavers: int = 0) -> Run:
    """Drives an engine until it is empty; `per_step` sequences join before each step.

    `leavers` further sequences join in between and are cancelled three steps later.
    """
    waiting = list(submits)
    noise = [greedy(f"leaver-{n}", submits[n % len(submits)].prompt, 64) for n in range(leavers)]
    run = Run({submit.id: [] for submit in submits}, {}, 0)
    leaving: dict[str, int] = {}
    step = ahead(engine) if engine.ahead else lambda: engine.step().outputs
    while waiting or noise or not engine.idle:
        joining, waiting = waiting[:per_step], waiting[per_step:]
        if noise and run.steps % 2 == 0:
            joining.append(noise.pop())
            leaving[joining[-1].id] = run.steps + 3
        for submit in joining:
            assert engine.submit(submit) is None
        for name in [name for name, step in leaving.items() if step == run.steps]:
            engine.cancel(name)
        for output in step():
            if output.id in run.tokens:
                run.tokens[output.id] += output.tokens
                if output.finish:
                    run.final[output.id] = output
        run.steps += 1
    return run


def ahead(engine: Engine) -> Callable[[], list[Output]]:
    """Steps of a device that computes one while the next is launched."""
    pipeline = Launches(engine)

    def step() -> list[Output]:
        landing = pipeline.turn()
        return [] if landing is None else engine.tell(landing).outputs

    return step


def reference(model: PreTrainedModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens by transformers, without any stop token; shorter prompts are padded on the left."""
    model.generation_config.eos_token_id = None
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids.to(DEVICE),
        attention_mask=mask.to(DEVICE),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return [[int(token) for token in row] for row in out[:, longest:]]


def load_reference(folder: Path) -> PreTrainedModel:
    """The same weights in float32 with transformers' own attention."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval().to(DEVICE)


def compare(
    model: PreTrainedModel,
    prompts: list[list[int]],
    wanted: list[list[int]],
    got: list[list[int]],
    report: Report,
) -> None:
    """Adds one run of all prompts to a report."""
    for number, (prompt, want, have) in enumerate(zip(prompts, wanted, got, strict=True)):
        report.compared += 1
        if len(want) != len(have):
            report.wrong.append(f"prompt {number}: {len(have)} tokens instead of {len(want)}")
        elif want != have:
            at = next(place for place in range(len(want)) if want[place] != have[place])
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + want[:at]], device=DEVICE)).logits[0, -1]
            behind = float(logits.max() - min(logits[want[at]], logits[have[at]]))
            found = f"prompt {number}, token {at}: {have[at]} instead of {want[at]}, {behind:.1e} apart"
            (report.ties if behind < TIE else report.wrong).append(found)


def check_exact(folder: Path, prompts: list[list[int]], count: int, *, batch: int = 16) -> Report:
    """Alone, then mixed `batch` at a time with small chunks and a cache too small for all, then cached."""
    model = load_reference(folder)
    wanted = reference(model, prompts, count)
    submits = [greedy(f"s{number}", prompt, count) for number, prompt in enumerate(prompts)]
    report = Report()
    alone = open_engine(folder)
    got = [run(alone, [submit]).tokens[submit.id] for submit in submits]
    compare(model, prompts, wanted, got, report)
    longest = max(map(len, prompts)) + count
    blocks = -(-longest // 16) * max(2, batch // 3)
    mixed = open_engine(folder, blocks=blocks, sequences_max=batch, step_tokens_max=batch + 13)
    result = run(mixed, submits, per_step=2, leavers=4)
    compare(model, prompts, wanted, [result.tokens[submit.id] for submit in submits], report)
    assert result.preemptions > 0, "the cache was meant to be too small"
    # Once more, the last first: theirs are the blocks that are still there. Every other one comes with
    # the beginning of its output, as a stream does that goes on after its worker was lost.
    begun = [want[: count // 2 * (number % 2)] for number, want in enumerate(wanted)]
    submits = [
        greedy(f"again-{number}", prompt, count, begun[number]) for number, prompt in enumerate(prompts)
    ]
    result = run(mixed, submits[::-1], per_step=2)
    got = [begun[number] + result.tokens[submit.id] for number, submit in enumerate(submits)]
    compare(model, prompts, wanted, got, report)
    assert result.cached_prompt_tokens > 0, "some prompt was meant to be in the cache"
    return report
