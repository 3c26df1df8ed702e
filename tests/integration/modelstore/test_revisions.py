"""Sources that change while they are fetched, and stored objects that were damaged: real HTTP, real files."""

import asyncio
import os
from itertools import cycle

import pytest
from loom.modelstore.v1 import modelstore_pb2 as pb

from services.modelstore.core.manifest import blob_path, digest_of, manifest_path
from services.modelstore.core.refusal import Refused
from services.modelstore.core.urls import parse_url
from tests.integration.modelstore import made
from tests.integration.modelstore.conftest import running
from tests.integration.modelstore.fetching import DATA, fetch, files, refusal, served
from tests.integration.modelstore.web import FileServer, serving

LONG_AGO = 1_000_000_000
SEEN_S = 30.0
ENDED_S = 60.0


async def changed(server, file, path="/m.bin"):
    return await files().changed(parse_url(f"{server.url}{path}"), str(file))


@pytest.mark.parametrize("without", ["", "conditions", "etags", "lengths"])
async def test_a_file_that_is_the_same_is_not_sent_again(server, file, without):
    if without:
        setattr(server, without, False)
    await fetch(f"{server.url}/m.bin", file)
    assert not await changed(server, file)
    assert file.read_bytes() == DATA


@pytest.mark.parametrize("without", ["", "conditions", "etags"])
async def test_another_file_in_its_place_is_seen(server, file, without):
    if without:
        setattr(server, without, False)
    await fetch(f"{server.url}/m.bin", file)
    server.files["/m.bin"] = DATA[:-1] if without == "etags" else DATA[::-1]
    assert await changed(server, file)
    del server.files["/m.bin"]
    assert await changed(server, file)
    assert file.read_bytes() == DATA


async def test_a_file_that_was_not_there_and_comes_is_seen(server, file):
    await fetch(f"{server.url}/other", file)
    assert not await changed(server, file, "/other")
    server.files["/other"] = b""
    assert await changed(server, file, "/other")


async def test_a_server_that_is_busy_when_files_are_compared_is_asked_again(server, file):
    await fetch(f"{server.url}/m.bin", file)
    server.statuses["/m.bin"] = [503, 429]
    assert not await changed(server, file)
    server.statuses["/m.bin"] = [503] * 100
    with pytest.raises(Refused) as caught:
        await changed(server, file)
    assert caught.value.reason == "SERVICE_UNAVAILABLE"


async def test_only_the_head_of_an_unasked_body_is_waited_for(server, file):
    """The server sends the whole file again, one piece each second."""
    await fetch(f"{server.url}/m.bin", file)
    server.conditions, server.pause_s = False, 1.0
    assert not await asyncio.wait_for(changed(server, file), 5)
    assert len(await asyncio.wait_for(fetch(f"{server.url}/m.bin", file), 5)) == 1


async def test_an_older_file_in_the_place_of_one_that_is_held_is_fetched(file):
    server = FileServer({"/m.bin": DATA}, etags=False, modified={"/m.bin": LONG_AGO + 60})
    async with serving(server):
        await fetch(f"{server.url}/m.bin", file)
        assert not await changed(server, file)
        server.files["/m.bin"] = DATA[::-1]
        server.modified["/m.bin"] = LONG_AGO
        assert await changed(server, file)
        await fetch(f"{server.url}/m.bin", file)
    assert file.read_bytes() == DATA[::-1]


@pytest.mark.parametrize("keeps", [{"ranges": False}, {"etags": False}])
async def test_a_server_that_never_comes_further_than_before_is_given_up(file, keeps):
    server = FileServer({"/m.bin": DATA}, pause_s=0.001, **keeps)
    server.break_after = [9_000] * 10_000
    async with serving(server):
        error = await asyncio.wait_for(refusal(f"{server.url}/m.bin", file), ENDED_S)
    assert error.reason == "SERVICE_UNAVAILABLE"


async def test_a_whole_file_of_another_length_begins_anew(server, file):
    await fetch(f"{server.url}/m.bin", file)
    server.files["/m.bin"] = DATA[:100]
    await fetch(f"{server.url}/m.bin", file)
    assert file.read_bytes() == DATA[:100]


@pytest.fixture(scope="module")
def revisions(tmp_path_factory):
    """Two folders of the same file names and sizes."""
    path = tmp_path_factory.mktemp("revisions")
    return [made.hf_folder(path / str(n), made.weights(n), rope_theta=10_000.0 + n) for n in range(2)]


