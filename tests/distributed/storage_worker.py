"""What the processes of test_storage.py do: each task runs on every rank and answers what JSON can hold."""

import json
import os
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoints import write
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from diffusion_moe.storage import AsyncWriter, latest, read, writing
from diffusion_moe.storage.shards import held_blocks, local_tensor, whole


def main(task: str, rank: int, world: int, folder: str, options: dict) -> None:
    """One process: do a task, and leave its answer in the folder."""
    torch.set_num_threads(1)
    if world > 1:
        meeting = f"file://{folder}/meeting-{task}-{world}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    answer = TASKS[task](Path(folder) / "checkpoints", **options)
    (Path(folder) / f"answer-{task}-{world}-{rank}.json").write_text(json.dumps(answer))
    if world > 1 and task != "lose_one":
        dist.destroy_process_group()


def failure(error: Exception) -> dict:
    return {"kind": type(error).__name__, "reason": str(error)}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


# One state in many layouts


def full_state(seed: int) -> dict[str, torch.Tensor]:
    """Whole tensors; sizes that split evenly where FSDP2 wants it, unevenly and into nothing elsewhere."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "experts": normal(4, 8, 3),
        "dense.weight": normal(7, 5),
        "dense.bias": normal(5).bfloat16(),
        "single_row": normal(1, 6),
        "strided": normal(8, 3),
        "rows_apart": normal(8, 3),
        "corner": normal(3, 2),
        "buffer": torch.arange(9) * seed,
        "step": torch.tensor(float(seed)),
        "flag": torch.tensor(True),
    }


def distribute(state: dict[str, torch.Tensor], world: int) -> dict[str, torch.Tensor]:
    """The state as a world of this size holds it."""
    if world == 1:
        return state
    if world == 2:
        line = init_device_mesh("cpu", (2,))
        placements = {
            "experts": (line, [Shard(0)]),
            "dense.weight": (line, [Shard(0)]),
            "single_row": (line, [Shard(0)]),
            "dense.bias": (line, [Replicate()]),
            "strided": (line, [Shard(1)]),
        }
    else:
        mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("replicate", "shard", "experts"))
        flat = mesh["shard", "experts"]._flatten("dense")
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        placements = {
            "experts": (mesh, [Replicate(), Shard(1), Shard(0)]),
            "dense.weight": (flat, [Shard(0)]),
            "dense.bias": (square, [Replicate(), Shard(0)]),
            "single_row": (flat, [Shard(0)]),
            "strided": (square, [_StridedShard(0, split_factor=2), Shard(0)]),
            "rows_apart": (square, [_StridedShard(0, split_factor=2), Replicate()]),
            "corner": (DeviceMesh("cpu", [1, 2]), [Shard(0)]),  # ranks 0 and 3 hold nothing
            "buffer": (flat, [Shard(0)]),
        }
    return {
        name: distribute_tensor(tensor, *placements[name]) if name in placements else tensor
        for name, tensor in state.items()
    }


def same_as(full: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> bool:
    """Whether what this process holds is, bit for bit, that part of the whole tensors."""
    return all(
        torch.equal(local_tensor(found[name])[place], tensor[block.within(whole(tensor.shape))])
        for name, tensor in full.items()
        for block, place in held_blocks(found[name]).items()
    )


def relay(folder: Path, seed: int) -> dict:
    """Read what another world left, compare, and leave a new state in this world's layout."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    blank = {name: torch.zeros_like(tensor) for name, tensor in full_state(0).items()}
    state = distribute(blank, world)
    found = latest(folder, lambda path: read(path, state))
    right = found.path is None or same_as(full_state(found.loaded["seed"]), state)
    path = write(folder, seed, distribute(full_state(seed), world), {"seed": seed})
    return {"was": found.loaded, "problems": found.problems, "right": right, "path": path.name}


