"""A shape without weights, measured as people do it; and the script for a bare machine, run dry on a CPU."""

import gzip
import json

import msgspec
import pytest

from tests.integration.cli.test_bench import Cli
from tokenloom.bench import report as reports
from tools import gpu_bench

SMALL = ["--prompt-tokens", "24", "--output-tokens", "12", "--threads", "1", "--device", "cpu"]
SPEEDS = ["--memory-bandwidth", "1e10", "--flops", "1e11"]


@pytest.mark.parametrize("depth", ["1", "2"])
def test_a_shape_is_measured_beside_its_floor(tmp_path, depth):
    folder = tmp_path / "profile"
    asked = ["--batch", "1,3", "--waves", "1", "--repeats", "2", "--decode-only", "30", *SPEEDS]
    asked += ["--pipeline-depth", depth, "--profile", str(folder)]
    asked = ["bench", "engine", "--shape", "tiny", *SMALL, *asked, "--json", "-"]
    status, out, err = Cli(tmp_path).run(*asked)
    assert status == 0, err
    assert "× its floor of" in err
    found = reports.decode(out.encode())
    assert (found.model, found.engine["load_format"]) == ("tiny", "dummy")
    assert [level.max_concurrency for level in found.levels] == [1, 1, 3, 3]
    for level in found.levels:
        assert (level.completed, level.num_requests) == (level.max_concurrency, level.max_concurrency)
        # A further level of a batch has prompts of its own: none is found cached.
        assert level.total_cached_tokens == 0
        assert 0 < level.floor_s < level.duration_s
        floor = level.steps.decode_floor
        assert 0 < floor.step_ms < level.steps.decode_step_ms.p50
        assert set(floor.terms) == {"weights", "attention", "head", "activations"}
        only = level.steps.decode_only
        assert (only.batch, only.context) == (level.max_concurrency, 30)
        assert only.steps == 11
        assert only.floor.context == only.context_mean == 30
        assert only.parts_ms["compute"] > 0
    for name in ("prefill", "decode"):
        trace = json.loads(gzip.decompress((folder / f"{name}.json.gz").read_bytes()))
        assert any(event.get("cat") == "cpu_op" for event in trace["traceEvents"]), name
        assert "aten::" in (folder / f"{name}.txt").read_text()


def test_wrong_options_of_a_shape_are_one_line(tmp_path):
    said = {
        ("--shape", "nix"): "--shape must be one of llama-3-8b, tiny",
        ("--shape", "tiny", "--model-dir", "."): "give --shape, or a model, not both",
        ("--shape", "tiny", "--waves", "1", "--requests", "2"): "give --requests or --waves",
        ("--shape", "tiny", "--decode-only", "9"): "--decode-only must be from 64 to 128, not 9",
        ("--shape", "tiny", "--flops", "-1"): "--flops must be from 0",
    }
    for arguments, expected in said.items():
        status, _, err = Cli(tmp_path).run("bench", "engine", *arguments)
        assert status == 2, arguments
        assert expected in err, arguments


def test_every_part_of_the_script_for_a_bare_machine_runs_and_is_kept(tmp_path, capsys):
    out = tmp_path / "found" / "gpu.json"
    asked = ["--device", "cpu", "--shape", "tiny", "--batch", "2,1", "--prompt-tokens", "16"]
    asked += ["--output-tokens", "8", "--step-tokens-max", "64", "--repeats", "1", "--peer-repeats", "2"]
    asked += ["--families", "olmo2 and False"]
    asked += ["--parts", "exact,bench,profile,peer", "--out", str(out), "--engine", "--threads=1", *SPEEDS]
    assert gpu_bench.main(asked) == 0
    found = msgspec.json.decode(out.read_bytes(), type=gpu_bench.Found)
    assert [(part.name, part.status) for part in found.parts] == [
        ("exact", "passed"), ("bench", "passed"), ("profile", "passed"), ("peer", "passed"),
    ]  # fmt: skip
    exact, bench, _, peer = found.parts
    assert "1 passed" in exact.said
    for part, repeats in ((bench, 1), (peer, 2)):
        levels = [
            (level.max_concurrency, level.completed, level.total_output_tokens) for level in part.levels
        ]
        assert levels == [(2, 2, 16)] * repeats + [(1, 1, 8)] * repeats
        assert part.about["device"] == "cpu"
    assert bench.levels[0].steps.decode_only.context == 20
    assert (out.parent / "profile" / "decode.json.gz").is_file()
    shown = capsys.readouterr().out
    assert "aten::" in shown
    assert "× peer" in shown.splitlines()[-3]
