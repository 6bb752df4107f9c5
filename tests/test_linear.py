"""Linear maps as convolutions: the numbers of F.linear, only where it pays, and on any machine if it is told to."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mingru_hf.calling
import mingru_hf.linear
from mingru_hf import MinGRU, MinGRUCell, MinGRUConfig, MinGRUForCausalLM
from mingru_hf.linear import amd_family, linear


@pytest.fixture
def convolutions(monkeypatch):
    """As on a machine where convolutions are faster; the list of those that ran, by the shape of their weight."""
    shapes, original = [], F.conv2d

    def conv2d(x, weight, *args, **kwargs):
        shapes.append(tuple(weight.shape))
        return original(x, weight, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", conv2d)
    for module in (mingru_hf.linear, mingru_hf.calling):
        monkeypatch.setattr(module, "CONVOLUTION_IS_FASTER", True)
    return shapes


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def gradients(function, *tensors):
    """The output and the gradients of a weighted sum of it."""
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
    # torch gives a convolution of one row of the batch to oneDNN on several threads only.
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
    """Counting the operations of the forward pass alone changes nothing for the backward pass."""
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
    for module in (mingru_hf.linear, mingru_hf.calling):
        monkeypatch.setattr(module, "CONVOLUTION_IS_FASTER", False)
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


@pytest.mark.parametrize(
    ("family", "changes", "faster"),
    [
        (26, {}, True),
        (27, {}, True),
        (25, {}, False),
        (26, {"capability": "AVX2"}, False),
        (26, {"mkl": False}, False),
        (26, {"mkldnn": False}, False),
    ],
)
def test_the_machines_where_convolutions_are_faster(family, changes, faster, monkeypatch):
    machine = {"capability": "AVX512", "mkl": True, "mkldnn": True} | changes
    text = f"vendor_id\t: AuthenticAMD\ncpu family\t: {family}\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: machine["capability"])
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: machine["mkl"])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: machine["mkldnn"])
    spec = importlib.util.spec_from_file_location("mingru_hf.linear_elsewhere", mingru_hf.linear.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    assert elsewhere.CONVOLUTION_IS_FASTER is faster
