"""Who has to see an operation besides its caller: torch's compilers, tracers, modes and transforms.

torch has no public names for some of them. This file travels with checkpoints, which have to load under a later torch
that calls them otherwise: the answer is then that somebody may be watching, and operations go torch's own way.
"""

import contextlib

import torch
from torch import Tensor

try:
    from torch._C import _len_torch_function_stack
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import (
        TransformType,
        get_interpreter_stack,
        is_functorch_wrapped_tensor,
        is_legacy_batchedtensor,
        maybe_current_level,
    )
    from torch.autograd import forward_ad
    from torch.nn.modules.module import (
        _global_backward_hooks,
        _global_backward_pre_hooks,
        _global_forward_hooks,
        _global_forward_pre_hooks,
    )
    from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

    _GLOBAL_HOOKS = (
        _global_forward_hooks,
        _global_forward_pre_hooks,
        _global_backward_hooks,
        _global_backward_pre_hooks,
    )
    _DIFFERENTIATING = TransformType.Grad, TransformType.Jvp
    _KNOWN = isinstance(forward_ad._current_level, int)
except (ImportError, AttributeError):
    _KNOWN = False


def in_transform() -> bool:
    """Whether torch.func or forward mode is at work."""
    return not _KNOWN or maybe_current_level() is not None or forward_ad._current_level >= 0


def differentiates_in_transform() -> bool:
    """Whether torch.func or forward mode differentiates; no, as far as this torch lets that be known."""
    if torch.compiler.is_compiling() or not _KNOWN:
        return False
    if forward_ad._current_level >= 0:
        return True
    return maybe_current_level() is not None and any(
        level.key() in _DIFFERENTIATING for level in get_interpreter_stack()
    )


def differentiates_forward() -> bool:
    """Whether forward mode is at work, torch's or torch.func's; no, as far as this torch lets that be known."""
    return _KNOWN and forward_ad._current_level >= 0  # which torch.func.jvp raises, too


@torch.compiler.assume_constant_result
def _compiles_derivative() -> bool:
    # The compiler enters the levels of what it reads, and asks for the same ones before it uses what it has made.
    stack = () if not _KNOWN or maybe_current_level() is None else get_interpreter_stack()
    return differentiates_forward() or any(level.key() in _DIFFERENTIATING for level in stack)


def kernels_miss_derivative() -> bool:
    """Whether a derivative is taken in which a kernel behind an operator has no part.

    That is forward mode and, in a compiled function, torch.func's reverse mode as well.
    """
    # Asked in this order the compiler takes note of the level, and compiles anew where it is another one.
    return differentiates_forward() or (torch.compiler.is_compiling() and _compiles_derivative())


def is_observed() -> bool:
    """Whether a compiler, a tracer, a mode or a transform may have to see what happens; autograd is not asked."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or in_transform()
        or is_in_torch_dispatch_mode()
        or _len_torch_function_stack() > 0
    )


def is_profiled() -> bool:
    """Whether torch's profiler is at work in this thread: it knows operators by their names."""
    return not _KNOWN or _profiler_enabled()


def is_batched(tensor: Tensor | None) -> bool:
    """Whether a tensor is a batch of vmap, or of `torch.autograd.grad(..., is_grads_batched=True)`.

    For backward passes, which do not know of the transforms that they run in.
    """
    if tensor is None:
        return False
    return not _KNOWN or is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor)


def has_tangent(tensor: Tensor | None) -> bool:
    """Whether a tensor has a tangent, within forward mode; torch.func's do not show within an operator."""
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def is_exporting() -> bool:
    """torch.compiler.is_exporting(), which torch 2.9's compiler answers with yes whatever it compiles for."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def has_global_hooks() -> bool:
    """Whether a hook may be called at every module's forward or backward pass."""
    return not _KNOWN or any(_GLOBAL_HOOKS)


def without_modes() -> contextlib.AbstractContextManager:
    """A context in which no mode changes what operators do."""
    return _disable_current_modes() if _KNOWN else contextlib.nullcontext()


__all__ = [
    "differentiates_forward",
    "differentiates_in_transform",
    "has_global_hooks",
    "has_tangent",
    "in_transform",
    "is_batched",
    "is_exporting",
    "is_observed",
    "is_profiled",
    "kernels_miss_derivative",
    "without_modes",
]
