"""What cannot be written or read ends the run with an error that names it; what is there already stays."""

import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from worker_datasets import DeadlyDigits

from diffusion_moe.cli import main
from diffusion_moe.config import read_recipe
from diffusion_moe.data import load_dataset
from diffusion_moe.run_folder import RunFolder
from diffusion_moe.training import loop
from diffusion_moe.training.export import export_models
from diffusion_moe.training.loop import train
from diffusion_moe.training.metrics_log import MetricsLog
from diffusion_moe.training.state import make_state


@contextmanager
def files_end_at(size):
    """As a disk that is full: larger files cannot be written."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
@pytest.mark.parametrize("board", ["true", "false"])
def test_metrics_that_cannot_be_written(tiny, tmp_path, board):
    log = MetricsLog(RunFolder(tmp_path), read_recipe("digits", [*tiny, f"--logging.tensorboard={board}"]))
    log.open(0)
    with files_end_at(4096):
        with pytest.raises(OSError, match=r"cannot write the metrics \(File too large\)") as failed:
            try:
                for step in range(500):
                    log.write(step, {"loss": 0.5})
            finally:
                log.close()  # it may fail too, and must say the same
        assert failed.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_model_that_cannot_be_written_leaves_the_one_before(tiny, tmp_path):
    recipe, run = read_recipe("digits", tiny), RunFolder(tmp_path)
    state, dataset = make_state(recipe, torch.device("cpu")), load_dataset(recipe.data, "train")
    export_models(run, state, recipe, dataset)
    before = {path.name: path.read_bytes() for path in run.model.iterdir()}
    with files_end_at(1 << 16), pytest.raises(OSError, match=r"cannot write the model .*File too large") as failed:
        export_models(run, state, recipe, dataset)
    assert "\n" not in failed.value.strerror
    assert {path.name: path.read_bytes() for path in run.model.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_loading_process_is_killed(tiny, tmp_path, monkeypatch, capsys):
    """As the kernel does when memory is short."""
    monkeypatch.setattr(loop, "load_dataset", DeadlyDigits)
    arguments = [*tiny, "--data.num_workers=1", "--output_dir", str(tmp_path)]
    assert main(["train", "digits", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("diffusion-moe: a data loading process ended (DataLoader worker")
    assert "lower data.num_workers" in said and said.count("\n") == 1


def test_a_run_that_is_not_torchruns_continues_without_its_parent(tiny, tmp_path, monkeypatch):
    """One in the background does not miss its shell; one of torchrun's saves and ends."""
    recipe = read_recipe("digits", [*tiny, "--training.steps=3"])
    for name, steps, signals in (("ours", 3, None), ("torchrun's", 2, signal.SIGTERM)):
        parents = iter([100])
        monkeypatch.setattr("os.getppid", lambda parents=parents: next(parents, 1))
        outcome = train(recipe, tmp_path / name, log=str)
        assert outcome == (steps, signals)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
