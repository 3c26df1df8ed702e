"""`make demo`: start a mesh, ask it a question, draw the request's trace, stop the mesh.

Everything is done through the `tokenloom` command, as a person would. A mesh that already runs is
used and left running.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tools.fetch import ROOT, fetch_model

MODEL = "smollm2"
QUESTION = "What is the capital of France?"
EXPECTED = "Paris"
TOKENS_MAX = 48
COMMAND = [sys.executable, "-m", "tokenloom.cli"]


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "gen")]
    began = time.monotonic()
    started = False
    try:
        started = provide_mesh()
        answer = ask()
        tokenloom("trace", "--last")
        check(answer)
    finally:
        if started:
            tokenloom("down")
    print(f"demo: done after {time.monotonic() - began:.0f} s")


def provide_mesh() -> bool:
    """Make sure that a mesh serves the model; whether this had to start it."""
    from tokenloom.cli import local

    running = local.running()
    if running is not None:
        if MODEL not in running.models:
            raise SystemExit(
                f"demo: the mesh at {running.address} runs without {MODEL}: stop it with `tokenloom down`"
            )
        print(f"demo: using the mesh at {running.address}, and leaving it running")
        return False
    provide_model()
    tokenloom("up", "--detach", "--model", MODEL)
    return True


def provide_model() -> None:
    """Import the model unless the store has it."""
    known = subprocess.run([*COMMAND, "models", "show", MODEL], capture_output=True, cwd=ROOT, check=False)
    if known.returncode != 0:
        model: Path = fetch_model()
        tokenloom("models", "import", str(model), "--name", MODEL)


def ask() -> str:
    """The answer, printed as it comes."""
    arguments = [
        "generate",
        QUESTION,
        "--model",
        MODEL,
        "--temperature",
        "0",
        "--max-tokens",
        str(TOKENS_MAX),
    ]
    show(arguments)
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    answer = b""
    while piece := os.read(process.stdout.fileno(), 4096):
        answer += piece
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    if process.wait() != 0:
        raise SystemExit(process.returncode)
    return answer.decode("utf-8", "replace")


def check(answer: str) -> None:
    """Refuse an answer without the word, and a trace without one of the services."""
    from tokenloom.cli import local, traces

    if EXPECTED not in answer:
        raise SystemExit(f"demo: the answer does not contain {EXPECTED!r}")
    trace = traces.await_last(local.traces_file(), traces.read_last_request(local.last_request_file()))
    missing = traces.SERVICES - {span.service for span in trace.spans} if trace else traces.SERVICES
    if missing:
        raise SystemExit(f"demo: the trace lacks {', '.join(sorted(missing))}")


def tokenloom(*arguments: str) -> None:
    """Run one command; end the demo with its status when it fails."""
    show(arguments)
    status = subprocess.run([*COMMAND, *arguments], cwd=ROOT, check=False).returncode
    if status != 0:
        raise SystemExit(status)


def show(arguments: list[str] | tuple[str, ...]) -> None:
    words = [f'"{a}"' if " " in a else a for a in arguments]
    print(f"\n$ tokenloom {' '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
