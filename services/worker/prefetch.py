"""`python -m services.worker.prefetch`: brings the settings' models to this machine's disk, and ends.

Reads the worker's own settings, needs no engine, and uses the same cache in the same way: before a worker
starts it saves the wait, and one that was killed goes on where it was. When the settings name no model, names
come on standard input, one a line. Prints a JSON line for each model:
`{"model": …, "version": …, "folder": …, "bytes": …, "seconds": …, "cpu_seconds": …}`, bytes of all its
files, whether they came now or were here. Ends with status 1 and a line on standard error when a model cannot
be had.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import uvloop

from services.worker.adapters.store import GrpcModelStore
from services.worker.adapters.weights import WeightCache, weight_cache
from services.worker.settings import WorkerSettings, split_models
from tokenloom.kit import logs
from tokenloom.kit.channels import open_channel
from tokenloom.kit.errors import CallError
from tokenloom.kit.malloc import keep_freed_buffers
from tokenloom.kit.service import EXIT_FAILED, EXIT_SETTINGS
from tokenloom.kit.settings import SettingsError, load_settings


def main() -> None:
    """Exits the process."""
    try:
        settings = load_settings(WorkerSettings)
    except SettingsError as error:
        print(f"tokenloom worker: settings refused\n{error}", file=sys.stderr)
        sys.exit(EXIT_SETTINGS)
    keep_freed_buffers()
    logs.setup("worker", settings.name, level=settings.log_level, fmt=settings.log_format)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_prefetch(settings))
        except (CallError, OSError) as error:
            print(f"prefetch: {error}", file=sys.stderr)
            sys.exit(EXIT_FAILED)


async def _prefetch(settings: WorkerSettings) -> None:
    channel = open_channel(settings.modelstore_target)
    try:
        store = GrpcModelStore(channel, settings.modelstore_target)
        cache = weight_cache(settings, store)
        for model in split_models(settings.models):
            await _bring(model, store, cache)
        while not settings.models and (line := await asyncio.to_thread(sys.stdin.readline)):
            await _bring(line.strip(), store, cache)
    finally:
        await channel.close(None)


async def _bring(model: str, store: GrpcModelStore, cache: WeightCache) -> None:
    version = await store.resolve(model)
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    folder = await cache.folder(version, lambda _: None)
    told = {
        "model": model,
        "version": version.digest,
        "folder": folder,
        "bytes": sum(file.size_bytes for file in version.files),
        "seconds": round(time.monotonic() - began_s, 4),
        "cpu_seconds": round(time.process_time() - began_cpu_s, 4),
    }
    print(json.dumps(told), flush=True)
    cache.release(version.digest)


if __name__ == "__main__":
    main()
