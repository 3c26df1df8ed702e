"""Imports from URLs with a fake web: which files are fetched, what is refused early, what is kept."""

import asyncio
import json
from contextlib import aclosing
from types import SimpleNamespace

import pytest

from services.modelstore.adapters.memory import MemoryObjects
from services.modelstore.core.manifest import digest_of
from services.modelstore.core.refusal import Refused
from services.modelstore.core.requests import ImportRequest
from tests.unit.modelstore.made import LLAMA, gguf_file, safetensors_file
from tests.unit.modelstore.test_importer import House

FOLDER = "https://h/org/model/"
GGUF = "https://h/m.Q4_1.gguf?sig=secret"
TEXT = {
    f"{FOLDER}config.json": json.dumps(LLAMA).encode(),
    f"{FOLDER}tokenizer.json": b"{}",
    f"{FOLDER}README.md": b"---\nlicense: mit\n---\n",
}
SINGLE = {**TEXT, f"{FOLDER}model.safetensors": safetensors_file({"w": 4})}


def house(tmp_path, urls, **changes):
    made = House(tmp_path, MemoryObjects(), urls=urls, **changes)
    made.web = made.importer._downloader._web
    return made


def kept(tmp_path):
    """The files of downloads that were kept."""
    root = tmp_path / "scratch" / "downloads"
    return sorted(path.name for path in root.glob("*/files/*"))


async def test_a_gguf_file_is_fetched_and_imported_and_its_signature_is_kept_nowhere(tmp_path):
    made = house(tmp_path, {GGUF: gguf_file()})
    imported = await made.run(GGUF)
    assert imported.version.imported.source == "h/m.Q4_1.gguf"
    assert made.converter.staged == ["model.gguf"]
    assert [e for e in made.progress if e.stage == "download"][-1].done_bytes == len(gguf_file())
    assert not any(b"secret" in data for data in made.objects.data.values())
    assert kept(tmp_path) == []


async def test_the_same_file_from_an_url_and_from_a_path_is_the_same_version(tmp_path):
    made = house(tmp_path, {GGUF: gguf_file()})
    path = tmp_path / "local.gguf"
    path.write_bytes(gguf_file())
    assert (await made.run(GGUF)).version.digest == (await made.run(path)).version.digest
    assert len(made.converter.jobs) == 1


async def test_a_folder_is_fetched_by_its_fixed_names(tmp_path):
    made = house(tmp_path, SINGLE)
    await made.run(FOLDER)
    assert made.converter.staged == ["config.json", "model.safetensors", "tokenizer.json"]
    assert made.converter.jobs[0].license == "mit"
    assert [url.removeprefix(FOLDER) for url in made.web.asked] == [
        "config.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "README.md",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model.safetensors",
    ]


async def test_shards_are_fetched_as_the_index_names_them_and_their_size_is_known_before(tmp_path):
    index = {
        "metadata": {"total_size": 24},
        "weight_map": {"a": "w-1.safetensors", "b": "w-2.safetensors"},
    }
    files = {
        **TEXT,
        f"{FOLDER}model.safetensors.index.json": json.dumps(index).encode(),
        f"{FOLDER}w-1.safetensors": safetensors_file({"a": 4}),
        f"{FOLDER}w-2.safetensors": safetensors_file({"b": 2}),
    }
    made = house(tmp_path, files)
    await made.run(FOLDER)
    assert made.converter.jobs[0].source
    assert {"w-1.safetensors", "w-2.safetensors"} < set(made.converter.staged)
    del files[f"{FOLDER}w-2.safetensors"]
    error = await house(tmp_path / "less", files).refused(FOLDER)
    assert error.message == (
        "h/org/model/: model.safetensors.index.json names w-2.safetensors, which its server does not have"
    )


async def test_checkpoints_are_fetched_when_there_are_no_safetensors(tmp_path):
    made = house(tmp_path, {**TEXT, f"{FOLDER}pytorch_model.bin": b"PK.."})
    await made.run(FOLDER)
    assert "pytorch_model.bin" in made.converter.staged


async def test_a_folder_without_weights_says_which_names_it_looked_for(tmp_path):
    error = await house(tmp_path, TEXT).refused(FOLDER)
    assert error.message == (
        "h/org/model/: has no weights; looked for model.safetensors.index.json, model.safetensors, "
        "pytorch_model.bin.index.json, pytorch_model.bin"
    )


