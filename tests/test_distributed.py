"""Processes that start again find each other, and none of those before them."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from diffusion_moe import distributed
from diffusion_moe.distributed import claim_gpu, meet, torchrun_processes

GPU = torch.device("cuda", 0)
SOON, NEVER = timedelta(seconds=0.2), timedelta(minutes=1)


def all_meet(store, numbers, world=3, timeout=NEVER):
    with ThreadPoolExecutor(world) as pool:
        return [result.result() for result in [pool.submit(meet, store, n, world, timeout) for n in numbers]]


def test_every_start_has_a_name_of_its_own():
    store = dist.HashStore()
    names = [all_meet(store, order) for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2))]
    assert [len(set(start)) for start in names] == [1, 1, 1]
    assert len({start[0] for start in names}) == 3


def test_what_a_broken_start_left_does_not_matter():
    """Some had called, one died over its call, and process 0 died when it had answered."""
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError):
        all_meet(store, (1, 2), timeout=SOON)
    with pytest.raises(TimeoutError, match="only 2 of 3 processes have started"):
        all_meet(store, (1, 0), timeout=SOON)
    store.add("meet/calls", 1)
    assert len(set(all_meet(store, (0, 1, 2)))) == 1


def test_two_processes_on_one_gpu_are_refused(monkeypatch):
    """Each may call it cuda:0; only its identity counts."""
    identity = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: identity)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    store = dist.HashStore()
    claim_gpu(store, GPU)
    with pytest.raises(ValueError, match=r"several processes use the same GPU GPU-1, .* --nproc-per-node 1\)") as error:
        claim_gpu(store, GPU)
    assert "\n" not in str(error.value)
    identity.uuid = "GPU-2"
    claim_gpu(store, GPU)


def test_nccl_connects_when_the_processes_meet(monkeypatch):
    """torch does that if it is given the device."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    chosen, begun = [0], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device}"))
    monkeypatch.setattr(distributed, "rendezvous", lambda *given, **options: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(distributed, "meet", lambda *given: "start")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: begun.append(options["device_id"]))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for backend in ("cpu:gloo,cuda:nccl", "gloo"):
        with torchrun_processes(backend):
            pass
    assert begun == [torch.device("cuda", 1), None]
