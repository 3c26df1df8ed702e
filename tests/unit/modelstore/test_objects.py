"""One suite for every adapter of the port `Objects`."""

import asyncio

import pytest

from services.modelstore.adapters.memory import MemoryObjects
from services.modelstore.adapters.objects import FolderObjects


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


async def test_names_are_those_below_a_folder(objects):
    for path in ("x/1.json", "x/y/2.json", "xy/3.json", "4.json"):
        await objects.put(path, b"")
    assert sorted(await objects.names("x")) == ["x/1.json", "x/y/2.json"]
    assert await objects.names("nothing") == []


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
    assert await objects.names("manifests") == ["manifests/a.json"]


def test_a_folder_that_cannot_be_used_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        FolderObjects(tmp_path / "file" / "store")
