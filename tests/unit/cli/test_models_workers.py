"""`tokenloom models load | unload`, and where models are resident, against workers in memory."""

import asyncio
import io
import json
import random

import pytest
from loom.worker.v1 import worker_pb2
from rich.console import Console

from tests.unit.cli.fakemesh import A, B, FakeStore, FakeWorker, mesh, resident, served, version
from tokenloom.cli import local
from tokenloom.cli.models_load import LoadView
from tokenloom.cli.models_progress import SharesProgress
from tokenloom.cli.models_workers import Worker
from tokenloom.cli.modelstore import Place, is_of_running_mesh
from tokenloom.cli.ports import free_ports
from tokenloom.kit.errors import CallError

BUSY = CallError(
    "MODEL_MEMORY_BUSY",
    "chat needs 16.1 GB and 4.0 GB of 24.0 GB are free",
    retry_after_s=12.34,
)


@pytest.fixture
def store():
    made = FakeStore(version(A), version(B, "other"))
    made.set("chat", "stable", a=1)
    made.set("other", "stable", b=1)
    return made


def test_a_model_is_loaded_on_the_only_worker_and_its_memory_is_said(models, store):
    worker = FakeWorker()
    with mesh(store, worker):
        ended = models("load", "chat")
    assert (ended.status, worker.requests[0].version, worker.requests[0].evict) == (0, A, True)
    assert ended.out.startswith(
        "chat@sha256:aaaaaaaaaaaa is ready on worker-0: 4.0 MB reserved of 10.0 MB, after "
    )


def test_no_evict_is_passed_on(models, store):
    worker = FakeWorker()
    with mesh(store, worker):
        assert models("load", "chat", "--no-evict").status == 0
    assert worker.requests[0].evict is False


def test_without_a_worker_named_the_one_with_most_free_memory_loads(models, store):
    full, empty = FakeWorker(resident(B, "other")), FakeWorker()
    with mesh(store, full, empty):
        loaded = json.loads(models("load", "chat", "--json").out)
    assert [(each["worker"], each["digest"], each["state"]) for each in loaded] == [("worker-1", A, "ready")]
    assert loaded[0]["memory_bytes"] == 4_000_000
    assert loaded[0]["memory_budget_bytes"] == 10_000_000
    assert loaded[0].keys() == {
        "model", "digest", "worker", "endpoint", "state", "progress", "error", "memory_bytes", "running",
        "waiting", "idle_ms", "dwell_left_ms", "memory_budget_bytes", "seconds",
    }  # fmt: skip
    assert full.requests == []


def test_where_it_is_resident_already_comes_first_unless_it_failed_there(models, store):
    with mesh(store, FakeWorker(resident(A)), FakeWorker()):
        assert "on worker-0" in models("load", "chat").out
    with mesh(store, FakeWorker(resident(A, state="FAILED")), FakeWorker()):
        assert "on worker-1" in models("load", "chat").out


def test_all_workers_load_it_and_one_that_refuses_fails_the_command(models, store):
    with mesh(store, FakeWorker(), FakeWorker(refuse=BUSY)):
        ended = models("load", "chat", "--worker", "all")
    assert ended.status == 1
    assert "is ready on worker-0" in ended.out
    assert ended.err.endswith(
        "worker-1: MODEL_MEMORY_BUSY: chat needs 16.1 GB and 4.0 GB of 24.0 GB are free; try again in 12.3 s"
    )


@pytest.mark.parametrize(
    "refusal",
    [
        CallError("MODEL_TOO_LARGE", "chat needs 900 B and there are 100 B in all: raise memory_bytes"),
        CallError("MODEL_MEMORY_BUSY", "no model may be evicted for 3.0 s; try again then", retry_after_s=3),
    ],
)
def test_a_refusal_is_the_workers_own_message_and_says_once_when_to_try_again(models, store, refusal):
    with mesh(store, FakeWorker(refuse=refusal)):
        ended = models("load", "chat", "--worker", "worker-0")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.endswith(f"worker-0: {refusal.reason}: {refusal.message}")


def test_a_worker_of_no_local_mesh_is_named_by_its_address(models, store, mesh_home):
    worker = FakeWorker()
    with served(store) as store_port, served(worker) as port:
        where = ("--worker", f"localhost:{port}", "--target", f"127.0.0.1:{store_port}")
        ended = models("load", "chat", *where)
    assert f"is ready on localhost:{port}" in ended.out


@pytest.mark.parametrize("command", ["load", "unload"])
def test_a_worker_that_is_not_there_is_refused_with_those_that_are(models, store, command):
    with mesh(store, FakeWorker()):
        ended = models(command, "chat", "--worker", "worker-9")
    assert (ended.status, "no worker 'worker-9' (there: worker-0)" in ended.err) == (2, True)


@pytest.mark.parametrize("command", ["load", "unload"])
def test_without_a_mesh_the_cure_is_named(models, command):
    ended = models(command, "chat")
    assert (ended.status, "tokenloom up" in ended.err, "--worker host:port" in ended.err) == (1, True, True)


def test_a_worker_that_does_not_answer_is_named_with_its_address(models, store):
    (port,) = free_ports(1, random.Random())
    with mesh(store, port):
        ended = models("load", "chat")
    assert (ended.status, f"worker-0 at 127.0.0.1:{port} does not answer" in ended.err) == (1, True)


def test_a_model_leaves_every_worker_that_has_it(models, store):
    one, other, third = FakeWorker(resident(A, running=2)), FakeWorker(resident(A)), FakeWorker()
    with mesh(store, one, other, third):
        ended = models("unload", "chat")
    assert ended.out == (
        "chat@sha256:aaaaaaaaaaaa left worker-0: 4.0 MB free again\n"
        "chat@sha256:aaaaaaaaaaaa left worker-1: 4.0 MB free again\n"
    )
    assert "waiting for 2 running sequences" in ended.err
    assert (one.models, other.models, third.requests) == ({}, {}, [])


