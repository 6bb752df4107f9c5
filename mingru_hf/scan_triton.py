"""The MinGRU scan fused into Triton kernels for CUDA, forward and backward, in parallel over rows, channels and time.

The equation is that of `scan_reference`. Each step is a map of the state, h -> decay h + drive, and the composition of
two such maps is another such map, so the states follow from an associative scan over the maps. A program owns one row,
a block of channels and a chunk of the steps, and processes its chunk in tiles of (BLOCK_T, BLOCK_N): it loads a tile,
computes the gates, composes the maps along the tile's time axis and applies them to the state before the tile.

If rows x channels alone fill the GPU, the chunk is the whole sequence: a single pass moves each byte once. Otherwise
(long sequences, small batches) time is cut into chunks: a first pass composes the maps of each chunk into one summary,
a second pass scans these summaries for the state at each chunk boundary, and a third is the pass described above,
started from these states.

A GPU needs many bytes in flight. Triton copies the next tiles of a loop ahead into shared memory (cp.async) if the
loop sets `num_stages`, and the compiler keeps the loads of a tile together only if no step of the tile is masked. So
an incomplete last tile of a chunk is processed outside the loop.

Where z is small, decay = 1 - z keeps few digits of z, and a state that hardly changes also hardly forgets errors. So a
map also holds less = 1 - decay, as precise as z itself. From tile to tile the state changes by drive - less h, and the
rounding error of this sum is added to the next one (Kahan). Within a tile decay h + drive is precise enough: it rounds
only a few times, and the next tile does not inherit these errors.

A reset is a map that ignores its input. It is marked by decay = -1, which no sigmoid returns, and is applied by
selection instead of multiplication, so that not even a NaN crosses it.

State and accumulation are float32 (float64 for float64 inputs); the backward pass recomputes z and g and runs the
same scan in reverse. Offsets are 64 bits wide.

Tests check the results in Triton's interpreter on CPU tensors, and that every kernel compiles for sm_80 and sm_90 and
copies tiles ahead; the compiled PTX was run once in an emulator (LOG.md). Block sizes come from arithmetic, the
compiler's register counts and a simulation of its instructions: nothing here has been run or timed on a GPU yet.

Legend: B batch, T time steps, N channels (trailing axes flattened into them), C chunks of time.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from .scan_reference import accumulation_dtype

_OLDEST_TRITON = (3, 5)  # the version that comes with torch 2.9

try:
    import triton
    import triton.language as tl

    _version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    _import_problem = (
        None if _version >= _OLDEST_TRITON else f"triton {triton.__version__} is older than 3.5: pip install -U triton"
    )
except ImportError as error:
    _import_problem = f"triton is not installed ({error}): pip install triton"
except Exception as error:  # a broken installation fails in many ways, and none of them may break the package
    _import_problem = f"triton cannot be imported ({type(error).__name__}: {error})"

_AVAILABLE = _import_problem is None

# A tile of (steps, channels) has 512 elements, 8 x 64 if there are that many channels: each thread of the program's
# single warp holds two neighbouring channels and all steps of the tile, so that composing the maps involves no other
# thread. A warp has 64 threads on AMD's GPUs and 32 on NVIDIA's.
_TILE_ELEMENTS = 512
_MAX_BLOCK_T = 64
_MAX_BLOCK_N, _MIN_BLOCK_T = (128, 4) if torch.version.hip else (64, 8)
# With few programs and sequences too short to cut, the time that one program takes per step matters. Tiles of fewer
# channels need fewer instructions per step, though more in total, so they do not suit a busy GPU. With fewer than two
# programs of wide tiles per multiprocessor they are 1.3 to 4 times as fast in a simulation. The narrowest tiles, which
# load short pieces of memory, are used only if the GPU can run all programs at once, four warps per multiprocessor.
_NARROW_BLOCK_T = 16
_NARROW_BLOCKS_N = (8, 16)
_PROGRAMS_PER_PROCESSOR_IF_NARROW = 2
_WARPS_AT_A_TIME = 4
# Tiles in flight, including the one being processed, during which the next ones are copied into shared memory. Two if
# a multiprocessor has less shared memory than eight backward programs with three tiles each take.
_STAGES = 3
_SHARED_MEMORY_FOR_STAGES = 160_000  # bytes
# Programs, of one warp each, that keep one multiprocessor busy.
_PROGRAMS_PER_PROCESSOR = 12
# Cutting time costs two more kernels and three values per channel and chunk, and the first pass reads the inputs once
# more. So it does not pay for short sequences or for only two chunks, and a chunk must have several tiles.
_MIN_TILES_TO_CUT = 64
_MIN_TILES_PER_CHUNK = 4
_MIN_CHUNKS = 3
# Tiles (chunks, channels) of the pass over the summaries, from few chunks to many: only rows x channels run in
# parallel in this pass, and the more chunks there are, the fewer rows x channels there are.
_SUMMARY_BLOCKS = ((32, 32), (128, 8), (512, 2))
# Set explicitly because Triton 3.9 warns if it is not.
_OPTIONS = {"enable_fp_fusion": True}


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Return why the kernels cannot run, worded for an error message, or None if they can.

    Args:
        device: device of the tensors; if None, only the installation is checked.
    """
    if not _AVAILABLE:
        return _import_problem
    if device is None or device.type == "cuda" or _interpreted():
        return None
    return f"the Triton kernels need CUDA tensors, got {device.type}"


