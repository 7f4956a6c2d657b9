"""The loss on held-out images, with noise and times that never change: comparable over steps, weights and runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import Recipe
from ..data import load_dataset
from ..diffusion.times import sample_steps, sample_times
from ..distributed import all_reduce_sum, rank, world_size
from ..models import Backbone
from ..randomness import derive_seed, normal
from .step import TrainState, loss_at


class Validation:
    """Held-out losses of the weights and of each average, in inference mode: DiffMoE routes by its thresholds.

    Image i has its noise and its time from (seed, i). Of several processes each takes a share; as many images are left
    over as cannot be shared evenly.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        """Raises ValueError where there are no held-out images."""
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
        """`val_loss` of the weights and `val_loss_ema_DECAY` of each average."""
        training = self.recipe.training
        averages = {f"val_loss_ema_{training.ema_decay}": state.ema}
        averages |= {f"val_loss_ema_{decay}": ema for decay, ema in state.extra_emas.items()}
        state.model.eval()
        try:
            return {name: self._loss(model) for name, model in {"val_loss": state.model, **averages}.items()}
        finally:
            state.model.train()

    @torch.no_grad()
    def _loss(self, model: Backbone) -> float:
        training, total = self.recipe.training, torch.zeros(2, dtype=torch.float64, device=self.device)
        size = max(1, training.batch_size // (training.accumulation * world_size()))
        for places in self._places(size):
            loss_B = self._losses_of(model, places)
            total += torch.stack((loss_B.double().sum(), total.new_tensor(len(places))))
        loss, count = all_reduce_sum(total).tolist()
        return loss / count

    def _places(self, size: int) -> Iterator[Tensor]:
        """Held-out images of this process in batches, each of one bucket."""
        places, buckets = torch.arange(self.first, self.first + self.count), self.dataset.buckets
        if buckets is None:
            yield from places.split(size)
            return
        of_place = torch.from_numpy(buckets)[places]
        for bucket in of_place.unique():
            yield from places[of_place == bucket].split(size)

    def _losses_of(self, model: Backbone, places: Tensor) -> Tensor:
        recipe, seed = self.recipe, derive_seed(self.recipe.training.seed, "validation", 0)
        batch, samples = self.dataset.read(places.tolist()), places.to(self.device)
        images = batch.images.to(self.device)
        labels = batch.labels.to(self.device) if recipe.model.num_classes else None
        text = self.dataset.first_texts(places) if recipe.model.text_dim else None
        text = None if text is None else text.to(self.device)
        noise = normal(seed, "noise", 0, samples, tuple(images.shape[1:]))
        ddpm = recipe.model.process == "ddpm"
        t = sample_steps(seed, 0, samples) if ddpm else sample_times(recipe.diffusion, seed, 0, samples)
        return loss_at(model, recipe, images, labels, noise, t, text).diffusion_B
