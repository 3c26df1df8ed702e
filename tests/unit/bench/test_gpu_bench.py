"""The script for a bare machine: what it makes of parts that fail, hang or are not there."""

import os
import signal
import subprocess
import sys

import msgspec
import pytest

from services.worker.bench import floor
from tests.unit.bench.test_floor import PLAIN, SMALL, level
from tokenloom.bench import lines
from tokenloom.bench.stats import Spread, Steps
from tools import gpu_bench
from tools.gpu_bench import Found, Part

LEVEL = level(None)


def stand_in(monkeypatch, code, name="bench"):
    monkeypatch.setitem(gpu_bench.COMMANDS, name, lambda options: [sys.executable, "-c", code])


def found(out):
    return msgspec.json.decode(out.read_bytes(), type=Found).parts


def test_a_part_that_fails_says_why_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    stand_in(monkeypatch, "import sys; print('before'); sys.exit('broken')")
    stand_in(monkeypatch, f"print({lines.encode(lines.Measured(LEVEL))!r})", "peer")
    out = tmp_path / "x.json"
    assert gpu_bench.main(["--parts", "bench,peer", "--out", str(out)]) == 1
    bench, peer = found(out)
    assert (bench.status, bench.said) == ("failed", "before\nbroken")
    assert (peer.status, peer.levels) == ("passed", [LEVEL])
    assert "broken" in capsys.readouterr().out


def test_a_failure_that_is_told_is_a_failure(monkeypatch, tmp_path):
    stand_in(monkeypatch, f"print({lines.encode(lines.Failed('no room'))!r})")
    assert gpu_bench.main(["--parts", "bench", "--out", str(tmp_path / "x.json")]) == 1
    assert found(tmp_path / "x.json")[0].said.startswith("no room")


def test_a_part_over_its_time_is_ended_and_keeps_its_levels(monkeypatch, tmp_path):
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    level_line = lines.encode(lines.Measured(LEVEL))
    stand_in(monkeypatch, f"print({level_line!r}, flush=True); open({str(ready)!r}, 'w').close(); input()")
    ended = []

    class Late(subprocess.Popen):
        """Its time is up as soon as it has said something."""

        def wait(self, timeout=None):
            if timeout == 7.0:
                ready.read_bytes()
                raise subprocess.TimeoutExpired(self.args, timeout)
            ended.append(self)
            return super().wait(timeout)

    monkeypatch.setattr(gpu_bench.subprocess, "Popen", Late)
    monkeypatch.setattr(gpu_bench.subprocess, "DEVNULL", subprocess.PIPE)  # nobody answers `input`
    assert (
        gpu_bench.main(["--parts", "bench", "--limit-s", "bench=7", "--out", str(tmp_path / "x.json")]) == 1
    )
    (part,) = found(tmp_path / "x.json")
    assert (part.status, part.levels) == ("too long", [LEVEL])
    assert ended[0].returncode == -signal.SIGTERM
    ended[0].stdin.close()


def test_a_part_that_is_not_there_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_bench.importlib.util, "find_spec", lambda name: None)
    assert gpu_bench.main(["--parts", "kernels,exact", "--out", str(tmp_path / "x.json")]) == 0
    assert [part.status for part in found(tmp_path / "x.json")] == ["absent", "absent"]


@pytest.mark.parametrize("wrong", [["--parts", "bench,nix"], ["--limit-s", "nix=3"]])
def test_unknown_parts_are_refused(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_bench.main([*wrong, "--out", str(tmp_path / "x.json")])
    assert "nix is not among kernels" in capsys.readouterr().err


def test_the_kernels_get_their_own_arguments():
    options = gpu_bench._options(["--out", "x.json", "--kernels=--errors --seed 3"])
    assert gpu_bench.COMMANDS["kernels"](options)[2:] == [
        "services.worker.bench.kernels",
        "--errors",
        "--seed",
        "3",
    ]


def test_ours_and_the_peer_are_asked_the_same():
    options = gpu_bench._options(["--out", "x.json", "--batch", "256,1", "--engine", "--threads=3"])
    ours, peer = (gpu_bench.COMMANDS[name](options) for name in ("bench", "peer"))
    same = [asked for asked in ours if asked in peer]
    assert {"--waves=1", "--batch=256,1", "--shape=llama-3-8b", "--prompt-tokens=128"} <= set(same)
    assert "--output-tokens=256" in same
    assert "--decode-only=256" in ours
    assert "--threads=3" in ours
    assert "--threads=3" not in peer


def test_the_summary_puts_a_level_beside_its_floor_and_the_peer():
    spread = Spread(3e7, 3e7, 3e7, 3e7, 3e7)
    steps = Steps(steps=5, decode_step_ms=spread, decode_sequences_mean=4, decode_context_mean=8)
    ours = floor.beside(level(steps), SMALL, PLAIN, (6, 3))
    slow = msgspec.structs.replace(LEVEL, output_throughput=12.0)
    parts = [made("bench", [ours]), made("peer", [slow])]
    *_, head, row = gpu_bench.summary(Found(started_unix_s=0, machine={"gpu": "G"}, parts=parts))
    assert len(head) == len(row)
    cells = row.split()
    assert cells[:3] == ["4", "24", "72"]
    assert cells[-2:] == ["12", "2.00"]
    assert f"{3e7 / ours.steps.decode_floor.step_ms:.2f}" in cells


def test_the_summary_of_the_peer_alone_has_its_rates():
    *_, row = gpu_bench.summary(Found(started_unix_s=0, machine={}, parts=[made("peer", [LEVEL])]))
    assert row.split() == ["4", *"-" * 9, "24", "-"]


def made(name, levels):
    return Part(name=name, status="passed", took_s=1.0, command=[], said="", levels=levels)
