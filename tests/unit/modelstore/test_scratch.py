"""Working folders: gone afterwards, and gone when their process is."""

import fcntl

import pytest

from services.modelstore.adapters.scratch import Scratch


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


def test_the_folder_of_a_process_that_was_killed_is_swept_by_the_next_import(scratch, tmp_path):
    left = tmp_path / "scratch" / "left"
    (left / "output").mkdir(parents=True)
    (left / "lock").touch()
    (left / "output" / "model.safetensors").write_bytes(b"half")
    with scratch.folder() as folder:
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
