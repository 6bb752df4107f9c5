"""The MinGRU scan on a CPU, fused: one pass over memory forward, one backward, compiled by numba where it is there.

    h_t = (1 - z_t) h_{t-1} + z_t g(candidate_t),    z_t = sigmoid(gate_t)

The equation is that of `scan_reference`, which the tests hold this against. A row of N states stays in the
first-level cache while time passes over it; gates, candidates and results are touched once. Every thread takes one
task after another: some channels of one batch row, and where rows and channels are fewer than threads, a piece of
time (see `_repair_forward`). The result is the same to the last bit for any number of threads.

A second kernel does the linear maps of a decoding step. It is in this file since numba's cache on disk looks at the
file of a kernel alone: it would keep one whose loads and stores, in another file, have changed.

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
    numba, _REASON = None, f"numba cannot be imported ({error}); `pip install numba` adds it"
except Exception as error:  # an installed numba that this NumPy or Python breaks must not break the package
    numba, _REASON = None, f"the installed numba cannot be used ({type(error).__name__}: {error})"

NUMBA_AVAILABLE = numba is not None

# Below this many states a second thread costs more than it saves.
_SERIAL_ELEMENTS = 131_072
# Narrower blocks of channels waste cache lines and the processor's prefetching.
_MIN_BLOCK = 256
# Shorter pieces of time are not worth the second look at their beginnings.
_MIN_PIECE = 512


def unavailable_reason() -> str | None:
    """Why the numba scan cannot be used, in words for an error message; None where it can."""
    return _REASON


def numba_supports(input_dtype: torch.dtype, states_dtype: torch.dtype) -> bool:
    """Whether there is a kernel for inputs and states of these dtypes."""
    return (input_dtype, states_dtype, False) in _VARIANTS


# --- Loads, stores and exp as LLVM instructions. Arrays are plain addresses (int64). Tags, values whose type alone
# --- counts, say what lies there: float32, float64, or uint16 for the bits of bfloat16.

_FLAGS = ("contract", "nsz", "arcp", "afn")  # not nnan and ninf: NaN and infinities keep their meaning
_OPTIONS = {"fastmath": set(_FLAGS), "error_model": "numpy"}


def _compiled(function):
    """numba.njit with this file's options, or the function itself where numba is missing."""
    if numba is None:
        return function
    return numba.njit(**_OPTIONS, nogil=True, forceinline=function.__name__.endswith("_row"))(function)


if numba is not None:

    class _BFloat16(ir.Type):
        """LLVM's type bfloat, which llvmlite does not know; used where the processor can round to it."""

        def _to_string(self):
            return "bfloat"

        def __eq__(self, other):
            return isinstance(other, type(self))

        def __hash__(self):
            return hash(type(self))

    # Older LLVM, and every LLVM on other processors, calls a function here that is not there.
    _ROUNDS_BFLOAT16 = (
        llvm.llvm_version_info[0] >= 20
        and (numba.config.CPU_NAME or numba.config.CPU_FEATURES) is None
        and llvm.get_host_cpu_features().get("avx512bf16", False)
    )
    # LLVM keeps to 256 bits on Intel's processors, for the sake of the first ones that had 512 and slowed down by
    # them. Those with this feature do not, and the kernels are up to a third faster.
    _WIDE_VECTORS = bool(llvm.get_host_cpu_features().get("avx512vbmi2", False))
else:

    def intrinsic(*args, **kwargs):
        return (lambda function: function) if kwargs else args[0]


def _ir_type(tag):
    return {types.uint16: ir.IntType(16), types.float32: ir.FloatType(), types.float64: ir.DoubleType()}[tag]


def _pointer(builder, base, index, tag):
    element = _ir_type(tag)
    return builder.gep(builder.inttoptr(base, element.as_pointer()), [index])


# What the arrays of a kernel are to one another: disjoint. LLVM is told so, and vectorises the loops without checks.
_SCOPES = ("read", "state", "low", "write", "write2")


