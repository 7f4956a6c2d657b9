"""The training loop: from a recipe and a folder to a finished, or cleanly interrupted, run."""

from __future__ import annotations

import errno
import functools
import json
import shutil
import signal
from collections import deque
from collections.abc import Callable
from contextlib import closing, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from ..config import Recipe
from ..data import ImageDataset, Segment, SkippedLog, load_dataset
from ..distributed import barrier, is_main, torchrun_processes
from ..models import Backbone
from ..moe.precision import SLOW_DTYPES
from ..run_folder import DATA, ORIGIN, Resume, RunFolder, write_atomically
from ..run_history import first_recipe, record
from ..storage import checkpoints_in
from .checkpoint import Checkpoints
from .dataloader import batches, images_of_step
from .fit import check_fit, check_same_images, choose_device, settled
from .history import go_on
from .initialization import Origin, check_initialization, initialize_from, merge_adapters
from .log import MetricsLog, Progress, check_trackers
from .parallelize import check_parallel, make_layout, whole_model
from .signals import requests_to_stop, torchrun_is_gone
from .speed import Speedometer
from .step import StepResult, TrainState, make_state, train_step
from .validation import Validation

Log = Callable[[str], None]
Preview = Callable[[Backbone, Path], None]
"""Draws some images of a model into a file; called by all processes, writes on the main one."""
PATIENCE = timedelta(minutes=30)
"""How long a process waits for another before it gives up."""


class Outcome(NamedTuple):
    """How a call of `train` ended."""

    step: int
    """Steps done."""
    interrupted_by: int | None = None
    """The signal that ended it before the last step."""


class NonFiniteError(ArithmeticError):
    """The loss stays not finite; the message names the file that lists the images."""


def train(
    recipe: Recipe,
    output_dir: Path,
    resume: Resume = "auto",
    log: Log = print,
    preview: Preview | None = None,
    origin: Callable[[], Origin] | None = None,
) -> Outcome:
    """Train until the recipe's last step, or until Ctrl-C or SIGTERM, which save a checkpoint first.

    Under torchrun every process calls this.

    Args:
        output_dir: the run folder; if it holds this recipe's run, training goes on from its last good checkpoint.
        resume: changed: also if the run is of another recipe; never: not at all, the folder must be empty.
        log: receives lines of progress. preview: draws pictures every `logging.sample_every` steps.
        origin: reads the model of `init.from_checkpoint`, which a fresh run begins from.

    Raises:
        ValueError: the data, the folder, the processes or the checkpoints do not fit. NonFiniteError: the loss stays
            not finite. OSError: a checkpoint cannot be written, or another process was lost.
    """
    backend = "cpu:gloo,cuda:nccl" if recipe.training.device != "cpu" and torch.cuda.is_available() else "gloo"
    try:
        with torchrun_processes(backend, PATIENCE):
            heard = log if is_main() else _silent
            return Trainer(recipe, RunFolder(output_dir), resume, heard, preview, origin).run()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if "DataLoader worker" in reason:  # killed, or it could not even say why it ended
            lost = f"a process that loads data ended ({reason}); if memory is short, lower data.num_workers"
            raise ChildProcessError(errno.ECHILD, lost, str(output_dir)) from error
        if not _is_lost_process(error):
            raise
        lost = f"another process ended or cannot be reached; see what it says ({reason})"
        raise ConnectionError(errno.ECONNRESET, lost, str(output_dir)) from error


def _silent(line: str) -> None:
    """What processes other than the main one say."""


def _is_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone; gloo has no class of errors for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class _GoBack(Exception):
    """Too many steps in a row were not finite."""