def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set before this file was imported."""
    return not isinstance(_forward_kernel, triton.JITFunction)


def _jit(function):
    """Apply triton.jit; return the function unchanged if Triton is not available.

    A new sequence length does not cause a recompilation, unless the number of channels is not a multiple of 16: then
    the strides of the rows, which determine how data are loaded, may cause one or two.
    """
    if not _AVAILABLE:
        return function
    lengths = ["num_steps", "chunk_steps", "num_chunks", "num_blocks", "mask_stride_b", "reset_stride_b"]
    return triton.jit(function, do_not_specialize=lengths)


# --- Building blocks of the kernels. All tiles are (BLOCK_T, BLOCK_N), time first. A tile is WHOLE if no step of it
# --- lies beyond the chunk's end: then no step is masked, and the compiler keeps the loads of the tile together.


@_jit
def _exp_minus(x):
    """Compute exp(-x); returning 0 for results below the normal numbers saves three instructions of four."""
    return tl.exp2(x * -1.4426950408889634)


@_jit
def _update_gate(gate):
    """Compute z = sigmoid(gate) and 1 - z from one exponential, without overflow and without subtracting from 1."""
    e = _exp_minus(tl.abs(gate))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(gate >= 0, large, small), tl.where(gate >= 0, small, large)


@_jit
def _candidate(value):
    """Compute g(value) = value + 0.5 where value >= 0, sigmoid(value) elsewhere, and its derivative."""
    e = _exp_minus(tl.abs(value))
    inverse = 1.0 / (1.0 + e)
    small = e * inverse
    return tl.where(value >= 0, value + 0.5, small), tl.where(value >= 0, 1.0, small * inverse)


@_jit
def _compose(decay_1, less_1, drive_1, decay_2, less_2, drive_2):
    """Compose the map of step 1 with that of step 2, which follows."""
    return decay_1 * decay_2, decay_1 * less_2 + less_1, decay_2 * drive_1 + drive_2


@_jit
def _compose_reset(decay_1, less_1, drive_1, decay_2, less_2, drive_2):
    """Compose the map of step 1 with that of step 2, where a negative decay marks a map that ignores its input."""
    decay, less, drive = _compose(decay_1, less_1, drive_1, decay_2, less_2, drive_2)
    forgets = decay_2 < 0
    decay = tl.where(decay_1 < 0, decay_1, decay)
    return tl.where(forgets, decay_2, decay), tl.where(forgets, less_2, less), tl.where(forgets, drive_2, drive)


@_jit
def _scan(decay, less, drive, HAS_RESET: tl.constexpr):
    """Return the maps from the state before the tile to the state after each of its steps."""
    if HAS_RESET:
        decay, less, drive = tl.associative_scan((decay, less, drive), 0, _compose_reset)
    else:
        decay, less, drive = tl.associative_scan((decay, less, drive), 0, _compose)
    return decay, less, drive


@_jit
def _apply(decay, drive, state, HAS_RESET: tl.constexpr):
    """Apply the maps of a tile's steps to the state before the tile."""
    result = decay * state + drive
    if HAS_RESET:
        result = tl.where(decay < 0, drive, result)
    return result


@_jit
def _advance(decay, less, drive, state, low, HAS_RESET: tl.constexpr):
    """Apply the map of a tile to the state before it and the rounding error `low` of that state (BLOCK_N)."""
    slow = decay >= 0.5
    change = drive - less * state + low
    moved = state + change
    low = tl.where(slow, change - (moved - state), 0.0)
    return tl.where(slow, moved, _apply(decay, drive, state, HAS_RESET)), low


@_jit
def _append(total_decay, total_less, total_drive, low, decay, less, drive, HAS_RESET: tl.constexpr):
    """Compose the map of all tiles so far with that of the next one; `low` is the rounding error of the drive."""
    total_drive, low = _advance(decay, less, drive, total_drive, low, HAS_RESET)
    forgets = (decay < 0) | (total_decay < 0)
    total_less = total_decay * less + total_less
    # As long as `total_less` is small, it holds the digits that a long product of decays loses.
    product = tl.where(decay >= 0.5, total_decay - total_decay * less, total_decay * decay)
    total_decay = tl.where(total_less <= 0.5, 1.0 - total_less, product)
    if HAS_RESET:
        total_decay = tl.where(forgets, -1.0, total_decay)
    return total_decay, total_less, total_drive, low


@_jit
def _last(tile, BLOCK_T: tl.constexpr):
    """Return the last row of a tile, as a sum with zeros in place of the other rows, whatever these hold."""
    is_last = tl.arange(0, BLOCK_T) == BLOCK_T - 1
    return tl.sum(tl.where(is_last[:, None], tile, 0.0), axis=0)


