"""What is garbage, and that nothing is that somebody works with."""

import asyncio
import json
import random
from contextlib import AsyncExitStack

import pytest

from services.modelstore import pins as pins_module
from services.modelstore.adapters.memory import MemoryObjects
from services.modelstore.core.aliases import AliasKey, Target, record_bytes
from services.modelstore.core.manifest import blob_path, conversion_path, digest_of, manifest_path
from services.modelstore.core.ports import StoreError
from services.modelstore.core.refusal import Refused
from services.modelstore.garbage import Collector
from services.modelstore.pins import COLLECTIONS, EXPIRES_S, PINS, Pins
from services.modelstore.store import Store
from tests.unit.modelstore.made import manifest
from tokenloom.kit.clock import FakeClock

OLD_MS = round(EXPIRES_S * 1000) * 10
MIN_AGE_S = 60.0


class House:
    """A store, and one who collects its garbage."""

    def __init__(self, objects=None):
        self.objects = objects or MemoryObjects()
        self.objects.unix_ms = OLD_MS
        self.clock = FakeClock(OLD_MS / 1000)
        self.store = Store(self.objects, self.clock)
        self.swept = 0
        self.collector = self.another_collector()

    def another_collector(self):
        return Collector(Store(self.objects, self.clock), self.objects, self.clock, self._sweep, MIN_AGE_S)

    def _sweep(self):
        self.swept += 1
        return 0

    def blob(self, content, age_s=MIN_AGE_S + 1):
        digest = digest_of(content)
        self.objects.data[blob_path(digest)] = content
        self.objects.modified[blob_path(digest)] = OLD_MS - round(age_s * 1000)
        return digest

    def has(self, digest):
        return blob_path(digest) in self.objects.data

    async def version(self, content=b"{}"):
        self.blob(content)
        return (await self.store.publish(manifest(content=content), "x"))[0]

    async def collect(self, dry_run=False, min_age_ms=0):
        return await self.collector.run(dry_run, min_age_ms)


@pytest.fixture
async def house():
    return House()


async def test_a_blob_that_no_version_names_is_deleted_and_the_others_are_kept(house):
    version, orphan = await house.version(), house.blob(b"orphan")
    done = await house.collect()
    assert [(file.digest, file.size_bytes) for file in done.deleted] == [(orphan, 6)]
    assert (done.kept_blobs, done.kept_bytes, done.spared_blobs) == (1, 2, 0)
    assert not house.has(orphan)
    assert house.has(version.blobs[0])
    assert house.swept == 1


async def test_a_dry_run_says_the_same_and_changes_nothing(house):
    await house.version()
    house.blob(b"orphan")
    before = dict(house.objects.data)
    told = await house.collect(dry_run=True)
    assert house.objects.data == before
    assert house.swept == 0
    assert await house.collect() == told


async def test_the_blobs_of_a_deleted_version_are_garbage(house):
    version = await house.version()
    await house.store.delete_version(version.digest)
    await house.collect()
    assert not house.has(version.blobs[0])


@pytest.mark.parametrize(("min_age_ms", "stays"), [(0, True), (60_000, True), (10_000, False)])
async def test_young_blobs_are_spared(house, min_age_ms, stays):
    young = house.blob(b"young", age_s=30)
    done = await house.collect(min_age_ms=min_age_ms)
    assert house.has(young) is stays
    assert done.spared_blobs == stays


async def test_ages_are_told_by_the_stores_clock_not_by_the_machines(house):
    young = house.blob(b"young", age_s=30)
    house.clock.advance(1_000_000)
    await house.collect()
    assert house.has(young)


async def test_a_pinned_blob_is_spared_until_the_pin_is_gone(house):
    blob = house.blob(b"pinned")
    async with Pins(house.objects).hold([blob]):
        assert (await house.collect()).spared_blobs == 1
        assert house.has(blob)
    await house.collect()
    assert not house.has(blob)


