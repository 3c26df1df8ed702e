"""Finds one trace in the span file, and says whether all of it is there.

Spans arrive in any order and late: every process exports in batches. A trace counts as whole when its
root has ended, no span's parent is missing, and nothing came for `settle_s`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenloom.cli.spans import Span, from_line

WAIT_MAX_S = 10.0
"""How long `--last` waits for a trace to be whole."""
SETTLE_S = 0.8
"""Longer than the processes of a local mesh keep finished spans."""
POLL_S = 0.05
LAST_BYTES_MAX = 8 * 1024 * 1024
"""How far back `--last` looks."""
PREFIX_DIGITS_MIN = 6

SERVICES = frozenset({"edge", "gateway", "mesh", "batcher", "worker"})
"""Who takes part in one generation."""


@dataclass
class Trace:
    """The spans of one trace id that have arrived."""

    trace_id: str
    spans: list[Span] = field(default_factory=list)

    @property
    def roots(self) -> list[Span]:
        """Spans without a parent, oldest first; a whole trace of ours has one."""
        return sorted((s for s in self.spans if not s.parent_id), key=lambda s: s.start_ns)

    @property
    def missing_parents(self) -> set[str]:
        """Ids that spans name as their parent and that have not arrived."""
        here = {s.span_id for s in self.spans}
        return {s.parent_id for s in self.spans if s.parent_id} - here

    @property
    def start_ns(self) -> int:
        return min(s.start_ns for s in self.spans)

    @property
    def end_ns(self) -> int:
        return max(s.end_ns for s in self.spans)

    def is_connected(self) -> bool:
        """Whether its root has ended and every parent is there."""
        return bool(self.roots) and not self.missing_parents

    def carries(self, request_id: str) -> bool:
        """Whether any of its spans has this value as an attribute."""
        return any(request_id in s.attributes.values() for s in self.spans)

    def is_generation(self) -> bool:
        """Whether a worker took part, or is still expected to have."""
        return any(s.service == "mesh" for s in self.spans)


def group(spans: Iterable[Span]) -> dict[str, Trace]:
    """Spans by trace."""
    traces: dict[str, Trace] = {}
    for span in spans:
        traces.setdefault(span.trace_id, Trace(span.trace_id)).spans.append(span)
    return traces


def read_lines(path: Path, bytes_max: int | None = None) -> Iterator[bytes]:
    """The file's lines, or those of its last `bytes_max` bytes."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if bytes_max is not None and size > bytes_max:
                file.seek(size - bytes_max)
                file.readline()
            yield from file
    except FileNotFoundError:
        return


def read_recent(path: Path) -> dict[str, Trace]:
    """The latest traces."""
    older = path.with_name(path.name + ".1")
    lines = [*read_lines(older, LAST_BYTES_MAX // 8), *read_lines(path, LAST_BYTES_MAX)]
    return group(span for line in lines if (span := from_line(line)))


def find(path: Path, wanted: str) -> list[Trace]:
    """Traces whose id begins with `wanted`, or that carry it as a request id."""
    needles = (wanted.encode(), wanted.lower().encode())
    ids: set[str] = set()
    for file in (path.with_name(path.name + ".1"), path):
        for line in read_lines(file):
            found = any(needle in line for needle in needles)
            if found and (span := from_line(line)) and _matches(span, wanted):
                ids.add(span.trace_id)
    return [load(path, trace_id) for trace_id in sorted(ids)]


def load(path: Path, trace_id: str) -> Trace:
    """Every span of one trace id."""
    needle = trace_id.encode()
    trace = Trace(trace_id)
    for file in (path.with_name(path.name + ".1"), path):
        for line in read_lines(file):
            if needle in line and (span := from_line(line)) and span.trace_id == trace_id:
                trace.spans.append(span)
    return trace


def _matches(span: Span, wanted: str) -> bool:
    by_id = len(wanted) >= PREFIX_DIGITS_MIN and span.trace_id.startswith(wanted.lower())
    return by_id or wanted in span.attributes.values()


def pick_last(traces: Mapping[str, Trace], last_request: tuple[str, int] | None) -> Trace | None:
    """The trace of the request that began last.

    `last_request` is the id of the one that this user's `generate` made, and when (epoch ns): its
    trace is the last one, unless another began after it. None while it has not arrived.
    """
    rooted = [t for t in traces.values() if t.roots]
    newest = max(rooted, key=lambda t: t.roots[-1].start_ns, default=None)
    if last_request is None:
        return newest
    request_id, made_ns = last_request
    own = next((t for t in rooted if t.carries(request_id)), None)
    if newest is None or own is None:
        return newest if newest is not None and newest.roots[-1].start_ns > made_ns else None
    return newest if newest.roots[-1].start_ns > own.roots[-1].start_ns else own


def read_last_request(path: Path) -> tuple[str, int] | None:
    """What `generate` noted: the request's id and when it was made (epoch ns)."""
    try:
        noted = json.loads(path.read_text())
        return str(noted["request_id"]), int(noted["unix_ns"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_last_request(path: Path, request_id: str) -> None:
    """Note a request for `trace --last`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"request_id": request_id, "unix_ns": time.time_ns()}))


def await_last(
    path: Path, last_request: tuple[str, int] | None, wait_max_s: float = WAIT_MAX_S
) -> Trace | None:
    """The last trace, once it is whole; what there is of it after `wait_max_s`."""
    end_s = time.monotonic() + wait_max_s
    seen, since_s = -1, time.monotonic()
    while True:
        now_s = time.monotonic()
        trace = pick_last(read_recent(path), last_request)
        count = len(trace.spans) if trace else 0
        if count != seen:
            seen, since_s = count, now_s
        if trace is not None and is_whole(trace, now_s - since_s, time.time_ns()):
            return trace
        if now_s >= end_s:
            return trace or pick_last(read_recent(path), None)
        time.sleep(POLL_S)


def is_whole(trace: Trace, quiet_s: float, now_ns: int) -> bool:
    """Whether nothing more is to be expected. `quiet_s`: how long nothing came."""
    if not trace.is_connected():
        return False
    old = (now_ns - trace.end_ns) / 1e9 > WAIT_MAX_S
    if old:
        return True
    complete = not trace.is_generation() or {s.service for s in trace.spans} >= SERVICES
    return complete and quiet_s >= SETTLE_S
