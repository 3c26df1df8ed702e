"""What a person types: clear one-line refusals, help, logs, and JSON for programs."""

import json
import os
import random
import socket
import subprocess
import sys

import grpc
import pytest

from tokenloom.cli import envoy, generate, local, logs, state
from tokenloom.cli.errors import CliError
from tokenloom.cli.ports import free_ports
from tokenloom.cli.status import describe, snapshot
from tokenloom.kit.errors import CallError


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    return tmp_path


def run(*arguments, **environment):
    """Exit status, output and error output of one command."""
    paths = os.pathsep.join([str(envoy.ROOT), str(envoy.ROOT / "gen")])
    done = subprocess.run(
        [sys.executable, "-m", "tokenloom.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ, PYTHONPATH=paths, COLUMNS="200", **environment),
    )
    return done.returncode, done.stdout, done.stderr


def test_without_a_mesh_each_command_says_so_in_one_line(home):
    (port,) = free_ports(1, random.Random())
    said = {
        ("status",): "no mesh is running: start one with `tokenloom up`",
        ("logs",): "start a mesh with `tokenloom up`",
        ("trace",): "no trace yet",
        ("trace", "abcdef123"): "no trace or request 'abcdef123'",
        ("generate", "hi", "--address", f"127.0.0.1:{port}"): "start a mesh with `tokenloom up`",
    }
    for command, expected in said.items():
        status, out, err = run(*command)
        assert (status, out) == (1, ""), command
        assert expected in err
        assert len(err.strip().splitlines()) == 1, err


def test_status_for_programs_is_an_empty_list_without_a_mesh(home):
    status, out, _ = run("status", "--json")
    assert (status, json.loads(out)) == (0, {"processes": []})


def test_down_without_a_mesh_is_no_error(home):
    assert run("down") == (0, "no mesh is running\n", "")


def test_a_taken_port_is_named_with_its_holder_and_the_flag(home):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for how in ([], ["--detach"]):
            status, _, err = run("up", "--engine", "sim", "--port", str(port), *how)
            assert status == 1
            assert f"port {port} is in use by" in err
            assert f"pid {os.getpid()}" in err
            assert "--port" in err


def test_a_second_mesh_is_refused_with_the_cure(home):
    state.write(local.state_file(), MESH)
    with state.lock(local.lock_file()):
        for how in ([], ["--detach"]):
            status, _, err = run("up", "--engine", "sim", *how)
            assert status == 1
            assert "already running at 127.0.0.1:8080" in err
            assert "tokenloom down" in err


def test_a_missing_envoy_names_make_install(home, monkeypatch):
    monkeypatch.setattr(envoy, "find_binary", lambda: None)
    from tokenloom.cli.launcher import check_envoy

    with pytest.raises(CliError, match="make install"):
        check_envoy()


def test_an_engine_that_does_not_exist_is_refused(home):
    status, _, err = run("up", "--engine", "fast")
    assert status == 2
    assert "torch or sim" in err


@pytest.mark.parametrize("ratio", ["-0.1", "1.5", "nan", "most"])
def test_a_trace_ratio_that_is_no_share_is_refused_by_name(home, ratio):
    status, out, err = run("up", "--engine", "sim", f"--trace-ratio={ratio}")
    assert (status, out) == (2, "")
    assert "--trace-ratio" in err
    assert "Traceback" not in err


MESH = state.Mesh(
    launcher_pid=os.getpid(),
    address="127.0.0.1:8080",
    engine="sim",
    models=["sim"],
    otlp="",
    started_unix_ms=0,
    processes=[state.Process("worker-0", os.getpid(), {"metrics": 1}, state.READY)],
)


def test_status_lists_name_pid_ports_state_and_children(home):
    state.write(local.state_file(), MESH)
    code = "import sys; print('here', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert child.stdout.readline() == b"here\n"
    try:
        with state.lock(local.lock_file()):
            (process,) = snapshot()["processes"]
    finally:
        child.communicate()
    # Nobody answers on its metrics port: whatever the file says, it is not ready.
    assert (process["name"], process["pid"], process["state"]) == ("worker-0", os.getpid(), "starting")
    assert process["ports"] == {"metrics": 1}
    (shown,) = [c for c in process["children"] if c["pid"] == child.pid]
    assert shown.keys() == {"name", "pid", "ports", "state", "children"}
    assert shown["name"].startswith("python")


def test_a_process_that_is_gone_has_no_children():
    gone = state.Process("x", 2**22 - 1, {}, state.RESTARTING)
    assert describe(gone, "restarting", "")["children"] == []


def test_logs_are_prefixed_only_when_there_are_several(home):
    local.logs_dir().mkdir()
    for name in ("batcher", "worker-0"):
        (local.logs_dir() / f"{name}.log").write_text("one\ntwo\n")
    assert list(logs.tail(logs.files("batcher"), 1)) == ["two"]
    assert list(logs.tail(logs.files(None), 1)) == ["batcher      two", "worker-0     two"]
    with pytest.raises(CliError, match="there are: batcher, worker-0"):
        logs.files("worker")


def test_what_is_added_to_a_log_is_followed_by_whole_lines_through_a_cut(tmp_path):
    path = tmp_path / "x.log"
    path.write_text("old\n")
    follower = logs.Follower(path)
    assert follower.fresh() == []
    with path.open("a") as file:
        file.write("new\nhalf")
    assert follower.fresh() == ["new"]
    path.write_text("cut\n")
    assert follower.fresh() == ["cut"]


def test_a_question_becomes_a_chat_and_raw_text_a_prompt():
    chat = generate.to_request(generate.Ask("hi", max_tokens=5, temperature=0.0), "m")
    assert [(m.role, m.content) for m in chat.chat.messages] == [("user", "hi")]
    assert (chat.stop.max_new_tokens, chat.sampling.temperature) == (5, 0.0)
    assert chat.sampling.HasField("temperature")
    raw = generate.to_request(generate.Ask("hi", raw=True), "m")
    assert raw.prompt == "hi"
    # What was not asked for is left to the model.
    assert not raw.HasField("sampling")
    assert not raw.HasField("stop")


def test_a_refusal_is_one_line_with_its_reason():
    error = CallError("MODEL_NOT_FOUND", "no model x; there are: y")
    assert generate.explain(error, "a:1") == "MODEL_NOT_FOUND: no model x; there are: y"
    assert error.code is grpc.StatusCode.NOT_FOUND
