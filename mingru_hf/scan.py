"""The MinGRU recurrence: every layer and model of the package runs time through this one function.

    z_t = sigmoid(gate_t)
    g_t = candidate_t + 0.5 where candidate_t >= 0, sigmoid(candidate_t) elsewhere
    h_t = (1 - z_t) h_{t-1} + z_t g_t

Source: Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201, section 3.1 and appendix B.
The equation is written once, in `scan_reference`; everything else here computes the same numbers faster and is
tested against it.

Legend: B batch, T time steps, D channels, * any trailing axes (the H x W of a frame), N = D x prod(*).
"""

import functools
import importlib.util
import math
import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .observers import differentiates_forward, differentiates_in_transform, is_observed, without_modes
from .scan_numba import NUMBA_AVAILABLE, numba_backward, numba_forward, numba_step, numba_supports
from .scan_numba import unavailable_reason as numba_unavailable_reason
from .scan_torch import INITIAL_STATE, accumulation_dtype, first_state, torch_backward, torch_forward
from .scan_triton import triton_backward, triton_forward
from .scan_triton import unavailable_reason as triton_unavailable_reason

BACKENDS = ("auto", "reference", "log", "torch", "numba", "triton")


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
        gate_and_candidate: (B, T, 2D, *) pre-activations, the gate half first, of any floating dtype.
        h0: (B, 1, D, *) h_0, the state before the first step; g(0) = 0.5 if None.
        mask: (B, T) boolean; where False the state passes through the step unchanged.
        reset: (B, T) boolean; where True the state is 0.5 before this step, whatever came earlier, and no gradient
            flows back across it. It is applied before the mask: a masked reset step leaves 0.5.
        bias: (2D,) added to the pre-activations. "numba" adds it while it reads them, which saves the pass over
            memory that the projection in front would need for it.
        backend: "auto" obeys the environment variable MINGRU_SCAN where that is set, and else takes the fastest one
            that applies; under torch.export always torch's own operators, so that the program runs without this
            package. "numba" (fused, CPU) and "triton" (fused, CUDA) need the package of that name, "torch" (blocks
            of steps) runs anywhere. "reference" is a loop over time, "log" the scan in log space that other
            implementations use, for states above 0; both are kept for comparison.
        dtype: of the returned states; the inputs' dtype if None.
        return_last_state: whether to return h_T beside the states as well: the `h0` of the steps that follow, which
            16 bits do not round.

    Returns:
        (B, T, D, *) states h_1..h_T; with `return_last_state` these and (B, 1, D, *) the last one, in float32 for
        16-bit inputs and else in the inputs' dtype, in memory of its own. Differentiable in `gate_and_candidate`,
        `h0` and `bias`; the kernels in reverse mode alone, so that "auto" takes the loop of "reference" in forward
        mode. Second and higher derivatives come from that loop, too. Under `torch.vmap` all samples run as one batch.

    Raises:
        ValueError: if a shape or dtype does not fit, or the backend is unknown or cannot do what is asked.

    Precision: state and accumulation are float32 for 16-bit inputs, else the inputs' dtype. The state is a convex
    combination of positive numbers, so it forgets errors as it forgets the past: the relative error is below 1e-5
    after a million steps, about 1e-6 for gates around 0 (that of "log" grows with T). Where z stays tiny, 1 - z has
    few of its digits: "numba" and "triton" add up what rounding leaves out, "torch" goes over to float64 on a CPU;
    "reference", and "torch" on other devices, are off by up to 6e-8 / z there. From one call to the next the state
    is handed on in float32: step by step the error is 1e-5 where z is 6e-6, and 3e-4 where it is 1e-7.
    Cost: O(T) time; memory of the states alone, since the backward pass recomputes z and g.
    """
    _check_inputs(gate_and_candidate, h0, mask, reset, bias, dtype)
    out_dtype = gate_and_candidate.dtype if dtype is None else dtype
    if backend == "auto" and _wants_plain_operators(gate_and_candidate):
        backend = "exported"
    elif backend == "auto" and differentiates_forward():
        backend = "reference"
    else:
        backend = _resolve_backend(backend, gate_and_candidate, out_dtype)
    empty = 0 in gate_and_candidate.shape
    if bias is not None and (empty or backend != "numba"):
        gate_and_candidate, bias = _add_bias(gate_and_candidate, bias), None
    mask = None if mask is None else mask.bool()
    reset = None if reset is None else reset.bool()
    if empty and backend != "exported":
        states = gate_and_candidate.chunk(2, dim=2)[0].to(out_dtype)
        last = first_state(gate_and_candidate, h0).clone()
    elif backend in _IN_OPERATORS_OF_TORCH:
        wide = _IN_OPERATORS_OF_TORCH[backend](gate_and_candidate, h0, mask, reset)
        # A copy: a slice would keep all the states in memory, and writing to it would change them.
        states, last = wide.to(out_dtype), wide[:, -1:].clone() if return_last_state else None
    elif not torch.is_grad_enabled() and not is_observed() and _holds_numbers(gate_and_candidate, h0):
        # The operator's dispatch would cost as much as a short scan.
        scan = _scan_and_last_impl if return_last_state else _scan_impl
        return scan(gate_and_candidate, bias, h0, mask, reset, backend, out_dtype)
    elif differentiates_in_transform():
        states, last = _Scan.apply(gate_and_candidate, bias, h0, mask, reset, backend, out_dtype)
    else:
        scan = _OPERATORS.scan_and_last if return_last_state else _OPERATORS.scan
        return scan(gate_and_candidate, bias, h0, mask, reset, backend, out_dtype)
    return (states, last) if return_last_state else states


def _add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """(B, T, 2D, *) + (2D,), in the dtype of x."""
    return x + bias.to(x.dtype).reshape(-1, *[1] * (x.dim() - 3))


def _holds_numbers(x: Tensor, h0: Tensor | None) -> bool:
    """Whether these are plain tensors with data: no subclass, not meta, no lazy negation (`Tensor.is_neg`)."""
    return type(x) is Tensor and not (x.is_meta or x.is_neg() or (h0 is not None and h0.is_neg()))


def _wants_plain_operators(x: Tensor) -> bool:
    """Whether to use torch's own operators: under torch.export, and for a single step that is compiled."""
    if torch.compiler.is_exporting():
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
    """`mingru_scan` over one token where nobody but the caller looks: no autograd, tracer or transform.

    Args:
        gate_and_candidate: (B, 1, 2D, *) pre-activations.
        h0: (B, 1, D, *) state before the token; g(0) = 0.5 if None.
        bias: (2D,) added to the pre-activations.
        backend: as in `mingru_scan`, but "auto" does not look at the environment: see `requested_backend`.
        dtype: as in `mingru_scan`.

    Returns:
        (B, 1, D, *) state after the token.

    Raises:
        ValueError: as `mingru_scan`.
    """
    # A caller who is not compiled may have compiled this part of it.
    fused = (backend == "auto" or backend == "numba") and not torch.compiler.is_compiling()
    if fused and type(gate_and_candidate) is Tensor and gate_and_candidate.is_cpu:
        state = numba_step(gate_and_candidate, h0, bias, gate_and_candidate.dtype if dtype is None else dtype)
        if state is not None:
            return state
    return mingru_scan(gate_and_candidate, h0, bias=bias, backend=backend, dtype=dtype)


