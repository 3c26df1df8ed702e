"""Draws one trace as a tree, with a time bar and the attributes that matter for each span."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenloom.cli.spans import Span
from tokenloom.cli.traces import Trace

BAR_CELLS = 32
DEPTH_MAX = 64
COLOURS = {
    "edge": "bright_blue",
    "gateway": "cyan",
    "mesh": "blue",
    "batcher": "magenta",
    "worker": "green",
    "modelstore": "yellow",
}

# Shown in this order, under a shorter name.
ATTRIBUTES = {
    "gen_ai.request.model": "model",
    "gen_ai.usage.input_tokens": "in",
    "gen_ai.usage.output_tokens": "out",
    "gen_ai.usage.cache_read.input_tokens": "cached",
    "gen_ai.response.finish_reasons": "finish",
    "http.status_code": "http",
    "grpc.status_code": "grpc",
    "rpc.grpc.status_code": "grpc",
    "loom.destination": "to",
    "upstream_address": "upstream",
    "error.type": "error",
}
PREFIX = "loom."
NOT_SHOWN = frozenset({"loom.request_id", "loom.attempt"})


def draw(trace: Trace) -> RenderableType:
    """The whole picture: a heading, the tree, and what is missing from it."""
    start, end = trace.start_ns, max(trace.end_ns, trace.start_ns + 1)
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="ellipsis", no_wrap=True, style="dim")
    for prefix, span in walk(trace):
        colour = COLOURS.get(span.service, "white")
        name = Text(prefix, "dim") + Text(f"{span.service} ", f"bold {colour}") + Text(span.name)
        if span.status == "error":
            name += Text(" ✗", "bold red")
        took = Text(duration(span.end_ns - span.start_ns))
        table.add_row(name, took, Text(bar(span, start, end), colour), notes(span))
    heading = Text("trace ", "dim") + Text(trace.trace_id, "bold")
    heading += Text(f"  {len(trace.spans)} spans, {duration(end - start)}", "dim")
    parts: list[RenderableType] = [heading, table]
    if trace.missing_parents:
        parts.append(Text(f"{len(trace.missing_parents)} parent spans have not arrived", "yellow"))
    return Group(*parts)


def walk(trace: Trace) -> Iterator[tuple[str, Span]]:
    """Spans in drawing order, each with the lines of the tree before it; orphans count as roots."""
    here = {s.span_id for s in trace.spans}
    children: dict[str, list[Span]] = {}
    for span in sorted(trace.spans, key=lambda s: (s.start_ns, -s.end_ns, s.span_id)):
        children.setdefault(span.parent_id if span.parent_id in here else "", []).append(span)
    for root in children.get("", []):
        yield "", root
        yield from _below(root, children, "", 1)


def _below(
    parent: Span, children: Mapping[str, list[Span]], lead: str, depth: int
) -> Iterator[tuple[str, Span]]:
    if depth > DEPTH_MAX:
        return
    spans = children.get(parent.span_id, [])
    for span in spans:
        last = span is spans[-1]
        yield lead + ("└─ " if last else "├─ "), span
        yield from _below(span, children, lead + ("   " if last else "│  "), depth + 1)


def bar(span: Span, start_ns: int, end_ns: int) -> str:
    """Where the span lies between start and end; at least one cell long."""
    scale = BAR_CELLS / (end_ns - start_ns)
    first = min(BAR_CELLS - 1, int((span.start_ns - start_ns) * scale))
    last = max(first + 1, min(BAR_CELLS, round((span.end_ns - start_ns) * scale)))
    return "·" * first + "█" * (last - first) + "·" * (BAR_CELLS - last)


def duration(nanoseconds: int) -> str:
    """`850 µs`, `12.3 ms`, `1.20 s`."""
    if nanoseconds < 1_000_000:
        return f"{nanoseconds / 1e3:.0f} µs"
    if nanoseconds < 1_000_000_000:
        return f"{nanoseconds / 1e6:.1f} ms"
    return f"{nanoseconds / 1e9:.2f} s"


def notes(span: Span) -> str:
    """The attributes worth a look, and what went wrong."""
    shown = [
        f"{short}={_plain(span.attributes[key])}"
        for key, short in ATTRIBUTES.items()
        if key in span.attributes
    ]
    shown += [
        f"{key.removeprefix(PREFIX)}={_plain(value)}"
        for key, value in span.attributes.items()
        if key.startswith(PREFIX) and key not in NOT_SHOWN and key not in ATTRIBUTES
    ]
    if span.status == "error" and span.message:
        shown.append(span.message)
    return " ".join(shown)


def _plain(value: Any) -> str:
    return ",".join(str(v) for v in value) if isinstance(value, list) else str(value)
