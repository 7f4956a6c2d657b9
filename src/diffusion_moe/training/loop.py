"""The training loop: from a recipe and a folder to a finished, or cleanly interrupted, run."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader

from ..config import Recipe
from ..data import Batch, ImageDataset, SkippedLog, batches_from, load_dataset
from ..run_folder import DATA, ORIGIN, RunFolder
from .checkpoint import load_latest, save_checkpoint
from .log import MetricsLog, Progress
from .step import StepResult, TrainState, make_state, train_step

Say = Callable[[str], None]


class Outcome(NamedTuple):
    """How a call of `train` ended."""

    step: int
    """Steps done."""
    interrupted_by: int | None = None
    """The signal that ended it before the last step."""


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device a recipe asks for.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device is cuda, but no CUDA device is available; set it to auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_fit(recipe: Recipe, dataset: ImageDataset) -> None:
    """Whether model and data agree.

    Raises:
        ValueError: the image's shape or the number of classes is not the model's.
    """
    model, image = recipe.model, dataset.read([0]).images[0]
    expected = (model.in_channels, model.sample_size, model.sample_size)
    if tuple(image.shape) != expected:
        raise ValueError(
            f"the data's images are {tuple(image.shape)} (channels, height, width), but model.in_channels and "
            f"model.sample_size say {expected}; {dataset.shape_remedy}"
        )
    if model.num_classes not in (0, len(dataset.class_names)):
        raise ValueError(
            f"model.num_classes is {model.num_classes}, but the data has {len(dataset.class_names)} classes"
        )


def train(recipe: Recipe, output_dir: Path, resume: Literal["auto", "never"] = "auto", say: Say = print) -> Outcome:
    """Train until the recipe's last step, or until Ctrl-C or SIGTERM, which save a checkpoint first.

    Args:
        output_dir: the run folder; if it holds this recipe's run, training goes on from its last good checkpoint.
        say: receives lines of progress.

    Raises:
        ValueError: the data, the folder or the checkpoints do not fit. NonFiniteError: see `train_step`.
    """
    device = choose_device(recipe.training.device)
    dataset = load_dataset(recipe.data, "train", recipe.training.seed)
    check_fit(recipe, dataset)
    state = make_state(recipe, device)
    run = RunFolder(output_dir)
    run.claim(recipe, resume)
    _resume(run, state, recipe.training.steps, say)
    with _signals() as received:
        if state.step < recipe.training.steps:
            _loop(state, recipe, dataset, run, received, say)
    if received and state.step < recipe.training.steps:
        return Outcome(state.step, received[0])
    _publish(run, state, recipe, dataset)
    say(f"trained {state.step} steps; the averaged model is in {run.model}")
    return Outcome(state.step)


def _publish(run: RunFolder, state: TrainState, recipe: Recipe, dataset: ImageDataset) -> None:
    """Write the averaged model, whole or not at all, with notes of its origin and of its data."""
    partial = run.model.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    state.ema.save_pretrained(partial)
    origin = {"training_steps": state.step, "ema_decay": recipe.training.ema_decay}
    (partial / ORIGIN).write_text(json.dumps(origin) + "\n")
    (partial / DATA).write_text(json.dumps(dataset.record()) + "\n")
    shutil.rmtree(run.model, ignore_errors=True)
    partial.rename(run.model)


def _resume(run: RunFolder, state: TrainState, steps: int, say: Say) -> None:
    path, problems = load_latest(run.checkpoints, state)
    for problem in problems:
        say(f"warning: {problem}")
    if path is None and problems:
        raise ValueError(f"no checkpoint in {run.checkpoints} can be used; move them away to start anew")
    if path is not None:
        say(f"resuming from {path}" if state.step < steps else f"{path} is already at the last step")


def _loop(
    state: TrainState, recipe: Recipe, dataset: ImageDataset, run: RunFolder, received: list[int], say: Say
) -> None:
    training, every = recipe.training, recipe.logging.every
    log = MetricsLog(run.metrics, run.tensorboard if recipe.logging.tensorboard else None, state.step)
    spoke, skipped, skipped_log = time.perf_counter(), 0, SkippedLog(run.skipped)
    try:
        with (
            Progress(state.step, training.steps, training.batch_size, say) as progress,
            closing(_batches(recipe, dataset, state.step)) as batches,
        ):
            for batch in batches:
                skipped += batch.skipped
                skipped_log.note(batch.skipped_names)
                result = train_step(state, recipe, batch)
                last = state.step == training.steps
                if state.step % every == 0 or last:
                    log.write(state.step, _numbers(result, skipped, progress.images_per_second(state.step)))
                # A line at the first logged step, then one every ten seconds.
                line = last or state.step == every or (state.step % every == 0 and time.perf_counter() - spoke > 10)
                progress.show(state.step, result.loss, line)
                spoke = time.perf_counter() if line else spoke
                if last or received or state.step % training.checkpoint_every == 0:
                    save_checkpoint(run.checkpoints, state, training.keep_checkpoints)
                if received:
                    break
    finally:
        log.close()
    if skipped:
        say(
            f"warning: {skipped} unreadable images were replaced by others (data.on_corrupt is skip); "
            f"{run.skipped} names them"
        )


def _batches(recipe: Recipe, dataset: ImageDataset, step: int) -> Generator[Batch, None, None]:
    training = recipe.training
    order = batches_from(step, training.steps, len(dataset), training.batch_size, training.seed)
    loader: DataLoader = DataLoader(
        dataset,  # type: ignore[arg-type]  # it fetches whole batches, see ImageDataset.__getitems__
        batch_sampler=order,  # type: ignore[arg-type]
        num_workers=recipe.data.num_workers,
        collate_fn=_as_fetched,  # type: ignore[arg-type]
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except ValueError as error:  # a worker process sends its traceback along; its last line is the message
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
    finally:
        if recipe.data.num_workers:  # they ignore SIGTERM, so that nobody else could end them
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the loop needs its workers until it has saved."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def _as_fetched(batch: Batch) -> Batch:
    return batch


def _numbers(result: StepResult, skipped: int, speed: float) -> dict[str, float]:
    numbers = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "images_per_second": round(speed, 1),
    }
    numbers |= {f"loss_{name}": value for name, value in result.router_losses.items()}
    if result.imbalance:
        numbers["imbalance"] = result.imbalance
    if skipped:
        numbers["skipped_images"] = skipped
    return numbers


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The list fills with SIGINT or SIGTERM as they come; a second one acts at once."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        received.append(number)
        for name, handler in previous.items():
            signal.signal(name, handler)

    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            previous[name] = signal.signal(name, note)
    except ValueError:  # not in the main thread: the caller handles its signals
        previous.clear()
    try:
        yield received
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
