"""`tokenloom models` on a mesh that runs: where models are resident, loading, unloading, deleting."""

import json
import time

import pytest

from tests.integration.cli.test_local_mesh import Cli

WAIT_S = 60.0


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    """Two sim workers with `one` resident; `two` is in the store only."""
    made = Cli(tmp_path_factory.mktemp("home"))
    made.env["TOKENLOOM_WORKER_SIM_LOAD_S"] = "0.3"
    for name in ("one", "two"):
        made.run("models", "import", "builtin:sim", "--name", name)
    try:
        made.run(*made.up("--detach", "--model", "one"))
        yield made
    finally:
        made.attempt("down")


def models(cli, *words):
    return json.loads(cli.run("models", *words, "--json"))


def where(cli, name):
    """State by worker."""
    (version,) = next(model["versions"] for model in models(cli, "list") if model["name"] == name)
    return {each["worker"]: each["state"] for each in version["resident"]}


def until(holds, what):
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def test_the_list_of_a_running_mesh_says_where_models_are(cli):
    assert where(cli, "one") == {"worker-0": "ready", "worker-1": "ready"}
    assert where(cli, "two") == {}
    out = cli.run("models", "list")
    assert "worker-0, worker-1" in out
    assert "resident" in cli.run("models", "show", "one")


def test_a_model_is_loaded_where_it_is_said_served_and_unloaded(cli):
    (loaded,) = models(cli, "load", "two", "--worker", "worker-1")
    assert (loaded["worker"], loaded["model"], loaded["state"]) == ("worker-1", "two", "ready")
    assert where(cli, "two") == {"worker-1": "ready"}
    answer = json.loads(cli.run("generate", "hello", "--model", "two", "--max-tokens", "3", "--json"))
    assert answer["completion_tokens"] == 3
    status, out = cli.attempt("models", "rm", f"two@{loaded['digest'][7:19]}", "--yes")
    assert status == 1, out
    # The alias is what is said first; without it, the worker.
    assert "MODEL_IN_USE" in out
    assert "two@stable" in out
    (left,) = models(cli, "unload", "two")
    assert (left["worker"], left["model"]) == ("worker-1", "two")
    assert where(cli, "two") == {}
    status, out = cli.attempt("models", "unload", "two")
    assert (status, "is not resident on worker-0, worker-1" in out) == (1, True)


def test_all_workers_load_it_with_progress_for_people(cli):
    out = cli.run("models", "load", "two", "--worker", "all")
    assert "is ready on worker-0" in out
    assert "is ready on worker-1" in out
    assert "worker-0: loading" in out
    assert where(cli, "two") == {"worker-0": "ready", "worker-1": "ready"}
    cli.run("models", "unload", "two", "--worker", "all")


def test_a_resident_model_is_deleted_only_by_force(cli):
    cli.run("models", "import", "builtin:sim", "--name", "three")
    digest = models(cli, "load", "three", "--worker", "worker-0")[0]["digest"]
    status, out = cli.attempt("models", "rm", "three", "--yes")
    assert status == 1
    assert f"three@{digest[:19]} is resident on worker-0" in out
    deleted = models(cli, "rm", "three", "--yes", "--force")
    assert deleted == [{"model": "three", "aliases": ["stable"], "versions": [digest]}]
    # The store has forgotten it; the worker has not.
    cli.run("models", "unload", f"three@{digest[7:19]}")


def test_the_modelstore_of_a_mesh_keeps_aliases_marks_and_whole_blobs(cli):
    digest = models(cli, "show", "one")["digest"]
    models(cli, "alias", "one", "canary", digest)
    assert models(cli, "promote", "one")["changed"] is False
    assert models(cli, "promote", "one", "--to", "next")["sequence"] == 1
    models(cli, "alias", "one", "next", "--delete")
    assert models(cli, "rollback", "one", "next")["targets"] == [{"digest": digest, "weight": 1}]
    assert [change["sequence"] for change in models(cli, "alias", "one", "next")] == [3, 2, 1]
    assert models(cli, "deprecate", "one", "use two")["deprecation"]["message"] == "use two"
    assert "deprecated: use two" in cli.run("models", "list")
    assert models(cli, "deprecate", "one", "--undo")["deprecation"] is None
    assert models(cli, "gc", "--min-age", "0s")["deleted"] == []
    assert models(cli, "verify", "one")["damaged"] == []


def test_an_import_through_the_mesh_is_served_by_the_name_within_a_second(cli):
    cli.run("models", "import", "builtin:sim", "--name", "four")
    cli.run("models", "load", "four")
    until(
        lambda: cli.attempt("generate", "hi", "--model", "four", "--max-tokens", "2")[0] == 0,
        "the gateway does not know it",
    )
