"""What a mesh loads at its start when nobody said what, and what whoever started it is told."""

import io
import os

import pytest
from rich.console import Console

from tokenloom.cli import models_preload, models_workers
from tokenloom.cli.models_preload import Preloaded, preload
from tokenloom.cli.models_workers import Worker
from tokenloom.cli.supervisor import Event
from tokenloom.cli.view import StartupView
from tokenloom.kit.errors import CallError

FIRST = {"a": "sha256:a", "b": "sha256:b", "c": "sha256:c"}
THERE = [Worker("worker-0", "h:1"), Worker("worker-1", "h:2")]
BUSY = CallError("MODEL_MEMORY_BUSY", "c needs 2, 1 is free", retry_after_s=9.0)
LARGE = CallError("MODEL_TOO_LARGE", "b needs 9 and this worker has 4: raise memory_bytes")


@pytest.fixture
def answers(monkeypatch):
    """What a load of (worker, digest) ends with; and who was asked for what, in order."""
    refusals, asked = {}, []

    async def load(worker, digest, *, evict, tell):
        asked.append((worker.name, digest, evict))
        if (worker.name, digest) in refusals:
            raise refusals[worker.name, digest]

    monkeypatch.setattr(models_workers, "load", load)
    return refusals, asked


async def test_the_first_models_are_loaded_in_their_order_and_none_leaves_for_another(answers):
    _, asked = answers
    assert await preload(THERE[:1], FIRST) == Preloaded(("a", "b", "c"), ())
    assert asked == [("worker-0", digest, False) for digest in FIRST.values()]


async def test_what_has_no_room_now_comes_later_and_what_never_has_is_told_in_the_workers_words(answers):
    refusals, asked = answers
    for worker in THERE:
        refusals[worker.name, "sha256:b"] = LARGE
        refusals[worker.name, "sha256:c"] = BUSY
    # Told once, though both say it.
    assert await preload(THERE, FIRST) == Preloaded(("a",), (f"worker-0: MODEL_TOO_LARGE: {LARGE.message}",))
    assert len(asked) == 6


async def test_a_model_that_one_worker_has_is_there_and_why_the_other_has_not_is_told(answers):
    refusals, _ = answers
    refusals["worker-1", "sha256:b"] = LARGE
    assert await preload(THERE, FIRST) == Preloaded(
        ("a", "b", "c"), (f"worker-1: MODEL_TOO_LARGE: {LARGE.message}",)
    )


async def test_a_load_that_takes_too_long_goes_on_without_the_one_who_waited(answers, monkeypatch):
    async def load(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(models_workers, "load", load)
    done = await preload(THERE[:1], {"a": "sha256:a"})
    assert done.resident == ()
    assert done.failures[0].startswith("worker-0: MODEL_NOT_READY: a is still being loaded after 900 s")
    assert models_preload.PRELOAD_MAX_S == 900


def test_what_is_missing_is_shown_when_the_mesh_is_up(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_HOME", os.fspath(tmp_path))
    shown = io.StringIO()
    with StartupView(Console(file=shown, width=200)) as view:
        view.on_event(Event("waiting", "models", detail="loading a, b"))
        view.on_event(Event("loaded", "models", detail="a", seconds=2.0))
        view.on_event(Event("note", "models", detail="worker-0: MODEL_TOO_LARGE: b needs 9"))
        assert shown.getvalue().splitlines() == ["a loaded after 2.0 s"]
        view.on_event(Event("up", "mesh", 1, "127.0.0.1:1"))
    assert shown.getvalue().splitlines()[1:2] == ["worker-0: MODEL_TOO_LARGE: b needs 9"]