def requested_backend(backend: str) -> str:
    """The backend that was asked for: "auto" leaves it to the environment variable MINGRU_SCAN, where that is set.

    Not under torch.export: the program is for where neither the variable nor the kernels are.
    """
    if backend != "auto" or torch.compiler.is_exporting():
        return backend
    return os.environ.get("MINGRU_SCAN") or backend


def adds_bias(backend: str, x: Tensor) -> bool:
    """Whether the scan adds a bias at no cost, so that the projection of x need not.

    Args:
        backend: "auto" or any other, as `requested_backend` returns it.
        x: what the projection reads.
    """
    fused = backend == "auto" or backend == "numba"
    return fused and NUMBA_AVAILABLE and x.is_cpu and not torch.compiler.is_compiling()


def initial_state(like: Tensor, shape: list[int], value: float = INITIAL_STATE) -> Tensor:
    """g(0) = 0.5 everywhere, in the dtype and on the device of `like`; TorchScript takes the value as a default."""
    return like.new_full(shape, value)


def draw_memory_(bias: Tensor, num_steps: float) -> Tensor:
    """Draw, in place, how many steps each channel remembers: m log-uniformly between 1 and `num_steps`.

    A gate bias of -log(m) makes z = sigmoid(-log(m)) = 1 / (1 + m) while the inputs say nothing: the chrono
    initialization of Tallec and Ollivier 2018, arXiv:1804.11188, who draw m uniformly.

    Args:
        bias: (2D,) of the projection to gate and candidate; the candidate half becomes 0.
        num_steps: the longest memory, in time steps; at least 1.

    Returns:
        The bias.
    """
    gate, candidate = bias.chunk(2)
    gate.uniform_(-math.log(num_steps), 0.0)
    candidate.zero_()
    return bias


