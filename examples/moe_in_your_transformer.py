"""An MoE layer in your own transformer: `MoEFeedForward` in place of the MLP. Needs torch alone, runs in seconds.

python examples/moe_in_your_transformer.py
"""

import torch
from torch import Tensor, nn

from diffusion_moe.moe import MoEFeedForward, RouterConfig, RoutingReport, routers_of, update_routing_state


class Block(nn.Module):
    """A pre-norm transformer block; only the two marked lines are changed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads=4, batch_first=True)
        rule = RouterConfig("dsmoe", num_experts=8, top_k=2, balance="bias", balance_rate=0.01)
        self.mlp = MoEFeedForward(dim, expert_dim=dim, router=rule, shared="swiglu")  # was: MLP(dim, 4 * dim)

    def forward(self, x: Tensor) -> tuple[Tensor, RoutingReport]:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y, report = self.mlp(self.norm2(x))  # was: y = self.mlp(self.norm2(x))
        return x + y, report


def main() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(dim=32) for _ in range(2))
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=3e-3)
    data = torch.randn(16, 24, 32)  # 16 sequences of 24 tokens of width 32
    target = data.roll(1, dims=1).tanh()

    for step in range(41):
        x, reports = data, []
        for block in blocks:
            x, report = block(x)
            reports.append(report)

        # 1. Some routing rules have their own losses (this one has none; try balance="aux").
        loss = nn.functional.mse_loss(x, target) + sum(sum(report.losses.values()) for report in reports)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # 2. A forward pass changes no router; the state of all routers is updated here, once per step.
        update_routing_state(routers_of(blocks), reports)

        if step % 10 == 0:
            print(f"step {step:2d}  loss {loss.item():.3f}  tokens per expert {reports[0].counts_E.tolist()}")


if __name__ == "__main__":
    main()