async def test_a_model_that_cannot_be_served_is_refused_before_its_weights_are_fetched(tmp_path):
    config = json.dumps({**LLAMA, "model_type": "mamba"}).encode()
    made = house(tmp_path, {**SINGLE, f"{FOLDER}config.json": config})
    assert (await made.refused(FOLDER)).reason == "MODEL_UNSUPPORTED"
    assert f"{FOLDER}model.safetensors" not in made.web.asked


@pytest.mark.parametrize(
    ("content", "word"), [(b"<html>", "GGUF"), (b"PK\3\4", "PyTorch"), (b"", "no model")]
)
async def test_another_file_is_refused_and_not_kept(tmp_path, content, word):
    error = await house(tmp_path, {GGUF: content}).refused(GGUF)
    assert error.reason == "SOURCE_INVALID"
    assert word in error.message
    assert "secret" not in error.message
    assert kept(tmp_path) == []


async def test_a_missing_file_is_not_found(tmp_path):
    error = await house(tmp_path, {}).refused(GGUF)
    assert (error.reason, error.message) == ("SOURCE_NOT_FOUND", "h/m.Q4_1.gguf: its server has no such file")


async def test_a_broken_connection_keeps_what_has_arrived(tmp_path):
    broken = Refused("SERVICE_UNAVAILABLE", "h: broken", service="h")
    made = house(tmp_path, {**SINGLE, f"{FOLDER}model.safetensors": broken})
    assert await made.refused(FOLDER) is broken
    assert kept(tmp_path) == ["README.md", "config.json", "tokenizer.json"]
    made.web.files = SINGLE
    assert (await made.run(FOLDER)).created
    assert kept(tmp_path) == []


async def test_a_full_disk_keeps_what_has_arrived(tmp_path):
    made = house(tmp_path, {GGUF: OSError(28, "No space left on device")})
    error = await made.refused(GGUF)
    assert error.reason == "SERVICE_UNAVAILABLE"
    assert "no space" in error.message
    assert (tmp_path / "scratch" / "downloads").iterdir()


async def test_what_the_source_no_longer_has_is_not_imported(tmp_path):
    index = json.dumps({"weight_map": {"a": "w-1.safetensors"}}).encode()
    broken = Refused("SERVICE_UNAVAILABLE", "h: broken", service="h")
    made = house(
        tmp_path,
        {
            **TEXT,
            f"{FOLDER}chat_template.jinja": b"old",
            f"{FOLDER}model.safetensors.index.json": index,
            f"{FOLDER}w-1.safetensors": broken,
        },
    )
    await made.refused(FOLDER)
    made.web.files = SINGLE
    await made.run(FOLDER)
    assert made.converter.staged == ["config.json", "model.safetensors", "tokenizer.json"]


async def test_more_than_the_bound_is_refused_with_the_setting(tmp_path):
    made = house(tmp_path, SINGLE)
    bound = sum(len(data) for data in TEXT.values()) + 10
    made.importer._downloader._bytes_max = bound
    error = await made.refused(FOLDER)
    size = len(SINGLE[f"{FOLDER}model.safetensors"])
    assert error.message == (
        f"h/org/model/: model.safetensors has {size} bytes or more; at most 10 are left of the {bound} that "
        "one import may download (TOKENLOOM_MODELSTORE_DOWNLOAD_BYTES_MAX)"
    )


async def test_a_small_file_has_a_bound_of_its_own(tmp_path):
    made = house(tmp_path, {**SINGLE, f"{FOLDER}config.json": bytes(33 * 1024 * 1024)})
    error = await made.refused(FOLDER)
    assert error.message == "h/org/model/: config.json has 34603008 bytes or more; at most 33554432"


async def test_a_digest_is_held_against_the_file(tmp_path):
    made = house(tmp_path, {GGUF: gguf_file()})
    right, wrong = digest_of(gguf_file()), digest_of(b"")
    error = await made.refused(GGUF, source_digest=wrong)
    assert error.reason == "DIGEST_MISMATCH"
    assert error.message == (
        f"h/m.Q4_1.gguf: has digest {right}, not {wrong}; it is another file, or damaged"
    )
    assert made.converter.jobs == []
    assert kept(tmp_path) == []
    assert (await made.run(GGUF, source_digest=right)).created


async def test_a_folder_has_no_digest(tmp_path):
    made = house(tmp_path, SINGLE)
    folder = tmp_path / "folder"
    folder.mkdir()
    for url, data in SINGLE.items():
        (folder / url.removeprefix(FOLDER)).write_bytes(data)
    for source in (FOLDER, folder):
        error = await made.refused(source, source_digest=digest_of(b""))
        assert error.reason == "FIELD_INVALID"
        assert error.message == (
            "source_digest: is for a source that is one file, and this one is a folder; leave it out"
        )
    assert made.web.asked == []