def _declare_disjoint(builder, instruction, scope):
    if _WIDE_VECTORS:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite does not know its name
    module = builder.module
    domain = module.add_metadata(["mingru scan"])
    scopes = {name: module.add_metadata([f"mingru {name}", domain]) for name in _SCOPES}
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[scope]]))
    instruction.set_metadata("noalias", module.add_metadata([scopes[name] for name in _SCOPES if name != scope]))


@intrinsic(prefer_literal=True)
def _load(typing_context, base, index, tag, scope):
    """Element `index` of the array at `base`, widened from bfloat16 to float32."""

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
    """The value and element `index` of the bias at `base`; the value as it is where the tag is None."""

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
    """Fetch the cache lines of _CHUNK elements, which need not exist, into the second-level cache."""

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
    """The bits of a float, so that equal means the same to the last one and NaN equals itself."""
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


# 2^f on |f| <= 1/2, minimax for the relative error with the first coefficient held at 1: 2.8e-6 where states are
# bfloat16 (4e-3 a rounding), 9.2e-8 for float32, 3.4e-18 for float64.
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
# Mantissa bits, exponent bias, and where exp becomes 0.
_EXP_FORMAT = {32: (23, 127, 88.0), 64: (52, 1023, 709.0)}


@intrinsic
def _exp_minus(typing_context, x, tag):
    """exp(-x) for x >= 0, without a branch; 0 where the true value is below the normal numbers, NaN for NaN.

    exp(-x) = 2^n 2^f, n the integer nearest to -x / ln 2. Adding 1.5 times 2^mantissa rounds to that integer and
    leaves it in the low bits, and the exponent's bias with it; moved up, they are the bits of 2^n, or of 0.
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

        # Ordered comparison: a NaN is not above, and stays.
        value = builder.select(builder.fcmp_ordered(">", args[0], real(highest)), real(highest), args[0])
        shifted = multiply_add(value, minus_log2_e, magic)
        n = builder.fsub(shifted, magic, flags=_FLAGS)
        f = multiply_add(value, minus_log2_e, builder.fneg(n, flags=_FLAGS))
        square = builder.fmul(f, f, flags=_FLAGS)
        even, odd = (horner(_EXP_COEFFICIENTS[tag.bitwidth][first::2], square) for first in (0, 1))
        polynomial = multiply_add(odd, f, even)  # two short chains instead of a long one
        power = builder.bitcast(builder.shl(builder.bitcast(shifted, integer), integer(mantissa)), real)
        return builder.fmul(polynomial, power, flags=_FLAGS)

    return x(x, tag), generate


# --- The kernels. Their arguments are one array of int64; these are its entries. Strides are in elements, those of
# --- the last axis are 1, and 0 is the address of what is absent.

_COUNTER, _PHASE, _NUM_TASKS = 0, 1, 2
_BATCH, _STEPS, _CHANNELS, _BLOCKS, _BLOCK, _PIECES, _PIECE = 3, 4, 5, 6, 7, 8, 9
_X, _X_BATCH, _X_STEP = 10, 11, 12
_STATES, _STATES_BATCH, _STATES_STEP = 13, 14, 15
_H0, _MASK, _RESET = 16, 17, 18
# carry: (pieces + 1, B, N), what one step hands to the next; low: elements from there to as many numbers again, what
# rounding has left out of each.
_CARRY, _LOW = 19, 20
_BIAS = 21  # (2N,), added to gates and candidates
_GRAD, _GRAD_BATCH, _GRAD_STEP, _GRAD_X, _HALF = 22, 23, 24, 25, 26  # half: a row of N times 0.5
_GRAD_LAST = 27  # (B, N), the gradient of the last state in its own right

# Rows are worked through in chunks of _CHUNK channels, and the same chunk _AHEAD steps ahead is prefetched: the
# processor's own prefetcher starts anew with every row.
_CHUNK = 64
_AHEAD = 3
_CACHE_LINE = 64  # bytes


@_compiled
def _fill(row, low_row, count, number, A):
    """The number, to which rounding left nothing to add."""
    for c in range(count):
        _store(row, c, _as(number, A), A, "state")
        _store(low_row, c, _as(0.0, A), A, "low")


@_compiled
def _copy(source, target, count, A):
    for c in range(count):
        _store(target, c, _load(source, c, A, "state"), A, "state")


@_compiled
def _same(first, second, low, count, A):
    """Whether two rows of carry are equal to the last bit, and what rounding left out of them is."""
    first_low, second_low = _address(first, low, A), _address(second, low, A)
    difference = _bits(A) ^ _bits(A)
    for c in range(count):
        difference |= _bits(_load(first, c, A, "state")) ^ _bits(_load(second, c, A, "state"))
        difference |= _bits(_load(first_low, c, A, "low")) ^ _bits(_load(second_low, c, A, "low"))
    return difference == 0


@_compiled
def _forward_row(gate_row, candidate_row, gate_bias, candidate_bias, h_row, low_row, out_row, first, last, X, Y, A, W):
    """One step of the equation. With e = exp(-|gate|) the sigmoids of gate and -gate are 1 and e over 1 + e.

    g as a fraction, too, leaves one division. For a negative gate h + z (g - h) is computed, and what rounding leaves
    out of the sum is added to the next one (Kahan): a state that changes by one part in 10^8 a step does change.
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
    """One step of channels first..first + count of batch row b: h_row goes from h_{t-1} to h_t, and is written out."""
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
    """A piece of time from the true state if it is the first one, from a guess if not."""
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
    """Make pieces that began with a guess exact: run them again from the true state until nothing changes.

    Two states under the same gates approach each other, and rounding makes them equal after some tens of steps for
    usual gates. From there on the piece is right as it stands; where they never meet, all of it is done again. The
    last state ends up in the last piece's carry.
    """
    batch, channels = _argument(a, _BATCH), _argument(a, _CHANNELS)
    carry = _argument(a, _CARRY)
    h_row = _address(carry, b * channels + first, A)  # the true state; that of piece 0 is
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
    """The next piece of work: whether there is one, batch row, piece of time, first channel, number of channels."""
    task = _next_task(a)
    pieces = _argument(a, _PIECES) if _argument(a, _PHASE) == 0 else 1
    row, piece = task // pieces, task % pieces
    b, block = row // _argument(a, _BLOCKS), row % _argument(a, _BLOCKS)
    first = block * _argument(a, _BLOCK)
    count = min(_argument(a, _BLOCK), _argument(a, _CHANNELS) - first)
    return task < _argument(a, _NUM_TASKS), b, piece, first, count


