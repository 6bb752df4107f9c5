"""Faster linear maps: they equal F.linear and run only where they are faster. Fixtures enable them on any machine.

Many rows (convolutions) come first, then few rows (the kernel).
"""

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mingru_hf.calling
import mingru_hf.linear
from mingru_hf import MinGRU, MinGRUCell, MinGRUConfig, MinGRUForCausalLM, scan_numba
from mingru_hf.linear import amd_family, linear, linear_unobserved
from mingru_hf.scan_numba import NUMBA_AVAILABLE, numba_linear


@pytest.fixture
def convolutions(monkeypatch):
    """Use convolutions as on a Zen 5, where they are faster; return a list of their weight shapes."""
    shapes, original = [], F.conv2d

    def conv2d(x, weight, *args, **kwargs):
        shapes.append(tuple(weight.shape))
        return original(x, weight, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", conv2d)
    monkeypatch.setattr(mingru_hf.linear, "_MIN_ROWS", 256)
    monkeypatch.setattr(mingru_hf.linear, "_MIN_PRODUCTS", 1 << 24)
    for module, name in ((mingru_hf.linear, "CONVOLUTION_IS_FASTER"), (mingru_hf.calling, "HAS_FASTER_WAY")):
        monkeypatch.setattr(module, name, True)
    return shapes


@pytest.fixture
def kernels(monkeypatch):
    """Use the kernel as on a machine where it is faster; return a list of the input shapes that it handled."""
    if not NUMBA_AVAILABLE:
        pytest.skip(f"no kernel for few rows here: {scan_numba.unavailable_reason()}")
    shapes = []

    def recorded(x, weight, bias):
        out = numba_linear(x, weight, bias)
        if out is not None:
            shapes.append(tuple(x.shape))
        return out

    monkeypatch.setattr(mingru_hf.linear, "numba_linear", recorded)
    monkeypatch.setattr(mingru_hf.linear, "FEW_ROWS_ARE_FASTER", True)
    monkeypatch.setattr(mingru_hf.calling, "HAS_FASTER_WAY", True)
    return shapes


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def gradients(function, *tensors):
    """Return the output and the gradients of its weighted sum."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    weight = torch.linspace(-1, 2, out.numel()).to(out.dtype).reshape(out.shape)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(4, 128, 200), (512, 200), (1, 8, 64, 200), (1, 257, 333)], ids=lambda shape: "x".join(map(str, shape))
)
def test_the_numbers_are_those_of_a_matrix_product(shape, bias, threads, convolutions):
    tensors = [torch.randn(shape), torch.randn(257, shape[-1])] + [torch.randn(257)] * bias
    expected = gradients(F.linear, *(tensor.double() for tensor in tensors))
    for actual, other in zip(gradients(linear, *tensors), expected, strict=True):
        assert actual.dtype == torch.float32
        assert actual.is_contiguous()
        assert (actual - other).abs().max() <= 1e-6 * other.abs().max()
    # On one thread, torch uses oneDNN only from a batch of 16 on, into which 257 rows cannot be divided.
    assert len(convolutions) == (0 if threads == 1 and shape == (1, 257, 333) else 1)


@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[..., ::2], lambda x: x[:1].expand(4, -1, -1)],
    ids=["time first", "every other row", "every other channel", "expanded"],
)
def test_any_strides(view, convolutions):
    x, weight = view(torch.randn(8, 256, 400)), torch.randn(300, 400)[:, ::2].t().contiguous().t()
    weight = weight if x.shape[-1] == 200 else torch.randn(300, 400)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    assert convolutions == [(300, x.shape[-1], 1, 1)]


@pytest.mark.parametrize("bias", [None, torch.ones(256)], ids=["no bias", "bias"])
def test_the_output_can_be_written_to(bias, convolutions):
    def function(x, weight, *bias):
        return linear(x, weight, *bias).mul_(2).relu_()

    tensors = [torch.randn(512, 200), torch.randn(256, 200)] + [bias] * (bias is not None)
    expected = gradients(lambda *inputs: (2 * F.linear(*inputs)).relu(), *tensors)
    for actual, other in zip(gradients(function, *tensors), expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        out = linear(*tensors)
    assert not out._is_view()
    assert len(convolutions) == 2


def test_many_gradients_at_once(convolutions):
    inputs = [torch.randn(512, 200), torch.randn(256, 200), torch.randn(256)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    weights = torch.randn(3, 512, 256)
    actual = torch.autograd.grad(linear(*inputs), inputs, weights, is_grads_batched=True)
    expected = torch.autograd.grad(F.linear(*inputs), inputs, weights, is_grads_batched=True)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    assert convolutions


def test_recomputed_as_it_was_computed(convolutions):
    """A FlopCounterMode around the forward pass alone does not change what the backward pass recomputes."""
    x, weight = torch.randn(512, 200, requires_grad=True), torch.randn(256, 200, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = checkpoint(linear, x, weight, use_reentrant=False)
    assert counter.get_total_flops() == 2 * 512 * 200 * 256
    out.sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(256, 200), rtol=1e-4, atol=1e-3)


def test_forward_mode(convolutions):
    x, weight, bias = torch.randn(512, 200), torch.randn(256, 200), torch.randn(256)
    with forward_ad.dual_level():
        out = linear(x, weight, forward_ad.make_dual(bias, bias))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, bias.expand(512, 256))


def test_rows_do_not_touch_each_other(convolutions):
    x, weight = torch.randn(512, 200), torch.randn(256, 200)
    clean = linear(x, weight)
    x[7, 3] = torch.nan
    dirty = linear(x, weight)
    assert dirty[7].isnan().all()
    dirty[7] = clean[7]
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


class Quantised(torch.Tensor):
    pass


class Replacing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return 42 if function is F.linear else function(*args, **(kwargs or {}))


def cast(*dtypes):
    return lambda x, w, b: [tensor.to(dtype) for tensor, dtype in zip((x, w, b), dtypes, strict=True)]


@pytest.mark.parametrize(
    "change",
    [
        cast(torch.float64, torch.float64, torch.float64),
        cast(torch.bfloat16, torch.bfloat16, torch.bfloat16),
        lambda x, w, b: (x.view(-1, 512)[:192], w.view(-1, 512)[:64].repeat(8, 1), None),  # few rows
        lambda x, w, b: (x[:, :4], w[:, :4], b),  # few products
        lambda x, w, b: (x, w.repeat(32, 16).view(-1, 200)[: 512 * 2048 // 200 + 1], None),  # a large weight
        lambda x, w, b: (x[:0], w, b),
        lambda x, w, b: (x[:, :0], w[:, :0], b),
        lambda x, w, b: (x, w.as_subclass(Quantised), b),
        lambda x, w, b: (x, w, b[:1]),
    ],
    ids=[
        "float64",
        "bfloat16",
        "few rows",
        "few products",
        "large weight",
        "no rows",
        "no channels",
        "quantised",
        "one bias for all",
    ],
)
def test_what_does_not_gain_is_left_to_torch(change, convolutions):
    x, weight, bias = change(torch.randn(512, 200), torch.randn(256, 200), torch.randn(256))
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=0)
    assert not convolutions


def test_compilers_transforms_modes_and_settings_see_a_matrix_product(convolutions, monkeypatch):
    x, weight, bias = torch.randn(512, 200), torch.randn(256, 200), torch.randn(256)
    expected = F.linear(x, weight, bias)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), expected)
    mapped = torch.vmap(linear, in_dims=(0, None, None))(torch.stack([x, x]), weight, bias)
    torch.testing.assert_close(mapped[1], expected, rtol=1e-4, atol=1e-4)
    with FakeTensorMode() as mode:
        assert linear(mode.from_tensor(x), mode.from_tensor(weight)).shape == (512, 256)
    traced = torch.jit.trace(linear, (x, weight, bias), check_trace=False)
    assert "conv" not in str(traced.graph)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    torch.set_float32_matmul_precision("medium")
    linear(x, weight, bias)
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    linear(x, weight, bias)
    torch.backends.mkldnn.conv.fp32_precision = "none"
    assert linear(x.to("meta"), weight.to("meta"), bias.to("meta")).shape == (512, 256)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    linear(x, weight, bias)
    assert not convolutions
    monkeypatch.undo()
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_alike(checkpointing, convolutions, monkeypatch):
    config = MinGRUConfig(vocab_size=130, hidden_size=128, num_hidden_layers=2, hidden_sizes=[128, 160])
    model, ids = MinGRUForCausalLM(config), torch.randint(130, (4, 256))
    if checkpointing:
        model.activation_checkpointing_enable()

    def train(model, **kwargs):
        model.zero_grad()
        loss = model(ids, labels=ids, **kwargs).loss
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    results = [train(model), train(model, skip_logits=True)]
    kinds = {"gate_hidden", "out_proj", "res_align", "up_proj", "down_proj", "lm_head"}
    expected_shapes = {
        (*module.weight.shape, 1, 1) for name, module in model.named_modules() if name.split(".")[-1] in kinds
    }
    assert set(convolutions) >= expected_shapes
    for module, name in ((mingru_hf.linear, "CONVOLUTION_IS_FASTER"), (mingru_hf.calling, "HAS_FASTER_WAY")):
        monkeypatch.setattr(module, name, False)
    convolutions.clear()
    expected = train(model)
    assert not convolutions
    for result in results:
        for name, value in expected.items():
            assert (result[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("shape", [(1, 200, 4096), (16, 200, 512)])
def test_channels_that_do_not_lie_last_in_memory(shape, threads, convolutions):
    x, weight = torch.randn(shape).transpose(1, 2), torch.randn(257, 200)
    out = linear(x, weight)
    assert convolutions
    assert out.is_contiguous()
    torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_layers_take_it_and_can_be_scripted(convolutions):
    x = torch.randn(4, 256, 64)
    for rnn, count in ((MinGRUCell(64, 128), 1), (MinGRU(64, [256, 160], residual=True), 4)):
        out, _ = rnn(x)
        assert len(convolutions) == count
        convolutions.clear()
        torch.testing.assert_close(torch.jit.script(rnn)(x)[0], out, rtol=1e-4, atol=1e-5)
        assert not convolutions


def test_hooks_and_adapters_take_effect(convolutions):
    rnn, x = MinGRU(64, [128]), torch.randn(4, 512, 64)
    plain, _ = rnn(x)
    hooked = copy.deepcopy(rnn)
    hooked.layers[0].gate_hidden.register_forward_hook(lambda module, args, output: output + 1)
    with torch.no_grad():
        rnn.layers[0].gate_hidden.bias += 1
    torch.testing.assert_close(hooked(x)[0], rnn(x)[0])
    assert (hooked(x)[0] - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("processor", "family"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", 26),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", 25),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207\n", 0),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\n", 0),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", 26),
        ("Intel64 Family 6 Model 183 Stepping 1, GenuineIntel", 0),
        ("arm", 0),
        ("", 0),
    ],
)
def test_processors(processor, family):
    assert amd_family(processor) == family


def linear_module_on(monkeypatch, family, *, capability="AVX512", mkl=True, mkldnn=True, scan=""):
    """Import mingru_hf.linear as on a machine with an AMD processor of this family."""
    monkeypatch.setenv("MINGRU_SCAN", scan)
    text = f"vendor_id\t: AuthenticAMD\ncpu family\t: {family}\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    spec = importlib.util.spec_from_file_location("mingru_hf.linear_elsewhere", mingru_hf.linear.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    return elsewhere


@pytest.mark.parametrize(
    ("family", "changes", "convolution", "few_rows"),
    [
        (26, {"scan": "torch"}, True, False),
        (26, {"scan": "auto"}, True, True),
        (26, {}, True, True),
        (27, {}, True, True),
        (25, {}, True, True),
        (25, {"capability": "AVX2"}, False, False),
        (23, {}, False, False),
        (26, {"capability": "AVX2"}, False, False),
        (26, {"mkl": False}, False, False),
        (26, {"mkldnn": False}, False, True),
    ],
)
def test_the_machines_where_there_is_a_faster_way(family, changes, convolution, few_rows, monkeypatch):
    elsewhere = linear_module_on(monkeypatch, family, **changes)
    assert elsewhere.CONVOLUTION_IS_FASTER is convolution
    assert elsewhere.FEW_ROWS_ARE_FASTER is (few_rows and NUMBA_AVAILABLE)
    assert elsewhere.HAS_FASTER_WAY is (convolution or (few_rows and NUMBA_AVAILABLE))


@pytest.mark.parametrize(
    ("family", "rows", "inputs", "runs"),
    [(26, 1024, 128, 1), (25, 1024, 128, 0), (25, 16384, 128, 1), (25, 1024, 2048, 0)],
)
def test_a_zen_4_gains_in_large_products_of_many_rows_alone(family, rows, inputs, runs, convolutions, monkeypatch):
    elsewhere = linear_module_on(monkeypatch, family)
    x, weight = torch.randn(16, rows // 16, inputs), torch.randn(129, inputs)
    torch.testing.assert_close(elsewhere.linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    assert len(convolutions) == runs


# --- Few rows.


def few_rows(rows, inputs=257, outputs=131, dtype=torch.float32):
    """Return the input, weight and bias of a linear map that the kernel takes."""
    return [torch.randn(size).to(dtype) for size in ((rows, 1, inputs), (outputs, inputs), (outputs,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        *((1, 257, 131), (2, 128, 300), (3, 1000, 1001), (4, 128, 512), (5, 1200, 700), (7, 384, 96), (8, 768, 515)),
        *((1, 6145, 9), (7, 2000, 1300), (8, 1537, 30)),  # inputs are split into pieces, in float32 only
    ],
)
def test_few_rows_are_within_rounding(rows, inputs, outputs, bias, dtype, threads, kernels):
    x, weight, added = few_rows(rows, inputs, outputs, dtype)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        with torch.no_grad():
            actual = linear(x, weight, added if bias else None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernels == [(rows, 1, inputs)] * (rows * inputs <= 6144 or dtype == torch.float32)
    expected = F.linear(x.double(), weight.double(), added.double() if bias else None)
    size = F.linear(x.double().abs(), weight.double().abs(), added.double().abs() if bias else None)
    bound = 1e-6 * size + (2.0**-8 * expected.abs() if dtype == torch.bfloat16 else 0)
    assert (actual.dtype, actual.shape) == (dtype, expected.shape)
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    ("dtype", "rows", "inputs", "outputs"),
    [
        (torch.float32, 16, 300, 131),
        (torch.float32, 1, 256, 128),
        (torch.float32, 1, 128, 256),
        (torch.bfloat16, 8, 300, 131),
        (torch.bfloat16, 1, 256, 64),
        (torch.bfloat16, 1, 128, 128),
        (torch.bfloat16, 6, 1024, 64),
    ],
    ids=str,
)
def test_what_is_just_large_or_small_enough(dtype, rows, inputs, outputs, kernels):
    """With one row more, or one input or output fewer, torch does the map if that crosses a limit."""
    most = 16 if dtype == torch.float32 else 8
    sizes = [
        (rows, inputs, outputs),
        (rows, inputs, outputs - 1),
        (rows, inputs - 1, outputs),
        (rows + 1, inputs, outputs),
    ]
    for size in sizes:
        tensors = few_rows(*size, dtype)
        with torch.no_grad():
            torch.testing.assert_close(linear(*tensors), F.linear(*tensors), rtol=1e-2, atol=1e-3)
    weights = (1 << 15) if dtype == torch.float32 else (1 << 14)
    taken = [
        (r, 1, i)
        for r, i, o in sizes
        if r <= most and i >= 128 and i * o >= weights and (r * i <= 6144 or dtype == torch.float32)
    ]
    assert kernels == taken
    assert 1 <= len(taken) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, 1:2],
        lambda x: x[..., ::2],
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x[0, 1],
    ],
    ids=["time first", "a step", "every other channel", "expanded", "a vector"],
)
def test_few_rows_of_any_strides(view, dtype, kernels):
    x = view(torch.randn(4, 2, 512).to(dtype))
    weight = torch.randn(140, x.shape[-1]).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-2, atol=1e-4)
    assert kernels == [tuple(x.shape)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype, kernels):
    rows = 16 if dtype == torch.float32 else 6  # float32: inputs are split; no sum may be added twice
    tensors = few_rows(rows, 1000, 1023, dtype)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            results = [torch.set_num_threads(count) or linear(*tensors) for count in (1, 2, 3, 7) * 5]
    finally:
        torch.set_num_threads(before)
    assert len(kernels) == 20
    assert all(torch.equal(result, results[0]) for result in results)


def test_large_maps_take_several_threads(threads, kernels, monkeypatch):
    counts, run = [], scan_numba._run
    monkeypatch.setattr(scan_numba, "_run", lambda *args: counts.append(args[-2:]) or run(*args))
    with torch.no_grad():
        for outputs in (511, 512):
            linear(*few_rows(2, 512, outputs))
    assert counts == [(4, 1), (4 * threads, threads)]  # tasks, threads


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [3, 4, 6])
def test_few_rows_do_not_touch_each_other(rows, value, kernels):
    x, weight, bias = few_rows(rows)
    with torch.no_grad():
        clean = linear(x, weight, bias)
        x[1, 0, 5] = value
        weight[7, 9] = value
        bias[8] = value
        dirty = linear(x, weight, bias)
    torch.testing.assert_close(dirty, F.linear(x, weight, bias), equal_nan=True, rtol=1e-4, atol=1e-4)
    assert not dirty[1].isfinite().any()
    assert not dirty[:, :, 7:9].isfinite().any()
    dirty[1], dirty[:, :, 7:9] = clean[1], clean[:, :, 7:9]
    assert torch.equal(dirty, clean)
    assert len(kernels) == 2


@pytest.mark.parametrize(
    "change",
    [
        cast(torch.float64, torch.float64, torch.float64),
        cast(torch.float16, torch.float16, torch.float16),
        lambda x, w, b: (x, w.t().contiguous().t(), b),
        lambda x, w, b: (x, torch.cat([w, w], dim=1)[:, :257], b),
        lambda x, w, b: (x, w, torch.stack([b, b], dim=1)[:, 0]),
        lambda x, w, b: (x, w, b[:1]),
        lambda x, w, b: (x[:0], w, b),
        lambda x, w, b: (x[..., :0], w[:, :0], b),
        lambda x, w, b: (x, w[:0], None),
        lambda x, w, b: (x, w[:9], b[:9]),
        lambda x, w, b: (x, w.as_subclass(Quantised), b),
        lambda x, w, b: (x, w.to_sparse_csr(), None),
        lambda x, w, b: (x, w, b.as_subclass(Quantised)),
        lambda x, w, b: (torch._neg_view(x), w, b),
        lambda x, w, b: (x, torch._neg_view(w), b),
        lambda x, w, b: (x, w, torch._neg_view(b)),
        lambda x, w, b: (torch._efficientzerotensor(x.shape), w, b),
        lambda x, w, b: (torch._to_functional_tensor(x), w, b),
        lambda x, w, b: (torch.nested.nested_tensor([x[0], x[1]]), w, None),
        lambda x, w, b: (x.to("meta"), w.to("meta"), b.to("meta")),
        lambda x, w, b: (x, w[0], None),
    ],
    ids=[
        *("float64", "float16", "weight transposed", "weight cut out"),
        *("bias cut out", "one bias for all", "no rows", "no channels", "no outputs", "few weights"),
        *("quantised", "sparse", "quantised bias", "negative", "negative weight", "negative bias"),
        *("zeros without memory", "functional", "nested", "meta", "one output"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_other_kinds_of_few_rows_are_left_to_torch(change, kernels):
    x, weight, bias = change(*few_rows(4))
    with torch.no_grad():
        actual, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert not kernels
    if x.is_nested:
        actual, expected = actual.unbind(), expected.unbind()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x, w[:, :256].contiguous(), b),
        lambda x, w, b: (x, w.bfloat16(), b),
        lambda x, w, b: (x, w, b.bfloat16()),
        lambda x, w, b: (x, w, b[:7]),
        lambda x, w, b: (x, w, torch.cat([b, b])),
        lambda x, w, b: (x, w[None], b),
        lambda x, w, b: (x[0, 0, 0], w, b),
    ],
    ids=["inputs", "dtype", "dtype of the bias", "short bias", "long bias", "weight of three axes", "number"],
)
def test_what_does_not_fit_raises_torchs_error(change, kernels):
    x, weight, bias = change(*few_rows(4))
    with torch.no_grad():
        with pytest.raises((RuntimeError, ValueError)) as expected:
            F.linear(x, weight, bias)
        with pytest.raises(expected.type, match=re.escape(str(expected.value))):
            linear(x, weight, bias)
    assert not kernels


def test_gradients_compilers_transforms_and_modes_see_few_rows(kernels):
    x, weight, bias = few_rows(4)
    expected = F.linear(x, weight, bias)
    for actual, other in zip(gradients(linear, x, weight, bias), gradients(F.linear, x, weight, bias), strict=True):
        torch.testing.assert_close(actual, other)
    with torch.no_grad():
        for function in (linear, linear_unobserved):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x, weight, bias), expected)
        mapped = torch.vmap(linear, in_dims=(0, None, None))(torch.stack([x, x]), weight, bias)
        torch.testing.assert_close(mapped[1], expected)
        with FakeTensorMode() as mode:
            assert linear(mode.from_tensor(x), mode.from_tensor(weight)).shape == (4, 1, 131)
        with FlopCounterMode(display=False) as counter:
            linear(x, weight)
        assert counter.get_total_flops() == 2 * 4 * 257 * 131
        with Replacing():
            assert linear(x, weight, bias) == 42
        traced = torch.jit.trace(linear, (x, weight, bias), check_trace=False)
        torch.testing.assert_close(traced(x + 1, weight, bias), F.linear(x + 1, weight, bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, bias).dtype == torch.bfloat16
    assert not kernels


@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "weight", "bias"])
def test_tensors_whose_memory_was_taken_away_raise_torchs_error(which, kernels):
    tensors = few_rows(4)
    tensors[which].untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"storage|not allocated"):
        linear(*tensors)
    assert not kernels


def test_the_default_dtype_does_not_matter(kernels):
    tensors = few_rows(4)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            out = linear(*tensors)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(out, F.linear(*tensors), rtol=1e-4, atol=1e-4)
    assert kernels


def test_decoding_takes_the_kernel_and_gives_the_same_scores(kernels, monkeypatch):
    config = MinGRUConfig(vocab_size=300, hidden_size=128, num_hidden_layers=2, hidden_sizes=[128, 256])
    model, ids = MinGRUForCausalLM(config).eval(), torch.randint(300, (3, 24))
    with torch.no_grad():
        expected = model(ids).logits
        cache, kernels[:] = model(ids[:, :20]).cache, []
        pieces = [model(piece, cache=cache).logits for piece in ids[:, 20:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected[:, 20:], rtol=1e-4, atol=1e-5)
    num_maps = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert len(kernels) == 4 * num_maps  # every map of every step
    monkeypatch.setattr(mingru_hf.linear, "FEW_ROWS_ARE_FASTER", False)
    with torch.no_grad():
        cache = model(ids[:, :20]).cache
        torch.testing.assert_close(model(ids[:, 20:21], cache=cache).logits, pieces[0], rtol=1e-4, atol=1e-5)
    assert len(kernels) == 4 * num_maps


def test_layers_step_by_the_kernel(kernels):
    rnn, x = MinGRU(128, [256, 128], residual=True), torch.randn(2, 9, 128)
    expected, _ = rnn(x)
    assert not kernels  # gradients are needed
    with torch.no_grad():
        out, h = rnn(x[:, :8])
        kernels.clear()
        out, h = rnn(x[:, 8:], h)
    torch.testing.assert_close(out, expected[:, 8:], rtol=1e-4, atol=1e-5)
    assert kernels == [(2, 1, 128), (2, 1, 128), (2, 1, 256), (2, 1, 256)]
