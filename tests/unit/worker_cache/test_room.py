"""What leaves so that a version can come, and what is refused instead."""

import asyncio
import os
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.adapters import cache_room
from services.worker.adapters.blobfile import Blob, FileLock, hex_of
from services.worker.adapters.weights import WeightCache
from tests.unit.worker_cache.fakes import Source, broken, data_of, digest_of, version_of
from tokenloom.kit.errors import CallError

SIZE = 5000
BLOBS = {name: data_of(SIZE, seed) for seed, name in enumerate("abcd")}
SHARED = data_of(SIZE, 99)
MODELS = {name: version_of(name, blob) for name, blob in BLOBS.items()}
SOURCE_BLOBS = [*BLOBS.values(), SHARED]


def cache_of(folder, models_max, **bounds):
    source = Source.of(*SOURCE_BLOBS)
    return WeightCache(folder, source, attempts_max=1, bytes_max=models_max * SIZE, **bounds)


async def bring(cache, version, *, keep=False):
    folder = await cache.folder(version, lambda _: None)
    if not keep:
        cache.release(version.digest)
    return folder


def used(folder, name, at):
    """As if the version had last been used then."""
    os.utime(folder / "versions" / f"{hex_of(MODELS[name].digest)}.json", (at, at))


def here(folder):
    """Which of the models have their folder and their blob."""
    names = []
    for name, version in MODELS.items():
        blob = Blob(folder / "blobs" / "sha256" / hex_of(version.files[0].digest))
        there = (folder / "models" / hex_of(version.digest)).exists()
        assert there == blob.is_whole(SIZE)
        if there:
            names.append(name)
    return "".join(names)


async def test_the_version_that_was_not_used_for_longest_leaves(tmp_path):
    cache = cache_of(tmp_path, 3)
    for at, name in enumerate("bca"):
        await bring(cache, MODELS[name])
        used(tmp_path, name, at)
    await bring(cache, MODELS["d"])
    assert here(tmp_path) == "acd"
    used(tmp_path, "a", 0)
    await bring(cache, MODELS["b"])
    assert here(tmp_path) == "bcd"


async def test_use_of_a_version_counts_until_it_is_released(tmp_path):
    cache = cache_of(tmp_path, 2)
    await bring(cache, MODELS["a"], keep=True)
    await bring(cache, MODELS["b"])
    used(tmp_path, "a", 0)
    cache.release(MODELS["a"].digest)
    used(tmp_path, "b", 1)
    await bring(cache, MODELS["c"])
    assert here(tmp_path) == "ac"


async def test_without_a_bound_nothing_leaves(tmp_path):
    cache = cache_of(tmp_path, 0)
    for name in "abcd":
        await bring(cache, MODELS[name])
    assert here(tmp_path) == "abcd"


async def test_a_version_in_use_by_another_worker_never_leaves(tmp_path):
    other, cache = cache_of(tmp_path, 2), cache_of(tmp_path, 2)
    await bring(other, MODELS["a"], keep=True)
    used(tmp_path, "a", 0)
    await bring(cache, MODELS["b"])
    await bring(cache, MODELS["c"])
    assert here(tmp_path) == "ac"


async def test_versions_that_fill_the_cache_and_are_in_use_refuse_another_for_now(tmp_path):
    cache = cache_of(tmp_path, 2)
    await bring(cache, MODELS["a"], keep=True)
    await bring(cache, MODELS["b"], keep=True)
    with pytest.raises(CallError, match=r"10000 of 10000 belong.*CACHE_BYTES_MAX") as busy:
        await bring(cache, MODELS["c"])
    assert busy.value.reason == "MODEL_MEMORY_BUSY"
    assert busy.value.metadata == {"needed_bytes": "5000", "free_bytes": "0", "budget_bytes": "10000"}
    assert busy.value.retry_after_s
    assert here(tmp_path) == "ab"
    cache.release(MODELS["a"].digest)
    await bring(cache, MODELS["c"])
    assert here(tmp_path) == "bc"


async def test_nothing_leaves_for_a_version_that_will_not_fit_anyway(tmp_path):
    cache = cache_of(tmp_path, 3)
    for name in "abc":
        await bring(cache, MODELS[name], keep=name == "a")
    huge = version_of("huge", *(data_of(SIZE, seed) for seed in (20, 21, 22)))
    with pytest.raises(CallError) as busy:
        await bring(cache, huge)
    assert busy.value.reason == "MODEL_MEMORY_BUSY"
    assert here(tmp_path) == "abc"


async def test_what_can_never_fit_is_refused_with_numbers(tmp_path):
    cache = cache_of(tmp_path, 1)
    with pytest.raises(CallError, match="raise TOKENLOOM_WORKER_CACHE_BYTES_MAX") as refused:
        await bring(cache, version_of("two", BLOBS["a"], BLOBS["b"]))
    assert refused.value.reason == "MODEL_TOO_LARGE"
    assert refused.value.metadata == {"needed_bytes": "10000", "available_bytes": "5000"}
    await bring(cache, MODELS["a"])


async def test_a_blob_that_another_version_needs_stays(tmp_path):
    cache = cache_of(tmp_path, 3)
    first, second = version_of("first", SHARED, BLOBS["a"]), version_of("second", SHARED, BLOBS["b"])
    await bring(cache, first)
    await bring(cache, second)
    await bring(cache, MODELS["c"])
    source = Source.of()
    kept = WeightCache(tmp_path, source, attempts_max=1)
    await bring(kept, second)
    assert not source.asked, "the shared blob and the second one are here"


