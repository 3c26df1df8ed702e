"""`tokenloom models rm | gc | verify | import` against a store in memory, and the words of a progress."""

import io
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loom.modelstore.v1 import modelstore_pb2 as pb
from rich.console import Console

from tests.unit.cli.fakemesh import A, B, C, FakeStore, FakeWorker, mesh, resident, version
from tokenloom.cli import local
from tokenloom.cli.errors import CliError
from tokenloom.cli.models import _importing_place
from tokenloom.cli.models_common import duration_ms, model_reference, version_reference, whole_digest
from tokenloom.cli.models_progress import LINE_EVERY_S, BytesProgress
from tokenloom.cli.models_view import ago, listing, parameters
from tokenloom.cli.modelstore import Place
from tokenloom.cli.ports import free_ports


@pytest.fixture
def store(mesh_home):
    made = FakeStore(version(A), version(B), version(C, "other"))
    made.set("chat", "stable", a=1)
    made.set("other", "stable", c=1)
    return made


@pytest.fixture
def up(store):
    with mesh(store):
        yield store


def test_a_version_that_nothing_names_is_deleted_by_the_digits_that_the_list_shows(models, up):
    ended = models("rm", f"chat@{'b' * 12}", "--yes")
    assert ended.status == 0
    assert ended.out.splitlines() == [
        "deleted chat: sha256:bbbbbbbbbbbb (2.0 MB)",
        "the bytes go with the next `tokenloom models gc`",
    ]
    assert set(up.versions) == {A, C}


def test_several_are_deleted_at_once_and_told_to_programs(models, up):
    ended = models("rm", f"chat@{B}", f"chat@{'b' * 12}", "other", "-y", "--json")
    assert json.loads(ended.out) == [
        {"model": "chat", "aliases": [], "versions": [B]},
        {"model": "other", "aliases": ["stable"], "versions": [C]},
    ]
    assert set(up.versions) == {A}


def test_a_name_alone_takes_its_aliases_as_they_were_read_and_then_its_versions(models, up):
    up.set("chat", "stable", b=1)
    assert "deleted chat: sha256:aaaaaaaaaaaa, sha256:bbbbbbbbbbbb (4.0 MB), aliases stable" in (
        models("rm", "chat", "--yes").out
    )
    assert [type(request).__name__ for request in up.requests] == [
        "DeleteAliasRequest",
        "DeleteVersionRequest",
        "DeleteVersionRequest",
    ]
    assert up.requests[0].expected_sequence == 2


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ((f"chat@{'a' * 12}",), 1, f"MODEL_IN_USE: {A} is named by chat@stable: point the alias"),
        (("chat@stable",), 2, "`tokenloom models alias chat stable --delete`"),
        (("nope",), 1, "no model named 'nope' (there: chat, other)"),
        ((f"chat@{'d' * 12}",), 1, "MODEL_NOT_FOUND"),
        ((f"chat@{'b' * 12}", "chat@stable"), 2, "rm takes NAME@DIGEST"),
    ],
)
def test_what_may_not_be_deleted_is_refused_and_nothing_is(models, up, words, status, says):
    ended = models("rm", *words, "--yes")
    assert (ended.status, ended.out) == (status, "")
    assert says in ended.err
    assert up.requests == []


def test_a_version_that_a_worker_has_is_deleted_only_by_force(models, store):
    with mesh(store, FakeWorker(), FakeWorker(resident(B))):
        ended = models("rm", f"chat@{'b' * 12}", "--yes")
        assert ended.status == 1
        assert "MODEL_IN_USE: chat@sha256:bbbbbbbbbbbb is resident on worker-1: unload it with" in ended.err
        assert B in store.versions
        assert models("rm", f"chat@{'b' * 12}", "--yes", "--force").status == 0
    assert B not in store.versions


def test_a_worker_that_does_not_answer_stops_a_deletion(models, store):
    (port,) = free_ports(1, random.Random())
    with mesh(store, port):
        ended = models("rm", f"chat@{'b' * 12}", "--yes")
        assert (ended.status, "worker-0 did not say" in ended.err, B in store.versions) == (1, True, True)


def test_nothing_is_deleted_where_nobody_can_be_asked(models, up):
    ended = models("rm", f"chat@{'b' * 12}")
    assert (ended.status, "give --yes" in ended.err, up.requests) == (2, True, [])


@pytest.mark.parametrize(("answer", "left"), [(True, {A, C}), (False, {A, B, C})])
def test_a_person_is_asked_first(models, up, monkeypatch, answer, left):
    questions = []

    def ask(question, **_):
        questions.append(question)
        return answer

    monkeypatch.setattr("tokenloom.cli.models_common.typer.confirm", ask)
    monkeypatch.setattr("tokenloom.cli.models_common.is_interactive", lambda: True)
    ended = models("rm", f"chat@{'b' * 12}")
    assert questions == ["Delete chat: sha256:bbbbbbbbbbbb (2.0 MB)?"]
    assert ended.status == (0 if answer else 1)
    assert set(up.versions) == left


