"""The benches as people type them: on a mesh of sim workers, and on the engine with a tiny random model."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from tokenloom.bench import lines
from tokenloom.bench import report as reports
from tokenloom.cli import envoy
from tokenloom.cli.errors import CliError
from tokenloom.cli.main import app
from tokenloom.cli.ports import free_ports

WAIT_S = 180.0
CONTEXT = 256
TINY = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
}


class Cli:
    """The command in this process, with a home of its own; a mesh is started as people start it."""

    def __init__(self, home: Path) -> None:
        self._env = {"TOKENLOOM_HOME": str(home), "COLUMNS": "250"}

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, output and error output."""
        done = CliRunner().invoke(app, arguments, env=self._env)
        if isinstance(done.exception, CliError):
            return done.exception.status, done.stdout, f"{done.stderr}{done.exception}\n"
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    def spawn(self, *arguments: str) -> tuple[int, str]:
        """Status and error output of a process: for `up` and `down`, and where logging is set up."""
        paths = os.pathsep.join([str(envoy.ROOT), str(envoy.ROOT / "gen")])
        env = dict(os.environ, PYTHONPATH=paths) | self._env
        command = [sys.executable, "-m", "tokenloom.cli", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=WAIT_S, check=False)
        return done.returncode, done.stderr

    def report(self, *arguments: str) -> reports.Report:
        """The report of a bench that must succeed."""
        status, out, err = self.run("bench", *arguments, "--json", "-")
        assert status == 0, err
        return reports.decode(out.encode())


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    made = Cli(tmp_path_factory.mktemp("home"))
    (port,) = free_ports(1, random.Random())
    try:
        assert made.spawn("up", "--detach", "--engine", "sim", "--port", str(port)) == (0, "")
        yield made
    finally:
        made.spawn("down")


@pytest.mark.parametrize(
    "how", [[], ["--endpoint", "completions"], ["--protocol", "grpc"]], ids=["chat", "completions", "grpc"]
)
def test_a_closed_loop_measures_every_level_with_the_asked_lengths(cli, how):
    lengths = ["--prompt-tokens", "150", "--output-tokens", "9"]
    found = cli.report("mesh", "--concurrency", "1,5", "--requests", "10", *lengths, *how)
    assert [level.max_concurrency for level in found.levels] == [1, 5]
    for level in found.levels:
        assert (level.completed, level.failed, level.other_length) == (10, 0, 0)
        assert level.total_output_tokens == 90
        # A token is a byte here, so the drawn words decide; template included, it is what was asked.
        assert abs(level.total_input_tokens / 10 - 150) < 15
        assert 0 < level.ttft_ms.p50 <= level.ttft_ms.p99 <= level.e2el_ms.max
        assert level.client_cpu_s > 0
        assert 0 < level.chunks_per_token <= 1
    assert found.levels[1].output_throughput > found.levels[0].output_throughput


def test_an_open_loop_and_a_trace_are_driven_at_their_times(cli, tmp_path):
    found = cli.report(
        "mesh", "--rate", "50", "--requests", "20", "--output-tokens", "2", "--slo-ttft-ms", "1e6"
    )
    (level,) = found.levels
    assert (level.request_rate, level.completed, level.good_share) == (50, 20, 1)
    requests = [
        {"timestamp": 1000 * n, "input_length": 900, "output_length": 30, "hash_ids": [1, n]}
        for n in (1, 2, 3)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, requests)))
    fitted = ["--rate-scale", "10", "--length-scale", "0.2"]
    (level,) = cli.report("mesh", "--trace", str(trace), *fitted).levels
    assert (level.completed, level.total_output_tokens) == (3, 18)
    assert level.request_rate == pytest.approx(10)
    assert level.duration_s >= 0.2


def test_people_get_a_table_and_files(cli, tmp_path):
    path = tmp_path / "r.json"
    status, out, err = cli.run(
        "bench", "mesh", "--requests", "3", "--output-tokens", "2", "--json", str(path)
    )
    assert status == 0
    assert "TTFT p50" in out
    assert "1: " in err  # progress
    assert reports.decode(path.read_bytes()).levels[0].completed == 3


