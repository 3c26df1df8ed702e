"""The service over gRPC, with the built-in model: everything but conversion."""

import asyncio
import multiprocessing
import os
import time

import grpc
import obstore
import pytest
from loom.modelstore.v1 import modelstore_pb2 as pb
from obstore.exceptions import BaseError

from services.modelstore.app import export_offline, import_offline, open_offline
from services.modelstore.core.manifest import blob_path, digest_of
from tests.integration.modelstore.conftest import running
from tokenloom.kit.errors import CallError, from_rpc_error

UNKNOWN = "sha256:" + "0" * 64


async def test_the_builtin_model_is_imported_resolved_and_fetched(house):
    imported, _ = await house.import_model("builtin:sim", "sim")
    assert imported.created
    resolved = await house.call("ResolveModel", pb.ResolveModelRequest(model="sim"))
    version = resolved.version
    assert version == imported.version
    assert (version.manifest.architecture, version.manifest.model_type) == ("Sim", "sim")
    assert list(version.manifest.stop_token_ids) == [256]
    assert version.manifest.created_at.seconds > 1_600_000_000
    for file in version.manifest.files:
        assert len(await house.file(version, file.path)) == file.size_bytes
    assert (await house.call("GetVersion", pb.GetVersionRequest(digest=version.digest))).version == version


async def test_models_are_named_by_alias_and_by_digest(house):
    imported, _ = await house.import_model("builtin:sim", "sim", aliases=["stable", "canary"])
    digest = imported.version.digest
    for model in ("sim", "sim@stable", "sim@canary", f"sim@{digest}", f"sim@{digest[:19]}"):
        resolved = await house.call("ResolveModel", pb.ResolveModelRequest(model=model))
        assert resolved.version.digest == digest


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("nope", "MODEL_NOT_FOUND"),
        ("sim@nope", "MODEL_NOT_FOUND"),
        (f"sim@{UNKNOWN}", "MODEL_NOT_FOUND"),
        ("", "FIELD_INVALID"),
        ("a b", "FIELD_INVALID"),
        ("sim@sha256:abc", "FIELD_INVALID"),
    ],
)
async def test_a_model_that_cannot_be_resolved_says_why(house, model, reason):
    await house.import_model("builtin:sim", "sim")
    await house.refused(reason, house.call("ResolveModel", pb.ResolveModelRequest(model=model)))


async def test_bad_requests_name_every_field(house):
    error = await house.refused("FIELD_INVALID", house.import_model("", "bad name", dtype="int4"))
    assert [field for field, _ in error.violations] == ["source", "name", "dtype"]
    request = pb.SetAliasRequest(model="sim", alias="no spaces")
    error = await house.refused("FIELD_INVALID", house.call("SetAlias", request))
    assert [field for field, _ in error.violations] == ["alias", "targets"]


async def test_sources_outside_the_roots_are_denied(house):
    error = await house.refused("PERMISSION_DENIED", house.import_model("/etc/passwd"))
    assert "TOKENLOOM_MODELSTORE_IMPORT_ROOTS" in error.message
    await house.refused("SOURCE_NOT_FOUND", house.import_model(house.sources / "nope"))


async def test_watchers_get_the_catalogue_at_once_and_after_each_change(house):
    watching = house.stub.WatchModels(pb.WatchModelsRequest())
    assert list((await watching.read()).models) == []
    await house.import_model("builtin:sim", "sim")
    # The version first, its alias last.
    seen = [await watching.read() for _ in range(2)]
    assert [model.name for model in seen[0].models] == ["sim"]
    assert [alias.name for alias in seen[-1].models[0].aliases] == ["stable"]
    watching.cancel()


async def test_a_change_by_another_process_is_seen_within_a_second(house):
    watching = house.stub.WatchModels(pb.WatchModelsRequest())
    await watching.read()
    context = multiprocessing.get_context("spawn")
    other = context.Process(target=import_offline, args=(house.store, "builtin:sim", "sim"))
    other.start()
    first = await watching.read()
    assert [model.name for model in first.models] == ["sim"]
    seen = time.time()
    await asyncio.to_thread(other.join, 30)
    created = first.models[0].versions[0].manifest.created_at
    assert seen - (created.seconds + created.nanos / 1e9) < 1
    watching.cancel()