GARBAGE = pb.CollectGarbageResponse(
    deleted=[pb.File(path="blobs/x", digest=B, size_bytes=1500)],
    deleted_bytes=1500,
    kept_blobs=12,
    kept_bytes=3_000_000,
    spared_blobs=1,
)


def test_what_is_collected_is_listed_with_what_stays(models, up):
    up.garbage.CopyFrom(GARBAGE)
    assert models("gc").out.splitlines() == [
        "sha256:bbbbbbbbbbbb     1.5 kB",
        "1 blob, 1.5 kB, deleted; 12 blobs, 3.0 MB, kept; "
        "1 blob that no version needs spared: too young, or part of an import",
    ]
    assert (up.requests[0].dry_run, up.requests[0].min_age_ms) == (False, 0)


def test_a_dry_run_says_would_and_ages_become_milliseconds(models, up):
    up.garbage.CopyFrom(GARBAGE)
    assert "would be deleted" in models("gc", "--dry-run", "--min-age", "90m").out
    plain = json.loads(models("gc", "--dry-run", "--min-age", "0s", "--json").out)
    assert plain == {
        "dry_run": True,
        "deleted": [{"path": "blobs/x", "digest": B, "size_bytes": 1500}],
        "deleted_bytes": 1500,
        "kept_blobs": 12,
        "kept_bytes": 3_000_000,
        "spared_blobs": 1,
    }
    # 0 would be the store's own setting.
    assert [request.min_age_ms for request in up.requests] == [5_400_000, 1]


@pytest.mark.parametrize("text", ["", "1", "h", "-1h", "1w", "1h30m", "1 h"])
def test_an_age_without_a_unit_is_a_usage_error(models, up, text):
    ended = models("gc", f"--min-age={text}")
    assert (ended.status, "as 90s, 30m, 1h or 2d" in ended.err, up.requests) == (2, True, [])


def test_whole_numbers_of_each_unit_are_durations():
    assert [duration_ms(text, "x") for text in ("5ms", "1.5s", "2m", "1h", "2d")] == [
        5, 1500, 120_000, 3_600_000, 172_800_000,
    ]  # fmt: skip


def verifying(*damaged):
    yield pb.VerifyResponse(progress=pb.Progress(stage="verify", done_bytes=0, total_bytes=10))
    for each in damaged:
        yield pb.VerifyResponse(damaged=each)
    yield pb.VerifyResponse(verified=pb.Verified(versions=2, blobs=3, bytes=5_000_000, damaged=len(damaged)))


def test_a_whole_store_verifies_with_status_0(models, up):
    up.verifying = list(verifying())
    ended = models("verify")
    assert (ended.status, ended.out) == (0, "3 blobs, 5.0 MB, of 2 versions read\n")
    assert json.loads(models("verify", "chat", "--json").out) == {
        "versions": 2,
        "blobs": 3,
        "bytes": 5_000_000,
        "damaged": [],
    }
    assert [request.model for request in up.requests] == ["", "chat"]


def test_damage_is_listed_with_its_cure_and_fails_the_command(models, up):
    up.verifying = list(
        verifying(
            pb.Damaged(digest="sha256:11", versions=[A, B], problem="wrong size: 5, not 7"),
            pb.Damaged(digest="sha256:22", problem="missing"),
            pb.Damaged(digest="sha256:33", versions=["sha256:33"], problem="wrong digest"),
        )
    )
    ended = models("verify")
    assert ended.status == 1
    assert ended.err.endswith("3 blobs damaged")
    cure = "`tokenloom models import SRC --name chat --dtype bfloat16`, where SRC is chat.gguf"
    assert ended.out.splitlines()[:6] == [
        "sha256:11: wrong size: 5, not 7",
        f"  import it again: {cure}",
        "sha256:22: missing",
        "  no version needs it: `tokenloom models gc` deletes it",
        "sha256:33: wrong digest",
        "  import it again; without its source: `tokenloom models rm sha256:33`",
    ]
    damaged = json.loads(models("verify", "--json").out)["damaged"]
    assert [each["digest"] for each in damaged] == ["sha256:11", "sha256:22", "sha256:33"]
    assert damaged[0].keys() == {"digest", "problem", "versions", "cure"}


def test_a_verification_that_ends_early_is_no_success(models, up):
    assert models("verify").status == 1


def importing():
    for stage in ("download", "convert"):
        progress = pb.Progress(stage=stage, done_bytes=1, total_bytes=2)
        yield pb.ImportModelResponse(progress=progress)
    yield pb.ImportModelResponse(imported=pb.Imported(version=version(A), created=True))


def test_an_import_passes_url_and_digest_on_and_tells_each_stage(models, up):
    up.importing = list(importing())
    url = "https://example.org/chat.gguf?x=1"
    target = local.running_target("modelstore")
    words = ("--name", "chat", "--sha256", "AB" * 32, "--alias", "canary", "--target", target)
    ended = models("import", url, *words)
    (request,) = up.requests
    assert (request.source, request.source_digest) == (url, f"sha256:{'ab' * 32}")
    assert list(request.aliases) == ["canary"]
    assert ended.err.splitlines() == ["downloading …", "converting …"]
    assert "chat is imported as sha256:aaaaaaaaaaaa (1.0M parameters, bfloat16, 2.0 MB, context 8192)" in (
        ended.out
    )


