"""Imports with a fake converter: order of writes, equality, refusals, bounds."""

import asyncio
import json
import shutil
import threading
from contextlib import aclosing

import pytest

from services.modelstore.adapters.memory import MemoryObjects
from services.modelstore.adapters.scratch import Scratch
from services.modelstore.adapters.sources import LocalSources
from services.modelstore.core.manifest import blob_path, digest_of
from services.modelstore.core.ports import Progress
from services.modelstore.core.refusal import Refused
from services.modelstore.core.requests import ImportRequest
from services.modelstore.downloading import Downloader
from services.modelstore.importer import Imported, Importer, Limits
from services.modelstore.inspection import Inspector
from services.modelstore.store import Store
from tests.unit.modelstore.fakes import FakeConverter, FakeWeb, Killed, MortalObjects
from tests.unit.modelstore.made import BLOCK_SIZES, LLAMA, TYPE_NAMES, gguf_file, safetensors_file
from tokenloom.kit.clock import FakeClock


class House:
    """An importer and everything under it."""

    def __init__(self, tmp_path, objects, roots=None, limits=None, urls=None):
        self.objects = objects
        self.store = Store(objects, FakeClock())
        self.converter = FakeConverter()
        self.scratch = tmp_path / "scratch"
        inspector = Inspector(LocalSources(roots), BLOCK_SIZES, TYPE_NAMES)
        scratch = Scratch(self.scratch)
        self.importer = Importer(
            self.store,
            objects,
            inspector,
            self.converter,
            scratch,
            Downloader(FakeWeb(urls or {}), scratch),
            limits or Limits(),
        )

    async def run(self, source, name="m", dtype="bfloat16", aliases=(), source_digest=""):
        events = []
        request = ImportRequest(str(source), name, dtype, aliases, source_digest)
        async with aclosing(self.importer.run(request)) as running:
            async for event in running:
                events.append(event)
        assert all(isinstance(event, Progress) for event in events[:-1])
        assert isinstance(events[-1], Imported)
        self.progress = events[:-1]
        return events[-1]

    async def refused(self, source, **changes):
        with pytest.raises(Refused) as caught:
            await self.run(source, **changes)
        return caught.value


@pytest.fixture
def house(tmp_path):
    return House(tmp_path, MemoryObjects())


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "model.Q4_1.gguf"
    path.write_bytes(gguf_file())
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(safetensors_file({"w": 4}))
    return path


async def test_an_import_makes_a_version_whose_blobs_are_what_they_are_called(house, gguf):
    imported = await house.run(gguf)
    assert imported.created
    files = imported.version.manifest.files
    assert [file.path for file in files] == ["config.json", "model.safetensors"]
    for file in files:
        data = house.objects.data[blob_path(file.digest)]
        assert (digest_of(data), len(data)) == (file.digest, file.size_bytes)


async def test_the_first_version_becomes_stable_and_later_ones_do_not(house, gguf):
    first = await house.run(gguf)
    second = await house.run(gguf, dtype="float32")
    assert first.version.digest != second.version.digest
    assert (await house.store.resolve("m")).digest == first.version.digest


async def test_named_aliases_are_set_and_no_other(house, gguf):
    imported = await house.run(gguf, aliases=("canary", "next"))
    model = house.store.catalogue.models["m"]
    assert {alias.name: alias.main for alias in model.aliases} == dict.fromkeys(
        ("canary", "next"), imported.version.digest
    )


async def test_the_same_source_is_the_same_version_and_is_not_converted_again(house, gguf):
    first = await house.run(gguf)
    before = dict(house.objects.data)
    second = await house.run(gguf)
    assert second.version.digest == first.version.digest
    assert not second.created
    assert len(house.converter.jobs) == 1
    assert house.objects.data == before


async def test_a_copy_of_the_source_elsewhere_is_the_same_version(house, gguf, tmp_path):
    copy = tmp_path / "renamed.gguf"
    copy.write_bytes(gguf.read_bytes())
    first, second = await house.run(gguf), await house.run(copy)
    assert second.version.digest == first.version.digest


async def test_a_converter_of_another_version_converts_again(house, gguf):
    await house.run(gguf)
    house.converter.version = "2"
    await house.run(gguf)
    assert len(house.converter.jobs) == 2


