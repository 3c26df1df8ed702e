"""Worker addresses, load reports, settings, and the views for people."""

import socket

import pytest
from loom.worker.v1 import worker_pb2

from services.batcher.adapters import views
from services.batcher.adapters.discovery import DnsName, parse_workers
from services.batcher.adapters.reports import load_report
from services.batcher.core.messages import Dispatch, LoadReport, ModelReport, ModelState, Reject
from services.batcher.core.snapshot import Place
from services.batcher.settings import BatcherSettings
from tests.unit.batcher.words import MODEL, Desk, request
from tokenloom.kit.settings import SettingsError, load_settings


async def test_a_list_names_its_workers():
    found = await parse_workers("10.0.0.1:9100, [::1]:9100,127.0.0.1:7").endpoints()
    assert found == {"10.0.0.1:9100", "[::1]:9100", "127.0.0.1:7"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "worker:9100",
        "10.0.0.1",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "10.0.0.1:x",
        ":9100",
        "1.2.3.4:1,,5.6.7.8:2",
        "dns:///",
        "dns:///w",
        f"dns:///{'x' * 70}.y:1",
    ],
)
def test_what_names_no_worker_is_refused_with_the_way_to_write_it(text):
    with pytest.raises(ValueError, match=r"dns:///|DNS name"):
        parse_workers(text)


async def test_a_dns_name_gives_every_address(monkeypatch):
    def getaddrinfo(host, port, **_):
        assert (host, port) == ("worker", 9100)
        family = socket.AF_INET
        return [(family, 1, 6, "", (ip, port)) for ip in ("10.0.0.1", "10.0.0.2", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kw: getaddrinfo(*args[:2]))
    discovery = parse_workers("dns:///worker:9100")
    assert isinstance(discovery, DnsName)
    assert await discovery.endpoints() == {"10.0.0.1:9100", "10.0.0.2:9100"}


async def test_a_name_without_addresses_has_no_workers_and_a_dead_resolver_says_nothing(monkeypatch):
    answer = socket.gaierror(socket.EAI_NONAME, "no such name")

    def getaddrinfo(*_, **__):
        raise answer

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    discovery = parse_workers("dns:///worker:9100")
    assert await discovery.endpoints() == frozenset()
    answer = socket.gaierror(socket.EAI_AGAIN, "try again")
    with pytest.raises(OSError, match="try again"):
        await discovery.endpoints()


def test_a_load_report_is_taken_over_field_by_field():
    wire = worker_pb2.LoadReport(boot_id="b", sequence=9, draining=True, active_request_ids=["x", "y"])
    wire.models.add(
        version=MODEL, state=worker_pb2.MODEL_STATE_LOADING, progress=0.5, error="e", free_sequences=1,
        free_blocks=2, block_tokens=16, total_blocks=4, running=5, waiting=6, queued_prefill_tokens=7,
        prefill_tokens_per_s=8.0, sequences_max=9,
    )  # fmt: skip
    wire.models.add(version="unknown state", state=worker_pb2.MODEL_STATE_UNSPECIFIED)
    model = ModelReport(MODEL, ModelState.LOADING, 0.5, "e", 1, 2, 16, 4, 5, 6, 7, 8.0, 9)
    assert load_report(wire) == LoadReport("b", True, (model,), ("x", "y"))


def test_settings_reach_the_core_in_its_units():
    env = {"TOKENLOOM_BATCHER_WORKERS": "127.0.0.1:1", "TOKENLOOM_BATCHER_REPORT_STALE_MS": "250"}
    settings = load_settings(BatcherSettings, env)
    assert settings.limits().report_stale_s == 0.25


def test_bad_settings_are_reported_together():
    env = {
        "TOKENLOOM_BATCHER_WORKERS": "worker:9100",
        "TOKENLOOM_BATCHER_HOLD_MAX_S": "3600",
        "TOKENLOOM_BATCHER_QUEUE_DEPTH": "1",
    }
    with pytest.raises(SettingsError) as caught:
        load_settings(BatcherSettings, env)
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert all(name in text for name in env)
    assert "dns:///worker:9100" in text


def test_the_longest_hold_and_its_margin_stay_below_envoys_limit():
    (bound,) = [m.le for m in BatcherSettings.model_fields["hold_max_s"].metadata if hasattr(m, "le")]
    assert bound < 3_590


def test_the_state_names_bands_and_counts_refusals():
    desk = Desk(queue_depth_max=3)
    desk.report(free=0)
    for priority in (0, 1, 4, 2):
        desk.arrive(priority=priority)
    desk.now += 1.5
    state = views.state(desk.scheduler.snapshot(desk.now, 10), unix_ms=77)
    assert state.unix_ms == 77
    assert dict(state.queues[0].depth_by_priority) == {"standard": 1, "interactive": 1, "sheddable": 1}
    assert state.queues[0].oldest_wait_ms == 1500
    assert dict(state.counters.refused) == {"QUEUE_FULL": 1}
    assert (state.workers[0].alive, state.workers[0].models[0].state) == (True, "ready")


def test_a_watcher_is_told_place_load_dispatch_and_refusal():
    queued, loading = views.news(Place(1, 4, 0.25, 0, "w1", 0.5))
    assert (queued.queued.position, queued.queued.waited_ms, queued.queued.priority) == (4, 250, 2)
    assert (loading.loading.endpoint, loading.loading.progress) == ("w1", 0.5)
    (placed,) = views.news(Place(1, None, 1.0, 2, "w1"))
    (dispatched,) = views.news(Dispatch(1, request(), "w1", "lease", 1.0))
    assert placed == dispatched
    assert dispatched.dispatched.waited_ms == 1000
    (refused,) = views.news(Reject(1, request(), "SHED", "why", {}, None, 0.0))
    assert (refused.refused.reason, refused.refused.message) == ("SHED", "why")
