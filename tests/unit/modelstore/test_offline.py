"""Where imports without a mesh work when the store is at a URL."""

import os
import tempfile

import pytest

from services.modelstore.app import _own_temporary_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"tokenloom-{os.getuid()}"


def test_the_temporary_folder_is_the_users_own_and_the_same_each_time(temporary):
    assert _own_temporary_folder() == _own_temporary_folder() == temporary
    assert temporary.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_to_is_not_used(temporary):
    temporary.mkdir()
    temporary.chmod(0o777)
    with pytest.raises(OSError, match="is open to other users: remove it, or set TMPDIR"):
        _own_temporary_folder()


def test_a_link_that_somebody_laid_is_not_followed(temporary, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    temporary.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is open to other users"):
        _own_temporary_folder()


def test_a_folder_of_somebody_else_is_not_used(temporary, monkeypatch):
    temporary.mkdir(mode=0o700)
    uid = os.getuid()
    temporary.rename(temporary.with_name(f"tokenloom-{uid + 1}"))
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(OSError, match="is open to other users"):
        _own_temporary_folder()
