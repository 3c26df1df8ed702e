"""Downloads what an URL names: one GGUF file, or the files of a model folder by their fixed names.

The files land in a folder of the store's scratch that is named by the URL and survives a kill. What can
be refused from the small files is refused before any weights are fetched. When a folder's files are all
here, each is asked for once more: as none has changed since it was fetched, there was a moment at which
all of them were what is here, so they are of one revision.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from services.modelstore.adapters.scratch import Busy, Kept, Scratch
from services.modelstore.adapters.threads import in_thread
from services.modelstore.adapters.web import discard, known_of
from services.modelstore.core import folder_source
from services.modelstore.core.gguf import MAGIC
from services.modelstore.core.ports import Progress
from services.modelstore.core.refusal import Refused, source_invalid
from services.modelstore.core.urls import Url
from services.modelstore.core.web import DOWNLOAD_BYTES_MAX, Absent, TooLarge, Web

_ANOTHER_TRY_MAY_HELP = frozenset({"SERVICE_UNAVAILABLE", "QUEUE_FULL", "MODEL_TOO_LARGE"})


@dataclass(frozen=True, slots=True)
class Downloaded:
    """The end of a download: a file or folder of this machine."""

    path: str
    label: str


class Downloader:
    """Brings at most `bytes_max` bytes for one import."""

    def __init__(self, web: Web, scratch: Scratch, bytes_max: int = DOWNLOAD_BYTES_MAX) -> None:
        self._web = web
        self._scratch = scratch
        self._bytes_max = bytes_max

    @contextmanager
    def kept(self, url: Url) -> Iterator[Kept]:
        """The folder of an URL's files; it goes when the block ends with a version, or with a refusal of the
        source, and stays when it is interrupted. Raises Refused with QUEUE_FULL.
        """
        try:
            with self._scratch.kept(sha256(str(url).encode()).hexdigest()) as kept:
                try:
                    yield kept
                    kept.done = True
                except Refused as refusal:
                    kept.done = refusal.reason not in _ANOTHER_TRY_MAY_HELP
                    raise
        except Busy:
            message = f"{url.shown} is being imported already; try again when that has ended"
            raise Refused("QUEUE_FULL", message, queue="downloads", limit="1") from None

    async def run(self, url: Url, folder: Path) -> AsyncGenerator[Progress | Downloaded, None]:
        """Progress, then one Downloaded. Raises Refused, and OSError of the disk."""
        self._web.check_allowed(url)
        files = folder / "files"
        files.mkdir(exist_ok=True)
        one = _Download(self._web, url, files, self._bytes_max)
        async with aclosing(one.folder() if url.is_folder else one.file()) as steps:
            async for step in steps:
                yield step
        await in_thread(_remove_others, files, one.fetched)
        path = files if url.is_folder else files / next(iter(one.fetched))
        yield Downloaded(str(path), url.shown)


class _Download:
    """The state of one."""

    def __init__(self, web: Web, url: Url, files: Path, bytes_max: int) -> None:
        self._web = web
        self._url = url
        self._files = files
        self._bytes_max = bytes_max
        self._done = 0
        self._expected = 0
        """Bytes in all, once an index told them."""
        self._last = not url.is_folder
        """Whether no other file comes after the present one."""
        self._asked: list[str] = []
        """Files of a folder that are here or were found absent."""
        self.fetched: dict[str, int] = {}
        """Sizes of the files that are here, by name."""

    async def file(self) -> AsyncGenerator[Progress, None]:
        """One file, which has to be GGUF."""
        name = folder_source.safe_name(self._url.name) or "model"
        looked = False
        async with aclosing(self._fetch(self._url, name)) as steps:
            async for step in steps:
                yield step
                if not looked and step.done_bytes >= len(MAGIC):
                    looked = True
                    await self._check_magic(name)
        if name not in self.fetched:
            message = f"{self._url.shown}: its server has no such file"
            raise Refused("SOURCE_NOT_FOUND", message, source=self._url.shown)
        if not looked:
            raise source_invalid(self._url.shown, f"has {self.fetched[name]} bytes, so it is no model")

    async def folder(self) -> AsyncGenerator[Progress, None]:
        """The files, all of one revision."""
        async with aclosing(self._files_of_folder()) as steps:
            async for step in steps:
                yield step
        for name in self._asked:
            if await self._web.changed(self._url.file(name), str(self._files / name)):
                message = (
                    f"{self._url.shown}: {name} changed while the folder was fetched, so its files may be of "
                    "two revisions; what did not change is kept: import it again, or name one revision"
                )
                raise Refused("SERVICE_UNAVAILABLE", message, service=self._url.host)

    async def _files_of_folder(self) -> AsyncGenerator[Progress, None]:
        """The small files, a look at them, then the weights: safetensors if there are any."""
        async with aclosing(self._all(folder_source.TEXT_FILES)) as steps:
            async for step in steps:
                yield step
        label = self._url.shown
        folder_source.check_text(label, self.fetched, await self._small())
        for index, single in folder_source.WEIGHTS:
            async with aclosing(self._all((index,))) as steps:
                async for step in steps:
                    yield step
            wanted: tuple[str, ...] = (single,)
            self._last = True
            if index in self.fetched:
                wanted, size = folder_source.read_index(label, index, await self._small())
                self._expected, self._last = self._done + size, False
            async with aclosing(self._all(wanted)) as steps:
                async for step in steps:
                    yield step
            missing = [name for name in wanted if name not in self.fetched]
            if index in self.fetched and missing:
                raise source_invalid(label, f"{index} names {missing[0]}, which its server does not have")
            if not missing:
                return
            self._last = False
        names = ", ".join(name for pair in folder_source.WEIGHTS for name in pair)
        raise source_invalid(label, f"has no weights; looked for {names}")

    async def _all(self, names: tuple[str, ...]) -> AsyncGenerator[Progress, None]:
        for name in names:
            self._asked.append(name)
            async with aclosing(self._fetch(self._url.file(name), name)) as steps:
                async for step in steps:
                    yield step

    async def _fetch(self, url: Url, name: str) -> AsyncGenerator[Progress, None]:
        """One file; it is not among `fetched` when there is none."""
        rest = self._bytes_max - self._done
        limit = min(rest, folder_source.SMALL_FILE_BYTES_MAX) if name in folder_source.SMALL_FILES else rest
        size: int | None = None
        async with aclosing(self._web.fetch(url, str(self._files / name), limit)) as events:
            async for event in events:
                if isinstance(event, Absent):
                    return
                if isinstance(event, TooLarge):
                    raise self._too_large(name, event.size_bytes, limit, rest)
                size = event.done_bytes
                yield Progress("download", self._done + size, self._total(event.total_bytes))
        assert size is not None, "a fetch ends with a file, with Absent, or raises"
        self.fetched[name] = size
        self._done += size

    def _total(self, file_bytes: int) -> int:
        """0 while it is not known what else will come."""
        known = file_bytes and (self._last or self._expected)
        return max(self._expected, self._done + file_bytes) if known else 0

    def _too_large(self, name: str, size: int, limit: int, rest: int) -> Refused:
        cause = f"{name} has {size} bytes or more; at most {limit}"
        if limit == rest:
            cause += (
                f" are left of the {self._bytes_max} that one import may download "
                "(TOKENLOOM_MODELSTORE_DOWNLOAD_BYTES_MAX)"
            )
        return source_invalid(self._url.shown, cause)

    async def _check_magic(self, name: str) -> None:
        head = await in_thread(_head, self._files / name)
        if not head.startswith(MAGIC):
            raise folder_source.refuse_unknown_file(self._url.shown, head)

    async def _small(self) -> dict[str, bytes]:
        names = [name for name in folder_source.SMALL_FILES if name in self.fetched]
        return {name: await in_thread((self._files / name).read_bytes) for name in names}


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(folder_source.UNKNOWN_HEAD_BYTES)


def _remove_others(files: Path, fetched: dict[str, int]) -> None:
    """What an earlier state of the source had and this one has not."""
    keep = {known_of(files / name) for name in fetched} | {files / name for name in fetched}
    for path in files.iterdir():
        if path not in keep:
            discard(path)
