"""The switch between torch and Triton."""

import subprocess
import sys

import pytest
import torch

from diffusion_moe.moe import MoEFeedForward, RouterConfig, backend


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Whatever the shell says."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def on_hopper(monkeypatch):
    """A device that kernels run on, as far as the switch can tell."""
    monkeypatch.setattr(backend, "_has_triton", lambda: True)
    monkeypatch.setattr(backend, "_capability", lambda index: (9, 0))
    return FakeTensor("cuda", torch.bfloat16)


class FakeTensor:
    def __init__(self, device, dtype):
        self.device, self.dtype, self.is_cuda = torch.device(device), dtype, device == "cuda"


def test_the_innermost_choice_counts_then_the_variable_then_auto(monkeypatch):
    assert backend.chosen() == "auto"
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert backend.chosen() == "torch"
    with backend.use("triton"):
        with backend.use("auto"):
            assert backend.chosen() == "auto"
        assert backend.chosen() == "triton"
    assert backend.chosen() == "torch"


def test_auto_takes_triton_on_a_gpu_only(on_hopper):
    assert backend.takes_triton(on_hopper)
    assert not backend.takes_triton(torch.empty(1))
    with backend.use("torch"):
        assert not backend.takes_triton(on_hopper)
    for name in ("auto", "triton"):
        with backend.use(name):
            assert not backend.takes_triton(on_hopper, FakeTensor("cuda", torch.float64)), "float64 is torch's"


@pytest.mark.parametrize("missing", ["triton", "an old GPU", "many experts"])
def test_auto_falls_back_and_triton_says_what_is_missing(on_hopper, monkeypatch, missing):
    experts = 1025 if missing == "many experts" else 1
    if missing == "triton":
        monkeypatch.setattr(backend, "_has_triton", lambda: False)
    if missing == "an old GPU":
        monkeypatch.setattr(backend, "_capability", lambda index: (7, 5))
    assert not backend.takes_triton(on_hopper, experts=experts)
    reason = {"triton": "cannot be imported", "an old GPU": r"\(7, 5\)", "many experts": "1025 experts"}[missing]
    with backend.use("triton"), pytest.raises(ValueError, match=f"is triton, but .*{reason}.*; set it to auto"):
        backend.takes_triton(on_hopper, experts=experts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "DIFFUSION_MOE_KERNELS is 'cuda'; choose auto, torch, triton$"),
        ("triton", "DIFFUSION_MOE_KERNELS is triton, but the tensors are on cpu and TRITON_INTERPRET=1 is not set"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_in_one_line(monkeypatch, name, message):
    monkeypatch.setenv(backend.VARIABLE, name)
    layer = MoEFeedForward(8, 8, RouterConfig("dsmoe", 4, top_k=2))
    with pytest.raises(ValueError, match=message) as error:
        layer(torch.randn(1, 5, 8))
    assert "\n" not in str(error.value)


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)], ids=str)
def test_gpus_without_a_fused_grouped_mm_run_our_kernel(on_hopper, capability, monkeypatch):
    monkeypatch.setattr(backend, "_capability", lambda index: capability)
    assert [backend.choose_grouped_matmul(CUDA, dtype).kernel for dtype in (BF16, FP16, FP32)] == ["triton"] * 3
    assert backend.choose_grouped_matmul(CUDA, FP64).kernel == "loop"
    assert f"not on {capability[0]}.{capability[1]}" in backend.choose_grouped_matmul(CUDA, BF16).why


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)], ids=str)
def test_gpus_with_a_fused_grouped_mm_run_it_in_bfloat16(on_hopper, capability, monkeypatch):
    monkeypatch.setattr(backend, "_capability", lambda index: capability)
    kernels = {dtype: backend.choose_grouped_matmul(CUDA, dtype).kernel for dtype in (BF16, FP16, FP32, FP64)}
    assert kernels == {BF16: "grouped_mm", FP16: "triton", FP32: "triton", FP64: "loop"}
    assert str(backend.choose_grouped_matmul(CUDA, FP32)) == "triton (on CUDA grouped_mm is fused in bfloat16 alone)"
    with backend.use("triton"):
        assert str(backend.choose_grouped_matmul(CUDA, BF16)) == "triton (DIFFUSION_MOE_KERNELS is triton)"
    with backend.use("torch"):
        assert backend.choose_grouped_matmul(CUDA, BF16).kernel == "grouped_mm"
        choice = backend.choose_grouped_matmul(CUDA, FP32)
    assert choice.kernel == "loop" and choice.why.endswith("; DIFFUSION_MOE_KERNELS is torch")


def test_where_nothing_is_fast_matmuls_are_a_loop_and_say_why(on_hopper, monkeypatch):
    monkeypatch.setattr(backend, "_capability", lambda index: (7, 5))
    choice = backend.choose_grouped_matmul(CUDA, BF16)
    assert choice.kernel == "loop" and "compute capability (7, 5) and 8.0 is needed" in choice.why
    kernels = {dtype: backend.choose_grouped_matmul(CPU, dtype).kernel for dtype in (BF16, FP16, FP32, FP64)}
    assert kernels == {BF16: "grouped_mm", FP16: "loop", FP32: "grouped_mm", FP64: "loop"}
    with backend.use("triton"), pytest.raises(ValueError, match="is triton, but the tensors are on cpu"):
        backend.choose_grouped_matmul(CPU, BF16)


def test_use_refuses_at_once_and_leaves_nothing_behind():
    with pytest.raises(ValueError, match="is 'gpu'; choose"), backend.use("gpu"):
        raise AssertionError("must not come here")
    assert backend.chosen() == "auto"


def test_the_layer_needs_no_triton():
    """Builds of torch for CPUs have none."""
    code = (
        "import sys, torch; sys.modules['triton'] = None; from diffusion_moe.moe import MoEFeedForward, RouterConfig;"
        "MoEFeedForward(8, 8, RouterConfig('dsmoe', 4))(torch.randn(1, 5, 8)).hidden_states.sum().backward();"
        "sys.exit(any('moe.kernels' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
