"""Versions and aliases over objects: freshness, races, deletion, damage."""

import asyncio

import pytest

from services.modelstore.adapters.memory import MemoryObjects
from services.modelstore.core.aliases import AliasKey, Target, record_bytes
from services.modelstore.core.deprecations import Deprecation, record_path
from services.modelstore.core.manifest import blob_path, manifest_path
from services.modelstore.core.ports import StoreError
from services.modelstore.core.refusal import Refused
from services.modelstore.store import CHANGE_ATTEMPTS_MAX, Store
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


async def published(store, made, source):
    """As an import does it: the blobs first."""
    for file in made.files:
        await store._objects.put(blob_path(file.digest), bytes(file.size_bytes))
    return await store.publish(made, source)


async def refusal(awaitable):
    with pytest.raises(Refused) as caught:
        await awaitable
    return caught.value


async def test_a_published_version_is_seen_at_once_with_its_time(store):
    version, created = await published(store, manifest(), "m.gguf")
    assert created
    assert version.imported.created_unix_ms == FakeClock().unix_ms()
    assert version.imported.source == "m.gguf"
    assert await store.resolve(f"tiny@{version.digest}") is version


async def test_publishing_again_changes_nothing(store, objects):
    await published(store, manifest(), "m.gguf")
    before = dict(objects.data)
    _, created = await published(store, manifest(), "elsewhere.gguf")
    assert not created
    assert objects.data == before


async def test_another_process_sees_the_change_at_its_next_look(store, objects):
    other = await opened(objects)
    version, _ = await published(store, manifest(), "x")
    assert version.digest not in other.catalogue.versions
    assert await other.refresh()
    assert version.digest in other.catalogue.versions


async def test_an_unknown_model_is_looked_for_before_it_is_refused(store, objects):
    other = await opened(objects)
    version, _ = await published(store, manifest(), "x")
    assert (await other.resolve(f"tiny@{version.digest}")).digest == version.digest
    assert (await refusal(other.resolve("nope"))).reason == "MODEL_NOT_FOUND"


async def test_a_look_that_finds_nothing_new_changes_nothing(store):
    await published(store, manifest(), "x")
    generation, catalogue = store.generation, store.catalogue
    assert not await store.refresh()
    assert (store.generation, store.catalogue) == (generation, catalogue)


async def test_watchers_wake_when_the_catalogue_changes(store):
    waiting = asyncio.create_task(store.newer_than(store.generation))
    await asyncio.sleep(0)
    assert not waiting.done()
    await published(store, manifest(), "x")
    assert await asyncio.wait_for(waiting, 5) == store.generation


async def test_alias_changes_are_numbered(store):
    version, _ = await published(store, manifest(), "x")
    other, _ = await published(store, manifest(content=b"other"), "x")
    first = await store.set_alias("tiny", "stable", [Target(version.digest)], None)
    second = await store.set_alias("tiny", "stable", [Target(other.digest)], None)
    assert (first.sequence, second.sequence) == (1, 2)
    assert (await store.resolve("tiny")).digest == other.digest


@pytest.mark.parametrize(("expected", "works"), [(None, True), (1, True), (0, False), (2, False)])
async def test_an_expected_number_guards_the_change(store, expected, works):
    version, _ = await published(store, manifest(), "x")
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
    version, _ = await published(stores[0], manifest(), "x")
    targets = [Target(version.digest)]

    async def change_often(store):
        return [(await store.set_alias("tiny", "stable", targets, None)).sequence for _ in range(25)]

    sequences = [n for found in await asyncio.gather(*map(change_often, stores)) for n in found]
    assert sorted(sequences) == list(range(1, 101))


async def test_with_an_expected_number_one_of_the_racers_wins(objects):
    stores = [await opened(objects) for _ in range(4)]
    version, _ = await published(stores[0], manifest(), "x")
    changes = (s.set_alias("tiny", "stable", [Target(version.digest)], 0) for s in stores)
    results = await asyncio.gather(*changes, return_exceptions=True)
    reasons = [result.reason for result in results if isinstance(result, Refused)]
    assert reasons == ["ALIAS_CONFLICT"] * 3


async def test_an_alias_cannot_name_another_models_version(store):
    other, _ = await published(store, manifest("other"), "x")
    await published(store, manifest(), "x")
    error = await refusal(store.set_alias("tiny", "stable", [Target(other.digest)], None))
    assert error.reason == "FIELD_INVALID"
    assert "'other', not of 'tiny'" in error.message


async def test_an_alias_cannot_name_an_unknown_version(store):
    unknown = [Target("sha256:" + "0" * 64)]
    assert (await refusal(store.set_alias("tiny", "stable", unknown, None))).reason == "MODEL_NOT_FOUND"


async def test_an_aliased_version_is_not_deleted(store):
    version, _ = await published(store, manifest(), "x")
    await store.set_alias("tiny", "stable", [Target(version.digest)], None)
    error = await refusal(store.delete_version(version.digest))
    assert error.reason == "MODEL_IN_USE"
    assert error.metadata["used_by"] == "tiny@stable"


