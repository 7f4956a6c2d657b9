"""What the C library does with freed memory, and oneDNN with compiled products."""

import os
import subprocess
import sys

import pytest

from diffusion_moe.allocator import keep_compiled_products

FAULTS = """
import resource, sys
from diffusion_moe.allocator import keep_freed_memory
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


SHAPES = """
import os, sys
from diffusion_moe.allocator import keep_compiled_products
if sys.argv[1] == "keep":
    keep_compiled_products()
import torch
torch.set_num_threads(1)
b = torch.ones(8, 8, dtype=torch.bfloat16)
for _ in range(2):
    print("pass", flush=True)
    for rows in range(1, 1200):
        torch.ones(rows, 8, dtype=torch.bfloat16) @ b
"""


def test_products_of_many_shapes_are_compiled_once():
    compiled = {}
    for how in ("keep", "oneDNN's limit"):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ONEDNN_")}
        run = subprocess.run(
            [sys.executable, "-c", SHAPES, how],
            capture_output=True,
            text=True,
            check=True,
            env=environment | {"ONEDNN_VERBOSE": "profile_create", "OMP_NUM_THREADS": "1"},
        )
        first, second = run.stdout.split("pass\n")[1:]
        if "create:cache_miss" not in first:
            pytest.skip("products of bfloat16 are not oneDNN's here")
        compiled[how] = second.count("create:cache_miss")
    assert compiled["keep"] == 0 < 1000 < compiled["oneDNN's limit"]


def test_a_limit_that_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    keep_compiled_products()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
