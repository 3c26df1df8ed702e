"""Worker addresses, load reports and settings."""

import socket

import pytest
from loom.worker.v1 import worker_pb2

from services.batcher.adapters.discovery import DnsName, parse_workers
from services.batcher.adapters.reports import load_report
from services.batcher.core.messages import (
    LoadReport,
    ModelNews,
    ModelReport,
    ModelState,
    PrefixChanges,
    Served,
)
from services.batcher.settings import BatcherSettings
from tests.unit.batcher.words import MODEL
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
        prefill_tokens_per_s=8.0, sequences_max=9, decode_tokens_per_s=10.0, step_tokens_max=11,
        prefix_queried_tokens=12, prefix_hit_tokens=13,
    )  # fmt: skip
    wire.models.add(version="unknown state", state=worker_pb2.MODEL_STATE_UNSPECIFIED)
    model = ModelReport(MODEL, ModelState.LOADING, 0.5, "e", 1, 2, 16, 4, 5, 6, 7, 8.0, 9, 10.0, 11, 12, 13)
    assert load_report(wire) == LoadReport("b", True, (model,), ("x", "y"), ())


def test_news_of_a_model_are_there_only_when_the_report_has_some():
    wire = worker_pb2.LoadReport()
    ready = worker_pb2.MODEL_STATE_READY
    wire.models.add(version="silent", state=ready)
    cached = wire.models.add(version="cached", state=ready)
    cached.prefix.stored.extend([(1 << 64) - 1, 2])
    cached.prefix.evicted.append(3)
    begun = wire.models.add(version="begun", state=ready)
    begun.prefix.whole = True
    served = wire.models.add(version="served", state=ready)
    served.served.add(tenant="acme", priority=1, prompt_tokens=5, generated_tokens=6)
    unknown = wire.models.add(version="unknown")
    unknown.prefix.whole = True
    assert load_report(wire).news == (
        ModelNews("cached", PrefixChanges(False, ((1 << 64) - 1, 2), (3,))),
        ModelNews("begun", PrefixChanges(True)),
        ModelNews("served", None, (Served("acme", 1, 5, 6),)),
    )


def test_settings_reach_the_core_in_its_units():
    env = {"TOKENLOOM_BATCHER_WORKERS": "127.0.0.1:1", "TOKENLOOM_BATCHER_REPORT_STALE_MS": "250"}
    settings = load_settings(BatcherSettings, env)
    assert settings.limits().report_stale_s == 0.25


def test_shares_and_weights_are_read_as_json():
    env = {
        "TOKENLOOM_BATCHER_WORKERS": "127.0.0.1:1",
        "TOKENLOOM_BATCHER_BAND_SHARES": "[1, 1, 0.5, 0.25]",
        "TOKENLOOM_BATCHER_TENANT_WEIGHTS": '{"acme": 2}',
    }
    limits = load_settings(BatcherSettings, env).limits()
    assert (limits.band_shares, limits.tenant_weights) == ((1, 1, 0.5, 0.25), {"acme": 2})
    for wrong in ("acme=2", '{"acme": 0}', "[1]"):
        with pytest.raises(SettingsError, match="TENANT_WEIGHTS"):
            load_settings(BatcherSettings, env | {"TOKENLOOM_BATCHER_TENANT_WEIGHTS": wrong})


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
