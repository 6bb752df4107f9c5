"""The MinGRU scan in torch's own operators: runs on any device and needs no other package.

The equation is that of `scan_reference`. Blocks of steps are copied, with the time axis first, into buffers that stay
in cache from one block to the next, so that each step is one in-place operator on a contiguous row.

Where a row is so small that calling an operator takes longer than its arithmetic, time is cut into chunks that run
side by side, as if they were more rows of the batch. Below, arrays are (steps, B, chunks, N) and flags
(steps, B, chunks, 1); if time is not cut, there is one chunk.

Legend: B batch, T time steps, N channels (trailing axes flattened into them).
"""

import math

import torch
from torch import Tensor

from .scan_reference import INITIAL_STATE, accumulation_dtype, first_state

# Elements of a buffer. On a CPU (per thread): few enough for the thread's cache, and enough to hide Python's overhead.
_BLOCK_ELEMENTS = 1 << 17
_DEVICE_BLOCK_ELEMENTS = 1 << 22
# If a row (B x N) has at most _SMALL_ROW elements, time is cut into about sqrt(T) chunks that run side by side; for
# longer rows the second pass over all steps costs more than it saves. Chunks x elements of a row stay within
# _CHUNKED_ROW. On a device a launch takes as long as some 100,000 elements, so only the number of launches matters.
_SMALL_ROW, _CHUNKED_ROW = 1 << 9, 1 << 14
_DEVICE_SMALL_ROW, _DEVICE_CHUNKED_ROW = 1 << 17, 1 << 22
_MIN_CHUNKS = 4
# A channel has a long memory if the average of its z over some window is below this threshold. A window samples
# up to 16 steps, at most 17 steps apart (an odd number, since inputs may be periodic).
_LONG_MEMORY_Z = 1 / 128
_LOOKS, _FARTHEST = 16, 17


class _Layout:
    """A range of time steps, which its methods view as (steps, B, chunks, ...)."""

    def __init__(self, start: int, stop: int, chunks: int):
        self.start, self.stop, self.chunks = start, stop, chunks

    def time_first(self, tensor: Tensor) -> Tensor:
        """(B, T, ...) -> (steps, B, chunks, ...)."""
        return tensor[:, self.start : self.stop].unflatten(1, (self.chunks, -1)).movedim(2, 0)

    def halves_first(self, x: Tensor) -> Tensor:
        """(B, T, 2N) -> (2, steps, B, chunks, N)."""
        return self.time_first(x.unflatten(2, (2, -1))).movedim(3, 0)

    def flags(self, flags: Tensor | None) -> Tensor | None:
        """(B, T) -> (steps, B, chunks, 1)."""
        return None if flags is None else self.time_first(flags.unsqueeze(-1))


