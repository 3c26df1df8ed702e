"""The images: what the manifests ask for is what `deploy/docker` builds, with what the services need."""

from __future__ import annotations

import importlib.util
import re
import tomllib

import pytest

from tests.contract.kubernetes_support import OVERLAYS, ROOT, render

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def requirements():
    spec = importlib.util.spec_from_file_location("runtime_requirements", DOCKER / "runtime_requirements.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(lock):
    return {re.split(r"[=\[ ]", line)[0] for line in lock.splitlines() if "==" in line}


def test_the_manifests_use_the_images_that_are_built():
    targets = set(re.findall(r"^FROM \S+ AS (services\S*)", DOCKERFILE, re.M))
    images = {
        container["image"]
        for overlay in OVERLAYS
        for workload in render(overlay).workloads
        for container in render(overlay).pod(workload)["containers"]
        if container["image"].startswith("registry.example/")
    }
    assert images == {f"registry.example/tokenloom/{t}:{PROJECT['project']['version']}" for t in targets}
    readme = (DOCKER / "README.md").read_text()
    for target in targets:
        assert f"--target {target} -t registry.example/tokenloom/{target}:" in readme


def test_pods_run_as_the_user_that_the_image_has():
    (user,) = re.findall(r"^USER (\d+):", DOCKERFILE, re.M)
    assert render("prod").pod("worker")["securityContext"]["runAsUser"] == int(user)


def test_torch_is_the_one_that_is_tested():
    (makefile,) = re.findall(r"^TORCH := (\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert f"ARG TORCH={makefile}\n" in DOCKERFILE


def test_what_the_build_copies_is_let_in():
    allowed = {
        line[1:]
        for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M):
        copied |= set(line.split()[:-1])
    assert copied == allowed
    assert [path for path in copied if not (ROOT / path).exists()] == []


def test_images_have_all_that_the_services_need_and_no_test_tools(requirements):
    lock = (ROOT / "requirements.lock").read_text()
    dependencies = PROJECT["project"]["dependencies"]
    kept = requirements.runtime(lock, dependencies, set())
    wanted = {re.split(r"[^\w-]", d)[0] for d in dependencies}
    assert wanted <= names(kept)
    # Wanted by others only: through two steps, and under two pins.
    assert {"multidict", "pydantic-core", "googleapis-common-protos"} <= names(kept)
    assert kept.count("numpy==") == lock.count("numpy==")
    assert names(kept).isdisjoint({"pytest", "mypy", "ruff", "hypothesis", "openai", "grpcio-tools"})
    plain = requirements.runtime(lock, dependencies, {"transformers"})
    assert names(kept) - names(plain) >= {"transformers"}
    assert wanted - {"transformers"} <= names(plain)


def test_a_dependency_that_is_not_locked_is_named(requirements):
    with pytest.raises(SystemExit, match="left-pad"):
        requirements.runtime("numpy==2.0 \\\n    # via tokenloom\n", ["numpy>=2", "left-pad>=1"], set())
