"""Build `gen/`: our stubs from `protos/`, Envoy's from the pinned xds-protos wheel.

xds-protos is unpacked, never installed: its wheel also carries older copies of OpenTelemetry's and
Google's generated files, which would overwrite the real ones. Only four folders are taken.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from importlib import resources
from pathlib import Path

from tools.fetch import fetch_wheel

ROOT = Path(__file__).resolve().parent.parent
GEN = ROOT / "gen"
XDS_FOLDERS = ("envoy/", "xds/", "udpa/", "validate/")


def compile_own(out: Path) -> None:
    """Run protoc with the Python, gRPC and mypy plugins over every file below `protos/`."""
    from grpc_tools import protoc

    files = sorted(str(p.relative_to(ROOT / "protos")) for p in (ROOT / "protos").rglob("*.proto"))
    well_known = str(resources.files("grpc_tools") / "_proto")
    plugin = Path(sys.executable).parent
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={ROOT / 'protos'}",
            f"--proto_path={well_known}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--plugin=protoc-gen-mypy={plugin / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugin / 'protoc-gen-mypy_grpc'}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *files,
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")
    for folder in (out / "loom", *(p for p in (out / "loom").rglob("*") if p.is_dir())):
        (folder / "__init__.py").touch()


def unpack_xds(out: Path) -> None:
    """Unzip Envoy's generated contracts, and nothing else, from the pinned wheel."""
    with zipfile.ZipFile(fetch_wheel("xds-protos")) as wheel:
        wheel.extractall(out, [n for n in wheel.namelist() if n.startswith(XDS_FOLDERS)])


def main() -> None:
    fresh = ROOT / "gen.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    unpack_xds(fresh)
    compile_own(fresh)
    shutil.rmtree(GEN, ignore_errors=True)
    fresh.rename(GEN)
    print(f"gen/: {sum(1 for _ in GEN.rglob('*.py'))} modules")


if __name__ == "__main__":
    main()