async def test_ending_watchers_does_not_hold_up_a_drain(tmp_path):
    async with running(tmp_path / "store", "") as house:
        watching = house.stub.WatchModels(pb.WatchModelsRequest())
        await watching.read()
        await asyncio.wait_for(house.service.drain(30), 5)
        assert house.service.readiness() == "draining"


async def test_an_alias_moves_with_the_number_that_was_expected(house):
    imported, _ = await house.import_model("builtin:sim", "sim")
    target = pb.AliasTarget(digest=imported.version.digest)
    request = pb.SetAliasRequest(model="sim", alias="stable", targets=[target], expected_sequence=1)
    assert (await house.call("SetAlias", request)).alias.sequence == 2
    error = await house.refused("ALIAS_CONFLICT", house.call("SetAlias", request))
    assert error.metadata == {"model": "sim", "alias": "stable"}
    assert error.retriable


async def test_versions_in_use_are_not_deleted(house):
    imported, _ = await house.import_model("builtin:sim", "sim")
    request = pb.DeleteVersionRequest(digest=imported.version.digest)
    error = await house.refused("MODEL_IN_USE", house.call("DeleteVersion", request))
    assert error.metadata["used_by"] == "sim@stable"
    await house.refused(
        "MODEL_NOT_FOUND", house.call("DeleteVersion", pb.DeleteVersionRequest(digest=UNKNOWN))
    )


async def test_a_version_without_aliases_is_deleted_and_imported_again(house):
    imported, _ = await house.import_model("builtin:sim", "sim", aliases=["canary"])
    await house.import_model("builtin:sim", "other")
    (house.store / "aliases" / "sim" / "canary" / "1.json").unlink()
    await house.call("DeleteVersion", pb.DeleteVersionRequest(digest=imported.version.digest))
    listed = await house.call("ListModels", pb.ListModelsRequest())
    assert [model.name for model in listed.models] == ["other"]
    again, _ = await house.import_model("builtin:sim", "sim")
    assert again.created
    assert again.version.digest == imported.version.digest


@pytest.fixture
async def blob(house):
    """A blob that a manifest names."""
    imported, _ = await house.import_model("builtin:sim", "sim")
    return next(f for f in imported.version.manifest.files if f.path == "tokenizer.json")


async def test_a_blob_is_read_from_any_offset(house, blob):
    whole = await house.fetch(blob.digest)
    assert len(whole) == blob.size_bytes
    assert await house.fetch(blob.digest, offset=100) == whole[100:]
    assert await house.fetch(blob.digest, offset=7, length=11) == whole[7:18]
    assert await house.fetch(blob.digest, offset=blob.size_bytes) == b""


@pytest.mark.parametrize(("offset", "length"), [(10**9, 0), (0, 10**9), (6000, 10**9), (2**63, 2**63)])
async def test_a_range_outside_of_the_blob_is_refused(house, blob, offset, length):
    await house.refused("FIELD_INVALID", house.fetch(blob.digest, offset, length))


async def test_blobs_come_in_chunks(tmp_path):
    async with running(tmp_path / "store", "", CHUNK_BYTES="4096") as house:
        imported, _ = await house.import_model("builtin:sim", "sim")
        file = next(f for f in imported.version.manifest.files if f.path == "tokenizer.json")
        request = pb.FetchBlobRequest(digest=file.digest)
        sizes = [len(response.data) async for response in house.stub.FetchBlob(request)]
        assert sum(sizes) == file.size_bytes
        assert set(sizes[:-1]) == {4096}


async def test_an_unknown_blob_is_not_found(house):
    await house.refused("BLOB_NOT_FOUND", house.fetch(UNKNOWN))
    await house.refused("FIELD_INVALID", house.fetch("sha256:../../../etc/passwd"))


async def test_a_damaged_blob_is_seen_and_mended_by_importing_again(house, blob):
    path = house.store / blob_path(blob.digest)
    whole = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(whole[:-1])
    error = await house.refused("DIGEST_MISMATCH", house.fetch(blob.digest))
    assert "import its model again" in error.message
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    # Of the right length: only the receiver's own check can tell.
    assert digest_of(await house.fetch(blob.digest)) != blob.digest
    again, _ = await house.import_model("builtin:sim", "sim")
    assert not again.created
    assert await house.fetch(blob.digest) == whole


