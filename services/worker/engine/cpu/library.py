"""Opens the compiled kernels that fit this processor, and names their arguments."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from services.worker.engine.cpu.build import library_path, variants

VERSION = 5
"""What `tl_version` must say."""

NEEDS = {
    "x86-64-v4": ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"),
    "x86-64-v3": ("avx2", "fma3"),
    "armv8.2-a": (),
}
"""Features, as torch names them, that a variant's instructions come from."""

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_CACHE = (_POINTER, _POINTER, _INT, _INT, _INT)
_PLAIN: dict[str, tuple[type, ...]] = {
    "tl_pack16": (_POINTER, _INT, _INT, _POINTER),
    "tl_pack32": (_POINTER, _INT, _INT, _POINTER),
    "tl_linear": (_POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _INT, _INT, _INT, _INT),
    "tl_pool_free": (_POINTER,),
    "tl_spent": (_POINTER, _POINTER),
    "tl_stack": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
}
_TYPED: dict[str, tuple[type, ...]] = {
    "tl_norm": (_POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _LONG, _INT),
    "tl_gate": (_POINTER, _POINTER, _POINTER, _LONG, _INT, _INT),
    "tl_place": (
        *(_POINTER, _POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _FLOAT, _POINTER, _LONG, _INT),
        *_CACHE,
    ),
    "tl_store": (
        *(_POINTER, _POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _POINTER, _LONG),
        *_CACHE,
    ),
    "tl_attend": (
        *(_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _INT, _INT, _INT),
        *(_FLOAT, _FLOAT),
        *_CACHE,
    ),
}  # fmt: skip


def fits(variant: str) -> bool:
    """Whether this processor runs a variant."""
    has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return all(has.get(name) or has.get(name.replace("_", "")) for name in NEEDS[variant])


@functools.cache
def open_library() -> ctypes.CDLL | None:
    """The best that fits; None when none was built, or none of these sources."""
    paths = (library_path(variant) for variant in variants() if fits(variant))
    return next((opened for path in paths if (opened := _open(path)) is not None), None)


def _open(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
        if library.tl_version() != VERSION:
            return None
    except (OSError, AttributeError):
        return None
    library.tl_pool_new.restype = ctypes.c_void_p
    library.tl_pool_new.argtypes = (_INT, _POINTER)
    for name, arguments in _PLAIN.items():
        _declare(library, name, arguments)
    for name, arguments in _TYPED.items():
        for suffix in ("f32", "bf16"):
            _declare(library, f"{name}_{suffix}", arguments)
    return library


def _declare(library: ctypes.CDLL, name: str, arguments: tuple[type, ...]) -> None:
    function = getattr(library, name)
    function.argtypes = arguments
    function.restype = None


def openmp_team() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch runs on; None when there is none."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
