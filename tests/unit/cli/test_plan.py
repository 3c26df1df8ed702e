"""Which processes a local mesh has, and that each service understands its settings."""

import random
from importlib import import_module
from pathlib import Path

import pytest

from tokenloom.cli import catalog, plan
from tokenloom.cli.errors import CliError
from tokenloom.kit.settings import load_settings

SETTINGS = {
    "modelstore": ("services.modelstore.settings", "ModelstoreSettings"),
    "worker": ("services.worker.settings", "WorkerSettings"),
    "batcher": ("services.batcher.settings", "BatcherSettings"),
    "gateway": ("services.gateway.settings", "GatewaySettings"),
}


def make(outer=None, cpus=8, **options):
    chosen = plan.Options(**options)
    ports = plan.Ports.choose(chosen, random.Random(3))
    return plan.Plan(chosen, ports, outer or {}, Path("/store"), Path("/cache"), cpus)


def specs(made, models=("m",)):
    return {s.name: s for s in [made.modelstore(), *made.serving(list(models), ["envoy"])]}


def test_every_process_has_its_own_ports_and_only_the_public_one_is_fixed():
    made = specs(make(workers=3, port=8123))
    assert list(made) == ["modelstore", "worker-0", "worker-1", "worker-2", "batcher", "gateway", "envoy"]
    numbers = [port for spec in made.values() for port in spec.ports.values()]
    assert len(set(numbers)) == len(numbers)
    assert made["envoy"].ports["edge"] == 8123
    assert all("metrics" in spec.ports for spec in made.values())


@pytest.mark.parametrize("service", sorted(SETTINGS))
def test_each_service_accepts_the_settings_it_is_given(service):
    module, name = SETTINGS[service]
    made = specs(make(workers=2, engine="sim"), ["one", "two"])
    spec = made.get(service) or made[f"{service}-1"]
    settings = load_settings(getattr(import_module(module), name), spec.env)
    assert settings.metrics_port == spec.ports["metrics"]
    assert settings.host == "127.0.0.1"
    assert settings.name == spec.name


def test_batcher_and_envoy_know_the_workers_by_the_same_addresses():
    made = make(workers=2)
    from_batcher = specs(made)["batcher"].env["TOKENLOOM_BATCHER_WORKERS"].split(",")
    assert from_batcher == [f"{host}:{port}" for host, port in made.endpoints()["worker"]]


def test_workers_read_the_modelstores_own_folder():
    made = specs(make(workers=2))
    store = made["modelstore"].env["TOKENLOOM_MODELSTORE_STORE_DIR"]
    assert {made[f"worker-{i}"].env["TOKENLOOM_WORKER_STORE_DIR"] for i in range(2)} == {store}


def test_threads_are_divided_between_workers_and_never_zero():
    assert [plan.threads_per_worker(8, n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1]


def test_a_callers_own_setting_is_passed_on():
    outer = {"TOKENLOOM_WORKER_SIM_STEP_MS": "3", "TOKENLOOM_WORKER_THREADS": "5"}
    env = specs(make(outer))["worker-0"].env
    assert (env["TOKENLOOM_WORKER_SIM_STEP_MS"], env["TOKENLOOM_WORKER_THREADS"]) == ("3", "5")


def test_a_proxy_of_the_caller_is_not_used_between_the_processes():
    env = specs(make({"no_proxy": "example.org", "http_proxy": "http://p"}))["gateway"].env
    assert env["no_proxy"].split(",") == ["example.org", "127.0.0.1", "localhost"]


STORED = {"big": False, "small": False, "pretend": True}


def test_all_models_with_weights_are_loaded_when_none_is_named():
    assert catalog.choose(STORED, "torch", []) == ["big", "small"]
    assert catalog.choose(STORED, "sim", []) == ["big", "pretend", "small"]


def test_a_store_of_many_models_is_served_whole():
    many = {f"m{i}": False for i in range(9)}
    assert catalog.choose(many, "torch", []) == sorted(many)


def test_named_models_are_loaded_once_each_with_their_alias():
    assert catalog.choose(STORED, "torch", ["small@canary", "big", "big"]) == ["small@canary", "big"]


def test_a_model_that_its_name_alone_does_not_stand_for_is_loaded_only_by_an_alias():
    assert catalog.choose(STORED, "torch", [], {"big"}) == ["small"]
    assert catalog.choose(STORED, "torch", ["big@canary"], {"big"}) == ["big@canary"]
    with pytest.raises(CliError, match="tokenloom models alias NAME stable VERSION"):
        catalog.choose(STORED, "torch", [], {"big", "small"})


@pytest.mark.parametrize(
    ("stored", "engine", "wanted", "says"),
    [
        ({}, "torch", [], "tokenloom models import"),
        ({"pretend": True}, "torch", [], "--engine sim"),
        (STORED, "torch", ["absent"], "there: big, pretend, small"),
        (STORED, "torch", ["pretend"], "--engine sim"),
        (STORED, "torch", ["not a name"], "--model not a name"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_cure(stored, engine, wanted, says):
    with pytest.raises(CliError, match=says):
        catalog.choose(stored, engine, wanted)