async def test_an_url_that_is_not_allowed_is_denied_before_anything_is_made(tmp_path):
    made = house(tmp_path, {})
    assert (await made.refused("https://forbidden/m.gguf")).reason == "PERMISSION_DENIED"
    assert made.web.asked == []


async def test_the_same_url_twice_at_once_is_refused_once(tmp_path):
    made = house(tmp_path, {GGUF: gguf_file()}, limits=SimpleNamespace(**LIMITS))
    fetch, arrived, go_on = made.web.fetch, asyncio.Event(), asyncio.Event()

    async def slow(url, file, bytes_max):
        arrived.set()
        await go_on.wait()
        async for event in fetch(url, file, bytes_max):
            yield event

    made.web.fetch = slow
    first = asyncio.create_task(made.run(GGUF))
    await arrived.wait()
    error = await made.refused(GGUF)
    assert error.reason == "QUEUE_FULL"
    assert error.message == "h/m.Q4_1.gguf is being imported already; try again when that has ended"
    go_on.set()
    assert (await first).created


LIMITS = {"imports_max": 2, "imports_waiting_max": 2, "shard_bytes_max": 1, "convert_threads": 1}


async def test_a_version_is_published_before_what_was_downloaded_is_given_up(tmp_path, monkeypatch):
    made = house(tmp_path, {GGUF: gguf_file()})
    publish, seen = made.store.publish, []

    async def watched(*arguments):
        seen.append(kept(tmp_path))
        return await publish(*arguments)

    monkeypatch.setattr(made.store, "publish", watched)
    await made.run(GGUF)
    assert seen == [["m.Q4_1.gguf"]]


async def test_closing_an_import_keeps_what_has_arrived(tmp_path):
    made = house(tmp_path, {GGUF: gguf_file()})
    async with aclosing(made.importer.run(ImportRequest(GGUF, "m"))) as running:
        async for event in running:
            if event.stage == "read":
                break
    assert kept(tmp_path) == ["m.Q4_1.gguf"]
    assert made.store.catalogue.versions == {}


def changing(made, monkeypatch, at, **changes):
    """The source changes when the file `at` is asked for."""
    fetch = made.web.fetch

    async def changed(url, file, bytes_max):
        if str(url) == f"{FOLDER}{at}":
            made.web.files |= {f"{FOLDER}{name}": data for name, data in changes.items()}
        async for event in fetch(url, file, bytes_max):
            yield event

    monkeypatch.setattr(made.web, "fetch", changed)


OTHER = json.dumps({**LLAMA, "rope_theta": 1.0}).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [("config.json", OTHER), ("chat_template.jinja", b"new"), ("tokenizer.json", None), ("README.md", None)],
)
async def test_a_folder_that_changes_while_it_is_fetched_is_not_imported(tmp_path, monkeypatch, name, data):
    made = house(tmp_path, SINGLE)
    changing(made, monkeypatch, "model.safetensors", **{name: data})
    error = await made.refused(FOLDER)
    assert (error.reason, error.metadata) == ("SERVICE_UNAVAILABLE", {"service": "h"})
    assert error.message == (
        f"h/org/model/: {name} changed while the folder was fetched, so its files may be of two revisions; "
        "what did not change is kept: import it again, or name one revision"
    )
    assert made.store.catalogue.versions == {}
    assert made.converter.jobs == []
    assert "model.safetensors" in kept(tmp_path)


async def test_a_folder_that_changed_is_imported_as_it_is_now_by_the_next_import(tmp_path, monkeypatch):
    made = house(tmp_path, SINGLE)
    changing(made, monkeypatch, "model.safetensors", **{"config.json": OTHER})
    await made.refused(FOLDER)
    staged = await made.run(FOLDER)
    now = house(tmp_path / "now", {**SINGLE, f"{FOLDER}config.json": OTHER})
    assert staged.version.digest == (await now.run(FOLDER)).version.digest
    assert kept(tmp_path) == []


async def test_every_file_and_every_absence_is_compared_after_the_last_was_fetched(tmp_path):
    made = house(tmp_path, SINGLE)
    await made.run(FOLDER)
    assert made.web.compared == made.web.asked
    assert f"{FOLDER}chat_template.jinja" in made.web.compared


async def test_one_file_is_of_one_revision_and_its_url_is_asked_once(tmp_path):
    made = house(tmp_path, {GGUF: gguf_file()})
    await made.run(GGUF)
    assert (made.web.asked, made.web.compared) == ([GGUF], [])
