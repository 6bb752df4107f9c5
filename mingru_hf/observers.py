"""Detect whether torch's compilers, tracers, modes or transforms need to see an operation.

Some of these checks use private names of torch. This file is saved with checkpoints, which must also load under a
later torch that has renamed them. Most checks then report that an operation may be observed, and the operation takes
torch's regular path.
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
    """Whether a torch.func transform or forward mode is active."""
    return not _KNOWN or maybe_current_level() is not None or forward_ad._current_level >= 0


def differentiates_in_transform() -> bool:
    """Whether torch.func or forward mode is differentiating; False in a compiler, or if this torch does not tell."""
    if torch.compiler.is_compiling() or not _KNOWN:
        return False
    if forward_ad._current_level >= 0:
        return True
    return maybe_current_level() is not None and any(
        level.key() in _DIFFERENTIATING for level in get_interpreter_stack()
    )


def differentiates_forward() -> bool:
    """Whether forward mode is active, torch's or torch.func's; False if this torch does not tell."""
    return _KNOWN and forward_ad._current_level >= 0  # torch.func.jvp raises this level, too


@torch.compiler.assume_constant_result
def _compiles_derivative() -> bool:
    # The compiler enters the transform levels of the code that it traces, and guards on these levels.
    stack = () if not _KNOWN or maybe_current_level() is None else get_interpreter_stack()
    return differentiates_forward() or any(level.key() in _DIFFERENTIATING for level in stack)


def kernels_miss_derivative() -> bool:
    """Whether a derivative is being taken that the kernels behind an operator do not support.

    This is the case in forward mode and, in a compiled function, in torch.func's reverse mode as well.
    """
    # In this order of evaluation the compiler guards on the forward mode level, and recompiles if it changes.
    return differentiates_forward() or (torch.compiler.is_compiling() and _compiles_derivative())


def is_observed() -> bool:
    """Whether a compiler, a tracer, a mode or a transform may need to see operations; autograd is not considered."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or in_transform()
        or is_in_torch_dispatch_mode()
        or _len_torch_function_stack() > 0
    )


def is_profiled() -> bool:
    """Whether torch's profiler is active in this thread: it records operators by name."""
    return not _KNOWN or _profiler_enabled()


def is_batched(tensor: Tensor | None) -> bool:
    """Whether a tensor is batched by vmap or by `torch.autograd.grad(..., is_grads_batched=True)`.

    For backward passes, which do not know the transforms that they run under.
    """
    if tensor is None:
        return False
    return not _KNOWN or is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor)


def has_tangent(tensor: Tensor | None) -> bool:
    """Whether a tensor has a tangent in forward mode; those of torch.func are not visible inside an operator."""
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def is_exporting() -> bool:
    """Whether torch.export is running, by torch's flag: is_exporting() is always True inside torch 2.9's compiler."""
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
