"""Operators of torch whose Python bodies are called directly where nothing looks at operators.

A compiler, an exporter or a FLOP counter must see operators, and tensors without values must not reach a body. To
everyone else the body gives the same result in less time of the host: a call through torch's dispatcher costs several
times what the body does before its kernel starts (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.library import CustomOpDef

_bodies: dict[CustomOpDef, Callable[..., Any]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def operator(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a function as an operator, `torch.library.custom_op`, that `run` can call.

    Args:
        name: name of the operator in `torch.ops.diffusion_moe`.
        mutates_args: names of the arguments that the function changes.
    """

    def register(body: Callable[..., Any]) -> CustomOpDef:
        registered = torch.library.custom_op(f"diffusion_moe::{name}", body, mutates_args=mutates_args)
        _bodies[registered] = body
        return registered

    return register


def run(registered: CustomOpDef, *arguments: Any) -> Any:
    """Call an operator, or its body where nothing sees the difference."""
    return registered(*arguments) if is_seen(*arguments) else _bodies[registered](*arguments)


def is_seen(*arguments: Any) -> bool:
    """True while a graph is traced or a mode watches operators; for tensors without values or that record gradients."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack() or _functorch.peek_interpreter_stack() is not None:
        return True
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return any(type(x) not in _PLAIN or x.is_meta for x in tensors)