@_compiled
def _forward(a, X, Y, A, W):
    """Take tasks until none is left; as many threads at a time as like."""
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
    """The gradients of one step, r from dL/dh_t to dL/dh_{t-1}, with dh the sum of r and the output's own gradient.

    dL/dcandidate = dh z g', dL/dh_{t-1} = dh (1 - z), dL/dgate = dh z (1 - z) (g - h_{t-1}).
    """
    for c in range(first, last):
        gate = _biased(_load(gate_row, c, X, "read"), gate_bias, c, W)
        candidate = _biased(_load(candidate_row, c, X, "read"), candidate_bias, c, W)
        one = _as(1.0, A)
        e = _exp_minus(abs(gate), Y)
        s = _exp_minus(abs(candidate), Y)
        # As in the forward pass. 1 for a NaN candidate keeps it out of dL/dh_{t-1}, where the candidate has no part.
        gate_denominator = one + e
        g_denominator = one + s if candidate < 0 else one
        inverse = one / (gate_denominator * g_denominator)
        large = inverse * g_denominator  # sigmoid(|gate|)
        s = s * (inverse * gate_denominator)  # sigmoid(candidate) where that is negative, NaN for NaN
        g = candidate + _as(0.5, A) if candidate >= 0 else s
        slope = one if candidate >= 0 else s - s * s
        r, more = _load(r_row, c, A, "state"), _load(grad_row, c, Y, "read") + _load(low_row, c, A, "low")
        dh = r + more
        low = more - (dh - r)
        dh_large = dh * large
        dh_small = dh_large * e
        dh_z = dh_large if gate >= 0 else dh_small
        # As in the forward pass: dh - z dh where z is small, with what rounding leaves out of it.
        less = dh_small - low
        r = dh - less
        _store(low_row, c, _as(0.0, A) if gate >= 0 else (dh - r) - less, A, "low")
        _store(r_row, c, dh_small if gate >= 0 else r, A, "state")
        _store(grad_candidate_row, c, dh_z * slope, X, "write2")
        difference = g - _load(previous_row, c, P, "read")
        _store(grad_gate_row, c, dh_small * large * difference, X, "write")


