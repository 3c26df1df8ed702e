"""What `tokenloom up` hands on: to the detached launcher, and to each process that the guard becomes."""

import os
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from tokenloom.cli import guard, main, up
from tokenloom.cli.plan import Options

ASKED = [
    Options(),
    Options(trace_ratio=0.0),
    Options(workers=3, engine="sim", port=8123, host="0.0.0.0", models=("a", "b@canary"), trace_ratio=0.003),
]


@pytest.mark.parametrize("asked", ASKED, ids=["defaults", "no traces", "everything"])
def test_a_detached_launcher_understands_all_that_was_asked_for(asked, tmp_path, monkeypatch):
    commands = []
    started = SimpleNamespace(Popen=lambda command, **_: commands.append(command), DEVNULL=None)
    monkeypatch.setattr(up, "subprocess", started)
    with up._launcher(asked, tmp_path / "launcher.log"):
        pass
    understood = []
    monkeypatch.setattr(up, "for_parent", lambda options, *_: understood.append(options))
    (command,) = commands
    done = CliRunner().invoke(main.app, command[command.index("up") :], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert understood == [asked]


def test_a_process_steps_aside_without_a_word(monkeypatch, capfd):
    chosen = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda *which: chosen.append(which))
    guard.step_aside()
    assert chosen == [(0, os.SCHED_BATCH, os.sched_param(0))]
    assert capfd.readouterr() == ("", "")


def test_where_it_may_not_step_aside_a_process_runs_as_any_other_and_says_so(monkeypatch, capfd):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    guard.step_aside()
    assert "Operation not permitted" in capfd.readouterr().err
    monkeypatch.delattr(os, "sched_setscheduler")
    guard.step_aside()
    assert "sched_setscheduler" in capfd.readouterr().err
