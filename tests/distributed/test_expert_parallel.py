"""Experts spread over processes give what the loop over all experts gives, and every gradient."""

import pytest


def test_two_processes(run_processes):
    run_processes(2, "layer_worker.py")


@pytest.mark.slow
def test_four_processes(run_processes):
    run_processes(4, "layer_worker.py")
