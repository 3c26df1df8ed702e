"""The cache as a whole, over a source that breaks off, spoils bytes, and processes that end at any moment."""

import asyncio
import os
import random
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.adapters import cache_download
from services.worker.adapters.blobfile import Blob, FileLock
from services.worker.adapters.weights import WeightCache
from services.worker.front.ports import FileRef, ModelVersion
from tests.unit.worker_cache.fakes import CHUNK_BYTES, Source, broken, data_of, digest_of, version_of
from tokenloom.kit.errors import CallError

BIG, SMALL = data_of(40 * CHUNK_BYTES + 17), data_of(3, 1)
MODEL = version_of("m", BIG, SMALL, b"")


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch):
    monkeypatch.setattr(cache_download, "RANGE_BYTES_MIN", 3500)
    monkeypatch.setattr(cache_download, "RANGE_BYTES_MAX", 7000)
    monkeypatch.setattr(cache_download, "HASH_STEP_BYTES", 2000)
    monkeypatch.setattr(cache_download, "HASH_SLICE_BYTES", 1500)
    monkeypatch.setattr(cache_download, "FLUSH_BYTES", 9000)
    monkeypatch.setattr(cache_download, "RETRY_PAUSE_S", 0.0)


def cache_of(folder, source, **bounds):
    return WeightCache(folder, source, **{"attempts_max": 4, **bounds})


def silent(_):
    pass


def files_in(folder):
    return [(folder / f"{i}.bin").read_bytes() for i in range(3)]


def blob_of(folder, data):
    return Blob(folder / "blobs" / "sha256" / digest_of(data).removeprefix("sha256:"))


def whole_blobs_are_right(folder):
    """Whatever has its final name has the digest that the name says."""
    blobs = [path for path in (folder / "blobs" / "sha256").glob("*") if not path.suffix]
    return all(digest_of(path.read_bytes()) == f"sha256:{path.name}" for path in blobs)


async def test_several_ranges_of_several_files_come_at_once_within_the_bound(tmp_path):
    source, heard = Source.of(BIG, SMALL, b""), []
    folder = await cache_of(tmp_path, source, streams_max=3).folder(MODEL, heard.append)
    assert files_in(tmp_path / folder) == [BIG, SMALL, b""]
    assert source.active_max == 3
    assert source.sent == len(BIG) + len(SMALL), "each byte once"
    assert sorted(offset for digest, offset, _ in source.asked if digest == digest_of(BIG)) == [
        *range(0, len(BIG), 7000)
    ]
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


async def test_a_version_that_is_here_asks_nobody(tmp_path):
    source = Source.of(BIG, SMALL, b"")
    await cache_of(tmp_path, source).folder(MODEL, silent)
    asked = len(source.asked)
    await cache_of(tmp_path, source).folder(MODEL, silent)
    assert len(source.asked) == asked


