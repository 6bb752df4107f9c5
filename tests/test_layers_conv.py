"""The convolutional layers: torch-mingru's interface, its equations written by hand, and TorchScript."""

import pytest
import torch
import torch.nn.functional as F

import mingru_hf as mingru

# Two float32 evaluations that sum in different orders.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# Odd frames and channels; strides, even kernels, no padding, and layers that keep the size of the frames.
GEOMETRIES = {
    "strided": {"kernel_sizes": 3, "strides": 2, "paddings": 1},
    "same": {"kernel_sizes": 3, "strides": 1, "paddings": 1},
    "no_padding": {"kernel_sizes": [3, 2, 1]},
    "even": {"kernel_sizes": [4, 2, 2], "strides": [1, 2, 1], "paddings": [2, 0, 1]},
    "oblong": {"kernel_sizes": [(3, 1), (1, 3), 3], "strides": [(1, 2), 1, (2, 1)], "paddings": [(1, 0), 0, (0, 2)]},
}


def loop_over_frames(conv, x, h):
    """Run the recurrence at each pixel, one frame at a time, from the parameters of the convolution alone."""
    state, states = h[:, 0], []
    for t in range(x.shape[1]):
        gate, candidate = F.conv2d(x[:, t], conv.weight, conv.bias, conv.stride, conv.padding).chunk(2, dim=1)
        z = torch.sigmoid(gate)
        state = (1 - z) * state + z * torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
        states.append(state)
    return torch.stack(states, dim=1)


def hand_written_stack(rnn, x, h):
    """Compute torch-mingru's stack frame by frame; a frame that keeps its shape is added to its output unchanged."""
    last_states = []
    for i, layer in enumerate(rnn.layers):
        normed, skip = x, x
        if isinstance(layer.norm, torch.nn.GroupNorm):
            frames = [
                F.group_norm(frame, layer.norm.num_groups, layer.norm.weight, layer.norm.bias) for frame in x.unbind(1)
            ]
            normed = torch.stack(frames, dim=1)
        states = loop_over_frames(layer.gate_hidden, normed, h[i])
        last_states.append(states[:, -1:])
        if rnn.residual and states.shape != x.shape:
            conv = layer.res_align
            frames = [F.conv2d(frame, conv.weight, None, conv.stride, conv.padding) for frame in x.unbind(1)]
            skip = torch.stack(frames, dim=1)
        x = states + skip if rnn.residual else states
    return x, last_states


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_stack_equals_the_hand_written_equations(geometry, residual, norm):
    rnn = mingru.MinConv2dGRU(3, [8, 8, 5], **GEOMETRIES[geometry], residual=residual, norm=norm).double()
    for parameter in rnn.parameters():  # the norms' affine part too
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 3, 11, 9, dtype=torch.double, requires_grad=True)
    h = [torch.rand_like(state).requires_grad_() for state in rnn.init_hidden_state(x)]
    inputs = [x, *h, *rnn.parameters()]
    out, last = rnn(x, h)
    expected, expected_last = hand_written_stack(rnn, x, h)
    torch.testing.assert_close([out, *last], [expected, *expected_last])
    weight = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum() + last[0].sum(), inputs),
        torch.autograd.grad((expected * weight).sum() + expected_last[0].sum(), inputs),
    )


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"),
    [(3, 1, 1), (3, 2, 1), (2, 1, 0), (4, 3, 2), (1, 1, 0), ((1, 3), (2, 1), (0, 1))],
)
@pytest.mark.parametrize("bias", [False, True])
def test_cell_equals_the_hand_written_equations(kernel_size, stride, padding, bias):
    cell = mingru.MinConv2dGRUCell(3, 5, kernel_size, stride=stride, padding=padding, bias=bias).double()
    x = torch.randn(2, 6, 3, 9, 7, dtype=torch.double, requires_grad=True)
    (h,) = cell.init_hidden_state(x)
    torch.testing.assert_close(cell(x), cell(x, [h]))
    h = torch.rand_like(h).requires_grad_()
    out, (last,) = cell(x, [h])
    expected = loop_over_frames(cell.to_gate_hidden, x, h)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, expected[:, -1:])
    inputs = [x, h, *cell.parameters()]
    weight = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs)
    )


