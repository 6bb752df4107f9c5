"""The MinGRU recurrence, h_t = (1 - z_t) h_{t-1} + z_t g(candidate_t), for all layers and models of the package.

`mingru_scan` checks its inputs and selects an implementation: the definition in scan_reference.py, or a faster kernel
that is tested against the definition (scan_torch.py, scan_numba.py, scan_triton.py). scan_operator.py registers the
kernels as torch operators.

Legend: B batch, T time steps, D channels, * any trailing axes (the H x W of a frame).
"""

import functools
import importlib.util
import math
import os
import warnings
from typing import Literal, overload

import torch
from torch import Tensor

from .observers import is_exporting, is_observed, kernels_miss_derivative, without_modes
from .scan_numba import NUMBA_AVAILABLE, numba_step, numba_supports
from .scan_numba import unavailable_reason as numba_unavailable_reason
from .scan_operator import KERNELS, run_kernel
from .scan_reference import add_bias, first_state, scan_doubling, scan_exported, scan_log, scan_reference
from .scan_torch import torch_backward, torch_forward
from .scan_triton import unavailable_reason as triton_unavailable_reason

BACKENDS = ("auto", "reference", "log", "torch", "numba", "triton")
# Backends that autograd and compilers can see into; all others are kernels behind a custom operator.
_IN_OPERATORS_OF_TORCH = {
    "compiled": scan_doubling,
    "exported": scan_exported,
    "log": scan_log,
    "reference": scan_reference,
}


@overload
def mingru_scan(
    gate_and_candidate: Tensor,
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    return_last_state: Literal[False] = False,
) -> Tensor: ...


