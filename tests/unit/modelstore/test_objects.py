"""One suite for every adapter of the port `Objects`."""

import asyncio
import errno
import os
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import BaseError

from services.modelstore.adapters.memory import MemoryObjects
from services.modelstore.adapters.objects import FolderObjects
from services.modelstore.core.ports import StoreError


@pytest.fixture(params=["memory", "folder"])
def objects(request, tmp_path):
    return MemoryObjects() if request.param == "memory" else FolderObjects(tmp_path / "store")


async def test_what_was_written_is_read(objects):
    await objects.put("a/b.json", b"hello")
    assert await objects.get("a/b.json") == b"hello"
    assert await objects.size("a/b.json") == 5
    assert await objects.read("a/b.json", 1, 3) == b"el"


async def test_what_is_not_there_is_none(objects):
    assert await objects.get("a") is None
    assert await objects.size("a") is None
    with pytest.raises(FileNotFoundError):
        await objects.read("a", 0, 1)


async def test_create_never_overwrites(objects):
    assert await objects.create("a", b"first")
    assert not await objects.create("a", b"second")
    assert await objects.get("a") == b"first"


async def test_of_many_creators_exactly_one_succeeds(objects):
    won = await asyncio.gather(*(objects.create("a", b"%d" % n) for n in range(20)))
    assert won.count(True) == 1
    assert await objects.get("a") == b"%d" % won.index(True)


async def test_put_overwrites(objects):
    await objects.put("a", b"first")
    await objects.put("a", b"second")
    assert await objects.get("a") == b"second"


async def test_entries_are_those_below_a_folder(objects):
    for path in ("x/1.json", "x/y/2.json", "xy/3.json", "4.json"):
        await objects.put(path, b"four")
    found = await objects.entries("x")
    assert sorted((entry.path, entry.size_bytes) for entry in found) == [("x/1.json", 4), ("x/y/2.json", 4)]
    assert await objects.entries("nothing") == []


async def test_delete_is_final_and_may_be_repeated(objects):
    await objects.put("a", b"x")
    await objects.delete("a")
    await objects.delete("a")
    assert await objects.get("a") is None


async def test_a_local_file_is_adopted(objects, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"weights")
    await objects.put("blobs/x", b"damaged")
    await objects.adopt("blobs/x", str(file))
    assert await objects.get("blobs/x") == b"weights"


async def test_a_file_on_another_file_system_is_copied(tmp_path, monkeypatch):
    objects = FolderObjects(tmp_path / "store")
    file = tmp_path / "file"
    file.write_bytes(b"weights")
    monkeypatch.setattr(objects, "_move", lambda *_: False)
    await objects.adopt("blobs/x", str(file))
    assert await objects.get("blobs/x") == b"weights"


async def test_half_written_objects_are_not_listed(tmp_path):
    objects = FolderObjects(tmp_path)
    await objects.put("manifests/a.json", b"{}")
    # What a writer that was killed leaves behind.
    (tmp_path / "manifests" / "b.json#1").write_bytes(b"{")
    assert [entry.path for entry in await objects.entries("manifests")] == ["manifests/a.json"]


async def test_files_are_as_old_as_the_file_system_says(tmp_path):
    objects = FolderObjects(tmp_path)
    await objects.put("a.json", b"{}")
    await objects.put("b/c.json", b"{}")
    os.utime(tmp_path / "b" / "c.json", (7, 7))
    assert [entry.modified_unix_ms for entry in await objects.entries("b")] == [7000]
    await objects.put("b/c.json", b"{}")
    assert (await objects.entries("b"))[0].modified_unix_ms > 1_000_000_000_000


async def test_old_half_written_files_are_swept_and_nothing_else(tmp_path):
    objects = FolderObjects(tmp_path)
    left = [tmp_path / "blobs" / "sha256" / "a#1", tmp_path / "blobs" / "sha256" / "a#2"]
    others = [tmp_path / ".scratch" / "a#1", tmp_path / "blobs" / "sha256" / "a"]
    for path in (*left, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for path in (left[0], *others):
        os.utime(path, (7, 7))
    assert await objects.sweep(7001) == 1
    assert [path.exists() for path in (*left, *others)] == [False, True, True, True]


async def test_a_full_disk_is_said_as_such(tmp_path, monkeypatch):
    def put(*_, **__):
        raise BaseError("Generic LocalFileSystem error: Unable to copy data: No space left on device\n more")

    monkeypatch.setattr(obstore, "put", put)
    with pytest.raises(StoreError) as caught:
        await FolderObjects(tmp_path).put("a", b"")
    assert caught.value.errno == errno.ENOSPC


async def test_other_trouble_is_one_line_without_what_signs_a_request(tmp_path, monkeypatch):
    def head(*_, **__):
        raise BaseError("Error performing HEAD http://box/a?sig=hidden in 2s\nDebug source: hidden")

    monkeypatch.setattr(obstore, "head", head)
    with pytest.raises(StoreError) as caught:
        await FolderObjects(tmp_path).size("a")
    assert caught.value.strerror == "Error performing HEAD http://box/a in 2s"


def test_a_folder_that_cannot_be_used_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        FolderObjects(tmp_path / "file" / "store")


async def test_a_half_written_file_that_is_finished_while_it_is_swept_is_no_error(tmp_path, monkeypatch):
    objects = FolderObjects(tmp_path)
    (tmp_path / "a#1").write_bytes(b"")
    (tmp_path / "b#1").write_bytes(b"")
    for name in ("a#1", "b#1"):
        os.utime(tmp_path / name, (1, 1))
    lstat = Path.lstat

    def finished(path):
        if path.name == "a#1":
            path.unlink(missing_ok=True)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", finished)
    assert await objects.sweep(10**12) == 1
    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_cannot_be_moved_into_the_store_is_the_stores_failure(tmp_path, monkeypatch):
    objects = FolderObjects(tmp_path / "store")
    (tmp_path / "file").write_bytes(b"x")

    def read_only(path, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "replace", read_only)
    with pytest.raises(StoreError) as caught:
        await objects.adopt("blobs/x", str(tmp_path / "file"))
    assert (caught.value.errno, caught.value.strerror) == (errno.EROFS, "Read-only file system")