async def test_a_free_version_is_deleted_and_can_be_imported_again(store):
    version, _ = await published(store, manifest(), "x")
    await store.delete_version(version.digest)
    assert version.digest not in store.catalogue.versions
    assert (await refusal(store.delete_version(version.digest))).reason == "MODEL_NOT_FOUND"
    assert (await published(store, manifest(), "x"))[1]


async def test_an_alias_set_while_its_version_is_deleted_keeps_it():
    for turns in range(12):
        objects = MemoryObjects()
        deleter, setter = await opened(objects), await opened(objects)
        version, _ = await published(deleter, manifest(), "x")
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
    version, _ = await published(store, manifest(), "x")
    good, _ = await published(store, manifest(content=b"other"), "x")
    objects.data[manifest_path(version.digest)] += b" "
    assert list((await opened(objects)).catalogue.versions) == [good.digest]


async def test_a_damaged_alias_record_leaves_the_alias_where_it_was(store, objects):
    version, _ = await published(store, manifest(), "x")
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
    version, _ = await published(store, manifest(), "x")
    objects.data[AliasKey("tiny", "canary", 5).path] = record_bytes([Target(version.digest, 3)], 0)
    await store.refresh()
    assert (await store.resolve("tiny@canary")).digest == version.digest


async def test_a_version_whose_blob_is_gone_is_taken_back(store, objects):
    made = manifest()
    error = await refusal(store.publish(made, "x"))
    assert error.reason == "SERVICE_UNAVAILABLE"
    assert error.message == "config.json went missing while tiny was imported; import it again"
    assert manifest_path(made.digest) not in objects.data


async def test_a_version_that_was_there_before_is_not_taken_back(store, objects):
    version, _ = await published(store, manifest(), "x")
    objects.data[blob_path(version.blobs[0])] += b"longer"
    assert (await refusal(store.publish(manifest(), "x"))).reason == "SERVICE_UNAVAILABLE"
    assert version.digest in (await opened(objects)).catalogue.versions


async def two_versions(store):
    """The targets of two versions of one model."""
    made = [await published(store, manifest(content=content), "x") for content in (b"{}", b"other")]
    return [[Target(version.digest)] for version, _ in made]


async def test_the_history_is_told_newest_first_and_no_longer_than_asked(store):
    one, two = await two_versions(store)
    for targets in (one, two, one):
        await store.set_alias("tiny", "stable", targets, None)
    history = await store.alias_history("tiny", "stable", 20)
    assert [state.sequence for state in history] == [3, 2, 1]
    assert [list(state.targets) for state in history] == [one, two, one]
    assert {state.changed_unix_ms for state in history} == {FakeClock().unix_ms()}
    assert await store.alias_history("tiny", "stable", 2) == history[:2]


async def test_an_alias_that_never_was_has_no_history(store):
    await two_versions(store)
    error = await refusal(store.alias_history("tiny", "nope", 20))
    assert (error.reason, error.metadata) == ("MODEL_NOT_FOUND", {"model": "tiny@nope"})


async def test_a_record_that_cannot_be_read_is_left_out_of_the_history(store, objects):
    one, two = await two_versions(store)
    await store.set_alias("tiny", "stable", one, None)
    objects.data[AliasKey("tiny", "stable", 2).path] = b"nonsense"
    await store.set_alias("tiny", "stable", two, None)
    assert [state.sequence for state in await store.alias_history("tiny", "stable", 20)] == [3, 1]


async def test_an_alias_that_was_taken_away_is_gone_and_goes_on_counting(store):
    one, two = await two_versions(store)
    await store.set_alias("tiny", "stable", one, None)
    await store.delete_alias("tiny", "stable", None)
    assert (await refusal(store.resolve("tiny"))).reason == "MODEL_NOT_FOUND"
    assert (await refusal(store.delete_alias("tiny", "stable", None))).reason == "MODEL_NOT_FOUND"
    assert (await store.set_alias("tiny", "stable", two, None)).sequence == 3
    history = await store.alias_history("tiny", "stable", 20)
    assert [list(state.targets) for state in history] == [two, [], one]


async def test_an_alias_that_never_was_cannot_be_taken_away(store):
    await two_versions(store)
    assert (await refusal(store.delete_alias("tiny", "stable", None))).reason == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(("expected", "works"), [(None, True), (1, True), (0, False), (2, False)])
async def test_an_expected_number_guards_the_end_of_an_alias(store, expected, works):
    one, _ = await two_versions(store)
    await store.set_alias("tiny", "stable", one, 0)
    ending = store.delete_alias("tiny", "stable", expected)
    if works:
        await ending
    else:
        assert (await refusal(ending)).reason == "ALIAS_CONFLICT"
        assert (await store.resolve("tiny")).digest == one[0].digest


@pytest.mark.parametrize(("expected", "works"), [(None, True), (0, True), (2, True), (1, False)])
async def test_an_alias_that_was_taken_away_may_be_expected_not_to_exist(store, expected, works):
    one, _ = await two_versions(store)
    await store.set_alias("tiny", "stable", one, None)
    await store.delete_alias("tiny", "stable", None)
    setting = store.set_alias("tiny", "stable", one, expected)
    if works:
        assert (await setting).sequence == 3
    else:
        assert (await refusal(setting)).reason == "ALIAS_CONFLICT"


