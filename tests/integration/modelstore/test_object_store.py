"""The modelstore on a real object store over S3: SeaweedFS, which is fetched like the other programs."""

import asyncio
import hashlib
import inspect
import threading
import uuid
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import obstore
import pytest
from loom.modelstore.v1 import modelstore_pb2 as pb
from obstore.store import from_url

from services.modelstore.adapters import objects_url
from services.modelstore.adapters.objects_url import PART_BYTES, BucketObjects, open_objects
from services.modelstore.app import open_offline
from services.modelstore.core.manifest import blob_path
from services.modelstore.core.ports import StoreError
from tests.integration.modelstore import made, object_store
from tests.integration.modelstore.conftest import running
from tests.unit.modelstore import test_objects as suite

PROMISES = [
    test
    for name, test in vars(suite).items()
    if name.startswith("test_") and "objects" in inspect.signature(test).parameters
]


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """SeaweedFS, and the environment that leads there."""
    folder = tmp_path_factory.mktemp("objects") / "weed"
    with pytest.MonkeyPatch.context() as patch, object_store.running(folder) as found:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        object_store.await_ready()
        yield found


@pytest.fixture
def url(away):
    """A folder of its own in a bucket."""
    return f"s3://models/{uuid.uuid4().hex}"


@pytest.fixture
async def house(url, tmp_path):
    (tmp_path / "sources").mkdir()
    async with running(url, str(tmp_path / "sources"), SCRATCH_DIR=str(tmp_path / "scratch")) as found:
        yield found


@pytest.mark.parametrize("promise", PROMISES, ids=lambda test: test.__name__)
async def test_a_bucket_keeps_every_promise_that_a_folder_keeps(promise, url, tmp_path):
    given = {"objects": open_objects(url), "tmp_path": tmp_path}
    await promise(**{name: given[name] for name in inspect.signature(promise).parameters})


def test_there_are_promises():
    assert len(PROMISES) >= 8


async def test_a_file_of_several_parts_arrives_whole_and_is_read_by_ranges(url, tmp_path):
    objects, file = BucketObjects(url), tmp_path / "weights"
    data = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(2 * PART_BYTES // 32 + 1))
    file.write_bytes(data)
    await objects.adopt("blobs/x", str(file))
    assert await objects.size("blobs/x") == len(data)
    assert await objects.read("blobs/x", PART_BYTES - 5, PART_BYTES + 5) == data[PART_BYTES - 5 :][:10]
    assert await objects.read("blobs/x", 0, len(data)) == data


@pytest.mark.usefixtures("converting_here")
async def test_a_model_is_imported_served_verified_and_collected(house, url):
    made.hf_folder(house.sources / "tiny")
    imported, _ = await house.import_model(house.sources / "tiny", "tiny")
    version = imported.version
    for file in version.manifest.files:
        assert len(await house.file(version, file.path)) == file.size_bytes
    config = next(f for f in version.manifest.files if f.path == "config.json")
    assert await house.fetch(config.digest, 3, 4) == (await house.fetch(config.digest))[3:7]

    verified = [event async for event in house.stub.Verify(pb.VerifyRequest())][-1].verified
    assert (verified.versions, verified.damaged) == (1, 0)
    assert verified.bytes == sum(file.size_bytes for file in version.manifest.files)

    await house.call("DeleteAlias", pb.DeleteAliasRequest(model="tiny", alias="stable"))
    await house.call("DeleteVersion", pb.DeleteVersionRequest(digest=version.digest))
    assert (await house.call("CollectGarbage", pb.CollectGarbageRequest())).deleted_bytes == 0
    # The store's clock has whole seconds.
    await older_than_a_second(url)
    done = await house.call("CollectGarbage", pb.CollectGarbageRequest(min_age_ms=1))
    assert done.deleted_bytes == verified.bytes
    left = obstore.list(from_url(url)).collect()
    assert not [
        entry["path"] for entry in left if entry["path"].startswith(("blobs/", "conversions/", "pins/"))
    ]


async def older_than_a_second(url):
    """Return when a new object is dated later than all that are there."""
    store = from_url(url)
    newest = max(entry["last_modified"] for entry in obstore.list(store).collect())
    async with asyncio.timeout(30):
        while True:
            await asyncio.to_thread(obstore.put, store, "clock", b"")
            if (await asyncio.to_thread(obstore.head, store, "clock"))["last_modified"] > newest:
                return


async def test_a_damaged_object_is_found_and_mended_by_importing_again(house, url):
    imported, _ = await house.import_model("builtin:sim", "sim")
    digest = imported.version.manifest.files[0].digest
    obstore.put(from_url(url), blob_path(digest), b"damaged")
    events = [event async for event in house.stub.Verify(pb.VerifyRequest(model="sim"))]
    assert [event.damaged.digest for event in events if event.HasField("damaged")] == [digest]
    await house.import_model("builtin:sim", "sim")
    events = [event async for event in house.stub.Verify(pb.VerifyRequest(model="sim"))]
    assert events[-1].verified.damaged == 0


async def test_two_modelstores_on_a_bucket_race_for_an_alias_and_lose_no_change(url, tmp_path):
    async with AsyncExitStack() as stack:
        houses = [
            await stack.enter_async_context(running(url, "", SCRATCH_DIR=str(tmp_path / name)))
            for name in ("a", "b")
        ]
        imported, _ = await houses[0].import_model("builtin:sim", "sim", aliases=["canary"])

        async def change(number):
            target = pb.AliasTarget(digest=imported.version.digest, weight=number + 1)
            request = pb.SetAliasRequest(model="sim", alias="stable", targets=[target])
            return (await houses[number % 2].call("SetAlias", request)).alias

        changes = await asyncio.gather(*(change(number) for number in range(40)))
        request = pb.ListAliasHistoryRequest(model="sim", alias="stable", limit=1000)
        for house in houses:
            history = (await house.call("ListAliasHistory", request)).changes
            assert [alias.sequence for alias in history] == list(range(40, 0, -1))
            assert sorted(history, key=lambda a: a.sequence) == sorted(changes, key=lambda a: a.sequence)


async def test_a_store_that_is_away_is_one_line(monkeypatch, away, url, unused_port):
    monkeypatch.setattr(objects_url, "RETRIES_MAX", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_port}")
    with pytest.raises(StoreError, match="Error performing") as caught:
        await open_offline(url)
    assert "\n" not in str(caught.value)


async def test_wrong_credentials_are_one_line_that_does_not_show_them(monkeypatch, away, url):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StoreError, match="privileges") as caught:
        await BucketObjects(url).put("a", b"")
    assert "\n" not in str(caught.value)
    assert "not-the-secret" not in str(caught.value)
    assert object_store.SECRET not in str(caught.value)


async def test_requests_that_fail_for_a_while_are_repeated(monkeypatch):
    """A server that only says no: SeaweedFS does not fail on demand."""
    monkeypatch.setattr(objects_url, "RETRY_FIRST_S", 0.001)
    asked = []

    class Busy(BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers["content-length"]))
            asked.append(self.path)
            self.send_response(200 if len(asked) > 3 else 503)
            self.send_header("etag", '"x"')
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
            monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
            objects = BucketObjects("s3://models")
            await objects.put("a", b"data")
            assert asked == ["/models/a"] * 4
        finally:
            server.shutdown()
