"""What routers look at beside tokens, for tests of any rule."""

import torch

from diffusion_moe.moe import RoutingContext

TIMES = 64


def with_context(module):
    """The router, or the layer with its router, called with fixed times of the images if its rule looks at them."""
    router = getattr(module, "router", module)
    if not router.sees:
        return module
    embedding = torch.randn(TIMES, router.weight.shape[1], generator=torch.Generator().manual_seed(5))

    def give(router, args, kwargs):
        x_BND = args[0]
        return (x_BND, RoutingContext(time_embedding_BD=embedding[: len(x_BND)])), {}

    router.register_forward_pre_hook(give, with_kwargs=True)
    return module
