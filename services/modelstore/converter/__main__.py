"""One conversion: a job as a JSON line on standard input, events as JSON lines on standard output.

Standard input stays open for as long as the parent wants the result; its end ends this process, so
nothing is left behind by a parent that was killed. What libraries print goes to standard error.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import BinaryIO

from services.modelstore.core.conversion import decode_job, encode_event
from services.modelstore.core.ports import ConversionJob, Converted, Progress
from services.modelstore.core.refusal import NO_SPACE, STORE_FULL, Refused, source_invalid

PROGRESS_INTERVAL_S = 0.1
CAUSE_CHARS_MAX = 300


class _Reporter:
    """Writes events; progress at most every PROGRESS_INTERVAL_S."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._last_s = 0.0

    def send(self, event: Progress | Converted | Refused) -> None:
        self._out.write(encode_event(event))
        self._out.flush()

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= PROGRESS_INTERVAL_S or done_bytes == total_bytes:
            self._last_s = now_s
            self.send(Progress("convert", done_bytes, total_bytes))


def main() -> int:
    """0 after a result or a refusal."""
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job = decode_job(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reporter = _Reporter(events)
    try:
        reporter.send(_convert(job, reporter))
    except Refused as refusal:
        reporter.send(refusal)
    return 0


def _convert(job: ConversionJob, reporter: _Reporter) -> Converted:
    # Importing torch takes seconds: not before there is a job, and never in the parent.
    from services.modelstore.converter import convert

    try:
        return convert.run(job, reporter.progress)
    except Refused:
        raise
    except MemoryError:
        message = f"{job.label}: the converter ran out of memory"
        raise Refused("MODEL_TOO_LARGE", message, needed_bytes="", available_bytes="") from None
    except Exception as error:
        if NO_SPACE in str(error):
            raise Refused("SERVICE_UNAVAILABLE", STORE_FULL, service="modelstore") from error
        # The libraries raise anything at all for a source that they cannot read; the cause is the source.
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:CAUSE_CHARS_MAX]
        raise source_invalid(job.label, f"cannot be converted: {cause}") from error


def _end_with_parent() -> None:
    # Below the buffered reader, whose lock a waiting thread would hold while the interpreter ends.
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
