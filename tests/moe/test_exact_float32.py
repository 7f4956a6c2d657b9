"""Routers choose by float32 matmuls, whatever rounding the process allows for others."""

from collections.abc import Callable

import pytest
import torch
from router_context import with_context
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_moe.moe import MoEFeedForward, RouterConfig, precision
from diffusion_moe.routing_rules import RULES

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
WITH_WEIGHTS = [kind for kind, rule in RULES.items() if rule.parameter_shapes(RouterConfig(kind, 4), 16)]
ALLOWED = {
    "by set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("medium"),
    "by allow_tf32": lambda: setattr(CUDA, "allow_tf32", True),
    "by fp32_precision": lambda: setattr(CUDA, "fp32_precision", "tf32"),
    "for everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision = CPU.fp32_precision = "none"


class MatmulPrecisions(TorchDispatchMode):
    """What matmuls are allowed at the time they run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if any(name in str(operator) for name in (".mm.", ".addmm.", ".bmm.", "aten.linear")):
            self.seen.append((CUDA.fp32_precision, CPU.fp32_precision))
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize("way", ALLOWED)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_routers_compute_in_float32(kind, training, way):
    config = RouterConfig(kind, num_experts=4, top_k=2, capacity=2.0)
    layer = with_context(MoEFeedForward(16, 8, config)).train(training)
    ALLOWED[way]()
    before = CUDA.fp32_precision, CPU.fp32_precision
    assert before[0] == "tf32"
    with MatmulPrecisions() as matmuls:
        layer.router(torch.randn(2, 4, 16))
    assert len(matmuls.seen) >= (3 if kind == "diffmoe" else 1)
    assert set(matmuls.seen) <= {("ieee", "ieee"), ("ieee", "none")}
    assert (CUDA.fp32_precision, CPU.fp32_precision) == before


def test_a_general_setting_still_holds_afterwards():
    """What was inherited is inherited again."""
    torch.backends.fp32_precision = "tf32"
    with precision.exact_float32():
        pass
    torch.backends.fp32_precision = "ieee"
    assert CUDA.fp32_precision == "ieee"


def test_convolutions_too_where_asked_for():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    with precision.exact_float32():
        assert conv.fp32_precision == before == "tf32"  # torch's default
    torch.backends.fp32_precision = "tf32"
    with precision.exact_float32(convolutions=True):
        assert conv.fp32_precision == "ieee"
    torch.backends.fp32_precision = "none"
    assert conv.fp32_precision == before


def test_compiled_routers_call_the_operator_that_turns_it_off(monkeypatch):
    graphs, allowed, linear = [], [], torch.nn.functional.linear

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph.code)
        return graph

    layer = MoEFeedForward(16, 8, RouterConfig("diffmoe", num_experts=4, capacity=2.0)).train()
    torch._dynamo.reset()
    torch.compile(layer.router, backend=keep, fullgraph=True)(torch.randn(2, 4, 16))
    (code,) = graphs
    assert code.count("diffusion_moe.exact_linear") == 3  # scores, and the two layers of the predictor

    def recorded(*arguments):
        allowed.append(CUDA.fp32_precision)
        return linear(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    CUDA.fp32_precision = "tf32"
    precision._exact_linear(torch.randn(3, 4), torch.randn(2, 4), torch.randn(2))
    assert allowed == ["ieee"] and CUDA.fp32_precision == "tf32"


@pytest.mark.parametrize("bias", [True, False])
def test_the_operator_is_a_linear_layer_with_all_gradients(bias):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, weight, torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None)
    torch.testing.assert_close(precision._exact_linear(*inputs), torch.nn.functional.linear(*inputs))
    assert torch.autograd.gradcheck(precision._exact_linear, inputs)
    torch.library.opcheck(precision._exact_linear, inputs)
