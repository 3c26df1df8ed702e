"""`tokenloom bench mesh | engine`: reads the options, measures elsewhere, shows and keeps the report."""

from __future__ import annotations

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tokenloom.bench import report as reports
from tokenloom.bench import words
from tokenloom.bench.report import Report
from tokenloom.bench.traces import Fit
from tokenloom.bench.workload import CONCURRENCY_MAX, REQUESTS_MAX, TOKENS_MAX, Lengths
from tokenloom.cli import bench_facts, bench_options, bench_plot, bench_view
from tokenloom.cli.errors import CliError

app = typer.Typer(help="Measure a mesh, or the engine alone.", no_args_is_help=True)

PIPE_COLUMNS = 240


class ProtocolName(StrEnum):
    """What the load client speaks."""

    openai = "openai"
    grpc = "grpc"


class EndpointName(StrEnum):
    """Chat prompts go through the model's template, completions are taken as they are."""

    chat = "chat"
    completions = "completions"


class LoadFormat(StrEnum):
    """Where the engine alone gets its weights."""

    auto = "auto"
    dummy = "dummy"


class PromptKind(StrEnum):
    """How the engine alone gets its prompts."""

    ids = "ids"
    text = "text"
    chat = "chat"


PromptTokens = Annotated[int, typer.Option(help="Tokens of each prompt, its template included.")]
OutputTokens = Annotated[
    int, typer.Option(help="Tokens of each answer; the end-of-text token is not heeded.")
]
Requests = Annotated[
    int | None,
    typer.Option(help="Of each level. Default: 4 for each in flight, at least 16."),
]
TraceFile = Annotated[
    Path | None,
    typer.Option(help="JSON lines: timestamp, input_length, output_length, hash_ids."),
]
RateScale = Annotated[float, typer.Option(help="2 plays a trace at twice its rate.")]
LengthScale = Annotated[float, typer.Option(help="0.1: a tenth of a trace's lengths.")]
InputMax = Annotated[int | None, typer.Option(help="Cut a trace's longer prompts.")]
OutputMax = Annotated[int | None, typer.Option(help="Cut a trace's longer answers.")]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="Repeat a run's words and times. Default: new ones."),
]
SloTtft = Annotated[float | None, typer.Option("--slo-ttft-ms", help="Goodput: TTFT at most.")]
SloItl = Annotated[
    float | None,
    typer.Option("--slo-itl-ms", help="Goodput: mean time between a request's tokens at most."),
]
PrefixCached = Annotated[
    int, typer.Option(min=0, max=TOKENS_MAX, help="Compare TTFT with and without a cached prefix this long.")
]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the report; `-`: to standard output."),
]
PlotOption = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the report.")]


