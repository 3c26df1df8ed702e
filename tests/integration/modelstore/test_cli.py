"""`tokenloom models …` on a folder and through a running modelstore."""

import asyncio
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.integration.modelstore import made
from tests.integration.modelstore.conftest import running
from tokenloom.cli.errors import CliError
from tokenloom.cli.models import app


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def cli(store):
    """Runs a subcommand on the folder; its standard output."""

    def run(*words, where=("--store", str(store))):
        result = CliRunner().invoke(app, [*words, *where], catch_exceptions=True)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_a_model_is_imported_listed_shown_and_aliased(cli):
    assert "sim is imported as sha256:" in cli("import", "builtin:sim", "--name", "sim")
    assert "sim was there already as sha256:" in cli("import", "builtin:sim", "--name", "sim")
    listed = cli("list")
    assert "MODEL" in listed
    assert "stable" in listed
    version = json.loads(cli("show", "sim", "--json"))
    digits = version["digest"].removeprefix("sha256:")[:12]
    assert cli("alias", "sim", "canary", digits).startswith("sim@canary is sha256:")
    shown = cli("show", "sim@canary")
    for word in (version["digest"], "canary, stable", "tokenizer.json", "Apache-2.0", "builtin:sim"):
        assert word in shown


def test_json_is_for_programs(cli):
    imported = json.loads(cli("import", "builtin:sim", "--name", "sim", "--alias", "next", "--json"))
    assert (imported["created"], imported["name"], imported["context_length"]) == (True, "sim", 32768)
    (model,) = json.loads(cli("list", "--json"))
    assert [alias["alias"] for alias in model["aliases"]] == ["next"]
    assert model["versions"][0]["digest"] == imported["digest"]
    changed = json.loads(cli("alias", "sim", "stable", "next", "--json"))
    assert changed.pop("changed_at").endswith("Z")
    assert changed == {
        "model": "sim",
        "alias": "stable",
        "sequence": 1,
        "targets": [{"digest": imported["digest"], "weight": 1}],
    }


def test_an_empty_store_says_how_to_fill_it(cli):
    assert "tokenloom models import" in cli("list")
    assert json.loads(cli("list", "--json")) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("import", "/nope", "--name", "m"), "SOURCE_NOT_FOUND: /nope"),
        (("import", "builtin:sim", "--name", "a b"), "FIELD_INVALID: name: 'a b' is no name"),
        (("import", "ftp://example.org/m.gguf", "--name", "m"), "ftp:// is not read"),
        (("show", "nope"), "MODEL_NOT_FOUND: no model 'nope'"),
        (("alias", "nope", "stable", "0123456789ab"), "MODEL_NOT_FOUND"),
        (("deprecate", "nope", "old"), "MODEL_NOT_FOUND"),
        (("verify", "nope"), "MODEL_NOT_FOUND"),
        (("rm", "nope", "--yes"), "no model named 'nope' (there: none)"),
    ],
)
def test_what_cannot_be_done_is_one_line(cli, words, line):
    with pytest.raises(CliError) as caught:
        cli(*words)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.status == 1


def test_an_alias_that_moved_meanwhile_is_a_conflict(cli):
    cli("import", "builtin:sim", "--name", "sim")
    with pytest.raises(CliError, match="ALIAS_CONFLICT"):
        cli("alias", "sim", "stable", "stable", "--expect", "0")


def test_a_folder_and_an_address_at_once_are_a_usage_error(cli):
    with pytest.raises(CliError) as caught:
        cli("list", "--target", "127.0.0.1:1")
    assert caught.value.status == 2


def test_a_store_that_cannot_be_opened_is_named_with_the_cure(cli, tmp_path):
    (tmp_path / "file").write_text("")
    for place, line in (("ftp://x/y", "give a folder, or a URL of s3"), (str(tmp_path / "file"), "file")):
        with pytest.raises(CliError, match=line) as caught:
            cli("list", where=("--store", place))
        assert "\n" not in str(caught.value)


def test_a_modelstore_that_does_not_answer_is_named(cli):
    with pytest.raises(CliError, match=r"the modelstore at 127\.0\.0\.1:1 does not answer"):
        cli("list", where=("--target", "127.0.0.1:1"))


@pytest.fixture
def two_versions(cli, converting_here, tmp_path):
    """`tiny` with a version that was served, and one that is to be tried: their digests."""
    source = str(made.hf_folder(tmp_path / "tiny"))
    old = json.loads(cli("import", source, "--name", "tiny", "--json"))
    new = json.loads(
        cli("import", source, "--name", "tiny", "--dtype", "float32", "--alias", "canary", "--json")
    )
    return old["digest"], new["digest"]


