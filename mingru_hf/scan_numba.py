"""The fused MinGRU scan for CPUs, compiled by numba if installed: one pass over memory forward, one backward.

    h_t = (1 - z_t) h_{t-1} + z_t g(candidate_t),    z_t = sigmoid(gate_t)

The equation is that of `scan_reference`, with which the tests compare this scan. A row of N states stays in the L1
cache throughout the loop over time; gates, candidates and results are read or written once. Each thread takes one task
after another. A task is a block of channels of one batch row; if there are fewer of these than threads, time is also
cut into pieces (see `_repair_forward`). The result is bitwise identical for any number of threads.

A second kernel computes the linear maps of a decoding step. It is in this file because numba's on-disk cache only
checks the file that defines a kernel: it would miss a change to loads and stores that are defined in another file.

Legend: B batch, T time steps, N channels with all trailing axes flattened into them.
"""

import contextlib
import ctypes
import functools
import os
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .scan_reference import INITIAL_STATE, accumulation_dtype

_MIN_VERSION = (0, 61)

try:
    import llvmlite.binding as llvm
    import numba
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic

    if numba.version_info[:2] < _MIN_VERSION:
        raise RuntimeError(f"version {numba.__version__} is older than {_MIN_VERSION[0]}.{_MIN_VERSION[1]}")
    if numba.config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    _REASON = None
except ImportError as error:
    numba, _REASON = None, f"numba cannot be imported ({error}); install it with `pip install numba`"
except Exception as error:  # a numba that fails with this NumPy or Python must not break the package
    numba, _REASON = None, f"the installed numba cannot be used ({type(error).__name__}: {error})"

NUMBA_AVAILABLE = numba is not None

# Below this many states a second thread costs more than it saves.
_SERIAL_ELEMENTS = 131_072
# Narrower blocks of channels waste cache lines and the processor's prefetching.
_MIN_BLOCK = 256
# Shorter pieces of time are not worth the recomputation of their beginnings.
_MIN_PIECE = 512


def unavailable_reason() -> str | None:
    """Return why the numba scan cannot be used, worded for an error message, or None if it can."""
    return _REASON


def numba_supports(input_dtype: torch.dtype, states_dtype: torch.dtype) -> bool:
    """Whether there is a kernel for inputs and states of these dtypes."""
    return (input_dtype, states_dtype, False) in _VARIANTS


# --- Loads, stores and exp as LLVM instructions. Arrays are plain addresses (int64). Tags, arguments of which only the
# --- type matters, say what the elements are: float32, float64, or uint16 for the bits of bfloat16.

_FLAGS = ("contract", "nsz", "arcp", "afn")  # not nnan and ninf: NaN and infinities keep their meaning
_OPTIONS = {"fastmath": set(_FLAGS), "error_model": "numpy"}


def _compiled(function):
    """Apply numba.njit with this file's options; return the function unchanged if numba is missing."""
    if numba is None:
        return function
    return numba.njit(**_OPTIONS, nogil=True, forceinline=function.__name__.endswith("_row"))(function)


if numba is not None:

    class _BFloat16(ir.Type):
        """LLVM's type bfloat, which llvmlite lacks; used where the processor can round to it."""

        def _to_string(self):
            return "bfloat"

        def __eq__(self, other):
            return isinstance(other, type(self))

        def __hash__(self):
            return hash(type(self))

    # Older versions of LLVM, and all versions on other processors, round by a call to a function that does not exist.
    _ROUNDS_BFLOAT16 = (
        llvm.llvm_version_info[0] >= 20
        and (numba.config.CPU_NAME or numba.config.CPU_FEATURES) is None
        and llvm.get_host_cpu_features().get("avx512bf16", False)
    )
    # LLVM limits itself to 256-bit vectors on Intel processors because the first ones with 512-bit vectors slowed down
    # when using them. Processors with this feature do not, and 512 bits make the kernels up to a third faster.
    _WIDE_VECTORS = bool(llvm.get_host_cpu_features().get("avx512vbmi2", False))
else:

    def intrinsic(*args, **kwargs):
        return (lambda function: function) if kwargs else args[0]


def _ir_type(tag):
    return {types.uint16: ir.IntType(16), types.float32: ir.FloatType(), types.float64: ir.DoubleType()}[tag]


def _pointer(builder, base, index, tag):
    element = _ir_type(tag)
    return builder.gep(builder.inttoptr(base, element.as_pointer()), [index])


# Alias scopes: they tell LLVM that the arrays of a kernel are disjoint, so that it vectorises loops without checks.
_SCOPES = ("read", "state", "low", "write", "write2")


def _declare_disjoint(builder, instruction, scope):
    if _WIDE_VECTORS:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own `add` rejects it
    module = builder.module
    domain = module.add_metadata(["mingru scan"])
    scopes = {name: module.add_metadata([f"mingru {name}", domain]) for name in _SCOPES}
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[scope]]))
    instruction.set_metadata("noalias", module.add_metadata([scopes[name] for name in _SCOPES if name != scope]))


@intrinsic(prefer_literal=True)
def _load(typing_context, base, index, tag, scope):
    """Load element `index` of the array at `base`; bfloat16 is widened to float32."""

    def generate(context, builder, signature, args):
        value = builder.load(_pointer(builder, args[0], args[1], tag))
        _declare_disjoint(builder, value, scope.literal_value)
        if tag == types.uint16:
            bits = builder.shl(builder.zext(value, ir.IntType(32)), ir.IntType(32)(16))
            value = builder.bitcast(bits, ir.FloatType())
        return value

    result = types.float32 if tag == types.uint16 else tag
    return result(types.int64, types.int64, tag, scope), generate


@intrinsic(prefer_literal=True)
def _store(typing_context, base, index, value, tag, scope):
    """Write element `index` of the array at `base`, rounded to nearest even for bfloat16; NaN stays NaN."""

    def generate(context, builder, signature, args):
        stored = args[2]
        if tag == types.uint16 and _ROUNDS_BFLOAT16:
            stored = builder.bitcast(builder.fptrunc(stored, _BFloat16()), ir.IntType(16))
        elif tag == types.uint16:
            i32 = ir.IntType(32)
            bits = builder.bitcast(stored, i32)
            high = builder.lshr(bits, i32(16))
            to_even = builder.add(builder.and_(high, i32(1)), i32(0x7FFF))
            rounded = builder.lshr(builder.add(bits, to_even), i32(16))
            quiet_nan = builder.or_(high, i32(0x40))
            rounded = builder.select(builder.fcmp_unordered("uno", stored, stored), quiet_nan, rounded)
            stored = builder.trunc(rounded, ir.IntType(16))
        instruction = builder.store(stored, _pointer(builder, args[0], args[1], tag))
        _declare_disjoint(builder, instruction, scope.literal_value)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value, tag, scope), generate


