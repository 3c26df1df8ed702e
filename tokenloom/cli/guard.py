"""Becomes a program that dies with the launcher: `python -I -S guard.py LAUNCHER_PID PROGRAM ARG…`.

The kernel is asked to kill this process when its parent ends, however the parent ends, and not to let
it take a core from whoever computes the moment it has something to do (SCHED_BATCH): on cores that an
engine shares with gateway and proxies, a step's tokens then travel together instead of one by one. Then
the program takes this process's place. Run as a file by a bare interpreter: it imports nothing of the
project.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    launcher, *program = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    # The launcher may have ended before the kernel was asked.
    if os.getppid() != int(launcher):
        sys.exit(1)
    step_aside()
    os.execv(program[0], program)


def step_aside() -> None:
    """SCHED_BATCH, where there is such a thing and a sandbox allows it; the mesh works without."""
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError) as error:
        print(f"not in the background: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
