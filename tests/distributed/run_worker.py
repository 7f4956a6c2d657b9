"""One of several gloo processes: runs `diffusion-moe` some times, one after another.

Usage: run_worker.py RUNS.json, a list of objects with `arguments`, and perhaps `poisoned` (images of the training split
whose pixels are not finite) and `status` (the exit status to expect).
"""

import json
import sys
from pathlib import Path

import torch

from diffusion_moe.cli import main
from diffusion_moe.data.digits import Digits
from diffusion_moe.distributed import torchrun_processes

read = Digits.read


def poisoned(images):
    """`Digits.read` with some images spoiled."""

    def read_some(self, indices):
        batch = read(self, indices)
        batch.images[[i for i, index in enumerate(indices) if index in images]] = torch.nan
        return batch

    return read_some


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torchrun_processes():
        for run in json.loads(Path(sys.argv[1]).read_text()):
            Digits.read = poisoned(set(run.get("poisoned", ())))
            status = main(["train", "digits", *run["arguments"]])
            assert status == run.get("status", 0), (run, status)
