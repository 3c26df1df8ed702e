"""Runs `tokenloom models …` as `main` does: exit status, output, and the one line of an error."""

from dataclasses import dataclass

import pytest
from typer.testing import CliRunner

from tokenloom.cli.errors import CliError
from tokenloom.cli.models import app


@dataclass
class Ended:
    status: int
    out: str
    err: str


@pytest.fixture
def mesh_home(monkeypatch, tmp_path):
    """A home of its own, in which nothing runs."""
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def models(mesh_home):
    def run(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        if isinstance(result.exception, CliError):
            line = str(result.exception)
            assert "\n" not in line
            return Ended(result.exception.status, result.stdout, result.stderr + line)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ended(result.exit_code, result.stdout, result.stderr)

    return run
