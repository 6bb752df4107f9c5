"""The kernels as custom torch operators, with rules for shapes, gradients and batching.

Compilers, exporters and checkers see each operator as a single node. `run_kernel` is the function that scan.py calls;
it bypasses the operator where nothing observes the call.

Legend: B batch, T time steps, D channels, * any trailing axes (the H x W of a frame).
"""

import functools
import math

import torch
from torch import Tensor, nn

from .observers import (
    differentiates_forward,
    differentiates_in_transform,
    has_tangent,
    is_batched,
    is_observed,
    is_profiled,
)
from .scan_numba import numba_backward, numba_forward, numba_step
from .scan_reference import accumulation_dtype, add_bias, initial_state, reference_states
from .scan_torch import torch_backward, torch_forward
from .scan_triton import triton_backward, triton_forward

KERNELS = {
    "torch": (torch_forward, torch_backward),
    "numba": (numba_forward, numba_backward),
    "triton": (triton_forward, triton_backward),
}

# Raised where the result would otherwise silently have no tangent.
_FORWARD_MODE_BEGAN_LATER = (
    "Forward mode (torch.func.jvp, forward_ad) cannot differentiate the kernels of a MinGRU scan traced or "
    "compiled before it began: use the function itself, or trace or compile it with backend='reference'."
)

# The functions below take the arguments of the operators; the schemas in `_register` give their types and order.
# The version in the namespace identifies this interface. A second copy of this file in the same process (code loaded
# from the Hub in addition to the installed package) finds the operators and uses them.
_NAMESPACE = "mingru_hf_v4"
_OPERATORS = getattr(torch.ops, _NAMESPACE)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 3 else tensor.flatten(2)


def _bias_argument(bias: Tensor | None, x: Tensor) -> dict[str, Tensor]:
    """Return the bias as a keyword argument, if there is one, repeated over the trailing axes of x (B, T, 2D, *)."""
    if bias is None:
        return {}
    return {"bias": bias if x.dim() == 3 else bias.repeat_interleave(math.prod(x.shape[3:]))}


def _scan_impl(x, bias, h0, mask, reset, backend, dtype, with_last=True):
    if differentiates_forward():
        raise ValueError(_FORWARD_MODE_BEGAN_LATER)
    if backend == "numba" and mask is None and reset is None:
        state = numba_step(x, h0, bias, accumulation_dtype(x) if with_last else dtype)
        if state is not None:
            if not with_last:
                return state, None
            return state.clone() if state.dtype == dtype else state.to(dtype), state
    forward, _ = KERNELS[backend]
    more = _bias_argument(bias, x)
    states, last = forward(_flat(x), _flat(h0), mask, reset, dtype, **more)
    sizes = x.shape[2] // 2, *x.shape[3:]
    return _as_own(states, sizes), _as_own(last, sizes)


def _as_own(states, sizes):
    """Reshape states (B, T, N) to (B, T, *sizes), hiding the view from autograd: in-place changes must be possible."""
    if len(sizes) == 1 and not states._is_view():
        return states
    return torch.ops.aten._unsafe_view(states, (*states.shape[:2], *sizes))


def _backward_impl(grad, grad_last, x, bias, h0, states, mask, reset, backend):
    if differentiates_forward() and any(map(has_tangent, (grad, grad_last, x, bias, h0))):
        raise ValueError(_FORWARD_MODE_BEGAN_LATER)
    _, backward = KERNELS[backend]
    grads, more = (_flat(grad), _flat(grad_last)), _bias_argument(bias, x)
    grad_x, grad_h0 = backward(*grads, _flat(x), _flat(h0), _flat(states), mask, reset, **more)
    return grad_x.reshape(x.shape), grad_h0.reshape(states[:, :1].shape)


def _scan_fake(x, bias, h0, mask, reset, backend, dtype):
    sizes = x.shape[2] // 2, *x.shape[3:]
    states = x.new_empty((x.shape[0], x.shape[1], *sizes), dtype=dtype)
    return states, x.new_empty((x.shape[0], 1, *sizes), dtype=accumulation_dtype(x))


def _backward_fake(grad, grad_last, gate_and_candidate, bias, h0, states, mask, reset, backend):
    accumulate = accumulation_dtype(gate_and_candidate)
    return (
        torch.empty_like(gate_and_candidate, memory_format=torch.contiguous_format),
        states.new_empty(states[:, :1].shape, dtype=accumulate),
    )