def test_what_cannot_be_measured_is_one_line(cli, tmp_path):
    (port,) = free_ports(1, random.Random())
    said = {
        ("mesh", "--address", f"127.0.0.1:{port}"): "start a mesh with `tokenloom up`",
        ("mesh", "--address", f"127.0.0.1:{port}", "--protocol", "grpc"): "start a mesh with `tokenloom up`",
        ("mesh", "--model", "nix"): "there are: sim",
        ("mesh", "--model", "nix", "--protocol", "grpc"): "there are: sim",
        ("mesh", "--concurrency", "1", "--rate", "2"): "--concurrency or --rate",
        ("mesh", "--prompt-tokens", "1"): "the shortest prompt of this model",
        ("engine", "--model-dir", str(tmp_path)): "no config.json",
        ("engine", "--model", "a", "--model-dir", "b"): "not both",
    }
    for arguments, expected in said.items():
        status, _, err = cli.run("bench", *arguments)
        assert status in (1, 2), arguments
        assert expected in err, arguments
        assert len(err.strip().splitlines()) == 1, err
    status, err = cli.spawn("bench", "engine", "--model", "nix")
    assert status == 1
    assert "MODEL_NOT_FOUND" in err


def test_a_bench_without_any_answer_fails_and_says_why(cli):
    status, out, err = cli.run("bench", "mesh", "--output-tokens", "999999")
    assert status == 1
    assert "no request was answered: CONTEXT_LENGTH_EXCEEDED" in err
    assert "16 of 16 requests failed" in out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(1)
    config = AutoConfig.for_model("llama", **TINY)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_engine_alone_is_measured_level_after_level(tmp_path, tiny, depth):
    lengths = [
        "--pipeline-depth",
        str(depth),
        "--prompt-tokens",
        "40",
        "--output-tokens",
        "6",
        "--threads",
        "1",
    ]
    found = Cli(tmp_path).report("engine", "--model-dir", tiny, "--batch", "1,4", "--requests", "8", *lengths)
    assert found.kind == "engine"
    assert (found.engine["dtype"], found.engine["threads"]) == ("float32", 1)
    assert found.engine["pipeline_depth"] == depth
    for level, batch in zip(found.levels, (1, 4), strict=True):
        assert level.max_concurrency == batch
        assert (level.completed, level.total_input_tokens, level.total_output_tokens) == (8, 320, 48)
        # Distinct prompts: nothing of one is found cached for another.
        assert level.total_cached_tokens == 0
        assert level.steps.steps > 0
        assert level.steps.prefill_tokens_per_s > 0
        assert level.steps.parts_ms["compute"] > 0


def test_cold_and_cached_prompts_of_the_engine_are_compared(tmp_path, tiny):
    lengths = ["--prompt-tokens", "8", "--output-tokens", "2", "--threads", "1", "--requests", "2"]
    found = Cli(tmp_path).report("engine", "--model-dir", tiny, "--prefix-cached", "96", *lengths)
    assert (found.prefix.prefix_tokens, found.prefix.prompt_tokens, found.prefix.pairs) == (96, 104, 2)
    assert found.prefix.cached_tokens_mean == 96
    assert found.prefix.ratio > 0


def test_prompts_that_do_not_fit_are_named_and_text_needs_a_tokenizer(tmp_path, tiny):
    cli = Cli(tmp_path)
    long = ["--prompt-tokens", str(CONTEXT), "--requests", "2"]
    status, _, err = cli.run("bench", "engine", "--model-dir", tiny, *long)
    assert status == 1
    assert "no request was answered: PROMPT_AND_OUTPUT_FILL_THE_CONTEXT" in err
    status, _, err = cli.run("bench", "engine", "--model-dir", tiny, "--prompts", "chat")
    assert status == 1
    assert "needs the model's tokenizer" in err


def test_the_peer_in_process_is_asked_the_same_and_answers_in_full(tiny):
    command = [sys.executable, "-m", "services.worker.bench.peer", "--model-dir", tiny, "--batch", "2"]
    command += ["--requests", "3", "--prompt-tokens", "20", "--output-tokens", "4", "--threads", "1"]
    done = subprocess.run(
        command, cwd=envoy.ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    told = [lines.decode(line) for line in done.stdout.splitlines()]
    (measured,) = [line for line in told if isinstance(line, lines.Measured)]
    level = measured.level
    assert (level.completed, level.other_length, level.total_input_tokens) == (3, 0, 60)
    assert level.total_output_tokens == 12
    assert level.ttft_ms.p50 > 0
