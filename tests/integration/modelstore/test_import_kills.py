"""kill -9 at random moments of imports: what is listed is whole, and the repetition completes and goes on."""

import asyncio
import hashlib
import json
import os
import random
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from loom.modelstore.v1 import modelstore_pb2 as pb

from services.modelstore.app import open_offline
from services.modelstore.core.manifest import blob_path
from tests.integration.modelstore import made
from tests.integration.modelstore.web import PIECE_BYTES, FileServer, serving

STEP_MAX_S = 120
PROGRAM = """
import json, sys
from pathlib import Path
from services.modelstore.app import import_offline

def tell(step):
    print(json.dumps([step.stage, step.done_bytes, step.total_bytes]), flush=True)

store, source, name = sys.argv[1:]
imported = import_offline(Path(store), source, name, on_progress=tell)
print(json.dumps(["imported", imported.version.digest]), flush=True)
"""


@asynccontextmanager
async def started(store, source, name):
    """An import in a process of its own; killed at the end if it still runs."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    words = [sys.executable, "-c", PROGRAM, str(store), str(source), name]
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE, env=environ)
    try:
        async with asyncio.timeout(STEP_MAX_S):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def events(process):
    assert process.stdout is not None
    async for line in process.stdout:
        yield json.loads(line)


async def killed(store, source, name, stage, after_s):
    """Start an import and kill it `after_s` after it first tells of `stage`; whether it ended before."""
    async with started(store, source, name) as process:
        async for event in events(process):
            if event[0] in (stage, "imported"):
                break
        try:
            await asyncio.wait_for(process.wait(), after_s)
        except TimeoutError:
            return False
        return True


async def completed(store, source, name):
    """Import to the end; the version's digest."""
    async with started(store, source, name) as process:
        found = [event async for event in events(process)]
        assert await process.wait() == 0
    assert found[-1][0] == "imported"
    return found[-1][1]


async def whole(store):
    """The names of the models after a restart; everything that is listed has to be what it is called."""
    servicer = await open_offline(store)
    models = (await servicer.ListModels(pb.ListModelsRequest(), None)).models
    for model in models:
        for version in model.versions:
            for file in version.manifest.files:
                data = await asyncio.to_thread((store / blob_path(file.digest)).read_bytes)
                assert f"sha256:{hashlib.sha256(data).hexdigest()}" == file.digest
                assert len(data) == file.size_bytes
        for alias in model.aliases:
            asked = pb.ResolveModelRequest(model=f"{model.name}@{alias.name}")
            found = (await servicer.ResolveModel(asked, None)).version.digest
            assert found in [version.digest for version in model.versions]
    return [model.name for model in models]


def blobs(store: Path) -> dict[str, tuple[int, int]]:
    """What changes when a blob is written again."""
    found = {path.name: path.stat() for path in (store / "blobs").rglob("*") if path.is_file()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def left_in_scratch(store: Path) -> list[Path]:
    return [path for path in (store / ".scratch").rglob("*") if path.name != "downloads"]


@pytest.fixture
def draw():
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


async def test_imports_killed_at_twelve_moments_leave_a_whole_store_and_complete(tmp_path, draw):
    store = tmp_path / "store"
    source = made.hf_folder(tmp_path / "tiny", shards=2)
    await kill_conversions(store, source, draw)
    digest = await completed(store, source, "m")
    assert await whole(store) == ["m"]
    assert left_in_scratch(store) == []
    stored = blobs(store)
    await kill_publishing(store, source, draw)
    await kill_downloads(store, source, draw)
    assert await completed(store, source, "m") == digest
    assert left_in_scratch(store) == []
    # The conversion was done once, and its blobs were written once.
    assert blobs(store) == stored


async def kill_conversions(store, source, draw):
    """While it reads, while it converts, while it stores."""
    for stage, latest_s in (("read", 0.02), ("convert", 1.0), ("hash", 0.03)):
        await killed(store, source, "m", stage, draw.uniform(0, latest_s))
        assert await whole(store) in ([], ["m"])


async def kill_publishing(store, source, draw):
    """While what a conversion gave is read back, published, named by an alias."""
    for number in range(4):
        ended = await killed(store, source, f"n{number}", "hash", draw.uniform(0, 0.05))
        names = await whole(store)
        assert set(names) <= {"m", *(f"n{n}" for n in range(number + 1))}
        assert f"n{number}" in names or not ended
    await completed(store, source, "n0")
    assert "n0" in await whole(store)


async def kill_downloads(store, source, draw):
    """While the same files are fetched, never to the end, however late the kill: it goes on where it was."""
    files = {f"/tiny/{path.name}": path.read_bytes() for path in source.iterdir()}
    size = sum(len(data) for data in files.values())
    async with serving(FileServer(files, pause_s=0.05)) as server:
        for number in range(1, 6):
            server.hold_at_bytes = size * number // 6
            ended = await killed(store, f"{server.url}/tiny/", "url", "download", draw.uniform(0.1, 0.3))
            assert not ended
            assert "url" not in await whole(store)
        server.hold_at_bytes = None
        await completed(store, f"{server.url}/tiny/", "url")
        # A kill loses what was on its way, and nothing that had arrived.
        assert server.sent_bytes <= size + 5 * 2 * PIECE_BYTES
        assert any(asked for _, asked in server.asked)
    assert "url" in await whole(store)
