"""Which trace is the last one, when it is whole, and how it is drawn."""

import io
import time

import pytest
from rich.console import Console

from tokenloom.cli import traces, tracetree
from tokenloom.cli.spans import Span
from tokenloom.cli.traces import Trace

MS = 1_000_000


def span(name, service, span_id, parent="", start=0, end=1, trace_id="a" * 32, **more):
    """Times in milliseconds."""
    return Span(trace_id, span_id, parent, service, "", name, "internal", start * MS, end * MS, **more)


GENERATION = [
    span("POST /v1/chat/completions", "edge", "01", end=200, attributes={"guid:x-request-id": "r-1"}),
    span(
        "chat smollm2",
        "gateway",
        "02",
        "01",
        1,
        199,
        attributes={"gen_ai.request.model": "smollm2", "gen_ai.response.finish_reasons": ["stop"]},
    ),
    span("tokenise", "gateway", "03", "02", 2, 4),
    span("loom.worker.v1.WorkerService/Generate", "gateway", "04", "02", 5, 190),
    span("/loom.worker.v1.WorkerService/Generate", "mesh", "05", "04", 6, 189),
    span("queue", "batcher", "06", "05", 7, 60, attributes={"loom.position": 3}),
    span(
        "loom.worker.v1.WorkerService/Generate",
        "worker",
        "07",
        "05",
        62,
        188,
        status="error",
        message="cancelled by the caller",
    ),
]


def write(path, spans):
    path.write_bytes(b"".join(s.to_line() for s in spans))


def test_the_tree_is_drawn_with_bars_durations_and_what_matters():
    out = io.StringIO()
    Console(file=out, width=140, color_system=None).print(tracetree.draw(Trace("a" * 32, GENERATION), 140))
    drawn = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    assert drawn == GOLDEN


GOLDEN = f"""\
trace {"a" * 32}  7 spans, 200.0 ms
edge POST /v1/chat/completions               200.0 ms  ████████████████████████████████
└─ gateway chat smollm2                      198.0 ms  ████████████████████████████████  model=smollm2 finish=stop
   ├─ gateway tokenise                         2.0 ms  █·······························
   └─ gateway WorkerService/Generate         185.0 ms  ██████████████████████████████··
      └─ mesh WorkerService/Generate         183.0 ms  ██████████████████████████████··
         ├─ batcher queue                     53.0 ms  ·█████████······················  position=3
         └─ worker WorkerService/Generate ✗  126.0 ms  ·········█████████████████████··  cancelled by the caller"""  # noqa: E501


def test_spans_without_their_parent_are_drawn_as_roots_and_counted():
    trace = Trace("a" * 32, GENERATION[1:3])
    assert [prefix for prefix, _ in tracetree.walk(trace)] == ["", "└─ "]
    assert trace.missing_parents == {"01"}
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(tracetree.draw(trace))
    assert "1 parent spans have not arrived" in out.getvalue()


def test_a_loop_of_parents_is_not_followed_for_ever():
    looped = Trace("a" * 32, [span("x", "edge", "01", "02"), span("y", "edge", "02", "01")])
    assert list(tracetree.walk(looped)) == []


@pytest.mark.parametrize(
    ("nanoseconds", "shown"),
    [(850_000, "850 µs"), (12_340_000, "12.3 ms"), (1_204_000_000, "1.20 s"), (0, "0 µs")],
)
def test_durations_are_short(nanoseconds, shown):
    assert tracetree.duration(nanoseconds) == shown


def test_a_bar_has_at_least_one_cell_and_never_leaves_its_column():
    for start, end in ((0, 0), (1000, 1000), (999, 1000), (0, 1000)):
        drawn = tracetree.bar(span("x", "edge", "01", start=0, end=0, attributes={}), 0, 1000)
        assert len(drawn) == tracetree.BAR_CELLS
        inside = Span("a", "b", "", "edge", "", "x", "server", start, end)
        drawn = tracetree.bar(inside, 0, 1000)
        assert len(drawn) == tracetree.BAR_CELLS
        assert "█" in drawn