@_compiled
def _backward_step(a, b, t, first, count, r_row, X, Y, A, W):
    """One step back: r_row goes from the gradient that h_t has from later steps to that of h_{t-1}."""
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
    """A piece of time, backwards; all but the last one begin with a guess, a gradient of 0 from later steps."""
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
    """As `_repair_forward`, from the last piece to the first; the gradient of h0 ends up in piece 0's carry."""
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
    """Take tasks until none is left; as many threads at a time as like."""
    more, b, piece, first, count = _take_task(a)
    while more:
        if _argument(a, _PHASE) == 0:
            _backward_piece(a, b, piece, first, count, X, Y, A, W)
        else:
            _repair_backward(a, b, first, count, X, Y, A, W)
        more, b, piece, first, count = _take_task(a)


# --- A linear map of few rows. It reads every weight once, and so its time is that of reading memory. The arguments,
# --- after those of every kernel:

_ROWS, _INPUTS, _OUTPUTS, _OUTPUTS_PER_TASK, _INPUTS_AT_ONCE, _FETCHES_AHEAD = 3, 4, 5, 6, 7, 8
_IN, _WEIGHT, _LINEAR_BIAS, _OUT = 9, 10, 11, 12


def _compiled_sum(function):
    """As `_compiled`, for loops that add up: the order is free, so that LLVM keeps a partial sum for each lane."""
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
    """With four rows of x, so that a weight is loaded once for them."""
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
    """Write the sum that begins with `first`, or go on with what stands there."""
    before = first if start == 0 else _load(out, index, W, "state")
    _store(out, index, before + sum_, W, "state")


@_compiled
def _linear_output(a, o, start, count, W, A):
    """Add to output o of every row what comes of inputs start..start + count; the first ones add to the bias."""
    rows, inputs, outputs = _argument(a, _ROWS), _argument(a, _INPUTS), _argument(a, _OUTPUTS)
    bias, out = _argument(a, _LINEAR_BIAS), _address(_argument(a, _OUT), o, W)
    x, weights = _address(_argument(a, _IN), start, A), _address(_argument(a, _WEIGHT), o * inputs + start, W)
    if _argument(a, _FETCHES_AHEAD) != 0:
        for i in range(0, count, _CHUNK):
            _prefetch(weights, 2 * inputs + i, W)  # of the output after the next one, which need not exist
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
    """Take blocks of outputs until none is left; as many threads at a time as like."""
    inputs, at_once = _argument(a, _INPUTS), _argument(a, _INPUTS_AT_ONCE)
    task = _next_task(a)
    while task < _argument(a, _NUM_TASKS):
        first = task * _argument(a, _OUTPUTS_PER_TASK)
        last = min(first + _argument(a, _OUTPUTS_PER_TASK), _argument(a, _OUTPUTS))
        for start in range(0, inputs, at_once):
            for o in range(first, last):
                _linear_output(a, o, start, min(at_once, inputs - start), W, A)
        task = _next_task(a)


