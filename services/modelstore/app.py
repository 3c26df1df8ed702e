"""Builds the real modelstore: the service on a port, and the same parts for a caller without a mesh."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path

import gguf
from loom.modelstore.v1 import modelstore_pb2 as pb

from services.modelstore import metrics
from services.modelstore.adapters.objects_url import open_objects
from services.modelstore.adapters.process import SpawnedConverter
from services.modelstore.adapters.scratch import Scratch
from services.modelstore.adapters.sources import LocalSources
from services.modelstore.adapters.web import HttpFiles
from services.modelstore.blobs import Blobs
from services.modelstore.core.manifest import blob_path
from services.modelstore.core.places import is_url
from services.modelstore.core.urls import Url
from services.modelstore.downloading import Downloader
from services.modelstore.garbage import Collector
from services.modelstore.importer import Importer, Limits
from services.modelstore.inspection import Inspector
from services.modelstore.servicer import QUIET, ModelStoreServicer
from services.modelstore.settings import ModelstoreSettings
from services.modelstore.store import Store
from services.modelstore.verify import Verifier
from tokenloom.kit.clock import SystemClock
from tokenloom.kit.logs import get_logger
from tokenloom.kit.server import GrpcServer

SCRATCH = ".scratch"
CHUNK_BYTES = 1024 * 1024
FETCHES_MAX = 64
GC_MIN_AGE_S = 24 * 3600.0

log = get_logger(__name__)


class _Parts:
    """Everything on one store. Raises OSError when it cannot be used."""

    def __init__(
        self,
        place: str,
        scratch_dir: Path,
        roots: Sequence[Path] | None,
        urls: Sequence[Url] | None,
        limits: Limits,
        chunk_bytes: int = CHUNK_BYTES,
        fetches_max: int = FETCHES_MAX,
        gc_min_age_s: float = GC_MIN_AGE_S,
        verify_threads: int = 0,
    ) -> None:
        objects, clock = open_objects(place), SystemClock()
        self.store = Store(objects, clock)
        inspector = Inspector(LocalSources(roots), *_tensor_types())
        scratch = Scratch(scratch_dir)
        downloader = Downloader(HttpFiles(urls), scratch, limits.download_bytes_max)
        importer = Importer(self.store, objects, inspector, SpawnedConverter(), scratch, downloader, limits)
        blobs = Blobs(self.store, objects, chunk_bytes, fetches_max)
        collector = Collector(self.store, objects, clock, scratch.sweep, gc_min_age_s)
        verifier = Verifier(self.store, objects, verify_threads or len(os.sched_getaffinity(0)))
        self.servicer = ModelStoreServicer(self.store, importer, blobs, collector, verifier)


def _tensor_types() -> tuple[dict[int, tuple[int, int]], dict[int, str]]:
    """GGUF's tensor types: elements and bytes of a block, and names."""
    sizes = {int(kind): (int(e), int(b)) for kind, (e, b) in gguf.GGML_QUANT_SIZES.items()}
    return sizes, {int(kind): str(kind.name) for kind in gguf.GGML_QUANT_SIZES}


