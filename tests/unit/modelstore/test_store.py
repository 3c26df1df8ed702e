"""Versions and aliases over objects: freshness, races, deletion, damage."""

import asyncio

import pytest

from services.modelstore.adapters.memory import MemoryObjects
from services.modelstore.core.aliases import AliasKey, Target, record_bytes
from services.modelstore.core.manifest import blob_path, manifest_path
from services.modelstore.core.refusal import Refused
from services.modelstore.store import Store
from tests.unit.modelstore.made import manifest
from tokenloom.kit.clock import FakeClock


@pytest.fixture
def objects():
    return MemoryObjects()


@pytest.fixture
async def store(objects):
    return await opened(objects)


async def opened(objects):
    made = Store(objects, FakeClock())
    await made.refresh()
    return made


async def refusal(awaitable):
    with pytest.raises(Refused) as caught:
        await awaitable
    return caught.value


async def test_a_published_version_is_seen_at_once_with_its_time(store):
    version, created = await store.publish(manifest(), "m.gguf")
    assert created
    assert version.imported.created_unix_ms == FakeClock().unix_ms()
    assert version.imported.source == "m.gguf"
    assert await store.resolve(f"tiny@{version.digest}") is version


async def test_publishing_again_changes_nothing(store, objects):
    await store.publish(manifest(), "m.gguf")
    before = dict(objects.data)
    _, created = await store.publish(manifest(), "elsewhere.gguf")
    assert not created
    assert objects.data == before


async def test_another_process_sees_the_change_at_its_next_look(store, objects):
    other = await opened(objects)
    version, _ = await store.publish(manifest(), "x")
    assert version.digest not in other.catalogue.versions
    assert await other.refresh()
    assert version.digest in other.catalogue.versions


async def test_an_unknown_model_is_looked_for_before_it_is_refused(store, objects):
    other = await opened(objects)
    version, _ = await store.publish(manifest(), "x")
    assert (await other.resolve(f"tiny@{version.digest}")).digest == version.digest
    assert (await refusal(other.resolve("nope"))).reason == "MODEL_NOT_FOUND"


async def test_a_look_that_finds_nothing_new_changes_nothing(store):
    await store.publish(manifest(), "x")
    generation, catalogue = store.generation, store.catalogue
    assert not await store.refresh()
    assert (store.generation, store.catalogue) == (generation, catalogue)


async def test_watchers_wake_when_the_catalogue_changes(store):
    waiting = asyncio.create_task(store.newer_than(store.generation))
    await asyncio.sleep(0)
    assert not waiting.done()
    await store.publish(manifest(), "x")
    assert await asyncio.wait_for(waiting, 5) == store.generation


async def test_alias_changes_are_numbered(store):
    version, _ = await store.publish(manifest(), "x")
    other, _ = await store.publish(manifest(content=b"other"), "x")
    first = await store.set_alias("tiny", "stable", [Target(version.digest)], None)
    second = await store.set_alias("tiny", "stable", [Target(other.digest)], None)
    assert (first.sequence, second.sequence) == (1, 2)
    assert (await store.resolve("tiny")).digest == other.digest


@pytest.mark.parametrize(("expected", "works"), [(None, True), (1, True), (0, False), (2, False)])
async def test_an_expected_number_guards_the_change(store, expected, works):
    version, _ = await store.publish(manifest(), "x")
    targets = [Target(version.digest)]
    await store.set_alias("tiny", "stable", targets, 0)
    change = store.set_alias("tiny", "stable", targets, expected)
    if works:
        assert (await change).sequence == 2
    else:
        error = await refusal(change)
        assert error.reason == "ALIAS_CONFLICT"
        assert error.metadata == {"model": "tiny", "alias": "stable"}


async def test_racing_changes_make_one_line_and_none_is_lost(objects):
    stores = [await opened(objects) for _ in range(4)]
    version, _ = await stores[0].publish(manifest(), "x")
    targets = [Target(version.digest)]

    async def change_often(store):
        return [(await store.set_alias("tiny", "stable", targets, None)).sequence for _ in range(25)]

    sequences = [n for found in await asyncio.gather(*map(change_often, stores)) for n in found]
    assert sorted(sequences) == list(range(1, 101))