@overload
def mingru_scan(
    gate_and_candidate: Tensor,
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    return_last_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def mingru_scan(
    gate_and_candidate: Tensor,
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def mingru_scan(
    gate_and_candidate: Tensor,
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the MinGRU recurrence over time, h_t = (1 - z_t) h_{t-1} + z_t g(candidate_t).

    Args:
        gate_and_candidate: (B, T, 2D, *) pre-activations, the gate half first, of any floating-point dtype.
        h0: (B, 1, D, *) h_0, the state before the first step; g(0) = 0.5 if None.
        mask: (B, T) boolean; where False the state passes through the step unchanged.
        reset: (B, T) boolean; where True the state is set to 0.5 before this step, whatever came earlier, and no
            gradient flows back across the reset. It is applied before the mask: a masked reset step returns 0.5.
        bias: (2D,) added to the pre-activations. "numba" adds it while reading them, which saves the pass over memory
            that the preceding projection would need to add it.
        backend: "auto" uses the backend named by the environment variable MINGRU_SCAN if it is set, and otherwise the
            fastest one that supports the inputs. Regardless of the variable, it uses torch's own operators under
            torch.export, so that the exported program runs without this package, for a compiled single step, and for
            the derivatives that the kernels do not support (see below). "numba" (fused, CPU) and "triton" (fused,
            CUDA) need the package of that name; "torch" (blocks of steps) runs anywhere. "reference" is a loop over
            time, and "log" the log-space scan that other implementations use, which needs positive states; both are
            kept for comparison.
        dtype: dtype of the returned states; the inputs' dtype if None.
        return_last_state: whether to also return h_T, to be passed as `h0` for the following steps. Unlike the
            states, it is not rounded to 16 bits.

    Returns:
        (B, T, D, *) states h_1..h_T; with `return_last_state`, a tuple of these and the last state (B, 1, D, *), in
        float32 for 16-bit inputs and otherwise in the inputs' dtype. The last state shares no memory with the states.
        Differentiable with respect to `gate_and_candidate`, `h0` and `bias`. The kernels support reverse mode only:
        in forward mode "auto" uses the loop of "reference", and where torch.compile compiles a torch.func derivative,
        it uses torch's own operators. Second and higher derivatives also run through the loop. Under `torch.vmap` all
        samples run as one batch.

    Raises:
        ValueError: if a shape, dtype or device does not fit, a floating-point flag on the CPU is neither 0 nor 1, or
            the backend is unknown or does not support the inputs.

    Precision: the state is kept and accumulated in float32 for 16-bit inputs, otherwise in the inputs' dtype. The
    state is a convex combination of positive numbers, so it forgets errors as it forgets the past: the relative error
    is below 1e-5 after a million steps, and about 1e-6 for gates around 0 (the error of "log" grows with T). Where z
    stays tiny, 1 - z keeps few digits of z: "numba" and "triton" use compensated summation, and "torch" switches to
    float64 on a CPU; "reference", and "torch" on other devices, are off by up to 6e-8 / z there. Between calls the
    state is passed on in float32: in decoding step by step, the error is 1e-5 where z is 6e-6, and 3e-4 where z is
    1e-7.
    Cost: O(T) time, and memory for the states only, since the backward pass recomputes z and g.
    """
    _check_inputs(gate_and_candidate, h0, mask, reset, bias, dtype)
    out_dtype = gate_and_candidate.dtype if dtype is None else dtype
    if backend == "auto" and _wants_plain_operators(gate_and_candidate):
        backend = "exported"
    elif backend == "auto" and kernels_miss_derivative():
        backend = "compiled" if torch.compiler.is_compiling() else "reference"
    else:
        backend = _resolve_backend(backend, gate_and_candidate, out_dtype)
    empty = 0 in gate_and_candidate.shape
    if bias is not None and (empty or backend != "numba"):
        gate_and_candidate, bias = add_bias(gate_and_candidate, bias), None
    mask = None if mask is None else _as_flags("mask", mask)
    reset = None if reset is None else _as_flags("reset", reset)
    if empty and backend != "exported":
        states, last = gate_and_candidate.chunk(2, dim=2)[0].to(out_dtype), first_state(gate_and_candidate, h0).clone()
        if h0 is not None:  # so that the gradient of h0 is 0, not None
            states = states + last[:, :0].sum().to(out_dtype)
    elif backend in _IN_OPERATORS_OF_TORCH:
        wide = _IN_OPERATORS_OF_TORCH[backend](gate_and_candidate, h0, mask, reset)
        # A copy: a slice would keep all the states in memory, and writing to it would change them.
        states, last = wide.to(out_dtype), wide[:, -1:].clone() if return_last_state else None
    else:
        states, last = run_kernel(gate_and_candidate, bias, h0, mask, reset, backend, out_dtype, return_last_state)
    return (states, last) if return_last_state else states


def _as_flags(name: str, flags: Tensor) -> Tensor:
    """Convert flags to booleans; reject floats other than 0 and 1 where checking them needs no synchronisation."""
    if type(flags) is Tensor and flags.is_floating_point() and flags.device.type == "cpu" and not is_observed():
        wrong = flags[(flags != 0) & (flags != 1)]
        if wrong.numel():
            raise ValueError(f"{name} must hold booleans, or only zeros and ones, got {wrong[0].item()}.")
    return flags.bool()


def _wants_plain_operators(x: Tensor) -> bool:
    """Whether to use torch's own operators: under torch.export, and for a single step that is compiled."""
    if is_exporting():
        return True
    return torch.compiler.is_compiling() and isinstance(x.shape[1], int) and x.shape[1] == 1


def mingru_step(
    gate_and_candidate: Tensor,
    h0: Tensor | None,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Run `mingru_scan` over one token, for callers outside autograd, tracers and transforms.

    Args:
        gate_and_candidate: (B, 1, 2D, *) pre-activations.
        h0: (B, 1, D, *) state before the token; g(0) = 0.5 if None.
        bias: (2D,) added to the pre-activations.
        backend: as in `mingru_scan`, but "auto" uses the fused step where there is one, without reading the
            environment variable MINGRU_SCAN: callers resolve it with `requested_backend`.
        dtype: as in `mingru_scan`.

    Returns:
        (B, 1, D, *) state after the token.

    Raises:
        ValueError: as `mingru_scan`.
    """
    # A module may be compiled while the model that calls it is not.
    fused = (backend == "auto" or backend == "numba") and not torch.compiler.is_compiling()
    if fused and type(gate_and_candidate) is Tensor and gate_and_candidate.is_cpu:
        state = numba_step(gate_and_candidate, h0, bias, gate_and_candidate.dtype if dtype is None else dtype)
        if state is not None:
            return state
    return mingru_scan(gate_and_candidate, h0, bias=bias, backend=backend, dtype=dtype)


def requested_backend(backend: str) -> str:
    """Return the requested backend: for "auto", the environment variable MINGRU_SCAN if it is set.

    Under torch.export the variable is ignored, since the exported program also runs where neither the variable nor
    the kernels exist.
    """
    if backend != "auto" or is_exporting():
        return backend
    return os.environ.get("MINGRU_SCAN") or backend


def adds_bias(backend: str, x: Tensor) -> bool:
    """Whether the scan adds a bias at no cost, so that the projection of x need not add it.

    Args:
        backend: "auto" or any other, as `requested_backend` returns it.
        x: input of the projection.
    """
    fused = backend == "auto" or backend == "numba"
    return fused and NUMBA_AVAILABLE and x.is_cpu and not torch.compiler.is_compiling()


def draw_memory_(bias: Tensor, num_steps: float) -> Tensor:
    """Draw in place the number of steps m that each channel remembers, log-uniformly between 1 and `num_steps`.

    A gate bias of -log(m) makes z = sigmoid(-log(m)) = 1 / (1 + m) where the inputs contribute 0 to the gate. This is
    a variant of the chrono initialization of Tallec and Ollivier 2018, arXiv:1804.11188, who draw m uniformly.

    Args:
        bias: (2D,) bias of the projection to gate and candidate; the candidate half is set to 0.
        num_steps: the longest memory, in time steps; at least 1.

    Returns:
        The bias.
    """
    gate, candidate = bias.chunk(2)
    gate.uniform_(-math.log(num_steps), 0.0)
    candidate.zero_()
    return bias


def _check_inputs(
    x: Tensor,
    h0: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    shape = x.shape
    if len(shape) < 3 or not x.is_floating_point():
        raise ValueError(
            f"gate_and_candidate must be a floating-point tensor of shape (B, T, 2D, *), got {x.dtype} {tuple(shape)}."
        )
    if shape[2] % 2:
        raise ValueError(
            "gate_and_candidate must hold a gate and a candidate half: the channel axis (dim 2) must be even, got "
            f"shape {tuple(shape)}."
        )
    if h0 is not None:
        expected = (shape[0], 1, shape[2] // 2, *shape[3:])
        if h0.shape != expected or not h0.is_floating_point():
            raise ValueError(
                f"h0 must have shape {tuple(expected)} (B, 1, D, *) and a floating-point type, got {tuple(h0.shape)} "
                f"{h0.dtype}."
            )
    for name, flags in (("mask", mask), ("reset", reset)):
        if flags is not None and (not isinstance(flags, Tensor) or flags.shape != shape[:2]):
            got = tuple(flags.shape) if isinstance(flags, Tensor) else f"a {type(flags).__name__}"
            raise ValueError(f"{name} must be a tensor of shape {tuple(shape[:2])} (B, T), got {got}.")
    if bias is not None and (bias.shape != shape[2:3] or not bias.is_floating_point()):
        raise ValueError(
            f"bias must have shape {tuple(shape[2:3])} (2D,) and a floating-point type, got {tuple(bias.shape)} "
            f"{bias.dtype}."
        )
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}.")
    device = x.device
    for name, tensor in (("h0", h0), ("mask", mask), ("reset", reset), ("bias", bias)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device}, like gate_and_candidate, got {tensor.device}.")


def _resolve_backend(backend: str, x: Tensor, dtype: torch.dtype) -> str:
    """Select the backend to run; raise a ValueError that says why if the requested one cannot."""
    backend = requested_backend(backend)
    if backend == "auto":
        fused = "triton" if x.device.type == "cuda" else "numba"
        if _why_not(fused, x, dtype) is None:
            return fused
        return "reference" if x.shape[1] == 1 else "torch"  # one step gains nothing from blocks
    source = "environment variable MINGRU_SCAN" if backend == os.environ.get("MINGRU_SCAN") else "scan backend"
    if backend not in BACKENDS:
        raise ValueError(f"Unknown {source} {backend!r}: choose one of {', '.join(BACKENDS)}.")
    problem = _why_not(backend, x, dtype)
    if problem is not None:
        raise ValueError(f"The {source} {backend!r} cannot be used here: {problem}. Use 'auto' to select another one.")
    return backend


def _why_not(backend: str, x: Tensor, dtype: torch.dtype) -> str | None:
    """Return why a backend does not support these inputs, or None if it does."""
    if backend in KERNELS and kernels_miss_derivative():
        return "it has no " + (
            "torch.func derivative in torch.compile" if torch.compiler.is_compiling() else "derivative in forward mode"
        )
    if backend == "triton":
        return triton_unavailable_reason(x.device) or _fails_trial(x.device)
    if backend != "numba":
        return None
    if x.device.type != "cpu":
        return f"it runs on the CPU, but the tensors are on {x.device}"
    if not numba_supports(x.dtype, dtype):
        return f"it has no kernel for {x.dtype} inputs and {dtype} states"
    return numba_unavailable_reason()


@torch.compiler.assume_constant_result
def _fails_trial(device: torch.device) -> str | None:
    """Try out the Triton kernels at their first use on a device; return why they must not be used, or None.

    Faults of a driver, a compiler or a GPU only show when a kernel is launched.
    """
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()):
        return None  # fake tensors; or a CUDA graph capture, which follows a warm-up and forbids synchronising
    return _trial(device)


@functools.cache
def _trial(device: torch.device) -> str | None:
    # Each case compiles different kernels: wide tiles, narrow tiles or chunks; with or without the optional inputs; in
    # 32 or 16 bits. The sizes for the interpreter are smaller because it is slow.
    wide, narrow, chunked = ((15, 64), (20, 64), (521, 64)) if device.type == "cuda" else ((8, 4), (8, 4), (20, 4))
    problem = None
    with without_modes(), torch.inference_mode():
        try:
            errors = [_trial_error(device, *sizes, torch.float32, False) for sizes in (wide, chunked)]
            errors.append(_trial_error(device, *narrow, torch.bfloat16, True))
        except torch.OutOfMemoryError:
            raise  # not the kernels' fault
        except Exception as error:  # failures of Triton, the driver and the C compiler share no class
            problem = f"its kernels fail on {device} ({type(error).__name__}: {str(error).strip()[:200]})"
        else:
            worst = torch.tensor(errors).max().item()  # NaN if any error is NaN
            if not worst < 1:
                problem = (
                    f"its kernels give wrong numbers on {device} (off by {worst:.0f} times what rounding explains)"
                )
    if problem is not None:
        warnings.warn(f"MinGRU runs without its fused Triton scan: {problem}.", stacklevel=2)
    return problem


def _trial_error(device: torch.device, steps: int, channels: int, dtype: torch.dtype, options: bool) -> float:
    """Return the error of the Triton kernels relative to the torch scan, divided by the tolerance for rounding."""
    numbers = torch.arange(2 * steps * 2 * channels, dtype=torch.float32, device="cpu")
    wave = (3.0 * numbers.sin()).to(dtype)  # not random: leaves the user's generator alone
    x, grad = wave.reshape(2, steps, -1), wave[::2].reshape(2, steps, -1)
    h0 = mask = reset = None
    if options:
        h0 = x[:, :1, :channels].float().abs()
        place = numbers[: 2 * steps].reshape(2, steps)
        mask, reset = place % 3 > 0, place % 5 == 1
    states, last = torch_forward(x, h0, mask, reset, dtype)
    expected = states, last, *torch_backward(grad, h0, x, h0, states, mask, reset)
    x, grad, h0, mask, reset = (t if t is None else t.to(device) for t in (x, grad, h0, mask, reset))
    forward, backward = KERNELS["triton"]
    states, last = forward(x, h0, mask, reset, dtype)
    actual = states, last, *backward(grad, h0, x, h0, states, mask, reset)
    errors = [(a.cpu().float() - e).abs().max() / e.float().abs().max() for a, e in zip(actual, expected, strict=True)]
    return torch.stack(errors).max().item() / (1e-4 if dtype == torch.float32 else 2.0**-5)


def _warn_of_broken_packages() -> None:
    """Warn, once at import, about a package that is installed but does not work; a missing package is a choice."""
    for name, reason in (("numba", numba_unavailable_reason()), ("triton", triton_unavailable_reason())):
        broken = reason is not None and importlib.util.find_spec(name) is not None
        # CUDA is queried last: on some machines the query alone prevents processes from being forked afterwards.
        if broken and (name == "numba" or torch.cuda.is_available()):
            warnings.warn(f"MinGRU runs without its fused {name} scan: {reason}.", stacklevel=2)


_warn_of_broken_packages()


__all__ = [
    "BACKENDS",
    "adds_bias",
    "draw_memory_",
    "mingru_scan",
    "mingru_step",
    "requested_backend",
]
