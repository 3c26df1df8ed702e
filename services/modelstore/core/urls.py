"""URLs that may be imported from: their parts, what is refused about them, and which lie below which.

Knows no names or addresses: whoever allows a prefix vouches for the host in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import urljoin, urlsplit

SCHEMES = ("http", "https")
URL_CHARS_MAX = 4096
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NOT_IN_URLS = re.compile(r"[\x00-\x20\x7f-\U0010ffff<>\"\\^`{|}]")
_STEPS_ASIDE = re.compile(r"(^|/)\.{1,2}(/|$)|%2e|%2f|%5c", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Url:
    """An http or https URL without credentials. `path` begins with `/`."""

    scheme: str
    host: str
    """With its port, where that is not the scheme's own."""
    path: str
    query: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{self.path}" + (f"?{self.query}" if self.query else "")

    @property
    def shown(self) -> str:
        """For messages and logs: without the query, which may hold a signature."""
        return f"{self.host}{self.path}"

    @property
    def is_folder(self) -> bool:
        return self.path.endswith("/")

    @property
    def name(self) -> str:
        """The path's last part."""
        return self.path.rstrip("/").rpartition("/")[2]

    def file(self, name: str) -> Url:
        """A file of this folder."""
        return replace(self, path=self.path + name)


def is_url(text: str) -> bool:
    """Whether a source is meant as an URL, of whatever scheme."""
    return "://" in text


def parse_url(text: str) -> Url:
    """Raises ValueError with what is wrong and the cure."""
    if len(text) > URL_CHARS_MAX:
        raise ValueError(f"is a URL of {len(text)} characters; at most {URL_CHARS_MAX}")
    if _NOT_IN_URLS.search(text):
        raise ValueError(
            "is a URL with a space or another character that URLs do not have: percent-encode it"
        )
    scheme = text.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme[:20]}:// is not read: fetch it and give its path, or an http(s) URL")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValueError(f"is no URL: {error}") from None
    if "@" in parts.netloc:
        raise ValueError("is a URL with credentials, which are never sent: fetch it and give its path")
    if not host:
        raise ValueError("is a URL without a host")
    if ":" in host:
        host = f"[{host}]"
    if port is not None and port != _DEFAULT_PORTS[scheme]:
        host = f"{host}:{port}"
    return Url(scheme, host, parts.path or "/", parts.query)


def parse_source(text: str) -> Url:
    """As parse_url, for what is imported: a folder takes no query."""
    url = parse_url(text)
    if url.is_folder and url.query:
        raise ValueError("is a folder's URL with a query, which its files would not get: leave it out")
    return url


def parse_prefixes(text: str) -> list[Url]:
    """URLs of a comma-separated list, each a folder. Raises ValueError naming the one that is none."""
    prefixes = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            url = parse_source(part)
        except ValueError as error:
            raise ValueError(f"{part[:80]!r} {error}") from None
        prefixes.append(url if url.is_folder else replace(url, path=url.path + "/", query=""))
    return prefixes


def allowed(url: Url, prefixes: Sequence[Url] | None) -> bool:
    """Whether `url` lies below one of the prefixes; None allows every one."""
    if prefixes is None:
        return True
    if _STEPS_ASIDE.search(url.path):
        return False
    return any(
        (url.scheme, url.host) == (prefix.scheme, prefix.host) and f"{url.path}/".startswith(prefix.path)
        for prefix in prefixes
    )


def redirected(url: Url, location: str) -> Url:
    """Where a redirect leads. Raises ValueError with what is wrong with it."""
    target = parse_url(urljoin(str(url), location))
    if url.scheme == "https" and target.scheme == "http":
        raise ValueError("leads from https to http, where anybody on the way could change the file")
    return target