@app.command("mesh")
def mesh(
    address: Annotated[
        str | None,
        typer.Option(help="host:port or http://host:port. Default: the local mesh."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Needed when there are several.")] = None,
    protocol: Annotated[ProtocolName, typer.Option(help="OpenAI HTTP, or gRPC.")] = ProtocolName.openai,
    endpoint: Annotated[EndpointName, typer.Option(help="Which kind of prompt.")] = EndpointName.chat,
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: requests in flight, e.g. 1,8,32,64.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Open loop: requests per second, e.g. 0.5,2 (Poisson)."),
    ] = None,
    in_flight_max: Annotated[int, typer.Option(help="Open loop: further requests wait.")] = 1024,
    requests: Requests = None,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 64,
    trace: TraceFile = None,
    rate_scale: RateScale = 1.0,
    length_scale: LengthScale = 1.0,
    input_max: InputMax = None,
    output_max: OutputMax = None,
    prefix_cached: PrefixCached = 0,
    slo_ttft_ms: SloTtft = None,
    slo_itl_ms: SloItl = None,
    timeout_s: Annotated[float, typer.Option(help="For one request.")] = 600.0,
    seed: Seed = None,
    json_to: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Put a load on a public port: TTFT, ITL, tokens/s, goodput, and what the client itself costs."""
    from tokenloom.cli import bench_mesh, generate

    if concurrency is not None and rate is not None:
        raise CliError("give --concurrency or --rate, not both", status=2)
    bench_options.between("--timeout-s", timeout_s, 0.001, 86_400)
    bench_options.between("--in-flight-max", in_flight_max, 1, CONCURRENCY_MAX)
    fit = bench_options.fit(rate_scale, length_scale, input_max, output_max)
    count = bench_options.requests(requests)
    items, cut = bench_options.read_trace(bench_options.TraceOptions(trace, count, fit))
    open_loop = rate is not None or (trace is not None and concurrency is None)
    load = bench_mesh.MeshLoad(
        address=bench_options.address(generate.address_or_default(address)),
        model=model,
        protocol=protocol.value,
        endpoint=endpoint.value,
        concurrency=() if open_loop else bench_options.concurrencies(concurrency or "1"),
        rates=bench_options.rates(rate) if rate is not None else (),
        requests=count,
        lengths=bench_options.lengths(prompt_tokens, output_tokens),
        trace=items,
        in_flight_max=in_flight_max,
        prefix_tokens=prefix_cached,
        seed=_fresh_seed() if seed is None else seed,
        objectives=bench_options.objectives(slo_ttft_ms, slo_itl_ms),
        timeout_s=timeout_s,
        loop=bench_mesh.fast_loop(protocol.value),
    )
    keep = _Keeper(json_to, plot)
    began = time.time()
    machine = bench_facts.machine()
    outcome = bench_mesh.run(load, keep.display)
    keep.show(
        Report(
            kind="mesh",
            target=load.address,
            model=outcome.model,
            protocol=load.spoken,
            seed=load.seed,
            started_unix_s=began,
            workload=_workload(load.lengths, trace, fit, cut, prefix_cached),
            machine=machine,
            levels=outcome.levels,
            prefix=outcome.prefix,
        )
    )


@app.command("engine")
def engine(
    model: Annotated[
        str | None,
        typer.Option(help="Of the local store; needed when there are several."),
    ] = None,
    model_dir: Annotated[Path | None, typer.Option(help="A Hugging Face folder instead.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of a known shape instead, e.g. llama-3-8b.")
    ] = None,
    load_format: Annotated[
        LoadFormat, typer.Option(help="dummy: random weights; the folder needs a config.json alone.")
    ] = LoadFormat.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="0: as many as there are cores.")] = 0,
    kv_cache_bytes: Annotated[int, typer.Option(min=0, help="0: the engine chooses.")] = 0,
    sequences_max: Annotated[
        int | None,
        typer.Option(min=1, max=CONCURRENCY_MAX, help="Default: the largest batch."),
    ] = None,
    step_tokens_max: Annotated[int, typer.Option(min=1, max=65536, help="Tokens of one step.")] = 512,
    itl_max_ms: Annotated[
        int | None,
        typer.Option(min=0, max=60_000, help="Cut prompts so that steps with decodes stay below it; 0: no."),
    ] = None,
    pipeline_depth: Annotated[
        int | None, typer.Option(min=1, max=2, help="2: the next step is prepared meanwhile.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences in flight, e.g. 1,8,32,64.")] = "1",
    prompts: Annotated[PromptKind, typer.Option(help="ids: random ones.")] = PromptKind.ids,
    requests: Requests = None,
    waves: Annotated[
        int | None, typer.Option(min=1, max=REQUESTS_MAX, help="Instead: for each in flight; 1: all at once.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Levels of each batch.")] = 1,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 64,
    trace: TraceFile = None,
    length_scale: LengthScale = 1.0,
    input_max: InputMax = None,
    output_max: OutputMax = None,
    prefix_cached: PrefixCached = 0,
    slo_ttft_ms: SloTtft = None,
    slo_itl_ms: SloItl = None,
    decode_only: Annotated[
        int | None,
        typer.Option(min=1, max=TOKENS_MAX, help="Also the decode steps of a full batch near this context."),
    ] = None,
    memory_bandwidth: Annotated[
        float, typer.Option(help="Bytes per second, for floors. 0: what is known of the device.")
    ] = 0.0,
    flops: Annotated[float, typer.Option(help="Operations per second, likewise.")] = 0.0,
    profile: Annotated[
        Path | None, typer.Option(help="A folder for traces and tables of a few recorded steps.")
    ] = None,
    seed: Seed = None,
    json_to: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Run the engine alone in one process, without mesh or gRPC: what the device and our kernels can do."""
    from tokenloom.cli import bench_engine

    batches = bench_options.concurrencies(batch, "--batch")
    fit = bench_options.fit(1.0, length_scale, input_max, output_max)
    count = bench_options.requests(requests)
    bench_options.read_trace(bench_options.TraceOptions(trace, count or 1, fit))
    extra = bench_options.engine_extra(
        shape=shape,
        load_format=load_format.value,
        waves=None if waves is None else (waves, count),
        decode_only=None if decode_only is None else (decode_only, prompt_tokens, output_tokens),
        speeds=(memory_bandwidth, flops),
    )
    load = bench_engine.EngineLoad(
        model=model,
        model_dir=model_dir,
        device=device,
        dtype=dtype,
        threads=threads,
        kv_cache_bytes=kv_cache_bytes,
        sequences_max=sequences_max or max(*batches, 1),
        step_tokens_max=max(step_tokens_max, sequences_max or max(*batches, 1)),
        batches=batches,
        prompts=prompts.value,
        requests=count,
        lengths=bench_options.lengths(prompt_tokens, output_tokens),
        prefix_tokens=prefix_cached,
        seed=_fresh_seed() if seed is None else seed,
        objectives=bench_options.objectives(slo_ttft_ms, slo_itl_ms),
        pipeline_depth=pipeline_depth,
        itl_max_ms=itl_max_ms,
        trace=trace,
        fit=fit,
        shape=shape,
        more=extra | {"repeats": repeats, "profile": profile and profile.absolute()},
    )
    keep = _Keeper(json_to, plot)
    keep.show(bench_engine.run(load, keep.display))


class _Keeper:
    """Shows a report, writes it and draws it. With `--json -` people are told on the error output."""

    def __init__(self, json_to: str | None, plot: Path | None) -> None:
        if plot is not None:
            bench_plot.check()
        self._json_to = json_to
        self._plot = plot
        error_width = None if sys.stderr.isatty() else PIPE_COLUMNS
        self._errors = Console(stderr=True, highlight=False, width=error_width)
        out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
        self._out = self._errors if json_to == "-" else out
        self.display = bench_view.Display(self._errors)

    def show(self, report: Report) -> None:
        """Raises CliError when a file cannot be written, and when no request was answered."""
        self.display.end()
        if report.levels:
            self._out.print(bench_view.table(report))
        lines = [*words.steps_lines(report.levels), *bench_view.remarks(report)]
        if report.prefix is not None:
            lines = [*bench_view.prefix_lines(report.prefix), *lines]
        engine = bench_view.engine_line(report)
        for line in [*lines, *([engine] if engine else []), bench_facts.brief(report.machine)]:
            self._out.print(line, soft_wrap=True, markup=False)
        self._write(reports.encode(report))
        if self._plot is not None and report.levels:
            bench_plot.draw(report, self._plot)
            self._out.print(f"plot: {self._plot}", soft_wrap=True, markup=False)
        if report.levels and not any(level.completed for level in report.levels):
            reasons = {reason for level in report.levels for reason in level.errors}
            raise CliError(f"no request was answered: {', '.join(sorted(reasons))}")

    def _write(self, document: bytes) -> None:
        if self._json_to == "-":
            sys.stdout.buffer.write(document)
            sys.stdout.buffer.flush()
        elif self._json_to is not None:
            try:
                Path(self._json_to).write_bytes(document)
            except OSError as error:
                raise CliError(f"--json {self._json_to}: {error.strerror}") from None


def _workload(
    lengths: Lengths, trace: Path | None, fit: Fit, cut: int, prefix: int
) -> dict[str, str | int | float]:
    if trace is not None:
        return {
            "trace": trace.name,
            "rate_scale": fit.rate_scale,
            "length_scale": fit.length_scale,
            "requests_cut": cut,
        }
    fixed: dict[str, str | int | float] = {"prompt_tokens": lengths.prompt, "output_tokens": lengths.output}
    return fixed | {"prefix_tokens": prefix} if prefix else fixed


def _fresh_seed() -> int:
    """No run before this one had it, so its prompts are in nobody's cache."""
    return time.time_ns() // 1000 % 2**31