def test_geometry_is_height_and_width():
    rnn = mingru.MinConv2dGRU(3, 4, [(1, 3)], strides=[(2, 1)], paddings=[(0, 1)])
    assert rnn(torch.randn(2, 5, 3, 9, 7))[0].shape == (2, 5, 4, 5, 7)
    assert rnn.layers[0].gate_hidden.weight.shape[2:] == (1, 3)


def test_parameter_names_are_those_of_torch_mingru():
    rnn = mingru.MinConv2dGRU(
        4, [4, 4, 6, 6], [3, 3, 3, 2], strides=[1, 2, 1, 1], paddings=1, norm=True, residual=True
    )
    parts = ["gate_hidden.weight", "gate_hidden.bias", "norm.weight", "norm.bias"]
    expected = {f"layers.{i}.{part}" for i in range(4) for part in parts}
    # Layer 0 keeps channels and pixels. Layer 1 changes the pixels, layer 2 the channels, and layer 3, with an even
    # kernel, the pixels.
    assert set(rnn.state_dict()) == expected | {f"layers.{i}.res_align.weight" for i in (1, 2, 3)}
    assert rnn.layers[1].res_align.weight.shape == (4, 4, 3, 3)
    assert rnn.layers[1].gate_hidden.weight.shape == (8, 4, 3, 3)
    assert set(mingru.MinConv2dGRUCell(3, 4, 3, bias=False).state_dict()) == {"to_gate_hidden.weight"}
    assert rnn.layer_sizes == [4, 4, 4, 6, 6]
    assert rnn.num_layers == 4


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (4, 1), (6, 1), (8, 1), (16, 4), (24, 4), (32, 8), (64, 16), (96, 16), (512, 64)],
)
def test_groups_of_the_norm(channels, groups):
    assert mingru.MinConv2dGRU(channels, 2, 1, norm=True).layers[0].norm.num_groups == groups


def test_snippet_of_torch_mingrus_readme():
    B, S = 5, 10
    input_size = 3
    hidden_sizes = [16, 32, 64]
    kernel_sizes = [3, 3, 3]
    padding = 1
    stride = 2
    rnn = mingru.MinConv2dGRU(
        input_size=input_size,
        hidden_sizes=hidden_sizes,
        kernel_sizes=kernel_sizes,
        paddings=padding,
        strides=stride,
        dropout=0.0,
        residual=True,
    ).eval()
    x = torch.randn(B, S, input_size, 64, 64)
    out, h = rnn(x)
    assert out.shape == (B, S, 64, 8, 8)
    assert h[0].shape == (B, 1, 16, 32, 32)
    assert h[1].shape == (B, 1, 32, 16, 16)
    assert h[2].shape == (B, 1, 64, 8, 8)
    h = rnn.init_hidden_state(x)
    out, h = rnn(x, h=h)
    h = rnn.init_hidden_state(x)
    out_seq = []
    for i in range(x.shape[1]):
        out, h = rnn(x[:, i : i + 1], h=h)
        out_seq.append(out)
    out_seq = torch.cat(out_seq, 1)
    assert out_seq.shape == (B, S, 64, 8, 8)
    out_par, h = rnn(x, rnn.init_hidden_state(x))
    torch.testing.assert_close(out_seq, out_par, **CLOSE)


def make_layers():
    return {
        "cell": mingru.MinConv2dGRUCell(3, 5, 3, stride=2),
        "stack": mingru.MinConv2dGRU(
            3, [4, 4, 6], [3, 2, 3], strides=[1, 2, 1], paddings=1, residual=True, norm=True, dropout=0.5
        ),
        "plain": mingru.MinConv2dGRU(3, 6, (3,), bias=False),
        "bidirectional": mingru.Bidirectional(mingru.MinConv2dGRU(3, [4, 6], 3, strides=2)),
        "shared": mingru.Bidirectional(mingru.MinConv2dGRUCell(3, 6, 2), shared_weights=True),
    }


