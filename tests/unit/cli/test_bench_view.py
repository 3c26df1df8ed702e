"""What a person is shown of a benchmark, and what is drawn of it."""

import sys

import pytest
from rich.console import Console

from tokenloom.bench import report as reports
from tokenloom.bench import words
from tokenloom.bench.stats import Objectives, Record, Run, Spread, Steps, level
from tokenloom.cli import bench_facts, bench_plot, bench_view
from tokenloom.cli.errors import CliError

ANY = Objectives()


def made(concurrency, objectives=ANY, error="", steps=None):
    first = Record(0.0, [0.0345, 0.5], 0.6, 10, 4, 2, 2)
    second = Record(0.0, [2.5, 2.6], 2.7, 10, 0, 2, 3, error)
    return level([first, second], Run(concurrency, held_back=1, cpu_s=0.01), objectives, steps)


def report(*levels, **more):
    return reports.Report(
        kind="mesh",
        target="http://127.0.0.1:1",
        model="m",
        protocol="grpc",
        seed=5,
        started_unix_s=0,
        workload={"prompt_tokens": 10},
        machine={"cpu": "a CPU", "cores": 2, "commit": "abc"},
        levels=list(levels),
        **more,
    )


def shown(renderable):
    console = Console(width=240, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(renderable)
        return console.export_text()


def test_the_table_has_a_row_for_each_load_with_units():
    text = shown(bench_view.table(report(made(1), made(8))))
    assert "m · grpc · http://127.0.0.1:1" in text
    head, *rows = [line for line in text.splitlines() if line.strip()][1:]
    assert [row.split()[0] for row in rows] == ["1", "8"]
    assert "TTFT p99" in head
    assert "1.27 s" in rows[0]  # the median of 34.5 ms and 2.5 s
    assert "goodput" not in head


def test_goodput_shows_only_when_it_was_asked_for():
    text = shown(bench_view.table(report(made(1, Objectives(ttft_ms=100)))))
    assert "goodput/s" in text
    assert "50%" in text


def test_what_went_wrong_is_said():
    said = "\n".join(bench_view.remarks(report(made(8, error="QUEUE_FULL"), made(9))))
    assert "8: 1 of 2 requests failed: QUEUE_FULL 1" in said
    assert "9: 1 answers are not as long as asked" in said
    assert "9: 1 requests waited for a place in flight" in said
    assert "seed 5; prompt_tokens 10" in said


def test_an_engines_steps_and_their_parts_are_said():
    steps = Steps(steps=3, step_ms=Spread(1, 1, 1, 2, 2), parts_ms={"attention": 0.5})
    said = "\n".join(words.steps_lines([made(1, steps=steps), made(2)]))
    assert "1: 3 steps" in said
    assert "attention 0.500 ms" in said
    assert "2:" not in said


def test_a_cached_prefix_is_said_with_its_ratio():
    spread = Spread(100, 100, 100, 100, 100)
    prefix = reports.Prefix(prefix_tokens=9, prompt_tokens=10, pairs=2, cold_ttft_ms=spread,
                            warm_ttft_ms=spread, cached_tokens_mean=8, ratio=0.153)  # fmt: skip
    assert "0.153 of the cold time" in bench_view.prefix_lines(prefix)[-1]


def test_the_machine_is_described():
    facts = bench_facts.machine()
    assert facts["cores"] >= 1
    assert set(facts["cpu_flags"]) | set(facts["cpu_flags_absent"]) == set(bench_facts.CPU_FLAGS)
    assert str(facts["commit"]) in bench_facts.brief(facts)


def test_without_matplotlib_a_plot_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CliError, match="pip install matplotlib"):
        bench_plot.check()


def test_plots_are_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    for name, drawn in {"cdf": report(made(1)), "levels": report(made(1), made(8))}.items():
        bench_plot.draw(drawn, tmp_path / f"{name}.png")
    levels = [made(1), made(8)]
    bench_plot.draw_levels({"a": levels, "b": levels}, "t", tmp_path / "two.png")
    bench_plot.draw_bars(["x"], {"a": [1.0], "b": [2.0]}, "t", "tokens/s", tmp_path / "bars.png", "")
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_a_plot_that_cannot_be_written_is_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(CliError, match="--plot"):
        bench_plot.draw(report(made(1)), tmp_path / "none" / "x.png")
    with pytest.raises(CliError, match="no levels"):
        bench_plot.draw(report(), tmp_path / "x.png")
