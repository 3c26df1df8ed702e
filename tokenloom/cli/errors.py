"""What ends a command with one line for a person."""

from __future__ import annotations


class CliError(Exception):
    """One line that says what is wrong and what to do. Ends the command with `status`."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
