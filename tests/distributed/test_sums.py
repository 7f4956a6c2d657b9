"""Feature sums over two gloo processes equal those of one."""

import torch

from diffusion_moe.distributed import all_reduce_sum, is_main, rank, world_size
from diffusion_moe.evaluation.metrics import FeatureSums


def test_two_processes_equal_one(tmp_path, run_processes):
    features = torch.randn(21, 5)
    torch.save(features, tmp_path / "features.pt")
    run_processes(2, "feature_sums_worker.py", tmp_path)
    whole = FeatureSums.of(features).moments()
    for i in range(2):
        found = torch.load(tmp_path / f"{i}.pt", weights_only=True)
        assert found["rank"] == (i, 2, i == 0)
        torch.testing.assert_close(found["mean"], whole.mean_D, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["covariance"], whole.covariance_DD, rtol=1e-9, atol=1e-9)


def test_one_process_is_the_identity():
    x = torch.randn(3)
    assert all_reduce_sum(x) is x
    assert (rank(), world_size(), is_main()) == (0, 1, True)
