"""The life of a service process: settings, telemetry, start, serve, drain, stop.

SIGTERM and SIGINT turn readiness off, let work in flight end inside `drain_grace_s`, then close. A
second signal ends the drain at once.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import uvloop

from tokenloom.kit import logs, telemetry
from tokenloom.kit.probes import Probes
from tokenloom.kit.settings import ServiceSettings, SettingsError, load_settings

EXIT_SETTINGS = 78
"""`EX_CONFIG` of sysexits.h: starting again will not help."""
EXIT_FAILED = 1
COLLECT_AFTER = 20_000
"""Objects that came and did not go before Python looks for those that hold each other."""


class Service(Protocol):
    """What `run` starts and stops."""

    async def start(self) -> None:
        """Bind and begin to serve. Raises OSError with one line when a port is taken."""
        ...

    def readiness(self) -> str:
        """Empty when ready, else one line why not."""
        ...

    async def drain(self, grace_s: float) -> None:
        """Take no new work; return when what there is has ended, or after `grace_s`."""
        ...

    async def close(self) -> None:
        """Free everything."""
        ...


S = TypeVar("S", bound=ServiceSettings)


def run(name: str, settings_class: type[S], build: Callable[[S], Service]) -> None:
    """The whole `main` of a service; exits the process."""
    try:
        settings = load_settings(settings_class)
    except SettingsError as error:
        print(f"tokenloom {name}: settings refused\n{error}", file=sys.stderr)
        sys.exit(EXIT_SETTINGS)
    logs.setup(name, settings.name, level=settings.log_level, fmt=settings.log_format)
    telemetry.setup(
        name,
        settings.name,
        settings.otlp_endpoint,
        flush_ms=settings.otlp_flush_ms,
        sample_ratio=settings.trace_sample_ratio,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(_serve(name, settings, build))
    telemetry.shutdown()
    sys.exit(status)


async def _serve(name: str, settings: S, build: Callable[[S], Service]) -> int:
    log = logs.get_logger(__name__)
    stopping = asyncio.Event()
    hurried = asyncio.Event()

    def on_signal() -> None:
        (hurried if stopping.is_set() else stopping).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)

    service = build(settings)
    probes = Probes(
        settings.host,
        settings.metrics_port,
        lambda: "draining" if stopping.is_set() else service.readiness(),
    )
    try:
        port = await probes.start()
        await service.start()
    except OSError as error:
        log.error("cannot start", error=str(error))
        await probes.close()
        await service.close()
        return EXIT_FAILED
    _spare_collections()
    log.info("serving", metrics_port=port)
    await stopping.wait()
    log.info("draining", grace_s=settings.drain_grace_s)
    await _first_of(service.drain(settings.drain_grace_s), hurried.wait())
    await service.close()
    await probes.close()
    log.info("stopped")
    return 0


def _spare_collections() -> None:
    """What was built so far lives as long as the process: later collections leave it alone, and are rarer.

    Nearly all objects of a call end by themselves. With the interpreter's own threshold a batcher at 300
    requests/s spent a tenth of its time looking for the others, and paused for it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


async def _first_of(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Return when one is done; cancel the others."""
    tasks = [asyncio.create_task(c) for c in coroutines]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()