def test_a_generation_is_whole_when_everyone_has_reported_and_nothing_came_for_a_while():
    now = GENERATION[0].end_ns
    whole = Trace("a" * 32, GENERATION)
    assert traces.is_whole(whole, traces.SETTLE_S, now)
    assert not traces.is_whole(whole, traces.SETTLE_S / 2, now)
    for missing in ("01", "05"):
        rest = Trace("a" * 32, [s for s in GENERATION if s.span_id != missing])
        assert not traces.is_whole(rest, 9, now), missing
    without_batcher = Trace("a" * 32, [s for s in GENERATION if s.service != "batcher"])
    assert not traces.is_whole(without_batcher, 9, now)


def test_a_call_that_reached_no_worker_is_whole_without_one():
    listing = Trace(
        "a" * 32, [span("POST /x/ListModels", "edge", "01"), span("ListModels", "gateway", "02", "01")]
    )
    assert traces.is_whole(listing, traces.SETTLE_S, listing.end_ns)


def test_an_old_trace_is_not_waited_for():
    old = Trace("a" * 32, [s for s in GENERATION if s.service != "batcher"])
    assert traces.is_whole(old, 0, old.end_ns + int(20e9))


def test_the_last_trace_is_that_of_the_request_made_last():
    other = [span("POST /", "edge", "11", start=50, end=60, trace_id="b" * 32)]
    both = traces.group(GENERATION + other)
    assert traces.pick_last(both, None).trace_id == "b" * 32
    assert traces.pick_last(both, ("r-1", 0)).trace_id == "b" * 32
    later = traces.group([*GENERATION, span("POST /", "edge", "11", start=-9, end=0, trace_id="b" * 32)])
    assert traces.pick_last(later, ("r-1", 0)).trace_id == "a" * 32


def test_an_earlier_trace_is_not_taken_for_the_one_that_is_still_coming():
    arrived = traces.group(GENERATION)
    assert traces.pick_last(arrived, ("r-2", 100 * MS)) is None
    assert traces.pick_last({}, ("r-2", 100 * MS)) is None


def test_a_trace_is_found_by_the_beginning_of_its_id_or_by_its_request_also_in_the_older_file(tmp_path):
    path = tmp_path / "traces.jsonl"
    write(tmp_path / "traces.jsonl.1", GENERATION[:3])
    write(path, [*GENERATION[3:], span("x", "edge", "11", trace_id="b" * 32)])
    for wanted in ("a" * 6, "A" * 32, "r-1"):
        (found,) = traces.find(path, wanted)
        assert len(found.spans) == len(GENERATION), wanted
    assert traces.find(path, "aaa") == []
    assert traces.find(path, "absent") == []


def test_the_last_trace_is_awaited_and_given_as_it_is_in_the_end(tmp_path):
    path = tmp_path / "traces.jsonl"
    assert traces.await_last(path, None, wait_max_s=0.0) is None
    write(path, GENERATION[:2])
    began = time.monotonic()
    found = traces.await_last(path, ("r-1", 0), wait_max_s=0.0)
    assert len(found.spans) == 2
    assert time.monotonic() - began < 1


def test_the_request_made_last_is_noted(tmp_path):
    path = tmp_path / "deep" / "last.json"
    assert traces.read_last_request(path) is None
    traces.note_last_request(path, "r-1")
    request_id, made_ns = traces.read_last_request(path)
    assert request_id == "r-1"
    assert abs(made_ns - time.time_ns()) < 60e9


@pytest.mark.parametrize("columns", [60, 80, 119, 120, 200])
def test_no_line_of_the_drawing_is_wider_than_the_terminal(columns):
    out = io.StringIO()
    wide = Console(file=out, width=400, color_system=None)
    wide.print(tracetree.draw(Trace("a" * 32, GENERATION), columns))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(len(line) for line in lines) <= columns
    assert all(" ms  " in line for line in lines[1:])
