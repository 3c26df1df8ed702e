"""Runs the converter as a process of its own: a crash, or memory running out, ends one import only."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from importlib.metadata import version

from services.modelstore.core.conversion import CONVERTER, LINE_BYTES_MAX, decode_event, encode_job
from services.modelstore.core.ports import ConversionJob, Converted, Progress
from services.modelstore.core.refusal import Refused, source_invalid

MODULE = "services.modelstore.converter"
STDERR_LINES_MAX = 20
STDERR_LINE_BYTES_MAX = 64 * 1024
END_WAIT_MAX_S = 10.0
"""How long a converter that closed its output may take to end before it is killed."""

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_SIGKILL = 9


class SpawnedConverter:
    """The port `Converter`."""

    def versions(self) -> Mapping[str, str]:
        libraries = {
            name: version(name) for name in ("gguf", "safetensors", "tokenizers", "torch", "transformers")
        }
        return {"converter": CONVERTER, **libraries}

    async def convert(self, job: ConversionJob) -> AsyncGenerator[Progress | Converted, None]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            MODULE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
            env={**os.environ, **_QUIET, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        last_lines: deque[str] = deque(maxlen=STDERR_LINES_MAX)
        listening = asyncio.create_task(_listen(process, last_lines))
        ended = False
        try:
            # Its libraries take seconds to load; whoever watches should know what is going on.
            yield Progress("convert", 0, 0)
            async for event in _events(process, job):
                ended = ended or isinstance(event, Converted)
                yield event
            status = await _ending(process)
            await listening
            if not ended:
                raise _crash(job, status, last_lines)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


async def _ending(process: asyncio.subprocess.Process) -> int:
    """Its status; whatever result there was has come by now."""
    try:
        return await asyncio.wait_for(process.wait(), END_WAIT_MAX_S)
    except TimeoutError:
        process.kill()
        return await process.wait()


async def _events(
    process: asyncio.subprocess.Process, job: ConversionJob
) -> AsyncGenerator[Progress | Converted, None]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(encode_job(job))
        await process.stdin.drain()
    except (BrokenPipeError, ConnectionResetError):
        return
    # Standard input stays open: its end would end the converter.
    async for line in process.stdout:
        event = decode_event(line)
        if isinstance(event, Refused):
            raise event
        yield event
    process.stdin.close()


async def _listen(process: asyncio.subprocess.Process, last_lines: deque[str]) -> None:
    """Keep the last lines of standard error, and keep the pipe from filling."""
    assert process.stderr is not None
    while piece := await process.stderr.read(STDERR_LINE_BYTES_MAX):
        last_lines.extend(line for line in piece.decode(errors="replace").splitlines() if line.strip())


def _crash(job: ConversionJob, status: int, last_lines: deque[str]) -> Refused:
    if status == -_SIGKILL:
        message = f"{job.label}: the converter was killed, which is what happens when memory runs out"
        return Refused("MODEL_TOO_LARGE", message, needed_bytes="", available_bytes="")
    said = last_lines[-1] if last_lines else "it said nothing"
    return source_invalid(job.label, f"the converter ended with status {status}: {said[:300]}")
