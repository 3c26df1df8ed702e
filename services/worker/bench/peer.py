"""`python -m services.worker.bench.peer --model-dir DIR …`: transformers' own continuous batching, measured.

The same options, prompts, lengths and lines as the engine's bench, so the two can be compared. All
requests are given to one `generate_batch` call that runs `--batch` of them at once; a request's time
counts from when it left the queue, and the start of the manager is left out: both in the peer's favour.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from services.worker.bench.__main__ import tell
from services.worker.bench.options import Options, at_hand, parse
from services.worker.engine.config import ConfigError
from services.worker.engine.host import prepare_environment
from tokenloom.bench import lines, workload
from tokenloom.bench.prompts import Item
from tokenloom.bench.stats import Record, Run, level
from tokenloom.bench.workload import SEED_STEP, Lengths

WARM_UP_TOKENS = 4
BLOCK_TOKENS = 256
"""Its default."""
DTYPES = ("float32", "bfloat16", "float16")


class Peer:
    """A transformers model and what makes its prompts."""

    def __init__(self, options: Options) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from services.worker.bench.prompts import maker
        from services.worker.engine import dummy

        folder = Path(options.config.model_dir)
        name = options.config.dtype if options.config.dtype in DTYPES else "auto"
        device = options.config.device
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.model: Any
        if options.config.load_format == "dummy":
            stored = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).dtype
            dtype = stored or torch.float32 if name == "auto" else getattr(torch, name)
            self.model = dummy.build(folder, dtype, torch.device(self.device))
        else:
            self.model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto" if name == "auto" else getattr(torch, name),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        self.model = self.model.eval().to(self.device)
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self._make = maker(options.prompts, folder, int(self.model.config.vocab_size), options.seed)

    def run(self, items: list[Item], batch: int, seed: int) -> list[Record]:
        """All items, `batch` at once; all answers have the same length."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        wanted = items[0].output_tokens
        greedy = GenerationConfig(max_new_tokens=wanted, do_sample=False, eos_token_id=-1, pad_token_id=0)
        answers = self.model.generate_batch(
            [self._make(item, seed) for item in items],
            generation_config=greedy,
            continuous_batching_config=ContinuousBatchingConfig(
                max_requests_per_batch=batch, num_blocks=self._blocks(items, batch)
            ),
            record_timestamps=True,
        )
        records = [_record(answer, wanted) for answer in answers.values()]
        lost = [Record(error="LOST", wanted_tokens=wanted) for _ in items[len(records) :]]
        began_s = min((record.due_s for record in records), default=0.0)
        for record in lost:
            record.due_s = record.ended_s = began_s
        return records + lost

    def _blocks(self, items: list[Item], batch: int) -> int | None:
        """None: its own choice. On a CPU that is a share of all memory, which it clears at each start."""
        if self.device != "cpu":
            return None
        longest = max(item.prompt_tokens + item.output_tokens for item in items)
        return batch * (longest // BLOCK_TOKENS + 2)


def _record(answer: Any, wanted: int) -> Record:
    return Record(
        due_s=answer.lifespan[0],
        pieces_s=list(answer.timestamps or ()),
        ended_s=answer.lifespan[1],
        prompt_tokens=len(answer.prompt_ids),
        output_tokens=len(answer.generated_tokens),
        wanted_tokens=wanted,
        error="" if answer.error is None else "FAILED",
    )


def measure(options: Options) -> None:
    """Tells every level."""
    import torch
    import transformers

    from services.worker.engine.host import use_threads

    threads = use_threads(options.config.threads)
    tell(lines.Note("loading"))
    peer = Peer(options)
    about: dict[str, str | int | float] = {
        "device": peer.device,
        "dtype": peer.dtype,
        "threads": threads,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }
    lengths = options.lengths
    work: dict[str, str | int | float] = {"prompt_tokens": lengths.prompt, "output_tokens": lengths.output}
    tell(lines.About(about, work, options.prompts))
    short = Lengths(lengths.prompt, WARM_UP_TOKENS)
    for batch, numbers in options.levels():
        count, seed = options.warm_up_count(batch, peer.device), options.seed
        peer.run(workload.fixed("warm-up", count, short), batch, seed)
        for number in numbers:
            items = workload.fixed("request", options.count(batch), lengths)
            records = peer.run(items, batch, seed + number * SEED_STEP)
            tell(lines.Measured(level(records, Run(batch), options.objectives)))


def main() -> int:
    """The exit status: 0 also when what is wrong was told as the last line."""
    try:
        options = parse()
        prepare_environment()
        with at_hand(options) as ready:
            measure(ready)
    except (ConfigError, ValueError, OSError) as error:
        tell(lines.Failed(str(error)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