def _setup_context(ctx, inputs, output):
    gate_and_candidate, bias, h0, mask, reset, backend, _ = inputs
    ctx.save_for_backward(gate_and_candidate, bias, h0, mask, reset, output[0])
    ctx.backend = backend
    ctx.set_materialize_grads(False)  # the last state rarely has a gradient


def _backward_through_loop(grad, grad_last, x, bias, h0, mask, reset):
    """Compute what `scan_backward` returns by torch.func.vjp of the loop, which can be differentiated in any mode."""
    wide = x.to(accumulation_dtype(x))
    wide = wide if bias is None else add_bias(wide, bias)
    start = initial_state(wide, grad[:, :1].shape) if h0 is None else h0
    # A list of states, not a stacked tensor, for the reason that `reference_states` gives for its unbind.
    _, pull = torch.func.vjp(lambda x, h0: reference_states(x, h0, mask, reset), wide, start)
    of_states = list(grad.to(wide.dtype).unbind(1))
    if grad_last is not None:
        of_states[-1] = of_states[-1] + grad_last[:, 0]
    grad_x, grad_h0 = pull(of_states)
    return grad_x.to(x.dtype), grad_h0.to(wide.dtype)


def _autograd_backward(ctx, grad, grad_last, backward=None):
    gate_and_candidate, bias, h0, mask, reset, states = ctx.saved_tensors
    backward = _OPERATORS.scan_backward if backward is None else backward
    grad = torch.zeros_like(states) if grad is None else grad
    if differentiates_forward():  # the forward pass ran before forward mode began
        grad_x, grad_h0 = _backward_through_loop(grad, grad_last, gate_and_candidate, bias, h0, mask, reset)
    else:
        grad_x, grad_h0 = backward(grad, grad_last, gate_and_candidate, bias, h0, states, mask, reset, ctx.backend)
    grad_bias = None
    if bias is not None and ctx.needs_input_grad[1]:
        # torch sums the rows of a matrix faster than the first two axes of three. flatten would have no batching rule.
        rows = grad_x.reshape(-1, *grad_x.shape[2:])
        grad_bias = rows.sum([axis for axis in range(rows.dim()) if axis != 1]).to(bias.dtype)
    return grad_x, grad_bias, None if h0 is None else grad_h0.to(h0.dtype), None, None, None, None


def _setup_second(ctx, inputs, output):
    grad, grad_last, gate_and_candidate, bias, h0, _, mask, reset, _ = inputs
    ctx.save_for_backward(grad, grad_last, gate_and_candidate, bias, h0, mask, reset)


def _second_backward(ctx, *grads):
    """Differentiate `scan_backward` through the loop, including the dependence of the states on its inputs."""
    *inputs, mask, reset = ctx.saved_tensors

    wanted = [i for i, t in enumerate(inputs) if t is not None and ctx.needs_input_grad[i]]

    def of_wanted(*values):
        given = dict(zip(wanted, values, strict=True))
        return _backward_through_loop(*(given.get(i, t) for i, t in enumerate(inputs)), mask, reset)

    results, pull = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))
    grads = tuple(torch.zeros_like(r) if g is None else g.to(r.dtype) for r, g in zip(results, grads, strict=True))
    second = dict(zip(wanted, pull(grads), strict=True))
    return *(second.get(i) for i in range(len(inputs))), None, None, None, None


class _ScanBackward(torch.autograd.Function):
    """The operator `scan_backward` for torch.func, whose transforms ignore the autograd formula registered for it."""

    generate_vmap_rule = True
    setup_context = staticmethod(_setup_second)
    backward = staticmethod(_second_backward)

    @staticmethod
    def forward(*args):
        return _OPERATORS.scan_backward(*args)


class _Scan(torch.autograd.Function):
    """The operator `scan` for torch.func's transforms."""

    generate_vmap_rule = True
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def forward(*args):
        return _OPERATORS.scan(*args)

    @staticmethod
    def backward(ctx, grad, grad_last):
        return _autograd_backward(ctx, grad, grad_last, _ScanBackward.apply)


