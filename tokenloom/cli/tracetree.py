"""Draws one trace as a tree, with a time bar and the attributes that matter for each span."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tokenloom.cli.spans import Span
from tokenloom.cli.traces import Trace

BAR_CELLS = 32
NARROW_BAR_CELLS = 16
NARROW_COLUMNS = 120
DURATION_CHARS = 8
NOTES_CHARS_MIN = 8
GAP = "  "
PACKAGES = re.compile(r"/?\b(?:[a-z]\w*\.)+(?=[A-Z])")
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


def draw(trace: Trace, columns: int = NARROW_COLUMNS) -> RenderableType:
    """The whole picture, at most `columns` wide: a heading, the tree, and what is missing from it."""
    start, end = trace.start_ns, max(trace.end_ns, trace.start_ns + 1)
    cells = BAR_CELLS if columns >= NARROW_COLUMNS else NARROW_BAR_CELLS
    rows = [(_label(prefix, span), span) for prefix, span in walk(trace)]
    room = columns - cells - DURATION_CHARS - 3 * len(GAP)
    name_width = min(room, max((label.cell_len for label, _ in rows), default=0))
    lines: list[RenderableType] = [_heading(trace, end - start)]
    for label, span in rows:
        label.truncate(name_width, overflow="ellipsis", pad=True)
        line = label + Text(GAP + duration(span.end_ns - span.start_ns).rjust(DURATION_CHARS) + GAP)
        line += Text(bar(span, start, end, cells), _colour(span))
        if room - name_width >= NOTES_CHARS_MIN:
            about = Text(GAP + notes(span), "dim")
            about.truncate(room - name_width, overflow="ellipsis")
            line += about
        lines.append(line)
    if trace.missing_parents:
        lines.append(Text(f"{len(trace.missing_parents)} parent spans have not arrived", "yellow"))
    return Group(*lines)


def _heading(trace: Trace, took_ns: int) -> Text:
    heading = Text("trace ", "dim") + Text(trace.trace_id, "bold")
    return heading + Text(f"  {len(trace.spans)} spans, {duration(took_ns)}", "dim")


def _label(prefix: str, span: Span) -> Text:
    """The lines of the tree, the service and the span's name."""
    label = (
        Text(prefix, "dim") + Text(f"{span.service} ", f"bold {_colour(span)}") + Text(short_name(span.name))
    )
    return label + Text(" ✗", "bold red") if span.status == "error" else label


def _colour(span: Span) -> str:
    return COLOURS.get(span.service, "white")


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


def bar(span: Span, start_ns: int, end_ns: int, cells: int = BAR_CELLS) -> str:
    """Where the span lies between start and end; at least one cell long."""
    scale = cells / (end_ns - start_ns)
    first = min(cells - 1, int((span.start_ns - start_ns) * scale))
    last = max(first + 1, min(cells, round((span.end_ns - start_ns) * scale)))
    return "·" * first + "█" * (last - first) + "·" * (cells - last)


def short_name(name: str) -> str:
    """A span's name without the packages of its services: `POST InferenceService/Generate`."""
    return PACKAGES.sub("", name)


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