# Each kernel for each kind of arrays. Tags give the types: of the inputs, of the states, of the state at work and of
# the bias. The closures hold tags and nothing else, so that numba's cache on disk finds them again.
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
    """A compiled kernel: calling it with the address of its arguments runs tasks, without Python's lock."""

    def __init__(self, function):
        # The kernels alone are kept on the disk, not what is compiled into them: here numba reads and writes its cache
        # at once, and whatever is wrong with it shows.
        try:
            self.compiled = numba.cfunc("void(int64)", **_OPTIONS, cache=True)(function)
        except Exception:  # the folder cannot be written, the disk is full, a file is damaged
            self.compiled = numba.cfunc("void(int64)", **_OPTIONS)(function)
            with contextlib.suppress(Exception):  # so that the next process writes it anew
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
        # Handlers of signals run there alone. One that comes here, too, must not find itself within the compiler.
        with contextlib.suppress(RuntimeError):  # at the interpreter's exit there are no new threads
            thread = threading.Thread(target=_try_to_compile, args=(function,))
            thread.start()
            thread.join()
    return _compile(function)


def _try_to_compile(function) -> None:
    with contextlib.suppress(Exception):  # it shows where the kernel is asked for
        _compile(function)


def _compile(function) -> _Entry:
    with _COMPILING:  # numba compiles on one thread at a time; from its cache on disk in 0.1 s
        entry = _entries.get(function) or _Entry(function)
        _entries[function] = entry
    return entry


# --- Threads. torch's own OpenMP pool first: its threads are warm after a matrix product, and there are no others to
# --- contend with. A pool of Python threads otherwise, and in a forked process, where OpenMP's threads are gone.

_forked = False
_pool: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    global _forked, _pool, _COMPILING
    _forked, _pool, _COMPILING = True, None, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _gomp_parallel():
    """GOMP_parallel(function, argument, number of threads, 0) of the GNU OpenMP library torch runs on, or None."""
    place = os.path.dirname(torch.__file__)
    with contextlib.suppress(OSError, AttributeError):
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes())  # of any file: names need not be UTF-8
        for path in sorted({line.split(maxsplit=5)[-1] for line in maps.split("\n") if "libgomp" in line}):
            if path.startswith((place + os.sep, place + ".libs" + os.sep)):
                function = ctypes.CDLL(path).GOMP_parallel
                function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                function.restype = None
                return function
    return None


def _help(entry: _Entry, arguments: array, memory: tuple) -> None:
    """What a thread of the pool runs; it keeps alive what it writes to, should the caller be interrupted."""
    entry.call(arguments.buffer_info()[0])


def _run(entry: _Entry, arguments: array, memory: tuple, phase: int, num_tasks: int, threads: int) -> None:
    """Let the kernel work off its tasks on as many threads, this one among them; `memory` is what they work on."""
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
    with contextlib.suppress(RuntimeError):  # at the interpreter's exit there are no threads any more
        for _ in range(threads - 1):
            helpers.append(_pool.submit(_help, entry, arguments, memory))
    entry.call(address)
    for helper in helpers:
        if not helper.cancel():  # one that never began has nothing left to do; the others still use the arguments
            helper.result()


