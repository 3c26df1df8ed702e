"""`status --watch`: what a frame says, on any width, and how the command begins and ends."""

import io
import json
import time

import pytest
from loom.batcher.v1 import batcher_pb2 as pb
from rich.cells import cell_len
from rich.console import Console

from tests.unit.cli.states import BEGAN_MS, busy, state, tenant
from tests.unit.cli.test_commands import run
from tokenloom.cli import watch
from tokenloom.cli.errors import CliError
from tokenloom.cli.state import READY, Mesh, Process
from tokenloom.cli.watch_history import SAMPLE_MS, SAMPLES_MAX, History
from tokenloom.cli.watch_view import frame, summary


def watched(*states):
    history = History(states[0])
    for each in states[1:]:
        history.add(each)
    return history


def lines(history, width=140, rows_max=10):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(
        frame("batcher", history, width=width, rows_max=rows_max)
    )
    return [line.rstrip() for line in out.getvalue().splitlines()]


def cells(history, title, **options):
    """The rows of the table whose first column has this title, split at two blanks or more."""
    shown = lines(history, **options)
    first = next(number for number, line in enumerate(shown) if line.startswith(title))
    rows = shown[first:]
    end = rows.index("") if "" in rows else len(rows)
    return [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows[1:end]]


def test_a_frame_begins_with_the_replica_in_a_line_and_what_it_counted():
    clock = time.strftime("%H:%M:%S", time.localtime(BEGAN_MS / 1000 + 2))
    head, counters, refusals, *_ = lines(watched(busy(0), busy(2, k=2)), width=120)
    waiting = "12 waiting (interactive 2, batch 10; the oldest for 3.5 s)"
    assert head == f"batcher  {clock}  {waiting}  16 running  1 of 2 workers alive"
    done = "arrived 200 (50.0/s)  dispatched 160 (40.0/s)  completed 140 (35.0/s)"
    assert counters == f"{done}  cancelled 0  served elsewhere 0  promoted 0"
    assert refusals == "refused QUEUE_FULL 6 (1.5/s)"


def test_a_queue_is_shown_as_a_whole_and_by_band_the_most_urgent_first():
    assert cells(watched(busy()), "queue") == [
        ["abababababab", "all", "12", "3.5 s", "12,345", "16", "12.5"],
        ["interactive", "2", "120 ms"],
        ["batch", "10", "3.5 s"],
    ]


def test_who_waits_is_shown_with_the_account_that_decides_whose_turn_it_is():
    # Tenants come in two tables; the first one is of those who wait.
    assert cells(watched(busy()), "tenant") == [
        ["acme", "batch", "10", "2", "900"],
        ["zeta", "interactive", "2", "1", "7"],
    ]


def test_tenants_show_their_share_of_service_beside_that_of_weight():
    history = watched(busy(0), busy(2, k=2))
    history.state.queues[0].ClearField("flows")
    assert cells(history, "tenant") == [
        ["acme", "2", "10", "15", "200", "400", "100", "400", "67%", "67%"],
        ["zeta", "1", "2", "1", "100", "200", "0", "200", "33%", "33%"],
    ]


def test_tenants_with_work_come_before_those_that_were_served_more():
    tenants = [tenant("idle", prompt=9), tenant("b", queued=1), tenant("a", prompt=1, running=1)]
    assert [row[0] for row in cells(watched(state(tenants=tenants)), "tenant")] == ["a", "b", "idle"]


def test_workers_show_load_cache_speeds_and_the_age_of_their_report():
    alive, lost = cells(watched(busy()), "worker")
    assert alive == [
        "127.0.0.1:21001", "ready", "7/1", "3", "█████░░░ 62%",
        "2,048", "5,123", "850", "420 ms", "62%", "77", "16", "12 ms",
    ]  # fmt: skip
    assert lost == ["127.0.0.1:21002", "lost", *["–"] * 9, "0", "–"]


