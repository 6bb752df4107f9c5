"""The core layers: torch-mingru's interface, its equations written by hand, and TorchScript."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import PreTrainedConfig, PreTrainedModel

import mingru_hf as mingru

# Two float32 evaluations that sum in different orders.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def hand_written_stack(rnn, x, h):
    """Compute torch-mingru's stack one step at a time, from the parameters alone."""
    parameters = dict(rnn.named_parameters())
    last_states = []
    for i in range(rnn.num_layers):
        name = f"layers.{i}"
        normed = x
        if f"{name}.norm.weight" in parameters:
            normed = F.layer_norm(x, x.shape[-1:], parameters[f"{name}.norm.weight"], parameters[f"{name}.norm.bias"])
        projected = normed @ parameters[f"{name}.gate_hidden.weight"].T + parameters.get(f"{name}.gate_hidden.bias", 0)
        size = rnn.layer_sizes[i + 1]
        gate, candidate = projected[..., :size], projected[..., size:]
        state, outputs = h[i][:, 0], []
        for t in range(x.shape[1]):
            z, v = torch.sigmoid(gate[:, t]), candidate[:, t]
            state = (1 - z) * state + z * torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
            outputs.append(state)
        last_states.append(state.unsqueeze(1))
        out = torch.stack(outputs, dim=1)
        if rnn.residual:
            align = parameters.get(f"{name}.res_align.weight")
            out = out + (x if align is None else x @ align.T)
        x = out
    return x, last_states


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hidden_sizes", [5, [4, 4, 7]])
def test_stack_equals_the_hand_written_equations(hidden_sizes, bias, residual, norm):
    rnn = mingru.MinGRU(4, hidden_sizes, bias=bias, residual=residual, norm=norm).double()
    x = torch.randn(3, 11, 4, dtype=torch.double, requires_grad=True)
    h = [torch.rand_like(state).requires_grad_() for state in rnn.init_hidden_state(x)]
    inputs = [x, *h, *rnn.parameters()]
    out, last = rnn(x, h)
    expected, expected_last = hand_written_stack(rnn, x, h)
    torch.testing.assert_close([out, *last], [expected, *expected_last])
    weight = torch.randn_like(out)
    actual_grads = torch.autograd.grad((out * weight).sum() + last[0].sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weight).sum() + expected_last[0].sum(), inputs)
    torch.testing.assert_close(actual_grads, expected_grads)


def test_cell_equals_a_stack_of_one():
    cell, rnn = mingru.MinGRUCell(3, 5), mingru.MinGRU(3, 5)
    rnn.layers[0].gate_hidden.load_state_dict(cell.to_gate_hidden.state_dict())
    x = torch.randn(2, 9, 3)
    torch.testing.assert_close(cell(x), rnn(x))


def test_parameter_names_are_those_of_torch_mingru():
    rnn = mingru.MinGRU(3, [4, 4], norm=True, residual=True)
    assert set(rnn.state_dict()) == {
        "layers.0.gate_hidden.weight",
        "layers.0.gate_hidden.bias",
        "layers.0.res_align.weight",
        "layers.0.norm.weight",
        "layers.0.norm.bias",
        "layers.1.gate_hidden.weight",
        "layers.1.gate_hidden.bias",
        "layers.1.norm.weight",
        "layers.1.norm.bias",
    }
    assert set(mingru.MinGRUCell(3, 4, bias=False).state_dict()) == {"to_gate_hidden.weight"}
    assert rnn.layer_sizes == [3, 4, 4]
    assert rnn.num_layers == 2


def test_snippet_of_torch_mingrus_readme():
    B, input_size, hidden_sizes, S = 10, 3, [32, 64], 128
    rnn = mingru.MinGRU(input_size=input_size, hidden_sizes=hidden_sizes, dropout=0.0, residual=True).eval()
    x = torch.randn(B, S, input_size)
    out, h = rnn(x)
    assert out.shape == (B, S, 64)
    assert h[0].shape == (B, 1, 32)
    assert h[1].shape == (B, 1, 64)
    h = rnn.init_hidden_state(x)
    out, h = rnn(torch.randn(B, S, input_size), h=h)
    h = rnn.init_hidden_state(x)
    out_seq = []
    for i in range(x.shape[1]):
        out, h = rnn(x[:, i : i + 1], h=h)
        out_seq.append(out)
    out_seq = torch.cat(out_seq, 1)
    assert out_seq.shape == (B, S, 64)
    out_par, h = rnn(x, rnn.init_hidden_state(x))
    torch.testing.assert_close(out_seq, out_par, **CLOSE)


