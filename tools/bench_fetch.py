"""`python -m tools.bench_fetch`: how fast a worker's cache fetches, beside what disk and network give.

In each round, in turn, the same random files are

    dd          copied on the same disk by `dd conv=fsync`, all at once
    http        read from a plain static server (sendfile), in ranges, by a plain client that drops them
    http+fsync  the same, written to files and synced
    fetch       fetched from a modelstore process by the worker's own cache (`services.worker.prefetch`): in
                ranges, hashed, synced, renamed, linked
    direct      linked from the store's folder (`store_dir`) and hashed
    again       asked for a second time

All sources are in the page cache. Before each turn what the one before wrote is deleted, and as much is
written, synced and deleted again: a virtual machine may give freed memory back to its host within seconds,
and who writes next pays for getting it again. Prints MB/s (10^6 bytes a second) and the share of `fetch` in
the lower of `dd` and `http` of the same round, and in `http+fsync`, which uses both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenloom.cli.ports import free_ports
from tools import bench_fetch_http

ROOT = Path(__file__).resolve().parents[1]
COPY_BYTES = 4 * 1024 * 1024
START_TIMEOUT_S = 30.0
MODEL = "bench"
BAR = 0.8


def main() -> None:
    """Prints a table; ends with status 1 when something cannot be measured."""
    options = _options()
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=options.dir) as folder, ExitStack() as stack:
        bench = _Bench(Path(folder), options, stack)
        rounds = [bench.round() for _ in range(options.rounds)]
    result = {
        "bytes": options.bytes,
        "files": options.files,
        "streams": options.streams,
        "chunk_bytes": options.chunk_bytes,
        "cpus": os.cpu_count(),
        "load_before": bench.load,
        "network_mb_per_s": options.network_mb_per_s,
        "cpu_s": bench.cpu_s,
        "mb_per_s": [{name: round(options.bytes / s / 1e6, 1) for name, s in r.items()} for r in rounds],
        "shares": [round(max(r["dd"], r["http"]) / r["fetch"], 3) for r in rounds],
        "shares_of_http_fsync": [round(r["http+fsync"] / r["fetch"], 3) for r in rounds],
    }
    _show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.bench_fetch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=int, default=1024**3, help="of all files together")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--streams", type=int, default=4, help="of the cache and of the plain client")
    parser.add_argument("--chunk-bytes", type=int, default=0, help="of FetchBlob; 0: the modelstore's own")
    parser.add_argument(
        "--network-mb-per-s", type=float, default=0, help="as slow a network between all; 0: loopback"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "bench", help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if not 1 <= options.files <= 64 or options.bytes < options.files or options.rounds < 1:
        parser.error("--files must be 1 to 64, with a byte each, and --rounds at least 1")
    return options


class _Bench:
    """Files, a modelstore over them, a static server over them, and a place to write to."""

    def __init__(self, folder: Path, options: argparse.Namespace, stack: ExitStack) -> None:
        self._options = options
        self._store, self._target = folder / "store", folder / "target"
        self._blobs = self._store / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)
        self._files = _make_files(self._blobs, options.files, options.bytes)
        self._version = _make_manifest(self._store, self._files)
        self._http = stack.enter_context(_tool("bench_fetch_http", str(self._blobs)))
        port, self._server = stack.enter_context(_modelstore(self._store, options.chunk_bytes))
        if options.network_mb_per_s:
            rate = str(options.network_mb_per_s * 1e6)
            self._http = stack.enter_context(_tool("bench_fetch_net", str(self._http), rate))
            port = stack.enter_context(_tool("bench_fetch_net", str(port), rate))
        settings = {
            "TOKENLOOM_WORKER_MODELSTORE_TARGET": f"127.0.0.1:{port}",
            "TOKENLOOM_WORKER_CACHE_DIR": str(self._target / "cache"),
            "TOKENLOOM_WORKER_FETCH_STREAMS": str(options.streams),
        }
        self._cache = stack.enter_context(_prefetch(settings))
        direct = {"TOKENLOOM_WORKER_STORE_DIR": str(self._store)}
        self._direct = stack.enter_context(_prefetch(settings | direct))
        self.load = os.getloadavg()[0]
        self.cpu_s: list[tuple[float, float]] = []
        """Of each fetch: of the cache, and of the modelstore meanwhile."""

    def round(self) -> dict[str, float]:
        """Seconds of each."""
        streams, files = self._options.streams, self._files
        return {
            "dd": self._timed(self._dd),
            "http": self._timed(lambda: bench_fetch_http.download(self._http, files, streams, None)),
            "http+fsync": self._timed(
                lambda: bench_fetch_http.download(self._http, files, streams, self._target)
            ),
            "fetch": self._fetched(self._cache),
            "direct": self._fetched(self._direct),
            "again": self._fetched(self._direct, anew=False),
        }

    def _timed(self, copy: Callable[[], None]) -> float:
        self._clear()
        began_s = time.perf_counter()
        copy()
        return time.perf_counter() - began_s

    def _clear(self) -> None:
        shutil.rmtree(self._target, ignore_errors=True)
        self._target.mkdir()
        # Written and deleted at once: what the next turn writes finds memory that the machine has.
        with (self._target / "warm").open("wb") as file:
            for _ in range(-(-self._options.bytes // COPY_BYTES)):
                file.write(bytes(COPY_BYTES))
        os.sync()
        (self._target / "warm").unlink()
        os.sync()

    def _dd(self) -> None:
        copies = []
        for name in self._files:
            source, target = f"if={self._blobs / name}", f"of={self._target / name}"
            copies.append(
                subprocess.Popen(["dd", source, target, f"bs={COPY_BYTES}", "conv=fsync", "status=none"])
            )
        ends = [copy.wait() for copy in copies]
        if any(ends):
            raise SystemExit("bench: dd failed")

    def _fetched(self, cache: subprocess.Popen[str], *, anew: bool = True) -> float:
        """As long as the cache took; its process runs already."""
        if anew:
            self._clear()
        server_cpu_s = _cpu_s(self._server)
        assert cache.stdin is not None
        assert cache.stdout is not None
        cache.stdin.write(f"{MODEL}@{self._version}\n")
        cache.stdin.flush()
        told = cache.stdout.readline()
        if not told:
            raise SystemExit("bench: the cache ended; its last words are above")
        ended = json.loads(told)
        if cache is self._cache:
            self.cpu_s.append((float(ended["cpu_seconds"]), _cpu_s(self._server) - server_cpu_s))
        return float(ended["seconds"])


def _make_files(folder: Path, count: int, total: int) -> dict[str, int]:
    """Files of random bytes under their own digests, and their sizes."""
    files, rng = {}, random.Random(0)
    for index in range(count):
        size = left = total * (index + 1) // count - total * index // count
        digest = hashlib.sha256()
        made = folder / "made"
        with made.open("wb") as file:
            while left:
                data = rng.randbytes(min(left, COPY_BYTES))
                digest.update(data)
                file.write(data)
                left -= len(data)
        made.rename(folder / digest.hexdigest())
        files[digest.hexdigest()] = size
    return files


def _make_manifest(store: Path, files: dict[str, int]) -> str:
    """A version of these blobs as the modelstore keeps one; its digest."""
    manifest: dict[str, Any] = {
        **dict.fromkeys(("parameters", "weight_bytes", "kv_bytes_per_token"), 0),
        "schema": 1,
        "name": MODEL,
        "architecture": "Bench",
        "model_type": "bench",
        "dtype": "bfloat16",
        "context_length": 1,
        "vocab_size": 1,
        "has_chat_template": False,
        "stop_token_ids": [],
        "bos_token_id": None,
        "license": "",
        "checked_with": {},
        "provenance": {},
        "files": [
            {"path": f"file-{index:02}", "digest": f"sha256:{name}", "size_bytes": size}
            for index, (name, size) in enumerate(files.items())
        ],
    }
    data = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    name = hashlib.sha256(data).hexdigest()
    folder = store / "manifests" / "sha256"
    folder.mkdir(parents=True)
    (folder / f"{name}.json").write_bytes(data)
    return f"sha256:{name}"


@contextmanager
def _tool(name: str, *arguments: str) -> Iterator[int]:
    """A server beside this file; the port that it tells."""
    command = [sys.executable, "-m", f"tools.{name}", *arguments]
    with subprocess.Popen(command, env=_env({}), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def _cpu_s(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _prefetch(settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The worker's cache in a process that fetches what is written to it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "services.worker.prefetch"],
        env=_env(settings),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def _modelstore(store: Path, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Its port and its process id."""
    port = free_ports(1, random.Random())[0]
    settings = {
        "TOKENLOOM_MODELSTORE_PORT": str(port),
        "TOKENLOOM_MODELSTORE_METRICS_PORT": "0",
        "TOKENLOOM_MODELSTORE_STORE_DIR": str(store),
    }
    if chunk_bytes:
        settings["TOKENLOOM_MODELSTORE_CHUNK_BYTES"] = str(chunk_bytes)
    log = store.parent / "modelstore.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.modelstore"], env=_env(settings), stdout=sink, stderr=sink
        )
    try:
        _await_port(process, port, log)
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


