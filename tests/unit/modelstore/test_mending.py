"""What an import that is repeated mends: every object that it would have written."""

import asyncio

import pytest

from services.modelstore.adapters.memory import MemoryObjects
from services.modelstore.core.manifest import blob_path, digest_of, import_path, manifest_path
from services.modelstore.core.refusal import Refused
from services.modelstore.store import Store
from tests.unit.modelstore.made import gguf_file
from tests.unit.modelstore.test_importer import House
from tokenloom.kit.clock import FakeClock


@pytest.fixture
def objects():
    return MemoryObjects()


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file())
    return path


@pytest.fixture
def house(tmp_path, objects):
    return House(tmp_path, objects)


async def opened(objects):
    """What another process knows of the store."""
    store = Store(objects, FakeClock())
    await store.refresh()
    return store


def flipped(data):
    """One bit is another one; the length stays."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "one bit": flipped,
    "longer": lambda data: data + b"}",
    "something else": lambda data: b"nonsense, and no JSON at all",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["manifest", "blob", "import", "conversion"])
@pytest.mark.parametrize("restarted", [False, True])
async def test_whatever_is_damaged_the_same_import_mends_it(
    tmp_path, house, objects, gguf, damage, kind, restarted
):
    first = await house.run(gguf)
    whole = dict(objects.data)
    for path in list(objects.data):
        if path.startswith(f"{kind}s/"):
            objects.data[path] = DAMAGES[damage](objects.data[path])
    assert objects.data != whole
    if restarted:
        house = House(tmp_path, objects)
        await house.store.refresh()
    again = await house.run(gguf)
    assert again.version.digest == first.version.digest
    assert not again.created
    if (kind, damage) == ("import", "one bit"):
        # Nothing vouches for this record; what can be read is believed.
        return
    assert objects.data == whole
    for found in (house.store, await opened(objects)):
        assert (await found.resolve("m")).imported == first.version.imported


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_process_that_passed_over_a_damaged_manifest_sees_it_mended(house, objects, gguf, damage):
    imported = await house.run(gguf)
    path = manifest_path(imported.version.digest)
    objects.data[path] = DAMAGES[damage](objects.data[path])
    other = await opened(objects)
    assert other.catalogue.models == {}
    objects.unix_ms += 1
    await house.run(gguf)
    assert await other.refresh()
    assert (await other.resolve("m")).digest == imported.version.digest


async def test_a_manifest_that_stays_damaged_is_read_once(objects, monkeypatch, house, gguf):
    imported = await house.run(gguf)
    path = manifest_path(imported.version.digest)
    objects.data[path] = b""
    other, get, read = await opened(objects), objects.get, []

    async def counted(asked):
        read.append(asked)
        return await get(asked)

    monkeypatch.setattr(objects, "get", counted)
    for _ in range(3):
        await other.refresh()
    assert read == []


async def test_a_look_that_began_before_the_mending_does_not_hide_it(objects, house, gguf, monkeypatch):
    """It has read the damaged bytes, and ends after the whole ones were written."""
    imported = await house.run(gguf)
    path = manifest_path(imported.version.digest)
    whole, objects.data[path] = objects.data[path], b""
    house = Store(objects, FakeClock())
    get, holding, go_on = objects.get, asyncio.Event(), asyncio.Event()

    async def held(asked):
        data = await get(asked)
        if asked == path and not holding.is_set():
            holding.set()
            await go_on.wait()
        return data

    monkeypatch.setattr(objects, "get", held)
    looking = asyncio.create_task(house.refresh())
    await holding.wait()
    publishing = asyncio.create_task(house.publish(imported.version.manifest, "m.gguf"))
    for _ in range(20):
        await asyncio.sleep(0)
    go_on.set()
    await looking
    version, created = await publishing
    assert (version.digest, created) == (imported.version.digest, False)
    assert objects.data[path] == whole


async def test_a_version_that_was_deleted_meanwhile_is_new(objects, house, gguf, monkeypatch):
    imported = await house.run(gguf)
    path, get = manifest_path(imported.version.digest), objects.get

    async def deleted(asked):
        if asked == path:
            objects.data.pop(path, None)
        return await get(asked)

    monkeypatch.setattr(objects, "get", deleted)
    assert await house.store._create_manifest(imported.version.manifest)
    assert digest_of(objects.data[path]) == imported.version.digest


async def test_a_mended_manifest_whose_blob_is_gone_is_not_taken_back(objects, house, gguf):
    """It was there before: only its own import may take a version back."""
    version = (await house.run(gguf)).version
    objects.data[manifest_path(version.digest)] = b""
    del objects.data[blob_path(version.blobs[0])]
    with pytest.raises(Refused) as caught:
        await house.store.publish(version.manifest, "m.gguf")
    assert caught.value.reason == "SERVICE_UNAVAILABLE"
    assert digest_of(objects.data[manifest_path(version.digest)]) == version.digest


async def test_whole_objects_are_not_written_again(objects, house, gguf, monkeypatch):
    imported = await house.run(gguf)
    put, written = objects.put, []

    async def watched(path, data):
        written.append(path)
        await put(path, data)

    monkeypatch.setattr(objects, "put", watched)
    await house.run(gguf)
    assert {path.partition("/")[0] for path in written} == {"pins"}
    assert import_path(imported.version.digest) in objects.data


@pytest.mark.parametrize("at", range(0, 400, 7))
async def test_a_record_of_a_conversion_is_never_believed_with_another_bit(house, objects, gguf, at):
    first = await house.run(gguf)
    path = next(path for path in objects.data if path.startswith("conversions/"))
    data = objects.data[path]
    at %= len(data)
    objects.data[path] = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    assert (await house.run(gguf)).version.digest == first.version.digest
    assert len(house.converter.jobs) == 2
    assert objects.data[path] == data
