"""The scan: outputs and gradients of every backend compared with a float64 loop, and the errors for wrong input."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_errors import error_over_largest, relative_error
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import mingru_hf.scan
from mingru_hf.scan import mingru_scan, mingru_step
from mingru_hf.scan_numba import NUMBA_AVAILABLE
from mingru_hf.scan_reference import scan_doubling, scan_reference
from mingru_hf.scan_torch import torch_backward, torch_forward

needs_numba = pytest.mark.skipif(not NUMBA_AVAILABLE, reason="numba is not installed")
FAST_BACKENDS = ["torch", pytest.param("numba", marks=needs_numba)]

# Largest relative error of a state in float32 against float64, at any T: a few roundings, since errors decay.
FLOAT32_RELATIVE = 1e-5
# The terms of a gradient may cancel, so its error is relative to its largest element.
GRADIENT_RELATIVE = 1e-5
# One rounding of the result to bfloat16 (8 bits), up or down. Gradients are rounded once more themselves.
BFLOAT16_RELATIVE = 2.0**-8


def make_inputs(batch, steps, channels, trailing=(), scale=2.0, flags=""):
    """Return float32 pre-activations and initial state, and the boolean flags named in `flags` ("mask", "reset")."""
    x = scale * torch.randn(batch, steps, 2 * channels, *trailing)
    h0 = torch.rand(batch, 1, channels, *trailing) + 0.01
    mask = torch.rand(batch, steps) > 0.3 if "mask" in flags else None
    reset = torch.rand(batch, steps) > 0.8 if "reset" in flags else None
    return x, h0, mask, reset


def run(x, h0, mask, reset, weight, function, **kwargs):
    """Return the states, and the gradients of their weighted sum with respect to x and h0."""
    x, h0 = x.detach().requires_grad_(), h0.detach().requires_grad_()
    states = function(x, h0, mask, reset, **kwargs)
    (states * weight.to(states.dtype)).sum().backward()
    return states.detach(), x.grad, h0.grad


def scan_and_last(*args, **kwargs):
    """Return the states plus twice the last state: a function of both results of the scan."""
    states, last = mingru_scan(*args, return_last_state=True, **kwargs)
    return states + 2 * last


@pytest.mark.parametrize("flags", ["", "mask", "reset", "mask reset"])
@pytest.mark.parametrize("steps", [1, 2, 63, 1000])
@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_states_and_gradients_equal_the_float64_loop(backend, steps, flags):
    x, h0, mask, reset = make_inputs(3, steps, 7, flags=flags)
    weight = torch.randn(3, steps, 7)
    expected = run(x.double(), h0.double(), mask, reset, weight, scan_reference)
    states, grad_x, grad_h0 = run(x, h0, mask, reset, weight, mingru_scan, backend=backend)
    assert states.dtype == torch.float32
    assert relative_error(states, expected[0]) <= FLOAT32_RELATIVE
    assert error_over_largest(grad_x, expected[1]) <= GRADIENT_RELATIVE
    assert error_over_largest(grad_h0, expected[2]) <= GRADIENT_RELATIVE


@pytest.mark.parametrize("flags", ["", "mask reset"])
@pytest.mark.parametrize("shape", [(3, 1, 7), (2, 63, 130), (1, 1000, 5), (2, 6, 3, (4, 5)), (1, 3000, 300)])
@pytest.mark.parametrize("backend", ["reference", "auto", *FAST_BACKENDS])
def test_a_bias_in_the_scan_is_one_in_front_of_it(backend, shape, flags):
    x, h0, mask, reset = make_inputs(*shape, flags=flags)
    bias, weight = torch.randn(x.shape[2]), torch.randn(*x.shape[:2], *h0.shape[2:])
    spread = bias.reshape(-1, *[1] * (x.dim() - 3))
    expected = run((x + spread).double(), h0.double(), mask, reset, weight, scan_reference)
    bias.requires_grad_()
    actual = run(x, h0, mask, reset, weight, mingru_scan, bias=bias, backend=backend)
    for result, reference in zip(actual, expected, strict=True):
        assert error_over_largest(result, reference) <= GRADIENT_RELATIVE
    expected_grad = expected[1].sum((0, 1)).flatten(1).sum(1) if x.dim() > 3 else expected[1].sum((0, 1))
    assert error_over_largest(bias.grad, expected_grad) <= GRADIENT_RELATIVE
    with torch.no_grad():
        without_autograd = mingru_scan(x, h0, mask, reset, bias=bias, backend=backend)
    torch.testing.assert_close(without_autograd, actual[0])


@pytest.mark.parametrize("states_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_bias_meets_bfloat16_inputs(backend, states_dtype):
    x, h0, _, _ = make_inputs(2, 63, 33)
    x, bias = x.bfloat16(), torch.randn(66)
    exact = scan_reference((x.double() + bias), h0.double())
    states = mingru_scan(x, h0, bias=bias, backend=backend, dtype=states_dtype)
    assert states.dtype == states_dtype
    # The torch backend adds the bias in bfloat16, as a projection would, which makes three roundings: of the bias, the
    # sum and the state.
    assert error_over_largest(states, exact) <= (3 if backend == "torch" else 1) * BFLOAT16_RELATIVE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 257), (2, 4, (3, 2)), (300, 512)])
@pytest.mark.parametrize("backend", ["auto", "reference", *FAST_BACKENDS])
def test_a_single_step_is_a_scan_of_one_step(backend, shape, dtype):
    batch, channels, *trailing = shape
    x, h0, _, _ = make_inputs(batch, 1, channels, *trailing)
    x, bias = x.to(dtype), torch.randn(2 * channels).to(dtype)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    h0 = h0.to(state_dtype)
    for h in (h0, None, h0.transpose(0, 2).contiguous().transpose(0, 2)):
        for inputs in (x, x.transpose(0, 2).contiguous().transpose(0, 2)):
            for b in (None, bias, bias.to(state_dtype)):
                for out_dtype in {state_dtype, dtype}:
                    state = mingru_step(inputs, h, bias=b, backend=backend, dtype=out_dtype)
                    expected = mingru_scan(inputs, h, bias=b, backend=backend, dtype=out_dtype)
                    assert state.dtype == out_dtype
                    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="h0 must have shape"):
        mingru_step(x, torch.ones(batch, 2, channels, dtype=state_dtype), backend=backend)
    with pytest.raises(ValueError, match="bias must have shape"):
        mingru_step(x, h0, bias=torch.ones(2 * channels + 1, dtype=state_dtype), backend=backend)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize(
    "mapped",
    ["x", "h0", "bias", "reset", "x h0", "x bias mask", "x h0 bias mask reset"],
    ids=lambda m: m.replace(" ", "+"),
)
@pytest.mark.parametrize("trailing", [(), (2, 3)], ids=["rows", "frames"])
def test_vmap_runs_the_samples_as_one_batch(mapped, trailing, backend):
    """Map over any of the inputs, along their first or last axis and in nested calls, with gradients."""
    shape = {"x": (2, 5, 6, *trailing), "h0": (2, 1, 3, *trailing), "bias": (6,), "mask": (2, 5), "reset": (2, 5)}
    names, mapped = list(shape), mapped.split()
    inputs, in_dims = [], []
    for name, size in shape.items():
        many = torch.randn(4, *size) if name in mapped else torch.randn(size)
        many = many > 0 if name in ("mask", "reset") else many.abs().requires_grad_()
        inputs.append(many)
        in_dims.append(0 if name in mapped else None)

    def scan(x, h0, bias, mask, reset):
        return scan_and_last(x, h0, mask, reset, bias=bias, backend=backend)

    def sample(i):
        return [many if axis is None else many[i] for many, axis in zip(inputs, in_dims, strict=True)]

    expected = torch.stack([scan(*sample(i)) for i in range(4)])
    last = [None if axis is None else -1 for axis in in_dims]
    elsewhere = [many if axis is None else many.movedim(0, -1) for many, axis in zip(inputs, in_dims, strict=True)]
    twice = [many if axis is None else many.unflatten(0, (2, 2)) for many, axis in zip(inputs, in_dims, strict=True)]
    results = [
        torch.vmap(scan, tuple(in_dims))(*inputs),
        torch.vmap(scan, tuple(last))(*elsewhere),
        torch.vmap(torch.vmap(scan, tuple(in_dims)), tuple(in_dims))(*twice).flatten(0, 1),
    ]
    leaves = inputs[: names.index("mask")]
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, weight)
    for result in results:
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(torch.autograd.grad(result, leaves, weight), expected_grads)


def test_without_rows_a_bias_has_a_gradient_of_zero():
    """Not None: DistributedDataParallel would take the bias for an unused parameter."""
    bias = torch.randn(6, requires_grad=True)
    mingru_scan(torch.randn(0, 5, 6), bias=bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros(6))


@pytest.mark.parametrize("scan", [mingru_scan, mingru_step])
@pytest.mark.parametrize("name", ["h0", "bias"])
def test_inputs_on_another_device_are_refused(scan, name):
    """A kernel receives only addresses and would read the inputs as if they were on the CPU."""
    inputs = {"h0": torch.ones(2, 1, 3), "bias": torch.ones(6)}
    inputs[name] = inputs[name].to("meta")
    with torch.no_grad(), pytest.raises(ValueError, match=f"{name} must be on cpu, .* got meta"):
        scan(torch.randn(2, 1, 6), **inputs)


@pytest.mark.parametrize("name", ["mask", "reset"])
def test_flags_on_another_device_are_refused(name):
    flags = {name: torch.ones(2, 1, dtype=torch.bool, device="meta")}
    with pytest.raises(ValueError, match=f"{name} must be on cpu, .* got meta"):
        mingru_scan(torch.randn(2, 1, 6), **flags)


# The torch scan cuts (1, 70, 3) and the last three into chunks of time; all but (1, 16, 1) leave a remainder.
@pytest.mark.parametrize(
    "shape", [(1, 5, 1), (1, 70, 3), (2, 9, 257), (2, 5, 3, (4, 5)), (1, 16, 1), (2, 1003, 5, (2, 3)), (1, 1030, 130)]
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_odd_shapes_and_trailing_axes(backend, shape):
    x, h0, mask, reset = make_inputs(*shape, flags="mask reset")
    weight = torch.randn(*x.shape[:2], *h0.shape[2:])
    expected = run(x.double(), h0.double(), mask, reset, weight, scan_reference)
    actual = run(x, h0, mask, reset, weight, mingru_scan, backend=backend)
    for result, reference in zip(actual, expected, strict=True):
        assert result.shape == reference.shape
        assert error_over_largest(result, reference) <= GRADIENT_RELATIVE


@pytest.mark.parametrize("steps", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("bias", "scale"), [(0.0, 2.0), (-5.0, 0.0), (-7.0, 2.0), (-9.0, 1.0), (-14.0, 0.0), (-17.0, 0.0)]
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_long_sequences_keep_their_precision(backend, bias, scale, steps):
    """This includes states that remember millions of steps and change at each step by less than their rounding."""
    x, h0, _, _ = make_inputs(1, steps, 3, scale=1.0)
    x[..., :3] = scale * x[..., :3] + bias + torch.tensor([0.0, 0.2, 0.5])
    weight = torch.randn(1, steps, 3)
    states, grad_x, grad_h0 = run(x, h0, None, None, weight, mingru_scan, backend=backend)
    # The loop would take minutes to compute the gradients.
    expected = run(x.double(), h0.double(), None, None, weight, mingru_scan, backend=backend)
    largest = 1e-6 if backend == "numba" else 1e-5
    assert relative_error(states, scan_reference(x.double(), h0.double())) <= largest
    assert error_over_largest(grad_x, expected[1]) <= largest
    assert error_over_largest(grad_h0, expected[2]) <= largest


@pytest.mark.parametrize("pieces", [1, 40, 250])
@pytest.mark.parametrize("kind", ["below the bound", "above it", "masked between", "with a period", "for a while"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_long_memory_is_noticed(backend, kind, pieces):
    """The torch scan samples a few gates to decide whether float32 is precise enough."""
    steps = 20_000
    x, h0, _, _ = make_inputs(1, steps, 2, scale=1.0)
    x[..., :2], mask = {"below the bound": -4.86, "above it": -4.84}.get(kind, -9.0), None
    if kind == "masked between":
        mask = torch.arange(steps)[None] % 16 != 0
        x[:, ::16, :2] = 3.0
    if kind == "with a period":
        x[:, ::16, :2] = -5.0
    if kind == "for a while":  # and in one channel only
        x[:, 4000:, 0] = x[:, :, 1] = 0.0
    with torch.no_grad():
        expected, states, state = scan_reference(x.double(), h0.double(), mask), [], h0
        for first in range(0, steps, steps // pieces):
            part = slice(first, first + steps // pieces)
            kept = None if mask is None else mask[:, part]
            states.append(mingru_scan(x[:, part], state, kept, backend=backend))
            state = states[-1][:, -1:]
    assert relative_error(torch.cat(states, dim=1), expected) <= FLOAT32_RELATIVE


@pytest.mark.parametrize("flags", ["", "mask"])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, -6.0), (0.0, 0.0)])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_memory_from_one_block_to_the_next(backend, scale, bias, flags):
    """The torch scan cuts time into 54 chunks of 55 steps, done in blocks of 18: memory outlasts them, or fades."""
    x, h0, mask, _ = make_inputs(1, 3000, 128, flags=flags)
    x[:, :, :128] = scale * x[:, :, :128] + bias
    weight = torch.randn(1, 3000, 128)
    expected = run(x.double(), h0.double(), mask, None, weight, scan_reference)
    actual = run(x, h0, mask, None, weight, mingru_scan, backend=backend)
    assert relative_error(actual[0], expected[0]) <= FLOAT32_RELATIVE
    for result, reference in zip(actual, expected, strict=True):
        assert error_over_largest(result, reference) <= GRADIENT_RELATIVE


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_what_is_left_of_a_start_counts_while_the_state_falls_with_it(backend):
    x, h0 = torch.full((1, 2500, 500), -40.0), torch.full((1, 1, 250), 10.0)
    x[..., :250], x[:, 0, 250:] = 4.0, 10.0
    states = mingru_scan(x, h0, backend=backend)
    assert relative_error(states, scan_reference(x.double(), h0.double())) <= FLOAT32_RELATIVE


@pytest.mark.parametrize("steps", [1, 63, 1000])
@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_bfloat16_rounds_only_its_inputs_and_outputs(backend, steps):
    x, h0, mask, reset = make_inputs(2, steps, 5, flags="mask reset")
    x, weight = x.bfloat16(), torch.randn(2, steps, 5).bfloat16()
    expected = run(x.double(), h0.double(), mask, reset, weight.double(), scan_reference)
    states, grad_x, grad_h0 = run(x, h0, mask, reset, weight, mingru_scan, backend=backend)
    assert states.dtype == grad_x.dtype == torch.bfloat16
    assert grad_h0.dtype == torch.float32
    assert relative_error(states, expected[0]) <= BFLOAT16_RELATIVE
    assert error_over_largest(grad_x, expected[1]) <= 2 * BFLOAT16_RELATIVE
    exact = mingru_scan(x, h0, mask, reset, backend=backend, dtype=torch.float32)
    assert relative_error(exact, expected[0]) <= FLOAT32_RELATIVE


@pytest.mark.parametrize("wanted", ["states and last", "last"])
@pytest.mark.parametrize("shape", [(3, 1, 7), (2, 63, 5, (2, 3)), (1, 1000, 3), (1, 3000, 64)])
@pytest.mark.parametrize("flags", ["", "mask", "mask reset", "slow"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_last_state_and_its_gradients(backend, shape, flags, wanted):
    x, h0, mask, reset = make_inputs(*shape, flags=flags)
    if flags == "slow":
        x[:, :, : shape[2]] -= 12  # pieces of time that start from a guess never reach the true state
    if reset is not None:
        reset[:, shape[1] // 2 :] = False  # otherwise little gradient flows back
    of_states, of_last = torch.randn(shape[0], shape[1], *h0.shape[2:]), 10 * torch.randn_like(h0)

    def run(x, h0, scan):
        x, h0 = x.clone().requires_grad_(), h0.clone().requires_grad_()
        states, last = scan(x, h0)
        loss = (last * of_last).sum() + (0 if wanted == "last" else (states * of_states).sum())
        return last.detach(), *torch.autograd.grad(loss, (x, h0))

    def loop(x, h0):
        states = scan_reference(x, h0, mask, reset)
        return states, states[:, -1:]

    expected = run(x.double(), h0.double(), loop)
    actual = run(x, h0, lambda x, h0: mingru_scan(x, h0, mask, reset, backend=backend, return_last_state=True))
    assert relative_error(actual[0], expected[0]) <= FLOAT32_RELATIVE
    for result, other in zip(actual[1:], expected[1:], strict=True):
        assert error_over_largest(result, other) <= GRADIENT_RELATIVE


@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "auto", "torch"])
def test_the_last_state_is_not_rounded_and_has_memory_of_its_own(backend, dtype, grad, steps):
    x, h0, _, _ = make_inputs(2, steps, 3)
    x = x.to(dtype).requires_grad_(grad)
    wide = torch.promote_types(dtype, torch.float32)
    expected = mingru_scan(x.to(wide), h0, backend=backend)
    states, last = mingru_scan(x, h0, backend=backend, return_last_state=True)
    assert (states.dtype, last.dtype) == (dtype, wide)
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-6, atol=1e-6)
    before = states.detach().clone()
    last.detach().zero_()
    assert torch.equal(states, before)


@pytest.mark.parametrize("backend", ["reference", "auto", "torch"])
def test_float16_is_summed_in_float32(backend):
    x, h0, _, _ = make_inputs(2, 63, 5)
    x = x.half()
    states = mingru_scan(x, h0, backend=backend, dtype=torch.float32)
    assert relative_error(states, scan_reference(x.double(), h0.double())) <= FLOAT32_RELATIVE


@pytest.mark.parametrize("flags", ["", "mask reset"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradcheck(backend, flags):
    x, h0, mask, reset = make_inputs(2, 9, 3, flags=flags)
    inputs = (x.double().requires_grad_(), h0.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, h0: mingru_scan(x, h0, mask, reset, backend=backend), inputs)
    assert torch.autograd.gradcheck(lambda x, h0: scan_and_last(x, h0, mask, reset, backend=backend), inputs)


@pytest.mark.parametrize("flags", ["", "mask reset"])
@pytest.mark.parametrize("shape", [(2, 5, 2), (2, 3, 1, (2, 2))])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_second_derivatives(backend, shape, flags):
    batch, steps, channels, *trailing = shape
    x, h0, mask, reset = make_inputs(batch, steps, channels, *trailing, flags=flags)
    inputs = x.double(), h0.double(), torch.randn(2 * channels, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def scan(x, h0=None, bias=None):
        return mingru_scan(x, h0, mask, reset, bias=bias, backend=backend)

    assert torch.autograd.gradgradcheck(scan, inputs)
    assert torch.autograd.gradgradcheck(scan, inputs[:1])
    assert torch.autograd.gradgradcheck(
        lambda *args: scan_and_last(args[0], args[1], mask, reset, backend=backend), inputs[:2]
    )


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_second_derivatives_in_16_bits(backend):
    """Equal exact derivatives at the rounded inputs up to one more rounding, also from a single first gradient."""

    def penalty(x, h0, bias, wanted):
        inputs = [tensor.requires_grad_() for tensor in (x, h0, bias)]
        states = mingru_scan(x, h0, bias=bias, backend=backend, dtype=x.dtype).float()
        first = torch.autograd.grad((states**2).sum(), [inputs[i] for i in wanted], create_graph=True)
        second = torch.autograd.grad(sum((grad.float() ** 2).sum() for grad in first), inputs)
        assert [grad.dtype for grad in second] == [tensor.dtype for tensor in inputs]
        return second

    x, h0, bias = torch.randn(2, 6, 8).bfloat16(), torch.rand(2, 1, 4), torch.randn(8).bfloat16()
    for wanted in ([0], [1], [0, 1, 2]):
        exact = penalty(x.double(), h0.double(), bias.double(), wanted)
        for actual, expected in zip(penalty(x, h0, bias, wanted), exact, strict=True):
            assert error_over_largest(actual, expected) < 0.03


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_penalty_on_gradients_and_third_derivatives(backend):
    """The gradient that enters the backward pass depends on the inputs, too."""

    def derivatives(backend):
        inputs = [tensor.clone().requires_grad_() for tensor in originals]
        value = (scan_and_last(inputs[0], inputs[1], bias=inputs[2], backend=backend) ** 3).sum()
        results = []
        for _ in range(3):
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            results += [grad.detach() for grad in grads]
            value = sum((grad**2).sum() for grad in grads)
        return results

    originals = torch.randn(2, 6, 4), torch.rand(2, 1, 2), torch.randn(4)
    for actual, expected in zip(derivatives(backend), derivatives("reference"), strict=True):
        assert expected.any()
        assert error_over_largest(actual, expected.double()) <= GRADIENT_RELATIVE


@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_through_the_loop_take_linear_time(order):
    """The backward pass of an index fills a tensor of all steps: one index per step would take quadratic time."""
    x = torch.randn(2, 50, 4, requires_grad=True)
    if order == 1:
        root = scan_reference(x).sum()
    else:
        root = torch.autograd.grad((mingru_scan(x) ** 2).sum(), x, create_graph=True)[0].sum()
    with torch.profiler.profile() as recorded:
        root.backward()
    count = {event.key: event.count for event in recorded.key_averages()}
    assert count["aten::mul"] >= 50
    assert count.get("aten::select_backward", 0) < 50


@pytest.mark.parametrize("backend", ["auto", *FAST_BACKENDS])
@pytest.mark.parametrize("flags", ["", "mask reset"])
def test_torch_func_differentiates_the_kernels(flags, backend):
    """Any number of times and in any order with vmap, with one bias for all samples or one for each."""
    shared = torch.randn(8)
    x, h0, mask, reset = make_inputs(3, 5, 4, flags=flags)

    grad, vmap = torch.func.grad, torch.vmap
    mask, reset = None if mask is None else mask[:1], None if reset is None else reset[:1]

    def results(backend):
        def loss(x, h0, bias=shared):
            return (scan_and_last(x[None], h0[None], mask, reset, bias=bias, backend=backend) ** 3).sum()

        def penalty(x, h0, bias=shared):
            return sum((g**2).sum() for g in grad(loss, argnums=(0, 1, 2))(x, h0, bias))

        outside = x.clone().requires_grad_()
        vmap(penalty)(outside, h0).sum().backward()
        _, pull = torch.func.vjp(loss, x[0], h0[0])
        return [
            vmap(grad(loss, argnums=(0, 1)))(x, h0),
            vmap(grad(loss, argnums=2), in_dims=(0, 0, None))(x, h0, shared),
            vmap(grad(loss, argnums=2))(x, h0, torch.stack([shared, -shared, 2 * shared])),
            grad(lambda x: vmap(loss)(x, h0).sum())(x),
            torch.func.jacrev(lambda x: mingru_scan(x, h0[:1], mask, reset, backend=backend))(x[:1]),
            vmap(grad(penalty, argnums=(0, 1, 2)), in_dims=(0, 0, None))(x, h0, shared),
            grad(lambda x: grad(penalty)(x, h0[0]).sum())(x[0]),
            grad(lambda scale: (pull(scale)[0] ** 2).sum())(torch.tensor(2.0)),
            outside.grad,
        ]

    torch.testing.assert_close(results(backend), results("reference"), rtol=1e-4, atol=1e-4)


def test_torch_func_leaves_the_kernels_to_auto(monkeypatch):
    """The "auto" backend needs the loop only in forward mode."""
    monkeypatch.delenv("MINGRU_SCAN", raising=False)
    monkeypatch.setattr(mingru_hf.scan, "_IN_OPERATORS_OF_TORCH", {})
    x = torch.randn(3, 2, 5, 4)
    per_sample = torch.vmap(torch.func.grad(lambda x: mingru_scan(x).sum()))(x)
    torch.testing.assert_close(
        per_sample.flatten(0, 1), torch.func.grad(lambda x: mingru_scan(x).sum())(x.flatten(0, 1))
    )


def test_derivatives_by_torch_func_and_in_forward_mode(monkeypatch):
    monkeypatch.delenv("MINGRU_SCAN", raising=False)
    x, h0, tangent = torch.randn(3, 5, 4), torch.rand(3, 1, 2), torch.randn(3, 5, 4)

    def loss(x, h0, backend="auto"):
        return (mingru_scan(x, h0, backend=backend) ** 2).sum()

    def for_each_row(backend):
        return torch.vmap(torch.func.grad(lambda x, h0: loss(x[None], h0[None], backend)))(x, h0)

    leaf = x.clone().requires_grad_()
    loss(leaf, h0).backward()
    torch.testing.assert_close(for_each_row("auto"), leaf.grad)
    torch.testing.assert_close(
        torch.func.hessian(loss)(x, h0), torch.autograd.functional.hessian(lambda x: loss(x, h0), x)
    )
    expected = (leaf.grad * tangent).sum()
    torch.testing.assert_close(torch.func.jvp(lambda x: loss(x, h0), (x,), (tangent,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual, h0)).tangent, expected)
    # Forward mode cannot see into a kernel: the result is an error, not a derivative of zero.
    with pytest.raises(ValueError, match=r"'torch' cannot be used here: it has no derivative in forward mode"):
        torch.func.jvp(lambda x: loss(x, h0, "torch"), (x,), (tangent,))


@pytest.mark.parametrize("backend", ["reference", "log", "auto", *FAST_BACKENDS])
def test_nan_in_padding_reaches_no_gradient(backend):
    x, h0, mask, _ = make_inputs(2, 6, 3, flags="mask")
    mask[:, 3] = False
    clean, spoiled = (torch.where(mask.unsqueeze(-1), x, number) for number in (0.0, torch.nan))
    weight = torch.randn(2, 6, 3)
    expected = run(clean, h0, mask, None, weight, mingru_scan, backend=backend)
    for actual, reference in zip(
        run(spoiled, h0, mask, None, weight, mingru_scan, backend=backend), expected, strict=True
    ):
        torch.testing.assert_close(actual, reference)


def test_nan_in_padding_reaches_no_derivative_through_the_loop(monkeypatch):
    monkeypatch.delenv("MINGRU_SCAN", raising=False)
    x, _, mask, _ = make_inputs(2, 6, 3, flags="mask")
    mask[:, 3] = False
    clean, spoiled = (torch.where(mask.unsqueeze(-1), x, number) for number in (0.0, torch.nan))

    def loss(x):
        return (mingru_scan(x, mask=mask) ** 2).sum()

    def second(x):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    for derivative in (torch.func.grad(loss), second):
        torch.testing.assert_close(derivative(spoiled), derivative(clean))


@pytest.mark.parametrize("trailing", [(), (2, 2)])
@pytest.mark.parametrize("backend", ["reference", "auto", *FAST_BACKENDS])
def test_batched_gradients(backend, trailing):
    x, h0, _, _ = make_inputs(2, 5, 3, *([trailing] if trailing else []))
    inputs = [tensor.requires_grad_() for tensor in (x, h0, torch.randn(6))]
    states = scan_and_last(x, h0, bias=inputs[2], backend=backend)
    many = torch.randn(4, *states.shape)
    batched = torch.autograd.grad(states, inputs, many, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate(many):
        for actual, expected in zip(
            batched, torch.autograd.grad(states, inputs, weight, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(actual[i], expected)


@pytest.mark.parametrize("backend", ["reference", "auto", *FAST_BACKENDS])
def test_frames_without_a_pixel(backend):
    x = torch.randn(2, 5, 6, 0, 4, requires_grad=True)
    states = mingru_scan(x, backend=backend)
    assert states.shape == (2, 5, 3, 0, 4)
    states.sum().backward()
    assert x.grad.shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", *FAST_BACKENDS])
@pytest.mark.parametrize("steps", [1, 9])
def test_signs_that_are_yet_to_be_turned(backend, steps):
    x, h0, _, _ = make_inputs(1, steps, 1)
    expected = mingru_scan(-x, -h0, backend=backend)
    torch.testing.assert_close(mingru_scan(torch._neg_view(x), -h0, backend=backend), expected)
    bias, leaf = torch.randn(2), (-x).requires_grad_()
    with torch.enable_grad():
        biased = mingru_scan(leaf, -h0, bias=torch._neg_view(bias), backend=backend)
    torch.testing.assert_close(biased, mingru_scan(-x, -h0, bias=-bias, backend=backend))
    later = torch.complex(torch.zeros(1, 1, 1), h0).conj().imag  # -h0, as a lazy negation
    torch.testing.assert_close(mingru_scan(-x, later, backend=backend), expected)


@pytest.mark.parametrize("grad", [True, False])
def test_shapes_alone_on_the_meta_device(grad):
    x, flags = torch.empty(2, 5, 6, device="meta"), torch.empty(2, 5, dtype=torch.bool, device="meta")
    with torch.set_grad_enabled(grad):
        states = mingru_scan(x, mask=flags, reset=flags)
    assert states.is_meta
    assert states.shape == (2, 5, 3)


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 600, 8)], ids=["steps", "chunks"])
def test_the_torch_scan_looks_at_no_number_off_the_cpu(shape):
    """Reading a value would make the CPU wait for the GPU; on the meta device it raises an error."""
    x, flags = torch.empty(shape, device="meta"), torch.empty(shape[:2], dtype=torch.bool, device="meta")
    states, last = torch_forward(x, None, flags, flags, torch.float32)
    grad_x, grad_h0 = torch_backward(states, last, x, None, states, flags, flags)
    assert (states.shape, grad_x.shape) == ((*shape[:2], shape[2] // 2), shape)
    assert last.shape == grad_h0.shape == (shape[0], 1, shape[2] // 2)


def test_the_torch_scan_launches_little_off_the_cpu():
    """A kernel launch takes as long as the arithmetic on many elements."""

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.total += 1
            return function(*args, **(kwargs or {}))

    for shape in ((1, 4096, 2 * 768), (8, 1024, 2 * 512)):
        x = torch.empty(shape, device="meta")
        with Count() as count:
            states, _ = torch_forward(x, None, None, None, torch.float32)
        assert count.total < shape[1] / 4
        with Count() as count:
            torch_backward(states, None, x, None, states, None, None)
        assert count.total < shape[1] / 4


@torch.no_grad()
@pytest.mark.parametrize("scan", [mingru_scan, mingru_step])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_step_of_what_holds_no_numbers(kind, scan):
    """Meta and fake tensors have no memory that a kernel could read."""
    empty = FakeTensorMode().from_tensor if kind == "fake" else lambda tensor: tensor.to("meta")
    x, h0 = empty(torch.randn(2, 1, 6)), empty(torch.rand(2, 1, 3))
    for h in (h0, None):
        state = scan(x, h)
        assert type(state) is type(x)
        assert state.device == x.device
        assert state.shape == (2, 1, 3)
    states = mingru_scan(empty(torch.randn(2, 5, 6)), mask=empty(torch.ones(2, 5)))  # which cannot be checked
    assert states.shape == (2, 5, 3)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_saturated_gates_stay_finite_with_true_gradients(backend):
    levels = torch.tensor([-100.0, -30.0, -1e-6, 0.0, 1e-6, 30.0, 100.0])
    x = torch.cartesian_prod(levels, levels).reshape(49, 1, 2)  # a row for each pair of gate and candidate
    h0, weight = torch.full((49, 1, 1), 0.3), torch.ones(49, 1, 1)
    expected = run(x.double(), h0.double(), None, None, weight, scan_reference)
    actual = run(x, h0, None, None, weight, mingru_scan, backend=backend)
    for result, reference in zip(actual, expected, strict=True):
        assert result.isfinite().all()
        assert error_over_largest(result, reference) <= GRADIENT_RELATIVE
        assert (result.double() * reference >= 0).all()  # underflow to zero is allowed, a wrong sign is not
    x, h0, weight = x[torch.randperm(49)].reshape(1, 49, 2), h0[:1], torch.ones(1, 49, 1)  # all pairs in one sequence
    expected = run(x.double(), h0.double(), None, None, weight, scan_reference)
    actual = run(x, h0, None, None, weight, mingru_scan, backend=backend)
    assert relative_error(actual[0], expected[0]) <= FLOAT32_RELATIVE
    for result, reference in zip(actual, expected, strict=True):
        assert result.isfinite().all()
        assert error_over_largest(result, reference) <= GRADIENT_RELATIVE


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_bad_input_poisons_only_what_depends_on_it(backend, bad):
    x, h0, _, _ = make_inputs(2, 40, 3)
    clean = mingru_scan(x, h0, backend=backend)
    x[1, 20, 3] = bad  # the candidate of channel 0
    states = mingru_scan(x, h0, backend=backend)
    assert not states[1, 20:, 0].isfinite().any()
    states[1, 20:, 0] = clean[1, 20:, 0]
    torch.testing.assert_close(states, clean, rtol=0, atol=0)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_masked_steps_ignore_even_nan_inputs(backend):
    x, h0, _, _ = make_inputs(2, 40, 3)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[:, 10:15] = False
    weight = torch.randn(2, 40, 3)
    clean = run(x, h0, mask, None, weight, mingru_scan, backend=backend)
    x[:, 10:15] = float("nan")
    for result, reference in zip(run(x, h0, mask, None, weight, mingru_scan, backend=backend), clean, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_reset_cuts_the_past_off(backend):
    x, h0, _, _ = make_inputs(2, 30, 3)
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[:, 12] = True
    x.requires_grad_()
    states = mingru_scan(x, h0, reset=reset, backend=backend)
    torch.testing.assert_close(states[:, 12:], mingru_scan(x[:, 12:], backend=backend))
    states[:, 12:].sum().backward()
    assert not x.grad[:, :12].any()
    assert x.grad[:, 12:].all()


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_not_even_nan_crosses_a_reset(backend):
    x, h0, _, _ = make_inputs(2, 30, 3)
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[:, [0, 12]] = True
    weight = torch.randn(2, 30, 3)
    clean = run(x, h0, None, reset, weight, mingru_scan, backend=backend)
    bad_past, bad_future, bad_h0 = x.clone(), weight.clone(), torch.full_like(h0, float("nan"))
    bad_past[:, 5] = float("nan")
    states, grad_x, _ = run(bad_past, bad_h0, None, reset, weight, mingru_scan, backend=backend)
    torch.testing.assert_close([states[:, 12:], grad_x[:, 12:]], [clean[0][:, 12:], clean[1][:, 12:]], rtol=0, atol=0)
    bad_future[:, 20] = float("nan")
    _, grad_x, grad_h0 = run(x, h0, None, reset, bad_future, mingru_scan, backend=backend)
    torch.testing.assert_close([grad_x[:, :12], grad_h0], [clean[1][:, :12], clean[2]], rtol=0, atol=0)
    bad_start = x.clone()
    bad_start[:, 12] = float("nan")  # the step of the reset itself
    _, grad_x, grad_h0 = run(bad_start, h0, None, reset, weight, mingru_scan, backend=backend)
    torch.testing.assert_close([grad_x[:, :12], grad_h0], [clean[1][:, :12], clean[2]], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_bad_numbers_and_resets_in_chunks_of_time(backend, bad):
    """225 steps form 15 chunks of 15. Wherever the bad value lies, it changes nothing beyond the reset."""
    x, h0, mask, _ = make_inputs(1, 225, 3, flags="mask")
    weight = torch.randn(1, 225, 3)
    for bad_step, reset_step in [(0, 14), (0, 15), (4, 100), (14, 15), (15, 16), (29, 31), (100, 224)]:
        reset = (torch.arange(225) == reset_step).expand(1, 225)
        mask[0, [bad_step, reset_step]] = True
        clean = run(x, h0, mask, reset, weight, mingru_scan, backend=backend)
        poisoned = x.clone()
        poisoned[0, bad_step, 4] = bad  # the candidate of channel 1
        states, grad_x, grad_h0 = run(poisoned, h0, mask, reset, weight, mingru_scan, backend=backend)
        assert not states[0, bad_step:reset_step, 1].isfinite().any()
        states[0, bad_step:reset_step, 1] = clean[0][0, bad_step:reset_step, 1]
        assert grad_x[0, reset_step:].isfinite().all()
        grad_x[0, bad_step:reset_step, [1, 4]] = clean[1][0, bad_step:reset_step, [1, 4]]
        torch.testing.assert_close((states, grad_x, grad_h0), clean, rtol=0, atol=0)
        poisoned = weight.clone()  # a bad gradient does not flow back across the reset
        poisoned[0, reset_step + 1 :, 1] = bad
        _, grad_x, grad_h0 = run(x, h0, mask, reset, poisoned, mingru_scan, backend=backend)
        torch.testing.assert_close(
            (grad_x[0, :reset_step], grad_h0), (clean[1][0, :reset_step], clean[2]), rtol=0, atol=0
        )


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_a_masked_reset_step_leaves_the_initial_state(backend):
    x, h0, _, _ = make_inputs(1, 3, 2)
    flags = torch.tensor([[False, True, False]])
    states = mingru_scan(x, h0, mask=~flags, reset=flags, backend=backend)
    assert (states[:, 1] == 0.5).all()


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_any_chunking_gives_the_whole(backend):
    x, h0, mask, reset = make_inputs(2, 40, 3, flags="mask reset")
    whole = mingru_scan(x, h0, mask, reset, backend=backend)
    h, parts = h0, []
    for part in (slice(0, 1), slice(1, 4), slice(4, 39), slice(39, 40)):
        parts.append(mingru_scan(x[:, part], h, mask[:, part], reset[:, part], backend=backend))
        h = parts[-1][:, -1:]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("steps", [20, 400])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_strided_and_expanded_tensors(backend, steps):
    x, h0, mask, reset = make_inputs(4, steps, 6, flags="mask reset")
    weight = torch.randn(4, steps, 6)
    flags = mask.t().contiguous().t(), reset[:1].expand(4, steps)
    for view in (
        (x[..., ::2], h0[..., ::2], *flags, weight[..., ::2]),
        (x.flip(1)[:, ::2], h0, mask[:, ::2], reset[:, 1::2], weight[:, ::2]),
        (x[:1].expand(4, steps, 12), h0[:1].expand(4, 1, 6), *flags, torch.ones(()).expand(4, steps, 6)),
        (x.transpose(0, 1).contiguous().transpose(0, 1), h0, *flags, weight.mT.contiguous().mT),
    ):
        x_, h0_, *flags_, weight_ = view
        expected = run(x_.double(), h0_.double(), *flags_, weight_.double(), scan_reference)
        actual = run(x_, h0_, *flags_, weight_, mingru_scan, backend=backend)
        for result, reference in zip(actual, expected, strict=True):
            assert error_over_largest(result, reference) <= GRADIENT_RELATIVE


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0), (0, 5, 4, 3)])
def test_empty_batches_and_sequences(backend, shape):
    x = torch.randn(*shape, requires_grad=True)
    h0 = torch.rand(shape[0], 1, shape[2] // 2, *shape[3:], requires_grad=True)
    states, last = mingru_scan(x, h0, backend=backend, return_last_state=True)
    assert states.shape == (shape[0], shape[1], shape[2] // 2, *shape[3:])
    assert torch.equal(last, h0)  # no step changes any element of h0
    (states.sum() + last.sum()).backward()
    assert x.grad.shape == shape
    assert torch.equal(h0.grad, torch.ones_like(h0))
    assert mingru_scan(x.bfloat16(), dtype=torch.float32, backend=backend).dtype == torch.float32
    (of_states,) = torch.autograd.grad(mingru_scan(x, h0, backend=backend).sum(), h0)
    assert torch.equal(of_states, torch.zeros_like(h0))


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.uint8])
@pytest.mark.parametrize("backend", ["reference", "auto", *FAST_BACKENDS])
def test_flags_may_be_zeros_and_ones(backend, dtype):
    """An attention_mask holds zeros and ones."""
    x, h0, mask, reset = make_inputs(2, 9, 3, flags="mask reset")
    expected = mingru_scan(x, h0, mask, reset, backend=backend)
    actual = mingru_scan(x, h0, mask.to(dtype), reset.to(dtype), backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    expected = mingru_scan(x, h0, mask, backend="log")
    torch.testing.assert_close(mingru_scan(x, h0, mask.to(dtype), backend="log"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("steps", [1, 9])
def test_states_of_any_dtype(steps, dtype):
    """If the kernels do not support the dtype, another backend runs."""
    x, h0, _, _ = make_inputs(2, steps, 3)
    states = mingru_scan(x, h0, dtype=dtype)
    assert states.dtype == dtype
    torch.testing.assert_close(states, mingru_scan(x, h0, backend="reference", dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 300, 5), (2, 50, 700)])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_every_element_is_written(backend, shape):
    x, h0, mask, reset = make_inputs(*shape, flags="mask reset")
    weight = torch.randn(shape)
    expected = run(x, h0, mask, reset, weight, mingru_scan, backend=backend)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        actual = run(x, h0, mask, reset, weight, mingru_scan, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for result, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 63, 512])
def test_log_scan_agrees_while_it_is_short(steps):
    x, h0, mask, _ = make_inputs(2, steps, 5, scale=1.0, flags="mask")
    expected = scan_reference(x.double(), h0.double(), mask)
    assert relative_error(mingru_scan(x, h0, mask, backend="log"), expected) <= 1e-3  # it loses digits as T grows
    assert relative_error(mingru_scan(x.double(), h0.double(), mask, backend="log"), expected) <= 1e-11


def test_log_scan_has_a_gradient_at_any_candidate():
    """At -0.5 too, where the branch log(v + 0.5), which is not selected, would have no finite gradient."""
    x = torch.tensor([0.3, -0.5]).expand(1, 4, 2)
    weight = torch.ones(1, 4, 1)
    expected = run(x, torch.ones(1, 1, 1), None, None, weight, mingru_scan, backend="reference")
    actual = run(x, torch.ones(1, 1, 1), None, None, weight, mingru_scan, backend="log")
    torch.testing.assert_close(actual, expected)


def test_log_scan_refuses_what_it_cannot_do():
    x, h0, _, reset = make_inputs(2, 5, 3, flags="reset")
    with pytest.raises(ValueError, match="cannot reset"):
        mingru_scan(x, h0, reset=reset, backend="log")
    with pytest.raises(ValueError, match="float32 and float64 only"):
        mingru_scan(x.bfloat16(), h0, backend="log")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mingru_scan(torch.randn(2, 3, 5)), "must be even"),
        (lambda: mingru_scan(torch.randn(2, 6)), r"\(B, T, 2D, \*\)"),
        (lambda: mingru_scan(torch.ones(2, 3, 4, dtype=torch.long)), "floating-point"),
        (lambda: mingru_scan(torch.randn(2, 3, 4), torch.rand(1, 1, 2)), r"h0 must have shape \(2, 1, 2\)"),
        (lambda: mingru_scan(torch.randn(2, 3, 4), torch.zeros(2, 1, 2).cfloat()), r"h0 .* floating-point"),
        (lambda: mingru_scan(torch.randn(2, 3, 4), bias=torch.zeros(4, dtype=torch.long)), r"bias .* floating-point"),
        (lambda: mingru_scan(torch.randn(2, 3, 4), mask=torch.full((2, 3), -torch.inf)), "zeros and ones, got -inf"),
        (lambda: mingru_scan(torch.randn(2, 3, 4), mask=torch.ones(2, 4)), r"mask must be a tensor of shape \(2, 3\)"),
        (lambda: mingru_scan(torch.randn(2, 3, 4), mask=[[1, 1, 0]] * 2), r"\(B, T\), got a list"),
        (lambda: mingru_scan(torch.randn(2, 3, 4), reset=torch.ones(3)), r"reset must be a tensor of shape \(2, 3\)"),
        (lambda: mingru_scan(torch.randn(2, 3, 4), backend="fast"), "Unknown scan backend 'fast'"),
        (lambda: mingru_scan(torch.randn(2, 3, 4), backend="exported"), "Unknown scan backend 'exported'"),
        (lambda: mingru_scan(torch.randn(2, 3, 4), dtype=torch.int32), "dtype must be a floating-point type"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_environment_variable_forces_a_backend(monkeypatch):
    x = torch.randn(1, 4, 2)
    monkeypatch.setenv("MINGRU_SCAN", "log")
    with pytest.raises(ValueError, match="cannot reset"):
        mingru_scan(x, reset=torch.zeros(1, 4, dtype=torch.bool))
    mingru_scan(x, reset=torch.zeros(1, 4, dtype=torch.bool), backend="torch")  # the argument takes precedence
    monkeypatch.setenv("MINGRU_SCAN", "")  # the same as not set
    mingru_scan(x, reset=torch.zeros(1, 4, dtype=torch.bool))
    monkeypatch.setenv("MINGRU_SCAN", "quick")
    with pytest.raises(ValueError, match="MINGRU_SCAN 'quick'"):
        mingru_scan(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from opcheck, torch 2.15
def test_the_operator_passes_opcheck():
    x, h0, mask, reset = make_inputs(2, 9, 3, flags="mask reset")
    operator = torch.ops.mingru_hf_v4.scan.default
    options = mask, reset, "torch", torch.float32
    torch.library.opcheck(operator, (x.requires_grad_(), None, h0.requires_grad_(), *options))
    torch.library.opcheck(operator, (x.detach().bfloat16(), None, None, None, None, "torch", torch.bfloat16))
    if NUMBA_AVAILABLE:
        bias = torch.randn(6, requires_grad=True)
        torch.library.opcheck(operator, (x, bias, h0, mask, reset, "numba", torch.float32))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("change", ["bfloat16", "long memory", "other strides"])
def test_compilers_are_told_what_comes_out(change, backend):
    x, h0, mask, reset = make_inputs(2, 9, 3, flags="mask reset")
    if change == "bfloat16":
        x = x.bfloat16()
    elif change == "long memory":
        x[..., :3] -= 9
    else:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    states = mingru_scan(x, h0, mask, reset, backend=backend)
    inputs = torch.randn_like(states), h0, x, None, h0, states, mask, reset, backend
    operators = torch.ops.mingru_hf_v4
    torch.library.opcheck(operators.scan_backward.default, inputs, test_utils="test_faketensor")
    inputs = x, None, h0, mask, reset, backend, torch.float32
    torch.library.opcheck(operators.scan.default, inputs, test_utils="test_faketensor")


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_profiler_names_the_scan_and_the_numbers_stay(backend):
    x, h0, mask, reset = make_inputs(2, 9, 3, flags="mask reset")

    def run():
        leaf = x.clone().requires_grad_()
        states = mingru_scan(leaf, h0, mask, reset, backend=backend)
        return states, torch.autograd.grad(states.sum(), leaf)[0]

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        watched = run()
    names = {event.key for event in recorded.key_averages()}
    assert {"mingru_hf_v4::scan", "mingru_hf_v4::scan_backward"} <= names
    for actual, expected in zip(run(), watched, strict=True):
        assert torch.equal(actual, expected)


TRANSFORMS = {
    "grad": torch.func.grad,
    "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sin().sum()),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda row: f(row[None]))),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "hessian": torch.func.hessian,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_compiled(transform, monkeypatch):
    """A compiled function that takes a derivative does not use the kernels, and the derivative is not zero instead."""
    monkeypatch.delenv("MINGRU_SCAN", raising=False)
    x, _, mask, reset = make_inputs(3, 6, 2, flags="mask reset")
    bias = torch.randn(4)
    mask, reset = mask[:1], reset[:1]

    def function(backend="auto"):
        def loss(x):
            flags = mask.expand(x.shape[:2]), reset.expand(x.shape[:2])
            return (scan_and_last(x, None, *flags, bias=bias, backend=backend) ** 2).sum()

        return TRANSFORMS[transform](loss)

    compiled = torch.compile(function(), backend="aot_eager", fullgraph=True)
    for inputs in (x, x.flip(0)):
        torch.testing.assert_close(compiled(inputs), function("reference")(inputs), rtol=1e-4, atol=1e-4)


def test_a_compiled_scan_is_used_in_transforms(monkeypatch):
    """Use one compiled function in several transforms: after a graph break, the operators' own code is not traced."""
    monkeypatch.delenv("MINGRU_SCAN", raising=False)
    x = torch.randn(3, 5, 8)
    compiled = torch.compile(mingru_scan, backend="aot_eager")
    grad = torch.func.grad(lambda x: compiled(x).square().sum())(x)
    torch.testing.assert_close(grad, torch.func.grad(lambda x: scan_reference(x).square().sum())(x))
    torch.testing.assert_close(torch.vmap(lambda row: compiled(row[None])[0])(x), scan_reference(x))
    tangent = torch.func.jvp(compiled, (x,), (x.cos(),))[1]
    torch.testing.assert_close(tangent, torch.func.jvp(scan_reference, (x,), (x.cos(),))[1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_was_traced_before_has_no_tangent_of_zero(monkeypatch):
    monkeypatch.delenv("MINGRU_SCAN", raising=False)
    x = torch.randn(2, 5, 8)
    for traced in (make_fx(lambda x: mingru_scan(x))(x), torch.jit.trace(scan_and_last, x)):
        traced(x)
        with pytest.raises(Exception, match="cannot differentiate the kernels of a MinGRU scan traced"):
            torch.func.jvp(traced, (x,), (x.cos(),))


def test_forward_mode_of_others_changes_nothing():
    """The level of forward mode is global to the process: another thread may have entered it."""
    x = torch.randn(2, 5, 8)
    expected = torch.func.grad(lambda x: scan_reference(x).square().sum())(x)
    compiled = torch.compile(lambda x: mingru_scan(x).square().sum(), backend="aot_eager")
    for enters_before in (False, True):
        leaf = x.clone().requires_grad_()
        with contextlib.ExitStack() as stack:
            if enters_before:
                stack.enter_context(torch.autograd.forward_ad.dual_level())
            loss = compiled(leaf)
            if not enters_before:
                stack.enter_context(torch.autograd.forward_ad.dual_level())
            loss.backward()
        torch.testing.assert_close(leaf.grad, expected)
    with torch.autograd.forward_ad.dual_level():  # now with a tangent
        dual = torch.autograd.forward_ad.make_dual(x, expected)
        tangent = torch.autograd.forward_ad.unpack_dual(compiled(dual)).tangent
    torch.testing.assert_close(tangent, expected.square().sum())


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_gradient_is_differentiated_forward(backend):
    """The scan itself ran before forward mode began."""
    x, h0, mask, reset = make_inputs(2, 5, 4, flags="mask reset")
    grad, tangent = torch.randn(2, 5, 4), torch.randn(2, 5, 4)

    def results(backend):
        leaf = x.clone().requires_grad_()
        states = scan_and_last(leaf, h0, mask, reset, backend=backend)
        _, pull = torch.func.vjp(lambda x: scan_and_last(x, h0, mask, reset, backend=backend), x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(grad, tangent)
            (of_leaf,) = torch.autograd.grad(states, leaf, dual)
            first = torch.autograd.forward_ad.unpack_dual(of_leaf)
        return first.primal, first.tangent, torch.func.jvp(lambda grad: pull(grad)[0], (grad,), (tangent,))

    torch.testing.assert_close(results(backend), results("reference"))


@pytest.mark.parametrize("flags", ["", "mask reset"])
@pytest.mark.parametrize("steps", [1, 2, 63, 1000])
def test_the_scan_of_compiled_derivatives(steps, flags):
    inputs = [t if t is None or t.dtype == torch.bool else t.double() for t in make_inputs(2, steps, 3, flags=flags)]
    weight = torch.randn(2, steps, 3, dtype=torch.double)
    torch.testing.assert_close(run(*inputs, weight, scan_doubling), run(*inputs, weight, scan_reference))


def test_not_even_nan_crosses_a_reset_in_compiled_derivatives():
    x, h0, _, _ = make_inputs(2, 30, 3)
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[:, [0, 12]] = True
    weight = torch.randn(2, 30, 3)
    clean = run(x, h0, None, reset, weight, scan_doubling)
    x[:, 5] = float("nan")
    states, grad_x, _ = run(x, torch.full_like(h0, float("nan")), None, reset, weight, scan_doubling)
    torch.testing.assert_close([states[:, 12:], grad_x[:, 12:]], [clean[0][:, 12:], clean[1][:, 12:]])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_tracers_and_transforms_see_the_operator(grad, backend):
    """Otherwise tracers and transforms would miss what a kernel writes to memory."""
    x, other = torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def function(x):
        return scan_and_last(x, backend=backend)

    with torch.set_grad_enabled(grad):
        programs = [torch.jit.trace(function, x), make_fx(function)(x), make_fx(function, tracing_mode="fake")(x)]
        for program in programs:
            torch.testing.assert_close(program(other), function(other))
        rows = torch.stack([x, other])
        torch.testing.assert_close(torch.vmap(function)(rows), torch.stack([function(x), function(other)]))


@pytest.mark.parametrize("shape", [(4, 12, 16), (3, 1, 6), (2, 9, 8, 2, 3)])
def test_compiled_by_default_it_is_the_kernels_with_their_gradients(shape):
    """The compiler of torch 2.9 reports every function as being exported."""
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(scan_reference(x).shape)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(mingru_scan, backend=backend, fullgraph=True)
    (gradient,) = torch.autograd.grad((compiled(x) * weight).sum(), x)
    (expected,) = torch.autograd.grad((scan_reference(x) * weight).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert ("mingru_hf" in graphs[0]) == (shape[1] > 1)  # a single step uses torch's own operators


def test_an_exported_scan_can_be_trained():
    class Scan(torch.nn.Module):
        def forward(self, x):
            return mingru_scan(x)

    x = torch.randn(4, 12, 16, requires_grad=True)
    weight = torch.randn(4, 12, 8)
    program = torch.export.export(Scan(), (x.detach(),)).module()
    (gradient,) = torch.autograd.grad((program(x) * weight).sum(), x)
    (expected,) = torch.autograd.grad((scan_reference(x) * weight).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_second_copy_of_the_files_uses_the_same_operator(tmp_path):
    """This happens if code loaded from a Hub and the installed package run in one process."""
    (tmp_path / "copied").mkdir()
    for path in Path(mingru_hf.scan.__file__).parent.glob("*.py"):
        if path.stem.startswith("scan") or path.stem == "observers":
            shutil.copy(path, tmp_path / "copied")
    code = """
import torch, mingru_hf.scan, copied.scan
x = torch.randn(2, 5, 4, requires_grad=True)
assert torch.equal(copied.scan.mingru_scan(x), mingru_hf.scan.mingru_scan(x))
copied.scan.mingru_scan(x).sum().backward()
assert x.grad.any()

import gc, importlib  # as a notebook does when a file has changed
importlib.reload(mingru_hf.scan_operator)
importlib.reload(mingru_hf.scan)
gc.collect()
mingru_hf.scan.mingru_scan(x).sum().backward()
"""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_backend_runs_its_own_kernels_both_ways(monkeypatch, backend):
    calls = []
    forward, backward = mingru_hf.scan.KERNELS[backend]
    spies = (
        lambda *inputs: calls.append("forward") or forward(*inputs),
        lambda *inputs: calls.append("backward") or backward(*inputs),
    )
    monkeypatch.setattr(mingru_hf.scan_operator, "KERNELS", {backend: spies})
    mingru_scan(torch.randn(2, 5, 4, requires_grad=True), backend=backend).sum().backward()
    assert calls == ["forward", "backward"]


def test_impossible_choices_say_why(monkeypatch):
    x = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=r"'triton' cannot be used here: .*[Tt]riton"):
        mingru_scan(x, backend="triton")
    with pytest.raises(ValueError, match="'numba' cannot be used here: "):
        mingru_scan(x.half(), backend="numba")
    with pytest.raises(ValueError, match="cannot be used here: it runs on the CPU, but the tensors are on meta"):
        mingru_scan(x.to("meta"), backend="numba")
    monkeypatch.setattr(mingru_hf.scan, "numba_unavailable_reason", lambda: "there is no numba")
    with pytest.raises(ValueError, match="there is no numba"):
        mingru_scan(x, backend="numba")
    mingru_scan(x)  # "auto" runs without numba


@pytest.mark.parametrize(
    "fault", [None, "mask", "reset", "start", "16 bits", "32 bits", "last state", "one gradient", "memory"]
)
def test_kernels_of_a_card_are_tried_with_all_that_is_optional(fault, monkeypatch):
    """The torch scan stands in for the Triton kernels here."""
    forward, backward = mingru_hf.scan.KERNELS["torch"]

    def faulty_forward(x, h0, mask, reset, dtype):
        if fault == "memory":
            raise torch.OutOfMemoryError("no room")
        h0, mask, reset = (
            t if fault != name else None for name, t in (("start", h0), ("mask", mask), ("reset", reset))
        )
        states, last = forward(x, h0, mask, reset, dtype)
        if fault == "16 bits" and x.dtype == torch.bfloat16:
            states[-1, -1] = torch.nan
        if fault == "32 bits" and x.dtype == torch.float32:
            states *= 1.001
        return states, last * (2 if fault == "last state" else 1)

    def faulty_backward(*inputs):
        grad_x, grad_h0 = backward(*inputs)
        return grad_x, grad_h0 * (2 if fault == "one gradient" else 1)

    monkeypatch.setattr(mingru_hf.scan, "triton_unavailable_reason", lambda device: None)
    monkeypatch.setattr(mingru_hf.scan, "_trial", mingru_hf.scan._trial.__wrapped__)
    monkeypatch.setitem(mingru_hf.scan.KERNELS, "triton", (faulty_forward, faulty_backward))
    if fault is None:
        assert mingru_scan(torch.randn(2, 5, 4), backend="triton").shape == (2, 5, 2)
    elif fault == "memory":  # no fault of the kernels
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            mingru_scan(torch.randn(2, 5, 4), backend="triton")
    else:
        with pytest.warns(UserWarning, match="wrong numbers"), pytest.raises(ValueError, match="wrong numbers on cpu"):
            mingru_scan(torch.randn(2, 5, 4), backend="triton")


@pytest.mark.parametrize("broken", ["missing", "broken"])
def test_package_works_where_numba_does_not(tmp_path, broken):
    """No warning if numba is missing, and one warning if it is installed but broken."""
    if broken == "broken":
        (tmp_path / "numba.py").write_text("raise RuntimeError('built for another NumPy')")
    code = """
import sys, warnings
if sys.argv[1] == "missing": sys.modules["numba"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, mingru_hf
    ours = [w for w in caught if "MinGRU" in str(w.message)]
x = torch.randn(2, 50, 8, requires_grad=True)
states = mingru_hf.mingru_scan(x)
states.sum().backward()
torch.testing.assert_close(states, mingru_hf.mingru_scan(x, backend="reference"))
assert len(ours) == (sys.argv[1] == "broken"), ours
"""
    command = [sys.executable, "-c", code, broken]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
