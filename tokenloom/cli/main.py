"""The `tokenloom` command. Each subcommand reads its options here and does its work elsewhere."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tokenloom.cli import logs as logs_command
from tokenloom.cli import status as status_command
from tokenloom.cli import up as up_command
from tokenloom.cli.bench import app as bench_app
from tokenloom.cli.errors import CliError
from tokenloom.cli.models import app as models_app
from tokenloom.cli.plan import WORKERS_MAX, Engine, Options

app = typer.Typer(
    name="tokenloom",
    help="A mesh of small services that serves large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")

PIPED_COLUMNS = 140
"""The width of a drawing that goes into a file or a pipe."""

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tokenloom {metadata.version('tokenloom')}")
        raise typer.Exit


@app.callback()
def tokenloom(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all commands."""


@app.command()
def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when the mesh is up.")] = False,
    workers: Annotated[int, typer.Option(min=1, max=WORKERS_MAX, help="Worker processes.")] = 1,
    engine: Annotated[str, typer.Option(help="torch runs models; sim only pretends, for tests.")] = "torch",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The public port.")] = 8080,
    host: Annotated[str, typer.Option(help="The address that the public port is bound to.")] = "127.0.0.1",
    model: Annotated[
        list[str] | None,
        typer.Option(help="Load this one; may be repeated. Default: the store's first 8."),
    ] = None,
    trace_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the requests that leave a trace.")
    ] = 1.0,
    report_fd: Annotated[int, typer.Option(hidden=True)] = -1,
) -> None:
    """Start a mesh on this machine: modelstore, workers, batcher, gateway and Envoy."""
    if engine not in ("torch", "sim"):
        raise CliError(f"--engine is torch or sim, not {engine!r}", status=2)
    kind: Engine = "sim" if engine == "sim" else "torch"
    options = Options(
        workers=workers,
        engine=kind,
        port=port,
        host=host,
        models=tuple(model or ()),
        trace_ratio=trace_ratio,
    )
    if report_fd >= 0:
        up_command.for_parent(options, report_fd, console)
    elif detach:
        up_command.detached(options, console)
    else:
        up_command.in_foreground(options, console)


@app.command()
def down() -> None:
    """Stop the mesh."""
    running = up_command.down(console)
    console.print("the mesh is down" if running else "no mesh is running")


@app.command()
def status(
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs; watched, one object a line.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="What the batcher sees, as it changes.")
    ] = False,
    interval: Annotated[
        float | None, typer.Option(min=0.02, max=60, help="With --watch: seconds between frames; default 1.")
    ] = None,
    replica: Annotated[
        int | None, typer.Option(min=0, help="With --watch: only this batcher; default: all of them.")
    ] = None,
) -> None:
    """Show what runs; with --watch queues, tenants, workers and leases, live."""
    if watch:
        from tokenloom.cli import watch as watch_command

        interval_s = watch_command.INTERVAL_DEFAULT_S if interval is None else interval
        watch_command.run(_wide_console(), interval_s, replica, as_json=as_json)
    elif interval is not None or replica is not None:
        raise CliError("--interval and --replica go with --watch", status=2)
    elif as_json:
        print(json.dumps(status_command.snapshot(), indent=1))
    elif not status_command.show(console):
        raise CliError("no mesh is running: start one with `tokenloom up`")


def _wide_console() -> Console:
    """Standard output, wide enough for drawings where nothing says how wide it is."""
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, width=PIPED_COLUMNS)