class Trainer:
    """One run on one process, or one process' part in it."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        resume: Resume,
        log: Log,
        preview: Preview | None,
        origin: Callable[[], Origin] | None = None,
    ) -> None:
        self.device = choose_device(recipe.training.device)
        recipe, precision = settled(recipe, run, resume, self.device)
        self.recipe, self.run_folder, self.log, self.preview = recipe, run, log, preview
        check_trackers(recipe.logging)
        check_parallel(recipe)
        check_initialization(recipe)
        self.layout = make_layout(recipe.parallel, self.device)
        self.dataset = load_dataset(recipe.data, "train", recipe.training.seed)
        check_fit(recipe, self.dataset)
        begins = recipe.init.from_checkpoint is not None and not checkpoints_in(run.checkpoints)
        fill = functools.partial(self._begin_from, origin) if begins else None
        self.start_notes: list[str] = []
        texts = self.dataset.texts
        self.fresh_state = functools.partial(
            make_state, recipe, self.device, self.layout, fill, None if texts is None else texts.empty()
        )
        self.state = self.fresh_state()
        self.resume, self.first_batch_size = resume, first_recipe(run, recipe).training.batch_size
        if is_main():
            run.claim(recipe, resume)
        barrier()
        for line in [*self.dataset.notes, *self.start_notes]:
            log(line)
        log(f"computing in {precision}")
        if recipe.training.precision == "bf16" and self.device.type == "cpu" and torch.bfloat16 in SLOW_DTYPES:
            log("warning: this processor multiplies bfloat16 slower than float32; training.precision fp32 is faster")
        self.checkpoints = Checkpoints(run.checkpoints, recipe.training)
        self.pending: deque[StepResult] = deque()
        """Steps whose numbers have not been read."""
        self.owes_checkpoint = False
        """Whether one was due in the midst of bad steps."""
        self.stopping = False

    def run(self) -> Outcome:
        """Train, and write the averaged model."""
        with self.run_folder.reserved(self.log) if is_main() else nullcontext():
            return self._run()

    def _run(self) -> Outcome:
        state, steps = self.state, self.recipe.training.steps
        self._resume()
        with requests_to_stop(self.recipe.training.stop_seconds) as received:
            with self.checkpoints:
                if state.step < steps:
                    self._take_steps(received)
            if self.stopping and state.step < steps:
                self.log(f"interrupted; saved a checkpoint at step {state.step}. Run the same command again to go on.")
                return Outcome(state.step, received[0] if received else signal.SIGTERM)
        publish(self.run_folder, state, self.recipe, self.dataset)
        self.log(f"trained {state.step} steps; the averaged model is in {self.run_folder.model}")
        return Outcome(state.step)

    def _begin_from(self, origin: Callable[[], Origin] | None, model: Backbone) -> None:
        if origin is None:
            raise ValueError(
                f"init.from_checkpoint is {self.recipe.init.from_checkpoint}; pass `origin`, which reads it"
            )
        self.start_notes = initialize_from(model, self.recipe, origin(), self.dataset.metadata())

    def _resume(self) -> None:
        path = self._load_checkpoint()
        if is_main():
            record(self.run_folder, self.recipe, self.state.step, self.resume, self.log)
            fresh = path is None  # nothing was trained on the images that were there
            check_same_images(self.recipe, self.dataset, self.run_folder, "changed" if fresh else self.resume)
        for note in self.checkpoints.notes:
            self.log(note)
        if path is not None:
            done = self.state.step >= self.recipe.training.steps
            self.log(f"{path} is already at the last step" if done else f"resuming from {path}")

    def _load_checkpoint(self) -> Path | None:
        """Fill the state from the newest good checkpoint; None if there is none at all.

        Raises:
            ValueError: there are some, but all are damaged.
        """
        fresh, self.state.segments = self.state.segments, (Segment(0, self.first_batch_size),)
        path, problems = self.checkpoints.load_latest(self.state)
        for problem in problems:
            self.log(f"warning: {problem}")
        if path is None and problems:
            raise ValueError(
                f"no checkpoint in {self.run_folder.checkpoints} can be used; move them away to start anew"
            )
        if path is None:
            self.state.segments = fresh
        else:
            self.checkpoints.notes += go_on(self.state, self.recipe, self.dataset)
        return path

    def _take_steps(self, received: list[int]) -> None:
        recipe, state, run = self.recipe, self.state, self.run_folder
        self.speed = Speedometer(recipe, self.device)
        self.validation = Validation(recipe, self.device) if recipe.logging.validate_every else None
        self.skipped_log = SkippedLog(run.skipped)
        self.skipped = self.skipped_log.count()
        self.metrics = MetricsLog(run, recipe, state.step) if is_main() else None
        try:
            with Progress(state.step, recipe.training, recipe.logging.every, self.log) as self.progress:
                while state.step < recipe.training.steps and not self.stopping:
                    try:
                        self._pass(received)
                    except _GoBack:
                        self._go_back()
        finally:
            if self.metrics is not None:
                self.metrics.close()
        if self.skipped:
            self.log(
                f"warning: images that cannot be read were replaced by others: {self.skipped} (data.on_corrupt skip); "
                f"{run.skipped} names them"
            )

    def _pass(self, received: list[int]) -> None:
        """Steps one after the other, until the last or until asked to stop."""
        state, recipe, orphaned = self.state, self.recipe, torchrun_is_gone()
        with closing(batches(recipe, self.dataset, state.step, state.segments)) as feed:
            for batch in feed:
                self.speed.lap("data")
                self.skipped_log.note(batch.skipped_names)
                if state.step + 1 in state.skipped_steps:
                    state.step += 1
                else:
                    detailed = self._due(recipe.logging.every, state.step + 1)
                    stop = bool(received) or self.checkpoints.failed() or orphaned()
                    self.pending.append(train_step(state, recipe, batch, stop, detailed, self.speed.lap))
                # A step's numbers are read while the next one runs.
                self._settle(keep=0 if self._pauses() else 1)
                if self.stopping:
                    self._settle(keep=0)
                self._at_intervals()
                if self.stopping:
                    return

    def _due(self, every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.recipe.training.steps)

    def _pauses(self) -> bool:
        """Whether something happens after this step that wants all numbers read."""
        training, logging, step = self.recipe.training, self.recipe.logging, self.state.step
        intervals = (training.checkpoint_every, logging.validate_every, logging.sample_every)
        waits = self.owes_checkpoint or self.state.rolled_back
        return waits or any(self._due(every, step) for every in intervals)

    def _settle(self, keep: int) -> None:
        """Read the numbers of all steps but the last few; log them, and see whether they are finite."""
        while len(self.pending) > keep:
            result, bad = self.pending.popleft(), self.state.bad
            self.stopping |= result.stop
            if result.skipped_images:
                self.skipped = self.skipped_log.count()
            if result.finite:
                bad.clear()
                if self.state.rolled_back and result.step > max(self.state.skipped_steps, default=0):
                    # Going back has helped. It may be needed again, and then leads here: no step is lost twice.
                    self.state.rolled_back, self.owes_checkpoint = False, True
            else:
                bad.append(result.step)
                self.log(
                    f"warning: step {result.step} was left out: its loss is {result.loss} and its gradient's norm "
                    f"{result.grad_norm}"
                )
                if len(bad) > self.recipe.training.max_nonfinite_steps:
                    self.pending.clear()
                    raise _GoBack
            if self._due(self.recipe.logging.every, result.step):
                numbers = self.speed.numbers(result) | ({"skipped_images": self.skipped} if self.skipped else {})
                if self.metrics is not None:
                    self.metrics.write(result.step, numbers)
            self.progress.show(result)

    def _at_intervals(self) -> None:
        """Checkpoint, held-out loss and pictures, where they are due."""
        logging, step = self.recipe.logging, self.state.step
        if self.stopping:  # first of all, for time may be short
            self.checkpoints.save(self.state)
        if self.validation is not None and self._due(logging.validate_every, step):
            losses = self.validation.losses(self.state)
            if self.metrics is not None:
                self.metrics.write(step, losses)
            self.log(f"step {step}  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        if self.preview is not None and self._due(logging.sample_every, step):
            self.preview(self.state.ema, self.run_folder.previews / f"step-{step:08d}.png")
        if not self.stopping:
            self._save_if_due()
        self.speed.forget()

    def _save_if_due(self) -> None:
        """In the midst of bad steps there is nothing good to go back to: the checkpoint waits for the next good one."""
        training, state = self.recipe.training, self.state
        self.owes_checkpoint |= self._due(training.checkpoint_every, state.step)
        if self.owes_checkpoint and (not state.bad or state.step == training.steps):
            self.owes_checkpoint = False
            self.checkpoints.save(state)

    def _go_back(self) -> None:
        """Leave the bad steps' batches out, from the last good checkpoint on.

        Raises:
            NonFiniteError: no step has been good since the last time.
        """
        state, bad = self.state, list(self.state.bad)
        skipped_steps = state.skipped_steps | set(bad)
        self.checkpoints.wait()
        if state.rolled_back:
            message = self._name_images(bad)
            self.log(f"stopped: {message}")
            raise NonFiniteError(message)
        if self._load_checkpoint() is None:
            state.become(self.fresh_state)
        state.skipped_steps, state.bad, state.rolled_back, self.owes_checkpoint = skipped_steps, [], True, False
        self.checkpoints.save(state)  # also a run that is resumed leaves them out
        if self.metrics is not None:
            self.metrics.go_back(state.step)
        self.log(f"warning: went back to step {state.step}; the batches of steps {bad[0]} to {bad[-1]} are left out")

    def _name_images(self, bad: list[int]) -> str:
        path = self.run_folder.bad_batches
        if is_main():
            sizes = self.state.segments
            images = {str(step): images_of_step(self.recipe, self.dataset, step, sizes) for step in bad}
            write_atomically(path, json.dumps({"steps": bad, "training_images": images}) + "\n")
        return (
            f"the loss or gradient of steps {bad[0]} to {bad[-1]} is not finite, also after going back; {path} "
            "lists their images. Take another learning rate or data (--resume changed), or leave more steps out by "
            "training.max_nonfinite_steps"
        )


def publish(run: RunFolder, state: TrainState, recipe: Recipe, dataset: ImageDataset) -> None:
    """Write the averaged models, each whole or not at all, with notes of their origin and of their data."""
    averages = {recipe.training.ema_decay: state.ema, **state.extra_emas}
    for decay, ema in averages.items():
        target = run.model if ema is state.ema else run.average(decay)
        whole = whole_model(ema, recipe)
        if whole is None:
            continue
        whole = merge_adapters(whole, recipe.init, run.lora if ema is state.ema else None)
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        origin = {"training_steps": state.step, "ema_decay": decay}
        _save_whole(whole, partial, {ORIGIN: origin, DATA: dataset.metadata()})
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    barrier()


def _save_whole(model: Backbone, folder: Path, notes: dict[str, Any]) -> None:
    """Raises OSError, which names the folder and leaves nothing of it, if the disk is full."""
    try:
        model.save_pretrained(folder)
        for name, note in notes.items():
            (folder / name).write_text(json.dumps(note) + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = f"cannot write the model ({getattr(error, 'strerror', None) or error})"
        raise OSError(getattr(error, "errno", None) or errno.EIO, reason, str(folder)) from error
