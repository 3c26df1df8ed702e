"""Envoy's files: the settings that fail silently when they are missing, and what the launcher may change.

What these settings do is shown with a real Envoy in tests/integration/envoy.
"""

import copy
import re
import subprocess

import pytest
import yaml

from tokenloom.cli import envoy

PORTS = envoy.EnvoyPorts(edge=18080, mesh=19010, admin=19901, probes=19090)
ENDPOINTS = {
    "worker": [("127.0.0.1", 20001), ("127.0.0.1", 20002)],
    "batcher": [("127.0.0.1", 20003)],
    "gateway_grpc": [("127.0.0.1", 20004)],
    "gateway_http": [("127.0.0.1", 20005)],
    "otlp": [("127.0.0.1", 20006)],
}
BREAKERS = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
HOLD_MAX_S = 3600
"""The batcher's `hold_max_s` stays below this."""


def listener(name):
    (found,) = envoy.load(f"{name}.yaml")["resources"]
    return found


def manager(found):
    return found["filter_chains"][0]["filters"][0]["typed_config"]


def sampler(found):
    """What decides whether a request that no caller has decided about is traced; None where nothing does."""
    return manager(found)["tracing"]["provider"]["typed_config"].get("sampler")


def traced_share(found):
    share = sampler(found)["typed_config"]["wrapped_sampler"]["typed_config"]["sampling_percentage"]
    return share["numerator"] / {"HUNDRED": 100, "MILLION": 1_000_000}[share["denominator"]]


def without_share(found):
    """A copy that says nothing of how many requests are traced."""
    found = copy.deepcopy(found)
    if sampler(found) is not None:
        del sampler(found)["typed_config"]["wrapped_sampler"]["typed_config"]["sampling_percentage"]
    return found


def filters(name):
    return {f["name"]: f["typed_config"] for f in manager(listener(name))["http_filters"]}


def routes(name):
    (host,) = manager(listener(name))["route_config"]["virtual_hosts"]
    return host, host["routes"]


def all_clusters():
    loaded = [r for f in envoy.CLUSTER_FILES for r in envoy.load(f)["resources"]]
    return loaded + envoy.load(envoy.BOOTSTRAP_FILE)["static_resources"]["clusters"]


def cluster(name):
    return next(c for c in all_clusters() if c["name"] == name)


def seconds(text):
    return float(text.removesuffix("s"))


def http2(found):
    ((_, options),) = found["typed_extension_protocol_options"].items()
    return options["explicit_http_config"]["http2_protocol_options"]


# What the launcher changes.


@pytest.mark.parametrize("name", ["edge", "mesh"])
def test_the_launcher_changes_nothing_of_a_listener_but_its_address_and_the_traced_share(name):
    original = listener(name)
    (local,) = (made for made in envoy.listeners(PORTS, 0.25) if made["name"] == name)
    assert without_share(original) | {"address": local["address"]} == without_share(local)
    place = local["address"]["socket_address"]
    assert place == {"address": "127.0.0.1", "port_value": getattr(PORTS, name)}


@pytest.mark.parametrize(
    ("asked", "share"), [((), 1), ((1.0,), 1), ((0.0,), 0), ((0.25,), 0.25), ((1e-6,), 1e-6)]
)
def test_a_local_edge_traces_the_share_that_was_asked_for_and_all_by_default(asked, share):
    edge = next(made for made in envoy.listeners(PORTS, *asked) if made["name"] == "edge")
    assert traced_share(edge) == share


def test_the_ratio_reaches_the_file_that_envoy_reads(tmp_path):
    envoy.write(tmp_path, PORTS, ENDPOINTS, trace_ratio=0.125)
    written = yaml.safe_load((tmp_path / "listeners.yaml").read_text())["resources"]
    assert [traced_share(found) for found in written if sampler(found)] == [0.125]


def test_the_launcher_changes_nothing_of_a_cluster_but_where_it_points():
    originals = {c["name"]: c for f in envoy.CLUSTER_FILES for c in envoy.load(f)["resources"]}
    made = {c["name"]: c for c in envoy.clusters(ENDPOINTS)}
    assert made.keys() == originals.keys()
    pointing = {"type", "cluster_type", "load_assignment"}
    for name, original in originals.items():
        assert {k: v for k, v in original.items() if k not in pointing} == {
            k: v for k, v in made[name].items() if k not in pointing
        }
        points = made[name]["load_assignment"]["endpoints"][0]["lb_endpoints"]
        found = [p["endpoint"]["address"]["socket_address"] for p in points]
        assert [(a["address"], a["port_value"]) for a in found] == ENDPOINTS[name]