@_jit
def _locate(num_chunks, num_blocks):
    """Return row (64 bits wide, as are all offsets computed from it), chunk and channel block of this program."""
    pid = tl.program_id(0)
    return (pid // num_blocks // num_chunks).to(tl.int64), pid // num_blocks % num_chunks, pid % num_blocks


@_jit
def _channels(block, BLOCK_N: tl.constexpr):
    """Return the channels of a block, with at most two neighbours per thread: see _TILE_ELEMENTS."""
    return tl.max_contiguous(block * BLOCK_N + tl.arange(0, BLOCK_N), [2])


@_jit
def _load(pointer, t, stride_t, n, inside, ACCUMULATE: tl.constexpr):
    """Load a tile of steps t and channels n, with zeros where `inside` is False."""
    offsets = t.to(tl.int64)[:, None] * stride_t + n[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(ACCUMULATE)


@_jit
def _flags(pointer, t, stride_t, valid):
    """Load the flags of steps t (BLOCK_T, 1), False where the step is not valid."""
    return (tl.load(pointer + t.to(tl.int64) * stride_t, mask=valid, other=0) != 0)[:, None]


@_jit
def _initial(start, n, inside, HAS_START: tl.constexpr, DEFAULT: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Load the initial value of a scan in the shape of n; DEFAULT is g(0) = 0.5 for a state, 0 for a gradient."""
    if HAS_START:
        state = tl.load(start + n, mask=inside, other=0.0).to(ACCUMULATE)
    else:
        state = tl.full(n.shape, DEFAULT, ACCUMULATE)
    return state


@_jit
def _maps(
    x,
    mask,
    reset,
    x_stride_t,
    mask_stride_t,
    reset_stride_t,
    t,
    stop,
    n,
    num_channels,
    WHOLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Return the steps of a tile as maps h -> decay h + drive, less = 1 - decay; from `stop` on, the identity."""
    valid = WHOLE | (t < stop)
    keep = valid[:, None]
    inside = keep & (n < num_channels)[None, :]
    z, one_minus_z = _update_gate(_load(x, t, x_stride_t, n, inside, ACCUMULATE))
    g, _ = _candidate(_load(x + num_channels, t, x_stride_t, n, inside, ACCUMULATE))
    if HAS_MASK:
        keep = keep & _flags(mask, t, mask_stride_t, valid)
    decay = tl.where(keep, one_minus_z, 1.0)
    less = tl.where(keep, z, 0.0)
    drive = tl.where(keep, z * g, 0.0)
    if HAS_RESET:
        forget = _flags(reset, t, reset_stride_t, valid)
        drive = tl.where(forget, 0.5 * decay + drive, drive)
        decay = tl.where(forget, -1.0, decay)
    return decay, less, drive


@_jit
def _decays(
    x,
    mask,
    reset,
    x_stride_t,
    mask_stride_t,
    reset_stride_t,
    t,
    valid,
    n,
    num_channels,
    WHOLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Return only decay and less = 1 - decay: 1 and 0 where a step is not valid (if WHOLE, its data exist anyway)."""
    keep = valid[:, None]
    inside = (WHOLE | valid)[:, None] & (n < num_channels)[None, :]
    z, one_minus_z = _update_gate(_load(x, t, x_stride_t, n, inside, ACCUMULATE))
    if HAS_MASK:
        keep = keep & _flags(mask, t, mask_stride_t, valid)
    decay = tl.where(keep, one_minus_z, 1.0)
    if HAS_RESET:
        decay = tl.where(_flags(reset, t, reset_stride_t, valid), -1.0, decay)
    return decay, tl.where(keep, z, 0.0)


# --- The kernels.


@_jit
def _forward_tile(
    x,
    mask,
    reset,
    states,
    x_stride_t,
    mask_stride_t,
    reset_stride_t,
    t_0,
    stop,
    n,
    num_channels,
    h,
    low,
    WHOLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the states of a tile; return the last of them and its rounding error."""
    t = t_0 + tl.arange(0, BLOCK_T)
    decay, less, drive = _maps(
        x, mask, reset, x_stride_t, mask_stride_t, reset_stride_t, t, stop, n, num_channels,
        WHOLE, HAS_MASK, HAS_RESET, ACCUMULATE,
    )  # fmt: skip
    decay, less, drive = _scan(decay, less, drive, HAS_RESET)
    tile = _apply(decay, drive, h[None, :], HAS_RESET)
    offsets = t.to(tl.int64)[:, None] * num_channels + n[None, :]
    inside = (WHOLE | (t < stop))[:, None] & (n < num_channels)[None, :]
    tl.store(states + offsets, tile.to(states.dtype.element_ty), mask=inside)
    decay, less, drive = _last(decay, BLOCK_T), _last(less, BLOCK_T), _last(drive, BLOCK_T)
    return _advance(decay, less, drive, h, low, HAS_RESET)


@_jit
def _forward_summary_tile(
    x,
    mask,
    reset,
    x_stride_t,
    mask_stride_t,
    reset_stride_t,
    t_0,
    stop,
    n,
    num_channels,
    total_decay,
    total_less,
    total_drive,
    low,
    WHOLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Append the map of a tile to that of the steps before it."""
    t = t_0 + tl.arange(0, BLOCK_T)
    decay, less, drive = _maps(
        x, mask, reset, x_stride_t, mask_stride_t, reset_stride_t, t, stop, n, num_channels,
        WHOLE, HAS_MASK, HAS_RESET, ACCUMULATE,
    )  # fmt: skip
    decay, less, drive = _scan(decay, less, drive, HAS_RESET)
    return _append(
        total_decay, total_less, total_drive, low,
        _last(decay, BLOCK_T), _last(less, BLOCK_T), _last(drive, BLOCK_T), HAS_RESET,
    )  # fmt: skip


@_jit
def _forward_kernel(
    x,
    h0,
    mask,
    reset,
    boundaries,
    states,
    last,
    x_stride_b,
    x_stride_t,
    h0_stride_b,
    mask_stride_b,
    mask_stride_t,
    reset_stride_b,
    reset_stride_t,
    num_steps,
    num_channels,
    chunk_steps,
    num_chunks,
    num_blocks,
    HAS_H0: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESET: tl.constexpr,
    CHUNKED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the states (B, T, N) of one chunk from the state before it, and the last state of all (B, N) unrounded."""
    row, chunk, block = _locate(num_chunks, num_blocks)
    n = _channels(block, BLOCK_N)
    x += row * x_stride_b
    mask += row * mask_stride_b
    reset += row * reset_stride_b
    states += row * num_steps * num_channels
    if CHUNKED:
        boundaries += (row * (num_chunks + 1) + chunk) * num_channels
        h = tl.load(boundaries + n, mask=n < num_channels, other=0.0)
    else:
        h = _initial(h0 + row * h0_stride_b, n, n < num_channels, HAS_H0, 0.5, ACCUMULATE)
    low = tl.full([BLOCK_N], 0.0, ACCUMULATE)
    start = chunk * chunk_steps
    stop = tl.minimum(start + chunk_steps, num_steps)
    whole = start + (stop - start) // BLOCK_T * BLOCK_T
    for t_0 in tl.range(start, whole, BLOCK_T, num_stages=STAGES):
        h, low = _forward_tile(
            x, mask, reset, states, x_stride_t, mask_stride_t, reset_stride_t, t_0, stop, n, num_channels, h, low,
            True, HAS_MASK, HAS_RESET, ACCUMULATE, BLOCK_T,
        )  # fmt: skip
    if whole < stop:
        h, low = _forward_tile(
            x, mask, reset, states, x_stride_t, mask_stride_t, reset_stride_t, whole, stop, n, num_channels, h, low,
            False, HAS_MASK, HAS_RESET, ACCUMULATE, BLOCK_T,
        )  # fmt: skip
    if stop == num_steps:
        tl.store(last + row * num_channels + n, h, mask=n < num_channels)


@_jit
def _forward_summary_kernel(
    x,
    mask,
    reset,
    decays,
    lesses,
    drives,
    x_stride_b,
    x_stride_t,
    mask_stride_b,
    mask_stride_t,
    reset_stride_b,
    reset_stride_t,
    num_steps,
    num_channels,
    chunk_steps,
    num_chunks,
    num_blocks,
    HAS_MASK: tl.constexpr,
    HAS_RESET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the map of each chunk from the state before it to the state after it: decays, lesses, drives (B, C, N)."""
    row, chunk, block = _locate(num_chunks, num_blocks)
    n = _channels(block, BLOCK_N)
    x += row * x_stride_b
    mask += row * mask_stride_b
    reset += row * reset_stride_b
    total_decay = tl.full([BLOCK_N], 1.0, ACCUMULATE)
    total_less = tl.full([BLOCK_N], 0.0, ACCUMULATE)
    total_drive = tl.full([BLOCK_N], 0.0, ACCUMULATE)
    low = tl.full([BLOCK_N], 0.0, ACCUMULATE)
    start = chunk * chunk_steps
    stop = tl.minimum(start + chunk_steps, num_steps)
    whole = start + (stop - start) // BLOCK_T * BLOCK_T
    for t_0 in tl.range(start, whole, BLOCK_T, num_stages=STAGES):
        total_decay, total_less, total_drive, low = _forward_summary_tile(
            x, mask, reset, x_stride_t, mask_stride_t, reset_stride_t, t_0, stop, n, num_channels,
            total_decay, total_less, total_drive, low, True, HAS_MASK, HAS_RESET, ACCUMULATE, BLOCK_T,
        )  # fmt: skip
    if whole < stop:
        total_decay, total_less, total_drive, low = _forward_summary_tile(
            x, mask, reset, x_stride_t, mask_stride_t, reset_stride_t, whole, stop, n, num_channels,
            total_decay, total_less, total_drive, low, False, HAS_MASK, HAS_RESET, ACCUMULATE, BLOCK_T,
        )  # fmt: skip
    offsets = (row * num_chunks + chunk) * num_channels + n
    tl.store(decays + offsets, total_decay, mask=n < num_channels)
    tl.store(lesses + offsets, total_less, mask=n < num_channels)
    tl.store(drives + offsets, total_drive, mask=n < num_channels)


@_jit
def _boundary_kernel(
    decays,
    lesses,
    drives,
    start,
    boundaries,
    start_stride_b,
    num_channels,
    num_chunks,
    num_blocks,
    HAS_START: tl.constexpr,
    HAS_RESET: tl.constexpr,
    REVERSE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the values at the chunk boundaries (B, C + 1, N): states, or gradients from the end to the start."""
    row, _, block = _locate(1, num_blocks)
    n = _channels(block, BLOCK_N)
    decays += row * num_chunks * num_channels
    lesses += row * num_chunks * num_channels
    drives += row * num_chunks * num_channels
    boundaries += row * (num_chunks + 1) * num_channels
    start += row * start_stride_b
    state = _initial(start, n, n < num_channels, HAS_START, 0.0 if REVERSE else 0.5, ACCUMULATE)
    low = tl.full([BLOCK_N], 0.0, ACCUMULATE)
    for first in range(0, num_chunks + 1, BLOCK_C):
        done = first + tl.arange(0, BLOCK_C)  # number of chunks before this boundary; the last one is done - 1
        valid = (done > 0) & (done <= num_chunks)
        inside = valid[:, None] & (n < num_channels)[None, :]
        if REVERSE:
            chunk = num_chunks - done
            boundary = num_chunks - done
        else:
            chunk = done - 1
            boundary = done
        decay = tl.where(valid[:, None], _load(decays, chunk, num_channels, n, inside, ACCUMULATE), 1.0)
        less = _load(lesses, chunk, num_channels, n, inside, ACCUMULATE)
        drive = _load(drives, chunk, num_channels, n, inside, ACCUMULATE)
        decay, less, drive = _scan(decay, less, drive, HAS_RESET)
        tile, _rounding = _advance(decay, less, drive, state[None, :], 0.0, HAS_RESET)
        inside = (done <= num_chunks)[:, None] & (n < num_channels)[None, :]
        tl.store(boundaries + boundary.to(tl.int64)[:, None] * num_channels + n[None, :], tile, mask=inside)
        decay, less, drive = _last(decay, BLOCK_C), _last(less, BLOCK_C), _last(drive, BLOCK_C)
        state, low = _advance(decay, less, drive, state, low, HAS_RESET)


@_jit
def _backward_tile(
    grad,
    x,
    states,
    mask,
    reset,
    grad_x,
    initial,
    grad_stride_t,
    x_stride_t,
    states_stride_t,
    mask_stride_t,
    reset_stride_t,
    t_0,
    stop,
    num_steps,
    n,
    num_channels,
    flow,
    low,
    WHOLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the gradients of a tile's pre-activations.

    Returns the gradient that flows to the state before the tile, and its rounding error.
    """
    index = tl.arange(0, BLOCK_T)
    t = t_0 + BLOCK_T - 1 - index
    valid = WHOLE | (t < stop)
    keep = valid[:, None]
    inside = keep & (n < num_channels)[None, :]

    # The decay of the following step, by a second load of the same tile, whose data are in the cache. For the tile's
    # latest step, `flow` already includes this decay.
    after = tl.minimum(t + 1, num_steps - 1)
    decay, less = _decays(
        x, mask, reset, x_stride_t, mask_stride_t, reset_stride_t, after, (index > 0) & (WHOLE | (t + 1 < stop)), n,
        num_channels, WHOLE, HAS_MASK, HAS_RESET, ACCUMULATE,
    )  # fmt: skip
    decay, less, drive = _scan(decay, less, _load(grad, t, grad_stride_t, n, inside, ACCUMULATE), HAS_RESET)
    r = _apply(decay, drive, flow[None, :], HAS_RESET)

    z, one_minus_z = _update_gate(_load(x, t, x_stride_t, n, inside, ACCUMULATE))
    g, slope = _candidate(_load(x + num_channels, t, x_stride_t, n, inside, ACCUMULATE))
    previous = _load(states, tl.maximum(t - 1, 0), states_stride_t, n, inside, ACCUMULATE)
    previous = tl.where((t > 0)[:, None], previous, initial[None, :])
    if HAS_MASK:
        keep = keep & _flags(mask, t, mask_stride_t, valid)
    step_decay = tl.where(keep, one_minus_z, 1.0)
    step_less = tl.where(keep, z, 0.0)
    if HAS_RESET:
        forget = _flags(reset, t, reset_stride_t, valid)
        previous = tl.where(forget, 0.5, previous)
        step_decay = tl.where(forget, -1.0, step_decay)
    # The map from this tile's end to the state before it.
    decay, less, drive = _last(decay, BLOCK_T), _last(less, BLOCK_T), _last(drive, BLOCK_T)
    decay, less, drive, _ = _append(
        decay, less, drive, 0.0, _last(step_decay, BLOCK_T), _last(step_less, BLOCK_T), 0.0, HAS_RESET
    )
    flow, low = _advance(decay, less, drive, flow, low, HAS_RESET)

    r = r * z
    grad_gate = tl.where(keep, r * one_minus_z * (g - previous), 0.0)
    grad_candidate = tl.where(keep, r * slope, 0.0)
    offsets = t.to(tl.int64)[:, None] * (2 * num_channels) + n[None, :]
    tl.store(grad_x + offsets, grad_gate.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_x + num_channels + offsets, grad_candidate.to(grad_x.dtype.element_ty), mask=inside)
    return flow, low


@_jit
def _backward_kernel(
    grad,
    grad_last,
    x,
    h0,
    states,
    mask,
    reset,
    boundaries,
    grad_x,
    grad_h0,
    grad_stride_b,
    grad_stride_t,
    x_stride_b,
    x_stride_t,
    h0_stride_b,
    states_stride_b,
    states_stride_t,
    mask_stride_b,
    mask_stride_t,
    reset_stride_b,
    reset_stride_t,
    num_steps,
    num_channels,
    chunk_steps,
    num_chunks,
    num_blocks,
    HAS_GRAD_LAST: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESET: tl.constexpr,
    CHUNKED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the gradients (B, T, 2N) of one chunk's pre-activations, from the gradient that flows back across its end.

    The full gradient r_t = dL/dh_t satisfies r_t = grad_t + decay_{t+1} r_{t+1}; rows of a tile go back in time.
    """
    row, chunk, block = _locate(num_chunks, num_blocks)
    n = _channels(block, BLOCK_N)
    channel = n < num_channels
    grad += row * grad_stride_b
    x += row * x_stride_b
    states += row * states_stride_b
    mask += row * mask_stride_b
    reset += row * reset_stride_b
    grad_x += row * num_steps * 2 * num_channels
    initial = _initial(h0 + row * h0_stride_b, n, channel, HAS_H0, 0.5, ACCUMULATE)
    if CHUNKED:
        boundaries += (row * (num_chunks + 1) + chunk + 1) * num_channels
        flow = tl.load(boundaries + n, mask=channel, other=0.0)  # dL/dh_t - grad_t for the chunk's last step t
    else:
        flow = _initial(grad_last + row * num_channels, n, channel, HAS_GRAD_LAST, 0.0, ACCUMULATE)
    low = tl.full([BLOCK_N], 0.0, ACCUMULATE)
    start = chunk * chunk_steps
    stop = tl.minimum(start + chunk_steps, num_steps)
    whole = start + (stop - start) // BLOCK_T * BLOCK_T
    if whole < stop:
        flow, low = _backward_tile(
            grad, x, states, mask, reset, grad_x, initial, grad_stride_t, x_stride_t, states_stride_t, mask_stride_t,
            reset_stride_t, whole, stop, num_steps, n, num_channels, flow, low,
            False, HAS_MASK, HAS_RESET, ACCUMULATE, BLOCK_T,
        )  # fmt: skip
    for tile in tl.range((whole - start) // BLOCK_T, num_stages=STAGES):
        flow, low = _backward_tile(
            grad, x, states, mask, reset, grad_x, initial, grad_stride_t, x_stride_t, states_stride_t, mask_stride_t,
            reset_stride_t, whole - (tile + 1) * BLOCK_T, stop, num_steps, n, num_channels, flow, low,
            True, HAS_MASK, HAS_RESET, ACCUMULATE, BLOCK_T,
        )  # fmt: skip
    if not CHUNKED:
        tl.store(grad_h0 + row * num_channels + n, flow, mask=channel)


@_jit
def _backward_summary_tile(
    grad,
    x,
    mask,
    reset,
    grad_stride_t,
    x_stride_t,
    mask_stride_t,
    reset_stride_t,
    t_0,
    stop,
    n,
    num_channels,
    total_decay,
    total_less,
    total_drive,
    low,
    WHOLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Append the map of a tile, backwards in time, to that of the steps after it."""
    t = t_0 + BLOCK_T - 1 - tl.arange(0, BLOCK_T)
    valid = WHOLE | (t < stop)
    inside = valid[:, None] & (n < num_channels)[None, :]
    decay, less = _decays(
        x, mask, reset, x_stride_t, mask_stride_t, reset_stride_t, t, valid, n, num_channels,
        WHOLE, HAS_MASK, HAS_RESET, ACCUMULATE,
    )  # fmt: skip
    drive = decay * _load(grad, t, grad_stride_t, n, inside, ACCUMULATE)
    if HAS_RESET:
        drive = tl.where(decay < 0, 0.0, drive)
    decay, less, drive = _scan(decay, less, drive, HAS_RESET)
    return _append(
        total_decay, total_less, total_drive, low,
        _last(decay, BLOCK_T), _last(less, BLOCK_T), _last(drive, BLOCK_T), HAS_RESET,
    )  # fmt: skip


@_jit
def _backward_summary_kernel(
    grad,
    x,
    mask,
    reset,
    decays,
    lesses,
    drives,
    grad_stride_b,
    grad_stride_t,
    x_stride_b,
    x_stride_t,
    mask_stride_b,
    mask_stride_t,
    reset_stride_b,
    reset_stride_t,
    num_steps,
    num_channels,
    chunk_steps,
    num_chunks,
    num_blocks,
    HAS_MASK: tl.constexpr,
    HAS_RESET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the map of each chunk from the gradient that enters at its end to the gradient that leaves at its start.

    The results are (B, C, N), as in `_forward_summary_kernel`.
    """
    row, chunk, block = _locate(num_chunks, num_blocks)
    n = _channels(block, BLOCK_N)
    grad += row * grad_stride_b
    x += row * x_stride_b
    mask += row * mask_stride_b
    reset += row * reset_stride_b
    total_decay = tl.full([BLOCK_N], 1.0, ACCUMULATE)
    total_less = tl.full([BLOCK_N], 0.0, ACCUMULATE)
    total_drive = tl.full([BLOCK_N], 0.0, ACCUMULATE)
    low = tl.full([BLOCK_N], 0.0, ACCUMULATE)
    start = chunk * chunk_steps
    stop = tl.minimum(start + chunk_steps, num_steps)
    whole = start + (stop - start) // BLOCK_T * BLOCK_T
    if whole < stop:
        total_decay, total_less, total_drive, low = _backward_summary_tile(
            grad, x, mask, reset, grad_stride_t, x_stride_t, mask_stride_t, reset_stride_t, whole, stop, n,
            num_channels, total_decay, total_less, total_drive, low, False, HAS_MASK, HAS_RESET, ACCUMULATE, BLOCK_T,
        )  # fmt: skip
    for tile in tl.range((whole - start) // BLOCK_T, num_stages=STAGES):
        total_decay, total_less, total_drive, low = _backward_summary_tile(
            grad, x, mask, reset, grad_stride_t, x_stride_t, mask_stride_t, reset_stride_t,
            whole - (tile + 1) * BLOCK_T, stop, n, num_channels, total_decay, total_less, total_drive, low,
            True, HAS_MASK, HAS_RESET, ACCUMULATE, BLOCK_T,
        )  # fmt: skip
    offsets = (row * num_chunks + chunk) * num_channels + n
    tl.store(decays + offsets, total_decay, mask=n < num_channels)
    tl.store(lesses + offsets, total_less, mask=n < num_channels)
    tl.store(drives + offsets, total_drive, mask=n < num_channels)


# --- The functions that launch the kernels.


def triton_forward(
    gate_and_candidate: Tensor,
    h0: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute the states, h_t = (1 - z_t) h_{t-1} + z_t g(candidate_t), in one to three fused kernels.

    Args:
        gate_and_candidate: (B, T, 2N) pre-activations, the gate half first, float16, bfloat16, float32 or float64.
            Rows and steps may have any strides; if channels are not contiguous, a copy is made.
        h0: (B, 1, N) state before step 0; g(0) = 0.5 if None.
        mask: (B, T) boolean; where False the state passes through the step unchanged.
        reset: (B, T) boolean; where True the state is set to 0.5 before this step, before the mask is applied.
        dtype: dtype of the returned states.

    Returns:
        (B, T, N) states h_1..h_T, contiguous; (B, 1, N) the last one in float32 (float64 for float64 inputs).

    Cost: reads the inputs once and writes the states once; if time is cut into chunks, reads the inputs once more.
    """
    x = _channels_last(gate_and_candidate)
    states = x.new_empty((x.shape[0], x.shape[1], x.shape[2] // 2), dtype=dtype)
    assert states.numel() > 0
    call = _Call(x, h0, mask, reset)
    last = x.new_empty((x.shape[0], 1, states.shape[2]), dtype=call.dtype)
    with call.device:
        boundaries = states
        if call.num_chunks > 1:
            decays, lesses, drives, boundaries = call.summaries()
            _forward_summary_kernel[call.grid](
                x, call.mask, call.reset, decays, lesses, drives, *call.x_strides, *call.flag_strides,
                *call.sizes, HAS_MASK=call.has_mask, HAS_RESET=call.has_reset, **call.blocks,
            )  # fmt: skip
            call.boundaries(decays, lesses, drives, call.h0 if call.has_h0 else None, boundaries, reverse=False)
        _forward_kernel[call.grid](
            x, call.h0, call.mask, call.reset, boundaries, states, last, *call.x_strides, call.h0_stride,
            *call.flag_strides, *call.sizes, HAS_H0=call.has_h0, HAS_MASK=call.has_mask, HAS_RESET=call.has_reset,
            CHUNKED=call.num_chunks > 1, **call.blocks,
        )  # fmt: skip
    return states, last


def triton_backward(
    grad: Tensor,
    grad_last: Tensor | None,
    gate_and_candidate: Tensor,
    h0: Tensor | None,
    states: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the recurrence; z and g are recomputed from the pre-activations.

    Args:
        grad: (B, T, N) gradient of the states.
        grad_last: (B, 1, N) gradient of the separately returned last state; 0 if None.
        gate_and_candidate, h0, mask, reset: as given to `triton_forward`.
        states: (B, T, N) states that `triton_forward` returned.

    Returns:
        Gradient (B, T, 2N) of the pre-activations in their dtype, contiguous, and (B, 1, N) of the initial state in
        float32 (float64 for float64 inputs).

    Cost: reads inputs, states and gradient once and writes the gradient once; if time is cut into chunks, reads gates
    and gradient once more.
    """
    x, grad, states = (_channels_last(tensor) for tensor in (gate_and_candidate, grad, states))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    assert states.numel() > 0
    call = _Call(x, h0, mask, reset)
    grad_h0 = x.new_empty((x.shape[0], 1, states.shape[2]), dtype=call.dtype)
    has_grad_last = grad_last is not None
    if has_grad_last:
        grad_last = grad_last.contiguous()
    with call.device:
        boundaries = grad_h0
        if call.num_chunks > 1:
            decays, lesses, drives, boundaries = call.summaries()
            _backward_summary_kernel[call.grid](
                grad, x, call.mask, call.reset, decays, lesses, drives, grad.stride(0), grad.stride(1),
                *call.x_strides, *call.flag_strides, *call.sizes, HAS_MASK=call.has_mask, HAS_RESET=call.has_reset,
                **call.blocks,
            )  # fmt: skip
            call.boundaries(decays, lesses, drives, grad_last, boundaries, reverse=True)
            grad_h0.copy_(boundaries[:, :1])
        _backward_kernel[call.grid](
            grad, grad_last if has_grad_last else grad, x, call.h0, states, call.mask, call.reset, boundaries, grad_x,
            grad_h0, grad.stride(0), grad.stride(1), *call.x_strides, call.h0_stride, states.stride(0),
            states.stride(1), *call.flag_strides, *call.sizes, HAS_GRAD_LAST=has_grad_last, HAS_H0=call.has_h0,
            HAS_MASK=call.has_mask, HAS_RESET=call.has_reset, CHUNKED=call.num_chunks > 1, **call.blocks,
        )  # fmt: skip
    return grad_x, grad_h0


class _Call:
    """The arguments that both directions pass to kernels; an absent tensor is replaced by one that is never read."""

    def __init__(self, x: Tensor, h0: Tensor | None, mask: Tensor | None, reset: Tensor | None):
        self.x = x
        self.has_h0, self.has_mask, self.has_reset = h0 is not None, mask is not None, reset is not None
        self.h0 = _channels_last(h0) if self.has_h0 else x
        self.mask = mask.view(torch.uint8) if self.has_mask else x
        self.reset = reset.view(torch.uint8) if self.has_reset else x
        self.x_strides = x.stride()[:2]
        self.h0_stride = self.h0.stride(0) if self.has_h0 else 0
        self.flag_strides = (
            *(self.mask.stride() if self.has_mask else (0, 0)),
            *(self.reset.stride() if self.has_reset else (0, 0)),
        )
        batch, steps, channels = x.shape[0], x.shape[1], x.shape[2] // 2
        self.dtype = accumulation_dtype(x)
        processors, stages = _processors(x.device)
        block_t, block_n, chunk_steps = _plan(batch, steps, channels, processors, self.dtype)
        self.num_chunks = triton.cdiv(steps, chunk_steps)
        num_blocks = triton.cdiv(channels, block_n)
        self.sizes = (steps, channels, chunk_steps, self.num_chunks, num_blocks)
        self.grid = (batch * self.num_chunks * num_blocks,)
        self.accumulate = tl.float64 if self.dtype == torch.float64 else tl.float32
        self.blocks = {
            "ACCUMULATE": self.accumulate,
            "BLOCK_T": block_t,
            "BLOCK_N": block_n,
            "STAGES": stages,
            "num_warps": 1,
            **_OPTIONS,
        }
        self.device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

    def summaries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Allocate the maps of the chunks, three times (B, C, N), and the values at the boundaries, (B, C + 1, N)."""
        batch, channels = self.x.shape[0], self.x.shape[2] // 2
        maps = self.x.new_empty((3, batch, self.num_chunks, channels), dtype=self.dtype)
        return *maps, self.x.new_empty((batch, self.num_chunks + 1, channels), dtype=self.dtype)

    def boundaries(
        self, decays: Tensor, lesses: Tensor, drives: Tensor, start: Tensor | None, boundaries: Tensor, reverse: bool
    ) -> None:
        """Fill `boundaries` from the maps of the chunks and the initial value of the scan, (B, 1, N) or None."""
        batch, chunks, channels = decays.shape
        block_c, block_n = _summary_blocks(chunks, channels, decays.dtype)
        num_blocks = triton.cdiv(channels, block_n)
        _boundary_kernel[(batch * num_blocks,)](
            decays, lesses, drives, decays if start is None else start, boundaries,
            0 if start is None else start.stride(0), channels, chunks, num_blocks,
            HAS_START=start is not None, HAS_RESET=self.has_reset, REVERSE=reverse, ACCUMULATE=self.accumulate,
            BLOCK_C=block_c, BLOCK_N=block_n, num_warps=4, **_OPTIONS,
        )  # fmt: skip


@functools.lru_cache(1024)
def _plan(batch: int, steps: int, channels: int, processors: int, accumulate: torch.dtype) -> tuple[int, int, int]:
    """Choose the steps and channels of a tile (powers of 2), and the steps of a chunk (all of them for one pass)."""
    shrink = 4 if accumulate == torch.float64 else 1  # a double is two registers, and its exp needs more of them
    block_n = min(_MAX_BLOCK_N // shrink, triton.next_power_of_2(channels))
    block_t = min(max(_TILE_ELEMENTS // shrink // block_n, _MIN_BLOCK_T), _MAX_BLOCK_T) if steps > 1 else 1
    programs = batch * triton.cdiv(channels, block_n)
    chunks = max(processors * _PROGRAMS_PER_PROCESSOR // programs, 1)
    tiles = max(triton.cdiv(triton.cdiv(steps, chunks), block_t), _MIN_TILES_PER_CHUNK)
    if steps < _MIN_TILES_TO_CUT * block_t or triton.cdiv(steps, tiles * block_t) < _MIN_CHUNKS:
        narrow, wider = _NARROW_BLOCKS_N
        if batch * triton.cdiv(channels, narrow) > processors * _WARPS_AT_A_TIME:
            narrow = wider
        few = programs < processors * _PROGRAMS_PER_PROCESSOR_IF_NARROW
        if few and steps >= _NARROW_BLOCK_T and block_n > narrow and shrink == 1:
            return _NARROW_BLOCK_T, narrow, steps
        return block_t, block_n, steps
    return block_t, block_n, tiles * block_t


def _summary_blocks(chunks: int, channels: int, accumulate: torch.dtype) -> tuple[int, int]:
    """Choose chunks and channels of a tile of the pass over the summaries, which has one boundary more than chunks."""
    block_c, block_n = next((sizes for sizes in _SUMMARY_BLOCKS if chunks < sizes[0]), _SUMMARY_BLOCKS[-1])
    shrink = 2 if accumulate == torch.float64 else 1
    return block_c, min(max(block_n // shrink, 1), triton.next_power_of_2(channels))


@functools.cache
def _processors(device: torch.device) -> tuple[int, int]:
    """Return the number of multiprocessors and the number of tiles that a program can have in flight on one."""
    if device.type != "cuda":
        return 1, _STAGES
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_multiprocessor", 0)
    return properties.multi_processor_count, _STAGES if shared >= _SHARED_MEMORY_FOR_STAGES else 2


def _channels_last(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its channels are not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


__all__ = ["triton_backward", "triton_forward", "unavailable_reason"]
