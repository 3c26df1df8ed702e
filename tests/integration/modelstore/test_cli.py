"""`tokenloom models …` on a folder and on a running modelstore."""

import asyncio
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.integration.modelstore.conftest import running
from tokenloom.cli.errors import CliError
from tokenloom.cli.models import app, version_reference


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
        (("import", "https://example.org/m.gguf", "--name", "m"), "URLs are not read"),
        (("show", "nope"), "MODEL_NOT_FOUND: no model 'nope'"),
        (("alias", "nope", "stable", "0123456789ab"), "MODEL_NOT_FOUND"),
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


def test_a_modelstore_that_does_not_answer_is_named(cli):
    with pytest.raises(CliError, match=r"the modelstore at 127\.0\.0\.1:1 does not answer"):
        cli("list", where=("--target", "127.0.0.1:1"))


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("stable", "stable"),
        ("0123456789ab", "sha256:0123456789ab"),
        ("sha256:0123456789ab", "sha256:0123456789ab"),
        ("abc", "abc"),
    ],
)
def test_a_version_is_named_by_digits_or_by_an_alias(text, reference):
    assert version_reference(text) == reference


def command(*words):
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    line = [sys.executable, "-m", "tokenloom.cli.main", "models", *words]
    return subprocess.run(line, env=environ, capture_output=True, text=True, timeout=120, check=False)


async def test_the_command_works_through_a_running_modelstore(tmp_path, store):
    async with running(store, str(tmp_path)) as house:
        target = ("--target", f"127.0.0.1:{house.service.port}")
        ended = await _in_thread("import", "builtin:sim", "--name", "sim", "--json", *target)
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["name"] == "sim"
        denied = await _in_thread("import", "/etc/passwd", "--name", "x", *target)
        assert denied.returncode == 1
        assert denied.stderr.startswith("tokenloom: PERMISSION_DENIED: /etc/passwd: ")
        assert denied.stderr.count("\n") == 1


def test_exit_statuses_tell_usage_from_failure(store):
    failed = command("show", "nope", "--store", str(store))
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "tokenloom: MODEL_NOT_FOUND: no model 'nope'; known: none; import one\n"
    assert command("import", "builtin:sim", "--store", str(store)).returncode == 2


async def _in_thread(*words):
    return await asyncio.to_thread(command, *words)