async def test_a_version_that_only_history_names_may_be_deleted(store):
    one, two = await two_versions(store)
    await store.set_alias("tiny", "stable", one, None)
    await store.set_alias("tiny", "stable", two, None)
    await store.delete_version(one[0].digest)
    assert len(await store.alias_history("tiny", "stable", 20)) == 2


async def test_another_process_sees_that_an_alias_was_taken_away(store, objects):
    one, _ = await two_versions(store)
    await store.set_alias("tiny", "stable", one, None)
    other = await opened(objects)
    await store.delete_alias("tiny", "stable", None)
    await other.refresh()
    assert other.catalogue.models["tiny"].aliases == ()


async def test_a_change_whose_answer_was_lost_counts_once(store, objects, monkeypatch):
    one, _ = await two_versions(store)
    create = objects.create

    async def repeated(path, data):
        """As a client below that sends a put again: it finds what it wrote itself."""
        await create(path, data)
        return await create(path, data)

    monkeypatch.setattr(objects, "create", repeated)
    assert (await store.set_alias("tiny", "stable", one, None)).sequence == 1
    assert len(await store.alias_history("tiny", "stable", 20)) == 1


async def test_many_changes_at_once_in_one_process_need_no_luck(store):
    one, _ = await two_versions(store)
    changes = (store.set_alias("tiny", "stable", one, None) for _ in range(2 * CHANGE_ATTEMPTS_MAX))
    sequences = [state.sequence for state in await asyncio.gather(*changes)]
    assert sorted(sequences) == list(range(1, 2 * CHANGE_ATTEMPTS_MAX + 1))


async def test_a_deprecated_version_is_marked_and_served(store):
    one, _ = await two_versions(store)
    await store.set_alias("tiny", "stable", one, None)
    marked = await store.set_deprecation(one[0].digest, True, "use the other")
    assert marked.deprecation == Deprecation("use the other", FakeClock().unix_ms())
    assert (await store.resolve("tiny")).deprecation == marked.deprecation
    assert [v.deprecation is None for v in store.catalogue.versions.values()].count(True) == 1


async def test_a_mark_is_taken_away_and_set_again(store, objects):
    one, _ = await two_versions(store)
    for deprecated, message in ((True, "old"), (False, ""), (True, "older")):
        await store.set_deprecation(one[0].digest, deprecated, message)
    other = await opened(objects)
    mark = other.catalogue.version(one[0].digest).deprecation
    assert mark is not None
    assert mark.message == "older"
    await store.set_deprecation(one[0].digest, False, "")
    await other.refresh()
    assert other.catalogue.version(one[0].digest).deprecation is None


async def test_a_mark_that_is_there_is_not_written_again(store, objects):
    one, _ = await two_versions(store)
    await store.set_deprecation(one[0].digest, False, "")
    assert not [path for path in objects.data if path.startswith("deprecations/")]
    for _ in range(2):
        await store.set_deprecation(one[0].digest, True, "old")
    assert len([path for path in objects.data if path.startswith("deprecations/")]) == 1


async def test_only_versions_that_are_there_are_deprecated(store):
    error = await refusal(store.set_deprecation("sha256:" + "0" * 64, True, "old"))
    assert error.reason == "MODEL_NOT_FOUND"


async def test_a_damaged_mark_leaves_the_one_before_it(store, objects):
    one, _ = await two_versions(store)
    await store.set_deprecation(one[0].digest, True, "old")
    objects.data[record_path(one[0].digest, 2)] = b"nonsense"
    assert (await opened(objects)).catalogue.version(one[0].digest).deprecation is not None


async def test_what_was_read_before_a_look_that_failed_is_shown_by_the_next(store, objects, monkeypatch):
    other = await opened(objects)
    one, _ = await two_versions(store)
    await store.set_alias("tiny", "stable", one, None)
    entries = objects.entries

    async def no_manifests(prefix):
        if prefix == "manifests":
            raise StoreError("away")
        return await entries(prefix)

    monkeypatch.setattr(objects, "entries", no_manifests)
    with pytest.raises(StoreError):
        await other.refresh()
    monkeypatch.undo()
    assert await other.refresh()
    assert (await other.resolve("tiny")).digest == one[0].digest


async def test_an_alias_that_a_delete_came_across_is_shown_to_watchers(store, objects, monkeypatch):
    one, _ = await two_versions(store)
    delete = objects.delete

    async def crossed(path):
        await delete(path)
        objects.data.setdefault(AliasKey("tiny", "stable", 1).path, record_bytes(one, 0))

    monkeypatch.setattr(objects, "delete", crossed)
    before = store.generation
    assert (await refusal(store.delete_version(one[0].digest))).reason == "MODEL_IN_USE"
    assert store.generation > before
    assert (await store.resolve("tiny")).digest == one[0].digest
