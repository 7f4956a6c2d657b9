"""Checkpoints of many processes, on gloo: equal in every layout, and whole whatever fails."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_moe.storage import Manifest, checkpoints_in

sys.path.append(str(Path(__file__).parent))
import storage_worker

KEY_BYTES = 64 * 4


@pytest.fixture
def start(context, tmp_path):
    """Start a task on `world` processes; they are gone when the test ends."""
    started = []

    def start(task, world, **options):
        arguments = [(task, rank, world, str(tmp_path), options) for rank in range(world)]
        processes = [context.Process(target=storage_worker.main, args=one) for one in arguments]
        started.extend(processes)
        for process in processes:
            process.start()
        return processes

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def run(start, tmp_path):
    """Run a task on `world` processes; answers theirs, by rank."""

    def run(task, world, **options):
        codes = [process.join(60) or process.exitcode for process in start(task, world, **options)]
        assert codes == [0] * world
        (tmp_path / f"meeting-{task}-{world}").unlink(missing_ok=True)
        return [json.loads((tmp_path / f"answer-{task}-{world}-{rank}.json").read_text()) for rank in range(world)]

    return run


def test_every_layout_reads_what_every_other_wrote(run, tmp_path):
    """1 -> 2 -> 4 -> 1 processes."""
    for seed, (world, before) in enumerate([(1, None), (2, 1), (4, 2), (1, 3)], 1):
        answers = run("relay", world, seed=seed)
        was = None if before is None else {"seed": before}
        assert answers == [{"was": was, "problems": [], "right": True, "path": f"step-{seed:08d}"}] * world
    full = storage_worker.full_state(2)
    sizes = {2: [], 3: []}
    for step, parts in sizes.items():
        path = tmp_path / "checkpoints" / f"step-{step:08d}"
        found = [load_file(path / record.name) for record in Manifest.read(path).files]
        parts += [sum(tensor.nbytes for tensor in file.values()) for file in found]
        # Each shard is written once, and the replicated ones fill up what the split ones leave uneven.
        assert sum(parts) == sum(tensor.nbytes for tensor in full.values())
        assert max(parts) - min(parts) <= 100


def test_a_model_split_by_fsdp_over_experts_and_shards(run):
    for answer in run("fsdp", 4):
        assert answer["right"] == [True, True, True]
        assert answer["placements"]["experts.weight"].count("Shard") == 2
        assert "_StridedShard" in answer["placements"]["uneven.weight"]  # one dimension split twice


def test_one_rank_cannot_write(run):
    answers = run("cannot_write", 2, limited=1)
    assert answers[0] == answers[1]
    assert [error["kind"] for error in answers[0]["errors"]] == ["OSError"] * 2
    assert all("cannot write the checkpoint (rank 1: File too large" in e["reason"] for e in answers[0]["errors"])
    assert answers[0]["left"] == ["step-00000001"]
    assert (answers[0]["value"], answers[0]["problems"]) == (3, [])


def test_the_disk_is_full(run, tmp_path):
    disk = tmp_path / "checkpoints"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"mounting a small tmpfs is not allowed here: {mount.stderr.decode().strip()}")
    try:
        answers = run("cannot_write", 2, limited=None, rows=8192)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert answers[0] == answers[1]
    assert len(answers[0]["errors"]) == 2
    assert all("No space left" in error["reason"] and "rank" in error["reason"] for error in answers[0]["errors"])
    assert answers[0]["left"] == ["step-00000001"] and answers[0]["value"] == 3


def test_damage_that_one_rank_finds_turns_all_to_the_one_before(run, start, tmp_path):
    run("train_on", 2)
    newest, middle, oldest = checkpoints_in(tmp_path / "checkpoints")
    for path, file in ((newest, 0), (middle, 1)):
        data = bytearray((path / f"tensors-{file:05d}-000.safetensors").read_bytes())
        data[-9] ^= 16
        (path / f"tensors-{file:05d}-000.safetensors").write_bytes(data)
    answers = run("look", 2)
    assert answers[0] == answers[1]
    assert answers[0]["value"] == 1 and oldest.name == "step-00000001"
    first, second = answers[0]["problems"]
    assert "step-00000003: tensors-00000-000.safetensors is corrupt" in first
    assert "step-00000002: tensors-00001-000.safetensors is corrupt" in second and "\n" not in first + second


def test_training_continues_while_the_background_writes(run):
    assert run("train_on", 2) == [{"values": [1, 2, 3]}] * 2


def test_processes_that_disagree_are_refused(run):
    expected = [
        ("CheckpointError", "ranks 0 and 1 save different tensors: one of them lacks extra"),
        ("RuntimeError", "the processes do different work: {0: 'looking for checkpoints', 1: 'checking metadata"),
        (
            "FileNotFoundError",
            "cannot write the checkpoint (rank 1: rank 0 created this folder, but it is missing here",
        ),
        ("ValueError", "rank 1: the metadata of a checkpoint must be JSON"),
    ]
    for answer in run("disagree", 2):
        assert [found["kind"] for found in answer["reasons"]] == [kind for kind, _ in expected]
        assert all(reason in found["reason"] for found, (_, reason) in zip(answer["reasons"], expected))
        assert answer["left"] == []


@pytest.mark.parametrize("world", [2, 4])
def test_a_killed_process_is_noticed_at_once(start, run, tmp_path, world):
    processes = start("lose_one", world, by=signal.SIGKILL, timeout=60)
    codes = [process.join(30) or process.exitcode for process in processes]
    assert codes == [0, -signal.SIGKILL, *[0] * (world - 2)]
    for rank in {*range(world)} - {1}:
        answer = json.loads((tmp_path / f"answer-lose_one-{world}-{rank}.json").read_text())
        assert answer["kind"] == "LostProcess" and "lost a process while writing a checkpoint" in answer["reason"]
        assert answer["seconds"] < 20
    assert run("look", 2) == [{"value": 1, "problems": []}] * 2


def test_a_stopped_process_is_noticed_after_the_timeout(start, run, tmp_path):
    processes = start("lose_one", 2, by=signal.SIGSTOP, timeout=2)
    processes[0].join(30)
    assert processes[0].exitcode == 0
    answer = json.loads((tmp_path / "answer-lose_one-2-0.json").read_text())
    assert answer["kind"] == "LostProcess" and 1 < answer["seconds"] < 20
    processes[1].kill()
    assert run("look", 2) == [{"value": 1, "problems": []}] * 2


def _kill_all_at(processes, folder: Path, bytes_written: int) -> None:
    """SIGKILL all once so much of some later checkpoint is written."""
    pause = threading.Event()
    while True:
        if len(checkpoints_in(folder)) > 1 and _partial_bytes(folder) >= bytes_written:
            break
        assert all(process.is_alive() for process in processes)
        pause.wait(0.0005)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()


def _partial_bytes(folder: Path) -> int:
    size = 0
    for file in folder.glob("step-*.partial/*"):
        with contextlib.suppress(FileNotFoundError):  # it has just been published, or dropped
            size += file.stat().st_size
    return size


def _killed_in_a_save(start, run, tmp_path, rows: int, chance: random.Random) -> None:
    folder = tmp_path / "checkpoints"
    _kill_all_at(start("save_for_ever", 2, rows=rows), folder, chance.randrange(rows * KEY_BYTES))
    (tmp_path / "meeting-save_for_ever-2").unlink(missing_ok=True)
    newest = int(checkpoints_in(folder)[0].name[5:])
    answers = run("look_and_save", 2, rows=rows)
    assert answers[0] == answers[1] == {"value": newest, "problems": [], "after": 1000}
    assert not list(folder.glob("*.partial"))


def test_all_are_killed_in_a_save(start, run, tmp_path):
    _killed_in_a_save(start, run, tmp_path, 1 << 16, random.Random(1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_all_are_killed_in_a_save_at_any_moment(start, run, tmp_path, seed):
    _killed_in_a_save(start, run, tmp_path, 1 << 16, random.Random(100 + seed))


def test_states_differ_by_seed():
    """Else the relay would prove little."""
    a, b = storage_worker.full_state(1), storage_worker.full_state(2)
    assert [name for name in a if torch.equal(a[name], b[name])] == ["flag"]
