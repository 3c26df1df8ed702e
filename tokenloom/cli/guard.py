"""Becomes a program that dies with the launcher: `python -I -S guard.py LAUNCHER_PID PROGRAM ARG…`.

The kernel is asked to kill this process when its parent ends, however the parent ends, and then the
program takes its place. Run as a file by a bare interpreter: it imports nothing of the project.
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
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
