"""The Triton kernels where there is no GPU: run by Triton's interpreter, and compiled for one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion_moe.moe import backend

triton = pytest.importorskip("triton", reason="triton is not installed")
HOPPER = 90
SHARED_MEMORY = 99 * 1024
"""Bytes that a block has on devices of compute capability 8.6, 8.9 and 12.0, the least of those we compile for."""


KERNELS = Path(__file__).parent / "kernels"


FAST = (
    "test_combine.py",
    "test_router.py",
    "test_grouped_matmul.py::test_more_experts_than_a_program_compares_at_a_time",
)


@pytest.mark.parametrize(
    ("files", "marks"), [(FAST, "not slow"), pytest.param((".",), "", id="all", marks=pytest.mark.slow)]
)
def test_under_the_interpreter(files, marks):
    """`tests/moe/kernels` in a process of its own: the interpreter is chosen when triton is first imported."""
    options = ["-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-m", marks]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(KERNELS / file) for file in files)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and " skipped" not in result.stdout


def compiled(kernel, constants, capability=HOPPER, dtype="bf16", **options):
    """A kernel whose machine code was made with the constants that its launcher gives, and rows in bfloat16 or fp32; no
    GPU is needed for that."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows = {"h", "grad", "out", "dh", "x", "y", "w", "dw"}
    int64 = {"expert", "row", "start", "order_A", "row_A", "total_E"}
    int32 = {"count_EB", "earlier_EB", "offsets_E", "offsets"}

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in ("A", "B", "E", "T"):
            return "i32"
        if name == "scale":
            return "fp32"
        return "*" + (dtype if name in rows else "i64" if name in int64 else "i32" if name in int32 else "fp32")

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(code.asm["cubin"]) > 0
    return code


def ptx_of(kernel, constants, **options):
    """The assembly of `compiled`."""
    return compiled(kernel, constants, **options).asm["ptx"]


NOT_INTERPRETED = pytest.mark.skipif(
    backend.is_interpreting(), reason="TRITON_INTERPRET=1 is set: interpreted kernels do not compile"
)


@NOT_INTERPRETED
@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(monkeypatch, tmp_path):
    """The interpreter takes Python that the compiler does not. Rows of bfloat16 are read 16 bytes a thread."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from diffusion_moe.moe.kernels import activation, combine, router, sort

    for kind, weighted in (("swiglu", True), ("gelu", True), ("swiglu", False), ("gelu", False), ("silu", False)):
        for kernel in (activation._activation_forward, activation._activation_backward):
            ptx = ptx_of(kernel, activation.constants(128, kind, weighted))
            assert "ld.global.v4.b32" in ptx and "atom" not in ptx
    for per_token in (0, 5):
        sizes = combine.constants(384, per_token)
        ptx = ptx_of(combine._combine, sizes, num_warps=combine.warps(sizes["C"]))
        assert "ld.global.v4.b32" in ptx and "atom" not in ptx
        assert ("bra" in ptx) == (per_token == 0), "a loop only where the number of rows is not known"
    for experts in (48, backend.MAX_EXPERTS):
        for kernel in (sort._count_by_block, sort._place_assignments):
            assert "atom" not in ptx_of(kernel, sort.constants(experts))
    assert "atom" not in ptx_of(sort._add_up_counts, {"C": sort.COLUMNS})
    for groups, topk_group, strict in ((1, 1, False), (8, 4, True)):
        assert "st.global" in ptx_of(router._choose_experts, router.constants(48, 5, groups, topk_group, strict))
    assert "atom" not in ptx_of(router._router_backward, router.backward_constants(48, 5))


@NOT_INTERPRETED
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (80, "bf16"),
        (120, "fp32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((80, "fp32"), (90, "bf16"), (90, "fp32"), (120, "bf16"))
        ),
    ],
)
def test_grouped_matmuls_compile_for_every_target(capability, dtype, monkeypatch, tmp_path):
    """On tensor cores, with loads of 16 bytes a thread, without atomics, in the shared memory of the smallest device.

    Widths are those of DSMoE-S-E48; matrices are as they are in the forward pass, and transposed for the gradient.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from diffusion_moe.moe.kernels import grouped_matmul

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    x_AD, dy_AF, w_EDF = (torch.empty(shape, dtype=kind) for shape in ((8, 384), (8, 256), (48, 384, 256)))
    cases = [
        (grouped_matmul._matmul, grouped_matmul.constants(x_AD, w_EDF)),
        (grouped_matmul._matmul, grouped_matmul.constants(dy_AF, w_EDF.transpose(1, 2))),
        (grouped_matmul._weight_gradient, grouped_matmul.gradient_constants(x_AD, dy_AF)),
    ]
    for kernel, constants in cases:
        for precision in ("tf32", "tf32x3") if dtype == "fp32" else ("tf32",):
            sizes = constants | {"PRECISION": precision}
            code = compiled(kernel, sizes, capability, dtype, **grouped_matmul.OPTIONS)
            ptx = code.asm["ptx"]
            assert ("wgmma.mma_async" if capability == HOPPER else "mma.sync") in ptx
            assert f".f32.{dtype.replace('fp32', 'tf32')}." in ptx and "atom" not in ptx
            # Hopper's tensor cores read TF32 along the depth alone: Triton transposes on the way, 4 bytes at a time.
            if (capability, sizes["PRECISION"], dtype) != (HOPPER, "tf32", "fp32"):
                assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10, ", ptx)
            assert code.metadata.shared <= SHARED_MEMORY
    size = {"SIZE": 384 * 256, "C": grouped_matmul.BLOCK}
    assert "atom" not in compiled(grouped_matmul._zero_empty, size, capability, dtype).asm["ptx"]