def test_a_version_that_the_store_has_forgotten_still_leaves(models, store):
    worker = FakeWorker(resident(A))
    with mesh(store, worker):
        store.versions.clear()
        ended = models("unload", f"chat@{'a' * 12}", "--worker", "worker-0", "--json")
    (left,) = json.loads(ended.out)
    assert (left["worker"], left["digest"], left["freed_bytes"]) == ("worker-0", A, 4_000_000)
    assert worker.models == {}


def test_a_model_that_is_resident_nowhere_cannot_leave(models, store):
    with mesh(store, FakeWorker(), FakeWorker(resident(B, "other"))):
        ended = models("unload", "chat")
    assert (ended.status, ended.out) == (1, "")
    assert "chat (sha256:aaaaaaaaaaaa) is not resident on worker-0, worker-1" in ended.err


def test_a_refused_unload_is_said_with_its_worker(models, store):
    refusal = CallError("MODEL_NOT_FOUND", "gone already")
    with mesh(store, FakeWorker(resident(A), refuse=refusal)):
        ended = models("unload", "chat")
    assert (ended.status, ended.err.endswith("worker-0: MODEL_NOT_FOUND: gone already")) == (1, True)


def test_the_list_says_where_each_version_is_resident(models, store):
    here = FakeWorker(resident(A))
    there = FakeWorker(resident(A, state="FETCHING", progress=0.4, memory_bytes=0))
    with mesh(store, here, there):
        out = models("list").out
        plain = json.loads(models("list", "--json").out)
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "RESIDENT" in lines["MODEL"]
    assert "worker-0, worker-1 fetching 40%" in lines["chat"]
    assert "worker" not in lines["other"]
    (of_chat,) = next(model["versions"] for model in plain if model["name"] == "chat")
    assert [(r["worker"], r["state"], r["progress"]) for r in of_chat["resident"]] == [
        ("worker-0", "ready", 1.0 if here.models[A].progress else 0.0),
        ("worker-1", "fetching", 0.4),
    ]
    (of_other,) = next(model["versions"] for model in plain if model["name"] == "other")
    assert of_other["resident"] == []


def test_without_a_mesh_nothing_is_said_about_workers(models, store, mesh_home):
    with served(store) as port:
        where = ("--target", f"127.0.0.1:{port}")
        assert "RESIDENT" not in models("list", *where).out
        assert json.loads(models("show", "chat", "--json", *where).out)["resident"] is None


def test_of_another_modelstore_than_the_meshs_nothing_is_said_about_its_workers(models, store, tmp_path):
    with served(FakeStore(version(A))) as other, mesh(store, FakeWorker(resident(A))):
        assert "RESIDENT" in models("list").out
        assert "RESIDENT" not in models("list", "--target", f"127.0.0.1:{other}").out
        assert is_of_running_mesh(Place(None, str(local.store_dir())))
        assert not is_of_running_mesh(Place(None, str(tmp_path / "elsewhere")))
        assert not is_of_running_mesh(Place(None, "s3://bucket/models"))
    assert not is_of_running_mesh(Place(None, str(local.store_dir())))


def test_a_worker_that_does_not_say_what_it_has_is_named_beside_the_list(models, store):
    (port,) = free_ports(1, random.Random())
    with mesh(store, port):
        ended = models("list")
    assert (ended.status, "worker-0 did not say what is resident there" in ended.err) == (0, True)


def test_one_version_is_shown_with_its_memory_on_each_worker(models, store):
    busy = FakeWorker(resident(A, running=3, waiting=1, dwell_left_ms=42_000))
    idle = FakeWorker(resident(A, idle_ms=90_000))
    failed = FakeWorker(resident(A, state="FAILED", memory_bytes=0, error="out of memory"))
    with mesh(store, busy, idle, failed):
        out = models("show", "chat").out
    assert "worker-0: ready, 4.0 MB reserved, 3 running, 1 waiting, not to be evicted for 42.0 s" in out
    assert "worker-1: ready, 4.0 MB reserved, idle for 1m30s" in out
    assert "worker-2: failed, out of memory" in out
    assert "1.0 kB a token, 8.2 MB a full context" in out


def load_view():
    written = io.StringIO()
    progress = SharesProgress(Console(file=written, width=200))
    return LoadView(progress, Worker("worker-0", "x:1"), version(A), several=False), written


def test_a_load_is_told_as_waiting_fetching_and_loading():
    view, written = load_view()
    leaving = resident(B, "other", "DRAINING", running=8)
    fetching, loading = resident(A, state="FETCHING"), resident(A, state="LOADING")
    for models in ([leaving], [leaving, fetching], [leaving, loading], [loading], [resident(A)]):
        view.tell(worker_pb2.LoadReport(models=models, memory_budget_bytes=7))
    assert written.getvalue().splitlines() == [
        "fetching 2.0 MB, 4.0 MB reserved …",
        "waiting for other (8 running) to leave …",
        "loading, 4.0 MB reserved …",
    ]
    assert view.budget_bytes == 7


def test_an_interrupted_load_says_that_it_goes_on(store, monkeypatch):
    from tokenloom.cli import models_load

    written = io.StringIO()
    monkeypatch.setattr(models_load, "err", Console(file=written))

    async def never(*_, **__):
        raise asyncio.CancelledError

    monkeypatch.setattr(models_load.workers, "load", never)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(models_load._load_all([Worker("w", "x:1")], version(A), True, True, everywhere=True))
    assert "the load goes on" in written.getvalue()
