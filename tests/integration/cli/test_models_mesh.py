"""`tokenloom models` on a mesh that runs: where models are resident, loading, unloading, deleting."""

import asyncio
import json
import time
import urllib.request

import grpc
import pytest
from loom.inference.v1 import inference_pb2, inference_pb2_grpc
from loom.modelstore.v1 import modelstore_pb2

from services.modelstore.app import open_offline
from tests.integration.cli.test_local_mesh import Cli
from tokenloom.contract.headers import MODEL_DEPRECATED

WAIT_S = 60.0
HEADERS = {"content-type": "application/json"}


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


def told(cli, name, stream):
    """What the response headers at the public port, Envoy's, say of a version; None: nothing."""
    body = json.dumps({"model": name, "prompt": "hi", "max_tokens": 2, "stream": stream}).encode()
    asked = urllib.request.Request(f"http://127.0.0.1:{cli.port}/v1/completions", body, HEADERS)
    with urllib.request.urlopen(asked, timeout=WAIT_S) as answer:
        assert answer.status == 200
        assert answer.read()
        return answer.headers.get(MODEL_DEPRECATED)


def told_over_grpc(cli, name):
    with grpc.insecure_channel(f"127.0.0.1:{cli.port}") as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            inference_pb2.GenerateRequest(
                model=name, prompt="hi", stop=inference_pb2.StopConditions(max_new_tokens=2)
            ),
            timeout=WAIT_S,
        )
        assert list(call)[-1].HasField("finished")
        return dict(call.initial_metadata()).get(MODEL_DEPRECATED)


def test_callers_at_the_public_port_are_told_that_a_version_is_deprecated(cli):
    assert told(cli, "one", stream=False) is None
    cli.run("models", "deprecate", "one", "use two: 50% faster")
    until(lambda: told(cli, "one", stream=False), "the gateway has not heard of it")
    assert [told(cli, "one", stream=stream) for stream in (False, True)] == ["use two: 50%25 faster"] * 2
    assert told_over_grpc(cli, "one") == "use two: 50%25 faster"
    cli.run("models", "deprecate", "one", "--undo")
    until(lambda: told(cli, "one", stream=True) is None, "the gateway has not heard that it is over")
    assert told_over_grpc(cli, "one") is None


def test_a_model_imported_through_the_mesh_and_loaded_is_served_by_its_name(cli):
    cli.run("models", "import", "builtin:sim", "--name", "four")
    cli.run("models", "load", "four")
    until(
        lambda: cli.attempt("generate", "hi", "--model", "four", "--max-tokens", "2")[0] == 0,
        "the gateway does not know it",
    )


async def bring(folder, names):
    """As `models import` does without a mesh, all in this process."""
    store = await open_offline(str(folder))
    for name in names:
        request = modelstore_pb2.ImportModelRequest(source="builtin:sim", name=name)
        assert [step async for step in store.ImportModel(request, None)][-1].HasField("imported")


def test_a_mesh_that_was_not_told_what_to_load_begins_with_what_fits_and_serves_the_rest(tmp_path):
    made = Cli(tmp_path)
    made.env |= {
        "TOKENLOOM_WORKER_KV_CACHE_BYTES": str(1 << 30),
        "TOKENLOOM_WORKER_MEMORY_BYTES": str(5 << 29),
        "TOKENLOOM_WORKER_MIN_DWELL_S": "0",
    }
    names = [f"m{number}" for number in range(9)]
    asyncio.run(bring(tmp_path / "store", names))
    try:
        out = made.run(*made.up("--detach"))
        assert "m0, m1 loaded after" in out
        assert f"loaded when they are asked for: {', '.join(names[2:])}" in out
        assert where(made, "m8") == {}
        answer = json.loads(made.run("generate", "hi", "--model", "m8", "--max-tokens", "3", "--json"))
        assert answer["completion_tokens"] == 3
        assert list(where(made, "m8").values()) == ["ready"]
        made.run("down")
        made.env["TOKENLOOM_WORKER_MEMORY_BYTES"] = str(1 << 29)
        status, out = made.attempt(*made.up("--detach"))
        assert status == 1
        assert "worker-0: MODEL_TOO_LARGE: model m0 needs" in out
        assert "raise memory_bytes" in out
    finally:
        made.attempt("down")
