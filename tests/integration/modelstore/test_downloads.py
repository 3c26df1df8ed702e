"""Files over real HTTP: resumed, checked, refused; and a whole import from an URL."""

import hashlib
import os

import pytest
from loom.modelstore.v1 import modelstore_pb2 as pb

from services.modelstore.adapters.web import ATTEMPTS_MAX, known_of
from services.modelstore.core.urls import parse_prefixes, parse_url
from services.modelstore.core.web import Absent, Arrived, TooLarge
from tests.integration.modelstore import made
from tests.integration.modelstore.conftest import running
from tests.integration.modelstore.fetching import DATA, fetch, files, refusal, served
from tests.integration.modelstore.web import FileServer, serving


async def interrupted(url, file, after):
    """Fetch until `after` bytes are here, then leave off as a kill does."""
    events = files().fetch(parse_url(url), str(file), 1 << 30)
    async for event in events:
        if event.done_bytes >= after:
            break
    await events.aclose()


async def test_a_file_arrives_whole_and_is_counted(server, file):
    events = await fetch(f"{server.url}/m.bin", file)
    assert file.read_bytes() == DATA
    assert events[-1] == Arrived(len(DATA), len(DATA))
    done = [event.done_bytes for event in events]
    assert done == sorted(done)


async def test_a_file_that_is_here_is_not_sent_again(server, file):
    await fetch(f"{server.url}/m.bin", file)
    sent = server.sent_bytes
    assert await fetch(f"{server.url}/m.bin", file) == [Arrived(len(DATA), len(DATA))]
    assert server.sent_bytes == sent


async def test_a_file_is_gone_on_with_where_it_was_left(server, file):
    await interrupted(f"{server.url}/m.bin", file, 10_000)
    held = file.stat().st_size
    assert 10_000 <= held <= len(DATA)
    server.sent_bytes = 0
    await fetch(f"{server.url}/m.bin", file)
    assert file.read_bytes() == DATA
    assert server.sent_bytes == len(DATA) - held


@pytest.mark.parametrize("size", [0, 1, 4095, len(DATA) - 1, len(DATA)])
async def test_whatever_length_is_held_the_file_becomes_whole(server, file, size):
    await fetch(f"{server.url}/m.bin", file)
    os.truncate(file, size)
    note = known_of(file)
    note.write_text(note.read_text())
    await fetch(f"{server.url}/m.bin", file)
    assert file.read_bytes() == DATA


async def test_a_file_that_changed_begins_anew(server, file):
    await interrupted(f"{server.url}/m.bin", file, 10_000)
    server.files["/m.bin"] = changed = bytes(len(DATA))
    await fetch(f"{server.url}/m.bin", file)
    assert file.read_bytes() == changed
    server.files["/m.bin"] = DATA
    await fetch(f"{server.url}/m.bin", file)
    assert file.read_bytes() == DATA


@pytest.mark.parametrize("without", ["etags", "ranges", "lengths"])
async def test_a_server_that_knows_less_still_gives_the_whole_file(server, file, without):
    setattr(server, without, False)
    await interrupted(f"{server.url}/m.bin", file, 10_000)
    await fetch(f"{server.url}/m.bin", file)
    assert file.read_bytes() == DATA


async def test_a_note_that_cannot_be_read_begins_anew(server, file):
    await interrupted(f"{server.url}/m.bin", file, 10_000)
    for note in ("", "{", '{"total_bytes": 1}', "[]", '{"strange": 1}'):
        known_of(file).write_text(note)
        await fetch(f"{server.url}/m.bin", file)
        assert file.read_bytes() == DATA


async def test_a_connection_that_breaks_is_made_again_and_goes_on(server, file):
    # What arrives together with the end of a connection is lost, so the end has to come after it.
    server.pause_s = 0.01
    server.break_after = [9_000, 9_000, 9_000]
    await fetch(f"{server.url}/m.bin", file)
    assert file.read_bytes() == DATA
    assert [asked != "" for _, asked in server.asked] == [False, True, True, True]
    assert server.sent_bytes < len(DATA) + 3 * 9_000


async def test_a_server_that_is_busy_is_asked_again(server, file):
    server.statuses["/m.bin"] = [503, 429, 500]
    await fetch(f"{server.url}/m.bin", file)
    assert file.read_bytes() == DATA


async def test_a_server_that_stays_broken_ends_the_import_and_says_that_it_can_go_on(server, file):
    server.statuses["/m.bin"] = [503] * 100
    error = await refusal(f"{server.url}/m.bin", file)
    shown = server.url.removeprefix("http://")
    assert (error.reason, error.metadata["service"]) == ("SERVICE_UNAVAILABLE", shown)
    assert error.message == (
        f"{shown}/m.bin: its server answers 503; what has arrived is kept: "
        "import it again to go on from there"
    )
    assert len(server.asked) == ATTEMPTS_MAX


async def test_a_silent_server_is_given_up(server, file):
    server.hang = True
    error = await refusal(f"{server.url}/m.bin", file, by=files(silence_max_s=0.05))
    assert "was silent for too long" in error.message