def fsdp(folder: Path) -> dict:
    """A model as the training engine splits it, with its optimizer: saved, spoilt, read again."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("replicate", "shard", "experts"))
    layers = {"experts": nn.Linear(8, 4, bias=False), "uneven": nn.Linear(3, 9, bias=False), "dense": nn.Linear(8, 7)}
    model = nn.ModuleDict(layers)
    whole_model = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, dim in (("experts", 1), ("uneven", 0)):
        split = distribute_tensor(model[name].weight.detach(), mesh["experts"], [Shard(0)])
        model[name].weight = nn.Parameter(split)
        fully_shard(model[name], mesh=mesh["replicate", "shard"], shard_placement_fn=lambda _, dim=dim: Shard(dim))
    flat = mesh["shard", "experts"]._flatten("dense")
    fully_shard(model["dense"], mesh=flat)
    tensors = dict(model.named_parameters())
    right = [same_as(whole_model, tensors)]
    path = write(folder, 1, tensors, {})
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    right.append(not same_as(whole_model, tensors))
    read(path, tensors)
    right.append(same_as(whole_model, tensors))
    placements = {name: str(tensor.placements) for name, tensor in tensors.items()}
    return {"right": right, "placements": placements}


# Failures


def numbered(value: float, rows: int = 1024) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "split": distribute_tensor(torch.full((rows, 64), float(value)), mesh, [Shard(0)], src_data_rank=None),
        "plain": torch.tensor(value),
    }


def load_numbered(path: Path, rows: int = 1024) -> int:
    tensors = numbered(0, rows)
    read(path, tensors)
    value = tensors["plain"]
    if not bool((local_tensor(tensors["split"]) == value).all()):
        raise AssertionError("not one state")
    return int(value)


def look(folder: Path, rows: int = 1024) -> dict:
    """Which checkpoint is the newest good one, and why others are not."""
    found = latest(folder, lambda path: load_numbered(path, rows))
    return {"value": found.loaded, "problems": found.problems}


def look_and_save(folder: Path, rows: int) -> dict:
    answer = look(folder, rows)
    write(folder, 1000, numbered(1000, rows), {})
    return answer | {"after": look(folder, rows)["value"]}


def cannot_write(folder: Path, limited: int | None, rows: int = 1024) -> dict:
    """One rank may not write beyond 64 KB; with none limited, the disk is full."""
    write(folder, 1, numbered(1, 16), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank() == limited:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    errors = []
    with AsyncWriter(folder, keep=2) as writer:
        for save in (lambda: write(folder, 2, numbered(2, rows), {}), lambda: writer.save(2, numbered(2, rows), {})):
            try:
                save()
                writer.wait()
            except OSError as error:
                errors.append(failure(error))
        left = sorted(path.name for path in folder.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        writer.save(3, numbered(3, 16), {})
    return {"errors": errors, "left": left} | look(folder, 16)


def disagree(folder: Path) -> dict:
    """Processes that save different tensors, or do not do the same thing."""
    reasons = []
    tensors = {"same": torch.ones(2)} | ({"extra": torch.ones(2)} if rank() == 1 else {})
    own = folder.with_name(f"node {rank()}")  # as on two machines
    for attempt in (
        lambda: write(folder, 1, tensors, {}),
        lambda: _one_writes_and_one_reads(folder),
        lambda: write(own, 1, {"same": torch.ones(2)}, {}),
        lambda: write(folder, 1, {"same": torch.ones(2)}, {1: {2}} if rank() else {}),
    ):
        try:
            attempt()
        except (ValueError, OSError, RuntimeError) as error:
            reasons.append(failure(error))
    left = [path.name for place in (folder, own) if place.exists() for path in place.iterdir()]
    return {"reasons": reasons, "left": left}


def _one_writes_and_one_reads(folder: Path) -> None:
    with AsyncWriter(folder, keep=2) as writer:
        if rank():
            writer.save(1, {}, {})
        else:
            latest(folder, load_numbered, group=writer.group)


def lose_one(folder: Path, by: int, timeout: float) -> dict:
    """Rank 1 is killed, or stops, in the middle of its file."""
    patience = timedelta(seconds=timeout)
    write(folder, 1, numbered(1), {}, timeout=patience)
    if rank() == 1:

        def end(path: Path, entries: list) -> None:
            path.write_bytes(b"half")
            os.kill(os.getpid(), by)

        writing.write_safetensors = end
    begun = time.monotonic()
    try:
        write(folder, 2, numbered(2), {}, timeout=patience)
    except OSError as error:
        return failure(error) | {"seconds": time.monotonic() - begun}
    return {}


def save_for_ever(folder: Path, rows: int) -> None:
    """Until killed."""
    with AsyncWriter(folder, keep=2) as writer:
        for step in range(1, 1000):
            writer.save(step, numbered(step, rows), {})


def train_on(folder: Path) -> dict:
    """The background writes over its group while the foreground talks over another, and changes the tensors."""
    tensors = numbered(1)
    with AsyncWriter(folder, keep=3) as writer:
        for step in (1, 2, 3):
            writer.save(step, tensors, {})
            for value in tensors.values():
                local_tensor(value).add_(1)
            talk = torch.ones(100)
            for _ in range(50):
                dist.all_reduce(talk)
                talk /= dist.get_world_size()
    return {"values": [load_numbered(writing.checkpoint_path(folder, step)) for step in (1, 2, 3)]}


TASKS = {
    task.__name__: task
    for task in (relay, fsdp, look, look_and_save, cannot_write, disagree, lose_one, save_for_ever, train_on)
}