async def test_a_folder_that_changes_between_two_files_is_never_imported_as_a_mixture(tmp_path, revisions):
    old, new = (served(folder, "/tiny/") for folder in revisions)
    server = FileServer(dict(old), changes={"/tiny/model.safetensors": new})
    async with (
        serving(server),
        running(tmp_path / "store", str(tmp_path.parent), IMPORT_URLS=server.url) as house,
    ):
        error = await house.refused("SERVICE_UNAVAILABLE", house.import_model(f"{server.url}/tiny/"))
        assert "config.json changed while the folder was fetched" in error.message
        assert not (await house.call("ListModels", pb.ListModelsRequest())).models
        server.sent_bytes = 0
        imported, _ = await house.import_model(f"{server.url}/tiny/")
        # What had not changed was not sent again: the weights were those of the new revision already.
        assert server.sent_bytes < len(new["/tiny/model.safetensors"])
        async with running(tmp_path / "other", str(revisions[1].parent)) as other:
            expected, _ = await other.import_model(revisions[1])
        assert imported.version.digest == expected.version.digest


async def test_a_folder_that_changed_before_a_resumed_import_is_the_new_one(tmp_path, revisions):
    old, new = (served(folder, "/tiny/") for folder in revisions)
    server = FileServer(dict(old), pause_s=0.001)
    weights = "/tiny/model.safetensors"
    async with (
        serving(server),
        running(tmp_path / "store", str(tmp_path.parent), IMPORT_URLS=server.url) as house,
    ):
        running_import = house.stub.ImportModel(pb.ImportModelRequest(source=f"{server.url}/tiny/", name="m"))
        async for event in running_import:
            if any(path == weights for path, _ in server.asked) and event.progress.done_bytes > 40_000:
                break
        running_import.cancel()
        server.files |= new
        imported, _ = await house.import_model(f"{server.url}/tiny/")
        async with running(tmp_path / "other", str(revisions[1].parent)) as other:
            expected, _ = await other.import_model(revisions[1])
        assert imported.version.digest == expected.version.digest


def damage(path, kind):
    """As a disk or a hand does it: in place."""
    data = path.read_bytes()
    path.chmod(0o600)
    if kind == "empty":
        os.truncate(path, 0)
    elif kind == "cut off":
        os.truncate(path, len(data) // 2)
    else:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


async def test_a_damaged_store_is_found_by_verify_and_mended_by_the_same_import(tmp_path, revisions):
    store, roots = tmp_path / "store", str(revisions[0].parent)
    async with running(store, roots) as house:
        first, _ = await house.import_model(revisions[0])
    digest = first.version.digest
    names = [manifest_path(digest), *(blob_path(file.digest) for file in first.version.manifest.files)]
    for name, kind in zip(names, cycle(("empty", "one bit", "cut off")), strict=False):
        damage(store / name, kind)
    async with running(store, roots) as house, running(store, roots) as other:
        assert not (await house.call("ListModels", pb.ListModelsRequest())).models
        events = [event async for event in house.stub.Verify(pb.VerifyRequest())]
        assert events[-1].verified.damaged == len(names)
        (found,) = [e.damaged for e in events if e.HasField("damaged") and e.damaged.digest == digest]
        assert found.problem.endswith("; it was imported from 0")
        again, _ = await house.import_model(revisions[0])
        assert (again.version, again.created) == (first.version, False)
        events = [event async for event in other.stub.Verify(pb.VerifyRequest())]
        assert events[-1].verified.damaged == 0
        watching = other.stub.WatchModels(pb.WatchModelsRequest())
        async with asyncio.timeout(SEEN_S):
            while not (await watching.read()).models:
                pass
        watching.cancel()
        for file in first.version.manifest.files:
            assert digest_of(await other.fetch(file.digest)) == file.digest


async def test_a_version_whose_manifest_is_damaged_can_be_forgotten_without_its_source(tmp_path, revisions):
    store, roots = tmp_path / "store", str(revisions[0].parent)
    async with running(store, roots) as house:
        first, _ = await house.import_model(revisions[0])
        kept, _ = await house.import_model(revisions[1])
    digest = first.version.digest
    damage(store / manifest_path(digest), "cut off")
    async with running(store, roots) as house:
        delete = pb.DeleteVersionRequest(digest=digest)
        named = await house.refused("MODEL_IN_USE", house.call("DeleteVersion", delete))
        assert named.message == f"{digest} is named by m@stable: point the alias at another version first"
        targets = [pb.AliasTarget(digest=kept.version.digest, weight=1)]
        await house.call("SetAlias", pb.SetAliasRequest(model="m", alias="stable", targets=targets))
        await house.call("DeleteVersion", delete)
        assert not (store / manifest_path(digest)).exists()
        await house.refused("MODEL_NOT_FOUND", house.call("DeleteVersion", delete))
        events = [event async for event in house.stub.Verify(pb.VerifyRequest())]
        assert events[-1].verified.damaged == 0
        for file in kept.version.manifest.files:
            assert digest_of(await house.fetch(file.digest)) == file.digest
