"""docs/reference/models.md, run as it stands: every command of it, one after the other, on a tiny model."""

import os
import random
import re
import subprocess

import pytest

from tests.integration.modelstore.made import gguf_file
from tokenloom.cli import envoy
from tokenloom.cli.ports import free_ports

PAGE = envoy.ROOT / "docs/reference/models.md"
ENDS_S = 280
# As the page has it, but for the public port, since tests of one machine run side by side, and the model,
# since the page's own has to be downloaded.
PROGRAM = """
set -euo pipefail
python() { echo "$TINY_MODEL"; }
tokenloom() {
  if [ "$1" = up ]; then command tokenloom "$@" --port "$PUBLIC_PORT"; else command tokenloom "$@"; fi
}
"""


def commands() -> str:
    """The page's shell blocks, each command told before it runs."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 7
    return PROGRAM + "PS4='$ '\nset -x\n" + "\n".join(blocks)


@pytest.fixture
def environ(tmp_path):
    tiny = gguf_file(tmp_path / "tiny.gguf")
    made = dict(os.environ, TOKENLOOM_HOME=str(tmp_path / "home"), COLUMNS="200")
    made |= {"PUBLIC_PORT": str(free_ports(1, random.Random())[0]), "TINY_MODEL": str(tiny)}
    # The page finds the command on the path, and the code by its installation.
    made.pop("PYTHONPATH", None)
    yield made
    subprocess.run(
        [envoy.ROOT / ".venv/bin/tokenloom", "down"], env=made, capture_output=True, timeout=60, check=False
    )


def test_every_command_of_the_page_runs_as_it_stands(environ):
    done = subprocess.run(
        ["bash", "-c", commands()],
        cwd=envoy.ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ENDS_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for said in (
        "chat is imported as sha256:",
        "chat@stable is sha256:",
        "90%, sha256:",
        "is ready on worker-0",
        "left worker-0",
        "is deprecated: use chat@stable",
        "frozen is deleted",
        "deleted chat: sha256:",
        "would be deleted",
        "1 version read",
    ):
        assert said in done.stdout, f"{said}\n{done.stdout[-8000:]}"
