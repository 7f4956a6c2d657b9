"""The training loop: from a recipe and a folder to a finished, or cleanly interrupted, run."""

from __future__ import annotations

import errno
import signal
from collections import deque
from collections.abc import Callable
from contextlib import closing, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..config import Recipe
from ..data import Segment, SkippedLog, load_dataset
from ..data.workers import start_fork_server
from ..distributed import barrier, choose_device, is_main, torchrun_processes, world_size
from ..log import Log
from ..models import Backbone
from ..moe.precision import SLOW_DTYPES
from ..run_folder import Resume, RunFolder
from ..run_history import first_recipe, record
from ..storage import checkpoints_in
from .checkpoint import Checkpoints
from .dataloader import batches
from .deterministic import deterministic_algorithms
from .export import export_models
from .fit import check_fit, check_same_images, resolve_precision
from .history import resume_with
from .initialization import Pretrained, initialize_from
from .layout_checks import check_adapters, check_parallel
from .lost_process import ending_with_others
from .metrics_log import MetricsLog, ProgressBar, check_trackers
from .nonfinite import NonFiniteError, NonFiniteSteps, RollBack, report_images
from .parallelize import make_meshes
from .signals import requests_to_stop, torchrun_has_ended
from .snapshots import Snapshots
from .speed import Speedometer
from .state import TrainState, make_state
from .step import StepResult, train_step
from .validation import Validation

Preview = Callable[[Backbone, Path], None]
"""Saves sampled images of a model in a file; all processes call it, the main one writes."""
PATIENCE = timedelta(minutes=30)
"""Longest wait of a process for another before it ends."""


class TrainingOutcome(NamedTuple):
    """The end of a call of `train`."""

    step: int
    """Steps done."""
    interrupted_by: int | None = None
    """The signal that ended it before the last step."""


def train(
    recipe: Recipe,
    output_dir: Path,
    resume: Resume = "auto",
    log: Log = print,
    preview: Preview | None = None,
    pretrained: Callable[[], Pretrained] | None = None,
) -> TrainingOutcome:
    """Train until the recipe's last step, or until Ctrl-C or SIGTERM, which save a checkpoint first.

    Under torchrun every process calls this.

    Args:
        output_dir: the run folder; if it holds this recipe's run, training resumes from its last good checkpoint.
        resume: changed: resume also if the run has another recipe; never: the folder must be empty.
        log: receives lines of progress.
        preview: saves sampled images every `logging.sample_every` steps.
        pretrained: reads the model of `init.from_checkpoint`, from which a new run starts.

    Raises:
        ValueError: the data, the folder, the processes or the checkpoints do not fit.
        NonFiniteError: the loss stays non-finite.
        OSError: a checkpoint cannot be written, or another process was lost.
    """
    on_gpu = recipe.training.device != "cpu" and torch.cuda.is_available()
    deterministic = deterministic_algorithms(on_gpu) if recipe.training.deterministic else nullcontext()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if recipe.data.num_workers:
        start_fork_server()  # early, so that it imports the library meanwhile
    try:
        with deterministic, torchrun_processes(backend, PATIENCE), ending_with_others():
            log = log if is_main() else lambda line: None
            return Trainer(recipe, RunFolder(output_dir), resume, log, preview, pretrained).run()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if "DataLoader worker" in reason:  # killed, or it ended without a reason
            lost = f"a data loading process ended ({reason}); if memory is short, lower data.num_workers"
            raise ChildProcessError(errno.ECHILD, lost, str(output_dir)) from error
        if not _is_lost_process(error):
            raise
        lost = f"another process ended or cannot be reached; see its messages ({reason})"
        raise ConnectionError(errno.ECONNRESET, lost, str(output_dir)) from error


