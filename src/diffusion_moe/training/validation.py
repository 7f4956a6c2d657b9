"""Loss on held-out images with constant noise and times: comparable over steps, weights and runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import Recipe
from ..data import load_dataset
from ..diffusion.times import sample_steps, sample_times
from ..distributed import all_reduce_sum, rank, to_device, world_size
from ..models import Backbone
from ..randomness import derive_seed, normal
from .loss import loss_at
from .state import TrainState


class Validation:
    """Held-out losses of the weights and of each EMA, in inference mode: DiffMoE routes by its thresholds.

    Noise and time of image i are functions of (seed, i). The images are divided evenly over the processes; the rest is
    not used.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        """Load the held-out images.

        Raises:
            ValueError: there are none.
        """
        self.recipe, self.device = recipe, device
        self.dataset = load_dataset(recipe.data, "test", recipe.training.seed)
        world = world_size()
        self.count = min(recipe.logging.validate_images, len(self.dataset)) // world
        self.first = rank() * self.count
        if not self.count:
            raise ValueError(
                f"logging.validate_every is {recipe.logging.validate_every}, but there are {len(self.dataset)} "
                f"held-out images for {world} processes; raise data.test_fraction or set it to 0"
            )

    def losses(self, state: TrainState) -> dict[str, float]:
        """`val_loss` of the weights and `val_loss_ema_DECAY` of each EMA."""
        emas = {self.recipe.training.ema_decay: state.ema, **state.extra_emas}
        models = {"val_loss": state.model} | {f"val_loss_ema_{decay}": ema for decay, ema in emas.items()}
        state.model.eval()
        try:
            return {name: self._loss(model) for name, model in models.items()}
        finally:
            state.model.train()

    @torch.no_grad()
    def _loss(self, model: Backbone) -> float:
        training, total = self.recipe.training, torch.zeros((), dtype=torch.float64, device=self.device)
        size = max(1, training.batch_size // (training.accumulation * world_size()))
        for indices in self._batches(size):
            total += self._losses_of(model, indices).double().sum()
        return float(all_reduce_sum(total)) / (self.count * world_size())

    def _batches(self, size: int) -> Iterator[Tensor]:
        """Indices of this process' held-out images in batches, each of one bucket."""
        indices, buckets = torch.arange(self.first, self.first + self.count), self.dataset.buckets
        if buckets is None:
            yield from indices.split(size)
            return
        bucket_of = torch.from_numpy(buckets)[indices]
        for bucket in bucket_of.unique():
            yield from indices[bucket_of == bucket].split(size)

    def _losses_of(self, model: Backbone, indices: Tensor) -> Tensor:
        recipe, seed = self.recipe, derive_seed(self.recipe.training.seed, "validation", 0)
        batch, samples = self.dataset.read(indices.tolist()), to_device(indices, self.device)
        images = to_device(batch.images, self.device)
        labels = to_device(batch.labels, self.device) if recipe.model.num_classes else None
        text = self.dataset.first_texts(indices) if recipe.model.text_dim else None
        text = None if text is None else text.to(self.device)
        noise = normal(seed, "noise", 0, samples, tuple(images.shape[1:]))
        ddpm = recipe.model.process == "ddpm"
        t = sample_steps(seed, 0, samples) if ddpm else sample_times(recipe.diffusion, seed, 0, samples)
        return loss_at(model, recipe, images, labels, noise, t, text).diffusion_B