def test_a_version_is_tried_promoted_and_rolled_back_and_the_old_one_cleaned_up(cli, store, two_versions):
    old, new = two_versions
    shares = f"{old[:19]} 90%, {new[:19]} 10%"
    assert cli("alias", "tiny", "stable", f"{old[7:19]}=90", "canary=10") == (
        f"tiny@stable is {shares} (change 2)\n"
    )
    assert cli("promote", "tiny") == f"tiny@stable is {new[:19]}, was {shares} (change 3)\n"
    assert cli("rollback", "tiny") == f"tiny@stable is {shares}, was {new[:19]} (change 4)\n"
    assert cli("rollback", "tiny") == f"tiny@stable is {new[:19]}, was {shares} (change 5)\n"
    assert cli("alias", "tiny", "stable", "--delete") == "tiny@stable is deleted; its history stays\n"
    history = json.loads(cli("alias", "tiny", "stable", "--history", "--json"))
    assert [(c["sequence"], len(c["targets"])) for c in history] == [
        (6, 0), (5, 1), (4, 2), (3, 1), (2, 2), (1, 1),
    ]  # fmt: skip
    assert "was deleted (change 7)" in cli("promote", "tiny")
    assert "deprecated: use the new one" not in cli("list")
    cli("deprecate", f"tiny@{old[7:19]}", "use the new one")
    assert "deprecated: use the new one" in cli("list")
    with pytest.raises(CliError, match=rf"MODEL_IN_USE: {new} is named by tiny@canary, tiny@stable"):
        cli("rm", f"tiny@{new[7:19]}", "--yes")
    assert f"deleted tiny: {old[:19]}" in cli("rm", f"tiny@{old[7:19]}", "--yes")
    would = json.loads(cli("gc", "--dry-run", "--min-age", "0s", "--json"))
    # What both versions need stays: the tokenizer.
    assert 0 < len(would["deleted"]) < would["kept_blobs"]
    assert would["deleted_bytes"] == sum(file["size_bytes"] for file in would["deleted"])
    did = json.loads(cli("gc", "--min-age", "0s", "--json"))
    assert (did["deleted_bytes"], did["kept_blobs"]) == (would["deleted_bytes"], would["kept_blobs"])
    assert json.loads(cli("gc", "--min-age", "0s", "--json"))["deleted"] == []
    whole = json.loads(cli("verify", "--json"))
    assert (whole["versions"], whole["damaged"]) == (1, [])


def test_damage_is_found_named_and_mended_by_the_import_that_the_cure_names(
    cli, store, two_versions, tmp_path
):
    _, new = two_versions
    (weights,) = [
        file for file in json.loads(cli("show", f"tiny@{new[7:19]}", "--json"))["files"]
        if file["path"].endswith(".safetensors")
    ]  # fmt: skip
    (blob,) = [path for path in store.rglob(f"*{weights['digest'][7:]}*") if path.is_file()]
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    where = ("--store", str(store))
    result = CliRunner().invoke(app, ["verify", *where])
    assert str(result.exception) == "1 blob damaged"
    assert f"{weights['digest']}: wrong digest" in result.stdout
    cure = "`tokenloom models import SRC --name tiny --dtype float32`, where SRC is tiny"
    assert cure in result.stdout
    cli("import", str(tmp_path / "tiny"), "--name", "tiny", "--dtype", "float32")
    assert json.loads(cli("verify", "--json"))["damaged"] == []


def test_a_version_that_is_damaged_beyond_its_name_goes_by_its_digest(cli, store, two_versions):
    old, new = two_versions
    where = ("--store", str(store))
    listed = CliRunner().invoke(app, ["rm", old, "--yes", *where])
    assert str(listed.exception) == f"{old} is listed: give it as tiny@{old[:19]}"
    cli("promote", "tiny")
    (manifest,) = (store / "manifests").rglob(f"{old[7:]}.json")
    manifest.chmod(0o600)
    os.truncate(manifest, 10)
    (found,) = json.loads(CliRunner().invoke(app, ["verify", "--json", *where]).stdout)["damaged"]
    assert found["cure"] == f"import it again; without its source: `tokenloom models rm {old}`"
    told = cli("rm", old, "--yes")
    assert told.startswith(f"deleted {old[:19]}, whose manifest is damaged")
    assert json.loads(cli("verify", "--json"))["damaged"] == []
    gone = CliRunner().invoke(app, ["rm", old, "--yes", *where])
    assert "MODEL_NOT_FOUND" in str(gone.exception)
    (left,) = json.loads(cli("list", "--json"))
    assert [version["digest"] for version in left["versions"]] == [new]


def command(*words):
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    line = [sys.executable, "-m", "tokenloom.cli.main", "models", *words]
    return subprocess.run(line, env=environ, capture_output=True, text=True, timeout=120, check=False)


async def test_the_commands_work_through_a_running_modelstore(tmp_path, store):
    async with running(store, str(tmp_path)) as house:
        target = ("--target", f"127.0.0.1:{house.service.port}")
        ended = await _in_thread("import", "builtin:sim", "--name", "sim", "--json", *target)
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["name"] == "sim"
        denied = await _in_thread("import", "/etc/passwd", "--name", "x", *target)
        assert denied.returncode == 1
        assert denied.stderr.startswith("tokenloom: PERMISSION_DENIED: /etc/passwd: ")
        assert denied.stderr.count("\n") == 1
        for words, says in (
            (("alias", "sim", "canary", "stable"), "sim@canary is sha256:"),
            (("alias", "sim"), "(now)"),
            (("promote", "sim"), "already: nothing changed"),
            (("deprecate", "sim", "old"), "is deprecated: old"),
            (("verify",), "of 1 version read"),
            (("alias", "sim", "canary", "--delete"), "is deleted"),
            (("rm", "sim", "--yes"), "aliases stable"),
            (("gc", "--min-age", "0s"), "0 blobs, 0 B, kept"),
            (("list",), "no models"),
        ):
            ended = await _in_thread(*words, *target)
            assert ended.returncode == 0, ended.stderr
            assert says in ended.stdout, words


def test_exit_statuses_tell_usage_from_failure(store):
    failed = command("show", "nope", "--store", str(store))
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "tokenloom: MODEL_NOT_FOUND: no model 'nope'; known: none; import one\n"
    assert command("import", "builtin:sim", "--store", str(store)).returncode == 2


async def _in_thread(*words):
    return await asyncio.to_thread(command, *words)
