"""One file over HTTP, resumed: which request to make, and what its answer means. RFC 9110, chapters 13 to 15.

Bytes are only ever added to bytes of the same state of the file: that takes a validator which changes
with the file, and a server that repeats it. Whether a file is still the one that was fetched is told by
whatever its server tells: also by marks that are too weak for that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum, auto

STRONG_AFTER_S = 1
"""A Last-Modified at least this much before the answer's Date changes whenever the file does."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_AGAIN = frozenset({408, 425, 429, *range(500, 600)})
_CREDENTIALS = frozenset({401, 403, 407})
REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class Held:
    """What of a file is here already."""

    size_bytes: int = 0
    total_bytes: int = 0
    """0: not known."""
    validator: str = ""
    """A strong ETag or a date; empty when nothing tells whether the file changed."""
    mark: str = ""
    """The ETag or date as it came: another one means that the file changed, the same one need not mean that
    it did not."""

    @property
    def whole(self) -> bool:
        return bool(self.validator) and 0 < self.total_bytes == self.size_bytes


class Verdict(Enum):
    """What an answer means."""

    BEGIN = auto()
    """The body is the whole file."""
    GO_ON = auto()
    """The body is what is missing."""
    UNCHANGED = auto()
    """What is held is the file."""
    CHANGED = auto()
    """What is held is no longer the file. Only of `still_there`."""
    DISCARD = auto()
    """What is held is of no use: ask for the whole."""
    ABSENT = auto()
    AGAIN = auto()
    """The same request may succeed later."""
    REFUSED = auto()


@dataclass(frozen=True, slots=True)
class Answer:
    """`total_bytes` (0: not known), `validator` and `mark` are those of the file as it is now."""

    verdict: Verdict
    total_bytes: int = 0
    validator: str = ""
    mark: str = ""
    why: str = ""


def request_headers(held: Held) -> dict[str, str]:
    """Headers that ask for what is missing, or whether what is held is still the file.

    Never If-Modified-Since: it asks for what is newer, and an older file may have come in this one's place.
    A date that is the same is seen in the answer.
    """
    if held.whole:
        return whole_headers(held)
    headers = {"Accept-Encoding": "identity"}
    if held.size_bytes and held.validator:
        headers |= {"Range": f"bytes={held.size_bytes}-", "If-Range": held.validator}
    return headers


def whole_headers(held: Held) -> dict[str, str]:
    """Headers that ask for the file only if it changed, as far as a request can say that."""
    tag = held.mark or held.validator
    headers = {"Accept-Encoding": "identity"}
    if _is_tag(tag.removeprefix("W/")):
        headers["If-None-Match"] = tag
    return headers


def judge(status: int, headers: Mapping[str, str], held: Held) -> Answer:
    """What the answer to a request with `request_headers(held)` means. `headers` ignores case."""
    if status in (200, 206) and headers.get("Content-Encoding", "identity") != "identity":
        return Answer(Verdict.REFUSED, why=f"sends it as {headers['Content-Encoding'][:20]!r}, unasked")
    validator = _validator(headers)
    if status == 200:
        total = _number(headers.get("Content-Length", ""))
        if held.whole and validator == held.validator and total in (0, held.total_bytes):
            return Answer(Verdict.UNCHANGED, held.total_bytes, validator, held.mark)
        return Answer(Verdict.BEGIN, total, validator, _mark(headers))
    if status == 206:
        return _continued(headers, held, validator)
    if status == 304 and held.whole:
        return Answer(Verdict.UNCHANGED, held.total_bytes, held.validator, held.mark)
    if status in (304, 416):
        return Answer(Verdict.DISCARD)
    if status in (404, 410):
        return Answer(Verdict.ABSENT, why=f"answers {status}")
    if status in _CREDENTIALS:
        why = f"answers {status}: it wants credentials, which are never sent; fetch it and give its path"
        return Answer(Verdict.REFUSED, why=why)
    if status in _AGAIN:
        return Answer(Verdict.AGAIN, why=f"answers {status}")
    return Answer(Verdict.REFUSED, why=f"answers {status}")


def _continued(headers: Mapping[str, str], held: Held, validator: str) -> Answer:
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if not found or held.whole or int(found[1]) != held.size_bytes:
        return Answer(Verdict.DISCARD)
    if validator and validator != held.validator:
        return Answer(Verdict.DISCARD)
    total = 0 if found[3] == "*" else int(found[3])
    if held.total_bytes and total and total != held.total_bytes:
        return Answer(Verdict.DISCARD)
    return Answer(Verdict.GO_ON, total or held.total_bytes, held.validator, held.mark)


def still_there(status: int, headers: Mapping[str, str], held: Held | None) -> Answer:
    """Whether a file is as it was fetched; `held` is all of it, None when there was none.

    For the answer to a request with `whole_headers`: UNCHANGED, CHANGED, AGAIN or REFUSED. What the server
    does not tell is taken for unchanged.
    """
    answer = judge(status, headers, Held())
    if answer.verdict in (Verdict.AGAIN, Verdict.REFUSED):
        return answer
    if held is None:
        same = answer.verdict is Verdict.ABSENT
    else:
        same = status == 304 or (status == 200 and not _differs(answer, headers, held))
    return Answer(Verdict.UNCHANGED if same else Verdict.CHANGED)


def _differs(answer: Answer, headers: Mapping[str, str], held: Held) -> bool:
    mark = held.mark or held.validator
    # Some servers date every answer with its own time, which tells nothing.
    meant = held.validator or answer.validator or _is_tag(mark.removeprefix("W/"))
    if meant and mark and answer.mark and mark != answer.mark:
        return True
    return "Content-Length" in headers and answer.total_bytes != held.size_bytes


def _mark(headers: Mapping[str, str]) -> str:
    return headers.get("ETag") or headers.get("Last-Modified", "")


def _validator(headers: Mapping[str, str]) -> str:
    tag = headers.get("ETag", "")
    if _is_tag(tag):
        return tag
    changed = headers.get("Last-Modified", "")
    try:
        age = parsedate_to_datetime(headers.get("Date", "")) - parsedate_to_datetime(changed)
    except (TypeError, ValueError):
        return ""
    return changed if age.total_seconds() >= STRONG_AFTER_S else ""


def _is_tag(text: str) -> bool:
    """A strong one: a weak one (`W/"…"`) may stay when bytes change."""
    return len(text) > 2 and text.startswith('"') and text.endswith('"')


def _number(text: str) -> int:
    return int(text) if re.fullmatch(r"\d{1,19}", text) else 0