async def test_a_pin_whose_process_died_counts_for_a_while_and_is_then_removed(house):
    blob = house.blob(b"pinned")
    path = f"{PINS}/dead.json"
    house.objects.data[path] = json.dumps({"digests": [blob]}).encode()
    house.objects.modified[path] = OLD_MS - round(EXPIRES_S * 1000)
    await house.collect()
    assert house.has(blob)
    house.objects.modified[path] -= 1
    await house.collect()
    assert not house.has(blob)
    assert path not in house.objects.data


async def test_a_blob_of_a_manifest_that_cannot_be_read_is_kept(house):
    """Of a later schema, or damaged: whoever can read it needs the blob."""
    blob = house.blob(b"later")
    later = json.dumps({"schema": 99, "parts": [{"hash": blob}]}).encode()
    house.objects.data[manifest_path(digest_of(later))] = later
    damaged = house.blob(b"damaged")
    house.objects.data[manifest_path("sha256:" + "0" * 64)] = b'{"files":[{"digest":"' + damaged.encode()
    done = await house.collect()
    assert (done.deleted, done.kept_blobs) == ([], 2)


async def test_strange_files_beside_blobs_are_left_alone(house):
    house.objects.data["blobs/sha256/notes.txt"] = b""
    await house.collect()
    assert "blobs/sha256/notes.txt" in house.objects.data


async def test_records_of_conversions_whose_blobs_are_gone_go_too(house):
    kept, gone = (await house.version()).blobs[0], house.blob(b"gone")
    for recipe, digests in (("0", [kept]), ("1", [kept, gone]), ("2", [])):
        record = json.dumps({"files": [{"digest": digest} for digest in digests]}).encode()
        house.objects.data[conversion_path("sha256:" + recipe * 64)] = record
    house.objects.data[conversion_path("sha256:" + "3" * 64)] = b"nonsense"
    await house.collect()
    left = [path[-6] for path in house.objects.data if path.startswith("conversions/")]
    assert sorted(left) == ["0", "2"]


async def test_what_a_collection_announced_is_gone_afterwards(house):
    house.blob(b"orphan")
    await house.collect()
    assert not await house.objects.entries(COLLECTIONS)


async def test_a_collection_that_fails_leaves_no_announcement_and_is_repeated(house, monkeypatch):
    orphans = [house.blob(b"%d" % n) for n in range(3)]
    delete = house.objects.delete

    async def no_second_blob(path):
        if path == blob_path(orphans[1]):
            raise StoreError("away")
        await delete(path)

    monkeypatch.setattr(house.objects, "delete", no_second_blob)
    with pytest.raises(StoreError):
        await house.collect()
    assert not await house.objects.entries(COLLECTIONS)
    monkeypatch.undo()
    await house.collect()
    assert not any(map(house.has, orphans))


async def test_a_collection_that_was_held_up_stops_before_others_take_it_for_dead(house, monkeypatch):
    orphan = house.blob(b"orphan")
    judge = house.collector._judge

    async def slowly(*arguments):
        found = await judge(*arguments)
        house.clock.advance(EXPIRES_S)
        return found

    monkeypatch.setattr(house.collector, "_judge", slowly)
    with pytest.raises(StoreError, match="held up"):
        await house.collect()
    assert house.has(orphan)


async def test_whoever_needs_a_blob_waits_until_its_deletion_is_over(house):
    blob, path = house.blob(b"condemned"), f"{COLLECTIONS}/other.json"
    house.objects.data[path] = json.dumps({"digests": [blob]}).encode()
    house.objects.modified[path] = OLD_MS
    pinning = asyncio.create_task(pinned(house.objects, blob))
    waited, _ = await asyncio.wait([pinning], timeout=3 * pins_module.COLLECTION_LOOK_S)
    assert not waited
    del house.objects.data[path]
    await asyncio.wait_for(pinning, 10)


