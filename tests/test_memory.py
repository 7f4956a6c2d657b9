"""What the C library does with freed memory."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from diffusion_moe.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
import torch
for _ in range(30):
    torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_blocks_serve_the_next_tensor_without_fresh_pages():
    faults = {}
    for how in ("keep", "give back"):
        run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        kept, count = run.stdout.split()
        if how == "keep" and kept == "False":
            pytest.skip("the C library is not glibc")
        faults[how] = int(count)
    assert faults["keep"] < 100 < faults["give back"]
