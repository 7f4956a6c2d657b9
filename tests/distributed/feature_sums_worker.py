"""One of two gloo processes: sums its half of the features and saves what it knows of the whole.

Usage: feature_sums_worker.py RANK RENDEZVOUS_FILE FEATURES_FILE RESULT_FILE
"""

import sys

import torch
import torch.distributed as dist

from diffusion_moe.distributed import is_main, rank, world_size
from diffusion_moe.evaluation.statistics import FeatureSums

process, rendezvous, features, result = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=process, world_size=2)
sums = FeatureSums.of(torch.load(features, weights_only=True)[process::2]).over_processes()
knows = {"mean": sums.mean(), "covariance": sums.covariance(), "rank": (rank(), world_size(), is_main())}
torch.save(knows, result)
dist.destroy_process_group()