async def test_another_name_shares_the_blobs_and_the_conversion(house, gguf):
    first = await house.run(gguf, name="one")
    second = await house.run(gguf, name="two")
    assert first.version.digest != second.version.digest
    assert first.version.manifest.files == second.version.manifest.files
    assert len(house.converter.jobs) == 1


@pytest.mark.parametrize("damage", [None, b"short", "one changed byte"])
async def test_a_lost_or_damaged_blob_is_mended_by_importing_again(house, gguf, damage):
    imported = await house.run(gguf)
    path = blob_path(imported.version.manifest.files[1].digest)
    whole = house.objects.data.pop(path)
    if damage == "one changed byte":
        damage = bytes([whole[0] ^ 1]) + whole[1:]
    if damage is not None:
        house.objects.data[path] = damage
    assert not (await house.run(gguf)).created
    assert house.objects.data[path] == whole


async def test_an_import_killed_at_any_write_leaves_the_old_state_and_its_repetition_completes(
    tmp_path, gguf
):
    writes = 0
    while True:
        house = House(tmp_path, MortalObjects(writes))
        try:
            await house.run(gguf)
            break
        except Killed:
            survivor = MemoryObjects()
            survivor.data = dict(house.objects.data)
        again = House(tmp_path, survivor)
        await again.store.refresh()
        for version in again.store.catalogue.versions.values():
            for file in version.manifest.files:
                assert len(survivor.data[blob_path(file.digest)]) == file.size_bytes
        imported = await again.run(gguf)
        assert (await again.store.resolve("m")).digest == imported.version.digest
        writes += 1
    # Two blobs, the conversion's record, the import's record, the manifest, the alias; and the pins.
    assert writes >= 7


async def test_a_folder_is_imported_from_its_own_files_only(house, folder):
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    await house.run(folder)
    assert house.converter.jobs[0].kind == "folder"
    assert house.converter.staged == ["config.json", "model.safetensors", "tokenizer.json"]


async def test_stages_come_in_order_and_count_bytes(house, gguf):
    await house.run(gguf)
    stages = list(dict.fromkeys(event.stage for event in house.progress))
    assert stages == ["read", "convert", "hash", "store"]
    last = {event.stage: event for event in house.progress}
    assert all(event.done_bytes == event.total_bytes > 0 for event in last.values())
    assert last["read"].total_bytes == gguf.stat().st_size


async def test_the_working_folder_is_gone_afterwards(house, gguf):
    await house.run(gguf)
    assert list(house.scratch.iterdir()) == []


async def test_a_source_that_changes_while_it_is_converted_is_refused(house, gguf, monkeypatch):
    convert = house.converter.convert

    async def disturbed(job):
        gguf.write_bytes(gguf_file() + b"more")
        async for event in convert(job):
            yield event

    monkeypatch.setattr(house.converter, "convert", disturbed)
    error = await house.refused(gguf)
    assert error.reason == "SOURCE_INVALID"
    assert "changed while it was imported" in error.message
    assert house.store.catalogue.versions == {}


async def test_a_refused_conversion_leaves_nothing(house, gguf, monkeypatch):
    async def refusing(job):
        yield Progress("convert", 0, 0)
        raise Refused("SOURCE_INVALID", "m: no", source="m")

    monkeypatch.setattr(house.converter, "convert", refusing)
    await house.refused(gguf)
    assert house.objects.data == {}
    assert list(house.scratch.iterdir()) == []


async def test_closing_an_import_ends_the_converter_and_leaves_nothing(house, gguf, monkeypatch):
    ended = asyncio.Event()

    async def endless(job):
        try:
            while True:
                yield Progress("convert", 0, 0)
                await asyncio.sleep(0)
        finally:
            ended.set()

    monkeypatch.setattr(house.converter, "convert", endless)
    async with aclosing(house.importer.run(ImportRequest(str(gguf), "m"))) as running:
        async for event in running:
            if event.stage == "convert":
                break
    assert ended.is_set()
    assert house.objects.data == {}
    assert list(house.scratch.iterdir()) == []


async def test_imports_take_turns_and_only_so_many_wait(tmp_path, gguf, monkeypatch):
    house = House(tmp_path, MemoryObjects(), limits=Limits(imports_max=1, imports_waiting_max=2))
    converting, go_on = asyncio.Event(), asyncio.Event()
    convert = house.converter.convert

    async def slow(job):
        converting.set()
        await go_on.wait()
        async for event in convert(job):
            yield event

    monkeypatch.setattr(house.converter, "convert", slow)
    running = [asyncio.create_task(house.run(gguf, name=f"m{n}")) for n in range(3)]
    await converting.wait()
    error = await house.refused(gguf, name="one-too-many")
    assert error.reason == "QUEUE_FULL"
    go_on.set()
    assert all(imported.created for imported in await asyncio.gather(*running))