async def test_a_missing_blob_is_not_found_and_the_rest_goes_on(house, blob):
    (house.store / blob_path(blob.digest)).unlink()
    await house.refused("BLOB_NOT_FOUND", house.fetch(blob.digest))
    assert (await house.call("ListModels", pb.ListModelsRequest())).models


async def test_an_alias_has_a_history_with_times_and_ends(house):
    imported, _ = await house.import_model("builtin:sim", "sim")
    digest = imported.version.digest
    for weight in (1, 2):
        target = pb.AliasTarget(digest=digest, weight=weight)
        await house.call("SetAlias", pb.SetAliasRequest(model="sim", alias="canary", targets=[target]))
    ending = pb.DeleteAliasRequest(model="sim", alias="canary", expected_sequence=1)
    assert (await house.refused("ALIAS_CONFLICT", house.call("DeleteAlias", ending))).retriable
    ending.expected_sequence = 2
    await house.call("DeleteAlias", ending)
    request = pb.ListAliasHistoryRequest(model="sim", alias="canary")
    changes = (await house.call("ListAliasHistory", request)).changes
    assert [change.sequence for change in changes] == [3, 2, 1]
    assert [[target.weight for target in change.targets] for change in changes] == [[], [2], [1]]
    assert all(change.changed_at.seconds > 1_600_000_000 for change in changes)
    request.limit = 1
    assert list((await house.call("ListAliasHistory", request)).changes) == list(changes[:1])
    (model,) = (await house.call("ListModels", pb.ListModelsRequest())).models
    assert [alias.name for alias in model.aliases] == ["stable"]
    assert model.aliases[0].changed_at.seconds > 1_600_000_000
    request.alias = "never"
    await house.refused("MODEL_NOT_FOUND", house.call("ListAliasHistory", request))


async def test_a_deprecated_version_is_told_of_and_served(house):
    imported, _ = await house.import_model("builtin:sim", "sim")
    watching = house.stub.WatchModels(pb.WatchModelsRequest())
    await watching.read()
    digest = imported.version.digest
    request = pb.SetDeprecationRequest(digest=digest, deprecated=True, message="use sim@canary")
    marked = (await house.call("SetDeprecation", request)).version
    assert marked.deprecation.message == "use sim@canary"
    assert marked.deprecation.since.seconds > 1_600_000_000
    assert (await watching.read()).models[0].versions[0] == marked
    resolved = await house.call("ResolveModel", pb.ResolveModelRequest(model="sim"))
    assert resolved.version == marked
    request = pb.SetDeprecationRequest(digest=digest)
    assert not (await house.call("SetDeprecation", request)).version.HasField("deprecation")
    watching.cancel()


@pytest.mark.parametrize(
    ("method", "request_", "fields"),
    [
        (
            "ListAliasHistory",
            pb.ListAliasHistoryRequest(model="a b", limit=1001),
            ["model", "alias", "limit"],
        ),
        ("DeleteAlias", pb.DeleteAliasRequest(model="m", alias="a b"), ["alias"]),
        ("SetDeprecation", pb.SetDeprecationRequest(digest="x", message="x"), ["digest", "message"]),
        ("CollectGarbage", pb.CollectGarbageRequest(min_age_ms=2**63), ["min_age_ms"]),
    ],
)
async def test_requests_that_cannot_be_met_name_every_field(house, method, request_, fields):
    error = await house.refused("FIELD_INVALID", house.call(method, request_))
    assert [field for field, _ in error.violations] == fields


async def test_garbage_is_told_before_it_is_collected(house):
    imported, _ = await house.import_model("builtin:sim", "sim", aliases=["canary"])
    files = imported.version.manifest.files
    await house.call("DeleteAlias", pb.DeleteAliasRequest(model="sim", alias="canary"))
    kept = await house.call("CollectGarbage", pb.CollectGarbageRequest(min_age_ms=1))
    assert (len(kept.deleted), kept.kept_blobs, kept.spared_blobs) == (0, len(files), 0)
    await house.call("DeleteVersion", pb.DeleteVersionRequest(digest=imported.version.digest))
    young = await house.call("CollectGarbage", pb.CollectGarbageRequest())
    assert (len(young.deleted), young.kept_blobs, young.spared_blobs) == (0, 0, len(files))
    for file in files:
        os.utime(house.store / blob_path(file.digest), (1, 1))
    told = await house.call("CollectGarbage", pb.CollectGarbageRequest(dry_run=True))
    assert {file.digest for file in told.deleted} == {file.digest for file in files}
    assert await house.fetch(files[0].digest)
    done = await house.call("CollectGarbage", pb.CollectGarbageRequest())
    assert sorted(f.digest for f in done.deleted) == sorted(f.digest for f in told.deleted)
    assert done.deleted_bytes == sum(file.size_bytes for file in files)
    await house.refused("BLOB_NOT_FOUND", house.fetch(files[0].digest))


