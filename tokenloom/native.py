"""Packages that are compiled as they stand: mypyc turns their annotated Python into C, several times as fast.

`python -m tools.native` compiles, into `built/` beside the package; `prefer_compiled` lets the interpreter
find the result. The folder's name holds a digest of the sources, so what was compiled from others is never
loaded: after a change the package runs as Python until it is compiled again, and without a compiler always.
Both are the same program; the environment variable `TOKENLOOM_PURE_PYTHON` chooses the sources.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

PURE_PYTHON = "TOKENLOOM_PURE_PYTHON"
BUILT = "built"
SUFFIX = EXTENSION_SUFFIXES[0]
"""Of this interpreter's extension modules: another one does not find them."""
DIGEST_DIGITS = 16


def prefer_compiled(package: str, folder: Path) -> bool:
    """Import the modules of `package`, whose sources are in `folder`, compiled; False: it is not compiled."""
    if os.environ.get(PURE_PYTHON):
        return False
    built = built_folder(folder)
    if not (built / f"{library_name(package)}{SUFFIX}").exists():
        return False
    if not any(isinstance(each, _Finder) and each.package == package for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder(package, built))
    return True


def built_folder(folder: Path) -> Path:
    """Where the compiled form of these very sources is, or would be."""
    digest = sha256(SUFFIX.encode())
    for path in sources(folder):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return folder.parent / BUILT / digest.hexdigest()[:DIGEST_DIGITS]


def sources(folder: Path) -> list[Path]:
    """What is compiled: all modules but `__init__`."""
    return sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


def group_name(package: str) -> str:
    """mypyc's name for what is compiled together."""
    return package.replace(".", "_")


def library_name(package: str) -> str:
    """The module that holds the code of all; the others only lead to it."""
    return f"{group_name(package)}__mypyc"


class _Finder(MetaPathFinder):
    """Finds one package's compiled modules, and their library."""

    def __init__(self, package: str, built: Path) -> None:
        self.package = package
        self._built = built
        self._library = library_name(package)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for all other modules."""
        parent, _, name = fullname.rpartition(".")
        if parent != self.package and fullname != self._library:
            return None
        file = self._built / f"{name}{SUFFIX}"
        return spec_from_file_location(fullname, file) if file.exists() else None
