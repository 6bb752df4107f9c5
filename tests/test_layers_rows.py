"""`mask` and `reset` in all layers, for rows of unequal length and rows of several sequences."""

import pytest
import torch

import mingru_hf as mingru

# Two float32 evaluations that sum in a different order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CLOSE_GRADS = {"rtol": 1e-4, "atol": 1e-4}
STEPS = 9
# (start, stop) of the sequences in each row: with padding before, between and after them, and without padding.
ROWS = [[(0, 9)], [(0, 4)], [(5, 9)], [(2, 5), (5, 8)], [(0, 1), (1, 9)], [(1, 3), (4, 5), (6, 8)]]


def make_layers():
    return {
        "cell": mingru.MinGRUCell(3, 5),
        "stack": mingru.MinGRU(3, [4, 4, 6], residual=True, norm=True),
        "bidirectional": mingru.Bidirectional(mingru.MinGRU(3, [4, 6])),
        "shared": mingru.Bidirectional(mingru.MinGRUCell(3, 6), shared_weights=True),
        "conv_cell": mingru.MinConv2dGRUCell(3, 5, 3, stride=2),
        "conv_stack": mingru.MinConv2dGRU(3, [4, 6], [3, 2], paddings=1, residual=True, norm=True),
        "conv_bidirectional": mingru.Bidirectional(mingru.MinConv2dGRU(3, [4, 6], 3)),
    }


def make_input(name, num_rows=6):
    return torch.randn(num_rows, STEPS, 3, *((6, 5) if name.startswith("conv") else ()))


def flags(rows=ROWS):
    """Return the mask (B, T) and reset (B, T) of rows of sequences."""
    mask, reset = torch.zeros(len(rows), STEPS, dtype=torch.bool), torch.zeros(len(rows), STEPS, dtype=torch.bool)
    for row, sequences in enumerate(rows):
        for start, stop in sequences:
            mask[row, start:stop] = True
            reset[row, start] = True
    return mask, reset


@pytest.mark.parametrize("scripted", [False, pytest.param(True, marks=pytest.mark.torchscript)])
@pytest.mark.parametrize("name", make_layers())
def test_sequences_in_a_row_equal_those_by_themselves(name, scripted):
    layer = make_layers()[name]
    called = torch.jit.script(layer) if scripted else layer
    x = make_input(name)
    mask, reset = flags()
    out, h = called(x, None, mask, reset)
    alone = [[layer(x[row : row + 1, slice(*s)]) for s in sequences] for row, sequences in enumerate(ROWS)]
    together = torch.cat([out[row, slice(*s)] for row, sequences in enumerate(ROWS) for s in sequences])
    expected = torch.cat([out[0] for row in alone for out, _ in row])
    torch.testing.assert_close(together, expected, **CLOSE)
    # In the forward direction a row ends with its last sequence, in the backward direction with its first.
    num_forward = len(h) // 2 if isinstance(layer, mingru.Bidirectional) else len(h)
    for i, state in enumerate(h):
        last = torch.cat([(row[-1] if i < num_forward else row[0])[1][i] for row in alone])
        torch.testing.assert_close(state, last, **CLOSE)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((together * weight).sum(), list(called.parameters())),
        torch.autograd.grad((expected * weight).sum(), list(layer.parameters())),
        **CLOSE_GRADS,
    )


@pytest.mark.parametrize("name", ["cell", "stack", "conv_cell", "conv_stack"])
def test_steps_equal_the_parallel_pass(name):
    layer = make_layers()[name]
    x = make_input(name)
    mask, reset = flags()
    h = [torch.rand_like(state) for state in layer.init_hidden_state(x)]
    expected, expected_h = layer(x, h, mask, reset)
    outs = []
    for t in range(STEPS):
        now = slice(t, t + 1)
        out, h = layer(x[:, now], h, mask=mask[:, now], reset=reset[:, now])
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, **CLOSE)
    torch.testing.assert_close(h, expected_h, **CLOSE)


def test_padding_hands_on_the_state_that_was_given():
    layer = mingru.MinGRU(3, [4, 5])
    x = make_input("stack", 2)
    mask = flags([[(3, 9)], [(0, 6)]])[0]
    h = [torch.rand_like(state) for state in layer.init_hidden_state(x)]
    out, last = layer(x, h, mask)
    for row, real in enumerate((slice(3, 9), slice(0, 6))):
        expected, expected_last = layer(x[row : row + 1, real], [state[row : row + 1] for state in h])
        torch.testing.assert_close(out[row : row + 1, real], expected, **CLOSE)
        torch.testing.assert_close([state[row : row + 1] for state in last], expected_last, **CLOSE)


@pytest.mark.parametrize("name", make_layers())
@pytest.mark.parametrize("which", ["mask", "reset"])
def test_flags_of_another_shape_are_refused(name, which):
    layer, x = make_layers()[name], make_input(name, 2)
    with pytest.raises(ValueError, match=rf"{which} must be a tensor of shape \(2, 9\) \(B, T\), got \(9, 2\)"):
        layer(x, **{which: torch.ones(9, 2, dtype=torch.bool)})


@pytest.mark.parametrize("name", make_layers())
@pytest.mark.parametrize("which", ["mask", "reset"])
@pytest.mark.torchscript
def test_scripted_layers_refuse_them_too(name, which):
    layer, x = torch.jit.script(make_layers()[name]), make_input(name, 2)
    with pytest.raises(torch.jit.Error, match=r"must have shape \[2, 9\] \(B, T\), got \[9, 2\]"):
        layer(x, **{which: torch.ones(9, 2, dtype=torch.bool)})


@pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["cell", "stack", "conv_cell", "conv_stack"])
def test_states_may_be_written_to(name, steps, backend, monkeypatch):
    """When an environment ends, its state may be set to the initial value in place; gradients stay correct."""
    if backend == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv("MINGRU_SCAN", backend)
    layer, x = make_layers()[name], make_input(name)[:, : 2 * steps]
    ended = torch.tensor([True, False] * 3)

    def as_list(h):
        return h if isinstance(h, list) else [h]

    _, h = layer(x[:, :steps])
    for state in as_list(h):
        state[ended] = 0.5
    out, _ = layer(x[:, steps:], h)
    in_place = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    reset = torch.zeros(6, 2 * steps, dtype=torch.bool)
    reset[ended, steps] = True
    out, _ = layer(x, reset=reset)
    expected = torch.autograd.grad(out[:, steps:].square().sum(), list(layer.parameters()))
    torch.testing.assert_close(in_place, expected, **CLOSE_GRADS)