async def test_verify_finds_what_is_damaged_and_says_how_far_it_is(house, blob):
    whole = [event async for event in house.stub.Verify(pb.VerifyRequest())]
    assert whole[-1].verified.damaged == 0
    progress = [event.progress for event in whole if event.HasField("progress")]
    assert {step.stage for step in progress} == {"verify"}
    assert progress[-1].done_bytes == progress[-1].total_bytes == whole[-1].verified.bytes
    path = house.store / blob_path(blob.digest)
    path.chmod(0o600)
    path.write_bytes(bytes(blob.size_bytes))
    (version,) = (await house.call("ListModels", pb.ListModelsRequest())).models[0].versions
    events = [event async for event in house.stub.Verify(pb.VerifyRequest(model="sim"))]
    (damaged,) = [event.damaged for event in events if event.HasField("damaged")]
    assert (damaged.digest, list(damaged.versions)) == (blob.digest, [version.digest])
    assert damaged.problem.startswith("wrong digest: sha256:")
    assert events[-1].verified.damaged == 1


async def test_verify_of_an_unknown_model_is_refused(house):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await house.stub.Verify(pb.VerifyRequest(model="nope")).read()
    assert from_rpc_error(caught.value).reason == "MODEL_NOT_FOUND"


async def test_a_store_that_fails_is_unavailable_and_the_catalogue_is_served_on(house, monkeypatch):
    imported, _ = await house.import_model("builtin:sim", "sim")

    def away(*_, **__):
        raise BaseError("Error performing PUT http://127.0.0.1:9 in 2s\n\nDebug source: more")

    monkeypatch.setattr(obstore, "put", away)
    target = pb.AliasTarget(digest=imported.version.digest)
    request = pb.SetAliasRequest(model="sim", alias="stable", targets=[target])
    error = await house.refused("SERVICE_UNAVAILABLE", house.call("SetAlias", request))
    assert error.retriable
    assert error.message == "the store cannot be used: Error performing PUT http://127.0.0.1:9 in 2s"
    assert (await house.call("ListModels", pb.ListModelsRequest())).models


async def test_offline_and_online_are_the_same_methods(house):
    imported, _ = await house.import_model("builtin:sim", "sim")
    offline = await open_offline(house.store)
    resolved = await offline.ResolveModel(pb.ResolveModelRequest(model="sim"), None)
    assert resolved.version == imported.version
    with pytest.raises(CallError, match="no model 'nope'"):
        await offline.ResolveModel(pb.ResolveModelRequest(model="nope"), None)


def test_a_version_is_laid_out_as_a_folder(tmp_path):
    store = tmp_path / "store"
    import_offline(store, "builtin:sim", "sim", aliases=["stable"])
    version = export_offline(store, "sim", tmp_path / "out")
    found = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert found == {file.path: file.size_bytes for file in version.manifest.files}


def test_two_processes_racing_for_an_alias_lose_no_change(tmp_path):
    store = tmp_path / "store"
    imported = import_offline(store, "builtin:sim", "sim")
    changes = 100
    context = multiprocessing.get_context("spawn")
    racers = [
        context.Process(target=_change_often, args=(store, imported.version.digest, weight, changes))
        for weight in (1, 2)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    folder = store / "aliases" / "sim" / "stable"
    # One record came from the import itself.
    assert sorted(int(path.stem) for path in folder.iterdir()) == list(range(1, 2 * changes + 2))
    weights = [path.read_text().count('"weight":2') for path in folder.iterdir()]
    assert sum(weights) == changes


def _change_often(store, digest, weight, changes):
    async def run():
        offline = await open_offline(store)
        target = pb.AliasTarget(digest=digest, weight=weight)
        request = pb.SetAliasRequest(model="sim", alias="stable", targets=[target])
        sequences = [(await offline.SetAlias(request, None)).alias.sequence for _ in range(changes)]
        assert sequences == sorted(set(sequences))

    asyncio.run(run())