def _layouts(states: Tensor) -> list[_Layout]:
    """Return one layout for all steps of (B, T, N), or one for the steps that form equal chunks and one for the rest.

    The rest, if there is one, is not cut into chunks.
    """
    batch, steps, channels = states.shape
    small, chunked = (_SMALL_ROW, _CHUNKED_ROW) if states.is_cpu else (_DEVICE_SMALL_ROW, _DEVICE_CHUNKED_ROW)
    row = batch * channels
    chunks = min(chunked // row, math.isqrt(steps)) if row <= small else 1
    if chunks < _MIN_CHUNKS:
        return [_Layout(0, steps, 1)]
    length = steps // chunks
    chunks = steps // length
    rest = [] if chunks * length == steps else [_Layout(chunks * length, steps, 1)]
    return [_Layout(0, chunks * length, chunks), *rest]


def _fill(array: Tensor, flags: Tensor | None, number: float) -> None:
    """Write the number into the flagged rows, whatever they hold."""
    if flags is not None and not array.is_cpu:  # nonzero would synchronise with the device
        array.masked_fill_(flags, number)
    elif flags is not None:
        array.view(-1, array.shape[-1]).index_fill_(0, flags.flatten().nonzero().squeeze(1), number)


class _Block:
    """Gates of a block of steps, each (steps, B, chunks, N) in the accumulation dtype; decay and drive in `dtype`."""

    def __init__(self, steps: int, like: Tensor, dtype: torch.dtype):
        shape = (2, steps, *like.shape[2:])
        self.inputs, self.sigmoids = (like.new_empty(shape, dtype=accumulation_dtype(like)) for _ in range(2))
        self.one_minus_z, self.candidate = self.inputs.unbind(0)
        self.z, self.sigmoid_candidate = self.sigmoids.unbind(0)
        self.decay, self.drive = self.one_minus_z, self.sigmoid_candidate
        self.is_wide = dtype != self.z.dtype
        if self.is_wide:
            self.decay, self.drive = like.new_empty(shape, dtype=dtype).unbind(0)
        # One row per step, unbound here so that the loops over time need not do it again for every block.
        self.decay_rows, self.drive_rows = self.decay.unbind(0), self.drive.unbind(0)
        self.cuts: list[Tensor | None] = [None] * steps
        self.passing: Tensor | None = None

    def load(self, x: Tensor, mask: Tensor | None, reset: Tensor | None, decay_only: bool) -> None:
        if not decay_only:
            torch.sigmoid(self.inputs.copy_(x), out=self.sigmoids)
            self.one_minus_z.neg_().sigmoid_()
        if decay_only or self.is_wide:
            self.decay.copy_(x[0]).neg_().sigmoid_()
        self.passing = None if mask is None else ~mask
        _fill(self.decay, self.passing, 1.0)
        if reset is not None:
            any_reset = reset.flatten(1).any(1).tolist() if reset.is_cpu else [True] * len(reset)
            self.cuts = [cut if any_ else None for cut, any_ in zip(reset.unbind(0), any_reset, strict=True)]


def _blocks(x, mask, reset, dtype, *, backwards=False, decay_only=False):
    """Yield slices of time and their gates, in buffers that the next block overwrites.

    decay_t = 1 - z_t is the factor of h_{t-1}, in `dtype`, and 1 where the step is masked (`passing`). `cuts` holds
    for each step the flags of the rows that are reset, or None if no row is (known on a CPU only). A reset is not
    expressed as a decay of 0, which would let NaN and Inf through.
    """
    steps, row_elements = x.shape[1], x[0, 0].numel()
    block_elements = _BLOCK_ELEMENTS * torch.get_num_threads() if x.is_cpu else _DEVICE_BLOCK_ELEMENTS
    length = max(1, min(steps, block_elements // row_elements))
    starts = range(0, steps, length)
    block = None
    for start in reversed(starts) if backwards else starts:
        now = slice(start, min(steps, start + length))
        if block is None or len(block.cuts) != now.stop - start:
            block = _Block(now.stop - start, x, dtype)
        flags = (None if flags is None else flags[now] for flags in (mask, reset))
        block.load(x[:, now], *flags, decay_only)
        yield now, block


def _forward_steps(x, mask, reset, h, states, product=None):
    """Write the states that follow h (B, chunks, N) and return the last one; multiply `product` by all decays."""
    for now, block in _blocks(x, mask, reset, h.dtype):
        # g(v) = max(v + 0.5, sigmoid(v)): the two curves touch at v = 0 and nowhere else.
        drive = block.sigmoid_candidate
        torch.maximum(drive, block.candidate.add_(0.5), out=drive).mul_(block.z)
        _fill(drive, block.passing, 0.0)
        if block.is_wide:
            drive = block.drive.copy_(drive)
        if product is not None:
            product *= block.decay.prod(0)
        for decay_t, drive_t, cut in zip(block.decay_rows, block.drive_rows, block.cuts, strict=True):
            if cut is not None:
                h = torch.where(cut, INITIAL_STATE, h)
            h = drive_t.addcmul_(decay_t, h)
        states[now] = drive
        h = h.clone()  # the next block overwrites it
    return h


def _add_start(x, mask, reset, start, states):
    """Add the contribution of the start (B, chunks, N) to states that were computed from a start of 0."""
    negligible = torch.finfo(states.dtype).eps / 8
    for now, block in _blocks(x, mask, reset, start.dtype, decay_only=True):
        for decay_t, cut in zip(block.decay_rows, block.cuts, strict=True):
            if cut is not None:
                start = torch.where(cut, 0.0, start)
            start = decay_t.mul_(start)
        states[now] += block.decay
        # The share of the start in the state never grows, so from here on rounding absorbs it.
        if x.is_cpu and (start.abs() <= states[now.stop - 1] * negligible).all():
            return
        start = start.clone()


def _copy(array: Tensor, dtype: torch.dtype) -> Tensor:
    return array.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _flow_back(block, grad, inflow):
    """Turn gradients of the outputs into full gradients of the states in place; return what flows to earlier steps.

    The full gradient r_t = dL/dh_t satisfies r_t = grad_t + decay_{t+1} r_{t+1}: the same scan, run backwards.
    """
    r = grad.unbind(0)
    r_next = r[-1].add_(inflow)
    for r_t, decay_next, cut_next in zip(r[-2::-1], block.decay_rows[:0:-1], block.cuts[:0:-1], strict=True):
        if cut_next is None:
            r_next = r_t.addcmul_(decay_next, r_next)
        else:
            r_next = r_t.copy_(torch.where(cut_next, r_t, torch.addcmul(r_t, decay_next, r_next)))
    outflow = block.decay_rows[0] * r_next
    return outflow if block.cuts[0] is None else torch.where(block.cuts[0], 0.0, outflow)


def _outflows(grad, x, mask, reset, inflow):
    """Return the gradient (B, chunks, N) that flows to the state before each chunk, and the product of its decays."""
    product = torch.ones_like(inflow)
    for now, block in _blocks(x, mask, reset, inflow.dtype, backwards=True, decay_only=True):
        inflow = _flow_back(block, _copy(grad[now], inflow.dtype), inflow)
        product *= block.decay.prod(0)
    return inflow, product


def _backward_steps(grad, x, mask, reset, start, states, inflow, grad_x):
    """Write the gradients of the inputs; return the one (B, chunks, N) that flows to the state before each chunk."""
    for now, block in _blocks(x, mask, reset, inflow.dtype, backwards=True):
        r = _copy(grad[now], inflow.dtype)
        inflow = _flow_back(block, r, inflow)
        dz = r.to(block.z.dtype).mul_(block.z)

        before = (start if now.start == 0 else states[now.start - 1]).to(block.z.dtype)
        previous = torch.cat([before.unsqueeze(0), states[now.start : now.stop - 1]])
        if reset is not None:
            _fill(previous, reset[now], INITIAL_STATE)
        rising = torch.ge(block.candidate, 0.0, out=block.z)
        sigmoid = block.sigmoid_candidate
        difference = torch.maximum(sigmoid, block.candidate.add_(0.5), out=block.candidate).sub_(previous)
        # g' = 1 for v >= 0, otherwise s - s^2, which is less than 1.
        slope = torch.maximum(sigmoid.addcmul_(sigmoid, sigmoid, value=-1.0), rising, out=sigmoid)

        slope.mul_(dz)
        torch.mul(difference, block.one_minus_z, out=block.z).mul_(dz)
        _fill(block.z, block.passing, 0.0)
        _fill(slope, block.passing, 0.0)
        grad_x[:, now] = block.sigmoids
    return inflow


def _chain(first, ends, products, cut):
    """Iterate h = end + product h from chunk to chunk, starting with `first` (B, N); a chunk with a reset forgets h.

    Returns the values that enter each chunk (B, chunks, N) and the value that leaves the last one (B, N).
    """
    starts = [first]
    for chunk, (end, product) in enumerate(zip(ends.unbind(1), products.unbind(1), strict=True)):
        whole = torch.addcmul(end, product, starts[-1])
        starts.append(whole if cut is None else torch.where(cut[:, chunk], end, whole))
    return torch.stack(starts[:-1], dim=1), starts[-1]


def _recurrence_dtype(x: Tensor, mask: Tensor | None) -> torch.dtype:
    """Return float64 if a channel of x (B, T, 2N) has a long memory, otherwise the accumulation dtype.

    In float32, 1 - z keeps few digits of a small z, and a state that hardly changes also hardly forgets errors.
    Devices other than the CPU always use the accumulation dtype, since the check would have to synchronise with them.
    """
    accumulate, steps = accumulation_dtype(x), x.shape[1]
    if not x.is_cpu or accumulate == torch.float64:
        return accumulate
    every = min(max(steps // _LOOKS, 1), _FARTHEST)
    z = x[:, ::every, : x.shape[2] // 2].to(accumulate).sigmoid()
    looks = min(z.shape[1], _LOOKS)
    is_real = z.new_ones(*z.shape[:2], 1) if mask is None else mask[:, ::every, None].to(accumulate)
    if mask is not None:
        z = torch.where(is_real > 0, z, 0.0)
    whole = z.shape[1] // looks * looks
    total, count = (t[:, :whole].unflatten(1, (-1, looks)).sum(2) for t in (z, is_real))  # (B, windows, N or 1)
    return torch.float64 if (total < _LONG_MEMORY_Z * count).any() else accumulate


def torch_forward(
    x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the states (B, T, N) in `dtype` and the last one (B, 1, N) unrounded, for x (B, T, 2N).

    The state before the first step is h0 (B, 1, N), or 0.5 if None.
    """
    channels = x.shape[2] // 2
    h = first_state(x, h0).squeeze(1).to(_recurrence_dtype(x, mask))  # (B, N)
    layouts = _layouts(x[..., :channels])
    # With chunks, `_add_start` still has to add to the states, which must not be rounded before that.
    states = x.new_empty((*x.shape[:2], channels), dtype=accumulation_dtype(x) if layouts[0].chunks > 1 else dtype)
    for layout in layouts:
        inputs = layout.halves_first(x), layout.flags(mask), layout.flags(reset)
        out = layout.time_first(states)
        if layout.chunks == 1:
            h = _forward_steps(*inputs, h.unsqueeze(1), out).squeeze(1)
        else:
            products = h.new_ones(out.shape[1:])
            ends = _forward_steps(*inputs, torch.zeros_like(products), out, products)
            starts, h = _chain(h, ends, products, None if reset is None else inputs[2].any(0))
            _add_start(*inputs, starts, out)
    return states.to(dtype), h.unsqueeze(1).to(accumulation_dtype(x))


def torch_backward(
    grad: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    states: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the pre-activations (B, T, 2N) and of h0 (B, 1, N); z and g are recomputed."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    first = first_state(x, h0).squeeze(1).to(_recurrence_dtype(x, mask))  # (B, N)
    inflow = torch.zeros_like(first) if grad_last is None else grad_last.squeeze(1).to(first.dtype)
    for layout in reversed(_layouts(states)):
        inputs = layout.halves_first(x), layout.flags(mask), layout.flags(reset)
        grad_piece, states_piece = layout.time_first(grad), layout.time_first(states)
        before = first if layout.start == 0 else states[:, layout.start - 1].to(first.dtype)
        starts = torch.cat([before.unsqueeze(1), states_piece[-1, :, :-1]], dim=1)
        if layout.chunks == 1:
            inflows = inflow.unsqueeze(1)
        else:
            cut = None if reset is None else inputs[2].any(0).flip(1)
            ends, products = _outflows(grad_piece, *inputs, torch.zeros_like(starts))
            inflows = _chain(inflow, ends.flip(1), products.flip(1), cut)[0].flip(1)
        outflows = _backward_steps(grad_piece, *inputs, starts, states_piece, inflows, layout.halves_first(grad_x))
        inflow = outflows[:, 0]
    return grad_x, inflow.unsqueeze(1).to(accumulation_dtype(x))


__all__ = ["torch_backward", "torch_forward"]