@intrinsic
def _biased(typing_context, value, base, index, tag):
    """Add element `index` of the bias at `base` to the value; return the value unchanged if the tag is None."""

    def generate(context, builder, signature, args):
        if tag == types.none:
            return args[0]
        bias = builder.load(_pointer(builder, args[1], args[2], tag))
        _declare_disjoint(builder, bias, "read")
        return builder.fadd(args[0], bias, flags=_FLAGS)

    return value(value, types.int64, types.int64, tag), generate


@intrinsic
def _address(typing_context, base, index, tag):
    """Address of element `index` of the array at `base`."""

    def generate(context, builder, signature, args):
        return builder.ptrtoint(_pointer(builder, args[0], args[1], tag), ir.IntType(64))

    return types.int64(types.int64, types.int64, tag), generate


@intrinsic
def _argument(typing_context, arguments, index):
    """Entry `index` of the kernel's arguments, all of them int64."""

    def generate(context, builder, signature, args):
        return builder.load(builder.gep(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), [args[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _next_task(typing_context, arguments):
    """Take the number of the next task that no other thread has taken."""

    def generate(context, builder, signature, args):
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _prefetch(typing_context, base, index, tag):
    """Prefetch the cache lines of _CHUNK elements, which need not exist, into the L2 cache."""

    def generate(context, builder, signature, args):
        i8, i32 = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [i8.as_pointer()], kind)
        first = builder.bitcast(_pointer(builder, args[0], args[1], tag), i8.as_pointer())
        for line in range(0, _CHUNK * tag.bitwidth // 8, _CACHE_LINE):
            read, second_level, data = i32(0), i32(2), i32(1)
            builder.call(function, [builder.gep(first, [ir.IntType(64)(line)]), read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, tag), generate


@intrinsic
def _flag(typing_context, base, index):
    """Element `index` of an array of booleans."""

    def generate(context, builder, signature, args):
        byte = builder.load(builder.gep(builder.inttoptr(args[0], ir.IntType(8).as_pointer()), [args[1]]))
        return builder.icmp_unsigned("!=", byte, ir.IntType(8)(0))

    return types.boolean(types.int64, types.int64), generate


@intrinsic
def _bits(typing_context, value):
    """Return the bits of a float as an integer, so that equality is bitwise and NaN equals itself."""
    integer = {types.float32: types.int32, types.float64: types.int64}[value]

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(integer.bitwidth))

    return integer(value), generate


@intrinsic
def _as(typing_context, number, like):
    """A constant in the type of `like`, so that float32 arithmetic stays float32."""

    def generate(context, builder, signature, args):
        return context.cast(builder, args[0], number, like)

    return like(number, like), generate


# Minimax polynomials of 2^f on |f| <= 1/2, with the first coefficient fixed at 1. Their relative errors are 2.8e-6
# where states are bfloat16 (one rounding is 4e-3), 9.2e-8 for float32 and 3.4e-18 for float64.
_EXP_COEFFICIENTS = {
    16: (1.0, 0.6931241757403347512, 0.24024099789794774238, 0.055906582175125640703, 0.0095828378259887175631),
    32: (
        *(1.0, 0.69314697735626905435, 0.24022241760818303313, 0.055507340007771422846),
        *(0.0096715339032417324041, 0.0013264699875053542547),
    ),
    64: (
        *(1.0, 0.69314718055994532584, 0.2402265069591013138, 0.055504108664820080235, 0.0096181291075940653661),
        *(0.0013333558146775174006, 0.00015403530457188267741, 1.5252733492754723488e-05, 1.3215435241241324825e-06),
        *(1.0178199662568701272e-07, 7.0737907765681112895e-09, 4.4347670055222403247e-10),
    ),
}
# Mantissa bits, exponent bias, and the x from which on exp(-x) is 0.
_EXP_FORMAT = {32: (23, 127, 88.0), 64: (52, 1023, 709.0)}


@intrinsic
def _exp_minus(typing_context, x, tag):
    """Compute exp(-x) for x >= 0 without a branch; 0 where 2^n is below the normal numbers, NaN for NaN.

    exp(-x) = 2^n 2^f, with n the integer nearest to -x / ln 2. Adding 1.5 * 2^mantissa plus the exponent bias rounds
    to that integer and leaves n plus the bias in the low bits; shifted left, these are the bits of 2^n, or of 0.
    """
    bits = x.bitwidth

    def generate(context, builder, signature, args):
        real, integer = _ir_type(x), ir.IntType(bits)
        mantissa, bias, highest = _EXP_FORMAT[bits]
        magic = real(1.5 * 2.0**mantissa + bias)

        kind = ir.FunctionType(real, [real, real, real])
        fused_if_cheap = builder.module.declare_intrinsic("llvm.fmuladd", [real], kind)

        def multiply_add(a, b, c):
            return builder.call(fused_if_cheap, [a, b, c])

        def horner(coefficients, variable):
            *rest, last = coefficients
            return functools.reduce(lambda sum_, k: multiply_add(sum_, variable, real(k)), reversed(rest), real(last))

        minus_log2_e = real(-1.4426950408889634)

        # An ordered comparison is False for NaN, which therefore stays NaN.
        value = builder.select(builder.fcmp_ordered(">", args[0], real(highest)), real(highest), args[0])
        shifted = multiply_add(value, minus_log2_e, magic)
        n = builder.fsub(shifted, magic, flags=_FLAGS)
        f = multiply_add(value, minus_log2_e, builder.fneg(n, flags=_FLAGS))
        square = builder.fmul(f, f, flags=_FLAGS)
        even, odd = (horner(_EXP_COEFFICIENTS[tag.bitwidth][first::2], square) for first in (0, 1))
        polynomial = multiply_add(odd, f, even)  # two short dependency chains instead of a long one
        power = builder.bitcast(builder.shl(builder.bitcast(shifted, integer), integer(mantissa)), real)
        return builder.fmul(polynomial, power, flags=_FLAGS)

    return x(x, tag), generate


# --- The kernels. Their arguments are one array of int64, with entries at these indices. Strides are in elements, the
# --- last axis has stride 1, and an absent tensor has address 0.

_COUNTER, _PHASE, _NUM_TASKS = 0, 1, 2
_BATCH, _STEPS, _CHANNELS, _BLOCKS, _BLOCK, _PIECES, _PIECE = 3, 4, 5, 6, 7, 8, 9
_X, _X_BATCH, _X_STEP = 10, 11, 12
_STATES, _STATES_BATCH, _STATES_STEP = 13, 14, 15
_H0, _MASK, _RESET = 16, 17, 18
# carry: (pieces + 1, B, N), the values that one step passes to the next. The same number of elements follows, with the
# rounding error of each value; low: the offset, in elements, from a value to its rounding error.
_CARRY, _LOW = 19, 20
_BIAS = 21  # (2N,), added to gates and candidates
_GRAD, _GRAD_BATCH, _GRAD_STEP, _GRAD_X, _HALF = 22, 23, 24, 25, 26  # half: a row of N values 0.5
_GRAD_LAST = 27  # (B, N), the gradient of the last state as a separate output

# Rows are processed in chunks of _CHUNK channels, and the same chunk _AHEAD steps ahead is prefetched, because the
# hardware prefetcher restarts at every row.
_CHUNK = 64
_AHEAD = 3
_CACHE_LINE = 64  # bytes


@_compiled
def _fill(row, low_row, count, number, A):
    """Fill a row with the number and its rounding errors with 0."""
    for c in range(count):
        _store(row, c, _as(number, A), A, "state")
        _store(low_row, c, _as(0.0, A), A, "low")


@_compiled
def _copy(source, target, count, A):
    for c in range(count):
        _store(target, c, _load(source, c, A, "state"), A, "state")


@_compiled
def _same(first, second, low, count, A):
    """Whether two rows of the carry and their rounding errors are bitwise equal."""
    first_low, second_low = _address(first, low, A), _address(second, low, A)
    difference = _bits(A) ^ _bits(A)
    for c in range(count):
        difference |= _bits(_load(first, c, A, "state")) ^ _bits(_load(second, c, A, "state"))
        difference |= _bits(_load(first_low, c, A, "low")) ^ _bits(_load(second_low, c, A, "low"))
    return difference == 0


@_compiled
def _forward_row(gate_row, candidate_row, gate_bias, candidate_bias, h_row, low_row, out_row, first, last, X, Y, A, W):
    """Compute one step of the recurrence.

    With e = exp(-|gate|), the sigmoids of |gate| and -|gate| are 1 / (1 + e) and e / (1 + e). With g as a fraction,
    too, one division suffices. For a negative gate, the step is h + z (g - h), and the rounding error of this sum is
    added to the next one (Kahan), so that even changes of one part in 10^8 per step accumulate.
    """
    for c in range(first, last):
        gate = _biased(_load(gate_row, c, X, "read"), gate_bias, c, W)
        candidate = _biased(_load(candidate_row, c, X, "read"), candidate_bias, c, W)
        one = _as(1.0, A)
        e = _exp_minus(abs(gate), Y)  # in [0, 1]: nothing overflows
        s = _exp_minus(abs(candidate), Y)
        g_numerator = s if candidate < 0 else candidate + _as(0.5, A)  # NaN for NaN
        g_denominator = one + s if candidate < 0 else one
        inverse = one / ((one + e) * g_denominator)
        h, low = _load(h_row, c, A, "state"), _load(low_row, c, A, "low")
        h_numerator = h * g_denominator
        change = e * inverse * (h_numerator if gate >= 0 else g_numerator - h_numerator)
        change = change if gate >= 0 else change + low
        large = g_numerator * inverse if gate >= 0 else h
        h = large + change
        _store(h_row, c, h, A, "state")
        _store(low_row, c, change - (h - large), A, "low")
        _store(out_row, c, h, Y, "write")


@_compiled
def _forward_step(a, b, t, first, count, h_row, X, Y, A, W):
    """Update h_row, channels first..first + count of batch row b, from h_{t-1} to h_t and write it to the states."""
    flag = b * _argument(a, _STEPS) + t
    reset, mask = _argument(a, _RESET), _argument(a, _MASK)
    states = b * _argument(a, _STATES_BATCH) + t * _argument(a, _STATES_STEP) + first
    out_row = _address(_argument(a, _STATES), states, Y)
    low_row = _address(h_row, _argument(a, _LOW), A)
    if reset != 0 and _flag(reset, flag):
        _fill(h_row, low_row, count, INITIAL_STATE, A)
    if mask != 0 and not _flag(mask, flag):
        for c in range(count):
            _store(out_row, c, _load(h_row, c, A, "state"), Y, "write")
    else:
        x = b * _argument(a, _X_BATCH) + t * _argument(a, _X_STEP) + first
        gate_row = _address(_argument(a, _X), x, X)
        candidate_row = _address(gate_row, _argument(a, _CHANNELS), X)
        gate_bias = _address(_argument(a, _BIAS), first, A)
        candidate_bias = _address(gate_bias, _argument(a, _CHANNELS), A)
        rows = (gate_row, candidate_row, gate_bias, candidate_bias, h_row, low_row, out_row)
        x_ahead, out_ahead = _AHEAD * _argument(a, _X_STEP), _AHEAD * _argument(a, _STATES_STEP)
        whole = count // _CHUNK * _CHUNK
        for c in range(0, whole, _CHUNK):
            _prefetch(gate_row, c + x_ahead, X)
            _prefetch(candidate_row, c + x_ahead, X)
            _prefetch(out_row, c + out_ahead, Y)
            _forward_row(*rows, c, c + _CHUNK, X, Y, A, W)
        _forward_row(*rows, whole, count, X, Y, A, W)


@_compiled
def _forward_piece(a, b, piece, first, count, X, Y, A, W):
    """Run a piece of time: the first one from the true state, the others from a guess."""
    batch, channels, h0 = _argument(a, _BATCH), _argument(a, _CHANNELS), _argument(a, _H0)
    h_row = _address(_argument(a, _CARRY), (piece * batch + b) * channels + first, A)
    _fill(h_row, _address(h_row, _argument(a, _LOW), A), count, INITIAL_STATE, A)
    if piece == 0 and h0 != 0:
        _copy(_address(h0, b * channels + first, A), h_row, count, A)
    start = piece * _argument(a, _PIECE)
    for t in range(start, min(start + _argument(a, _PIECE), _argument(a, _STEPS))):
        _forward_step(a, b, t, first, count, h_row, X, Y, A, W)


@_compiled
def _repair_forward(a, b, first, count, X, Y, A, W):
    """Correct the pieces that began with a guess: run them again from the true state until both runs agree.

    Two states under the same gates converge, and rounding makes them equal after some tens of steps for typical gates.
    From that step on the piece is already correct; if the states never become equal, the whole piece is recomputed.
    The last state ends up in the last piece's carry.
    """
    batch, channels = _argument(a, _BATCH), _argument(a, _CHANNELS)
    carry = _argument(a, _CARRY)
    h_row = _address(carry, b * channels + first, A)  # the true state, at first at the end of piece 0
    guess_row = _address(carry, (_argument(a, _PIECES) * batch + b) * channels + first, A)
    for piece in range(1, _argument(a, _PIECES)):
        _fill(guess_row, _address(guess_row, _argument(a, _LOW), A), count, INITIAL_STATE, A)
        start = piece * _argument(a, _PIECE)
        met = False
        for t in range(start, min(start + _argument(a, _PIECE), _argument(a, _STEPS))):
            _forward_step(a, b, t, first, count, guess_row, X, Y, A, W)
            _forward_step(a, b, t, first, count, h_row, X, Y, A, W)
            if _same(guess_row, h_row, _argument(a, _LOW), count, A):
                met = True
                break
        piece_row = _address(carry, (piece * batch + b) * channels + first, A)
        if met:
            h_row = piece_row
        elif piece == _argument(a, _PIECES) - 1:
            _copy(h_row, piece_row, count, A)


@_compiled
def _take_task(a):
    """Take a task: return whether there is one, its batch row, piece of time, first channel and number of channels."""
    task = _next_task(a)
    pieces = _argument(a, _PIECES) if _argument(a, _PHASE) == 0 else 1
    row, piece = task // pieces, task % pieces
    b, block = row // _argument(a, _BLOCKS), row % _argument(a, _BLOCKS)
    first = block * _argument(a, _BLOCK)
    count = min(_argument(a, _BLOCK), _argument(a, _CHANNELS) - first)
    return task < _argument(a, _NUM_TASKS), b, piece, first, count


@_compiled
def _forward(a, X, Y, A, W):
    """Run tasks until none is left; any number of threads may do so at the same time."""
    more, b, piece, first, count = _take_task(a)
    while more:
        if _argument(a, _PHASE) == 0:
            _forward_piece(a, b, piece, first, count, X, Y, A, W)
        else:
            _repair_forward(a, b, first, count, X, Y, A, W)
        more, b, piece, first, count = _take_task(a)


@_compiled
def _backward_row(
    gate_row,
    candidate_row,
    gate_bias,
    candidate_bias,
    grad_row,
    previous_row,
    r_row,
    low_row,
    grad_gate_row,
    grad_candidate_row,
    first,
    last,
    X,
    Y,
    P,
    A,
    W,
):
    """Compute the gradients of one step.

    r is the gradient that a state receives from later steps: that of h_t before the call, that of h_{t-1} after it.
    With dh the sum of r and the output's own gradient:
    dL/dcandidate = dh z g', dL/dh_{t-1} = dh (1 - z), dL/dgate = dh z (1 - z) (g - h_{t-1}).
    """
    for c in range(first, last):
        gate = _biased(_load(gate_row, c, X, "read"), gate_bias, c, W)
        candidate = _biased(_load(candidate_row, c, X, "read"), candidate_bias, c, W)
        one = _as(1.0, A)
        e = _exp_minus(abs(gate), Y)
        s = _exp_minus(abs(candidate), Y)
        # As in the forward pass. For a NaN candidate g_denominator is 1, which keeps the NaN out of dL/dh_{t-1}: that
        # does not depend on the candidate.
        gate_denominator = one + e
        g_denominator = one + s if candidate < 0 else one
        inverse = one / (gate_denominator * g_denominator)
        large = inverse * g_denominator  # sigmoid(|gate|)
        s = s * (inverse * gate_denominator)  # sigmoid(candidate) for a negative one, NaN for NaN
        g = candidate + _as(0.5, A) if candidate >= 0 else s
        slope = one if candidate >= 0 else s - s * s
        r, more = _load(r_row, c, A, "state"), _load(grad_row, c, Y, "read") + _load(low_row, c, A, "low")
        dh = r + more
        low = more - (dh - r)
        dh_large = dh * large
        dh_small = dh_large * e
        dh_z = dh_large if gate >= 0 else dh_small
        # As in the forward pass: where z is small, r = dh - z dh, whose rounding error is kept.
        less = dh_small - low
        r = dh - less
        _store(low_row, c, _as(0.0, A) if gate >= 0 else (dh - r) - less, A, "low")
        _store(r_row, c, dh_small if gate >= 0 else r, A, "state")
        _store(grad_candidate_row, c, dh_z * slope, X, "write2")
        difference = g - _load(previous_row, c, P, "read")
        _store(grad_gate_row, c, dh_small * large * difference, X, "write")


@_compiled
def _backward_step(a, b, t, first, count, r_row, X, Y, A, W):
    """Go back one step: update r_row from the gradient that h_t receives from later steps to that of h_{t-1}."""
    channels = _argument(a, _CHANNELS)
    flag = b * _argument(a, _STEPS) + t
    mask = _argument(a, _MASK)
    reset = _argument(a, _RESET) != 0 and _flag(_argument(a, _RESET), flag)
    grad = b * _argument(a, _GRAD_BATCH) + t * _argument(a, _GRAD_STEP) + first
    grad_row = _address(_argument(a, _GRAD), grad, Y)
    grad_gate_row = _address(_argument(a, _GRAD_X), flag * 2 * channels + first, X)
    grad_candidate_row = _address(grad_gate_row, channels, X)
    low_row = _address(r_row, _argument(a, _LOW), A)
    if mask != 0 and not _flag(mask, flag):
        for c in range(count):
            r, more = _load(r_row, c, A, "state"), _load(grad_row, c, Y, "read") + _load(low_row, c, A, "low")
            dh = r + more
            _store(low_row, c, more - (dh - r), A, "low")
            _store(r_row, c, dh, A, "state")
            _store(grad_gate_row, c, _as(0.0, A), X, "write")
            _store(grad_candidate_row, c, _as(0.0, A), X, "write2")
    else:
        x = b * _argument(a, _X_BATCH) + t * _argument(a, _X_STEP) + first
        gate_row = _address(_argument(a, _X), x, X)
        candidate_row = _address(gate_row, channels, X)
        gate_bias = _address(_argument(a, _BIAS), first, A)
        rows = (gate_row, candidate_row, gate_bias, _address(gate_bias, channels, A), grad_row)
        grad_rows = (r_row, low_row, grad_gate_row, grad_candidate_row)
        if reset or t == 0:
            initial_row = _address(_argument(a, _HALF), first, A)
            if not reset and _argument(a, _H0) != 0:
                initial_row = _address(_argument(a, _H0), b * channels + first, A)
            _backward_row(*rows, initial_row, *grad_rows, 0, count, X, Y, A, A, W)
        else:
            states = b * _argument(a, _STATES_BATCH) + (t - 1) * _argument(a, _STATES_STEP) + first
            previous_row = _address(_argument(a, _STATES), states, Y)
            x_ahead, grad_x_ahead = _AHEAD * _argument(a, _X_STEP), _AHEAD * 2 * channels
            grad_ahead, states_ahead = _AHEAD * _argument(a, _GRAD_STEP), _AHEAD * _argument(a, _STATES_STEP)
            whole = count // _CHUNK * _CHUNK
            for c in range(0, whole, _CHUNK):
                _prefetch(gate_row, c - x_ahead, X)
                _prefetch(candidate_row, c - x_ahead, X)
                _prefetch(grad_row, c - grad_ahead, Y)
                _prefetch(previous_row, c - states_ahead, Y)
                _prefetch(grad_gate_row, c - grad_x_ahead, X)
                _prefetch(grad_candidate_row, c - grad_x_ahead, X)
                _backward_row(*rows, previous_row, *grad_rows, c, c + _CHUNK, X, Y, Y, A, W)
            _backward_row(*rows, previous_row, *grad_rows, whole, count, X, Y, Y, A, W)
    if reset:
        _fill(r_row, low_row, count, 0.0, A)


@_compiled
def _backward_piece(a, b, piece, first, count, X, Y, A, W):
    """Run a piece of time backwards; all but the last one begin with a guess, a gradient of 0 from later steps."""
    batch, channels, grad_last = _argument(a, _BATCH), _argument(a, _CHANNELS), _argument(a, _GRAD_LAST)
    r_row = _address(_argument(a, _CARRY), (piece * batch + b) * channels + first, A)
    _fill(r_row, _address(r_row, _argument(a, _LOW), A), count, 0.0, A)
    if piece == _argument(a, _PIECES) - 1 and grad_last != 0:
        _copy(_address(grad_last, b * channels + first, A), r_row, count, A)
    start = piece * _argument(a, _PIECE)
    for t in range(min(start + _argument(a, _PIECE), _argument(a, _STEPS)) - 1, start - 1, -1):
        _backward_step(a, b, t, first, count, r_row, X, Y, A, W)


@_compiled
def _repair_backward(a, b, first, count, X, Y, A, W):
    """Like `_repair_forward`, but from the last piece to the first; the gradient of h0 ends up in piece 0's carry."""
    batch, channels, pieces = _argument(a, _BATCH), _argument(a, _CHANNELS), _argument(a, _PIECES)
    carry = _argument(a, _CARRY)
    r_row = _address(carry, ((pieces - 1) * batch + b) * channels + first, A)
    guess_row = _address(carry, (pieces * batch + b) * channels + first, A)
    for piece in range(pieces - 2, -1, -1):
        _fill(guess_row, _address(guess_row, _argument(a, _LOW), A), count, 0.0, A)
        start = piece * _argument(a, _PIECE)
        met = False
        for t in range(min(start + _argument(a, _PIECE), _argument(a, _STEPS)) - 1, start - 1, -1):
            _backward_step(a, b, t, first, count, guess_row, X, Y, A, W)
            _backward_step(a, b, t, first, count, r_row, X, Y, A, W)
            if _same(guess_row, r_row, _argument(a, _LOW), count, A):
                met = True
                break
        piece_row = _address(carry, (piece * batch + b) * channels + first, A)
        if met:
            r_row = piece_row
        elif piece == 0:
            _copy(r_row, piece_row, count, A)


@_compiled
def _backward(a, X, Y, A, W):
    """Run tasks until none is left; any number of threads may do so at the same time."""
    more, b, piece, first, count = _take_task(a)
    while more:
        if _argument(a, _PHASE) == 0:
            _backward_piece(a, b, piece, first, count, X, Y, A, W)
        else:
            _repair_backward(a, b, first, count, X, Y, A, W)
        more, b, piece, first, count = _take_task(a)


# --- A linear map of few rows. Every weight is read once, so the time is that of reading memory. Its arguments follow
# --- the first three, which all kernels share:

_ROWS, _INPUTS, _OUTPUTS, _OUTPUTS_PER_TASK, _INPUTS_AT_ONCE, _FETCHES_AHEAD = 3, 4, 5, 6, 7, 8
_IN, _WEIGHT, _LINEAR_BIAS, _OUT = 9, 10, 11, 12


def _compiled_sum(function):
    """Like `_compiled`, but for sums: their order is free, so that LLVM can keep a partial sum per vector lane."""
    if numba is None:
        return function
    return numba.njit(**_OPTIONS | {"fastmath": {*_FLAGS, "reassoc"}}, nogil=True, forceinline=True)(function)


@_compiled_sum
def _dot(weights, x, count, W, A):
    sum_ = _as(0.0, A)
    for i in range(count):
        sum_ += _load(weights, i, W, "read") * _load(x, i, A, "read")
    return sum_


@_compiled_sum
def _dot_four(weights, x, stride, count, W, A):
    """Like `_dot`, but for four rows of x, so that each weight is loaded once for all of them."""
    sum0 = sum1 = sum2 = sum3 = _as(0.0, A)
    for i in range(count):
        weight = _load(weights, i, W, "read")
        sum0 += weight * _load(x, i, A, "read")
        sum1 += weight * _load(x, stride + i, A, "read")
        sum2 += weight * _load(x, 2 * stride + i, A, "read")
        sum3 += weight * _load(x, 3 * stride + i, A, "read")
    return sum0, sum1, sum2, sum3


@_compiled
def _add(out, index, sum_, first, start, W):
    """Add a partial sum to the output, or to `first` if it is the first partial sum (start 0)."""
    before = first if start == 0 else _load(out, index, W, "state")
    _store(out, index, before + sum_, W, "state")


@_compiled
def _linear_output(a, o, start, count, W, A):
    """Add the contribution of inputs start..start + count to output o of every row; the first one adds to the bias."""
    rows, inputs, outputs = _argument(a, _ROWS), _argument(a, _INPUTS), _argument(a, _OUTPUTS)
    bias, out = _argument(a, _LINEAR_BIAS), _address(_argument(a, _OUT), o, W)
    x, weights = _address(_argument(a, _IN), start, A), _address(_argument(a, _WEIGHT), o * inputs + start, W)
    if _argument(a, _FETCHES_AHEAD) != 0:
        for i in range(0, count, _CHUNK):
            _prefetch(weights, 2 * inputs + i, W)  # for two outputs ahead, which need not exist
    first = _load(bias, o, W, "read") if bias != 0 else _as(0.0, A)
    whole = rows // 4 * 4
    for r in range(0, whole, 4):
        sums = _dot_four(weights, _address(x, r * inputs, A), inputs, count, W, A)
        _add(out, r * outputs, sums[0], first, start, W)
        _add(out, (r + 1) * outputs, sums[1], first, start, W)
        _add(out, (r + 2) * outputs, sums[2], first, start, W)
        _add(out, (r + 3) * outputs, sums[3], first, start, W)
    for r in range(whole, rows):
        sum_ = _dot(weights, _address(x, r * inputs, A), count, W, A)
        _add(out, r * outputs, sum_, first, start, W)


@_compiled
def _linear(a, W, A):
    """Compute blocks of outputs until none is left; any number of threads may do so at the same time."""
    inputs, at_once = _argument(a, _INPUTS), _argument(a, _INPUTS_AT_ONCE)
    task = _next_task(a)
    while task < _argument(a, _NUM_TASKS):
        first = task * _argument(a, _OUTPUTS_PER_TASK)
        last = min(first + _argument(a, _OUTPUTS_PER_TASK), _argument(a, _OUTPUTS))
        for start in range(0, inputs, at_once):
            for o in range(first, last):
                _linear_output(a, o, start, min(at_once, inputs - start), W, A)
        task = _next_task(a)


# The kernels for each combination of dtypes. The tags X, Y, A and W give the types of the inputs, the states, the
# accumulated state and the bias. The closures hold only tags, so that numba's on-disk cache finds them again.
_F32, _F64, _BF16 = (
    kind(0) for kind in ((numba.float32, numba.float64, numba.uint16) if numba else (float, float, int))
)


def _forward_kernel(X, Y, A, W):
    def forward(a):
        _forward(a, X, Y, A, W)

    return forward


def _backward_kernel(X, Y, A, W):
    def backward(a):
        _backward(a, X, Y, A, W)

    return backward


def _linear_kernel(W):
    def linear(a):
        _linear(a, W, _F32)

    return linear


_LINEAR_VARIANTS = {torch.float32: _linear_kernel(_F32), torch.bfloat16: _linear_kernel(_BF16)}
_TAGS = {
    (torch.float32, torch.float32): (_F32, _F32, _F32),
    (torch.bfloat16, torch.bfloat16): (_BF16, _BF16, _F32),
    (torch.bfloat16, torch.float32): (_BF16, _F32, _F32),
    (torch.float64, torch.float64): (_F64, _F64, _F64),
}
# (dtype of the inputs, dtype of the states, with a bias) -> forward, backward
_VARIANTS = {
    (*dtypes, bias is not None): (_forward_kernel(*tags, bias), _backward_kernel(*tags, bias))
    for dtypes, tags in _TAGS.items()
    for bias in (None, tags[2])
}


class _Entry:
    """A compiled kernel: `call`, given the address of the arguments, runs tasks without holding the GIL."""

    def __init__(self, function):
        # Only the kernels are cached on disk, not the functions inlined into them: here numba reads and writes its
        # cache immediately, so that any problem with the cache is raised here.
        try:
            self.compiled = numba.cfunc("void(int64)", **_OPTIONS, cache=True)(function)
        except Exception:  # a folder without write access, a full disk, a damaged file
            self.compiled = numba.cfunc("void(int64)", **_OPTIONS)(function)
            with contextlib.suppress(Exception):  # so that the next process rewrites it
                numba.core.caching.FunctionCache(function).flush()
        self.address = self.compiled.address
        self.call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)


_entries: dict[Callable, _Entry] = {}
_COMPILING = threading.RLock()


def _compiled_entry(function) -> _Entry:
    entry = _entries.get(function)
    if entry is not None:
        return entry
    if threading.current_thread() is threading.main_thread():
        # Signal handlers run on the main thread only. A handler that needs a kernel, too, must not interrupt the
        # compiler, which therefore runs on another thread.
        with contextlib.suppress(RuntimeError):  # no thread can be started at interpreter exit
            thread = threading.Thread(target=_try_to_compile, args=(function,))
            thread.start()
            thread.join()
    return _compile(function)


def _try_to_compile(function) -> None:
    with contextlib.suppress(Exception):  # the caller compiles again, which raises it there
        _compile(function)


def _compile(function) -> _Entry:
    with _COMPILING:  # numba compiles on one thread at a time; loading from its on-disk cache takes 0.1 s
        entry = _entries.get(function) or _Entry(function)
        _entries[function] = entry
    return entry


# --- Threads. torch's own OpenMP pool is preferred: its threads are warm after a matrix product, and no other pool
# --- contends with it. Otherwise, and in a forked process, where OpenMP's threads are gone, Python threads are used.

_forked = False
_pool: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    global _forked, _pool, _COMPILING
    _forked, _pool, _COMPILING = True, None, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _gomp_parallel():
    """Return GOMP_parallel(function, argument, number of threads, 0) of the GNU OpenMP that torch uses, or None."""
    place = os.path.dirname(torch.__file__)
    with contextlib.suppress(OSError, AttributeError):
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes())  # names of mapped files need not be UTF-8
        for path in sorted({line.split(maxsplit=5)[-1] for line in maps.split("\n") if "libgomp" in line}):
            if path.startswith((place + os.sep, place + ".libs" + os.sep)):
                function = ctypes.CDLL(path).GOMP_parallel
                function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                function.restype = None
                return function
    return None


def _help(entry: _Entry, arguments: array, memory: tuple) -> None:
    """Run tasks on a thread of the pool; `memory` keeps the tensors alive in case the caller is interrupted."""
    entry.call(arguments.buffer_info()[0])


def _run(entry: _Entry, arguments: array, memory: tuple, phase: int, num_tasks: int, threads: int) -> None:
    """Run all tasks of a kernel on `threads` threads, including this one; `memory` holds the tensors they access."""
    global _pool
    arguments[_COUNTER], arguments[_PHASE], arguments[_NUM_TASKS] = 0, phase, num_tasks
    threads = min(threads, num_tasks)
    address = arguments.buffer_info()[0]
    if threads <= 1:
        entry.call(address)
        return
    gomp_parallel = None if _forked else _gomp_parallel()
    if gomp_parallel is not None:
        gomp_parallel(entry.address, address, threads, 0)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(max(os.cpu_count() or 1, threads), thread_name_prefix="mingru_scan")
    helpers = []
    with contextlib.suppress(RuntimeError):  # no thread can be started at interpreter exit
        for _ in range(threads - 1):
            helpers.append(_pool.submit(_help, entry, arguments, memory))
    entry.call(address)
    for helper in helpers:
        if not helper.cancel():  # one that never started is not needed; the others still use the arguments
            helper.result()


def _plan(batch: int, steps: int, channels: int, threads: int) -> tuple[int, int, int, int]:
    """Choose number and width of the channel blocks, and number and length of the pieces of time, to use all threads.

    Threads are first given rows, then channels. Time is cut only if threads would still be idle, since a piece may
    have to be computed twice.
    """
    blocks = pieces = 1
    if threads > 1 and batch % threads:
        most = max(1, channels // _MIN_BLOCK)
        while blocks < most and (batch * blocks) % threads and batch * blocks < 4 * threads:
            blocks += 1
        if batch * blocks < threads:
            pieces = max(1, min(-(-threads // (batch * blocks)), steps // _MIN_PIECE))
    width = -(-channels // blocks)
    if blocks > 1:
        width = -(-width // 16) * 16  # whole cache lines
    length = -(-steps // pieces)
    return -(-channels // width), width, -(-steps // length), length


def _data_ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _prepare(
    x: Tensor,
    h0: Tensor | None,
    states: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
    bias: Tensor | None,
) -> tuple[array, Tensor, int, tuple]:
    """Return the arguments that both kernels share, the carry, the number of threads and the tensors to keep alive."""
    batch, steps, channels = states.shape
    threads = torch.get_num_threads() if states.numel() >= _SERIAL_ELEMENTS else 1
    blocks, block, pieces, piece = (1, channels, 1, steps) if threads == 1 else _plan(batch, steps, channels, threads)
    accumulate = accumulation_dtype(x)
    rows = 1 if pieces == 1 else pieces + 1
    carry = x.new_empty(2 * rows, batch, channels, dtype=accumulate)
    if h0 is not None:
        h0 = (h0 if h0.dtype == accumulate else h0.to(accumulate)).contiguous()
    mask = None if mask is None else mask.bool().contiguous()
    reset = None if reset is None else reset.bool().contiguous()
    bias = None if bias is None else bias.to(accumulate).contiguous()
    x_strides, states_strides = x.stride(), states.stride()
    sizes = (0, 0, 0, batch, steps, channels, blocks, block, pieces, piece)
    inputs = (x.data_ptr(), x_strides[0], x_strides[1], states.data_ptr(), states_strides[0], states_strides[1])
    optional = (_data_ptr(h0), _data_ptr(mask), _data_ptr(reset))
    arguments = array("q", (*sizes, *inputs, *optional, carry.data_ptr(), rows * batch * channels, _data_ptr(bias)))
    return arguments, carry, threads, (x, h0, states, mask, reset, bias, carry)


class _Scratch(threading.local):
    """Memory of each thread that is reused from call to call."""

    kept: tuple[int, int, Tensor | None] = 0, 0, None  # one tuple: an interrupt must not separate its parts

    def at_least(self, size: int) -> tuple[int, int, Tensor | None]:
        """Return size, address and owner of at least `size` bytes; hold the owner as long as they are in use."""
        kept = self.kept
        if size > kept[0]:
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever the default device
            kept = self.kept = size, memory.data_ptr(), memory
        return kept


_scratch = _Scratch()
_step_calls: dict[tuple[torch.dtype, torch.dtype, bool], Callable] = {}


def numba_step(x: Tensor, h0: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Run `numba_forward` for one token, without most of its setup, which takes longer than the arithmetic.

    Args:
        x: (B, 1, 2N) pre-activations on the CPU.
        h0: (B, 1, N) state before the step, or None.
        bias: (2N,) added to the pre-activations, or None.
        dtype: dtype of the state after the step.

    Returns:
        (B, 1, N) state after the step; None if the arguments need the general `numba_forward`.
    """
    kind = x.dtype, dtype, bias is not None
    call = _step_calls.get(kind)
    if call is None:
        if numba is None or kind not in _VARIANTS or dtype != accumulation_dtype(x):
            return None
        call = _step_calls[kind] = _compiled_entry(_VARIANTS[kind][0]).call
    shape = x.shape
    if len(shape) != 3 or shape[1] != 1 or shape[2] % 2 or not x.is_contiguous():
        return None
    batch, channels = shape[0], shape[2] // 2
    size = batch * channels
    if not 0 < size < _SERIAL_ELEMENTS:
        return None
    if h0 is None:
        h0_address, states = 0, x.new_empty((batch, 1, channels), dtype=dtype)
    else:
        if h0.dtype != dtype or not h0.is_cpu or not h0.is_contiguous() or h0.shape != (batch, 1, channels):
            return None
        h0_address, states = h0.data_ptr(), torch.empty_like(h0)
    bias_address = 0
    if bias is not None:
        if not bias.is_cpu or not bias.is_contiguous() or len(bias) != shape[2]:
            return None
        bias = bias if bias.dtype == dtype else bias.to(dtype)
        bias_address = bias.data_ptr()
    scratch = _scratch.at_least(16 * size)  # state and rounding error, at most 8 bytes each
    sizes = 0, 0, batch, batch, 1, channels, 1, channels, 1, 1
    inputs = x.data_ptr(), shape[2], 0, states.data_ptr(), channels, 0, h0_address, 0, 0
    arguments = array("q", (*sizes, *inputs, scratch[1], size, bias_address))
    call(arguments.buffer_info()[0])
    return states


# The kernel is faster than torch (LOG.md has the measurements) from this many inputs and this many weights on, and up
# to this many rows. For bfloat16 torch uses oneDNN: a call to it takes longer, so smaller maps gain as well, but only
# with fewer rows.
_MIN_INPUTS = 128
_LINEAR_LIMITS = {torch.float32: (1 << 15, 16), torch.bfloat16: (1 << 14, 8)}
# Inputs of all rows together: how many stay in the L1 cache while the weights stream through it, and above how many
# the hardware prefetcher no longer fetches the weights.
_NEAR_INPUTS, _PREFETCH_INPUTS = 6144, 3072
_TASK_OUTPUTS = 512
# From this many weights on, more than one thread is faster.
_SERIAL_WEIGHTS = 1 << 18


def numba_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Compute a linear map of few rows; up to four rows take about as long as reading the weights.

    Args:
        x: (*, E) on the CPU.
        weight: (F, E).
        bias: (F,), or None.

    Returns:
        (*, F) x weight^T + bias; None if the arguments need F.linear, since they are not of the supported kind:
        float32 or bfloat16 throughout, contiguous parameters, few rows, many weights.

    Precision: sums are accumulated in float32 and, for bfloat16, rounded once.
    """
    dtype, shape, weight_shape = x.dtype, x.shape, weight.shape
    if numba is None or dtype not in _LINEAR_VARIANTS or not shape or len(weight_shape) != 2:
        return None
    min_weights, max_rows = _LINEAR_LIMITS[dtype]
    size, (outputs, inputs) = x.numel(), weight_shape
    if not 0 < size <= max_rows * inputs or inputs < _MIN_INPUTS or outputs * inputs < min_weights:
        return None
    if weight.dtype != dtype or shape[-1] != inputs or not weight.is_contiguous():
        return None
    if bias is not None and (bias.dtype != dtype or bias.shape != (outputs,) or not bias.is_contiguous()):
        return None
    pieces = -(-size // _NEAR_INPUTS)
    if pieces > 1 and dtype != torch.float32:  # oneDNN is as fast, and partial sums would be rounded
        return None
    weight_address, bias_address = weight.data_ptr(), _data_ptr(bias)
    if not (x.data_ptr() and weight_address and (bias_address or bias is None)):  # sharding may have freed the memory
        return None
    entry = _compiled_entry(_LINEAR_VARIANTS[dtype])
    threads = torch.get_num_threads() if outputs * inputs >= _SERIAL_WEIGHTS else 1
    tasks = min(max(-(-outputs // _TASK_OUTPUTS), 4 * threads), outputs)
    at_once = -(-inputs // (pieces * _CHUNK)) * _CHUNK
    wide = x.float().contiguous()
    out = x.new_empty((*shape[:-1], outputs))
    sizes = 0, 0, tasks, size // inputs, inputs, outputs, -(-outputs // tasks), at_once, size > _PREFETCH_INPUTS
    addresses = wide.data_ptr(), weight_address, bias_address, out.data_ptr()
    _run(entry, array("q", (*sizes, *addresses)), (wide, weight, bias, out), 0, tasks, threads)
    return out


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _require_variant(x: Tensor, states_dtype: torch.dtype, bias: Tensor | None) -> tuple:
    if not NUMBA_AVAILABLE:
        raise ValueError(f"The numba scan is not available: {_REASON}.")
    if not numba_supports(x.dtype, states_dtype):
        raise ValueError(f"The numba scan has no kernel for {x.dtype} inputs and {states_dtype} states.")
    return _VARIANTS[x.dtype, states_dtype, bias is not None]


def numba_forward(
    gate_and_candidate: Tensor,
    h0: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the states h_1..h_T of the recurrence, as specified by `mingru_scan`.

    Args:
        gate_and_candidate: (B, T, 2N) pre-activations on the CPU, gates first; float32, bfloat16 or float64. Any
            strides between rows.
        h0: (B, 1, N) state before step 0; 0.5 if None.
        mask: (B, T) boolean; where False the state passes through.
        reset: (B, T) boolean; where True the state is set to 0.5 before this step, before the mask is applied.
        dtype: dtype of the states: the inputs' dtype, or float32 for bfloat16 inputs.
        out: (B, T, N) tensor of that dtype to write to, last axis contiguous; a new one if None.
        bias: (2N,) added to the pre-activations in the accumulation dtype; no bias if None.

    Returns:
        (B, T, N) states; (B, 1, N) the last one in float32 (float64 for float64), as a separate tensor.

    Raises:
        ValueError: if numba is missing or the dtypes have no kernel.

    Precision: float32 (float64 for float64) with compensated sums: the relative error is about 1e-6 after a million
    steps, even where the state hardly changes from one step to the next.
    Cost: O(B T N), one pass over memory.
    """
    forward, _ = _require_variant(gate_and_candidate, dtype, bias)
    x = _rows(gate_and_candidate)
    batch, steps, width = x.shape
    states = x.new_empty((batch, steps, width // 2), dtype=dtype) if out is None else out
    assert states.numel() > 0
    arguments, carry, threads, memory = _prepare(x, h0, states, mask, reset, bias)
    entry, blocks, pieces = _compiled_entry(forward), arguments[_BLOCKS], arguments[_PIECES]
    _run(entry, arguments, memory, 0, batch * blocks * pieces, threads)
    if pieces > 1:
        _run(entry, arguments, memory, 1, batch * blocks, threads)
    return states, carry[pieces - 1].unsqueeze(1).clone()  # a view would keep the whole carry


def numba_backward(
    grad: Tensor,
    grad_last: Tensor | None,
    gate_and_candidate: Tensor,
    h0: Tensor | None,
    states: Tensor,
    mask: Tensor | None,
    reset: Tensor | None,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the recurrence; z and g are recomputed from the pre-activations.

    Args:
        grad: (B, T, N) gradient of the states, in their dtype.
        grad_last: (B, 1, N) gradient of the separately returned last state; 0 if None.
        gate_and_candidate, h0, mask, reset, bias: as given to `numba_forward`.
        states: (B, T, N) states that `numba_forward` returned.
        out: (B, T, 2N) contiguous tensor of the inputs' dtype to write to; a new one if None.

    Returns:
        (B, T, 2N) gradient of the pre-activations in their dtype, whose sum over B and T is the gradient of the bias;
        (B, 1, N) gradient of the initial state in float32 (float64 for float64).

    Raises:
        ValueError: if numba is missing or the dtypes have no kernel.
    """
    _, backward = _require_variant(gate_and_candidate, states.dtype, bias)
    x, states, grad = _rows(gate_and_candidate), _rows(states), _rows(grad.to(states.dtype))
    batch, steps, channels = states.shape
    grad_x = x.new_empty((batch, steps, 2 * channels)) if out is None else out
    assert states.numel() > 0
    arguments, carry, threads, memory = _prepare(x, h0, states, mask, reset, bias)
    half = carry.new_full((channels,), INITIAL_STATE)
    grad_last = None if grad_last is None else grad_last.to(carry.dtype).contiguous()
    gradients = grad.data_ptr(), grad.stride(0), grad.stride(1), grad_x.data_ptr(), half.data_ptr()
    arguments.extend((*gradients, _data_ptr(grad_last)))
    memory = (*memory, grad, grad_last, grad_x, half)
    entry, blocks, pieces = _compiled_entry(backward), arguments[_BLOCKS], arguments[_PIECES]
    _run(entry, arguments, memory, 0, batch * blocks * pieces, threads)
    if pieces > 1:
        _run(entry, arguments, memory, 1, batch * blocks, threads)
    return grad_x, carry[0].unsqueeze(1).clone()  # a view would keep the whole carry


__all__ = [
    "NUMBA_AVAILABLE",
    "numba_backward",
    "numba_forward",
    "numba_linear",
    "numba_step",
    "numba_supports",
    "unavailable_reason",
]
