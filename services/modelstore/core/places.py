"""Where a store may be: a folder, or a bucket that a URL names."""

from __future__ import annotations

from urllib.parse import urlsplit

SCHEMES = ("s3", "gs", "az")


def is_url(place: str) -> bool:
    """Whether a place is meant as a URL and not as a folder."""
    return "://" in place


def url_problem(url: str) -> str:
    """What is wrong with a store's URL, and the cure, without repeating it; empty when nothing is."""
    parts = urlsplit(url)
    if may_hold_secrets(url):
        return "holds more than bucket and folder: give credentials in the environment"
    if parts.scheme not in SCHEMES:
        return f"is a URL of {parts.scheme[:20]!r}: give a folder, or a URL of {', '.join(SCHEMES)}"
    if not parts.hostname:
        return f"names no bucket: use {parts.scheme}://BUCKET/FOLDER"
    return ""


def may_hold_secrets(url: str) -> bool:
    """Whether a URL has parts in which people put credentials; then it must not be repeated."""
    return any(sign in url for sign in "@?#")
