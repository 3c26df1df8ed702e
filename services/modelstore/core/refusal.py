"""The one way in which the core says no: a reason that programs read, a line that people read.

`reason` is a name of `loom.errors.v1.ErrorReason` without its prefix. The core knows the names only;
what status they travel as is none of its business.
"""

from __future__ import annotations

NO_SPACE = "No space left on device"
"""What every layer below says, in an error of its own kind, when a volume is full."""
STORE_FULL = "the store has no space left: free some or give it a larger volume"


class Refused(Exception):
    """A caller's or a source's mistake. The message names the file or field, and the cure."""

    def __init__(self, reason: str, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = metadata


def source_invalid(source: str, cause: str) -> Refused:
    """`source` is no model that can be read; `cause` says what is wrong with it and what helps."""
    return Refused("SOURCE_INVALID", f"{source}: {cause}", source=source, cause=cause)


def unsupported(source: str, architecture: str, cause: str) -> Refused:
    """`source` is a model that the engine cannot run exactly."""
    message = f"{source}: {architecture} cannot be served: {cause}"
    return Refused("MODEL_UNSUPPORTED", message, architecture=architecture, cause=cause)