class Killed(BaseException):
    """Stands for kill -9: nothing of ours runs after it but what Python does to end the loop."""


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_of_faults_and_kills_ends_with_the_right_file_and_never_a_wrong_one(
    tmp_path_factory, data
):
    folder = tmp_path_factory.mktemp("cache")
    rng = random.Random(data.draw(st.integers(0, 1 << 32)))
    fault_share = data.draw(st.floats(0, 0.2))
    lives = data.draw(st.lists(st.integers(1, 60), max_size=6))
    source, left = Source.of(BIG, SMALL, b""), [0]

    def spoilt(piece):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        if rng.random() >= fault_share:
            return piece
        return rng.choice([b"", piece[: len(piece) // 2], broken(), rng.randbytes(len(piece)), piece * 9])

    async def live():
        return await cache_of(folder, source).folder(MODEL, silent)

    source.fault = spoilt
    for left[0] in lives:
        try:
            asyncio.run(live())
        except (Killed, CallError):
            assert whole_blobs_are_right(folder)
    source.fault = lambda piece: piece
    assert files_in(folder / asyncio.run(live())) == [BIG, SMALL, b""]
    assert whole_blobs_are_right(folder)


async def test_a_process_that_takes_over_fetches_only_what_is_missing(tmp_path):
    source = Source.of(BIG, SMALL, b"")
    source.fault = lambda piece: broken("PERMISSION_DENIED") if source.sent > 20_000 else piece
    with pytest.raises(CallError, match="cannot fetch"):
        await cache_of(tmp_path, source).folder(MODEL, silent)
    first, source.sent, source.fault, heard = source.sent, 0, lambda piece: piece, []
    await cache_of(tmp_path, source).folder(MODEL, heard.append)
    # What four streams had received but not kept when the error came may come again.
    assert first > 20_000
    assert source.sent <= len(BIG) + len(SMALL) - first + 4 * CHUNK_BYTES
    assert next(share for share in heard if share > 0.01) > 0.3, "what was here counts as done"


async def test_a_cancelled_fetch_holds_nothing_and_goes_on_later(tmp_path):
    source = Source.of(BIG, SMALL, b"")
    half, hold = asyncio.Event(), asyncio.Event()

    class Slow(Source):
        async def fetch(self, digest, offset, length):
            async for piece in source.fetch(digest, offset, length):
                if source.sent > 20_000:
                    half.set()
                    await hold.wait()
                yield piece

    fetching = asyncio.create_task(cache_of(tmp_path, Slow()).folder(MODEL, silent))
    await half.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    lock = FileLock(blob_of(tmp_path, BIG).lock)
    assert lock.try_acquire()
    lock.release()
    hold.set()
    folder = await cache_of(tmp_path, source).folder(MODEL, silent)
    assert files_in(tmp_path / folder) == [BIG, SMALL, b""]


async def test_two_caches_on_one_folder_fetch_each_byte_once(tmp_path):
    source = Source.of(BIG, SMALL, b"")
    folders = await asyncio.gather(*(cache_of(tmp_path, source).folder(MODEL, silent) for _ in range(2)))
    assert folders[0] == folders[1]
    assert source.sent == len(BIG) + len(SMALL)


async def test_a_blob_that_changed_on_the_disk_is_found_and_fetched_anew(tmp_path):
    source = Source.of(BIG, SMALL, b"")
    folder = tmp_path / await cache_of(tmp_path, source).folder(MODEL, silent)
    spoilt = bytearray(BIG)
    spoilt[1234] ^= 1
    blob_of(tmp_path, BIG).path.write_bytes(spoilt)
    assert files_in(folder)[0] == spoilt, "the version's file is the blob"
    again = tmp_path / await cache_of(tmp_path, source).folder(MODEL, silent)
    assert files_in(again)[0] == BIG
    assert source.sent == 2 * len(BIG) + len(SMALL)


async def test_blobs_without_a_marker_are_hashed_not_fetched(tmp_path):
    """A cache of an older release, or a kill between name and marker."""
    source = Source.of(BIG, SMALL, b"")
    await cache_of(tmp_path, source).folder(MODEL, silent)
    blob_of(tmp_path, BIG).marker.unlink()
    asked = len(source.asked)
    await cache_of(tmp_path, source).folder(MODEL, silent)
    assert len(source.asked) == asked
    assert blob_of(tmp_path, BIG).is_verified(len(BIG))


async def test_wrong_bytes_are_a_digest_mismatch_and_leave_nothing(tmp_path):
    source = Source.of(BIG)
    source.blobs[digest_of(BIG)] = data_of(len(BIG), 7)
    with pytest.raises(CallError) as wrong:
        await cache_of(tmp_path, source).folder(version_of("m", BIG), silent)
    assert wrong.value.reason == "DIGEST_MISMATCH"
    assert not list((tmp_path / "blobs" / "sha256").glob("*.part"))


async def test_retries_end_and_what_came_stays(tmp_path):
    source = Source.of(BIG)
    source.fault = lambda piece: broken() if source.sent > 10_000 else piece
    with pytest.raises(CallError) as ended:
        await cache_of(tmp_path, source).folder(version_of("m", BIG), silent)
    assert ended.value.reason == "SERVICE_UNAVAILABLE"
    assert blob_of(tmp_path, BIG).part.exists()


async def test_one_blob_under_two_paths_comes_once(tmp_path):
    source = Source.of(BIG)
    files = tuple(FileRef(path, digest_of(BIG), len(BIG)) for path in ("a", "sub/b"))
    version = ModelVersion(digest_of(b"two"), "two", 1, 1, files=files)
    heard = []
    folder = tmp_path / await cache_of(tmp_path, source).folder(version, heard.append)
    assert (folder / "a").samefile(folder / "sub" / "b")
    assert source.sent == len(BIG)
    assert heard[-1] == 1.0


def store_of(folder, *blobs):
    place = folder / "blobs" / "sha256"
    place.mkdir(parents=True)
    for data in blobs:
        (place / digest_of(data).removeprefix("sha256:")).write_bytes(data)
    return folder


async def test_a_store_on_this_machine_is_linked_and_hashed_once(tmp_path, monkeypatch):
    store = store_of(tmp_path / "store", BIG, SMALL, b"")
    cache, source = tmp_path / "cache", Source()
    folder = await cache_of(cache, source, store_dir=store).folder(MODEL, silent)
    assert files_in(cache / folder) == [BIG, SMALL, b""]
    assert not source.asked
    assert blob_of(cache, BIG).path.samefile(store / "blobs" / "sha256" / blob_of(cache, BIG).path.name)
    monkeypatch.setattr("services.worker.adapters.weights.FileHash", None)
    assert await cache_of(cache, source, store_dir=store).folder(MODEL, silent) == folder


async def test_where_no_hard_link_can_be_made_a_symbolic_one_is(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    store = store_of(tmp_path / "store", BIG, SMALL, b"")
    cache = tmp_path / "cache"
    folder = await cache_of(cache, Source(), store_dir=store).folder(MODEL, silent)
    assert files_in(cache / folder) == [BIG, SMALL, b""]
    assert blob_of(cache, BIG).path.is_symlink()
    shutil.rmtree(store)
    source = Source.of(BIG, SMALL, b"")
    folder = await cache_of(cache, source, store_dir=store).folder(MODEL, silent)
    assert files_in(cache / folder) == [BIG, SMALL, b""], "what the store no longer has is fetched"


@pytest.mark.parametrize("linked_before", [False, True])
async def test_a_damaged_store_is_a_digest_mismatch_with_the_cure(tmp_path, linked_before):
    store = store_of(tmp_path / "store", BIG, SMALL, b"")
    cache = tmp_path / "cache"
    if linked_before:
        await cache_of(cache, Source(), store_dir=store).folder(MODEL, silent)
    name = blob_of(cache, BIG).path.name
    (store / "blobs" / "sha256" / name).write_bytes(data_of(len(BIG), 9))
    with pytest.raises(CallError, match=r"tokenloom models verify.*import its model again") as damaged:
        await cache_of(cache, Source(), store_dir=store).folder(MODEL, silent)
    assert damaged.value.reason == "DIGEST_MISMATCH"
    assert not blob_of(cache, BIG).path.exists()
    assert (store / "blobs" / "sha256" / name).exists(), "the store is never written"


async def test_a_blob_that_the_store_does_not_have_is_fetched(tmp_path):
    store = store_of(tmp_path / "store", SMALL, b"")
    source = Source.of(BIG)
    cache = tmp_path / "cache"
    folder = await cache_of(cache, source, store_dir=store).folder(MODEL, silent)
    assert files_in(cache / folder) == [BIG, SMALL, b""]


async def test_a_version_whose_last_use_cannot_be_noted_is_given_free_all_the_same(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("another user's")

    cache = cache_of(tmp_path, Source.of(BIG, SMALL, b""))
    await cache.folder(MODEL, silent)
    lease = FileLock(tmp_path / "versions" / f"{MODEL.digest.removeprefix('sha256:')}.lease")
    assert not lease.try_acquire()
    monkeypatch.setattr(os, "utime", refuse)
    cache.release(MODEL.digest)
    assert lease.try_acquire()
    lease.release()