async def pinned(objects, *digests):
    async with Pins(objects).hold(digests):
        assert await objects.entries(PINS)


async def test_other_blobs_and_dead_collections_are_not_waited_for(house):
    blob = house.blob(b"condemned")
    for name, digests, modified in (("other", ["sha256:0"], OLD_MS), ("dead", [blob], 0)):
        path = f"{COLLECTIONS}/{name}.json"
        house.objects.data[path] = json.dumps({"digests": digests}).encode()
        house.objects.modified[path] = modified
    await asyncio.wait_for(pinned(house.objects, blob), 10)
    assert not await house.objects.entries(PINS)


async def test_a_deletion_that_does_not_end_is_a_refusal_to_be_tried_again(house, monkeypatch):
    monkeypatch.setattr(pins_module, "COLLECTION_WAIT_MAX_S", 0.01)
    monkeypatch.setattr(pins_module, "COLLECTION_LOOK_S", 0.001)
    blob, path = house.blob(b"condemned"), f"{COLLECTIONS}/other.json"
    house.objects.data[path] = json.dumps({"digests": [blob]}).encode()
    house.objects.modified[path] = OLD_MS
    with pytest.raises(Refused, match="garbage collection is deleting") as caught:
        await pinned(house.objects, blob)
    assert caught.value.reason == "SERVICE_UNAVAILABLE"
    assert not await house.objects.entries(PINS)


@pytest.mark.parametrize("failures", [0, 2])
async def test_pins_are_renewed_while_their_process_lives_also_after_a_failure(house, monkeypatch, failures):
    monkeypatch.setattr(pins_module, "RENEW_S", 0)
    put, renewed, written = house.objects.put, asyncio.Event(), []

    async def sometimes(path, data):
        written.append((path, data))
        if 1 < len(written) < failures + 2:
            raise StoreError("away")
        await put(path, data)
        if len(written) > 1:
            renewed.set()

    monkeypatch.setattr(house.objects, "put", sometimes)
    async with Pins(house.objects).hold([house.blob(b"pinned")]):
        await asyncio.wait_for(renewed.wait(), 10)
    assert len(written) >= failures + 2
    assert len(set(written)) == 1


async def import_again(house, content):
    """As an import whose blob may be there already does it."""
    digest = digest_of(content)
    async with house.store.pins.hold() as pin:
        await pin.add([digest])
        if await house.objects.size(blob_path(digest)) is None:
            await house.objects.put(blob_path(digest), content)
        return await house.store.publish(manifest(content=content), "x")


class Unsteady(MemoryObjects):
    """Each call takes as long as a draw says, so that seeds are orders of events."""

    def __init__(self, seed):
        super().__init__()
        self._draw = random.Random(seed)

    async def _wait(self):
        for _ in range(self._draw.randrange(12)):
            await asyncio.sleep(0)

    async def create(self, path, data):
        await self._wait()
        return await super().create(path, data)

    async def put(self, path, data):
        await self._wait()
        await super().put(path, data)

    async def entries(self, prefix):
        found = await super().entries(prefix)
        await self._wait()
        return found

    async def delete(self, path):
        await self._wait()
        await super().delete(path)


SEEDS = 60
TURNS_MAX = 160
"""About as many as a collection takes."""


async def in_some_order(seed, *work):
    """Run all, each begun at another moment."""
    draw = random.Random(seed)

    async def later(part, turns):
        for _ in range(turns):
            await asyncio.sleep(0)
        return await part

    begun = [later(part, draw.randrange(TURNS_MAX)) for part in work]
    return await asyncio.gather(*begun, return_exceptions=True)


async def test_an_import_beside_a_collection_is_whole(monkeypatch):
    monkeypatch.setattr(pins_module, "COLLECTION_LOOK_S", 0)
    deleted = 0
    for seed in range(SEEDS):
        house = House(Unsteady(seed))
        house.blob(b"{}")
        collected, imported = await in_some_order(seed, house.collect(), import_again(house, b"{}"))
        assert house.has(imported[0].blobs[0]), seed
        deleted += bool(collected.deleted)
    # Both were met: a collection that found the blob unused, and one that found it used.
    assert SEEDS / 10 < deleted < SEEDS * 9 / 10


