"""Client channels with the limits and keep-alives that the servers of the kit expect."""

from __future__ import annotations

import itertools
import json

import grpc

from tokenloom.kit.server import MESSAGE_BYTES_MAX, METADATA_BYTES_MAX

KEEPALIVE_MS = 20_000
CONNECT_TIMEOUT_MS = 10_000
"""The longest that a connection may take, HTTP/2 settings of a busy server included."""
RECONNECT_BACKOFF_MAX_MS = 2_000

_SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


def open_channel(target: str) -> grpc.aio.Channel:
    """A channel to `host:port`, or to every address behind `dns:///host:port` in turn."""
    return grpc.aio.insecure_channel(
        target,
        options=[
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_metadata_size", METADATA_BYTES_MAX),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # Its name misleads: gRPC uses it as the time that one attempt to connect may take.
            ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
            ("grpc.max_reconnect_backoff_ms", RECONNECT_BACKOFF_MAX_MS),
            ("grpc.enable_http_proxy", 0),
            # Own connections for each channel object: a pool of channels is a pool of connections.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.service_config", _SERVICE_CONFIG),
        ],
    )


class ChannelPool:
    """`size` connections to one target, used in turn: one HTTP/2 connection is one TCP stream."""

    def __init__(self, target: str, size: int) -> None:
        self._channels = [open_channel(target) for _ in range(size)]
        self._turn = itertools.cycle(self._channels)

    def next(self) -> grpc.aio.Channel:
        """The next channel in turn."""
        return next(self._turn)

    async def close(self) -> None:
        """Close every connection; calls in flight are cancelled."""
        for channel in self._channels:
            await channel.close(None)
