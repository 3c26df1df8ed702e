"""Which steps are recorded, and the table of what was."""

import pytest

from services.worker.bench import profile
from services.worker.bench.drive import Driver
from services.worker.bench.profile import DECODE_STEPS_MAX, PREFILL_STEPS_MAX, ROWS_MAX, Recorder, Row
from tests.unit.bench.test_drive import Clock, FakeEngine
from tokenloom.bench import prompts, workload
from tokenloom.bench.workload import Lengths


@pytest.fixture
def recorded(monkeypatch):
    """(name, steps) of every recording that was written."""
    found = []

    class Fake:
        def __init__(self, name, steps_max, device):
            self.name, self.steps_max, self.steps = name, steps_max, 0

        def write(self, folder):
            found.append((self.name, self.steps))
            return [folder / self.name]

    monkeypatch.setattr(profile, "_Recording", Fake)
    return found


def run(folder, batch, lengths):
    clock = Clock()
    recorder = Recorder(FakeEngine(clock), folder, batch, "cpu")
    driver = Driver(recorder, lambda item, seed: prompts.token_ids(item, seed, 1000), clock)
    driver.run(workload.fixed("request", batch, lengths), batch, 1)
    recorder.close()
    return recorder


def test_prompts_and_full_decodes_are_recorded_apart_and_not_too_many(recorded, tmp_path):
    recorder = run(tmp_path, 12, Lengths(5, 60))
    assert recorded == [("prefill", PREFILL_STEPS_MAX), ("decode", DECODE_STEPS_MAX)]
    assert [path.name for path in recorder.written] == ["prefill", "decode"]


def test_the_first_recording_ends_with_the_prompts(recorded, tmp_path):
    run(tmp_path, 2, Lengths(5, 60))
    # Two prompts, and the decode step by which their end is seen.
    assert recorded == [("prefill", 3), ("decode", DECODE_STEPS_MAX)]


def test_a_level_that_ends_early_leaves_what_there_is(recorded, tmp_path):
    run(tmp_path, 2, Lengths(5, 6))
    assert recorded == [("prefill", 3), ("decode", 4)]


def test_answers_are_long_enough_for_the_last_prompt_to_be_seen_decoding(tmp_path):
    recorder = Recorder(FakeEngine(Clock()), tmp_path, 256, "cpu")
    # 256 of the 512 tokens of a step are left for prompts: 128 steps until all have begun.
    assert recorder.answer_tokens(128, 512) > 128 + DECODE_STEPS_MAX
    assert recorder.answer_tokens(128, 256) > 256 * 128


def test_the_table_has_shares_and_bounds_its_rows():
    rows = [Row(f"kernel-{number}" + "x" * 300, 4, 100.0 - number) for number in range(ROWS_MAX + 5)]
    head, titles, first, *_, last = profile.table("decode", rows, 2, 10_000.0).splitlines()
    assert head.startswith("decode: 2 steps in 10000.00 ms (5000.000 ms each")
    assert "calls a step" in titles
    total = sum(row.ms for row in rows)
    assert first.split()[:3] == [f"{100 / total:.1%}", "50.0000", "2.0"]
    assert len(first) < 160
    assert last.endswith("5 others")
    assert f"{total / 10_000:.1%}" in head


def test_a_table_of_nothing_is_a_table():
    assert "0.0%" in profile.table("prefill", [], 0, 1.0)


def test_decoding_is_recorded_only_once_the_batch_is_full(recorded, tmp_path):
    # Prompts of one token look like decodes, but of one sequence each.
    run(tmp_path, 3, Lengths(1, 4))
    assert recorded == [("prefill", 1), ("decode", 2)]
