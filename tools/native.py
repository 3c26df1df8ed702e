"""`python -m tools.native`: compiles the packages that `tokenloom.native` finds, with mypyc.

What was compiled from the same sources is left alone, what was from others is removed. Without a C
compiler nothing is compiled and that is said: the packages then run as Python, slower.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tokenloom import native

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("services.batcher.core",)
COMPILE_S_MAX = 900
SETUP = """
from mypyc.build import mypycify
from setuptools import setup

setup(
    name={group!r},
    packages=[],
    ext_modules=mypycify(
        ["--config-file", "pyproject.toml", *{paths!r}],
        group_name={group!r}, target_dir={target!r}, opt_level="3", debug_level="0",
    ),
)
"""


def main() -> int:
    """0 also without a compiler."""
    if not has_compiler():
        print("no C compiler (set CC=): " + ", ".join(PACKAGES) + " will run as Python", file=sys.stderr)
        return 0
    for package in PACKAGES:
        print(f"{package}: {compile_package(package, ROOT).relative_to(ROOT)}")
    return 0


def has_compiler() -> bool:
    """The one that this interpreter builds extensions with."""
    command = shlex.split(str(sysconfig.get_config_var("CC") or "cc"))
    return shutil.which(command[0]) is not None


def compile_package(package: str, root: Path) -> Path:
    """The folder with the compiled modules of a package below `root`. Raises CalledProcessError."""
    folder = root / package.replace(".", "/")
    target = native.built_folder(folder)
    if not (target / f"{native.library_name(package)}{native.SUFFIX}").exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _build(package, folder, root, Path(scratch))
            made = Path(scratch) / "made"
            made.mkdir()
            for path in sorted(Path(scratch).rglob(f"*{native.SUFFIX}")):
                path.replace(made / path.name)
            shutil.rmtree(target, ignore_errors=True)
            made.replace(target)
    for old in target.parent.iterdir():
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def _build(package: str, folder: Path, root: Path, scratch: Path) -> None:
    paths = [str(path.relative_to(root)) for path in native.sources(folder)]
    setup = scratch / "setup.py"
    setup.write_text(SETUP.format(group=native.group_name(package), paths=paths, target=str(scratch / "c")))
    build = ["build_ext", "--build-lib", str(scratch / "lib"), "--build-temp", str(scratch / "temp")]
    done = subprocess.run(
        [sys.executable, str(setup), "--quiet", *build],
        cwd=root,
        timeout=COMPILE_S_MAX,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        done.check_returncode()


if __name__ == "__main__":
    sys.exit(main())
