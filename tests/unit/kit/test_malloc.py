"""Freed buffers stay with the process, which a process of its own shows."""

import subprocess
import sys

CODE = """
import resource
from tokenloom.kit import malloc
if {keep}: assert malloc.keep_freed_buffers()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
# Several at once, as streams have them: one alone stays with the allocator anyway.
def pass_through(): hold = [bytes([i % 256]) * 2_000_000 for i in range(4)]
for _ in range(5): pass_through()
before = faults()
for _ in range(20): pass_through()
print(faults() - before)
"""


def faults(keep):
    command = [sys.executable, "-c", CODE.format(keep=keep)]
    return int(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)


def test_buffers_that_come_and_go_find_their_memory_again():
    assert faults(keep=False) > 10_000
    assert faults(keep=True) < 1_000