def scan_reference(
    gate_and_candidate: Tensor,
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    """The recurrence as a loop over time that autograd differentiates: the definition all else is compared with.

    Also the path inside TorchScript, so a scripted layer holds only torch's own operators.

    Args:
        gate_and_candidate, h0, mask, reset: as in `mingru_scan`.

    Returns:
        (B, T, D, *) states in the accumulation dtype: float32 for 16-bit inputs, else the inputs' dtype.
    """
    return torch.stack(_reference_states(gate_and_candidate, h0, mask, reset), dim=1)


def _zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, T, *) with 0 where the mask (B, T) is False: NaN there would come back in gradients, as 0 times NaN."""
    return torch.where(mask.reshape(list(mask.shape) + [1] * (x.dim() - 2)), x, torch.zeros_like(x))


def _reference_states(x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None) -> list[Tensor]:
    """The states (B, D, *) of `scan_reference`, one a step."""
    if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
        x = x.float()
    if mask is not None:
        x = _zero_padding(x, mask)
    gate, candidate = x.chunk(2, dim=2)  # (B, T, D, *) each
    z = torch.sigmoid(gate)
    one_minus_z = torch.sigmoid(-gate)  # not a subtraction, which loses all digits of a small 1 - z
    g = torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
    zg = z * g

    if h0 is None:
        h = initial_state(x, gate[:, 0].shape)  # (B, D, *)
    else:
        h = h0[:, 0].to(x.dtype)
    row = [x.shape[0]] + [1] * (x.dim() - 2)  # (B, 1, ...): one flag a row

    states: list[Tensor] = []
    # Taken apart at once: the backward pass of an index into all steps would fill a tensor of all steps for each.
    carries, drives = one_minus_z.unbind(1), zg.unbind(1)
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t].reshape(row), initial_state(h, h.shape), h)
        h_next = carries[t] * h + drives[t]
        if mask is not None:
            h_next = torch.where(mask[:, t].reshape(row), h_next, h)
        h = h_next
        states.append(h)
    return states


def carry_and_drive(gate_and_candidate: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as h_t = carry_t h_{t-1} + drive_t: 1 - z and z g, for scans that compute no gates.

    Args:
        gate_and_candidate: (B, T, 2D, *) pre-activations.

    Returns:
        (B, T, D, *) each.
    """
    gate, candidate = gate_and_candidate.chunk(2, dim=2)
    return torch.sigmoid(-gate), torch.sigmoid(gate) * torch.maximum(candidate + 0.5, torch.sigmoid(candidate))


def _scan_exported(x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None) -> Tensor:
    """The recurrence in torch's own operators for any T, so that an exported program runs without this package.

    One node of the graph whatever T is: torch's scan over h_t = carry_t h_{t-1} + drive_t.
    """
    from torch._higher_order_ops.scan import scan

    if isinstance(x.shape[1], int) and x.shape[1] == 1:
        return scan_reference(x, h0, mask, reset)
    x = x.to(accumulation_dtype(x))
    if mask is not None:
        x = _zero_padding(x, mask)
    carry, drive = carry_and_drive(x)
    shape = [*x.shape[:2]] + [1] * (x.dim() - 2)
    if mask is not None:
        keep = mask.reshape(shape)
        drive = torch.where(keep, drive, 0.0)
        carry = torch.where(keep, carry, 1.0)
    if reset is not None:
        cut = reset.reshape(shape)
        drive = torch.where(cut, drive + INITIAL_STATE * carry, drive)
        carry = torch.where(cut, 0.0, carry)
    h0 = initial_state(x, carry[:, :1].shape) if h0 is None else h0.to(x.dtype)

    def step(h, inputs):
        h = inputs[0] * h + inputs[1]
        return h, h.clone()  # a scan's results must not be one and the same tensor

    # Contiguous as the states that `step` returns are: torch's scan asks for the same strides. Over the first axis:
    # from any other, torch 2.9 returns the results along the first and later versions along that one.
    return scan(step, h0[:, 0].contiguous(), (carry.movedim(1, 0), drive.movedim(1, 0)))[1].movedim(0, 1)


