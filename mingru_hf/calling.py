"""Faster calls of modules for a single token, where the overhead of ordinary calls exceeds the arithmetic.

`nn.Module.__call__` looks for hooks and compilers, every `self.weight` goes through `__getattr__`, and a ModelOutput
checks its fields one by one. Together this took two fifths of a small model's decoding step (LOG.md). `direct_call`
calls the operator directly if a module is unmodified (no hook, adapter, quantisation or offloading), and `module(x)`
otherwise. `choose_call` decides once per forward pass whether `direct_call` may be used; the models pass the chosen
function on as `call`.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import HAS_FASTER_WAY, linear, linear_unobserved
from .observers import has_global_hooks, is_observed

# The functions below read parameters from `_parameters`, where modules register them. If one has been removed from
# there (by FSDP, a parametrization or the user), they call the module instead.


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
# class -> (its forward when it was registered here, the direct replacement). A forward that differs later has been
# patched. A forward that is not defined in its class's module has been patched already, so its class is left out.
_DIRECT: dict[type, tuple[Callable, Callable]] = {
    module_class: (module_class.forward, direct)
    for module_class, direct in _REPLACEMENTS.items()
    if getattr(module_class.forward, "__globals__", {}).get("__name__") == module_class.__module__
}
_UNKNOWN = (None, None)


def calls_directly(module_class: type) -> type:
    """Allow `direct_call` to call this class's forward directly (class decorator)."""
    _DIRECT[module_class] = module_class.forward, inspect.unwrap(module_class.forward)
    return module_class


def is_plain(module: nn.Module) -> bool:
    """Return whether calling a module does nothing but run its class's forward on its parameters.

    Such a module has a registered class (adapters and quantisation use others), no hooks, no replaced forward on
    itself or on its class (offloading, patches), and is not compiled.
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
    """Return the weight and bias of a plain, unmodified linear map; None for any other module."""
    if type(module) is not nn.Linear or not is_plain(module):
        return None
    # FSDP1 keeps its views of both in `_parameters` in a forward pass, and as attributes when that is recomputed.
    own, parameters = module.__dict__, module._parameters
    weight, bias = (parameters.get(name, own.get(name)) for name in ("weight", "bias"))
    if weight is None or (bias is None and "bias" not in parameters and "bias" not in own):
        return None
    return weight, bias


def module_call(module: nn.Module, *args, **kwargs):
    """Call module(*args) as torch does, except for linear maps that `linear` computes faster."""
    if HAS_FASTER_WAY and not torch.compiler.is_compiling():
        parameters = plain_linear(module)
        if parameters is not None:
            return linear(*args, *parameters)
    return module(*args, **kwargs)


def direct_call(module: nn.Module, *args, **kwargs):
    """Call module(*args), bypassing `nn.Module.__call__` where that changes nothing; see `choose_call`."""
    own, module_class = module.__dict__, type(module)
    forward, direct = _DIRECT.get(module_class, _UNKNOWN)
    # The checks of `is_plain` that matter without gradients, inlined: this runs for every module and token.
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
    """Choose `direct_call` for a single step that nothing has to observe, else `module_call`.

    Possible observers are autograd, compilers, tracers, modes, transforms and global hooks.

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
    """Create output_class(**fields) without the checks of ModelOutput; `fields` must name every field."""
    output = output_class.__new__(output_class)
    output.__dict__.update(fields)
    for name, value in fields.items():
        if value is not None:
            OrderedDict.__setitem__(output, name, value)
    return output


__all__ = ["calls_directly", "choose_call", "direct_call", "direct_output", "is_plain", "module_call", "plain_linear"]
