"""Where the time of a step goes, kernel by kernel: torch's profiler over the first steps of each kind.

Two recordings, because their kernels differ: `prefill`, from the first step on, and `decode`, steps of a
full batch that only decodes. Each leaves a Chrome trace (`prefill.json.gz`) and a table (`prefill.txt`):
kernels by device time on an accelerator, torch's operators by their own time on a CPU, where our kernels
are none of them. Recording slows the steps down, so their times are no measurement; the shares are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from services.worker.bench.drive import EngineLike
from services.worker.protocol import Output, Step, Submit

PREFILL_STEPS_MAX = 8
DECODE_STEPS_MAX = 20
ROWS_MAX = 40
NAME_CHARS_MAX = 110


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel, or an operator on a CPU."""

    name: str
    calls: int
    ms: float


class Recorder:
    """An engine whose first steps of each kind are recorded."""

    def __init__(self, engine: EngineLike, folder: Path, batch: int, device: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.written: list[Path] = []
        self._engine, self._folder, self._batch, self._device = engine, folder, batch, device
        self._recording: _Recording | None = None
        self._kinds = iter((("prefill", PREFILL_STEPS_MAX), ("decode", DECODE_STEPS_MAX)))
        self._next: tuple[str, int] | None = next(self._kinds)

    @property
    def idle(self) -> bool:
        return self._engine.idle

    @property
    def parts_ns(self) -> dict[str, int]:
        return self._engine.parts_ns

    def answer_tokens(self, prompt_tokens: int, step_tokens_max: int) -> int:
        """As long as answers must be for the first to go on until the last has been recorded decoding."""
        beside = max(1, step_tokens_max - self._batch)
        return math.ceil(self._batch * prompt_tokens / beside) + DECODE_STEPS_MAX + 8

    def submit(self, command: Submit) -> Output | None:
        return self._engine.submit(command)

    def step(self) -> Step:
        """Recorded from the first step on, and from the first on whose batch was full and only decoded."""
        if self._recording is None and self._next is not None and self._next[0] == "prefill":
            self._begin()
        step = self._engine.step()
        decodes = len(step.outputs) == step.step_tokens
        if self._recording is not None:
            self._recording.steps += bool(step.step_tokens)
            ended = self._recording.name == "prefill" and decodes and step.step_tokens > 0
            if ended or self._recording.steps == self._recording.steps_max:
                self._end()
        if self._recording is None and self._next is not None and decodes and step.step_tokens == self._batch:
            self._begin()
        return step

    def close(self) -> None:
        """Writes what is being recorded."""
        self._end()

    def _begin(self) -> None:
        assert self._next is not None
        self._recording = _Recording(*self._next, self._device)
        self._next = next(self._kinds, None)

    def _end(self) -> None:
        if self._recording is not None:
            self.written += self._recording.write(self._folder)
            self._recording = None


class _Recording:
    """One run of the profiler, begun at once."""

    def __init__(self, name: str, steps_max: int, device: str) -> None:
        self.name, self.steps_max, self.steps = name, steps_max, 0
        self._on_device = device != "cpu"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_device else [])]
        self._profile = profile(activities=activities, **_every_thread())
        self._profile.start()
        self._began_s = time.perf_counter()

    def write(self, folder: Path) -> list[Path]:
        """Ends it. The files it left."""
        if self._on_device:
            torch.cuda.synchronize()
        took_ms = 1e3 * (time.perf_counter() - self._began_s)
        self._profile.stop()
        trace, text = folder / f"{self.name}.json.gz", folder / f"{self.name}.txt"
        self._profile.export_chrome_trace(str(trace))
        rows = _rows(self._profile.key_averages(), self._on_device)
        text.write_text(table(self.name, rows, self.steps, took_ms))
        return [trace, text]


def _every_thread() -> dict[str, Any]:
    """The compute thread's operators too, where this torch can; kernels are seen in any case."""
    try:
        return {"experimental_config": torch._C._profiler._ExperimentalConfig(profile_all_threads=True)}
    except TypeError:
        return {}


def _rows(events: Iterable[Any], on_device: bool) -> list[Row]:
    """Those that took time, the longest first."""
    wanted = DeviceType.CUDA if on_device else DeviceType.CPU
    rows = [
        Row(event.key, event.count, took_us / 1e3)
        for event in events
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
        if (took_us := event.self_device_time_total if on_device else event.self_cpu_time_total) > 0
    ]
    return sorted(rows, key=lambda row: -row.ms)


def table(name: str, rows: list[Row], steps: int, took_ms: float) -> str:
    """What a person reads: the time of the steps, how much of it was busy, and the longest rows."""
    steps, busy_ms = max(1, steps), sum(row.ms for row in rows)
    said = [
        f"{name}: {steps} steps in {took_ms:.2f} ms ({took_ms / steps:.3f} ms each, recording included); "
        f"busy for {busy_ms:.2f} ms ({busy_ms / took_ms:.1%})",
        f"{'share':>7}  {'ms a step':>10}  {'calls a step':>12}  name",
    ]
    for row in rows[:ROWS_MAX]:
        name, calls = row.name[:NAME_CHARS_MAX], row.calls / steps
        said.append(f"{row.ms / busy_ms:7.1%}  {row.ms / steps:10.4f}  {calls:12.1f}  {name}")
    if len(rows) > ROWS_MAX:
        rest_ms = sum(row.ms for row in rows[ROWS_MAX:])
        said.append(
            f"{rest_ms / busy_ms:7.1%}  {rest_ms / steps:10.4f}  {'':12}  {len(rows) - ROWS_MAX} others"
        )
    return "\n".join(said) + "\n"
