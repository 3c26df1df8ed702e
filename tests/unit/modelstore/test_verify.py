"""What Verify finds, how far it says it is, and that it stops."""

import asyncio
import threading

import pytest

from services.modelstore import verify as verify_module
from services.modelstore.adapters.memory import MemoryObjects
from services.modelstore.core.checks import HISTORY_MAX, check_alias_name, check_history, check_min_age
from services.modelstore.core.manifest import (
    File,
    blob_path,
    digest_of,
    import_path,
    make_manifest,
    manifest_path,
)
from services.modelstore.core.ports import Progress
from services.modelstore.core.refusal import Refused
from services.modelstore.store import Store
from services.modelstore.verify import Damaged, Verified, Verifier
from tests.unit.modelstore.made import facts
from tokenloom.kit.clock import FakeClock


class House:
    """A store and one who verifies it."""

    def __init__(self, threads=2):
        self.objects = MemoryObjects()
        self.store = Store(self.objects, FakeClock())
        self.verifier = Verifier(self.store, self.objects, threads)

    async def version(self, name, *contents):
        files = [File(f"{n}", digest_of(data), len(data)) for n, data in enumerate(contents)]
        for data in contents:
            await self.objects.put(blob_path(digest_of(data)), data)
        return (await self.store.publish(make_manifest(name, facts(), files), "x"))[0]

    async def verify(self, model=""):
        """Damages, the end, and the progress."""
        events = [event async for event in self.verifier.run(model)]
        assert isinstance(events[-1], Verified)
        damages = [event for event in events if isinstance(event, Damaged)]
        return damages, events[-1], [event for event in events if isinstance(event, Progress)]


@pytest.fixture
async def house():
    return House()


async def test_a_whole_store_is_verified_to_its_last_byte(house):
    await house.version("m", b"one", b"three")
    await house.version("n", b"three")
    damages, end, progress = await house.verify()
    assert (damages, end) == ([], Verified(versions=2, blobs=2, bytes=8, damaged=0))
    assert progress[-1] == Progress("verify", 8, 8)


async def test_one_model_is_verified_alone(house):
    version = await house.version("m", b"one")
    await house.version("n", b"damaged")
    house.objects.data[blob_path(digest_of(b"damaged"))] = b"Damaged"
    _, end, _ = await house.verify(f"m@{version.digest}")
    assert end == Verified(versions=1, blobs=1, bytes=3, damaged=0)


async def test_a_name_that_means_nothing_is_refused(house):
    for model, reason in (("nope", "MODEL_NOT_FOUND"), ("a b", "FIELD_INVALID")):
        with pytest.raises(Refused) as caught:
            await house.verify(model)
        assert caught.value.reason == reason


async def test_every_kind_of_damage_is_found_with_the_versions_that_need_it(house):
    first = await house.version("m", b"flipped", b"short", b"missing")
    second = await house.version("n", b"flipped")
    flipped, short, missing = (digest_of(data) for data in (b"flipped", b"short", b"missing"))
    house.objects.data[blob_path(flipped)] = b"Flipped"
    house.objects.data[blob_path(short)] = b"shor"
    del house.objects.data[blob_path(missing)]
    damages, end, _ = await house.verify()
    found = {damage.digest: (set(damage.versions), damage.problem) for damage in damages}
    assert found == {
        flipped: ({first.digest, second.digest}, f"wrong digest: {digest_of(b'Flipped')}"),
        short: ({first.digest}, "wrong size: 4 bytes, its manifest says 5"),
        missing: ({first.digest}, "missing: 7 bytes"),
    }
    assert (end.versions, end.blobs, end.damaged) == (2, 2, 3)


async def test_a_blob_that_no_version_names_is_verified_too(house):
    house.objects.data[blob_path(digest_of(b"orphan"))] = b"Orphan"
    damages, _, _ = await house.verify()
    assert [(damage.digest, damage.versions) for damage in damages] == [(digest_of(b"orphan"), ())]


async def test_a_damaged_manifest_is_found(house):
    version = await house.version("m", b"one")
    data = house.objects.data[manifest_path(version.digest)] + b" "
    house.objects.data[manifest_path(version.digest)] = data
    damages, _, _ = await house.verify()
    problem = f"wrong digest: its manifest has {digest_of(data)}"
    assert damages == [Damaged(version.digest, (version.digest,), f"{problem}; it was imported from x")]
    del house.objects.data[import_path(version.digest)]
    damages, _, _ = await house.verify()
    assert damages == [Damaged(version.digest, (version.digest,), problem)]


async def test_long_blobs_are_read_in_pieces(house, monkeypatch):
    monkeypatch.setattr(verify_module, "READ_BYTES", 3)
    await house.version("m", b"ten bytes!", b"")
    assert (await house.verify())[:2] == ([], Verified(1, 2, 10, 0))


async def test_a_blob_that_goes_while_it_is_read_is_missing_only_if_it_is_needed(house, monkeypatch):
    version = await house.version("m", b"needed")
    house.objects.data[blob_path(digest_of(b"orphan"))] = b"orphan"

    async def read(path, start, end):
        raise FileNotFoundError(path)

    monkeypatch.setattr(house.objects, "read", read)
    damages, _, _ = await house.verify()
    assert [damage.versions for damage in damages] == [(version.digest,)]


async def test_as_many_blobs_are_read_at_once_as_was_said_also_by_two_calls(monkeypatch):
    house = House(threads=3)
    await house.version("m", *(b"%d" % n for n in range(12)))
    at_once, most = 0, 0
    all_in = asyncio.Event()
    read = house.objects.read

    async def counted(path, start, end):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        if at_once == 3:
            all_in.set()
        await asyncio.wait_for(all_in.wait(), 10)
        data = await read(path, start, end)
        at_once -= 1
        return data

    monkeypatch.setattr(house.objects, "read", counted)
    await asyncio.gather(house.verify(), house.verify())
    assert most == 3


async def test_hashing_is_done_in_threads(house, monkeypatch):
    loops_thread, seen = threading.get_ident(), set()

    class Spy:
        def __init__(self):
            self._digest = sha256()

        def update(self, data):
            seen.add(threading.get_ident())
            self._digest.update(data)

        def hexdigest(self):
            return self._digest.hexdigest()

    sha256 = verify_module.hashlib.sha256
    await house.version("m", b"one")
    monkeypatch.setattr(verify_module.hashlib, "sha256", Spy)
    await house.verify()
    assert seen
    assert loops_thread not in seen


async def test_whoever_stops_listening_stops_the_work(house, monkeypatch):
    monkeypatch.setattr(verify_module, "PROGRESS_INTERVAL_S", 0)
    await house.version("m", b"one")
    started, ended = asyncio.Event(), asyncio.Event()

    async def read(path, start, end):
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    monkeypatch.setattr(house.objects, "read", read)
    running = house.verifier.run("")
    async for _ in running:
        if started.is_set():
            break
    await running.aclose()
    assert ended.is_set()


def test_names_and_bounds_are_checked_together():
    assert check_history("m", "stable", HISTORY_MAX) == []
    problems = check_history("a b", "", HISTORY_MAX + 1)
    assert [field for field, _ in problems] == ["model", "alias", "limit"]
    assert check_alias_name("m", "stable") == []
    assert check_min_age(0) == []
    assert [field for field, _ in check_min_age(2**63)] == ["min_age_ms"]
