"""`python -m tools.bench_peers`: ours and its peers on this machine, in turn, in one run.

    python -m tools.bench_peers --vllm-venv DIR           the whole mesh beside vLLM's CPU server
    python -m tools.bench_peers --transformers            … beside transformers' `generate_batch`
    python -m tools.bench_peers --mesh-vs-engine          the whole mesh beside the bare engine, 32 streams

Same weights, prompts, lengths and load client for all. In every round each load is put on every system
before the next load; the figures are medians of the rounds. Written to `--out`: JSON, and a plot if
matplotlib is there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokenloom.bench import compare
from tokenloom.bench.compare import Cell, Comparison, Median, Ratio
from tokenloom.bench.report import encode
from tokenloom.bench.workload import CONCURRENCY_MAX, SEED_STEP, Lengths
from tokenloom.cli import bench_engine, bench_facts, bench_plot, bench_view
from tokenloom.cli.bench_options import between, concurrencies
from tokenloom.cli.errors import CliError
from tools import bench_systems as systems
from tools.bench_systems import IDLE_CORES_MAX, Ask, Server, System
from tools.fetch import ROOT, fetch_model

MODEL = "smollm2"
OURS = "tokenloom"
ENGINE = "engine"
MESH_VS_ENGINE_BAR = 0.93
IDLE_PROBE_S = 3.0
"""How long servers are watched without load before the first round."""
COLUMNS = 140


def main() -> None:
    """Ends with status 1 and one line when something cannot be measured."""
    options = _options()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else COLUMNS)
    os.environ["TOKENLOOM_HOME"] = str(options.home)
    try:
        for path in (options.out, options.home):
            path.mkdir(parents=True, exist_ok=True)
        loads = (32,) if options.mesh_vs_engine else concurrencies(options.concurrency)
        lengths = Lengths(options.prompt_tokens, options.output_tokens)
        comparison = _compare(options, loads, lengths, console)
    except CliError as error:
        raise SystemExit(f"bench: {error}") from None
    _show(comparison, options, console)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.bench_peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--vllm-venv", type=Path, help="a virtual environment with vLLM's CPU build")
    parser.add_argument("--vllm-cache-gib", type=int, default=4)
    parser.add_argument("--transformers", action="store_true", help="measure generate_batch too")
    parser.add_argument(
        "--mesh-vs-engine", action="store_true", help="the bare engine is the peer, at 32 streams"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", default="1,8,32,64")
    parser.add_argument("--requests", type=int, help="of each cell; default: twice the streams, at least 16")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", help="of the peers")
    parser.add_argument("--our-dtype", default="auto", help="of our workers and our bare engine")
    parser.add_argument("--threads", type=int, default=0, help="of our engine; 0: as many as there are cores")
    parser.add_argument("--model-source", type=Path, help="GGUF file or folder; default: the demo's model")
    parser.add_argument(
        "--home", type=Path, default=ROOT / "build" / "bench-home", help="kept for the next run"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="JSON, plot and logs")
    options = parser.parse_args()
    if not (options.vllm_venv or options.transformers or options.mesh_vs_engine):
        parser.error("name a peer: --vllm-venv DIR, --transformers or --mesh-vs-engine")
    between("--rounds", options.rounds, 1, 100)
    options.home, options.out = options.home.absolute(), options.out.absolute()
    options.threads = options.threads or len(os.sched_getaffinity(0))
    return options


def _compare(
    options: argparse.Namespace, loads: tuple[int, ...], lengths: Lengths, console: Console
) -> Comparison:
    began = time.time()
    machine = bench_facts.machine()
    with _started(options, console) as compared:
        _watch_idle([system for system in compared if isinstance(system, Server)], console)
        by_name = {system.name: system for system in compared}
        cells: list[Cell] = []
        for number, load, name in compare.turns(list(by_name), loads, options.rounds):
            count = options.requests or max(16, 2 * load)
            # New words in every round and load, so that nobody finds them cached; the same for all systems.
            ask = Ask(load, count, lengths, int(began) * SEED_STEP + number * CONCURRENCY_MAX + load)
            cells.append(_cell(by_name[name], list(by_name.values()), number, ask, console))
        medians = compare.medians(cells)
        return Comparison(
            started_unix_s=began,
            machine=machine,
            workload={
                "prompt_tokens": lengths.prompt,
                "output_tokens": lengths.output,
                "rounds": options.rounds,
                "requests": options.requests or "2 for each stream, at least 16",
            },
            systems={system.name: system.describe() for system in compared},
            cells=cells,
            medians=medians,
            ratios=compare.ratios(medians, OURS),
        )


@contextmanager
def _started(options: argparse.Namespace, console: Console) -> Iterator[list[System]]:
    """Ours first."""
    with ExitStack() as stack:
        source = options.model_source or fetch_model()
        ours = systems.mesh(OURS, MODEL, source, options.our_dtype, options.threads)
        server = stack.enter_context(ours)
        compared: list[System] = [server]
        _, folder = stack.enter_context(bench_engine.model_folder(MODEL, None))
        server.resolve(systems.engine_load(folder, options.our_dtype, options.threads))
        if options.mesh_vs_engine:
            load = systems.engine_load(folder, options.our_dtype, options.threads)
            compared.append(systems.InProcess(ENGINE, bench_engine.ENGINE, load))
        if options.transformers:
            load = systems.engine_load(folder, options.dtype, options.threads)
            compared.append(systems.InProcess("transformers", bench_engine.PEER, load))
        if options.vllm_venv:
            console.print("starting vLLM; this takes a minute or two", style="dim")
            log = options.out / "vllm.log"
            peer = systems.vllm(options.vllm_venv, folder, options.dtype, options.vllm_cache_gib, log)
            compared.append(stack.enter_context(peer))
        yield compared


def _watch_idle(servers: list[Server], console: Console) -> None:
    """Which servers take CPU though nobody asks them anything."""
    before = [server.cpu_s() for server in servers]
    time.sleep(IDLE_PROBE_S)
    for server, at_first in zip(servers, before, strict=True):
        cores = (server.cpu_s() - at_first) / IDLE_PROBE_S
        server.burns = cores > IDLE_CORES_MAX
        console.print(f"{server.name} takes {cores:.3f} cores when idle", style="dim")


def _cell(system: System, everyone: list[System], number: int, ask: Ask, console: Console) -> Cell:
    others = [other for other in everyone if other is not system]
    for other in others:
        other.pause()
    system.resume()
    before, began_s = [other.cpu_s() for other in others], time.monotonic()
    load_average = os.getloadavg()[0]
    level = system.measure(ask, bench_view.Display(Console(quiet=True)))
    took_s = time.monotonic() - began_s
    idle = {
        other.name: round((other.cpu_s() - at_first) / took_s, 4)
        for other, at_first in zip(others, before, strict=True)
        if isinstance(other, Server)
    }
    for other in others:
        other.resume()
    console.print(f"round {number + 1}: {system.name:12} {bench_view.one_line(level)}", style="dim")
    return Cell(system=system.name, round=number, level=level, idle_cpu_cores=idle,
                load_average_1m=round(load_average, 2))  # fmt: skip


def _show(comparison: Comparison, options: argparse.Namespace, console: Console) -> None:
    console.print(_table(comparison.medians, comparison.ratios))
    for name, facts in comparison.systems.items():
        said = ", ".join(f"{key} {value}" for key, value in facts.items())
        console.print(f"{name}: {said}", soft_wrap=True, markup=False)
    console.print(bench_facts.brief(comparison.machine), soft_wrap=True, markup=False)
    if options.mesh_vs_engine:
        for share in [ratio.output_throughput for ratio in comparison.ratios if ratio.peer == ENGINE]:
            console.print(f"mesh ÷ engine: {share:.3f} (the bar is {MESH_VS_ENGINE_BAR})")
    stem = "mesh-vs-engine" if options.mesh_vs_engine else "peers"
    (options.out / f"{stem}.json").write_bytes(encode(comparison))
    console.print(f"written: {options.out / stem}.json", soft_wrap=True, markup=False)
    try:
        _plot(comparison, options.out / f"{stem}.png")
        console.print(f"plot: {options.out / stem}.png", soft_wrap=True, markup=False)
    except CliError as error:
        console.print(f"no plot: {error}", style="dim", markup=False)


def _table(medians: list[Median], ratios: list[Ratio]) -> Table:
    shown = Table(
        box=None, pad_edge=False, header_style="bold", title_justify="left", title="medians of the rounds"
    )
    for title in ("streams", "system", "tokens/s", "least … most", "TTFT p50", "TTFT p99", "ITL p50",
                  "ITL p99",
                  "chunks/token", "failed", "ours ÷ it", "TTFT ours ÷ its"):  # fmt: skip
        shown.add_column(title, justify="left" if title == "system" else "right", no_wrap=True)
    by_key = {(ratio.peer, ratio.concurrency): ratio for ratio in ratios}
    for median in sorted(medians, key=lambda median: (median.concurrency, median.system != OURS)):
        ratio = by_key.get((median.system, median.concurrency))
        shown.add_row(
            str(median.concurrency),
            median.system,
            f"{median.output_throughput:,.1f}",
            f"{median.output_throughput_least:,.1f} … {median.output_throughput_most:,.1f}",
            *(
                "-" if value is None else f"{value:,.0f} ms"
                for value in (median.ttft_ms_p50, median.ttft_ms_p99, median.itl_ms_p50, median.itl_ms_p99)
            ),
            f"{median.chunks_per_token:.3f}",
            str(median.failed),
            f"{ratio.output_throughput:.3f}" if ratio else "",
            f"{ratio.ttft_p50:.3f}" if ratio and ratio.ttft_p50 is not None else "",
        )
    return shown


def _plot(comparison: Comparison, path: Path) -> None:
    machine, work = comparison.machine, comparison.workload
    facts = (
        f"{machine['cpu']}, {machine['cores']} cores · commit {machine['commit']} · "
        f"{work['prompt_tokens']} tokens in, {work['output_tokens']} out · medians of {work['rounds']} rounds"
    )
    names = list(comparison.systems)
    title = f"{MODEL}: " + " and ".join(names)
    loads = sorted({median.concurrency for median in comparison.medians})
    if len(loads) > 1:
        series = {name: compare.median_levels(comparison.cells, name) for name in names}
        bench_plot.draw_levels(series, title, path, facts)
        return
    bars = {median.system: [median.output_throughput] for median in comparison.medians}
    bench_plot.draw_bars([f"{loads[0]} streams"], bars, title, "tokens/s", path, facts)


if __name__ == "__main__":
    main()