async def test_a_version_that_is_deleted_while_an_alias_comes_to_name_it_is_whole_or_gone(monkeypatch):
    monkeypatch.setattr(pins_module, "COLLECTION_LOOK_S", 0)
    endings = set()
    for seed in range(SEEDS):
        house = House(Unsteady(seed))
        version = await house.version()
        other, fresh = (Store(house.objects, house.clock) for _ in range(2))
        await other.refresh()
        work = (
            house.store.delete_version(version.digest),
            other.set_alias("tiny", "stable", [Target(version.digest)], None),
            house.collect(),
            house.another_collector().run(False, 0),
        )
        await in_some_order(seed, *work)
        await fresh.refresh()
        for found in fresh.catalogue.versions.values():
            assert all(map(house.has, found.blobs)), seed
        endings.add((bool(fresh.catalogue.versions), house.has(version.blobs[0])))
    assert {(True, True), (False, False)} <= endings


async def test_a_collection_between_a_delete_and_its_undoing_takes_nothing(house, monkeypatch):
    version = await house.version()
    delete = house.objects.delete

    async def then_collect(path):
        await delete(path)
        if path == manifest_path(version.digest):
            house.objects.data[AliasKey("tiny", "stable", 1).path] = record_bytes([Target(version.digest)], 0)
            await house.collect()

    monkeypatch.setattr(house.objects, "delete", then_collect)
    with pytest.raises(Refused, match="is named by tiny@stable"):
        await house.store.delete_version(version.digest)
    assert manifest_path(version.digest) in house.objects.data
    assert house.has(version.blobs[0])


async def test_a_delete_and_a_collection_while_an_alias_is_set_take_nothing(house, monkeypatch):
    version = await house.version()
    create, other = house.objects.create, Store(house.objects, house.clock)

    async def first_delete_and_collect(path, data):
        if path == AliasKey("tiny", "stable", 1).path:
            await other.delete_version(version.digest)
            await house.collect()
        return await create(path, data)

    monkeypatch.setattr(house.objects, "create", first_delete_and_collect)
    await house.store.set_alias("tiny", "stable", [Target(version.digest)], None)
    assert (await house.store.resolve("tiny")).digest == version.digest
    assert house.has(version.blobs[0])


async def test_an_import_that_ends_while_a_collection_judges_is_seen_by_its_pin_or_by_its_version(
    house, monkeypatch
):
    blob, asked = house.blob(b"{}"), []
    put, entries = house.objects.put, house.objects.entries
    async with AsyncExitStack() as pinned:

        async def begin_before_the_announcement(path, data):
            if path.startswith(COLLECTIONS) and blob.encode() in data:
                await pinned.enter_async_context(house.store.pins.hold([blob]))
                asked.append("")
            await put(path, data)

        async def end_between_the_two_looks(prefix):
            if asked and prefix in (PINS, "manifests") and prefix not in asked:
                asked.append(prefix)
                if len(asked) == 3:
                    await house.store.publish(manifest(), "x")
                    await pinned.aclose()
            return await entries(prefix)

        monkeypatch.setattr(house.objects, "put", begin_before_the_announcement)
        monkeypatch.setattr(house.objects, "entries", end_between_the_two_looks)
        await house.collect()
    assert len(asked) == 3
    assert house.has(blob)


async def test_more_than_is_announced_at_a_time_goes_all_the_same(house, monkeypatch):
    monkeypatch.setattr("services.modelstore.garbage.ANNOUNCED_MAX", 2)
    orphans = [house.blob(b"%d" % n) for n in range(5)]
    assert len((await house.collect()).deleted) == 5
    assert not any(map(house.has, orphans))
