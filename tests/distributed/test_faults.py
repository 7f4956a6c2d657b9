"""What happens to a run of several processes, started as users start it, when something dies.

However it was disturbed, it ends with the weights, EMAs and metrics of the run that was not, bit for bit.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from run_state import final_state

from diffusion_moe.cli import main
from diffusion_moe.storage import checkpoints_in, step_of

WORKER = Path(__file__).with_name("fault_worker.py")
STEPS, EVERY = 16, 4
LIMIT_SECONDS = 400
"""Only what hangs takes so long."""
NUMBERS = ("loss", "grad_norm", "learning_rate", "imbalance", "moe_0/load_max", "moe_0/load_entropy")
KILL, TERM, STOP = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGSTOP)


class Ended(NamedTuple):
    """How torchrun ended."""

    status: int
    said: str
    """By all processes, torchrun too."""
    seconds: float

    @property
    def ours(self) -> list[str]:
        """What the command says, without what torchrun adds."""
        return [line for line in self.said.splitlines() if line.startswith(("diffusion-moe: ", "warning: "))]


@pytest.fixture
def options(tiny):
    several = [f"--training.steps={STEPS}", f"--training.checkpoint_every={EVERY}", "--logging.every=1"]
    return [*tiny, *several, "--training.ema_decay=0.9", "--optimizer.eps=1e-5", "--parallel.experts=2"]


@pytest.fixture
def torchrun(tmp_path, options):
    """Trains in a folder by torchrun; nobody is left when the test ends."""
    number = 0

    def run(folder, *faults, restarts=0, launch=(), more=()):
        nonlocal number
        number += 1
        (tmp_path / f"{number}.json").write_text(json.dumps(faults))
        command = [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={restarts}"]
        command += [*(launch or ("--nproc-per-node=2", "--standalone")), str(WORKER), str(tmp_path / f"{number}.json")]
        command += ["train", "digits", *options, *more, "--output_dir", str(folder)]
        began = time.monotonic()
        with (tmp_path / f"{number}.out").open("w") as out:
            status = subprocess.run(command, stdout=out, stderr=out, timeout=LIMIT_SECONDS).returncode
        said = (tmp_path / f"{number}.out").read_text()
        return Ended(status, said, time.monotonic() - began)

    yield run
    for path in tmp_path.glob("*.json.pid.*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.name.rpartition(".")[2]), signal.SIGKILL)


def fault(do, step, more=None, *, rank=None, at="step"):
    return {"do": do, "step": step, "more": more, "rank": rank, "at": at}


def metrics(folder, names=NUMBERS):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[row["step"], *(row[name] for name in names)] for row in rows]


def assert_same(folder, expected):
    """Weights, EMAs, moments, metrics and the published model are bit for bit those of another run."""
    found, others = final_state(folder, STEPS), final_state(expected, STEPS)
    assert found.keys() == others.keys()
    assert not [name for name in others if not torch.equal(found[name], others[name])]
    assert metrics(folder) == metrics(expected)
    assert [row[0] for row in metrics(folder)] == list(range(1, STEPS + 1))
    weights = "diffusion_pytorch_model.safetensors"
    assert (folder / "model" / weights).read_bytes() == (expected / "model" / weights).read_bytes()
    assert not [path.name for path in folder.rglob("*.partial*")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_options, run_processes):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "faults.json").write_text("[]")
    options = [*tiny_options, f"--training.steps={STEPS}", f"--training.checkpoint_every={EVERY}", "--logging.every=1"]
    options += ["--training.ema_decay=0.9", "--optimizer.eps=1e-5", "--parallel.experts=2"]
    arguments = ["train", "digits", *options, "--output_dir", folder / "run"]
    run_processes(2, WORKER.name, folder / "faults.json", *arguments)
    return folder / "run"


def test_a_process_is_killed_and_all_start_again(torchrun, options, tmp_path):
    """Against a single process, which takes less time than two; those below compare bit for bit."""
    step = random.Random(1).randrange(EVERY + 1, STEPS + 1)
    ended = torchrun(tmp_path / "run", fault("raise_signal", step, KILL, rank=step % 2), restarts=1)
    assert ended.status == 0 and "Traceback" not in ended.said
    assert ended.said.count("resuming from") == 1
    assert main(["train", "digits", *options, "--parallel.experts=1", "--output_dir", str(tmp_path / "alone")]) == 0
    found, expected = final_state(tmp_path / "run", STEPS), final_state(tmp_path / "alone", STEPS)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-6, msg=lambda text, name=name: name + text)
    numbers = [torch.tensor(metrics(tmp_path / name, ("loss", "grad_norm"))) for name in ("run", "alone")]
    torch.testing.assert_close(*numbers, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_run_is_preempted_and_then_loses_a_process(torchrun, undisturbed, tmp_path):
    """SIGTERM to torchrun at one step, SIGKILL of one process at another; both chosen by chance."""
    chance = random.Random(1)
    first, second = chance.randrange(2, 6), chance.randrange(9, STEPS + 1)
    ended = torchrun(tmp_path / "run", fault("tell_torchrun", first, TERM, rank=0))
    assert ended.status == 1  # torchrun's own, whatever its processes say
    saved = step_of(checkpoints_in(tmp_path / "run" / "checkpoints")[0])
    assert saved in (first + 1, first + 2)  # which of them learned of it
    assert f"interrupted; saved a checkpoint at step {saved}. Run the same command again to resume." in ended.said
    ended = torchrun(tmp_path / "run", fault("raise_signal", second, KILL, rank=second % 2), restarts=1)
    assert ended.status == 0
    assert ended.said.count("resuming from") == 2
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_process_is_killed_after_the_recipe_has_changed(torchrun, tmp_path):
    """Started again by torchrun with `--resume changed`, and once more by the plain command."""
    first = [f"--training.steps={EVERY}"]
    other = ["--training.batch_size=24", "--training.extra_ema_decays=[0.5]", "--optimizer.learning_rate=1e-3"]
    for folder in ("whole", "killed"):
        assert torchrun(tmp_path / folder, more=first).status == 0
    assert torchrun(tmp_path / "whole", more=[*other, "--resume=changed"]).status == 0
    faults = [fault("raise_signal", step, KILL, rank=step % 2) for step in (EVERY + 2, 2 * EVERY + 3)]
    ended = torchrun(tmp_path / "killed", *faults, restarts=1, more=[*other, "--resume=changed"])
    assert ended.status == 1 and ended.said.count("the recipe changes after step 4:") == 1
    assert torchrun(tmp_path / "killed", more=other).status == 0
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_processes_are_killed_at_random_steps(torchrun, undisturbed, tmp_path, seed):
    chance = random.Random(seed)
    faults = [
        fault("raise_signal", step, KILL, rank=chance.randrange(2)) for step in chance.sample(range(1, STEPS + 1), 2)
    ]
    ended = torchrun(tmp_path / "run", *faults, restarts=2)
    assert ended.status == 0
    # The other process says what it sees, unless torchrun ends it first; nobody shows where.
    assert all("another process ended" in line or "lost a process" in line for line in ended.ours)
    assert "Traceback" not in ended.said
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("step", [EVERY, 2 * EVERY, STEPS])
def test_all_are_killed_during_a_save(torchrun, undisturbed, tmp_path, step):
    """Torchrun too, as by a power cut."""
    checkpoints = tmp_path / "run" / "checkpoints"
    assert torchrun(tmp_path / "run", fault("kill_all", step, KILL, at="save"), restarts=3).status == -KILL
    kept = [step_of(path) for path in checkpoints_in(checkpoints)]
    assert kept == [earlier for earlier in (12, 8, 4) if earlier < step][:2]
    assert [path.name for path in checkpoints.glob("*.partial")] == [f"step-{step:08d}.partial"]
    ended = torchrun(tmp_path / "run")
    assert (ended.status, ended.ours) == (0, [])
    assert (f"resuming from {checkpoints}/step-{step - EVERY:08d}" in ended.said) is (step > EVERY)
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_shard_of_the_newest_checkpoint_is_cut_off(torchrun, undisturbed, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    assert torchrun(tmp_path / "run", fault("kill_all", 3 * EVERY, KILL, at="save")).status == -KILL
    shard = checkpoints / f"step-{2 * EVERY:08d}" / "tensors-00001-000.safetensors"
    size = shard.stat().st_size  # the larger of the two: rank 0 checks it
    os.truncate(shard, size - 1)
    ended = torchrun(tmp_path / "run")
    assert (ended.status, ended.ours) == (
        0,
        [f"warning: rank 0: checkpoint {shard.parent}: {shard.name} has {size - 1} bytes of {size}"],
    )
    assert f"resuming from {checkpoints}/step-{EVERY:08d}" in ended.said
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "step", "what"),
    [
        (1, 6, "cannot write the metrics (No space left on device): {run}/metrics.jsonl"),
        (STEPS, 6, "cannot write the checkpoint (rank"),
    ],
    ids=["metrics", "checkpoint"],
)
def test_the_disk_is_full(torchrun, undisturbed, tmp_path, make_disk, every, step, what):
    small_disk = make_disk(megabytes=64)
    run = small_disk / "run"
    full = fault("fill_disk", step, str(small_disk / "filler"), rank=0)
    ended = torchrun(run, full, more=[f"--logging.every={every}"])
    assert ended.status == 1
    assert [line for line in ended.ours if line.startswith("diffusion-moe: " + what.format(run=run))], ended.said
    assert all("No space left on device" in line or "another process ended" in line for line in ended.ours)
    assert len(ended.ours) <= 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{EVERY:08d}"]
    (small_disk / "filler").unlink()
    again = torchrun(run, more=["--logging.every=1"])
    assert (again.status, again.ours) == (0, [])
    found, expected = final_state(run, STEPS), final_state(undisturbed, STEPS)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
    if every == 1:
        assert_same(run, undisturbed)


@pytest.mark.slow
def test_files_may_not_grow_on_one_process(torchrun, undisturbed, tmp_path):
    """As on a disk that is full there; needs no right to mount."""
    ended = torchrun(tmp_path / "run", fault("limit_files", 6, 4096, rank=1))
    assert ended.status == 1
    expected = "diffusion-moe: cannot write the checkpoint (rank 1: File too large"
    assert len(ended.ours) == 2 and all(line.startswith(expected) for line in ended.ours), ended.said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{EVERY:08d}"]
    assert torchrun(tmp_path / "run").status == 0
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_is_asked_to_stop(torchrun, undisturbed, tmp_path, rank):
    """All save and end together; torchrun, which was not asked, starts them again."""
    ended = torchrun(tmp_path / "run", fault("raise_signal", 6, TERM, rank=rank), restarts=1)
    assert (ended.status, ended.ours) == (0, [])
    assert ended.said.count("interrupted; saved a checkpoint at step") == 1
    assert ended.said.count("resuming from") == 1
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_process_that_hangs_does_not_keep_the_others(torchrun, undisturbed, tmp_path, monkeypatch):
    """They wait for it in a collective, where Python does not hear a signal."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")  # then torchrun ends what does not end by itself
    faults = fault("raise_signal", 7, STOP, rank=1), fault("tell_torchrun", 7, TERM, rank=0)
    ended = torchrun(tmp_path / "run", *faults, more=["--training.stop_seconds=2"])
    assert ended.status == 1 and ended.seconds < 90
    assert ended.ours == [
        "diffusion-moe: could not stop within 2 s; finished checkpoints are kept. Run the same command again to resume."
    ]
    assert torchrun(tmp_path / "run").status == 0
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_process_that_hangs_is_started_again(torchrun, undisturbed, tmp_path):
    """When the others' patience ends, torchrun starts all again."""
    faults = fault("be_patient", 0, 8, at="start"), fault("raise_signal", 3, STOP, rank=1)
    ended = torchrun(tmp_path / "run", *faults, restarts=1)
    assert ended.status == 0
    (line,) = ended.ours
    assert line.startswith("diffusion-moe: another process ended or cannot be reached; see its messages (")
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_save_that_hangs_ends_in_time(torchrun, undisturbed, tmp_path):
    faults = fault("save_for_ever", 2 * EVERY, at="save", rank=1), fault("tell_torchrun", 10, TERM, rank=0)
    ended = torchrun(tmp_path / "run", *faults, more=["--training.stop_seconds=2"])
    assert ended.status == 1 and ended.seconds < 90
    assert len(ended.ours) == 2 and all("could not stop within 2 s" in line for line in ended.ours)
    assert [step_of(path) for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == [EVERY]
    assert torchrun(tmp_path / "run").status == 0
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_torchrun_alone_is_killed(torchrun, undisturbed, tmp_path):
    """Its processes save and end, and the same command waits for that."""
    ended = torchrun(tmp_path / "run", fault("kill_torchrun", 6, KILL, rank=0))
    assert ended.status == -KILL
    ended = torchrun(tmp_path / "run")
    assert (ended.status, ended.ours) == (0, [])
    assert "interrupted; saved a checkpoint at step" in (tmp_path / "1.out").read_text()
    assert_same(tmp_path / "run", undisturbed)