async def test_nobody_there_is_said(file, unused_port):
    error = await refusal(f"http://127.0.0.1:{unused_port}/m.bin", file)
    assert error.reason == "SERVICE_UNAVAILABLE"
    assert "the connection failed" in error.message


async def test_a_missing_file_is_absent_and_what_was_held_of_it_is_forgotten(server, file):
    await fetch(f"{server.url}/m.bin", file)
    del server.files["/m.bin"]
    assert await fetch(f"{server.url}/m.bin", file) == [Absent("answers 404")]
    assert not file.exists()


async def test_a_file_that_wants_credentials_is_refused(server, file):
    server.statuses["/m.bin"] = [403]
    error = await refusal(f"{server.url}/m.bin?token=secret", file)
    assert error.reason == "SOURCE_INVALID"
    assert error.message == (
        f"{server.url.removeprefix('http://')}/m.bin: its server answers 403: it wants credentials, which "
        "are never sent; fetch it and give its path"
    )


@pytest.mark.parametrize("lengths", [True, False])
async def test_no_more_is_written_than_the_bound(server, file, lengths):
    server.lengths = lengths
    events = await fetch(f"{server.url}/m.bin", file, bytes_max=10_000)
    assert isinstance(events[-1], TooLarge)
    assert not file.exists() or file.stat().st_size <= 10_000


async def test_what_is_packed_unasked_is_refused(server, file):
    server.headers = {"Content-Encoding": "br"}
    error = await refusal(f"{server.url}/m.bin", file)
    assert error.message.endswith("/m.bin: its server sends it as 'br', unasked")


async def test_redirects_are_followed_and_bounded(server, file):
    server.redirects = {"/a": "/b?x=1", "/b": "m.bin", "/loop": "/loop"}
    await fetch(f"{server.url}/a", file)
    assert file.read_bytes() == DATA
    error = await refusal(f"{server.url}/loop", file)
    assert error.message.endswith("/loop: is redirected more than 5 times")


async def test_a_redirect_out_of_what_is_allowed_is_denied(server, file):
    async with serving(FileServer({"/inner": b"secret"})) as inner:
        server.redirects = {"/a/out": f"{inner.url}/inner", "/a/side": "/m.bin"}
        by = files(parse_prefixes(f"{server.url}/a/"))
        for path in ("/a/out", "/a/side", "/m.bin"):
            error = await refusal(f"{server.url}{path}", file, by=by)
            assert error.reason == "PERMISSION_DENIED"
            assert error.message.endswith(
                f": this modelstore imports from {server.url}/a/; "
                "add the URL's beginning to TOKENLOOM_MODELSTORE_IMPORT_URLS"
            )
        assert inner.asked == []


async def test_cookies_and_credentials_are_not_sent(server, file, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    seen = []
    answer = server.answer

    async def watched(request):
        seen.append(dict(request.headers))
        return await answer(request)

    server.answer = watched
    server.headers = {"Set-Cookie": "a=b"}
    async with serving(server):
        await fetch(f"{server.url}/m.bin", file)
        await fetch(f"{server.url}/m.bin", file)
    assert len(seen) == 2
    assert all({"Authorization", "Cookie"}.isdisjoint(headers) for headers in seen)


@pytest.mark.usefixtures("converting_here")
async def test_a_folder_and_a_file_are_imported_from_urls_by_the_service(tmp_path):
    folder = made.hf_folder(tmp_path / "made", shards=2)
    gguf = made.gguf_file(tmp_path / "tiny.gguf")
    found = served(folder, "/tiny/") | {"/tiny.gguf": gguf.read_bytes(), "/other/x.gguf": b"GGUF"}
    async with serving(FileServer(found)) as server:
        urls = f"{server.url}/tiny/, {server.url}/tiny.gguf"
        async with running(tmp_path / "store", str(tmp_path), IMPORT_URLS=urls) as house:
            imported, progress = await house.import_model(f"{server.url}/tiny/", "url")
            local, _ = await house.import_model(folder, "path")
            assert imported.version.manifest.files == local.version.manifest.files
            assert imported.version.manifest.provenance["source"].endswith("/tiny/")
            stages = list(dict.fromkeys(step.stage for step in progress))
            assert stages == ["download", "read", "convert", "hash", "store"]
            denied = house.import_model(f"{server.url}/other/x.gguf", "x")
            await house.refused("PERMISSION_DENIED", denied)
            digest = f"sha256:{hashlib.sha256(gguf.read_bytes()).hexdigest()}"
            imported, _ = await house.import_model(f"{server.url}/tiny.gguf", "gguf", source_digest=digest)
            assert imported.version.manifest.provenance["format"] == "gguf F32"
            wrong = house.import_model(gguf, "gguf", source_digest="sha256:" + "0" * 64)
            error = await house.refused("DIGEST_MISMATCH", wrong)
            assert error.metadata["actual"] == digest
            listed = await house.call("ListModels", pb.ListModelsRequest())
            assert [model.name for model in listed.models] == ["gguf", "path", "url"]