def _is_lost_process(error: RuntimeError) -> bool:
    """True if a collective failed because another process ended; gloo has no class for such errors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Trainer:
    """One run on one process, or one process' part of it."""

    def __init__(
        self,
        recipe: Recipe,
        run_folder: RunFolder,
        resume: Resume,
        log: Log,
        preview: Preview | None = None,
        pretrained: Callable[[], Pretrained] | None = None,
    ) -> None:
        self.run_folder, self.resume, self.log = run_folder, resume, log
        self.preview, self.pretrained = preview, pretrained
        self.device = choose_device(recipe.training.device, "training.device")
        self.recipe, precision = resolve_precision(recipe, run_folder, resume, self.device)
        recipe = self.recipe
        check_trackers(recipe.logging)
        check_parallel(recipe, world_size())
        check_adapters(recipe, world_size())
        self.meshes = make_meshes(recipe.parallel, self.device)
        self.dataset = load_dataset(recipe.data, "train", recipe.training.seed)
        check_fit(recipe, self.dataset)
        self.init_notes: list[str] = []
        self.state = self.fresh_state()
        self.nonfinite = NonFiniteSteps(self.state, recipe.training.max_nonfinite_steps)
        self.first_batch_size = first_recipe(run_folder, recipe).training.batch_size
        if is_main():
            run_folder.claim(recipe, resume)
        barrier()
        for line in [*self.dataset.notes, *self.init_notes, f"computing in {precision}"]:
            log(line)
        if recipe.training.precision == "bf16" and self.device.type == "cpu" and torch.bfloat16 in SLOW_DTYPES:
            log("warning: this processor multiplies bfloat16 slower than float32; training.precision fp32 is faster")
        self.checkpoints = Checkpoints(run_folder.checkpoints, recipe.training)
        self.snapshots = Snapshots(run_folder.snapshots) if recipe.training.posthoc_ema_stds else None
        self.validation = Validation(recipe, self.device) if recipe.logging.validate_every else None
        self.metrics = MetricsLog(run_folder, recipe)
        self.progress = ProgressBar(recipe.training, recipe.logging.every, log)
        self.speed = Speedometer(recipe, self.device)
        self.skipped_log = SkippedLog(run_folder.skipped)
        self.skipped_images = self.skipped_log.count()
        self.pending: deque[StepResult] = deque()
        """Results of steps that have not been read."""
        self.stopping = False
        """True once a process was asked to stop."""

    def run(self) -> TrainingOutcome:
        """Train, and export the EMA models."""
        with self.run_folder.reserved(self.log) if is_main() else nullcontext():
            return self._run()

    def _run(self) -> TrainingOutcome:
        state, steps = self.state, self.recipe.training.steps
        self._resume()
        with requests_to_stop(self.recipe.training.stop_seconds) as received:
            with self.checkpoints, self.snapshots or nullcontext():
                if state.step < steps:
                    self._train(received)
            if self.stopping and state.step < steps:
                self.log(f"interrupted; saved a checkpoint at step {state.step}. Run the same command again to resume.")
                return TrainingOutcome(state.step, received[0] if received else signal.SIGTERM)
        export_models(self.run_folder, state, self.recipe, self.dataset)
        self.log(f"trained {state.step} steps; the EMA model is in {self.run_folder.model}")
        return TrainingOutcome(state.step)

    def fresh_state(self) -> TrainState:
        """The state before the first step; a roll-back without a checkpoint returns to it."""
        recipe, texts = self.recipe, self.dataset.texts
        starts_elsewhere = recipe.init.from_checkpoint is not None and not checkpoints_in(self.run_folder.checkpoints)
        return make_state(
            recipe,
            self.device,
            self.meshes,
            self._initialize if starts_elsewhere else None,
            None if texts is None else texts.empty(),
        )

    def _initialize(self, model: Backbone) -> None:
        if self.pretrained is None:
            raise ValueError(
                f"init.from_checkpoint is {self.recipe.init.from_checkpoint}; pass `pretrained`, which reads it"
            )
        self.init_notes = initialize_from(model, self.recipe, self.pretrained(), self.dataset.metadata())

    def _resume(self) -> None:
        path, notes = self._load_checkpoint()
        if is_main():
            record(self.run_folder, self.recipe, self.state.step, self.resume, self.log)
            fresh = path is None  # no step was trained on the images that were there
            check_same_images(self.recipe, self.dataset, self.run_folder, "changed" if fresh else self.resume)
        for note in notes:
            self.log(note)
        if path is not None:
            done = self.state.step >= self.recipe.training.steps
            self.log(f"{path} is already at the last step" if done else f"resuming from {path}")

    def _load_checkpoint(self) -> tuple[Path | None, list[str]]:
        """Fill the state from the newest good checkpoint; its path, or None if there is none, and lines for the user.

        Raises:
            ValueError: there are some, but all are damaged.
        """
        fresh, self.state.segments = self.state.segments, (Segment(0, self.first_batch_size),)
        path, notes, problems = self.checkpoints.load_latest(self.state)
        for problem in problems:
            self.log(f"warning: {problem}")
        if path is None and problems:
            raise ValueError(
                f"no checkpoint in {self.run_folder.checkpoints} can be used; move them away to start from scratch"
            )
        if path is None or notes is None:
            self.state.segments = fresh
            return None, []
        return path, notes + resume_with(self.state, self.recipe, self.dataset)

    def _train(self, received: list[int]) -> None:
        """Take steps until the last, or until asked to stop; after a roll-back from the step it led to."""
        with closing(self.metrics), closing(self.progress):
            self.metrics.open(self.state.step)
            self.progress.open(self.state.step)
            self.speed.restart()
            while self.state.step < self.recipe.training.steps and not self.stopping:
                if self.snapshots is not None:
                    self.snapshots.forget_after(self.state.step)
                try:
                    self._take_steps(received)
                except RollBack:
                    self._roll_back()
        if self.skipped_images:
            self.log(
                f"warning: unreadable images were replaced by others: {self.skipped_images} (data.on_corrupt skip); "
                f"{self.run_folder.skipped} lists them"
            )

    def _take_steps(self, received: list[int]) -> None:
        state, recipe, orphaned = self.state, self.recipe, torchrun_has_ended()
        with closing(batches(recipe, self.dataset, state.step, state.segments)) as dataloader:
            for batch in dataloader:
                self.speed.lap("data")
                self.skipped_log.note(batch.skipped_names)
                if state.step + 1 in state.skipped_steps:
                    state.step += 1
                else:
                    detailed = self._due(recipe.logging.every, state.step + 1)
                    stop = bool(received) or self.checkpoints.failed() or orphaned()
                    self.pending.append(train_step(state, recipe, batch, stop, detailed, self.speed.lap))
                # A step's result is read while the next step runs, unless something depends on it.
                self._read_results(keep=0 if self._needs_result() else 1)
                if self.stopping:
                    self._read_results(keep=0)
                self._at_intervals()
                if self.stopping:
                    return

    def _due(self, every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.recipe.training.steps)

    def _needs_result(self) -> bool:
        """True if what follows this step depends on its result."""
        training, logging = self.recipe.training, self.recipe.logging
        intervals = (training.checkpoint_every, logging.validate_every, logging.sample_every)
        return self.nonfinite.undecided or any(self._due(every, self.state.step) for every in intervals)

    def _read_results(self, keep: int) -> None:
        """Read and log the results of all steps but the last `keep`."""
        while len(self.pending) > keep:
            result = self.pending.popleft()
            self.stopping |= result.stop
            if result.skipped_images:
                self.skipped_images = self.skipped_log.count()
            if not result.finite:
                self.log(
                    f"warning: step {result.step} was skipped: its loss is {result.loss} and its gradient norm "
                    f"{result.grad_norm}"
                )
            self.nonfinite.note(result.step, result.finite)
            if self._due(self.recipe.logging.every, result.step):
                metrics = self.speed.metrics(result)
                if self.skipped_images:
                    metrics["skipped_images"] = self.skipped_images
                self.metrics.write(result.step, metrics)
            self.progress.show(result)

    def _at_intervals(self) -> None:
        """Save a checkpoint, compute the validation loss and sample images where they are due."""
        training, logging, step = self.recipe.training, self.recipe.logging, self.state.step
        if self.snapshots is not None and self._due(training.posthoc_ema_every, step):
            self.snapshots.save_state(self.state)
        if self.stopping:  # before all else, because time may be short
            self._save_checkpoint()
        if self.validation is not None and self._due(logging.validate_every, step):
            losses = self.validation.losses(self.state)
            self.metrics.write(step, losses)
            self.log(f"step {step}  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        if self.preview is not None and self._due(logging.sample_every, step):
            self.preview(self.state.ema, self.run_folder.previews / f"step-{step:08d}.png")
        due = self._due(training.checkpoint_every, step)
        if not self.stopping and self.nonfinite.should_save(due, last=step == training.steps):
            self._save_checkpoint()
        self.speed.restart()

    def _save_checkpoint(self) -> None:
        """Begin to write a checkpoint, once the snapshots before it are written: none may be missing after it."""
        if self.snapshots is not None:
            self.snapshots.wait()
        self.checkpoints.save_state(self.state)

    def _roll_back(self) -> None:
        """Load the last checkpoint; the batches of the non-finite steps are skipped from there on.

        Raises:
            NonFiniteError: rolling back has not helped before.
        """
        self.pending.clear()
        self.checkpoints.wait()
        steps = self.nonfinite.roll_back(self._load_checkpoint_or_restart)
        if steps is None:
            message = report_images(
                self.run_folder, self.recipe, self.dataset, self.state.nonfinite_steps, self.state.segments
            )
            self.log(f"stopped: {message}")
            raise NonFiniteError(message)
        self._save_checkpoint()  # a run that is resumed from here skips them too
        self.metrics.open(self.state.step)
        skipped = f"the batches of steps {steps[0]} to {steps[-1]} are skipped"
        self.log(f"warning: rolled back to step {self.state.step}; {skipped}")

    def _load_checkpoint_or_restart(self) -> None:
        if self._load_checkpoint()[0] is None:
            self.state.replace_with(self.fresh_state)
