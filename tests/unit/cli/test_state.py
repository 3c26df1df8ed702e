"""The description of a running mesh, its lock, and where things are kept."""

from pathlib import Path

import pytest

from tokenloom.cli import local, state

MESH = state.Mesh(
    launcher_pid=1,
    address="127.0.0.1:8080",
    engine="sim",
    models=["sim"],
    otlp="127.0.0.1:4317",
    started_unix_ms=5,
    processes=[state.Process("modelstore", 2, {"grpc": 9200, "metrics": 9090}, state.READY)],
)


def test_what_is_written_is_read_back(tmp_path):
    state.write(tmp_path / "mesh.json", MESH)
    assert state.read(tmp_path / "mesh.json") == MESH
    assert [p.name for p in tmp_path.iterdir()] == ["mesh.json"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"processes": [{"nonsense": 1}]}', '{"processes": 3}']
)
def test_a_damaged_description_counts_as_none(tmp_path, content):
    path = tmp_path / "mesh.json"
    path.write_text(content)
    assert state.read(path) is None


def test_a_lock_is_held_once_and_seen_by_others(tmp_path):
    path = tmp_path / "deep" / "lock"
    assert not state.is_locked(path)
    with state.lock(path):
        assert state.is_locked(path)
        with pytest.raises(state.Locked), state.lock(path):
            pass
    assert not state.is_locked(path)


def test_everything_is_below_tokenloom_home_when_it_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "/elsewhere")
    assert (local.state_dir(), local.store_dir(), local.cache_dir()) == (
        tmp_path,
        tmp_path / "store",
        tmp_path / "cache",
    )


def test_xdg_folders_are_used_and_relative_ones_ignored(monkeypatch, tmp_path):
    monkeypatch.delenv("TOKENLOOM_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert local.state_dir() == tmp_path / "state" / "tokenloom"
    assert local.store_dir() == Path("/home/u/.local/share/tokenloom/store")
    assert local.cache_dir() == Path("/home/u/.cache/tokenloom/worker")


def test_a_target_is_known_only_while_the_launcher_lives(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    state.write(local.state_file(), MESH)
    assert local.running_target("modelstore") is None
    with state.lock(local.lock_file()):
        assert local.running_target("modelstore") == "127.0.0.1:9200"
        assert local.running_target("worker-9") is None
