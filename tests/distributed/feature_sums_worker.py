"""One of two gloo processes: sums its half of the features and saves what it knows of the whole.

Usage: feature_sums_worker.py FOLDER, which has features.pt and gets a file for each process.
"""

import sys
from pathlib import Path

import torch

from diffusion_moe.distributed import is_main, rank, torchrun_processes, world_size
from diffusion_moe.evaluation.metrics import FeatureSums

folder = Path(sys.argv[1])
with torchrun_processes():
    features = torch.load(folder / "features.pt", weights_only=True)
    moments = FeatureSums.of(features[rank() :: 2]).over_processes().moments()
    knows = {"mean": moments.mean_D, "covariance": moments.covariance_DD, "rank": (rank(), world_size(), is_main())}
    torch.save(knows, folder / f"{rank()}.pt")
