"""Texts of model versions, loaded at first use and kept for the most recently used ones.

Requests that need the same text at once wait for one load, and one that a request still holds is never
loaded again. A failed load is not remembered. Kept are at most `tokenizers_max`, and those in use.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from services.gateway import metrics
from services.gateway.adapters.model_text import TextLimits, TokenizerText
from services.gateway.adapters.modelstore import BlobFetcher
from services.gateway.adapters.templates import TEMPLATE_FILES
from services.gateway.core.catalogue import ModelVersion
from tokenloom.kit.errors import CallError
from tokenloom.kit.logs import get_logger

LOADS_MAX = 4
"""Texts that are fetched and parsed at once; their files are in memory meanwhile."""
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", *TEMPLATE_FILES)

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bounds on what is kept and read."""

    tokenizers_max: int
    file_bytes_max: int


class ModelTextStore:
    """Implements `TextStore` on the modelstore's blobs."""

    def __init__(
        self, blobs: BlobFetcher, limits: StoreLimits, text_limits: TextLimits, pool: Executor
    ) -> None:
        self._blobs = blobs
        self._limits = limits
        self._text_limits = text_limits
        self._pool = pool
        self._ready: OrderedDict[str, TokenizerText] = OrderedDict()
        self._in_use: weakref.WeakValueDictionary[str, TokenizerText] = weakref.WeakValueDictionary()
        """Every text that somebody holds, a running request for one."""
        self._loading: dict[str, asyncio.Task[TokenizerText]] = {}
        self._loads = asyncio.Semaphore(LOADS_MAX)

    async def text(self, version: ModelVersion) -> TokenizerText:
        digest = version.digest
        if (ready := self._in_use.get(digest)) is not None:
            self._keep(digest, ready)
            return ready
        task = self._loading.get(digest)
        if task is None:
            task = self._loading[digest] = asyncio.create_task(self._load(version))
            task.add_done_callback(partial(self._loaded, digest))
        # A caller that leaves does not take the load from those who wait for it too.
        return await asyncio.shield(task)

    async def warm(self, versions: Iterable[ModelVersion]) -> None:
        """Load what is likely to be asked for, one after the other, as long as nothing must go for it.

        Failures are only logged.
        """
        for version in versions:
            if len(self._ready) + len(self._loading) >= self._limits.tokenizers_max:
                return
            if version.digest in self._ready:
                continue
            try:
                await self.text(version)
            except CallError as error:
                log.warning("no text for a model", model=version.full_name, error=error.message)

    async def close(self) -> None:
        """Give up loads in flight."""
        tasks = [*self._loading.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _loaded(self, digest: str, task: asyncio.Task[TokenizerText]) -> None:
        self._loading.pop(digest, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Read here, so that it is known even when all who waited have left.
            log.debug("a text was not loaded", version=digest, error=str(error))

    async def _load(self, version: ModelVersion) -> TokenizerText:
        async with self._loads:
            text = await self._parse(version, await self._fetch(version))
        metrics.TOKENIZER_LOADS.inc()
        self._in_use[version.digest] = text
        self._keep(version.digest, text)
        log.info("tokenizer loaded", model=version.full_name)
        return text

    async def _fetch(self, version: ModelVersion) -> dict[str, bytes]:
        wanted = [file for path in TEXT_FILES if (file := version.file(path)) is not None]
        files = {file.path: await self._blobs.fetch(file, self._limits.file_bytes_max) for file in wanted}
        if "tokenizer.json" not in files:
            raise _broken(version, "it has no tokenizer.json")
        return files

    async def _parse(self, version: ModelVersion, files: dict[str, bytes]) -> TokenizerText:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._pool, TokenizerText, version, files, self._text_limits, self._pool
            )
        except (ValueError, UnicodeDecodeError) as error:
            raise _broken(version, str(error)) from None

    def _keep(self, digest: str, text: TokenizerText) -> None:
        """It was used last; the one that was not for longest goes."""
        self._ready[digest] = text
        self._ready.move_to_end(digest)
        while len(self._ready) > self._limits.tokenizers_max:
            self._ready.popitem(last=False)


def _broken(version: ModelVersion, cause: str) -> CallError:
    return CallError(
        "MODEL_UNSUPPORTED",
        f"model {version.name!r} cannot be used for text: {cause}",
        metadata={"architecture": version.architecture, "cause": cause},
    )