class ModelstoreService:
    """The service of `services.modelstore`: kit's `Service`."""

    def __init__(self, settings: ModelstoreSettings) -> None:
        self._settings = settings
        self._server: GrpcServer | None = None
        self._parts: _Parts | None = None
        self._polling: asyncio.Task[None] | None = None
        self._why_not = "starting"
        self.port = 0
        """The bound port, once started."""

    async def start(self) -> None:
        settings = self._settings
        limits = Limits(
            shard_bytes_max=settings.shard_bytes_max,
            convert_threads=settings.convert_threads,
            imports_max=settings.imports_max,
            imports_waiting_max=settings.imports_waiting_max,
            download_bytes_max=settings.download_bytes_max,
        )
        self._parts = _Parts(
            settings.store_dir,
            settings.scratch_dir or Path(settings.store_dir) / SCRATCH,
            settings.roots,
            settings.urls,
            limits,
            settings.chunk_bytes,
            settings.fetches_max,
            settings.gc_min_age_s,
            settings.verify_threads,
        )
        await self._parts.store.refresh()
        metrics.VERSIONS.set(len(self._parts.store.catalogue.versions))
        self._server = GrpcServer(settings.host, settings.port)
        self._server.add(
            pb.DESCRIPTOR.services_by_name["ModelStoreService"], self._parts.servicer, quiet=QUIET
        )
        self.port = await self._server.start()
        self._polling = asyncio.create_task(self._poll(self._parts.store))
        await self._server.set_serving(True)
        self._why_not = ""
        log.info("modelstore serves", port=self.port, store_dir=settings.store_dir)

    def readiness(self) -> str:
        return self._why_not

    async def drain(self, grace_s: float) -> None:
        self._why_not = "draining"
        if self._parts is not None:
            self._parts.servicer.end_watches()
        if self._server is not None:
            await self._server.stop(grace_s)

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(0)

    async def _poll(self, store: Store) -> None:
        """See what other processes change in the store. A failed look changes nothing and is tried again."""
        while True:
            await asyncio.sleep(self._settings.poll_interval_ms / 1000)
            try:
                await store.refresh()
            except Exception as error:
                metrics.POLL_FAILURES.inc()
                self._why_not = f"the store cannot be read: {error}"
                log.error("store cannot be read", error=str(error))
                continue
            self._why_not = ""
            metrics.VERSIONS.set(len(store.catalogue.versions))


def build(settings: ModelstoreSettings) -> ModelstoreService:
    """The service, not started."""
    return ModelstoreService(settings)


async def open_offline(store_dir: Path | str) -> ModelStoreServicer:
    """The service's methods on a folder or a URL, in this process and without a port.

    For callers who could read and write the store anyway: every source that they can read, or fetch, may be
    imported. Imports into a URL are worked on in the system's folder for temporary files. Raises OSError
    when the store cannot be used.
    """
    place = str(store_dir)
    scratch = _own_temporary_folder() if is_url(place) else Path(place, SCRATCH)
    parts = _Parts(place, scratch, None, None, Limits())
    await parts.store.refresh()
    return parts.servicer


def _own_temporary_folder() -> Path:
    """The same one each time, so that downloads go on. Raises OSError when somebody else could write there:
    everybody can make folders among the temporary ones."""
    folder = Path(tempfile.gettempdir(), f"tokenloom-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} is open to other users: remove it, or set TMPDIR")
    return folder


def import_offline(
    store_dir: Path | str,
    source: str,
    name: str,
    dtype: str = "",
    aliases: Sequence[str] = (),
    on_progress: Callable[[pb.Progress], None] = lambda _: None,
    source_digest: str = "",
) -> pb.Imported:
    """Import into a store without a mesh. Raises CallError, and OSError for a store that cannot be used."""
    request = pb.ImportModelRequest(
        source=source, name=name, dtype=dtype, aliases=aliases, source_digest=source_digest
    )

    async def run() -> pb.Imported:
        servicer = await open_offline(store_dir)
        async with aclosing(servicer.ImportModel(request, None)) as responses:
            async for response in responses:
                if response.HasField("imported"):
                    return response.imported
                on_progress(response.progress)
        raise AssertionError("an import ends with its version or raises")

    return asyncio.run(run())


def export_offline(store_dir: Path, model: str, folder: Path) -> pb.Version:
    """Lay a version's files out in `folder` under their own names, linked to the store's blobs.

    The result is a Hugging Face folder. Raises CallError for an unknown model, OSError for a folder that
    cannot be used or a blob that is missing.
    """

    async def run() -> pb.Version:
        servicer = await open_offline(store_dir)
        return (await servicer.ResolveModel(pb.ResolveModelRequest(model=model), None)).version

    version = asyncio.run(run())
    folder.mkdir(parents=True, exist_ok=True)
    for file in version.manifest.files:
        blob = (store_dir / blob_path(file.digest)).resolve(strict=True)
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(blob)
    return version