def make_layers():
    return {
        "cell": mingru.MinGRUCell(3, 5),
        "stack": mingru.MinGRU(3, [4, 4, 6], residual=True, norm=True, dropout=0.5),
        "plain": mingru.MinGRU(3, 6, bias=False),
        "bidirectional": mingru.Bidirectional(mingru.MinGRU(3, [4, 6])),
        "shared": mingru.Bidirectional(mingru.MinGRUCell(3, 6), shared_weights=True),
    }


LAYERS = list(make_layers())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.torchscript
def test_scripted_layers_give_the_same_outputs_and_gradients(name):
    layer = make_layers()[name].eval()
    scripted = torch.jit.script(layer)
    x = torch.randn(2, 9, 3)
    out, h = layer(x)
    scripted_out, scripted_h = scripted(x)
    torch.testing.assert_close([scripted_out, *scripted_h], [out, *h], **CLOSE)
    torch.testing.assert_close(scripted(x, h)[0], layer(x, h)[0], **CLOSE)
    torch.testing.assert_close(scripted.init_hidden_state(x), layer.init_hidden_state(x))
    parameters = list(layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(scripted(x)[0].square().sum(), list(scripted.parameters())),
        torch.autograd.grad(layer(x)[0].square().sum(), parameters),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.torchscript
def test_scripted_layers_load_in_a_process_without_the_package(scripted_layers_stand_alone):
    scripted_layers_stand_alone(make_layers(), torch.randn(2, 9, 3))


@pytest.mark.torchscript
def test_bfloat16_layer_scripts():
    layer = mingru.MinGRU(3, [4, 6]).bfloat16()
    x = torch.randn(2, 9, 3).bfloat16()
    out = torch.jit.script(layer)(x)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, layer(x)[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("make", [mingru.MinGRU, mingru.MinGRUCell])
@pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.torchscript)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_pieces_in_16_bits_keep_a_slow_state(make, scripted, autocast, training):
    """The returned state is not rounded: in bfloat16 it would stop where a step changes it by less than 0.4 %."""
    rnn = mingru.spread_memory_(make(3, 16), 1024)
    x = torch.randn(1, 1500, 3)
    if not autocast:
        rnn, x = rnn.bfloat16(), x.bfloat16()
    rnn = torch.jit.script(rnn) if scripted else rnn
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, last = rnn(x)
        h, outs = None, []
        for step in x.split(2 if training else 1, dim=1):
            h = None if h is None else [state.detach() for state in h]
            out, h = rnn(step, h)
            outs.append(out)
    assert expected.dtype == out.dtype == torch.bfloat16
    assert last[0].dtype == h[0].dtype == torch.float32
    assert last[0].untyped_storage().nbytes() == 4 * last[0].numel()
    torch.testing.assert_close(h, last, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("make", [mingru.MinGRU, lambda *sizes, **options: mingru.MinConv2dGRU(*sizes, 3, **options)])
def test_all_parameters_have_the_dtype_and_the_device(make):
    rnn = make(3, [4, 5], norm=True, residual=True, dtype=torch.float64, device="meta")
    assert {(p.dtype, p.device.type) for p in rnn.parameters()} == {(torch.float64, "meta")}


def test_sizes_may_be_numpy_integers():
    rnn = mingru.MinGRU(np.int64(3), [np.int64(4), 5])
    assert [type(size) for size in rnn.layer_sizes] == [int] * 3
    assert mingru.MinGRU(3, np.int64(4)).layer_sizes == [3, 4]
    linear, conv = mingru.MinGRUCell(3, np.int64(4)), mingru.MinConv2dGRUCell(np.int64(3), np.int64(4), 3)
    assert type(linear.to_gate_hidden.out_features) is type(conv.to_gate_hidden.in_channels) is int  # for TorchScript


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("steps", [1, 50])
def test_last_states_have_memory_of_their_own(name, steps):
    """As with nn.GRU, keeping them keeps no other tensors in memory, and writing to them changes nothing else."""
    rnn = make_layers()[name].eval()
    out, h = rnn(torch.randn(2, steps, rnn.layer_sizes[0]))
    assert all(state.untyped_storage().nbytes() == state.nbytes for state in h)
    expected = torch.autograd.grad(out.sum(), list(rnn.parameters()), retain_graph=True, allow_unused=True)
    before = out.detach().clone()
    with torch.no_grad():
        for state in h:
            state.fill_(0.5)
    torch.testing.assert_close(out, before, rtol=0, atol=0)
    actual = torch.autograd.grad(out.sum(), list(rnn.parameters()), allow_unused=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_without_gradients_goes_a_short_way_to_the_same(name, dtype):
    rnn = make_layers()[name].eval().to(dtype)
    x = torch.randn(2, 1, 3, dtype=dtype)
    h = [torch.rand_like(state, dtype=torch.float32) for state in rnn.init_hidden_state(x)]
    expected, expected_h = rnn(x, h)
    with torch.no_grad():
        out, last = rnn(x, h)
    assert out.dtype == dtype
    assert {state.dtype for state in last} == {torch.float32}
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close([out.float(), *last], [expected.float(), *expected_h], **close)
    before = out.clone()
    for state in last:
        state.fill_(0.5)
    torch.testing.assert_close(out, before, rtol=0, atol=0)


def test_a_step_calls_the_hooks_and_what_stands_in_a_layers_place():
    rnn, calls = mingru.MinGRU(3, [4, 4], norm=True, residual=True).eval(), []
    rnn.layers[0].gate_hidden.register_forward_hook(lambda module, args, out: calls.append("gate"))
    rnn.layers[1].norm = torch.nn.Tanh()
    x = torch.randn(2, 1, 3)
    expected = rnn(x)[0]
    with torch.no_grad():
        torch.testing.assert_close(rnn(x)[0], expected, **CLOSE)
    assert calls == ["gate", "gate"]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_exported_with_the_states_they_returned(name):
    rnn = make_layers()[name].eval()
    x = torch.randn(2, 7, rnn.layer_sizes[0])
    with torch.no_grad():
        h = rnn(x)[1]
        program = torch.export.export(rnn, (x, h))
        torch.testing.assert_close(program.module()(x, h), rnn(x, h), **CLOSE)


def test_dropout_spares_the_last_layer_and_evaluation():
    rnn = mingru.MinGRU(3, [50, 50], dropout=1.0)
    x = torch.randn(2, 9, 3)
    out = rnn(x)[0]  # the second layer sees zeros: its output is that of its bias alone
    zeros = torch.zeros(2, 9, 50)
    expected, _ = hand_written_stack(rnn, x, rnn.init_hidden_state(x))
    assert not torch.allclose(out, expected)
    second = mingru.MinGRU(50, 50)
    second.layers[0].load_state_dict(rnn.layers[1].state_dict())
    torch.testing.assert_close(out, second(zeros)[0])
    torch.testing.assert_close(rnn.eval()(x)[0], expected, **CLOSE)


def test_bidirectional_sees_the_past_and_the_future_aligned_in_time():
    rnn = mingru.Bidirectional(mingru.MinGRU(3, [4, 5]))
    x = torch.randn(2, 9, 3)
    out, h = rnn(x)
    assert out.shape == (2, 9, 10)
    torch.testing.assert_close(out[..., :5], rnn.rnn(x)[0])
    backward_out, backward_h = rnn.backward_rnn(x.flip(1))
    torch.testing.assert_close(out[..., 5:], backward_out.flip(1))
    torch.testing.assert_close(h, rnn.rnn(x)[1] + backward_h)
    changed = x.clone()
    changed[:, 4] += 1
    moved = (rnn(changed)[0] - out).abs().amax(dim=(0, 2))
    forward_moved = (rnn(changed)[0] - out)[..., :5].abs().amax(dim=(0, 2))
    assert (moved > 0).all()
    assert not forward_moved[:4].any()


def test_bidirectional_draws_its_own_backward_weights_unless_shared():
    rnn = mingru.Bidirectional(mingru.MinGRU(3, 4))
    weight, backward = rnn.rnn.layers[0].gate_hidden.weight, rnn.backward_rnn.layers[0].gate_hidden.weight
    assert not torch.equal(weight, backward)
    shared = mingru.Bidirectional(mingru.MinGRU(3, 4), shared_weights=True)
    assert {name.split(".")[0] for name in shared.state_dict()} == {"rnn"}
    x = torch.randn(2, 9, 3)
    torch.testing.assert_close(shared(x)[0][..., 4:], shared.rnn(x.flip(1))[0].flip(1))
    frozen = mingru.Bidirectional(mingru.MinGRU(3, 4).requires_grad_(False))
    assert all(parameter.requires_grad for parameter in frozen.backward_rnn.parameters())  # these are untrained
    assert not any(parameter.requires_grad for parameter in frozen.rnn.parameters())
    as_torch_mingru = mingru.Bidirectional(shared.rnn, shared_weights=True, aligned=False)
    torch.testing.assert_close(as_torch_mingru(x)[0][..., 4:], shared.rnn(x.flip(1))[0])


def weight_normed(rnn):
    torch.nn.utils.parametrizations.weight_norm(rnn.layers[0].gate_hidden)
    return rnn


def spectral_normed(rnn):
    torch.nn.utils.spectral_norm(rnn.layers[0].gate_hidden)  # the older implementation, with a hook
    return rnn


def pruned(rnn):
    prune.random_unstructured(rnn.layers[0].gate_hidden, "weight", 0.5)
    return rnn


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mingru.MinGRU(3, 4)(pack_padded_sequence(torch.zeros(2, 5, 3), [5, 2], batch_first=True)),
            "got a PackedSequence",
        ),
        (
            lambda: mingru.MinGRU(3, 4)(torch.nested.nested_tensor([torch.zeros(2, 3)], layout=torch.jagged)),
            "got a nested tensor",
        ),
        (lambda: mingru.MinGRU(3, 4)(torch.zeros(2, 5, 3), [None]), r"h\[0\] must be a tensor .* got a NoneType"),
        (lambda: mingru.MinGRU(3, []), "hidden_sizes is empty"),
        (lambda: mingru.MinGRU(3, [4, 0]), "at least 1"),
        (lambda: mingru.MinGRU(3, 4, dropout=1.5), "between 0 and 1"),
        (lambda: mingru.MinGRUCell(0, 4), "at least 1"),
        (lambda: mingru.MinGRU(3, 4)(torch.randn(2, 5, 4)), r"\(B, T, 3\) .* got \[2, 5, 4\]"),
        (lambda: mingru.MinGRU(3, 4)(torch.randn(5, 3)), r"\(B, T, 3\)"),
        (lambda: mingru.MinGRU(3, 4)(torch.randn(2, 0, 3)), "T of at least 1"),
        (lambda: mingru.MinGRU(3, [4, 5])(torch.randn(2, 5, 3), [torch.rand(2, 1, 4)]), "2 in all, got 1"),
        (lambda: mingru.MinGRU(3, 4)(torch.randn(2, 5, 3), [torch.rand(2, 1, 4)] * 2), "1 in all, got 2"),
        (lambda: mingru.MinGRU(3, 4)(torch.randn(2, 5, 3), [torch.rand(1, 1, 4)]), r"h\[0\] must have shape"),
        (lambda: mingru.MinGRUCell(3, 4)(torch.randn(2, 5, 3), [torch.rand(2, 1, 5)]), r"h\[0\] must have shape"),
        (lambda: mingru.Bidirectional(torch.nn.Linear(3, 4)), "wraps a recurrent layer"),
        (lambda: mingru.MinGRU(3, 4.0), r"integers, got input_size=3 and hidden sizes \[4.0\]"),
        (lambda: mingru.MinGRUCell(3, [4]), r"integers, got input_size=3 and hidden sizes \[\[4\]\]"),
        (lambda: mingru.Bidirectional(weight_normed(mingru.MinGRU(3, 4))), "register them on it"),
        (lambda: mingru.Bidirectional(spectral_normed(mingru.MinGRU(3, 4))), "register them on it"),
        (lambda: mingru.Bidirectional(pruned(mingru.MinGRU(3, 4))), "register them on it"),
        (
            lambda: mingru.Bidirectional(mingru.MinGRU(3, 4))(torch.randn(2, 5, 3), [torch.rand(2, 1, 4)]),
            "must hold 2 states",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: mingru.MinGRUCell(3, 512, **kwargs),
        lambda **kwargs: mingru.MinGRU(3, [512, 256], **kwargs),
        lambda **kwargs: mingru.Bidirectional(mingru.MinConv2dGRU(3, [512, 64], 3, **kwargs)),
        lambda **kwargs: torch.nn.Sequential(torch.nn.Linear(3, 3), mingru.MinConv2dGRUCell(3, 512, 3, **kwargs)),
    ],
    ids=["cell", "stack", "bidirectional", "inside"],
)
def test_spread_memory(make):
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert mingru.spread_memory_(module, 64) is module
    after = module.state_dict()
    biases = [name for name in after if name.endswith("gate_hidden.bias")]
    assert biases
    assert all(torch.equal(after[name], before[name]) for name in after if name not in biases)
    gates, candidates = zip(*(after[name].chunk(2) for name in biases), strict=True)
    assert not torch.cat(candidates).any()
    memory = 1 / torch.sigmoid(torch.cat(gates)) - 1  # z = 1 / (1 + m)
    assert 0.999 < memory.min() < 1.5
    assert 50 < memory.max() < 64.1
    assert (memory < 8).float().mean().item() == pytest.approx(0.5, abs=0.1)  # log-uniform
    with pytest.raises(ValueError, match="bias=True"):
        mingru.spread_memory_(make(bias=False), 64)


def test_spread_memory_survives_the_initialisation_of_a_model_around_it(tmp_path):
    class Encoder(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.rnn = mingru.spread_memory_(mingru.MinGRU(3, [64, 64]), 1024)
            self.post_init()

    model = Encoder(PreTrainedConfig())
    gate, candidate = model.rnn.layers[1].gate_hidden.bias.detach().chunk(2)
    assert gate.min() < -3
    assert not candidate.any()
    model.save_pretrained(tmp_path)
    loaded = Encoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.rnn.layers[1].gate_hidden.bias, model.rnn.layers[1].gate_hidden.bias)


def test_spread_memory_changes_all_layers_or_none():
    module = torch.nn.Sequential(mingru.MinGRU(3, 4), mingru.MinGRU(4, 4, bias=False))
    before = module[0].layers[0].gate_hidden.bias.clone()
    with pytest.raises(ValueError, match="bias=True"):
        mingru.spread_memory_(module, 64)
    assert torch.equal(module[0].layers[0].gate_hidden.bias, before)


def test_spread_memory_refuses_a_bias_that_is_computed():
    """The next call would compute the bias again and discard the values that were drawn."""
    pruned, wrapped = mingru.MinGRU(3, 4), mingru.MinGRU(3, 4)
    torch.nn.utils.prune.random_unstructured(pruned.layers[0].gate_hidden, "bias", 0.5)
    wrapped.layers[0].gate_hidden = torch.nn.Sequential(wrapped.layers[0].gate_hidden)
    for module in (pruned, wrapped):
        with pytest.raises(ValueError, match=r"computed from something else.*before pruning"):
            mingru.spread_memory_(module, 8)


def test_spread_memory_needs_a_layer_and_a_step():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        mingru.spread_memory_(mingru.MinGRU(3, 4), 0)
    with pytest.raises(ValueError, match="finite and at least 1, got nan"):
        mingru.spread_memory_(mingru.MinGRU(3, 4), float("nan"))
    with pytest.raises(ValueError, match="Linear contains no MinGRU layer"):
        mingru.spread_memory_(torch.nn.Linear(3, 4), 8)