def _plan(batch: int, steps: int, channels: int, threads: int) -> tuple[int, int, int, int]:
    """How many blocks of channels and their width, how many pieces of time and their length: enough for all threads.

    Rows first, then channels, and time only for what is left, since a piece of time may have to be done again.
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
    """Arguments that both kernels share, the carry, the number of threads, and the memory that is worked on."""
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
    """Memory of a thread that lives on from call to call."""

    kept: tuple[int, int, Tensor | None] = 0, 0, None  # in one piece: an interrupt must not part them

    def at_least(self, size: int) -> tuple[int, int, Tensor | None]:
        """Size, address and owner of at least `size` bytes; they are there as long as the owner is held."""
        kept = self.kept
        if size > kept[0]:
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever the default
            kept = self.kept = size, memory.data_ptr(), memory
        return kept


_scratch = _Scratch()
_step_calls: dict[tuple[torch.dtype, torch.dtype, bool], Callable] = {}


def numba_step(x: Tensor, h0: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`numba_forward` for one token, whose arithmetic takes less time than the preparations there.

    Args:
        x: (B, 1, 2N) pre-activations on the CPU.
        h0: (B, 1, N) state before the step, or None.
        bias: (2N,) added to the pre-activations, or None.
        dtype: of the state after it.

    Returns:
        (B, 1, N) state after the step; None if the arguments are not of the usual kind: `numba_forward` takes care
        of the rest.
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
    scratch = _scratch.at_least(16 * size)  # two rows of at most 8 bytes a number
    sizes = 0, 0, batch, batch, 1, channels, 1, channels, 1, 1
    inputs = x.data_ptr(), shape[2], 0, states.data_ptr(), channels, 0, h0_address, 0, 0
    arguments = array("q", (*sizes, *inputs, scratch[1], size, bias_address))
    call(arguments.buffer_info()[0])
    return states


# Linear maps that gain (LOG.md has the measurements) have at least so many inputs, so many weights, and at most so
# many rows. Beside oneDNN, torch's choice for bfloat16, smaller ones gain, since a call takes longer, and fewer rows.
_MIN_INPUTS = 128
_LINEAR_LIMITS = {torch.float32: (1 << 15, 16), torch.bfloat16: (1 << 14, 8)}
# Numbers of all rows together: so many stay in the first-level cache while weights pass by, and from so many on the
# processor does not fetch weights ahead by itself.
_NEAR_INPUTS, _PREFETCH_INPUTS = 6144, 3072
_TASK_OUTPUTS = 512
# From so many weights on, more than one thread gains.
_SERIAL_WEIGHTS = 1 << 18


def numba_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """A linear map of few rows, for up to four of them in about the time that reading the weights takes.

    Args:
        x: (*, E) on the CPU.
        weight: (F, E).
        bias: (F,), or None.

    Returns:
        (*, F) x weight^T + bias; None if the arguments are not of the usual kind (float32 or bfloat16 throughout,
        parameters contiguous, few rows, many weights): F.linear takes care of the rest.

    Precision: sums in float32, one rounding for bfloat16.
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
    if pieces > 1 and dtype != torch.float32:  # oneDNN is as fast, and sums would be rounded on the way
        return None
    weight_address, bias_address = weight.data_ptr(), _data_ptr(bias)
    if not (x.data_ptr() and weight_address and (bias_address or bias is None)):  # sharding may have taken the memory
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
    """States h_1..h_T of the recurrence; the contract is that of `mingru_scan`.

    Args:
        gate_and_candidate: (B, T, 2N) pre-activations on the CPU, gates first; float32, bfloat16 or float64. Any
            strides between rows.
        h0: (B, 1, N) state before step 0; 0.5 if None.
        mask: (B, T) boolean; where False the state passes through.
        reset: (B, T) boolean; where True the state is 0.5 before this step, before the mask is looked at.
        dtype: of the states: the inputs' dtype, or float32 for bfloat16 inputs.
        out: (B, T, N) tensor of that dtype to write to, last axis contiguous; a new one if None.
        bias: (2N,) added to the pre-activations, unrounded; None for none.

    Returns:
        (B, T, N) states; (B, 1, N) the last one in float32 (float64 for float64), a tensor of its own.

    Raises:
        ValueError: if numba is missing or the dtypes have no kernel.

    Precision: state and accumulation float32 (float64 for float64), with compensated sums: the relative error is
    about 1e-6 after a million steps, also where the state hardly changes from one to the next.
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
    return states, carry[pieces - 1].unsqueeze(1).clone()  # without the rest of the carry


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
    """Gradients of the recurrence; z and g are computed again from the pre-activations.

    Args:
        grad: (B, T, N) gradient of the states, in their dtype.
        grad_last: (B, 1, N) gradient of the last state that was returned beside them; None for 0.
        gate_and_candidate, h0, mask, reset, bias: as given to `numba_forward`.
        states: (B, T, N) what it returned.
        out: (B, T, 2N) contiguous tensor of the inputs' dtype to write to; a new one if None.

    Returns:
        (B, T, 2N) gradient of the pre-activations in their dtype, whose sum over B and T is that of the bias;
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
    return grad_x, carry[0].unsqueeze(1).clone()  # without the rest of the carry


__all__ = [
    "NUMBA_AVAILABLE",
    "numba_backward",
    "numba_forward",
    "numba_linear",
    "numba_step",
    "numba_supports",
    "unavailable_reason",
]