async def test_the_builtin_model_needs_no_converter(house):
    imported = await house.run("builtin:sim", name="sim")
    assert imported.version.manifest.facts.architecture == "Sim"
    assert house.converter.jobs == []
    assert not (await house.run("builtin:sim", name="sim")).created


async def test_another_builtin_model_is_not_found(house):
    error = await house.refused("builtin:gpt", name="x")
    assert error.reason == "SOURCE_NOT_FOUND"
    assert "builtin:sim" in error.message


async def test_a_missing_source_is_not_found(house, tmp_path):
    assert (await house.refused(tmp_path / "nope.gguf")).reason == "SOURCE_NOT_FOUND"


async def test_a_device_is_no_source(house):
    error = await house.refused("/dev/null")
    assert error.reason == "SOURCE_INVALID"
    assert "no regular file" in error.message


async def test_sources_outside_the_roots_are_denied_and_the_setting_is_named(tmp_path, gguf):
    house = House(tmp_path, MemoryObjects(), roots=[tmp_path / "allowed"])
    for source in (gguf, tmp_path / "nope", "/etc/passwd", tmp_path / "allowed" / ".." / gguf.name):
        error = await house.refused(source)
        assert error.reason == "PERMISSION_DENIED"
        assert "TOKENLOOM_MODELSTORE_IMPORT_ROOTS" in error.message


async def test_links_do_not_lead_out_of_the_roots(tmp_path, gguf, folder):
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "link.gguf").symlink_to(gguf)
    (allowed / "folder").symlink_to(folder)
    inner = allowed / "inner"
    inner.mkdir()
    for file in folder.iterdir():
        (inner / file.name).symlink_to(file)
    house = House(tmp_path, MemoryObjects(), roots=[allowed])
    for source in ("link.gguf", "folder", "inner"):
        assert (await house.refused(allowed / source)).reason == "PERMISSION_DENIED"


async def test_links_inside_the_roots_are_followed(tmp_path, folder):
    cache = tmp_path / "cache"
    cache.mkdir()
    for file in folder.iterdir():
        (cache / file.name).symlink_to(file)
    house = House(tmp_path, MemoryObjects(), roots=[tmp_path])
    assert (await house.run(cache)).created


async def test_no_roots_allow_only_the_builtin_model(tmp_path, gguf):
    house = House(tmp_path, MemoryObjects(), roots=[])
    assert (await house.refused(gguf)).reason == "PERMISSION_DENIED"
    assert (await house.run("builtin:sim", name="sim")).created


@pytest.mark.parametrize("method", ["head", "hash"])
async def test_a_source_that_goes_away_meanwhile_is_the_callers_mistake(house, gguf, monkeypatch, method):
    sources = house.importer._inspector.sources
    found = getattr(sources, method)

    def gone(file, argument):
        gguf.unlink(missing_ok=True)
        return found(file, argument)

    monkeypatch.setattr(sources, method, gone)
    error = await house.refused(gguf)
    assert error.reason == "SOURCE_INVALID"
    assert error.message == (
        "model.Q4_1.gguf: could not be read to its end (No such file or directory); import it again"
    )


async def test_folders_are_made_and_removed_in_threads(tmp_path, house, gguf, monkeypatch):
    loops_thread, seen, rmtree = threading.get_ident(), [], shutil.rmtree

    def watched(path, **options):
        seen.append(threading.get_ident())
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    url = "https://h/m.gguf"
    await house.run(gguf)
    await House(tmp_path, MemoryObjects(), urls={url: gguf_file()}).run(url)
    assert len(seen) == 3
    assert loops_thread not in seen


async def test_what_a_killed_import_left_is_swept_also_when_nothing_is_converted(house, gguf):
    await house.run(gguf)
    left = house.scratch / "left"
    left.mkdir()
    (left / "lock").touch()
    (left / "model.safetensors").write_bytes(b"half")
    await house.run(gguf)
    assert len(house.converter.jobs) == 1
    assert not left.exists()
