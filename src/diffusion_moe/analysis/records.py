"""Recording routers at work, by hooks on their modules: the model is not changed.

Shape suffixes: L MoE layers, B images, E experts, A assignments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..moe import Router, Routing, routers_of


class RoutingRecord:
    """Assignments of every forward pass while recording."""

    def __init__(self, layers: int) -> None:
        self.layers: list[list[Tensor]] = [[] for _ in range(layers)]
        """For each MoE layer, one (B, E) tensor a forward pass: tokens of each image that each expert served, int64."""

    def counts_LBE(self) -> Tensor:
        """The passes since the last `clear`, summed: (L, B, E)."""
        return torch.stack([torch.stack(passes).sum(0) for passes in self.layers])

    def clear(self) -> None:
        """Forget what was recorded."""
        for passes in self.layers:
            passes.clear()


def image_counts(routing: Routing, tokens_per_image: int, num_images: int) -> Tensor:
    """Tokens of each image that each expert served, int64, (B, E)."""
    E = len(routing.offsets_E)
    key_A = routing.token_A // tokens_per_image * E + routing.expert_A()
    return (
        torch.zeros(num_images * E, dtype=torch.long, device=key_A.device)
        .index_add(0, key_A, torch.ones_like(key_A))
        .view(num_images, E)
    )


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the routers of `model` while inside.

    Example:
        >>> with record_routing(model) as record:
        ...     model(x, t, labels)
        >>> record.counts_LBE()
    """
    routers = routers_of(model)
    record = RoutingRecord(len(routers))

    def hook_for(layer: int):  # type: ignore[no-untyped-def]
        def hook(router: Router, inputs: tuple[Tensor], routing: Routing) -> None:
            B, N = inputs[0].shape[:2]
            record.layers[layer].append(image_counts(routing, N, B).detach())

        return hook

    handles = [router.register_forward_hook(hook_for(layer)) for layer, router in enumerate(routers)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
