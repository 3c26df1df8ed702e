"""`python -m services.worker.bench.kernels`: the GPU's kernels, their errors and their times.

    python -m services.worker.bench.kernels                 both tables
    python -m services.worker.bench.kernels --errors        … the errors alone
    python -m services.worker.bench.kernels --times --sweep … the best of every tile, case by case

Ends with status 1 when an error is over its bound, or when a kernel is compiled again because counts of
tokens changed. Needs a CUDA device, torch, triton, numpy and the engine's own files.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch

from services.worker.bench import kernel_errors, kernel_times
from services.worker.bench.kernel_errors import ERROR_MAX, LLAMA, decode_error, prefill_error
from services.worker.bench.kernel_times import Time
from services.worker.engine.cuda import decode, elementwise, prefill

SHOWN_MAX = 8
"""Figures of one case in a sweep, fastest first."""


def main() -> int:
    """The exit status."""
    options = _options()
    if not torch.cuda.is_available():
        print("kernels: no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    draw = torch.Generator(device).manual_seed(options.seed)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, seed {options.seed}")
    good = True
    if options.errors or not options.times:
        good = show_errors(draw) and show_compiled_again(draw)
    if options.times or not options.errors:
        figures = kernel_times.decodes(draw, options.sweep)
        show_times(figures, options)
        show_times(kernel_times.prefills(draw, options.sweep), options)
        show_times(kernel_times.elementwises(draw), options)
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="services.worker.bench.kernels", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--errors", action="store_true", help="only these, unless --times is given too")
    parser.add_argument("--times", action="store_true", help="only these, unless --errors is given too")
    parser.add_argument("--sweep", action="store_true", help="try every tile, not only the one in use")
    parser.add_argument("--bytes-per-s", type=float, default=3.0e12, help="of the device's memory")
    parser.add_argument("--flops", type=float, default=8.0e14, help="of its products in bfloat16")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    options: argparse.Namespace = parser.parse_args()
    return options


def show_errors(draw: torch.Generator) -> bool:
    """A row for each case; whether all are within their bounds."""
    dtypes = list(ERROR_MAX)
    print(f"\n{'error norms':60}" + "".join(f"{str(dtype)[6:]:>12}" for dtype in dtypes))
    bad = 0
    for case in kernel_errors.cases():
        errors = [case.error(dtype, draw) for dtype in dtypes]
        over = [not found <= ERROR_MAX[dtype] for found, dtype in zip(errors, dtypes, strict=True)]
        cells = "".join(f"{found:>11.1e}{'!' * wrong:1}" for found, wrong in zip(errors, over, strict=True))
        print(f"{case.kernel + ' ' + case.what:60}{cells}", flush=True)
        bad += sum(over)
    print(f"{bad} over the bound of " + ", ".join(f"{ERROR_MAX[dtype]:g}" for dtype in dtypes))
    return not bad


def show_compiled_again(draw: torch.Generator) -> bool:
    """Whether other counts of tokens, sequences and blocks need nothing new."""

    def work(n: int) -> int:
        lengths = [5 * n + row for row in range(n)]
        for splits in (1, 4):
            decode_error(LLAMA, lengths, splits, torch.bfloat16, draw)
        prefill_error(LLAMA, [(n, 0), (3 * n, 7)], torch.bfloat16, draw)
        kernel_errors.place_error(LLAMA, n, LLAMA.dim, False, torch.bfloat16, draw)
        kernel_errors.store_error(LLAMA, n, torch.bfloat16, draw)
        elementwise.norm(torch.ones(n, 4096, device=draw.device), torch.ones(4096, device=draw.device), 1e-5)
        elementwise.gate(torch.ones(n, 4096, device=draw.device), "silu")
        return variants()

    first = work(16)
    found = {n: work(n) - first for n in (1, 2, 17, 48, 100)}
    print(f"compiled again for other counts: {found}")
    return not any(found.values())


def variants() -> int:
    """Compiled kernels so far."""
    kernels: list[Any] = [
        decode._decode, decode._combine, prefill._prefill, elementwise._place, elementwise._store,
        elementwise._norm, elementwise._gate,
    ]  # fmt: skip
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def show_times(figures: Iterable[Time], options: argparse.Namespace) -> None:
    """Each figure beside its floor; of a sweep the fastest of each case."""
    print(f"\n{'time of one layer':28}{'us':>8}{'floor':>8}{'of it':>7}{'TB/s':>7}{'TFLOP/s':>9}")
    for _, group in groupby(figures, lambda figure: (figure.kernel, figure.what)):
        found = list(group)
        if options.sweep:
            found = sorted(found, key=lambda figure: figure.seconds)[:SHOWN_MAX]
        for figure in found:
            floor = figure.floor_s(options.bytes_per_s, options.flops)
            print(
                f"{figure.kernel + ' ' + figure.what:28}{figure.seconds * 1e6:8.1f}{floor * 1e6:8.1f}"
                f"{floor / figure.seconds:7.0%}{figure.bytes / figure.seconds / 1e12:7.2f}"
                f"{figure.operations / figure.seconds / 1e12:9.1f}  {figure.how}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
