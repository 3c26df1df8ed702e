"""The wire is what was agreed, and every rpc says what a caller must know."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokenloom.kit.errors import REASONS
from tools.wire import LOCK, PROTOS, describe

FILES = sorted(PROTOS.rglob("*.proto"))
ROOT = PROTOS.parent


def test_the_wire_is_the_one_that_was_agreed():
    assert describe() == LOCK.read_text(), (
        "the protos changed: look at `make wire`, then commit protos/wire.lock"
    )


def rpcs():
    for path in FILES:
        for comment, name in re.findall(r"((?:^ *//.*\n)+) *rpc (\w+)", path.read_text(), re.MULTILINE):
            yield pytest.param(re.sub(r"\s*//", " ", comment), id=f"{path.stem}.{name}")


@pytest.mark.parametrize("comment", list(rpcs()))
def test_every_rpc_says_what_retry_and_cancel_do_and_which_reasons_it_gives(comment):
    for word in ("Retry:", "Cancel:", "Reasons:"):
        assert word in comment
    named = comment.split("Reasons:")[1]
    for reason in re.findall(r"\b[A-Z]{2,}(?:_[A-Z]+)+\b", named):
        assert reason in REASONS


def test_every_reason_documents_its_metadata():
    text = (PROTOS / "loom/errors/v1/errors.proto").read_text()
    for reason in REASONS:
        assert re.search(rf"(?:^ *//.*\n)+ *ERROR_REASON_{reason} = ", text, re.MULTILINE), reason


def test_the_protos_are_lint_clean():
    buf = Path(sys.executable).with_name("buf")
    result = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