def _scan_log(x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None) -> Tensor:
    """The scan as a cumulative log-sum-exp (arXiv:2410.01201, appendix B): what the peers compute.

    Its error grows with T, and a reset (log 0) cannot be expressed.
    """
    if reset is not None:
        raise ValueError(
            "The 'log' scan cannot reset the state inside a row (log 0); choose 'torch', 'reference' or 'auto'."
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The 'log' scan works in float32 and float64 only, got {x.dtype}; choose 'torch', 'reference' or 'auto'."
        )
    if mask is not None:
        x = _zero_padding(x, mask)
    gate, candidate = x.chunk(2, dim=2)
    h0 = initial_state(x, gate[:, :1].shape) if h0 is None else h0.to(x.dtype)
    log_one_minus_z = -F.softplus(gate)
    log_g = torch.where(candidate >= 0, (F.relu(candidate) + 0.5).log(), -F.softplus(-candidate))
    log_zg = log_g - F.softplus(-gate)
    if mask is not None:
        keep = mask.reshape(*mask.shape, *[1] * (x.dim() - 2))
        log_one_minus_z = torch.where(keep, log_one_minus_z, 0.0)
        log_zg = torch.where(keep, log_zg, -1e30)
    log_decay = F.pad(log_one_minus_z.cumsum(dim=1).movedim(1, -1), (1, 0)).movedim(-1, 1)  # (B, T + 1, D, *)
    log_values = torch.cat([h0.log(), log_zg], dim=1)
    return (log_decay + torch.logcumsumexp(log_values - log_decay, dim=1)).exp()[:, 1:]


# What autograd and compilers look into; the others are kernels behind a registered operator, `_KERNELS` below.
_IN_OPERATORS_OF_TORCH = {"exported": _scan_exported, "log": _scan_log, "reference": scan_reference}


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
            f"gate_and_candidate must be a floating-point tensor (B, T, 2D, *), got {x.dtype} {tuple(shape)}."
        )
    if shape[2] % 2:
        raise ValueError(
            "gate_and_candidate must hold a gate and a candidate half: the channel axis (dim 2) must be even, got "
            f"shape {tuple(shape)}."
        )
    if h0 is not None:
        expected = (shape[0], 1, shape[2] // 2, *shape[3:])
        if h0.shape != expected:
            raise ValueError(f"h0 must have shape {tuple(expected)} (B, 1, D, *), got {tuple(h0.shape)}.")
    if mask is not None and mask.shape != shape[:2]:
        raise ValueError(f"mask must have shape {tuple(shape[:2])} (B, T), got {tuple(mask.shape)}.")
    if reset is not None and reset.shape != shape[:2]:
        raise ValueError(f"reset must have shape {tuple(shape[:2])} (B, T), got {tuple(reset.shape)}.")
    if bias is not None and bias.shape != shape[2:3]:
        raise ValueError(f"bias must have shape {tuple(shape[2:3])} (2D,), got {tuple(bias.shape)}.")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}.")
    device = x.device
    for name, tensor in (("h0", h0), ("mask", mask), ("reset", reset), ("bias", bias)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device}, where gate_and_candidate is, got {tensor.device}.")


def _resolve_backend(backend: str, x: Tensor, dtype: torch.dtype) -> str:
    """Choose what runs, or say why the choice made cannot."""
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
        raise ValueError(f"The {source} {backend!r} cannot run here: {problem}. 'auto' takes another one.")
    return backend


def _why_not(backend: str, x: Tensor, dtype: torch.dtype) -> str | None:
    """Why a backend cannot take these inputs; None where it can."""
    if backend in _KERNELS and differentiates_forward():
        return "forward mode cannot see into it"
    if backend == "triton":
        return triton_unavailable_reason(x.device) or _fails_trial(x.device)
    if backend != "numba":
        return None
    if x.device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {x.device}"
    if not numba_supports(x.dtype, dtype):
        return f"it has no kernel for {x.dtype} inputs and {dtype} states"
    return numba_unavailable_reason()


