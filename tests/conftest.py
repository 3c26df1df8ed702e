"""What has to be said before anything is imported, here and in the processes that tests start.

Triton's kernels run in its interpreter where there is no GPU; it must know before anything imports it.
"""

import os
import sys
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Hundreds of processes are started, and each would compile the same sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
