"""Triton's kernels run in its interpreter where there is no GPU; it must know before anything imports it."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
