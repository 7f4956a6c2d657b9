"""One of several gloo processes: compares sharded experts, output and every gradient, with the loop over all experts.

Shape suffixes: T tokens of this process, D width, E experts, K experts a token, L experts held here.
"""

import itertools
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from diffusion_moe.distributed import rank, torchrun_processes, world_size
from diffusion_moe.moe import GroupedExperts
from diffusion_moe.moe.experts import experts_loop
from diffusion_moe.moe.parallel import all_gather_rows
from diffusion_moe.moe.precision import use_cpu_matmul
from diffusion_moe.moe.routing import route_by_expert, route_by_mask, route_by_token

E, D, F = 8, 12, 6
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Of a difference's norm, relative to the norm: sums are taken in another order."""
CASES = (("swiglu", False, False), ("gelu", True, False), ("swiglu", True, True))
"""Activation, whether there are biases, whether the first projection is recomputed."""


def token_choice(choose):
    """A routing by what `choose` says of (T, K) random numbers in [0, 1)."""

    def route(T, generator):
        expert_TK = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(T)]).view(T, 2)
        return route_by_token(choose(expert_TK), torch.rand(T, 2, generator=generator).requires_grad_(), E)

    return route


def by_mask(share):
    """Every token served by each expert with this probability."""

    def route(T, generator):
        weight_TE = torch.rand(T, E, generator=generator).requires_grad_()
        return route_by_mask(torch.rand(T, E, generator=generator) < share(rank()), weight_TE)

    return route


def expert_choice(T, generator):
    """Every expert takes two tokens."""
    token_EC = torch.stack([torch.randperm(T, generator=generator)[:2] for _ in range(E)])
    return route_by_expert(token_EC, torch.rand(E, 2, generator=generator).requires_grad_())


def first_of_each(expert_TK):
    """Only experts 0 and E / world: the others are idle."""
    return (expert_TK % 2) * (E // world_size())


ROUTINGS = {
    "any": token_choice(lambda expert_TK: expert_TK),
    "idle experts": token_choice(first_of_each),
    "all to the first process": token_choice(lambda expert_TK: expert_TK % (E // world_size())),
    "all to the next process": token_choice(
        lambda expert_TK: (expert_TK % (E // world_size()) + (rank() + 1) * (E // world_size())) % E
    ),
    "uneven": by_mask(lambda number: 0.1 + 0.3 * number),
    "nothing from the first process": by_mask(lambda number: min(number, 1) * 0.5),
    "nothing at all": by_mask(lambda number: 0),
    "expert choice": expert_choice,
}


def held(experts):
    """A copy of some experts of which each process holds its part."""
    part = GroupedExperts(D, F, E, experts.activation, experts.b_in is not None).to(experts.w_in.dtype)
    for name, weight in experts.named_parameters():
        setattr(part, name, nn.Parameter(weight.detach().chunk(world_size())[rank()].clone()))
    part.group = dist.group.WORLD
    return part


def compare(name, activation, bias, recompute, dtype):
    """Raises AssertionError where a tensor is not the loop's."""
    torch.manual_seed(0)
    experts = GroupedExperts(D, F, E, activation, bias).to(dtype)
    if bias:
        nn.init.normal_(experts.b_in), nn.init.normal_(experts.b_out)
    generator = torch.Generator().manual_seed(1 + rank())
    T = 5 + 4 * rank()
    x_TD, g_TD = torch.randn(2, T, D, generator=generator).to(dtype)
    routing = ROUTINGS[name](T, generator)
    weight_A = routing.weight_A.detach().to(dtype)
    found, expected = [], []
    for module, call, into in ((experts, experts_loop, expected), (held(experts), GroupedExperts.forward, found)):
        module.recompute = recompute
        x, weight = x_TD.clone().requires_grad_(), weight_A.clone().requires_grad_()
        out_TD = call(module, x, routing._replace(weight_A=weight))
        (out_TD * g_TD).sum().backward()
        into += [out_TD.detach(), x.grad, weight.grad]
        for parameter in module.parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if module is experts:  # an expert sees the tokens of all processes
                dist.all_reduce(grad)
                grad = grad.chunk(world_size())[rank()]
            else:
                assert parameter.grad is not None  # also an idle one has a gradient: of zeros
            into.append(grad)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        error, size = (a - b).norm().item(), b.norm().item()
        assert error <= TOLERANCE[dtype] * size, f"{error} of {size}"


def compare_in_bf16(choice):
    """Under autocast: dispatched rows are rounded like local ones; with matmuls in float32 none are."""
    torch.manual_seed(0)
    experts = GroupedExperts(D, F, E)
    generator = torch.Generator().manual_seed(1 + rank())
    x_TD = torch.randn(16, D, generator=generator)
    routing = ROUTINGS["any"](16, generator)
    with torch.autocast("cpu", torch.bfloat16), use_cpu_matmul(choice):
        expected, found = experts(x_TD, routing), held(experts)(x_TD, routing)
    assert found.dtype == x_TD.dtype
    # What is kept is rounded to bfloat16 in both ways, now and then one unit apart.
    bound = {"low_precision": 2**-7, "float32": 2**-10}[choice]
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def check_that_no_graph_is_sent():
    """A graph holds the group: in the hands of the group's own threads it would keep them beyond the group's end."""
    exchanged, real = [], dist.all_to_all_single

    def watch(received, sent, *args, **kwargs):
        exchanged.extend((received, sent))
        return real(received, sent, *args, **kwargs)

    generator = torch.Generator().manual_seed(rank())
    x_TD = torch.randn(16, D, generator=generator).requires_grad_()
    with mock.patch.object(dist, "all_to_all_single", watch):
        out_TD = held(GroupedExperts(D, F, E))(x_TD * 2, ROUTINGS["any"](16, generator))
        assert out_TD.requires_grad and len(exchanged) == 8  # numbers of rows, rows, weights, answers
        assert not any(tensor.requires_grad for tensor in exchanged)


def check_that_rows_are_gathered_at_once():
    """Into one tensor: a list of tensors would be copied into it."""
    rows_TE = torch.full((3, 2), float(rank()))
    with mock.patch.object(dist, "all_gather", side_effect=AssertionError("gathered into a list")):
        gathered = all_gather_rows(rows_TE, dist.group.WORLD)
    assert torch.equal(gathered, torch.arange(float(world_size())).repeat_interleave(3)[:, None].expand(-1, 2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torchrun_processes():
        check_that_rows_are_gathered_at_once()
        check_that_no_graph_is_sent()
        for name, case, dtype in itertools.product(ROUTINGS, CASES, TOLERANCE):
            if dtype == torch.float64 and case != CASES[-1]:
                continue
            try:
                compare(name, *case, dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}, {case}, {dtype}") from error
        for choice in ("low_precision", "float32"):
            compare_in_bf16(choice)