def _await_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"bench: the modelstore does not serve: {log.read_text()[-2000:]}")


def _env(settings: dict[str, str]) -> dict[str, str]:
    outer = {key: value for key, value in os.environ.items() if not key.startswith("TOKENLOOM_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "gen")])
    return outer | {"PYTHONPATH": path, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"} | settings


def _show(result: dict[str, Any]) -> None:
    rounds = result["mb_per_s"]
    title = f"{result['bytes']:,} bytes in {result['files']} files, {result['streams']} streams"
    table = Table("MB/s", "median", "best", "each round", title=title, title_justify="left")
    for name in rounds[0]:
        values = [entry[name] for entry in rounds]
        each = " ".join(f"{value:,.0f}" for value in values)
        table.add_row(name, f"{statistics.median(values):,.0f}", f"{max(values):,.0f}", each)
    console = Console(highlight=False)
    console.print(table)
    for name, of in (("shares", "the lower of dd and http"), ("shares_of_http_fsync", "http+fsync")):
        shares = result[name]
        console.print(f"fetch has {statistics.median(shares):.2f} of {of} (median; best {max(shares):.2f})")
    own, store = (statistics.median(values) for values in zip(*result["cpu_s"], strict=True))
    console.print(f"CPU time of a fetch: {own:.2f} s in the cache, {store:.2f} s in the modelstore (medians)")
    console.print(f"bar {BAR} of the first; {result['cpus']} CPUs, load before {result['load_before']:.1f}")


if __name__ == "__main__":
    main()