async def test_with_an_expected_number_one_of_the_racers_wins(objects):
    stores = [await opened(objects) for _ in range(4)]
    version, _ = await stores[0].publish(manifest(), "x")
    changes = (s.set_alias("tiny", "stable", [Target(version.digest)], 0) for s in stores)
    results = await asyncio.gather(*changes, return_exceptions=True)
    reasons = [result.reason for result in results if isinstance(result, Refused)]
    assert reasons == ["ALIAS_CONFLICT"] * 3


async def test_an_alias_cannot_name_another_models_version(store):
    other, _ = await store.publish(manifest("other"), "x")
    await store.publish(manifest(), "x")
    error = await refusal(store.set_alias("tiny", "stable", [Target(other.digest)], None))
    assert error.reason == "FIELD_INVALID"
    assert "'other', not of 'tiny'" in error.message


async def test_an_alias_cannot_name_an_unknown_version(store):
    unknown = [Target("sha256:" + "0" * 64)]
    assert (await refusal(store.set_alias("tiny", "stable", unknown, None))).reason == "MODEL_NOT_FOUND"


async def test_an_aliased_version_is_not_deleted(store):
    version, _ = await store.publish(manifest(), "x")
    await store.set_alias("tiny", "stable", [Target(version.digest)], None)
    error = await refusal(store.delete_version(version.digest))
    assert error.reason == "MODEL_IN_USE"
    assert error.metadata["used_by"] == "tiny@stable"


async def test_a_free_version_is_deleted_and_can_be_imported_again(store):
    version, _ = await store.publish(manifest(), "x")
    await store.delete_version(version.digest)
    assert version.digest not in store.catalogue.versions
    assert (await refusal(store.delete_version(version.digest))).reason == "MODEL_NOT_FOUND"
    assert (await store.publish(manifest(), "x"))[1]


async def test_an_alias_set_while_its_version_is_deleted_keeps_it():
    for turns in range(12):
        objects = MemoryObjects()
        deleter, setter = await opened(objects), await opened(objects)
        version, _ = await deleter.publish(manifest(), "x")
        await setter.refresh()
        setting = asyncio.create_task(setter.set_alias("tiny", "stable", [Target(version.digest)], None))
        for _ in range(turns):
            await asyncio.sleep(0)
        deleting = asyncio.create_task(deleter.delete_version(version.digest))
        await asyncio.gather(setting, deleting, return_exceptions=True)
        # Whoever was first: an alias that exists names a version that exists.
        fresh = await opened(objects)
        if AliasKey("tiny", "stable", 1).path in objects.data:
            assert (await fresh.resolve("tiny")).digest == version.digest


async def test_a_damaged_manifest_is_passed_over(store, objects):
    version, _ = await store.publish(manifest(), "x")
    good, _ = await store.publish(manifest(content=b"other"), "x")
    objects.data[manifest_path(version.digest)] += b" "
    assert list((await opened(objects)).catalogue.versions) == [good.digest]


async def test_a_damaged_alias_record_leaves_the_alias_where_it_was(store, objects):
    version, _ = await store.publish(manifest(), "x")
    await store.set_alias("tiny", "stable", [Target(version.digest)], None)
    objects.data[AliasKey("tiny", "stable", 2).path] = b"nonsense"
    for found in (store, await opened(objects)):
        await found.refresh()
        assert (await found.resolve("tiny")).digest == version.digest
        # The number is taken: the next change comes after it.
    changed = await store.set_alias("tiny", "stable", [Target(version.digest)], None)
    assert changed.sequence == 3


async def test_strange_files_in_the_store_are_ignored(store, objects):
    objects.data |= {
        "manifests/sha256/short.json": b"",
        "aliases/tiny/stable/notes.txt": b"",
        blob_path("sha256:" + "0" * 64): b"orphan",
    }
    assert not await store.refresh()


async def test_an_alias_record_written_by_hand_is_followed(store, objects):
    version, _ = await store.publish(manifest(), "x")
    objects.data[AliasKey("tiny", "canary", 5).path] = record_bytes([Target(version.digest, 3)], 0)
    await store.refresh()
    assert (await store.resolve("tiny@canary")).digest == version.digest