def test_a_cluster_that_both_envoys_have_is_the_same_in_both_files():
    edge, mesh = ({c["name"]: c for c in envoy.load(f)["resources"]} for f in envoy.CLUSTER_FILES)
    shared = edge.keys() & mesh.keys()
    assert shared == {"otlp"}
    assert all(edge[name] == mesh[name] for name in shared)


def test_only_the_edge_can_be_bound_beyond_loopback():
    ports = envoy.EnvoyPorts(edge=1, mesh=2, admin=3, probes=4, edge_host="0.0.0.0")
    places = {made["name"]: made["address"]["socket_address"]["address"] for made in envoy.listeners(ports)}
    assert places == {"edge": "0.0.0.0", "mesh": "127.0.0.1"}


def test_the_local_bootstrap_differs_in_places_and_in_how_soon_spans_leave(tmp_path):
    def without_places(made):
        return re.sub(r"port_value: \d+|address: [\d.]+|path: /\S*\.yaml|_interval_ms: \d+", "", dump(made))

    def dump(made):
        made = made | {"static_resources": made["static_resources"] | {"clusters": []}}
        return yaml.safe_dump(made)

    local = envoy.bootstrap(PORTS, tmp_path)
    assert without_places(local) == without_places(envoy.load(envoy.BOOTSTRAP_FILE))
    assert (
        local["layered_runtime"]["layers"][0]["static_layer"]["tracing.opentelemetry.flush_interval_ms"]
        <= 1000
    )


# Whole files.