async def test_a_broken_download_is_kept_until_its_room_is_needed(tmp_path):
    cache = cache_of(tmp_path, 2)
    cache._downloads._source.fault = lambda piece: broken("PERMISSION_DENIED") if piece != b"" else piece
    with pytest.raises(CallError):
        await bring(cache, MODELS["a"])
    blob = Blob(tmp_path / "blobs" / "sha256" / hex_of(digest_of(BLOBS["a"])))
    assert blob.part.exists()
    again = cache_of(tmp_path, 2)
    await bring(again, MODELS["b"])
    assert blob.part.exists()
    await bring(again, MODELS["c"])
    assert not blob.part.exists()
    assert here(tmp_path) == "bc"


async def test_files_that_no_record_names_leave_first(tmp_path):
    """As an older release left them: a folder of links, and blobs."""
    cache = cache_of(tmp_path, 2)
    await bring(cache, MODELS["a"])
    used(tmp_path, "a", 0)
    stray = tmp_path / "blobs" / "sha256" / ("e" * 64)
    stray.write_bytes(bytes(SIZE))
    old = tmp_path / "models" / ("f" * 64)
    old.mkdir()
    os.link(stray, old / "w")
    await bring(cache, MODELS["b"])
    assert here(tmp_path) == "ab"
    assert not stray.exists()
    assert not old.exists()


async def test_a_full_disk_is_refused_with_numbers_and_the_cure(tmp_path, monkeypatch):
    def full(_):
        return SimpleNamespace(f_bavail=cache_room.DISK_KEEP_BYTES + 3000, f_frsize=1)

    monkeypatch.setattr(cache_room.os, "statvfs", full)
    with pytest.raises(CallError, match=r"needs 5000 more bytes.*room for 3000.*CACHE_BYTES_MAX") as refused:
        await bring(cache_of(tmp_path, 0), MODELS["a"])
    assert refused.value.reason == "MODEL_TOO_LARGE"
    assert refused.value.metadata == {"needed_bytes": "5000", "available_bytes": "3000"}
    assert not list((tmp_path / "versions").glob("*.json"))


async def test_a_full_disk_makes_versions_leave_when_a_bound_is_set(tmp_path, monkeypatch):
    cache = cache_of(tmp_path, 3)
    await bring(cache, MODELS["a"])
    nothing = SimpleNamespace(f_bavail=cache_room.DISK_KEEP_BYTES, f_frsize=1)
    monkeypatch.setattr(cache_room.os, "statvfs", lambda _: nothing)
    await bring(cache, MODELS["b"])
    assert here(tmp_path) == "b"
    await bring(cache, MODELS["b"], keep=True)
    with pytest.raises(CallError, match="room for 0 beside the models that workers of this node use") as busy:
        await bring(cache, MODELS["c"])
    assert busy.value.reason == "MODEL_MEMORY_BUSY", "it fits once b is unloaded"
    assert busy.value.metadata == {"needed_bytes": "5000", "free_bytes": "0", "budget_bytes": "15000"}
    with pytest.raises(CallError, match=r"needs 10000 more bytes .* room for 5000: free some") as never:
        await bring(cache, version_of("two", BLOBS["c"], BLOBS["d"]))
    assert never.value.reason == "MODEL_TOO_LARGE"


async def test_what_is_linked_from_the_store_takes_no_room(tmp_path):
    place = tmp_path / "store" / "blobs" / "sha256"
    place.mkdir(parents=True)
    for data in BLOBS.values():
        (place / hex_of(digest_of(data))).write_bytes(data)
    folder = tmp_path / "cache"
    cache = cache_of(folder, 1, store_dir=tmp_path / "store")
    for name in "abcd":
        await bring(cache, MODELS[name])
    assert here(folder) == "abcd"
    await bring(cache, version_of("fetched", SHARED))
    assert here(folder) == "abcd"
    (place / hex_of(digest_of(BLOBS["a"]))).unlink()
    await bring(cache, MODELS["b"])
    assert here(folder) == "bcd", "the link was the last name of a, so a took room"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_bound_holds_after_every_step_and_nothing_in_use_is_missing(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    caches = [cache_of(folder, 2) for _ in range(2)]
    held = [set(), set()]

    async def step(who, name, keep):
        if len({*held[0], *held[1], name}) > 2:
            with pytest.raises(CallError, match="unload one"):
                await bring(caches[who], MODELS[name])
            return
        await bring(caches[who], MODELS[name], keep=keep or name in held[who])
        if keep:
            held[who].add(name)

    moves = st.tuples(st.sampled_from("abcdr"), st.integers(0, 1), st.booleans())
    for name, who, keep in data.draw(st.lists(moves, max_size=12)):
        if name == "r":
            for kept in held[who]:
                caches[who].release(MODELS[kept].digest)
            held[who].clear()
        else:
            asyncio.run(step(who, name, keep))
        there = here(folder)
        assert len(there) <= 2
        assert {*held[0], *held[1]} <= set(there)


def test_a_lock_whose_file_was_taken_away_is_taken_on_the_new_one(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.try_acquire()
    assert not second.try_acquire()
    first.release(remove=True)
    assert second.try_acquire()
    assert not first.try_acquire()
    second.release()


def test_a_lease_is_shared_and_keeps_others_from_having_it_alone(tmp_path):
    one, two = (FileLock(tmp_path / "lease", shared=True) for _ in range(2))
    alone = FileLock(tmp_path / "lease")
    assert one.try_acquire()
    assert two.try_acquire()
    one.release()
    assert not alone.try_acquire()
    two.release()
    assert alone.try_acquire()
    alone.release()
