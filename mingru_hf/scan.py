"""The MinGRU recurrence: every layer and model of the package runs time through this one function.

    z_t = sigmoid(gate_t)
    g_t = candidate_t + 0.5 where candidate_t >= 0, sigmoid(candidate_t) elsewhere
    h_t = (1 - z_t) h_{t-1} + z_t g_t

Source: Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201, section 3.1 and appendix B.
The equation is written once, in `scan_reference`; everything else here computes the same numbers faster and is
tested against it.

Legend: B batch, T time steps, D channels, * any trailing axes (the H x W of a frame), N = D x prod(*).
"""

import importlib.util
import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan_numba import numba_backward, numba_forward, numba_supports
from .scan_numba import unavailable_reason as numba_unavailable_reason
from .scan_triton import triton_backward, triton_forward
from .scan_triton import unavailable_reason as triton_unavailable_reason

# h_0 = g(0): the state before the first step when no other is given.
INITIAL_STATE = 0.5

BACKENDS = ("auto", "reference", "log", "torch", "numba", "triton")

# Elements of one (steps, B, N) temporary of the blocked scan: small enough that its handful of temporaries stay in
# the second-level cache, large enough that Python's cost for each block does not show.
_BLOCK_ELEMENTS = 1 << 17


def mingru_scan(
    gate_and_candidate: Tensor,
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Run the MinGRU recurrence over time, h_t = (1 - z_t) h_{t-1} + z_t g(candidate_t).

    Args:
        gate_and_candidate: (B, T, 2D, *) pre-activations, the gate half first, of any floating dtype.
        h0: (B, 1, D, *) state before step 0; g(0) = 0.5 if None.
        mask: (B, T) boolean; where False the state passes through the step unchanged.
        reset: (B, T) boolean; where True the state is 0.5 before this step, whatever came earlier, and no gradient
            flows back across it. It is applied before the mask: a masked reset step leaves 0.5.
        backend: "auto" obeys the environment variable MINGRU_SCAN where that is set, and else takes the fastest one
            that applies. "numba" (fused, CPU) and "triton" (fused, CUDA) need the package of that name, "torch"
            (blocks of steps) runs anywhere. "reference" is a loop over time, "log" the scan in log space that other
            implementations use; both are kept for comparison.
        dtype: of the returned states; the inputs' dtype if None. float32 keeps all of the state that bfloat16
            would round.

    Returns:
        (B, T, D, *) states h_1..h_T. Differentiable once in `gate_and_candidate` and `h0`.

    Raises:
        ValueError: if a shape or dtype does not fit, or the backend is unknown or cannot do what is asked.

    Precision: state and accumulation are float32 for 16-bit inputs, else the inputs' dtype. The state is a convex
    combination of positive numbers, so the error does not grow with T; that of "log" does.
    Cost: O(T) time; memory of the states alone, since the backward pass recomputes z and g.
    """
    _check_inputs(gate_and_candidate, h0, mask, reset)
    out_dtype = gate_and_candidate.dtype if dtype is None else dtype
    backend = _resolve_backend(backend, gate_and_candidate, out_dtype)
    mask = None if mask is None else mask.bool()
    reset = None if reset is None else reset.bool()
    if gate_and_candidate.shape[0] == 0 or gate_and_candidate.shape[1] == 0:
        return gate_and_candidate.chunk(2, dim=2)[0].to(out_dtype)
    if backend == "log":
        return _scan_log(gate_and_candidate, h0, mask, reset).to(out_dtype)
    if backend == "reference":
        return scan_reference(gate_and_candidate, h0, mask, reset).to(out_dtype)
    if not torch.is_grad_enabled() and type(gate_and_candidate) is Tensor and not torch.compiler.is_compiling():
        # Decoding one step at a time, the operator's dispatch would cost as much as the step.
        return _forward_impl(gate_and_candidate, h0, mask, reset, backend, out_dtype)
    return _scan_op(gate_and_candidate, h0, mask, reset, backend, out_dtype)


def initial_state(like: Tensor, shape: list[int], value: float = INITIAL_STATE) -> Tensor:
    """g(0) = 0.5 everywhere, in the dtype and on the device of `like`; TorchScript takes the value as a default."""
    return like.new_full(shape, value)


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
    x = gate_and_candidate
    if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
        x = x.float()
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
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t].reshape(row), initial_state(h, h.shape), h)
        h_next = one_minus_z[:, t] * h + zg[:, t]
        if mask is not None:
            h_next = torch.where(mask[:, t].reshape(row), h_next, h)
        h = h_next
        states.append(h)
    return torch.stack(states, dim=1)


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


def _check_inputs(x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None) -> None:
    if x.dim() < 3 or not x.is_floating_point():
        raise ValueError(
            f"gate_and_candidate must be a floating-point tensor (B, T, 2D, *), got {x.dtype} {tuple(x.shape)}."
        )
    if x.shape[2] % 2:
        raise ValueError(
            "gate_and_candidate must hold a gate and a candidate half: the channel axis (dim 2) must be even, got "
            f"shape {tuple(x.shape)}."
        )
    if h0 is not None:
        expected = (x.shape[0], 1, x.shape[2] // 2, *x.shape[3:])
        if h0.shape != expected:
            raise ValueError(f"h0 must have shape {tuple(expected)} (B, 1, D, *), got {tuple(h0.shape)}.")
    for name, flags in (("mask", mask), ("reset", reset)):
        if flags is not None and flags.shape != x.shape[:2]:
            raise ValueError(f"{name} must have shape {tuple(x.shape[:2])} (B, T), got {tuple(flags.shape)}.")


def _resolve_backend(backend: str, x: Tensor, dtype: torch.dtype) -> str:
    """Choose what runs, or say why the choice made cannot."""
    source = "scan backend"
    if backend == "auto" and "MINGRU_SCAN" in os.environ:
        source, backend = "environment variable MINGRU_SCAN", os.environ["MINGRU_SCAN"]
    if backend not in BACKENDS:
        raise ValueError(f"Unknown {source} {backend!r}: choose one of {', '.join(BACKENDS)}.")
    if backend == "auto":
        fused = "triton" if x.device.type == "cuda" else "numba"
        if _why_not(fused, x, dtype) is None:
            return fused
        return "reference" if x.shape[1] == 1 else "torch"  # one step gains nothing from blocks
    problem = _why_not(backend, x, dtype)
    if problem is not None:
        raise ValueError(f"The {source} {backend!r} cannot run here: {problem}. 'auto' takes another one.")
    return backend


def _why_not(backend: str, x: Tensor, dtype: torch.dtype) -> str | None:
    """Why a fused backend cannot take these inputs; None where it can."""
    if backend == "triton":
        return triton_unavailable_reason(x.device)
    if backend != "numba":
        return None
    if x.device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {x.device}"
    if not numba_supports(x.dtype, dtype):
        return f"it has no kernel for {x.dtype} inputs and {dtype} states"
    return numba_unavailable_reason()


def _warn_of_broken_packages() -> None:
    """Once, at import: a package that is missing is a choice, one that is there and does not work a mistake."""
    for name, reason, wanted in (
        ("numba", numba_unavailable_reason(), True),
        ("triton", triton_unavailable_reason(), torch.cuda.is_available()),
    ):
        if wanted and reason is not None and importlib.util.find_spec(name) is not None:
            warnings.warn(f"MinGRU runs without its fused {name} scan: {reason}.", stacklevel=2)


_warn_of_broken_packages()


# --- The blocked scan: the same equation over blocks of steps laid out time first, so that each step is one
# --- in-place operator on contiguous memory and all temporaries stay in cache.


def _block_length(num_steps: int, step_elements: int) -> int:
    return max(1, min(num_steps, _BLOCK_ELEMENTS // max(1, step_elements)))


class _Block:
    """The gates of one block of steps, time first: all (K, B, N) in the accumulation dtype.

    With `carry` the factor of the previous state and `drive` the rest, h_t = carry_t h_{t-1} + drive_t holds for
    masked and reset steps too.
    """

    def __init__(self, x: Tensor, start: int, stop: int, accumulate: torch.dtype):
        block = x[:, start:stop].transpose(0, 1)  # (K, B, 2N), a view
        if block.dtype != accumulate:
            block = block.to(accumulate, memory_format=torch.contiguous_format)
        self.gate, self.candidate = block.chunk(2, dim=-1)
        self.one_minus_z = torch.neg(self.gate, out=block.new_empty(self.gate.shape)).sigmoid_()
        self.z = torch.sigmoid(self.gate, out=torch.empty_like(self.one_minus_z))

    def carry_and_drive(self, mask: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        # g(v) = max(v + 0.5, sigmoid(v)): the two curves touch at v = 0 and nowhere else.
        g = torch.sigmoid(self.candidate, out=torch.empty_like(self.z))
        shifted = torch.add(self.candidate, 0.5, out=torch.empty_like(self.z))
        drive = torch.maximum(g, shifted, out=g).mul_(self.z)
        if mask is not None:
            drive = torch.where(mask, drive, 0.0)
        carry = self.carry(mask, None)
        if reset is not None:
            drive = torch.where(reset, drive + INITIAL_STATE * carry, drive)
            carry = torch.where(reset, 0.0, carry)
        return carry, drive

    def carry(self, mask: Tensor | None, reset: Tensor | None) -> Tensor:
        carry = self.one_minus_z
        if mask is not None:
            carry = torch.where(mask, carry, 1.0)
        if reset is not None:
            carry = torch.where(reset, 0.0, carry)
        return carry


def _time_first(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.t().unsqueeze(-1)  # (T, B, 1)


def _slice(flags: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if flags is None else flags[start:stop]


def _cuts(reset: Tensor | None, start: int, stop: int) -> list[Tensor | None]:
    """For each step of a block the (B, 1) rows that are reset, None at steps where none is."""
    if reset is None:
        return [None] * (stop - start)
    block = reset[start:stop]
    return [
        flags if any_ else None for flags, any_ in zip(block.unbind(0), block.flatten(1).any(1).tolist(), strict=True)
    ]


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _initial_state(x: Tensor, h0: Tensor | None) -> Tensor:
    shape, accumulate = (x.shape[0], x.shape[2] // 2), _accumulation_dtype(x)
    if h0 is None:
        return initial_state(x, shape).to(accumulate)
    return h0.reshape(shape).to(accumulate)


def _torch_forward(
    x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x (B, T, 2N), h0 (B, 1, N) or None -> states (B, T, N) in `dtype`."""
    batch, steps, channels = x.shape[0], x.shape[1], x.shape[2] // 2
    accumulate = _accumulation_dtype(x)
    states = x.new_empty((batch, steps, channels), dtype=dtype)
    mask, reset = _time_first(mask), _time_first(reset)
    h = _initial_state(x, h0)
    length = _block_length(steps, batch * channels)
    for start in range(0, steps, length):
        stop = min(steps, start + length)
        carry, drive = _Block(x, start, stop, accumulate).carry_and_drive(
            _slice(mask, start, stop), _slice(reset, start, stop)
        )
        target = states[:, start:stop].transpose(0, 1)  # (K, B, N)
        block = target if dtype == accumulate else drive
        cuts = _cuts(reset, start, stop)
        for carry_t, drive_t, out_t, cut in zip(carry.unbind(0), drive.unbind(0), block.unbind(0), cuts, strict=True):
            if cut is not None:  # 0 times the past is not enough where that is NaN or infinite
                h = torch.where(cut, 0.0, h)
            h = torch.addcmul(drive_t, carry_t, h, out=out_t)
        if dtype != accumulate:
            target.copy_(block)
            h = h.clone()  # lets go of the block
    return states


def _torch_backward(
    grad: Tensor, x: Tensor, h0: Tensor | None, states: Tensor, mask: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients (B, T, 2N) and (B, 1, N) for the pre-activations and the initial state; z and g are recomputed.

    With r_t = dL/dh_t in full, r_t = grad_t + carry_{t+1} r_{t+1}: the same scan, run backwards.
    """
    batch, steps, channels = states.shape
    accumulate = _accumulation_dtype(x)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    mask, reset = _time_first(mask), _time_first(reset)
    h0 = _initial_state(x, h0)
    states, grad = states.transpose(0, 1), grad.transpose(0, 1)  # (T, B, N) views
    carry_next, r_next, cut_next = torch.zeros_like(h0), torch.zeros_like(h0), None
    length = _block_length(steps, batch * channels)
    for start in range((steps - 1) // length * length, -1, -length):
        stop = min(steps, start + length)
        mask_block, reset_block = _slice(mask, start, stop), _slice(reset, start, stop)
        block = _Block(x, start, stop, accumulate)
        carry = block.carry(mask_block, reset_block)

        r = torch.empty_like(block.z)
        grad_block = grad[start:stop].to(accumulate)
        cuts = _cuts(reset, start, stop)
        for r_t, grad_t, carry_t, cut in zip(
            reversed(r.unbind(0)),
            reversed(grad_block.unbind(0)),
            reversed(carry.unbind(0)),
            reversed(cuts),
            strict=True,
        ):
            if cut_next is not None:
                r_next = torch.where(cut_next, 0.0, r_next)
            r_next = torch.addcmul(grad_t, carry_next, r_next, out=r_t)
            carry_next, cut_next = carry_t, cut
        carry_next, r_next = carry_next.clone(), r_next.clone()  # r is overwritten below

        # With s = sigmoid(min(v, 0)): g = s + max(v, 0), and g' = s - s^2 + 0.75 [v >= 0], exactly 1 for v >= 0.
        s = torch.clamp(block.candidate, max=0.0, out=torch.empty_like(r)).sigmoid_()
        difference = torch.clamp(block.candidate, min=0.0, out=torch.empty_like(r)).add_(s)
        slope = torch.addcmul(s, s, s, value=-1.0)
        slope.add_(torch.ge(block.candidate, 0.0, out=s), alpha=0.75)

        previous = states[start:stop].roll(1, 0) if reset_block is not None else states[start:stop]
        if reset_block is not None:
            previous[0] = h0 if start == 0 else states[start - 1]
            difference.sub_(torch.where(reset_block, INITIAL_STATE, previous))
        else:
            difference[1:].sub_(previous[:-1])
            difference[0].sub_(h0 if start == 0 else states[start - 1])

        r.mul_(block.z)
        grad_gate, grad_candidate = grad_x[:, start:stop].transpose(0, 1).chunk(2, dim=-1)
        slope.mul_(r)
        r.mul_(block.one_minus_z).mul_(difference)
        if mask_block is not None:
            r.masked_fill_(~mask_block, 0.0)
            slope.masked_fill_(~mask_block, 0.0)
        grad_gate.copy_(r)
        grad_candidate.copy_(slope)
    grad_h0 = carry_next * r_next
    if cut_next is not None:
        grad_h0 = torch.where(cut_next, 0.0, grad_h0)
    return grad_x, grad_h0.unsqueeze(1)


_KERNELS = {
    "torch": (_torch_forward, _torch_backward),
    "numba": (numba_forward, numba_backward),
    "triton": (triton_forward, triton_backward),
}


# --- The operator: torch.compile, torch.export and opcheck see one node with a shape rule and a gradient.

# The version names the contract. A second copy of this file in one process (code loaded from a Hub beside the
# installed package) finds the operator and uses it.
_NAMESPACE = "mingru_hf_v1"


def _flat(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 3 else tensor.flatten(2)


def _forward_impl(
    gate_and_candidate: Tensor,
    h0: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    forward, _ = _KERNELS[backend]
    states = forward(_flat(gate_and_candidate), _flat(h0), mask, reset, dtype)
    if gate_and_candidate.dim() == 3:
        return states
    return states.unflatten(2, (gate_and_candidate.shape[2] // 2, *gate_and_candidate.shape[3:]))


def _backward_impl(
    grad: Tensor,
    gate_and_candidate: Tensor,
    h0: Tensor | None,
    states: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _, backward = _KERNELS[backend]
    grad_x, grad_h0 = backward(_flat(grad), _flat(gate_and_candidate), _flat(h0), _flat(states), mask, reset)
    return grad_x.reshape(gate_and_candidate.shape), grad_h0.reshape(states[:, :1].shape)


def _forward_fake(gate_and_candidate, h0, mask, reset, backend, dtype):
    x = gate_and_candidate
    return x.new_empty((x.shape[0], x.shape[1], x.shape[2] // 2, *x.shape[3:]), dtype=dtype)


def _backward_fake(grad, gate_and_candidate, h0, states, mask, reset, backend):
    accumulate = _accumulation_dtype(gate_and_candidate)
    return (
        torch.empty_like(gate_and_candidate, memory_format=torch.contiguous_format),
        states.new_empty(states[:, :1].shape, dtype=accumulate),
    )


def _setup_context(ctx, inputs, output):
    gate_and_candidate, h0, mask, reset, backend, _ = inputs
    ctx.save_for_backward(gate_and_candidate, h0, mask, reset, output)
    ctx.backend = backend


def _autograd_backward(ctx, grad):
    gate_and_candidate, h0, mask, reset, states = ctx.saved_tensors
    backward = getattr(torch.ops, _NAMESPACE).scan_backward
    grad_x, grad_h0 = backward(grad, gate_and_candidate, h0, states, mask, reset, ctx.backend)
    return grad_x, None if h0 is None else grad_h0.to(h0.dtype), None, None, None, None


def _register() -> torch.library.Library | None:
    """Define the operator unless another copy of this file already has; the library must be kept alive."""
    if hasattr(getattr(torch.ops, _NAMESPACE), "scan"):
        return None
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    inputs = "Tensor gate_and_candidate, Tensor? h0, "
    flags = "Tensor? mask, Tensor? reset, str backend"
    library.define(f"scan({inputs}{flags}, ScalarType dtype) -> Tensor")
    library.define(f"scan_backward(Tensor grad, {inputs}Tensor states, {flags}) -> (Tensor, Tensor)")
    library.impl("scan", _forward_impl, "CompositeExplicitAutograd")
    library.impl("scan_backward", _backward_impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::scan", _forward_fake, lib=library)
    torch.library.register_fake(f"{_NAMESPACE}::scan_backward", _backward_fake, lib=library)
    torch.library.register_autograd(
        f"{_NAMESPACE}::scan", _autograd_backward, setup_context=_setup_context, lib=library
    )
    return library


_LIBRARY = _register()
_scan_op = getattr(torch.ops, _NAMESPACE).scan


__all__ = ["BACKENDS", "INITIAL_STATE", "initial_state", "mingru_scan", "scan_reference"]
