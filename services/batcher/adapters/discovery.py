"""Which workers there are: a fixed list, or all addresses behind a DNS name.

Endpoints are `ip:port`, spelled as Envoy spells its hosts: the batcher names one, and Envoy must find
it in its own cluster.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket

from services.batcher.core.ports import Discovery

DNS_SCHEME = "dns:///"
WORKERS_MAX = 10_000


class FixedList:
    """The workers of a list never change."""

    def __init__(self, endpoints: frozenset[str]) -> None:
        self._endpoints = endpoints

    async def endpoints(self) -> frozenset[str]:
        return self._endpoints


class DnsName:
    """Every address of a headless name."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port

    async def endpoints(self) -> frozenset[str]:
        """Empty while the name has no address yet. Raises OSError when the resolver does not answer."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
                return frozenset()
            raise
        return frozenset(_endpoint(str(address[0]), self._port) for *_, address in found[:WORKERS_MAX])


def _endpoint(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_workers(text: str) -> Discovery:
    """Raises ValueError that says how workers are named."""
    if text.startswith(DNS_SCHEME):
        host, port = _split(text.removeprefix(DNS_SCHEME))
        try:
            host.encode("idna")
        except UnicodeError:
            raise ValueError(f"{host!r} is no DNS name") from None
        return DnsName(host, port)
    endpoints = set()
    for part in text.split(","):
        host, port = _split(part.strip())
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"{host!r} is no IP address: use {DNS_SCHEME}{host}:{port} for a name") from None
        endpoints.add(_endpoint(host, port))
    if len(endpoints) > WORKERS_MAX:
        raise ValueError(f"{len(endpoints)} workers are listed; at most {WORKERS_MAX}")
    return FixedList(frozenset(endpoints))


def _split(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is no address: use ip:port, or {DNS_SCHEME}name:port")
    return host, int(port)
