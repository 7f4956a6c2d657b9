"""Feature sums over two gloo processes equal those of one."""

import subprocess
import sys
from pathlib import Path

import torch

from diffusion_moe.distributed import all_reduce_sum, is_main, rank, world_size
from diffusion_moe.evaluation.statistics import FeatureSums

WORKER = Path(__file__).with_name("feature_sums_worker.py")


def test_two_processes_equal_one(tmp_path):
    features = torch.randn(21, 5)
    torch.save(features, tmp_path / "features.pt")
    files = [str(tmp_path / name) for name in ("rendezvous", "features.pt")]
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(i), *files, str(tmp_path / f"{i}.pt")]) for i in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    whole = FeatureSums.of(features)
    for i in range(2):
        found = torch.load(tmp_path / f"{i}.pt", weights_only=True)
        assert found["rank"] == (i, 2, i == 0)
        torch.testing.assert_close(found["mean"], whole.mean(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["covariance"], whole.covariance(), rtol=1e-9, atol=1e-9)


def test_one_process_is_the_identity():
    x = torch.randn(3)
    assert all_reduce_sum(x) is x
    assert (rank(), world_size(), is_main()) == (0, 1, True)
