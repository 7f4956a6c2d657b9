"""The grouped matmuls against a loop written here, in every dtype and for every awkward grouping."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusion_moe.moe import ops
from diffusion_moe.moe.ops import gmm, gmm_wgrad

GROUPS = {
    "even": [4, 4, 4],
    "uneven": [1, 7, 4],
    "empty groups": [0, 9, 0, 0, 3, 0],
    "one group has all": [0, 12, 0],
    "no rows": [0, 0],
    "one expert": [5],
}
WIDTHS = {"aligned": (16, 24), "unaligned": (6, 7), "one column": (8, 1), "one row": (1, 8)}
BF16_ULP = 2.0**-7


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)


def plain_gmm(x_AD: Tensor, w_EDF: Tensor, counts: list[int]) -> Tensor:
    """Row by row: the expert of row a is the one whose range holds a."""
    expert_A = [e for e, count in enumerate(counts) for _ in range(count)]
    rows = [(x_AD[a][:, None] * w_EDF[e]).sum(dim=0) for a, e in enumerate(expert_A)]
    return torch.stack(rows) if rows else x_AD.new_zeros(0, w_EDF.shape[2])


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to one rounding to `dtype` (float32: a few roundings of the sum)."""
    assert actual.dtype == dtype
    rtol, atol = {torch.bfloat16: (BF16_ULP, 1e-2), torch.float32: (1e-5, 1e-5), torch.float64: (1e-12, 1e-12)}[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def operands(counts: list[int], widths: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    D, F = widths
    x_AD, w_EDF = torch.randn(sum(counts), D), torch.randn(len(counts), D, F)
    return x_AD.to(dtype).requires_grad_(), w_EDF.to(dtype).requires_grad_(), offsets(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_gmm_and_its_gradients_equal_the_loop(counts, widths, dtype):
    x_AD, w_EDF, offs = operands(counts, widths, dtype)
    y_AF = gmm(x_AD, w_EDF, offs)
    dy_AF = torch.randn(y_AF.shape).to(dtype)
    dx, dw = torch.autograd.grad(y_AF, (x_AD, w_EDF), dy_AF)
    x, w = x_AD.detach().double().requires_grad_(), w_EDF.detach().double().requires_grad_()
    expected = plain_gmm(x, w, counts)
    if sum(counts):
        expected_dx, expected_dw = torch.autograd.grad(expected, (x, w), dy_AF.double(), materialize_grads=True)
    else:
        expected_dx, expected_dw = torch.zeros_like(x), torch.zeros_like(w)
    close(y_AF, expected, dtype)
    close(dx, expected_dx, dtype)
    close(dw, expected_dw, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_gmm_wgrad_and_its_gradients_equal_the_loop(counts, widths, dtype):
    torch.manual_seed(2)
    A, E, (D, F) = sum(counts), len(counts), widths
    x_AD, y_AF = (torch.randn(A, width).to(dtype).requires_grad_() for width in (D, F))
    dw_EDF = gmm_wgrad(x_AD, y_AF, offsets(counts))
    seed_EDF = torch.randn(E, D, F).to(dtype)
    dx, dy = torch.autograd.grad(dw_EDF, (x_AD, y_AF), seed_EDF)
    expert_A = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    member_AE = torch.nn.functional.one_hot(expert_A, E).double()
    x, y, seed = x_AD.detach().double(), y_AF.detach().double(), seed_EDF.double()
    close(dw_EDF, torch.einsum("ae,ad,af->edf", member_AE, x, y), dtype)
    close(dx, torch.einsum("ae,edf,af->ad", member_AE, seed, y), dtype)
    close(dy, torch.einsum("ae,edf,ad->af", member_AE, seed, x), dtype)


@pytest.mark.parametrize("op", [gmm, gmm_wgrad], ids=["gmm", "gmm_wgrad"])
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 2]], ids=str)
def test_gradients_and_second_gradients_are_numerically_right(op, counts):
    x = torch.randn(sum(counts), 3, dtype=torch.float64, requires_grad=True)
    shape = (len(counts), 3, 2) if op is gmm else (sum(counts), 2)
    other = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    offs = offsets(counts)
    assert torch.autograd.gradcheck(lambda a, b: op(a, b, offs), (x, other))
    assert torch.autograd.gradgradcheck(lambda a, b: op(a, b, offs), (x, other))


@pytest.mark.parametrize(
    ("counts", "widths", "dtype"),
    [
        ([3, 0, 5], (16, 8), torch.float32),
        ([3, 0, 5], (16, 8), torch.bfloat16),
        ([3, 0, 5], (6, 7), torch.float64),
        ([3, 0, 5], (6, 7), torch.bfloat16),
        ([0, 0], (16, 8), torch.float32),
    ],
    ids=str,
)
def test_opcheck(counts, widths, dtype):
    x_AD, w_EDF, offs = operands(counts, widths, dtype)
    y_AF = torch.randn(sum(counts), widths[1]).to(dtype).requires_grad_()
    torch.library.opcheck(gmm, (x_AD, w_EDF, offs))
    torch.library.opcheck(gmm_wgrad, (x_AD, y_AF, offs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradient_of_a_sum_has_stride_zero_and_works(dtype):
    counts = [3, 0, 5]
    x_AD, w_EDF, offs = operands(counts, (16, 8), dtype)
    gmm(x_AD, w_EDF, offs).sum().backward()
    expert_A = torch.tensor([0] * 3 + [2] * 5)
    x, w = x_AD.detach().double(), w_EDF.detach().double()
    close(x_AD.grad, w.sum(dim=2)[expert_A], dtype)
    close(w_EDF.grad, torch.stack([x[:3].sum(0), x[3:3].sum(0), x[3:].sum(0)])[:, :, None].expand(w.shape), dtype)


LAYOUTS = {
    "row of x expanded": (lambda x: x[:1].expand(x.shape), lambda w: w),
    "x column-major": (lambda x: x.T.contiguous().T, lambda w: w),
    "every other column of x": (lambda x: x.repeat_interleave(2, dim=1)[:, ::2], lambda w: w),
    "every fourth column of x": (lambda x: x.repeat_interleave(4, dim=1)[:, ::4], lambda w: w),
    "x starting inside a row": (lambda x: torch.cat((x[:, :4], x), dim=1)[:, 4:], lambda w: w),
    "w transposed": (lambda x: x, lambda w: w.mT.contiguous().mT),
    "one matrix for all experts": (lambda x: x, lambda w: w[:1].expand(w.shape)),
    "every fourth column of w": (lambda x: x, lambda w: w.repeat_interleave(4, dim=2)[..., ::4]),
    "w with the experts innermost": (lambda x: x, lambda w: w.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout, dtype):
    """Operands of any layout, as the docstring allows: outputs and gradients are those of contiguous ones."""
    counts = [3, 0, 5, 8]
    x_AD, w_EDF, offs = operands(counts, (16, 8), dtype)
    x, w = (f(t.detach()).requires_grad_() for f, t in zip(layout, (x_AD, w_EDF)))
    y_AF = gmm(x, w, offs)
    close(y_AF, plain_gmm(x.detach().double(), w.detach().double(), counts), dtype)
    dy_AF = torch.randn(y_AF.shape).to(dtype)
    grads = torch.autograd.grad(y_AF, (x, w), dy_AF)
    x, w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected = torch.autograd.grad(plain_gmm(x, w, counts), (x, w), dy_AF.double())
    for grad, expected_grad in zip(grads, expected):
        close(grad, expected_grad, dtype)


def test_wgrad_of_a_slice_has_the_strides_that_its_fake_kernel_promises():
    """The rows of y are aligned although its width is not."""
    x_AD, y_AF = torch.randn(8, 16), torch.randn(8, 8)[:, :6]
    torch.library.opcheck(gmm_wgrad, (x_AD, y_AF, offsets([3, 5])), test_utils=("test_faketensor",))


@pytest.mark.parametrize("widths", [(16, 24), (6, 7)], ids=["grouped_mm", "loop"])
def test_flops_are_those_of_one_matrix_a_row(widths):
    counts = [3, 0, 5]
    x_AD, w_EDF, offs = operands(counts, widths, torch.float32)
    one_matmul = 2 * sum(counts) * widths[0] * widths[1]
    with FlopCounterMode(display=False) as forward:
        y_AF = gmm(x_AD, w_EDF, offs)
    assert forward.get_total_flops() == one_matmul
    with FlopCounterMode(display=False) as both:
        y_AF = gmm(x_AD, w_EDF, offs)
        y_AF.square().sum().backward()
    assert both.get_total_flops() == 3 * one_matmul


def test_aligned_operands_do_not_take_the_loop(monkeypatch):
    def refuse(*args):
        raise AssertionError("the loop was taken")

    monkeypatch.setattr(ops, "gmm_loop", refuse)
    monkeypatch.setattr(ops, "gmm_wgrad_loop", refuse)
    for dtype in (torch.float32, torch.bfloat16):
        x_AD, w_EDF, offs = operands([3, 0, 5], (16, 24), dtype)
        gmm(x_AD, w_EDF, offs).sum().backward()
    x_AD, w_EDF, offs = operands([3, 0, 5], (6, 7), torch.float32)
    with pytest.raises(AssertionError, match="the loop was taken"):
        gmm(x_AD, w_EDF, offs)


EMPTY = [[162, *[0] * 14, 83], [0, 3, 5], [3, 5, 0], [0, 0, 7, 0], [0, 0, 0]]


@pytest.fixture
def careless(monkeypatch):
    """A grouped_mm that leaves NaN for experts without rows, as on some GPUs, and a device not known to be better."""
    grouped_mm = torch.nn.functional.grouped_mm

    def leave_garbage(a, b, *, offs):
        out = grouped_mm(a, b, offs=offs)
        if out.ndim == 3:
            out[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = torch.nan
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leave_garbage)
    monkeypatch.setattr(ops, "ZERO_FILLING", ())


@pytest.mark.parametrize("counts", EMPTY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_without_rows_get_zeros_whatever_the_library_leaves(counts, dtype, careless):
    x_AD, w_EDF, offs = operands(counts, (16, 24), dtype)
    y_AF = gmm(x_AD, w_EDF, offs)
    dy_AF = torch.randn(y_AF.shape).to(dtype)
    (dw_EDF,) = torch.autograd.grad(y_AF, w_EDF, dy_AF)
    close(dw_EDF, ops.gmm_wgrad_loop(x_AD.detach().double(), dy_AF.double(), offs), dtype)
    empty_E = torch.tensor(counts) == 0
    assert torch.equal(dw_EDF[empty_E], torch.zeros_like(dw_EDF[empty_E]))


def test_without_the_filling_garbage_would_be_seen(careless, monkeypatch):
    monkeypatch.setattr(ops, "ZERO_FILLING", ("cpu",))
    x_AD, _, offs = operands([3, 0, 5], (16, 24), torch.float32)
    assert gmm_wgrad(x_AD, torch.randn(8, 24), offs)[1].isnan().all()


def test_torchs_grouped_mm_on_a_cpu_fills_with_zeros():
    """As `ZERO_FILLING` says, whatever was in memory."""
    x_AD, _, offs = operands([3, 0, 5, 0], (16, 24), torch.float32)
    for _ in range(5):
        torch.full((4, 16, 24), torch.nan)
        assert torch.equal(gmm_wgrad(x_AD, torch.randn(8, 24), offs)[[1, 3]], torch.zeros(2, 16, 24))


class Sized:
    """A tensor as far as `_fits_fused_kernel` looks at it."""

    def __init__(self, elements, address=256):
        self.numel, self.data_ptr = lambda: elements, lambda: address


@pytest.mark.parametrize(
    ("x", "y", "groups", "result", "fits"),
    [
        (Sized(2**31 - 1), Sized(100), 1023, (8, 8), True),
        (Sized(2**31), Sized(100), 8, (8, 8), False),
        (Sized(100), Sized(2**31), 8, (8, 8), False),
        (Sized(100), Sized(100), 8, (2**20, 2**11), False),
        (Sized(100), Sized(100), 1024, (8, 8), False),
        (Sized(100, 264), Sized(100), 8, (8, 8), False),
        (Sized(100), Sized(100, 258), 8, (8, 8), False),
    ],
    ids=["at its limits", "large x", "large y", "large result", "many experts", "x unaligned", "y unaligned"],
)
def test_what_the_fused_kernel_of_a_gpu_takes(x, y, groups, result, fits):
    assert ops._fits_fused_kernel(x, y, groups, result) is fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_to_one_graph(dtype):
    def loss(x_AD, w_EDF, offs):
        return gmm(x_AD, w_EDF, offs).float().sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for counts in ([3, 0, 5], [4, 9, 0]):
        x_AD, w_EDF, offs = operands(counts, (16, 8), dtype)
        expected = torch.autograd.grad(loss(x_AD, w_EDF, offs), (x_AD, w_EDF))
        actual = torch.autograd.grad(compiled(x_AD, w_EDF, offs), (x_AD, w_EDF))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
