"""The modelstore's two adapters: a catalogue that survives breaks, texts that are kept within bounds."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
from loom.modelstore.v1 import modelstore_pb2

from services.gateway.adapters.model_text import TextLimits
from services.gateway.adapters.modelstore import BlobFetcher, ModelstoreCatalogue, catalogue_of
from services.gateway.adapters.text_store import LOADS_MAX, ModelTextStore, StoreLimits
from services.gateway.core.catalogue import Deprecation, FileRef
from tests.integration.gateway.fakes import FakeModelstore
from tests.unit.gateway.made import byte_level, files_of
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError

TOKENIZER = byte_level()


class Shop:
    """A modelstore with `a`, `b` and `c`, and a store of texts in front of it."""

    def __init__(self, modelstore, channel, pool):
        self.modelstore = modelstore
        self.channel = channel
        self.blobs = BlobFetcher(channel)
        self.texts = ModelTextStore(
            self.blobs, StoreLimits(tokenizers_max=2, file_bytes_max=1 << 20), TextLimits(1000, 1000), pool
        )

    def version(self, name):
        catalogue = catalogue_of(self.modelstore.models.values())
        return catalogue.models[name].representative()


@pytest.fixture
async def shop():
    modelstore = FakeModelstore()
    for name in "abc":
        modelstore.add(name, files_of(TOKENIZER, {"name": name}))
    channel = open_channel(await modelstore.start())
    with ThreadPoolExecutor(1) as pool:
        yield Shop(modelstore, channel, pool)
    await channel.close(None)
    await modelstore.stop()


async def test_many_who_need_one_text_wait_for_one_load(shop):
    texts = await asyncio.gather(*[shop.texts.text(shop.version("a")) for _ in range(10)])
    assert len({id(text) for text in texts}) == 1
    assert shop.modelstore.fetches == 2


async def test_one_who_leaves_does_not_take_the_load_from_the_others(shop):
    leaving = asyncio.create_task(shop.texts.text(shop.version("a")))
    staying = asyncio.create_task(shop.texts.text(shop.version("a")))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await staying is not None
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_only_the_latest_used_texts_are_kept(shop):
    a, b, c = (shop.version(name) for name in "abc")
    first = await shop.texts.text(a)
    await shop.texts.text(b)
    assert await shop.texts.text(a) is first
    await shop.texts.text(c)
    before = shop.modelstore.fetches
    assert await shop.texts.text(a) is first
    assert shop.modelstore.fetches == before
    await shop.texts.text(b)
    assert shop.modelstore.fetches == before + 2


async def test_a_text_that_a_request_holds_is_not_loaded_again_however_many_others_come(shop):
    a, b, c = (shop.version(name) for name in "abc")
    held = await shop.texts.text(a)
    await shop.texts.text(b)
    await shop.texts.text(c)
    before = shop.modelstore.fetches
    assert await shop.texts.text(a) is held
    assert shop.modelstore.fetches == before
    await shop.texts.text(b)
    await shop.texts.text(c)
    del held
    gc.collect()
    before = shop.modelstore.fetches
    await shop.texts.text(a)
    assert shop.modelstore.fetches == before + 2


async def test_a_failed_load_is_not_remembered(shop):
    version = shop.version("a")
    digest = version.file("tokenizer.json").digest
    data = shop.modelstore.blobs.pop(digest)
    with pytest.raises(CallError, match=r"did not give tokenizer\.json") as failure:
        await shop.texts.text(version)
    assert failure.value.reason == "SERVICE_UNAVAILABLE"
    shop.modelstore.blobs[digest] = data
    assert await shop.texts.text(version) is not None


async def test_a_version_without_a_tokenizer_cannot_be_used_for_text(shop):
    shop.modelstore.add("bare", {"config.json": b"{}"})
    with pytest.raises(CallError, match=r"it has no tokenizer\.json") as failure:
        await shop.texts.text(shop.version("bare"))
    assert failure.value.reason == "MODEL_UNSUPPORTED"


async def test_warming_goes_on_past_a_broken_version(shop):
    shop.modelstore.add("broken", {"tokenizer.json": b"{"})
    await shop.texts.warm([shop.version("broken"), shop.version("a")])
    before = shop.modelstore.fetches
    await shop.texts.text(shop.version("a"))
    assert shop.modelstore.fetches == before


async def test_warming_takes_nothing_away_from_those_that_are_used(shop):
    a, b, c = (shop.version(name) for name in "abc")
    await shop.texts.text(b)
    await shop.texts.text(c)
    before = shop.modelstore.fetches
    await shop.texts.warm([a, b, c])
    assert shop.modelstore.fetches == before
    await shop.texts.text(b)
    await shop.texts.text(c)
    assert shop.modelstore.fetches == before


async def test_no_more_than_a_few_texts_are_loaded_at_once(shop):
    names = [f"m{number}" for number in range(3 * LOADS_MAX)]
    for name in names:
        shop.modelstore.add(name, files_of(TOKENIZER, {"name": name}))
    open_at_once = most = 0
    fetch = shop.blobs.fetch

    async def counted(file, bytes_max):
        nonlocal open_at_once, most
        open_at_once += 1
        most = max(most, open_at_once)
        try:
            return await fetch(file, bytes_max)
        finally:
            open_at_once -= 1

    shop.blobs.fetch = counted
    await asyncio.gather(*[shop.texts.text(shop.version(name)) for name in names])
    assert most == LOADS_MAX


@pytest.mark.parametrize("stated", [10 << 20, 5])
async def test_a_file_beyond_its_bound_is_not_read(shop, stated):
    digest = shop.version("a").file("tokenizer.json").digest
    with pytest.raises(CallError) as failure:
        await shop.blobs.fetch(FileRef("tokenizer.json", digest, stated), bytes_max=1000)
    assert failure.value.reason == "MODEL_UNSUPPORTED"


async def test_the_catalogue_is_followed_again_after_a_break(shop):
    snapshots: asyncio.Queue = asyncio.Queue()
    catalogue = ModelstoreCatalogue(shop.channel, snapshots.put_nowait)
    catalogue.start()
    assert (await snapshots.get()).names() == ["a", "b", "c"]
    await shop.modelstore.stop()
    again = FakeModelstore(shop.modelstore.port)
    again.add("d", files_of(TOKENIZER))
    await again.start()
    assert (await asyncio.wait_for(snapshots.get(), 20)).names() == ["d"]
    assert catalogue.snapshot.names() == ["d"]
    await catalogue.close()
    await again.stop()


async def test_a_catalogue_that_cannot_be_used_does_not_end_the_subscription(shop):
    seen: asyncio.Queue = asyncio.Queue()

    def on_change(snapshot):
        seen.put_nowait(snapshot)
        if seen.qsize() == 1:
            raise ValueError("a defect in whoever listens")

    catalogue = ModelstoreCatalogue(shop.channel, on_change)
    catalogue.start()
    await seen.get()
    assert (await asyncio.wait_for(seen.get(), 5)).names() == ["a", "b", "c"]
    await catalogue.close()


def test_what_a_version_weighs_and_whether_it_is_deprecated_is_read():
    model = modelstore_pb2.Model(name="m")
    model.versions.add(digest="sha256:a", manifest=modelstore_pb2.Manifest(name="m", weight_bytes=7))
    model.versions.add(digest="sha256:b", manifest=modelstore_pb2.Manifest(name="m"))
    model.versions[1].deprecation.message = "use a"
    model.versions[1].deprecation.since.FromMilliseconds(1_500)
    versions = catalogue_of([model]).models["m"].versions
    assert (versions["sha256:a"].weight_bytes, versions["sha256:a"].deprecation) == (7, None)
    assert versions["sha256:b"].deprecation == Deprecation("use a", 1_500)


def test_weights_below_one_count_as_one():
    model = modelstore_pb2.Model(name="m")
    model.versions.add(digest="sha256:a", manifest=modelstore_pb2.Manifest(name="m"))
    model.aliases.add(name="stable").targets.add(digest="sha256:a", weight=0)
    assert catalogue_of([model]).names() == ["m"]