def test_a_worker_with_several_models_has_a_line_for_each():
    worker = pb.Worker(endpoint="w:1", alive=True, report_age_ms=5)
    worker.models.add(model_version="sha256:" + "1" * 64, state="ready")
    worker.models.add(model_version="sha256:" + "2" * 64, state="loading")
    rows = cells(watched(state(workers=[worker])), "worker")
    assert [row[:2] for row in rows] == [["w:1 111111111111", "ready"], ["w:1 222222222222", "loading"]]


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        (pb.Worker(alive=True), "empty"),
        (pb.Worker(alive=True, draining=True), "draining"),
        (pb.Worker(alive=False, report_age_ms=900), "stale"),
        (pb.Worker(alive=False), "lost"),
    ],
)
def test_a_worker_that_cannot_be_chosen_says_why(worker, said):
    worker.endpoint = "w:1"
    assert cells(watched(state(workers=[worker])), "worker")[0][1] == said


def test_of_the_leases_the_oldest_are_shown_and_the_others_counted():
    shown = lines(watched(busy()))
    assert shown[-3:] == [
        "oldest leases  tenant  worker              age",
        "req-1          acme    127.0.0.1:21001  12.3 s",
        "and 15 more",
    ]


def test_rows_beyond_the_bound_are_counted():
    tenants = [tenant(f"t{number}", queued=1) for number in range(9)]
    shown = lines(watched(state(tenants=tenants)), rows_max=4)
    assert [line.split()[0] for line in shown[-5:]] == ["t0", "t1", "t2", "t3", "and"]
    assert shown[-1] == "and 5 more"


@pytest.mark.parametrize("width", [140, 100, 80, 60, 40])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_lost(width):
    shown = lines(watched(busy(0), busy(2, k=2)), width=width)
    assert max(cell_len(line) for line in shown) <= width
    text = " ".join(" ".join(shown).split())
    for figure in ("12,345", "█████░░░ 62%", "5,123", "420 ms", "200", "67%", "12.3 s", "QUEUE_FULL 6"):
        assert figure in text


def test_a_replica_in_one_line():
    assert summary(state()) == "0 waiting, 0 running, 0 of 0 workers alive"
    waiting = "12 waiting (interactive 2, batch 10; the oldest for 3.5 s)"
    assert summary(busy()) == f"{waiting}, 16 running, 1 of 2 workers alive"


def test_a_replica_that_takes_nothing_new_says_so():
    assert "draining" in lines(watched(state(draining=True)))[0]
    assert "draining" not in lines(watched(state()))[0]


# Rates and shares.


def test_the_first_state_has_no_rates_and_shares_since_the_start():
    history = watched(busy(0))
    assert history.rate(lambda seen: seen.counters.arrived) is None
    assert history.tokens_per_s(history.state.tenants[0]) is None
    assert history.shares()["acme"].of_service == pytest.approx(2 / 3)


def test_shares_are_of_what_was_served_while_it_was_watched_and_of_those_who_take_part():
    old = tenant("old", prompt=1000)
    first = [old, tenant("a", prompt=10, weight=3, running=1), tenant("b", queued=1)]
    later = [old, tenant("a", prompt=40, weight=3, running=1), tenant("b", generated=5)]
    shares = watched(state(0, tenants=first), state(1, tenants=later)).shares()
    # A generated token counts twice, as in the fair order.
    assert shares["a"] == pytest.approx((0.75, 0.75))
    assert shares["b"] == pytest.approx((0.25, 0.25))
    assert shares["old"] == (0, None)


def two(after_s, a, b):
    return state(after_s, tenants=[tenant("a", prompt=a), tenant("b", prompt=b)])


def test_shares_forget_what_is_half_a_minute_old():
    window_s = (SAMPLES_MAX - 1) * SAMPLE_MS // 1000
    states = [two(0, 0, 0), two(1, 9, 0), *(two(second, 9, second) for second in range(2, window_s + 3))]
    assert watched(*states[:5]).shares()["a"].of_service > 0.5
    assert watched(*states).shares()["a"].of_service == 0


