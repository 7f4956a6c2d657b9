"""The Triton kernels where there is no GPU: run by Triton's interpreter, and compiled for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_moe.moe import backend

triton = pytest.importorskip("triton", reason="triton is not installed")
HOPPER = 90


KERNELS = Path(__file__).parent / "kernels"


@pytest.mark.parametrize(
    "files", [("test_combine.py", "test_router.py"), pytest.param((".",), id="all", marks=pytest.mark.slow)]
)
def test_under_the_interpreter(files):
    """`tests/moe/kernels` in a process of its own: the interpreter is chosen when triton is first imported."""
    options = ["-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(KERNELS / file) for file in files)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and " skipped" not in result.stdout


def compiled(kernel, constants, **options):
    """The assembly of a kernel whose machine code for Hopper was made with the constants that its launcher gives, and
    rows in bfloat16; no GPU is needed for that."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows = {"h", "grad", "out", "dh", "y"}
    int64 = {"expert", "row", "start", "order_A", "row_A", "total_E"}
    int32 = {"count_EB", "earlier_EB", "offsets_E"}

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in ("A", "B", "T"):
            return "i32"
        if name == "scale":
            return "fp32"
        return "*" + ("bf16" if name in rows else "i64" if name in int64 else "i32" if name in int32 else "fp32")

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
    assert len(code.asm["cubin"]) > 0
    return code.asm["ptx"]


@pytest.mark.skipif(backend._is_interpreting(), reason="TRITON_INTERPRET=1 is set: interpreted kernels do not compile")
def test_every_kernel_compiles_for_hopper(monkeypatch, tmp_path):
    """The interpreter takes Python that the compiler does not. Rows of bfloat16 are read 16 bytes a thread."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from diffusion_moe.moe.kernels import activation, combine, router, sort

    for kind, weighted in (("swiglu", True), ("gelu", True), ("swiglu", False), ("gelu", False), ("silu", False)):
        for kernel in (activation._activation_forward, activation._activation_backward):
            ptx = compiled(kernel, activation.constants(128, kind, weighted))
            assert "ld.global.v4.b32" in ptx and "atom" not in ptx
    for per_token in (0, 5):
        sizes = combine.constants(384, per_token)
        ptx = compiled(combine._combine, sizes, num_warps=combine.warps(sizes["C"]))
        assert "ld.global.v4.b32" in ptx and "atom" not in ptx
        assert ("bra" in ptx) == (per_token == 0), "a loop only where the number of rows is not known"
    for experts in (48, backend.MAX_EXPERTS):
        for kernel in (sort._count_by_block, sort._place_assignments):
            assert "atom" not in compiled(kernel, sort.constants(experts))
    assert "atom" not in compiled(sort._add_up_counts, {"C": sort.COLUMNS})
    for groups, topk_group, strict in ((1, 1, False), (8, 4, True)):
        assert "st.global" in compiled(router._choose_experts, router.constants(48, 5, groups, topk_group, strict))
    assert "atom" not in compiled(router._router_backward, router.backward_constants(48, 5))
