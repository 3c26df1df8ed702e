"""The grid of measured steps, and sequences that a scheduler takes for half computed."""

import pytest

from services.worker.bench.calibrate import parse
from services.worker.bench.calibrate_fit import Work
from services.worker.bench.calibrate_grid import AT_ONCE, WARM_UPS, Grid, Point
from services.worker.bench.calibrate_steps import Placed, work_of
from services.worker.core.plan import Verdict
from tests.unit.worker_core.made import limits, planned, sequence, step

STEPS = 12


def placed(scheduler, name, prompt, pending, new):
    scheduler.place(name, pending)
    assert scheduler.add(sequence(name, prompt, new), 0) is Verdict.ACCEPTED


@pytest.fixture
def scheduler():
    return Placed(limits(total_blocks=40, sequences_max=6, step_tokens_max=20, context_length=100))


def test_a_placed_sequence_computes_only_its_last_tokens(scheduler):
    placed(scheduler, "a", 30, 5, 4)
    plan, advances = step(scheduler)
    assert planned(plan) == [("a", 25, 5)]
    assert [advance.index for advance in advances] == [0]
    plan, _ = step(scheduler)
    assert planned(plan) == [("a", 30, 1)]


def test_decodes_go_on_beside_one_prompt_a_step(scheduler):
    scheduler.bound(2 + 6)
    for name in ("a", "b"):
        placed(scheduler, name, 20, 1, 50)
    for name in ("p", "q", "r"):
        placed(scheduler, name, 9 + 6, 6, 1)
    plans = [step(scheduler)[0] for _ in range(3)]
    assert planned(plans[1]) == [("a", 20, 1), ("b", 20, 1), ("q", 9, 6)]
    assert planned(plans[2]) == [("a", 21, 1), ("b", 21, 1), ("r", 9, 6)]
    assert list(scheduler.settled)[1:] == [
        Work(tokens=8, kv_tokens=42, pairs=6 * (9 + 3), sequences=3),
        Work(tokens=8, kv_tokens=44, pairs=6 * (9 + 3), sequences=3),
    ]


def test_a_plan_made_before_the_last_was_settled_holds_the_next_prompt(scheduler):
    scheduler.bound(6)
    for name in ("p", "q", "r"):
        placed(scheduler, name, 15, 6, 1)
    first, second = scheduler.plan(0), scheduler.plan(0)
    assert [planned(plan) for plan in (first, second)] == [[("p", 9, 6)], [("q", 9, 6)]]
    scheduler.settle(first, [1], 1)
    assert planned(scheduler.plan(0)) == [("r", 9, 6)]
    assert work_of(first).tokens == 6


def test_other_sequences_are_computed_whole(scheduler):
    scheduler.add(sequence("warm-up", 7), 0)
    assert planned(scheduler.plan(0)) == [("warm-up", 0, 7)]


def test_every_combination_of_the_grid_is_one_point():
    found = Grid((1, 2), (10, 20), (5,), (0, 9), Point(decodes=3, context=7), (4, 6)).points()
    assert found == [
        Point(1, 10), Point(1, 20), Point(2, 10), Point(2, 20),
        Point(0, 0, 5, 0), Point(0, 0, 5, 9),
        Point(3, 7, 4, 0), Point(3, 7, 6, 0),
    ]  # fmt: skip
    assert [point.kind for point in found] == ["decode"] * 4 + ["prefill"] * 2 + ["mixed"] * 2


def test_only_what_the_engine_holds_without_pre_emption_is_measured():
    decodes = Point(decodes=4, context=32)
    length = 32 + STEPS + WARM_UPS
    enough = {"total_blocks": 4 * (length // 4 + 1), "context_length": length + 1}
    assert decodes.fits(limits(**enough), STEPS)
    for less in (
        {"total_blocks": enough["total_blocks"] - 1},
        {"context_length": length},
        {"sequences_max": 3},
        {"step_tokens_max": 3, "sequences_max": 3},
    ):
        assert not decodes.fits(limits(**(enough | less)), STEPS), less
    chunk = Point(chunk=16, before=16)
    assert chunk.fits(limits(total_blocks=AT_ONCE * 10, context_length=34), STEPS)
    assert not chunk.fits(limits(total_blocks=AT_ONCE * 10 - 1, context_length=34), STEPS)
    assert not chunk.fits(limits(total_blocks=99, context_length=34, step_tokens_max=15), STEPS)
    assert not chunk.fits(limits(total_blocks=99, context_length=33), STEPS)


def test_the_command_line_makes_the_grid_and_is_noted(tmp_path):
    out = str(tmp_path / "x.json")
    asked = ["--shape", "tiny", "--out", out, "--batches", "1,2", "--contexts", "", "--mixed-chunks", "8"]
    found = parse([*asked, "--chunks", "64", "--before", "0", "--mixed-decodes", "3", "--mixed-context", "9"])
    assert found.points == [Point(chunk=64), Point(3, 9, 8)]
    assert found.config.load_format == "dummy"
    assert not found.config.prefix_cache
    assert found.command.startswith("python -m services.worker.bench.calibrate --shape tiny")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--batches", "-1"], "--batches"),
        (["--contexts", "0"], "--contexts"),
        (["--chunks", "a"], "--chunks"),
        (["--shape", "nix"], "--shape"),
        (["--mixed-decodes", "0"], "--mixed-decodes"),
        (["--before", ",".join("1" * 65)], "--before"),
    ],
)
def test_wrong_options_are_named(wrong, named, capsys):
    with pytest.raises(SystemExit):
        parse(["--shape", "tiny", "--out", "x.json", *wrong])
    assert named in capsys.readouterr().err