def test_frames_that_come_faster_than_samples_do_not_shorten_what_shares_are_of():
    states = [two(0, 0, 0), *(two(number / 50, 100, number) for number in range(1, 101))]
    assert watched(*states).shares()["a"].of_service == pytest.approx(0.5)


def test_a_replica_that_was_started_again_has_no_rates():
    history = watched(busy(0, k=5), busy(1, k=6), busy(2, k=1))
    assert history.rate(lambda seen: seen.counters.arrived) is None
    history.add(busy(3, k=2))
    assert history.rate(lambda seen: seen.counters.arrived) == 100


# The command.

MESH = Mesh(
    launcher_pid=1,
    address="127.0.0.1:8080",
    engine="sim",
    models=["sim"],
    otlp="",
    started_unix_ms=0,
    processes=[
        Process("worker-0", 2, {"grpc": 1, "metrics": 2}, READY),
        Process("batcher", 3, {"grpc": 3, "metrics": 4}, READY),
        Process("batcher-1", 4, {"grpc": 5, "metrics": 6}, READY),
    ],
)


def test_all_replicas_are_watched_or_the_one_that_is_named_by_its_number():
    assert [each.name for each in watch.chosen(MESH, None)] == ["batcher", "batcher-1"]
    assert [each.name for each in watch.chosen(MESH, 1)] == ["batcher-1"]
    with pytest.raises(CliError, match="numbered 0 to 1"):
        watch.chosen(MESH, 2)


def test_json_lines_have_every_field_under_its_own_name_with_numbers_as_numbers(capsys):
    with watch.Lines() as view:
        view.tell("batcher", busy(0))
        view.tell("batcher", busy(1, k=2))
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["replica"] == "batcher"
    assert second["state"]["counters"]["arrived"] == 200
    assert first["state"]["unix_ms"] == BEGAN_MS
    assert first["state"]["draining"] is False
    assert first["state"]["queues"][0]["depth_by_priority"] == {"interactive": 2, "batch": 10}
    assert first["state"]["queues"][0]["flows"][1]["priority"] == "PRIORITY_INTERACTIVE"
    assert first["state"]["counters"]["refused"] == {"QUEUE_FULL": 3}
    assert first["state"].keys() == {field.name for field in pb.State.DESCRIPTOR.fields}


def test_without_a_terminal_frames_follow_each_other_as_plain_text():
    out = io.StringIO()
    with watch.Pages(Console(file=out, width=100)) as view:
        view.tell("batcher", busy(0))
        view.tell("batcher", busy(2, k=2))
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().count("12 waiting") == 2
    assert "arrived 200 (50.0/s)" in out.getvalue()


def test_on_a_terminal_the_last_frame_stays_when_it_ends():
    out = io.StringIO()
    terminal = {"force_terminal": True, "color_system": None, "_environ": {"TERM": "xterm"}}
    with watch.Screen(Console(file=out, width=100, height=60, **terminal)) as view:
        view.tell("batcher", busy(0))
        view.tell("batcher-1", busy(0))
        view.tell("batcher", busy(2, k=2))
    begin, end = "\x1b[?1049h", "\x1b[?1049l"
    assert out.getvalue().startswith(begin)
    left = out.getvalue().split(end)[1]
    assert "arrived 200 (50.0/s)" in left
    assert "batcher-1" in left


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    return tmp_path


def test_without_a_mesh_the_cure_is_named(home):
    for more in ([], ["--json"]):
        status, out, err = run("status", "--watch", *more)
        assert (status, out) == (1, "")
        assert "no mesh is running: start one with `tokenloom up`" in err


@pytest.mark.parametrize("options", [["--interval", "2"], ["--replica", "0"]])
def test_options_of_watching_alone_are_refused(home, options):
    status, out, err = run("status", *options)
    assert (status, out) == (2, "")
    assert "go with --watch" in err


@pytest.mark.parametrize("interval", ["0", "61", "soon"])
def test_an_interval_out_of_bounds_is_refused_by_name(home, interval):
    status, _, err = run("status", "--watch", "--interval", interval)
    assert status == 2
    assert "--interval" in err