class _PlainScan(torch.autograd.Function):
    """The kernels, called without the operator."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _scan_impl(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad, grad_last):
        # Grad mode is enabled here if these gradients are to be differentiated again.
        seen = torch.is_grad_enabled() or is_observed() or is_profiled()
        seen = seen or is_batched(grad) or is_batched(grad_last)
        plain = not seen and _holds_numbers(grad) and _holds_numbers(grad_last)
        return _autograd_backward(ctx, grad, grad_last, _backward_impl if plain else None)


def _fold(args, in_dims, size, bias_at):
    """Fold the axis that vmap maps over into the batch axis of the arguments of the operator or of its gradient.

    Args:
        args, in_dims: as vmap passes them.
        size: size of the mapped axis.
        bias_at: index of the bias in `args`, directly after the pre-activations.
    """
    args, in_dims = list(args), list(in_dims)
    for i, (arg, axis) in enumerate(zip(args, in_dims, strict=True)):
        if isinstance(arg, Tensor) and (axis is not None or i != bias_at):
            args[i] = arg.expand(size, *arg.shape) if axis is None else arg.movedim(axis, 0)
    if in_dims[bias_at] is not None:  # each sample has its own bias, which no kernel supports
        x, bias = args[bias_at - 1], args[bias_at]
        args[bias_at - 1] = x + bias.to(x.dtype).reshape(size, 1, 1, -1, *[1] * (x.dim() - 4))
        args[bias_at] = None
    return [a.flatten(0, 1) if isinstance(a, Tensor) and i != bias_at else a for i, a in enumerate(args)]


def _vmap(name, bias_at):
    """Return the batching rule of an operator."""

    def rule(info, in_dims, *args):
        results = getattr(_OPERATORS, name.partition("::")[2])(*_fold(args, in_dims, info.batch_size, bias_at))
        return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0, 0)

    return rule


def _not_compiled(kernel):
    """Wrap a kernel so that torch.compile does not trace its Python code after a graph break in a caller."""

    @functools.wraps(kernel)
    def call(*args):
        return (torch.compiler.disable(kernel) if torch.compiler.is_compiling() else kernel)(*args)

    return call


def _register() -> torch.library.Library | None:
    """Define the operators unless another copy of this file already has; the library must be kept alive."""
    if hasattr(_OPERATORS, "scan"):
        return None
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    inputs = "Tensor gate_and_candidate, Tensor? bias, Tensor? h0"
    flags = "Tensor? mask, Tensor? reset, str backend"
    grads = "Tensor grad, Tensor? grad_last"

    def define(schema, bias_at, kernel, fake, setup_context, backward):
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, _not_compiled(kernel), "CompositeExplicitAutograd")
        name = f"{_NAMESPACE}::{name}"
        torch.library.register_fake(name, fake, lib=library)
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
        torch.library.register_vmap(name, _vmap(name, bias_at), lib=library)

    schema = f"scan({inputs}, {flags}, ScalarType dtype) -> (Tensor, Tensor)"
    define(schema, 1, _scan_impl, _scan_fake, _setup_context, _autograd_backward)
    schema = f"scan_backward({grads}, {inputs}, Tensor states, {flags}) -> (Tensor, Tensor)"
    define(schema, 3, _backward_impl, _backward_fake, _setup_second, _second_backward)
    return library


_LIBRARY = _register() or globals().get("_LIBRARY")  # importlib.reload keeps the existing library


def run_kernel(
    gate_and_candidate: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    backend: str,
    dtype: torch.dtype,
    with_last: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run one of the kernels in KERNELS.

    Args:
        gate_and_candidate, bias, h0, mask, reset, dtype: as in `mingru_scan`, already checked; bias only for "numba".
        backend: "torch", "numba" or "triton".
        with_last: whether the last state is wanted.

    Returns:
        The states and the last state, as from `mingru_scan` with `return_last_state`; if `with_last` is False, the
        second result has no meaning.
    """
    inputs = gate_and_candidate, bias, h0, mask, reset, backend, dtype
    seen = is_observed() or is_profiled()
    if not seen and _holds_numbers(gate_and_candidate) and _holds_numbers(bias) and _holds_numbers(h0):
        # The operator's dispatch would cost as much as a short scan.
        return _PlainScan.apply(*inputs) if torch.is_grad_enabled() else _scan_impl(*inputs, with_last)
    if differentiates_in_transform():
        return _Scan.apply(*inputs)
    return _OPERATORS.scan(*inputs)


def _holds_numbers(t: Tensor | None) -> bool:
    """Whether t is None or a plain tensor with data: no subclass, not meta, no lazy negation (`is_neg`)."""
    return t is None or (type(t) in _PLAIN and not (t.is_meta or t.is_neg()))


_PLAIN = Tensor, nn.Parameter


__all__ = ["KERNELS", "run_kernel"]
