"""Why an engine cannot start, as the front passes it on."""

from __future__ import annotations


class EngineError(Exception):
    """`reason` is a name of loom.errors.v1.ErrorReason; the message is one line."""

    def __init__(self, reason: str, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = " ".join(message.split())
        self.metadata = metadata


def unsupported(architecture: str, cause: str) -> EngineError:
    return EngineError(
        "MODEL_UNSUPPORTED",
        f"the engine cannot run {architecture} exactly: {cause}",
        architecture=architecture,
        cause=cause,
    )


def load_failed(cause: str) -> EngineError:
    return EngineError("MODEL_LOAD_FAILED", f"loading the model failed: {cause}", cause=cause)


def too_large(what: str, needed_bytes: int, available_bytes: int) -> EngineError:
    return EngineError(
        "MODEL_TOO_LARGE",
        f"{what} needs {needed_bytes:,} bytes and {available_bytes:,} are available",
        needed_bytes=str(needed_bytes),
        available_bytes=str(available_bytes),
    )