@app.command()
def logs(
    name: Annotated[str | None, typer.Argument(help="worker-0, batcher, … ; all when left out.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=10_000, help="How far back.")] = 50,
) -> None:
    """Show the logs of the mesh's processes."""
    files = logs_command.files(name)
    for line in logs_command.tail(files, lines):
        print(line)
    if follow:
        logs_command.follow(files, lambda line: print(line, flush=True))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The question; `-` reads standard input.")],
    model: Annotated[str | None, typer.Option(help="Which model; needed when there are several.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens to generate.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed draws the same numbers.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
    address: Annotated[str | None, typer.Option(help="host:port of a mesh; default: the local one.")] = None,
) -> None:
    """Ask a model; the answer is written as it comes."""
    from tokenloom.cli import generate as generate_command

    text = sys.stdin.read() if prompt == "-" else prompt
    ask = generate_command.Ask(text, model, raw, max_tokens, temperature, seed)
    answer = generate_command.generate(
        ask, generate_command.address_or_default(address), (lambda _: None) if as_json else _write
    )
    if as_json:
        print(answer.to_json())
        return
    print()
    if sys.stderr.isatty():
        errors.print(answer.summary(), style="dim")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command()
def trace(
    wanted: Annotated[
        str | None, typer.Argument(metavar="ID", help="Trace id (or its beginning) or request id.")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The latest request's; the default.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The spans, for programs.")] = False,
) -> None:
    """Draw the trace of one request."""
    from tokenloom.cli import local, traces, tracetree

    path = local.traces_file()
    if wanted is not None and last:
        raise CliError("give an ID or --last, not both", status=2)
    if wanted is None:
        wait_s = traces.WAIT_MAX_S if local.running() else 0.0
        found = traces.await_last(path, traces.read_last_request(local.last_request_file()), wait_s)
        if found is None:
            raise CliError("no trace yet: ask something with `tokenloom generate` first")
    else:
        found = _one_trace(traces.find(path, wanted), wanted)
    if as_json:
        print(json.dumps({"trace_id": found.trace_id, "spans": [asdict(s) for s in found.spans]}))
    else:
        wide = console.width if console.is_terminal or "COLUMNS" in os.environ else PIPED_COLUMNS
        Console(highlight=False, width=wide).print(tracetree.draw(found, wide))


@app.command()
def simulate(
    trace: Annotated[Path, typer.Option(help="Requests, as JSON lines in the Mooncake format.")],
    workers: Annotated[int, typer.Option(min=1, max=1_000, help="Simulated workers.")] = 16,
    profile: Annotated[str, typer.Option(help="Their law: a name or a file.")] = "h100-8b",
    rate_scale: Annotated[str, typer.Option(help="Multiples of the recorded rate: K[,K...].")] = "",
    policy: Annotated[str, typer.Option(help="One, several with commas, or all.")] = "all",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same run.")] = 0,
    slo_ttft: Annotated[float, typer.Option(min=0.001, help="Seconds to the first token.")] = 2.0,
    slo_itl_ms: Annotated[
        float, typer.Option(min=0.1, help="Milliseconds between tokens, on average.")
    ] = 25.0,
    search_r90: Annotated[
        bool, typer.Option("--search-r90", help="Find the highest rate with 90 % served in time.")
    ] = False,
    step_tokens: Annotated[
        int | None, typer.Option(min=256, help="Tokens of one step; default: the profile's.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw them here (PNG).")] = None,
    table_file: Annotated[Path | None, typer.Option("--table", help="Write tables here (Markdown).")] = None,
) -> None:
    """Run the batcher's core, and other policies, over a recorded trace in virtual time."""
    from services.batcher.simulate.metrics import Slo
    from tokenloom.cli import simulate as simulate_command
    from tokenloom.cli import simulate_view

    comparison = simulate_command.comparison(
        trace, workers, profile, rate_scale, policy, seed, Slo(slo_ttft, slo_itl_ms / 1000),
        search=search_r90, step_tokens=step_tokens,
    )  # fmt: skip
    outcome = simulate_command.compare(comparison, errors, plot=plot_file is not None)
    simulate_command.write(outcome, json_file, plot_file, table_file)
    simulate_view.show(outcome, _wide_console())


def _one_trace(found: list[Any], wanted: str) -> Any:
    if not found:
        raise CliError(f"no trace or request {wanted!r} in the trace file")
    if len(found) > 1:
        raise CliError(f"{wanted!r} begins {len(found)} trace ids: give more digits")
    return found[0]


def main() -> None:
    """The console script."""
    try:
        app()
    except CliError as error:
        errors.print(f"tokenloom: {error}", style="red", soft_wrap=True, markup=False)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