LAYERS = list(make_layers())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.torchscript
def test_scripted_layers_give_the_same_outputs_and_gradients(name):
    layer = make_layers()[name].eval()
    scripted = torch.jit.script(layer)
    x = torch.randn(2, 4, 3, 9, 8)
    out, h = layer(x)
    scripted_out, scripted_h = scripted(x)
    torch.testing.assert_close([scripted_out, *scripted_h], [out, *h], **CLOSE)
    torch.testing.assert_close(scripted(x, h)[0], layer(x, h)[0], **CLOSE)
    torch.testing.assert_close(scripted.init_hidden_state(x), layer.init_hidden_state(x))
    torch.testing.assert_close(
        torch.autograd.grad(scripted(x)[0].square().sum(), list(scripted.parameters())),
        torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.torchscript
def test_scripted_layers_load_in_a_process_without_the_package(scripted_layers_stand_alone):
    scripted_layers_stand_alone(make_layers(), torch.randn(2, 4, 3, 9, 8))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_layers_are_exported_for_any_number_of_frames(norm, residual):
    rnn = mingru.MinConv2dGRU(3, [4, 4], 3, paddings=1, norm=norm, residual=residual).eval()
    dims = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("frames", min=1)}
    x = torch.randn(2, 7, 3, 6, 5)
    with torch.no_grad():
        program = torch.export.export(rnn, (x,), dynamic_shapes={"x": dims})
        for frames in (x, torch.randn(3, 4, 3, 6, 5)):
            torch.testing.assert_close(program.module()(frames), rnn(frames), **CLOSE)
        h = rnn(x)[1]
        torch.testing.assert_close(torch.export.export(rnn, (x, h)).module()(x, h), rnn(x, h), **CLOSE)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_layers_are_traced_with_and_without_gradients():
    rnn = mingru.MinConv2dGRU(3, [4, 5], 3, paddings=1, residual=True, norm=True)
    x = torch.randn(2, 7, 3, 6, 5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(torch.jit.trace(rnn, (x,))(x), rnn(x), **CLOSE)


def test_last_states_have_memory_of_their_own():
    _, h = mingru.MinConv2dGRU(3, [4, 5], 3)(torch.randn(2, 7, 3, 8, 8))
    assert all(state.untyped_storage().nbytes() == state.nbytes for state in h)


def test_bidirectional_sees_the_past_and_the_future_aligned_in_time():
    rnn = mingru.Bidirectional(mingru.MinConv2dGRU(3, [4, 5], 3, strides=2, residual=True))
    x = torch.randn(2, 6, 3, 9, 9)
    out, h = rnn(x)
    assert out.shape == (2, 6, 10, 1, 1)
    torch.testing.assert_close(out[:, :, :5], rnn.rnn(x)[0])
    backward_out, backward_h = rnn.backward_rnn(x.flip(1))
    torch.testing.assert_close(out[:, :, 5:], backward_out.flip(1))
    torch.testing.assert_close(h, rnn.rnn(x)[1] + backward_h)
    assert not torch.equal(rnn.rnn.layers[0].gate_hidden.weight, rnn.backward_rnn.layers[0].gate_hidden.weight)
    shared = mingru.Bidirectional(rnn.rnn, shared_weights=True)
    assert {name.split(".")[0] for name in shared.state_dict()} == {"rnn"}
    torch.testing.assert_close(shared(x)[0][:, :, 5:], rnn.rnn(x.flip(1))[0].flip(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_layers_keep_the_dtype(dtype):
    rnn = mingru.MinConv2dGRU(3, [4, 6], 3, norm=True, residual=True, dtype=dtype)
    x = torch.randn(2, 3, 3, 8, 8, dtype=dtype)
    out, h = rnn(x)
    assert out.dtype == dtype
    assert {state.dtype for state in h} == {torch.float64 if dtype == torch.float64 else torch.float32}
    torch.testing.assert_close(out.float(), rnn.float()(x.float())[0], rtol=5e-2, atol=5e-2)


def test_frames_with_the_channels_last_in_memory_give_the_same():
    """Frames decoded to (B, T, H, W, C) and permuted have this layout, as do a backbone's maps on a CPU."""
    rnn = mingru.MinConv2dGRU(8, [8, 6], 3, strides=2, norm=True, residual=True)
    x = torch.randn(2, 4, 9, 8, 8).permute(0, 1, 4, 2, 3)
    parameters = list(rnn.parameters())
    expected = torch.autograd.grad(rnn(x.contiguous())[0].square().sum(), parameters)
    for frames in (x, x.clone(memory_format=torch.preserve_format).requires_grad_()):
        assert not frames.is_contiguous()
        actual = torch.autograd.grad(rnn(frames)[0].square().sum(), parameters)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_dropout_spares_the_last_layer_and_evaluation():
    rnn = mingru.MinConv2dGRU(3, [8, 8], 3, dropout=1.0)
    x = torch.randn(2, 4, 3, 8, 8)
    second = mingru.MinConv2dGRU(8, 8, 3)
    second.layers[0].load_state_dict(rnn.layers[1].state_dict())
    torch.testing.assert_close(rnn(x)[0], second(torch.zeros(2, 4, 8, 6, 6))[0])
    expected, _ = hand_written_stack(rnn, x, rnn.init_hidden_state(x))
    torch.testing.assert_close(rnn.eval()(x)[0], expected, **CLOSE)


FRAMES = torch.zeros(2, 5, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mingru.MinConv2dGRU(3, [], 3), "hidden_sizes is empty"),
        (lambda: mingru.MinConv2dGRU(3, [4, 0], 3), "at least 1"),
        (lambda: mingru.MinConv2dGRU(3, [4, 4], [3]), r"kernel_sizes must be an int or hold one entry .* 2 layers"),
        (lambda: mingru.MinConv2dGRU(3, 4, 3, paddings=[1, 1]), "paddings must be an int"),
        (lambda: mingru.MinConv2dGRU(3, 4, [(3, 3, 3)]), r"an int or \(height, width\)"),
        (lambda: mingru.MinConv2dGRU(3, 4, [(3.7, 3.2)]), r"an int or \(height, width\) .* got \(3.7, 3.2\)"),
        (lambda: mingru.MinConv2dGRU(3, 4, 3.0), r"an int or \(height, width\) .* got \(3.0,\)"),
        (lambda: mingru.MinConv2dGRU(3, 4, 3, strides=0), "strides must be at least 1"),
        (lambda: mingru.MinConv2dGRUCell(3, 4, 3, padding=-1), "paddings at least 0"),
        (lambda: mingru.MinConv2dGRUCell(0, 4, 3), "at least 1"),
        (lambda: mingru.MinConv2dGRU(4, 4, 3)(FRAMES), r"\(B, T, 4, H, W\) .* got \[2, 5, 3, 8, 8\]"),
        (lambda: mingru.MinConv2dGRU(3, 4, 3)(FRAMES[0]), r"\(B, T, 3, H, W\)"),
        (lambda: mingru.MinConv2dGRUCell(3, 4, 3)(FRAMES[:, :0]), "T of at least 1"),
        (lambda: mingru.MinConv2dGRU(3, [4, 4], 5)(FRAMES), "maps of 4 x 4 are too small for a kernel of"),
        (lambda: mingru.MinConv2dGRUCell(3, 4, (1, 9))(FRAMES), "maps of 8 x 8 are too small"),
        (lambda: mingru.MinConv2dGRU(3, [4, 5], 3)(FRAMES, [torch.rand(2, 1, 4, 6, 6)]), "2 in all, got 1"),
        (
            lambda: mingru.MinConv2dGRU(3, 4, 3)(FRAMES, [torch.rand(2, 1, 4, 8, 8)]),
            r"h\[0\] must .*\[2, 1, 4, 6, 6\]",
        ),
        (lambda: mingru.MinConv2dGRUCell(3, 4, 3)(FRAMES, [torch.rand(1, 1, 4, 6, 6)]), r"h\[0\] must have shape"),
        (lambda: mingru.MinConv2dGRUCell(3, 4, 3)(FRAMES, []), "1 in all, got 0"),
        (lambda: mingru.MinConv2dGRUCell(3, 4, 3)(FRAMES, [torch.rand(2, 1, 4, 6, 6)] * 2), "1 in all, got 2"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