@torch.compiler.assume_constant_result
def _fails_trial(device: torch.device) -> str | None:
    """Why the Triton kernels must not be used on a device, found out at their first use there; None if they may.

    What a driver, a compiler or a card does to them shows at the first launch and not before.
    """
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()):
        return None  # fake tensors, and graphs: what they capture has run before, and must not be waited for
    return _trial(device)


@functools.cache
def _trial(device: torch.device) -> str | None:
    # In one pass and in chunks, with and without all that is optional, in 32 and in 16 bits: other kernels each.
    whole, chunked = ((20, 64), (521, 64)) if device.type == "cuda" else ((8, 4), (20, 4))  # the interpreter is slow
    problem = None
    with without_modes(), torch.inference_mode():
        try:
            errors = [_trial_error(device, *chunked, torch.float32, False)]
            errors.append(_trial_error(device, *whole, torch.bfloat16, True))
        except torch.OutOfMemoryError:
            raise  # no fault of the kernels
        except Exception as error:  # the failures of Triton, the driver and the C compiler have no class in common
            problem = f"its kernels fail on {device} ({type(error).__name__}: {str(error).strip()[:200]})"
        else:
            worst = torch.tensor(errors).max().item()  # NaN if one is
            if not worst < 1:
                problem = (
                    f"its kernels give wrong numbers on {device} (off by {worst:.0f} times what rounding explains)"
                )
    if problem is not None:
        warnings.warn(f"MinGRU runs without its fused Triton scan: {problem}.", stacklevel=2)
    return problem


def _trial_error(device: torch.device, steps: int, channels: int, dtype: torch.dtype, options: bool) -> float:
    """How far the Triton kernels are from the torch scan, over what rounding explains."""
    numbers = torch.arange(2 * steps * 2 * channels, dtype=torch.float32, device="cpu")
    wave = (3.0 * numbers.sin()).to(dtype)  # the user's random numbers stay as they are
    x, grad = wave.reshape(2, steps, -1), wave[::2].reshape(2, steps, -1)
    h0 = mask = reset = None
    if options:
        h0 = x[:, :1, :channels].float().abs()
        place = numbers[: 2 * steps].reshape(2, steps)
        mask, reset = place % 3 > 0, place % 5 == 1
    states, last = torch_forward(x, h0, mask, reset, dtype)
    expected = states, last, *torch_backward(grad, h0, x, h0, states, mask, reset)
    x, grad, h0, mask, reset = (t if t is None else t.to(device) for t in (x, grad, h0, mask, reset))
    forward, backward = _KERNELS["triton"]
    states, last = forward(x, h0, mask, reset, dtype)
    actual = states, last, *backward(grad, h0, x, h0, states, mask, reset)
    errors = [(a.cpu().float() - e).abs().max() / e.float().abs().max() for a, e in zip(actual, expected, strict=True)]
    return torch.stack(errors).max().item() / (1e-4 if dtype == torch.float32 else 2.0**-5)


def _warn_of_broken_packages() -> None:
    """Once, at import: a package that is missing is a choice, one that is there and does not work a mistake."""
    for name, reason in (("numba", numba_unavailable_reason()), ("triton", triton_unavailable_reason())):
        broken = reason is not None and importlib.util.find_spec(name) is not None
        # CUDA is asked last: on some machines the question alone keeps processes from being forked.
        if broken and (name == "numba" or torch.cuda.is_available()):
            warnings.warn(f"MinGRU runs without its fused {name} scan: {reason}.", stacklevel=2)


_warn_of_broken_packages()


_KERNELS = {
    "torch": (torch_forward, torch_backward),
    "numba": (numba_forward, numba_backward),
    "triton": (triton_forward, triton_backward),
}


# --- The operator: torch.compile, torch.export and opcheck see one node with a shape rule and a gradient.

# The version names the contract. A second copy of this file in one process (code loaded from a Hub beside the
# installed package) finds the operator and uses it.
_NAMESPACE = "mingru_hf_v3"
_OPERATORS = getattr(torch.ops, _NAMESPACE)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 3 else tensor.flatten(2)


def _bias_argument(bias: Tensor | None, x: Tensor) -> dict[str, Tensor]:
    """The bias for the kernels that take one, repeated over the trailing axes of x (B, T, 2D, *)."""
    if bias is None:
        return {}
    return {"bias": bias if x.dim() == 3 else bias.repeat_interleave(math.prod(x.shape[3:]))}


