"""Faster calls of modules for a single token, where the overhead of ordinary calls exceeds the arithmetic.

`nn.Module.__call__` looks for hooks and compilers, every `self.weight` goes through `__getattr__`, and a ModelOutput
checks its fields one by one: together that was two fifths of a small model's decoding step (LOG.md). `direct_call`
goes straight to the operator where nothing hangs on a module (no hook, no adapter, no quantisation, no offloading),
and is `module(x)` everywhere else. Which of the two it is, `choose_call` decides once a pass; the models hand it on
as `call`.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import HAS_FASTER_WAY, linear, linear_unobserved
from .observers import has_global_hooks, is_observed

# Parameters are looked up where they are registered; a module from where one has been taken (by FSDP, a
# parametrization, a user) is asked itself.


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    parameters = module._parameters
    if "weight" not in parameters or "bias" not in parameters:
        return module(x)
    return linear_unobserved(x, parameters["weight"], parameters["bias"])


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    parameters = module._parameters
    if "weight" not in parameters or "bias" not in parameters:
        return module(x)
    return F.layer_norm(x, module.normalized_shape, parameters["weight"], parameters["bias"], module.eps)


def _rms_norm(module: nn.RMSNorm, x: Tensor) -> Tensor:
    parameters = module._parameters
    if "weight" not in parameters:
        return module(x)
    return F.rms_norm(x, module.normalized_shape, parameters["weight"], module.eps)


def _identity(module: nn.Identity, x: Tensor) -> Tensor:
    return x


def _dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    return module(x) if module.training else x


def _embedding(module: nn.Embedding, ids: Tensor) -> Tensor:
    parameters = module._parameters
    if "weight" not in parameters or module.max_norm is not None:
        return module(ids)
    return torch.embedding(parameters["weight"], ids)


_REPLACEMENTS = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.Identity: _identity,
    nn.Dropout: _dropout,
    nn.Embedding: _embedding,
}
# class -> (its forward when it was registered here, the direct replacement). A forward that differs has been patched,
# and so has one that torch has not written.
_DIRECT: dict[type, tuple[Callable, Callable]] = {
    module_class: (module_class.forward, direct)
    for module_class, direct in _REPLACEMENTS.items()
    if getattr(module_class.forward, "__globals__", {}).get("__name__") == module_class.__module__
}
_UNKNOWN = (None, None)


def calls_directly(module_class: type) -> type:
    """Class decorator: `direct_call` may go to this class's forward."""
    _DIRECT[module_class] = module_class.forward, inspect.unwrap(module_class.forward)
    return module_class


def is_plain(module: nn.Module) -> bool:
    """Return whether calling a module means no more than its class's forward on its parameters.

    No class of its own (adapter, quantisation), no hook, no forward put upon it or its class (offloading, patches),
    not compiled.
    """
    own, module_class = module.__dict__, type(module)
    return not (
        module_class not in _DIRECT
        or module_class.forward is not _DIRECT[module_class][0]
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own
        or has_global_hooks()
    )


def plain_linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear map that is no more than these; None for any other module."""
    if type(module) is not nn.Linear or not is_plain(module):
        return None
    # FSDP1 keeps its views of them in `_parameters` in a forward pass, and as attributes where that runs once more.
    own, parameters = module.__dict__, module._parameters
    weight, bias = (parameters.get(name, own.get(name)) for name in ("weight", "bias"))
    if weight is None or (bias is None and "bias" not in parameters and "bias" not in own):
        return None
    return weight, bias


def module_call(module: nn.Module, *args, **kwargs):
    """module(*args), the way torch goes, but for linear maps that `linear` is faster at."""
    if HAS_FASTER_WAY and not torch.compiler.is_compiling():
        parameters = plain_linear(module)
        if parameters is not None:
            return linear(*args, *parameters)
    return module(*args, **kwargs)


def direct_call(module: nn.Module, *args, **kwargs):
    """module(*args) without the way there, where that makes no difference; see `choose_call`."""
    own, module_class = module.__dict__, type(module)
    forward, direct = _DIRECT.get(module_class, _UNKNOWN)
    # `is_plain`, written out as far as it matters without gradients: this is called for every module of every token.
    if (
        module_class.forward is not forward
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own
    ):
        return module(*args, **kwargs)
    return direct(module, *args, **kwargs)


def choose_call(tokens: Tensor | None) -> Callable:
    """`direct_call` for a single step that no autograd, compiler, tracer, mode, transform or global hook has to see.

    Args:
        tokens: (B, T, *) the model's input.

    Returns:
        The function to call the model's modules with, `call(module, *args)`.
    """
    if (
        tokens is not None
        and tokens.dim() > 1
        and tokens.shape[1] == 1
        and not torch.is_grad_enabled()
        and not is_observed()
        and not has_global_hooks()
    ):
        return direct_call
    return module_call


def direct_output(output_class: type, **fields):
    """output_class(**fields), with every field of the ModelOutput given, past its checks."""
    output = output_class.__new__(output_class)
    output.__dict__.update(fields)
    for name, value in fields.items():
        if value is not None:
            OrderedDict.__setitem__(output, name, value)
    return output


__all__ = ["calls_directly", "choose_call", "direct_call", "direct_output", "is_plain", "module_call", "plain_linear"]
