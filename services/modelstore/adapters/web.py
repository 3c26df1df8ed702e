"""Files over HTTP into a folder, resumed where an earlier process was killed.

A file's bytes lie under its name, what is known of them (validator, length) beside it. The bytes are
emptied before that is changed, so whatever is found after a kill belongs together.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import aiohttp
from yarl import URL

from services.modelstore.adapters.threads import in_thread
from services.modelstore.core.refusal import Refused, source_invalid
from services.modelstore.core.transfer import (
    REDIRECTS,
    Answer,
    Held,
    Verdict,
    judge,
    request_headers,
    still_there,
    whole_headers,
)
from services.modelstore.core.urls import Url, allowed, redirected
from services.modelstore.core.web import Absent, Arrived, TooLarge

REDIRECTS_MAX = 5
ATTEMPTS_MAX = 5
"""Attempts in a row that come no further than one before them."""
RETRY_WAIT_S = 0.5
"""After the first of them; doubled after each further one."""
CONNECT_TIMEOUT_S = 20.0
SILENCE_MAX_S = 60.0
READ_AHEAD_BYTES = 2 * 1024 * 1024
"""What may arrive while earlier bytes are written."""
KNOWN = ".known.json"
"""Suffix of the file that says what is held."""

T = TypeVar("T")


class _Broken(Exception):
    """The connection, or what it brought, ended early. The message says how."""


class HttpFiles:
    """The port `Web`. `prefixes` None allows every URL: for a caller who could fetch them anyway."""

    def __init__(
        self,
        prefixes: Sequence[Url] | None,
        retry_wait_s: float = RETRY_WAIT_S,
        silence_max_s: float = SILENCE_MAX_S,
    ) -> None:
        self._prefixes = prefixes
        self._retry_wait_s = retry_wait_s
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=silence_max_s
        )

    def check_allowed(self, url: Url) -> None:
        """Raises Refused with PERMISSION_DENIED."""
        if allowed(url, self._prefixes):
            return
        prefixes = ", ".join(map(str, self._prefixes or ())) or "no URL"
        raise Refused(
            "PERMISSION_DENIED",
            f"{url.shown}: this modelstore imports from {prefixes}; "
            "add the URL's beginning to TOKENLOOM_MODELSTORE_IMPORT_URLS",
            permission="import_urls",
        )

    async def fetch(
        self, url: Url, file: str, bytes_max: int
    ) -> AsyncGenerator[Arrived | Absent | TooLarge, None]:
        place = Path(file)
        attempts = self._attempts(url, lambda session: self._fetch_once(session, url, place, bytes_max))
        async with aclosing(attempts) as events:
            async for event in events:
                yield event

    async def changed(self, url: Url, file: str) -> bool:
        place = Path(file)
        async with aclosing(
            self._attempts(url, lambda session: self._compare_once(session, url, place))
        ) as found:
            return [changed async for changed in found][-1]

    async def _attempts(
        self, url: Url, once: Callable[[aiohttp.ClientSession], AsyncGenerator[T, None]]
    ) -> AsyncGenerator[T, None]:
        """What `once` gives, made again where it breaks off and as long as it comes further each time."""
        self.check_allowed(url)
        attempts, furthest, why = 0, 0, ""
        async with aiohttp.ClientSession(
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=READ_AHEAD_BYTES,
        ) as session:
            while attempts < ATTEMPTS_MAX:
                if attempts:
                    await asyncio.sleep(self._retry_wait_s * 2 ** (attempts - 1))
                attempts += 1
                try:
                    async with aclosing(once(session)) as events:
                        async for event in events:
                            if isinstance(event, Arrived) and event.done_bytes > furthest:
                                attempts, furthest = 0, event.done_bytes
                            yield event
                    return
                except _Broken as broken:
                    why = str(broken)
        message = f"{url.shown}: {why}; what has arrived is kept: import it again to go on from there"
        raise Refused("SERVICE_UNAVAILABLE", message, service=url.host)

    async def _fetch_once(
        self, session: aiohttp.ClientSession, url: Url, file: Path, bytes_max: int
    ) -> AsyncGenerator[Arrived | Absent | TooLarge, None]:
        held = await in_thread(_read_held, file)
        response = await self._ask(session, url, request_headers(held))
        async with response:
            answer = judge(response.status, response.headers, held)
            if answer.verdict is Verdict.ABSENT:
                await in_thread(discard, file)
                yield Absent(answer.why)
                return
            if answer.verdict is Verdict.UNCHANGED:
                # It may be followed by a whole body.
                response.close()
                yield Arrived(held.size_bytes, held.total_bytes)
                return
            _check_answer(url, answer)
            if answer.verdict is Verdict.DISCARD:
                await in_thread(discard, file)
                raise _Broken("its server cannot go on where it stopped")
            async with aclosing(_receive(response, file, answer, held, bytes_max)) as events:
                async for event in events:
                    yield event

    async def _compare_once(
        self, session: aiohttp.ClientSession, url: Url, file: Path
    ) -> AsyncGenerator[bool, None]:
        held = await in_thread(_read_held, file) if await in_thread(file.exists) else None
        response = await self._ask(session, url, whole_headers(held or Held()))
        async with response:
            answer = still_there(response.status, response.headers, held)
            response.close()
            _check_answer(url, answer)
            yield answer.verdict is Verdict.CHANGED

    async def _ask(
        self, session: aiohttp.ClientSession, url: Url, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """The answer of whoever has the file. Raises _Broken, Refused."""
        target = url
        for _ in range(REDIRECTS_MAX + 1):
            self.check_allowed(target)
            request = session.get(URL(str(target), encoded=True), headers=headers, allow_redirects=False)
            try:
                response = await request
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise _Broken(_words(error)) from error
            if response.status not in REDIRECTS:
                return response
            response.release()
            try:
                target = redirected(target, response.headers.get("Location", ""))
            except ValueError as error:
                raise source_invalid(url.shown, f"its redirect {error}") from None
        raise source_invalid(url.shown, f"is redirected more than {REDIRECTS_MAX} times")


def _check_answer(url: Url, answer: Answer) -> None:
    if answer.verdict is Verdict.AGAIN:
        raise _Broken(f"its server {answer.why}")
    if answer.verdict is Verdict.REFUSED:
        raise source_invalid(url.shown, f"its server {answer.why}")


async def _receive(
    response: aiohttp.ClientResponse, file: Path, answer: Answer, held: Held, bytes_max: int
) -> AsyncGenerator[Arrived | TooLarge, None]:
    """Write the body to its place. Raises _Broken when it ends early, OSError of the disk."""
    done, total = (held.size_bytes if answer.verdict is Verdict.GO_ON else 0), answer.total_bytes
    if max(done, total) > bytes_max:
        yield TooLarge(max(done, total))
        return
    if not done:
        await in_thread(_begin, file, Held(0, total, answer.validator, answer.mark))
    pieces = response.content.iter_any()
    with file.open("ab", buffering=0) as opened:
        while True:
            try:
                piece = await anext(pieces, b"")
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise _Broken(_words(error)) from error
            if not piece:
                break
            if done + len(piece) > bytes_max:
                yield TooLarge(done + len(piece))
                return
            await in_thread(_write_all, opened.write, piece)
            done += len(piece)
            yield Arrived(done, total)
    if total and done != total:
        raise _Broken(f"its server sent {done} of {total} bytes")
    await in_thread(_note, file, Held(done, done, answer.validator, answer.mark))
    yield Arrived(done, done)


def discard(file: Path) -> None:
    """Forget what is held of a file."""
    file.unlink(missing_ok=True)
    known_of(file).unlink(missing_ok=True)


def known_of(file: Path) -> Path:
    """Where it is noted what is held of a file."""
    return file.with_name(file.name + KNOWN)


def _begin(file: Path, held: Held) -> None:
    file.write_bytes(b"")
    _note(file, held)


def _note(file: Path, held: Held) -> None:
    path = known_of(file)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(asdict(held)))
    os.replace(beside, path)


def _read_held(file: Path) -> Held:
    """What is there, as far as it can be trusted; what cannot be is nothing."""
    try:
        size = file.stat().st_size
        known = Held(**json.loads(known_of(file).read_bytes()))
        total = int(known.total_bytes)
        fits = not total or size <= total
        return Held(size, total, str(known.validator), str(known.mark)) if fits else Held()
    except (OSError, TypeError, ValueError):
        return Held()


def _write_all(write: Callable[[memoryview], int | None], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[write(rest) or 0 :]


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"its server was silent for too long ({type(error).__name__})"
    text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return f"the connection failed: {text}"