def _scan_and_last_impl(
    gate_and_candidate: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    forward, _ = _KERNELS[backend]
    x, more = gate_and_candidate, _bias_argument(bias, gate_and_candidate)
    if x.dim() == 3:
        return forward(x, h0, mask, reset, dtype, **more)
    states, last = forward(_flat(x), _flat(h0), mask, reset, dtype, **more)
    sizes = x.shape[2] // 2, *x.shape[3:]
    return states.unflatten(2, sizes), last.unflatten(2, sizes)


def _scan_impl(x: Tensor, bias: Tensor | None, h0: Tensor | None, mask: Tensor | None, *rest) -> Tensor:
    reset, backend, dtype = rest
    if backend == "numba" and mask is None and reset is None:
        states = numba_step(x, h0, bias, dtype)
        if states is not None:
            return states
    return _scan_and_last_impl(x, bias, h0, mask, *rest)[0]


def _backward_impl(
    grad: Tensor,
    grad_last: Tensor | None,
    gate_and_candidate: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    states: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _, backward = _KERNELS[backend]
    x, more = gate_and_candidate, _bias_argument(bias, gate_and_candidate)
    grads = _flat(grad), _flat(grad_last)
    grad_x, grad_h0 = backward(*grads, _flat(x), _flat(h0), _flat(states), mask, reset, **more)
    return grad_x.reshape(x.shape), grad_h0.reshape(states[:, :1].shape)


def _scan_fake(x, bias, h0, mask, reset, backend, dtype):
    return x.new_empty((x.shape[0], x.shape[1], x.shape[2] // 2, *x.shape[3:]), dtype=dtype)


def _scan_and_last_fake(x, *rest):
    return _scan_fake(x, *rest), _scan_fake(x[:, :1], *rest[:-1], accumulation_dtype(x))


def _backward_fake(grad, grad_last, gate_and_candidate, bias, h0, states, mask, reset, backend):
    accumulate = accumulation_dtype(gate_and_candidate)
    return (
        torch.empty_like(gate_and_candidate, memory_format=torch.contiguous_format),
        states.new_empty(states[:, :1].shape, dtype=accumulate),
    )


def _setup_context(ctx, inputs, output):
    gate_and_candidate, bias, h0, mask, reset, backend, _ = inputs
    states = output if isinstance(output, Tensor) else output[0]
    ctx.save_for_backward(gate_and_candidate, bias, h0, mask, reset, states)
    ctx.backend = backend
    ctx.set_materialize_grads(False)  # the last state's is seldom there


def _autograd_backward(ctx, grad, grad_last=None, backward=None):
    gate_and_candidate, bias, h0, mask, reset, states = ctx.saved_tensors
    backward = _OPERATORS.scan_backward if backward is None else backward
    grad = torch.zeros_like(states) if grad is None else grad
    grad_x, grad_h0 = backward(grad, grad_last, gate_and_candidate, bias, h0, states, mask, reset, ctx.backend)
    grad_bias = None
    if bias is not None and ctx.needs_input_grad[1]:
        # torch sums a matrix by columns faster than the first two axes of three; and flatten has no batching rule.
        rows = grad_x.reshape(-1, *grad_x.shape[2:])
        grad_bias = rows.sum([axis for axis in range(rows.dim()) if axis != 1]).to(bias.dtype)
    return grad_x, grad_bias, None if h0 is None else grad_h0.to(h0.dtype), None, None, None, None


def _setup_second(ctx, inputs, output):
    grad, grad_last, gate_and_candidate, bias, h0, _, mask, reset, _ = inputs
    ctx.save_for_backward(grad, grad_last, gate_and_candidate, bias, h0, mask, reset)


def _second_backward(ctx, *grads):
    """The gradients of `scan_backward`'s results, the states' dependence on its inputs included, through the loop.

    In torch.func's terms, which hold inside its transforms, too.
    """
    *inputs, mask, reset = ctx.saved_tensors

    def first(grad, grad_last, x, bias, h0):
        wide = x.to(accumulation_dtype(x))
        wide = wide if bias is None else _add_bias(wide, bias)
        start = initial_state(wide, grad[:, :1].shape) if h0 is None else h0
        # A list of states, not a stack: see `_reference_states` about indices.
        _, pull = torch.func.vjp(lambda x, h0: _reference_states(x, h0, mask, reset), wide, start)
        of_states = list(grad.to(wide.dtype).unbind(1))
        if grad_last is not None:
            of_states[-1] = of_states[-1] + grad_last[:, 0]
        grad_x, grad_h0 = pull(of_states)
        return grad_x.to(x.dtype), grad_h0.to(wide.dtype)

    wanted = [i for i, t in enumerate(inputs) if t is not None and ctx.needs_input_grad[i]]

    def of_wanted(*values):
        given = dict(zip(wanted, values, strict=True))
        return first(*(given.get(i, t) for i, t in enumerate(inputs)))

    results, pull = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))
    grads = tuple(torch.zeros_like(r) if g is None else g.to(r.dtype) for r, g in zip(results, grads, strict=True))
    second = dict(zip(wanted, pull(grads), strict=True))
    return *(second.get(i) for i in range(len(inputs))), None, None, None, None


class _ScanBackward(torch.autograd.Function):
    """The operator `scan_backward` for torch.func's transforms, which do not see the formula registered with it."""

    generate_vmap_rule = True
    setup_context = staticmethod(_setup_second)
    backward = staticmethod(_second_backward)

    @staticmethod
    def forward(*args):
        return _OPERATORS.scan_backward(*args)


class _Scan(torch.autograd.Function):
    """The operator `scan_and_last` for torch.func's transforms."""

    generate_vmap_rule = True
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def forward(*args):
        return _OPERATORS.scan_and_last(*args)

    @staticmethod
    def backward(ctx, grad, grad_last):
        return _autograd_backward(ctx, grad, grad_last, _ScanBackward.apply)


def _fold(args, in_dims, size, bias_at):
    """The arguments of the operator, or of its gradient, under vmap: the axis mapped over becomes rows of the batch.

    Args:
        args, in_dims: as vmap hands them on.
        size: of the axis.
        bias_at: where the bias is, behind the pre-activations.
    """
    args, in_dims = list(args), list(in_dims)
    for i, (arg, axis) in enumerate(zip(args, in_dims, strict=True)):
        if isinstance(arg, Tensor) and (axis is not None or i != bias_at):
            args[i] = arg.expand(size, *arg.shape) if axis is None else arg.movedim(axis, 0)
    if in_dims[bias_at] is not None:  # each sample has its own, which no kernel takes
        x, bias = args[bias_at - 1], args[bias_at]
        args[bias_at - 1] = x + bias.to(x.dtype).reshape(size, 1, 1, -1, *[1] * (x.dim() - 4))
        args[bias_at] = None
    return [a.flatten(0, 1) if isinstance(a, Tensor) and i != bias_at else a for i, a in enumerate(args)]


def _vmap(name, bias_at):
    """The rule for an operator."""

    def rule(info, in_dims, *args):
        results = getattr(_OPERATORS, name.partition("::")[2])(*_fold(args, in_dims, info.batch_size, bias_at))
        if isinstance(results, Tensor):
            return results.unflatten(0, (info.batch_size, -1)), 0
        return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0, 0)

    return rule


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
        library.impl(name, kernel, "CompositeExplicitAutograd")
        name = f"{_NAMESPACE}::{name}"
        torch.library.register_fake(name, fake, lib=library)
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
        torch.library.register_vmap(name, _vmap(name, bias_at), lib=library)

    first = _setup_context, _autograd_backward
    define(f"scan({inputs}, {flags}, ScalarType dtype) -> Tensor", 1, _scan_impl, _scan_fake, *first)
    schema = f"scan_and_last({inputs}, {flags}, ScalarType dtype) -> (Tensor, Tensor)"
    define(schema, 1, _scan_and_last_impl, _scan_and_last_fake, *first)
    schema = f"scan_backward({grads}, {inputs}, Tensor states, {flags}) -> (Tensor, Tensor)"
    define(schema, 3, _backward_impl, _backward_fake, _setup_second, _second_backward)
    return library


_LIBRARY = _register() or globals().get("_LIBRARY")  # importlib.reload leaves what was there


__all__ = [
    "BACKENDS",
    "INITIAL_STATE",
    "carry_and_drive",
    "draw_memory_",
    "initial_state",
    "mingru_scan",
    "scan_reference",
]