def test_a_url_is_fetched_by_this_process_unless_a_modelstore_is_named(up):
    for source in ("https://example.org/m.gguf", "http://example.org/m/"):
        assert _importing_place(source, None, None) == Place(None, str(local.store_dir()))
        assert _importing_place(source, None, "a:1") == Place("a:1", None)
        assert _importing_place(source, "s", None) == Place(None, "s")
    mesh = Place(local.running_target("modelstore"), None)
    assert _importing_place("m.gguf", None, None) == _importing_place("builtin:sim", None, None) == mesh


def test_a_path_is_made_absolute_and_json_says_nothing_else(models, up, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    up.importing = list(importing())
    ended = models("import", "m.gguf", "--name", "chat", "--json")
    assert (up.requests[0].source, up.requests[0].source_digest) == (str(tmp_path / "m.gguf"), "")
    assert ended.err == ""
    assert json.loads(ended.out)["created"] is True


@pytest.mark.parametrize("digest", ["", "ab", "sha256:ab", "g" * 64, "md5:" + "a" * 64])
def test_a_digest_of_another_length_is_a_usage_error(models, up, digest):
    ended = models("import", "m.gguf", "--name", "chat", f"--sha256={digest}")
    assert (ended.status, "64 hex digits" in ended.err, up.requests) == (2, True, [])
    assert whole_digest(f" sha256:{'AB' * 32} ") == f"sha256:{'ab' * 32}"


def test_the_digest_alone_is_for_scripts(models, up):
    assert models("show", "chat", "-q").out == f"{A}\n"
    assert models("show", "chat", "-q", "--json").status == 2


@given(st.text(alphabet="0123456789abcdef", min_size=12, max_size=64), st.sampled_from(["", "sha256:"]))
def test_digits_as_tables_show_them_name_a_version_wherever_one_is_asked_for(digits, prefix):
    assert model_reference(f"chat@{prefix}{digits}") == f"chat@sha256:{digits}"


@pytest.mark.parametrize("text", ["stable", "abc", "0123456789abcdefg"])
def test_anything_else_is_an_alias(text):
    assert version_reference(text) == text
    assert model_reference("chat") == "chat"


class Ticks:
    """A clock that a test moves."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def test_a_log_gets_a_line_for_each_stage_and_then_one_now_and_then_with_rate_and_time_left():
    written, clock = io.StringIO(), Ticks()
    with BytesProgress(Console(file=written, width=200), clock=clock) as progress:
        for second in range(13):
            clock.now_s = 100.0 + second
            progress.show("convert", second * 100_000_000, 2_000_000_000)
        progress.show("store", 5, 0)
        clock.now_s += LINE_EVERY_S
        progress.show("store", 2000, 0)
    assert written.getvalue().splitlines() == [
        "converting …",
        "converting 25%: 500.0 MB of 2.0 GB, 100.0 MB/s, 15.0 s left",
        "converting 50%: 1.0 GB of 2.0 GB, 100.0 MB/s, 10.0 s left",
        "storing …",
        "storing 2.0 kB, 399 B/s",
    ]


def test_a_terminal_gets_bars_and_a_hidden_progress_nothing():
    shown, hidden = io.StringIO(), io.StringIO()
    for file, hide in ((shown, False), (hidden, True)):
        console = Console(file=file, force_terminal=True, width=120)
        with BytesProgress(console, hidden=hide) as progress:
            progress.show("download", 1_000_000, 2_000_000)
    assert "downloading" in shown.getvalue()
    assert "1.0/2.0 MB" in shown.getvalue()
    assert hidden.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (5, "just now"),
        (60, "1 minute ago"),
        (7200, "2 hours ago"),
        (86_400, "1 day ago"),
        (5_184_000, "2 months ago"),
        (63_072_000, "2 years ago"),
    ],
)
def test_ages_are_told_in_the_largest_unit(seconds, words):
    moment = version(A).manifest.created_at
    assert ago(moment, moment.seconds + seconds) == words


def test_parameters_are_told_in_the_unit_that_fits():
    assert [parameters(n) for n in (0, 7, 16_480, 134_515_008, 8_030_261_248)] == [
        "-", "7", "16.5K", "134.5M", "8.0B",
    ]  # fmt: skip


def test_a_narrow_terminal_gets_all_columns_below_each_other(up):
    console = Console(file=io.StringIO(), width=60)
    console.print(listing([up._model("chat")], {}, 60))
    written = console.file.getvalue()
    assert all(len(line) <= 60 for line in written.splitlines())
    for title in ("ALIASES", "PARAMETERS", "DTYPE", "SIZE", "CONTEXT", "RESIDENT", "IMPORTED"):
        assert title in written


def test_a_question_that_nobody_answers_raises_what_ends_the_command(monkeypatch):
    from tokenloom.cli import models_common

    monkeypatch.setattr(models_common, "is_interactive", lambda: False)
    with pytest.raises(CliError, match="give --yes"):
        models_common.confirm("Delete it?", yes=False)
    models_common.confirm("Delete it?", yes=True)
