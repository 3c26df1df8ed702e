"""`python -m services.worker.engine.cpu.build`: compiles the kernels, once for each instruction set.

The compiler is `$CXX`, or the first of COMPILERS that is found. Nothing is compiled while the engine
runs. A library's name holds a digest of its sources and flags, so that an old one is never opened.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
BUILT = FOLDER / "built"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-Wno-psabi", "-fPIC", "-shared", "-pthread",
)  # fmt: skip
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "x86-64-v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
        "x86-64-v3": ("-march=x86-64-v3",),
    },
    "aarch64": {"armv8.2-a": ("-march=armv8.2-a",)},
}
"""Instruction sets by machine, best first."""
COMPILE_S_MAX = 600


def variants() -> dict[str, tuple[str, ...]]:
    """Those of this machine; none for a machine that is not known."""
    return VARIANTS.get(platform.machine(), {})


def library_path(variant: str) -> Path:
    """Where the library of these very sources is, or would be."""
    digest = hashlib.sha256(repr((FLAGS, variants()[variant])).encode())
    for path in sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")]):
        digest.update(path.read_bytes())
    return BUILT / f"kernels-{variant}-{digest.hexdigest()[:16]}.so"


def compile_all(compiler: list[str]) -> list[Path]:
    """The libraries of this machine. Raises CalledProcessError."""
    BUILT.mkdir(exist_ok=True)
    paths = {variant: library_path(variant) for variant in variants()}
    missing = {variant: path for variant, path in paths.items() if not path.exists()}
    with tempfile.TemporaryDirectory(dir=BUILT) as scratch:
        running = [
            (variant, subprocess.Popen(
                [*compiler, *FLAGS, *variants()[variant], str(FOLDER / "kernels.cpp"),
                 "-o", str(Path(scratch) / variant)],
            ))
            for variant in missing
        ]  # fmt: skip
        for variant, process in running:
            if process.wait(COMPILE_S_MAX):
                raise subprocess.CalledProcessError(process.returncode, process.args)
            os.replace(Path(scratch) / variant, missing[variant])
    for old in set(BUILT.glob("*.so")) - set(paths.values()):
        old.unlink()
    return list(paths.values())


def find_compiler() -> list[str]:
    """The command, or nothing."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    return next(([found] for name in COMPILERS if (found := shutil.which(name))), [])


def main() -> int:
    """0 also without a compiler: the engine then runs on torch's operators."""
    if not variants():
        print(f"CPU kernels: none for {platform.machine()}; the engine uses torch's operators")
        return 0
    compiler = find_compiler()
    if not compiler:
        print("CPU kernels: no C++ compiler found (install g++ or set CXX, then `make kernels`);")
        print("             the engine uses torch's operators, which are slower")
        return 0
    try:
        paths = compile_all(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"CPU kernels: {error}", file=sys.stderr)
        return 1
    print(f"CPU kernels: {', '.join(path.name for path in paths)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
