"""The ordinary feed-forward network: shared experts, and the dense blocks between the mixtures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .activation import Activation, activated
from .feed_forward_autograd import feed_forward
from .precision import compute_dtype


class FeedForward(nn.Module):
    """Two linear layers around tanh-GELU or SiLU, or SwiGLU with a third for the gate.

    Args:
        dim: token width D. hidden_dim: width F of the hidden layer. activation: "gelu" (tanh form), "silu" or "swiglu".
        bias: whether the linear layers have biases. dropout: of the hidden layer, in training.
    """

    recompute = False
    """Whether the backward pass makes the hidden layer again, so that the input alone is kept."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias) if activation == "swiglu" else None
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        for linear in (module for module in self.children() if isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            if bias:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, use_reentrant=False, preserve_rng_state=bool(self.dropout.p))
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The network itself."""
        x = x.to(compute_dtype(x))  # kept so
        first = (self.up_proj,) if self.gate_proj is None else (self.gate_proj, self.up_proj)
        if self.dropout.p and self.training:
            return self.down_proj(self.dropout(activated(self.activation, *(linear(x) for linear in first))))
        return feed_forward(x, first, self.down_proj, self.activation)
