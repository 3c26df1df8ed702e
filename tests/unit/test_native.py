"""The batcher's core, compiled and as Python: found by its sources, the same program both ways."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenloom import native
from tools.native import PACKAGES, has_compiler

ROOT = Path(__file__).resolve().parents[2]
TESTS_S_MAX = 240


@pytest.fixture
def finders():
    """Those that a test leaves behind are taken out again."""
    before = list(sys.meta_path)
    yield
    sys.meta_path[:] = before


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "some" / "room"
    folder.mkdir(parents=True)
    for name in ("__init__", "one", "two"):
        (folder / f"{name}.py").write_text(f"NAME = {name!r}\n")
    return folder


def pretend_to_compile(folder):
    built = native.built_folder(folder)
    built.mkdir(parents=True)
    for name in ("one", "some_room__mypyc"):
        (built / f"{name}{native.SUFFIX}").touch()
    return built


def test_what_was_compiled_is_found_and_nothing_else(package, finders):
    built = pretend_to_compile(package)
    assert native.prefer_compiled("some.room", package)
    find = sys.meta_path[0].find_spec
    assert find("some.room.one", None).origin == str(built / f"one{native.SUFFIX}")
    assert find("some_room__mypyc", None).origin == str(built / f"some_room__mypyc{native.SUFFIX}")
    for other in ("some.room", "some.room.two", "some.one", "one", "some.room.one.deeper"):
        assert find(other, None) is None


def test_asking_twice_leaves_one_finder(package, finders):
    pretend_to_compile(package)
    before = len(sys.meta_path)
    assert native.prefer_compiled("some.room", package)
    assert native.prefer_compiled("some.room", package)
    assert len(sys.meta_path) == before + 1


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_what_was_compiled_from_other_sources_is_not_found(package, finders, change):
    pretend_to_compile(package)
    if change == "edited":
        (package / "one.py").write_text("NAME = 'another'\n")
    elif change == "added":
        (package / "three.py").touch()
    else:
        (package / "two.py").unlink()
    assert not native.prefer_compiled("some.room", package)


def test_the_sources_can_be_asked_for(package, finders, monkeypatch):
    pretend_to_compile(package)
    monkeypatch.setenv(native.PURE_PYTHON, "1")
    assert not native.prefer_compiled("some.room", package)


@pytest.mark.parametrize("package", PACKAGES)
def test_an_installation_with_a_compiler_runs_compiled(package):
    if not has_compiler():
        pytest.skip("no C compiler here")
    folder = ROOT / package.replace(".", "/")
    for module in native.sources(folder):
        loaded = importlib.import_module(f"{package}.{module.stem}")
        found = Path(loaded.__file__)
        if os.environ.get(native.PURE_PYTHON):
            assert found == module
        else:
            assert native.built_folder(folder) in found.parents


@pytest.mark.parametrize("package", PACKAGES)
def test_what_has_a_length_says_itself_whether_it_is_empty(package):
    """Compiled code asks an object of its own for `__bool__` and, without one, takes it for true."""
    mute = [
        f"{path.name}: {node.name}"
        for path in native.sources(ROOT / package.replace(".", "/"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and "__len__" in (methods := {item.name for item in node.body if isinstance(item, ast.FunctionDef)})
        and "__bool__" not in methods
    ]
    assert mute == []


@pytest.mark.timeout(TESTS_S_MAX + 30)
def test_the_sources_pass_the_same_tests():
    """Whatever this run uses, the tests of the scheduler pass with the other as well."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    if environ.pop(native.PURE_PYTHON, None) is None:
        environ[native.PURE_PYTHON] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/batcher"]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, timeout=TESTS_S_MAX, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
