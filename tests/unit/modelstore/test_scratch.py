"""Working folders: gone afterwards, and gone when their process is."""

import fcntl
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from services.modelstore.adapters.scratch import KEPT_FOR_S, Busy, Scratch


@pytest.fixture
def scratch(tmp_path):
    return Scratch(tmp_path / "scratch")


def test_a_folder_lives_as_long_as_its_block(scratch):
    with scratch.folder() as folder:
        (folder / "file").write_text("x")
        assert folder.is_dir()
    assert not folder.exists()


def test_a_folder_is_removed_when_its_block_fails(scratch):
    with pytest.raises(RuntimeError, match="boom"), scratch.folder() as folder:
        raise RuntimeError("boom")
    assert not folder.exists()


def test_the_folder_of_a_process_that_was_killed_is_swept(scratch, tmp_path):
    left = tmp_path / "scratch" / "left"
    (left / "output").mkdir(parents=True)
    (left / "lock").touch()
    (left / "output" / "model.safetensors").write_bytes(b"half")
    with scratch.folder() as folder:
        assert scratch.sweep() == 1
        assert not left.exists()
        assert folder.is_dir()


def test_the_folder_of_a_process_that_lives_is_left_alone(scratch, tmp_path):
    busy = tmp_path / "scratch" / "busy"
    busy.mkdir(parents=True)
    with (busy / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert scratch.sweep() == 0
        assert busy.is_dir()


def test_nothing_to_sweep_is_fine(scratch):
    assert scratch.sweep() == 0


def test_a_kept_folder_is_there_again_until_its_work_is_done(scratch):
    with scratch.kept("key") as kept:
        (kept.path / "part").write_text("x")
    scratch.sweep()
    with scratch.kept("key") as kept:
        assert (kept.path / "part").read_text() == "x"
        kept.done = True
    assert not kept.path.exists()
    with scratch.kept("key") as kept:
        assert not (kept.path / "part").exists()


def test_a_kept_folder_is_one_workers_at_a_time(scratch):
    with scratch.kept("key"), pytest.raises(Busy), scratch.kept("key"):
        raise AssertionError("two had it")
    with scratch.kept("key"), scratch.kept("other"):
        pass


def test_a_kept_folder_that_nobody_came_back_for_is_removed(scratch):
    with scratch.kept("old") as old, scratch.kept("new") as new:
        pass
    long_ago = time.time() - KEPT_FOR_S - 60
    os.utime(old.path / "lock", (long_ago, long_ago))
    with scratch.kept("another"):
        assert (old.path.exists(), new.path.exists()) == (False, True)


def test_a_kept_folder_in_use_is_not_removed_however_old(scratch):
    with scratch.kept("old") as old:
        long_ago = time.time() - KEPT_FOR_S - 60
        os.utime(old.path / "lock", (long_ago, long_ago))
        with scratch.kept("another"):
            assert old.path.exists()


@pytest.mark.parametrize("at", ["open", "flock"])
def test_a_folder_that_another_process_sweeps_before_it_is_locked_is_made_again(scratch, monkeypatch, at):
    """Between being made and being locked it is nobody's."""
    swept = []
    module = {"open": os, "flock": fcntl}[at]
    real = getattr(module, at)

    def late(*arguments, **options):
        if not swept:
            swept.append("begun")
            swept.append(scratch.sweep())
        return real(*arguments, **options)

    monkeypatch.setattr(module, at, late)
    with scratch.folder() as folder:
        assert folder.is_dir()
        assert scratch.sweep() == 0
    assert len(swept) == 2
    assert not folder.exists()


def test_a_sweep_that_holds_the_lock_of_a_new_folder_is_outlasted(scratch, monkeypatch):
    holding, flock = [], fcntl.flock

    def held(handle, how):
        if not holding:
            folder = Path(os.readlink(f"/proc/self/fd/{handle}")).parent
            holding.append(os.open(folder / "lock", os.O_RDONLY))
            flock(holding[0], fcntl.LOCK_EX)
            shutil.rmtree(folder)
            threading.Timer(0.05, os.close, holding).start()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", held)
    with scratch.folder() as folder:
        assert folder.is_dir()
    assert holding