@pytest.mark.parametrize("where", ["kubernetes", "local"])
def test_envoy_accepts_the_files_without_a_warning(where, tmp_path):
    if where == "local":
        bootstrap = envoy.bootstrap(PORTS, tmp_path)
        listeners, clusters = envoy.listeners(PORTS, 0.25), envoy.clusters(ENDPOINTS)
    else:
        bootstrap = envoy.load(envoy.BOOTSTRAP_FILE)
        listeners = [listener("edge"), listener("mesh")]
        clusters = list(
            {c["name"]: c for f in envoy.CLUSTER_FILES for c in envoy.load(f)["resources"]}.values()
        )
    path = tmp_path / "whole.yaml"
    path.write_text(yaml.safe_dump(envoy.standalone(bootstrap, listeners, clusters)))
    binary = envoy.find_binary()
    assert binary is not None, "no Envoy: run make install"
    node = ["--service-node", "n", "--service-cluster", "c"]
    command = [str(binary), "--mode", "validate", "--log-level", "warning", *node, "-c", str(path)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    assert "deprecated" not in checked.stderr, checked.stderr


def test_admin_is_on_loopback_only():
    assert envoy.load(envoy.BOOTSTRAP_FILE)["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


# Limits: each default ends or bypasses something without an error.


@pytest.mark.parametrize("name", sorted({c["name"] for c in all_clusters()}))
def test_every_cluster_sets_all_four_circuit_breakers(name):
    (threshold,) = cluster(name)["circuit_breakers"]["thresholds"]
    assert threshold.keys() == set(BREAKERS)
    if name != "admin":
        assert min(threshold.values()) >= 10_000


@pytest.mark.parametrize("name", ["edge", "mesh"])
def test_listeners_bound_streams_far_above_the_default_and_frames_further(name):
    options = manager(listener(name))["http2_protocol_options"]
    assert options["max_concurrent_streams"] >= 10_000
    assert options["max_outbound_frames"] >= 100_000
    assert options["max_outbound_control_frames"] >= options["max_concurrent_streams"]


@pytest.mark.parametrize("name", ["worker", "batcher", "gateway_grpc"])
def test_upstream_connections_carry_many_streams_and_survive_many_resets(name):
    options = http2(cluster(name))
    assert options["max_concurrent_streams"] >= 10_000
    assert options["max_outbound_control_frames"] >= 100_000
    assert seconds(options["connection_keepalive"]["interval"]) >= 5, "the servers refuse more frequent pings"


@pytest.mark.parametrize("name", ["edge", "mesh"])
def test_an_idle_stream_outlives_the_longest_hold(name):
    found = manager(listener(name))
    assert seconds(found["stream_idle_timeout"]) > HOLD_MAX_S
    assert seconds(found["common_http_protocol_options"]["idle_timeout"]) > HOLD_MAX_S


def test_no_route_has_a_timeout():
    for name in ("edge", "mesh"):
        carried = [r["route"] for r in routes(name)[1] if "route" in r]
        assert carried
        assert [r["timeout"] for r in carried] == ["0s"] * len(carried)


def test_quick_resets_by_many_callers_do_not_end_a_connection_early():
    settings = envoy.load(envoy.BOOTSTRAP_FILE)["layered_runtime"]["layers"][0]["static_layer"]
    assert settings["overload.premature_reset_total_stream_count"] >= 10_000


# The batcher as ext_proc.


def test_the_batcher_sees_request_headers_response_headers_and_trailers_and_no_bodies():
    mode = filters("mesh")["envoy.filters.http.ext_proc"]["processing_mode"]
    assert mode == {
        "request_header_mode": "SEND",
        "response_header_mode": "SEND",
        "response_trailer_mode": "SEND",
        "request_body_mode": "NONE",
        "response_body_mode": "NONE",
        "request_trailer_mode": "SKIP",
    }


def test_a_hung_batcher_costs_a_second_and_a_hold_may_be_an_hour():
    found = filters("mesh")["envoy.filters.http.ext_proc"]
    assert (found["message_timeout"], found["max_message_timeout"]) == ("1s", f"{HOLD_MAX_S}s")
    assert found["grpc_service"]["timeout"] == "0s"


def test_without_the_batcher_envoy_chooses_itself():
    assert filters("mesh")["envoy.filters.http.ext_proc"]["failure_mode_allow"] is True


def test_only_generate_asks_the_batcher_and_only_it_is_carried():
    _, (generate, rest) = routes("mesh")
    assert generate["match"] == {"path": "/loom.worker.v1.WorkerService/Generate"}
    assert "typed_per_filter_config" not in generate
    # 404 is what Envoy turns into UNIMPLEMENTED for a gRPC caller.
    assert (rest["match"], rest["direct_response"]["status"]) == ({"prefix": "/"}, 404)
    assert rest["typed_per_filter_config"]["envoy.filters.http.ext_proc"]["disabled"] is True


def test_a_call_moves_to_another_host_until_a_worker_has_answered():
    policy = routes("mesh")[1][0]["route"]["retry_policy"]
    wanted = "connect-failure,refused-stream,reset-before-request,resource-exhausted"
    assert policy["retry_on"] == wanted
    assert [p["name"] for p in policy["retry_host_predicate"]] == [
        "envoy.retry_host_predicates.previous_hosts"
    ]
    assert policy["host_selection_retry_max_attempts"] >= 5
    assert routes("mesh")[1][0]["request_body_buffer_limit"] >= 16 * 1024 * 1024


def test_the_named_worker_comes_first_and_the_idlest_healthy_one_otherwise():
    (policy,) = cluster("worker")["load_balancing_policy"]["policies"]
    chosen = policy["typed_extension_config"]
    assert chosen["name"] == "envoy.load_balancing_policies.override_host"
    # One source: header and metadata together would be two tries at the same worker.
    assert chosen["typed_config"]["override_host_sources"] == [{"header": "x-gateway-destination-endpoint"}]
    (fallback,) = chosen["typed_config"]["fallback_policy"]["policies"]
    assert fallback["typed_extension_config"]["name"] == "envoy.load_balancing_policies.least_request"
    assert [h.keys() & {"grpc_health_check"} for h in cluster("worker")["health_checks"]] == [
        {"grpc_health_check"}
    ]
    assert cluster("worker")["outlier_detection"]


def test_a_gateways_own_error_never_sets_it_aside():
    for name in ("gateway_grpc", "gateway_http", "batcher"):
        found = cluster(name)["outlier_detection"]
        assert found["enforcing_consecutive_5xx"] == 0
        assert found["enforcing_consecutive_gateway_failure"] == 0
        assert found["split_external_local_origin_errors"] is True


def test_each_listener_traces_under_its_own_name():
    for name in ("edge", "mesh"):
        tracing = manager(listener(name))["tracing"]["provider"]["typed_config"]
        assert tracing["service_name"] == name
        assert tracing["grpc_service"]["envoy_grpc"]["cluster_name"] == "otlp"


def test_only_the_edge_decides_which_requests_are_traced_and_a_caller_may_have_decided():
    assert sampler(listener("mesh")) is None
    assert sampler(listener("edge"))["name"] == "envoy.tracers.opentelemetry.samplers.parent_based"
    assert traced_share(listener("edge")) == 1


def test_kubernetes_finds_everything_by_headless_names_that_are_asked_often():
    for name in ("worker", "batcher", "gateway_grpc", "gateway_http", "otlp"):
        found = cluster(name)["cluster_type"]
        assert found["name"] == "envoy.clusters.dns"
        assert seconds(found["typed_config"]["dns_refresh_rate"]) <= 5
        # Every address is an endpoint of its own.
        assert not found["typed_config"].get("all_addresses_in_single_endpoint")
