"""MinGRU layers with the interface of the torch-mingru package: same arguments, returns and parameter names.

`out, h = rnn(x, h)` processes x (B, T, D_in) in parallel over time. Calls with T = 1 that pass the returned h on give
the same numbers step by step. h is a list with one (B, 1, D) tensor per layer. It is float32 if x or autocast has 16
bits: a slowly changing state that is rounded at every step would not change at all. The convolutional layers do the
same for frames: x (B, T, C, H, W), h (B, 1, D, H_out, W_out). All layers can be scripted with `torch.jit.script`.

Two arguments that torch-mingru lacks support rows of unequal length and rows that hold several sequences. `mask`
(B, T) is False at padding, on either side, which leaves states unchanged. `reset` (B, T) is True where a sequence
starts: the state is set to 0.5 before that step. At padding, outputs are meaningless, and x must be finite.

Sources: Feng et al. 2024, arXiv:2410.01201, for the equations; github.com/cheind/mingru for the interface and the
convolutional layers.

Legend: B batch, T time steps, D channels, C x H x W of a frame, * any trailing axes.
"""

import copy
from collections.abc import Iterable
from itertools import pairwise
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .calling import choose_call
from .scan import draw_memory_, mingru_scan
from .scan_reference import initial_state, scan_reference


def _scan(gate_and_candidate: Tensor, h0: Tensor, mask: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scan pre-activations (B, T, 2D, *) from the state h0 (B, 1, D, *).

    Returns:
        States (B, T, D, *) in the dtype of the pre-activations, and the last state (B, 1, D, *), not rounded to it.
    """
    if torch.jit.is_scripting():
        states = scan_reference(
            gate_and_candidate,
            h0,
            None if mask is None else _scripted_flags(mask, gate_and_candidate),
            None if reset is None else _scripted_flags(reset, gate_and_candidate),
        )
        return states.to(gate_and_candidate.dtype), states[:, -1:].clone()
    return mingru_scan(gate_and_candidate, h0, mask, reset, return_last_state=True)


def _scripted_flags(flags: Tensor, x: Tensor) -> Tensor:
    """Check the shape of mask or reset, and convert the flags to booleans, as `mingru_scan` does."""
    if list(flags.shape) != [x.shape[0], x.shape[1]]:
        raise ValueError(f"mask and reset must have shape {[x.shape[0], x.shape[1]]} (B, T), got {list(flags.shape)}.")
    return flags.to(torch.bool)


def _check_input(x: Tensor, input_size: int, pixels: str) -> None:
    if not torch.jit.is_scripting() and (not isinstance(x, Tensor) or x.is_nested):
        raise ValueError(
            f"x must be one padded tensor (B, T, {input_size}{pixels}), with a mask (B, T) if rows have unequal "
            f"lengths, got a {_kind(x)}."
        )
    if x.dim() != (5 if pixels else 3) or x.shape[2] != input_size or x.shape[1] == 0:
        shape = f"(B, T, {input_size}{pixels})"
        raise ValueError(f"x must have shape {shape} with T of at least 1, got {list(x.shape)}.")


@torch.jit.unused
def _kind(value: object) -> str:
    return "nested tensor" if isinstance(value, Tensor) else type(value).__name__


def _check_number(h: list[Tensor], num_layers: int) -> None:
    if len(h) != num_layers:
        raise ValueError(f"h must be a list of one state per layer, {num_layers} in all, got {len(h)}.")


def _check_state(state: Tensor, expected: list[int], layer: int) -> None:
    if not torch.jit.is_scripting() and not isinstance(state, Tensor):
        raise ValueError(f"h[{layer}] must be a tensor of shape {expected}, got a {_kind(state)}.")
    if list(state.shape) != expected:
        axes = "B, 1, hidden" if len(expected) == 3 else "B, 1, hidden, H_out, W_out"
        raise ValueError(f"h[{layer}] must have shape {expected} ({axes}), got {list(state.shape)}.")


def _layer_sizes(input_size: int, hidden_sizes: int | list[int]) -> list[int]:
    """Return [input_size, *hidden_sizes] as Python ints, the only integers that TorchScript supports."""
    hidden_sizes = list(hidden_sizes) if isinstance(hidden_sizes, Iterable) else [hidden_sizes]
    if not all(isinstance(size, Integral) for size in (input_size, *hidden_sizes)):
        raise ValueError(f"Sizes must be integers, got input_size={input_size} and hidden sizes {hidden_sizes}.")
    if len(hidden_sizes) == 0:
        raise ValueError("hidden_sizes is empty: give the width of at least one layer.")
    if min([input_size, *hidden_sizes]) < 1:
        raise ValueError(f"All sizes must be at least 1, got input_size={input_size} and hidden sizes {hidden_sizes}.")
    return [int(size) for size in (input_size, *hidden_sizes)]


class _Cell(nn.Module):
    """Base class of the single layers, linear or convolutional."""

    layer_sizes: list[int]
    # The axes of x after its channels. A class attribute, since cells pickled by earlier versions lack it.
    _pixels: torch.jit.Final[str] = ""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.layer_sizes = _layer_sizes(input_size, [hidden_size])
        self.num_layers = 1

    def forward(
        self, x: Tensor, h: list[Tensor] | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run over x (B, T, input_size, *) from h, a list of one state (B, 1, hidden_size, *), or from 0.5 if None.

        `mask` (B, T) is False at padding, `reset` (B, T) is True where a sequence starts; both are boolean.

        Returns:
            States (B, T, hidden_size, *), and a list with the last of them (B, 1, hidden_size, *).

        Raises:
            ValueError: if x, h, mask or reset does not fit, or x holds no step.
        """
        _check_input(x, self.layer_sizes[0], self._pixels)
        h = self.init_hidden_state(x) if h is None else h
        _check_number(h, 1)
        _check_state(h[0], self._shape_of_state(x), 0)
        out, last_state = _scan(self._project(x), h[0], mask, reset)
        return out, [last_state]

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Return the default state g(0) = 0.5 for a batch like x, as a list of one tensor (B, 1, hidden_size, *)."""
        return [initial_state(x, self._shape_of_state(x))]


class MinGRUCell(_Cell):
    """One MinGRU layer, h_t = (1 - z_t) h_{t-1} + z_t g(v_t) with (k, v) = Linear(x), z = sigmoid(k).

    Args:
        input_size: channels of the input.
        hidden_size: channels of the state and of the output.
        bias: whether the projection has a bias.
        device, dtype: of the parameters.

    Raises:
        ValueError: if a size is below 1.

    Example:
        >>> cell = MinGRUCell(3, 8)
        >>> out, h = cell(torch.randn(2, 16, 3))  # (2, 16, 8), [(2, 1, 8)]
        >>> out, h = cell(torch.randn(2, 1, 3), h)  # continues from there
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        input_size, hidden_size = self.layer_sizes
        self.to_gate_hidden = nn.Linear(input_size, 2 * hidden_size, bias=bias, device=device, dtype=dtype)

    def _shape_of_state(self, x: Tensor) -> list[int]:
        """Return the state's shape (B, 1, hidden_size) for x (B, T, input_size)."""
        return [x.shape[0], 1, self.layer_sizes[1]]

    def _project(self, x: Tensor) -> Tensor:
        """x (B, T, input_size) -> pre-activations (B, T, 2 hidden_size)."""
        if torch.jit.is_scripting():
            return self.to_gate_hidden(x)
        return choose_call(x)(self.to_gate_hidden, x)

    def extra_repr(self) -> str:
        return f"{self.layer_sizes[0]}, {self.layer_sizes[1]}"


class _MinGRULayer(nn.Module):
    """The parameters of one layer of the stack, under torch-mingru's names."""

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool, norm: bool, residual: bool, factory: dict
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.gate_hidden = nn.Linear(input_size, 2 * hidden_size, bias=bias, **factory)
        aligned = residual and input_size != hidden_size
        self.res_align = nn.Linear(input_size, hidden_size, bias=False, **factory) if aligned else nn.Identity()
        self.norm = nn.LayerNorm(input_size, **factory) if norm else nn.Identity()

    def state_shape(self, x: Tensor) -> list[int]:
        """Return the state's shape (B, 1, D) for x (B, *, D_in)."""
        return [x.shape[0], 1, self.hidden_size]

    def forward(
        self, x: Tensor, h: Tensor, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D_in), h (B, 1, D) -> states (B, T, D), last state (B, 1, D), residual branch (B, T, D)."""
        if torch.jit.is_scripting():
            gate_and_candidate, aligned = self.gate_hidden(self.norm(x)), self.res_align(x)
        else:
            call = choose_call(x)
            gate_and_candidate, aligned = call(self.gate_hidden, call(self.norm, x)), call(self.res_align, x)
        states, last_state = _scan(gate_and_candidate, h, mask, reset)
        return states, last_state, aligned


class _Stack(nn.Module):
    """Base class of the stacks of layers, linear or convolutional."""

    layer_sizes: list[int]
    pixels: torch.jit.Final[str]  # the axes of x after its channels

    def __init__(
        self, layer_sizes: list[int], layers: Iterable[nn.Module], dropout: float, residual: bool, pixels: str
    ):
        super().__init__()
        self.layer_sizes, self.num_layers = layer_sizes, len(layer_sizes) - 1
        self.residual, self.pixels = residual, pixels
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: Tensor, h: list[Tensor] | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run over x (B, T, input_size, *) from h, a list of one state (B, 1, D, *) per layer, or from 0.5 if None.

        `mask` (B, T) is False at padding, `reset` (B, T) is True where a sequence starts; both are boolean.

        Returns:
            Outputs of the last layer (B, T, D, *), and a list with the last state of each layer before the residual
            sum, to pass as `h` to the next call.

        Raises:
            ValueError: if x, h, mask or reset does not fit, or x holds no step.
        """
        _check_input(x, self.layer_sizes[0], self.pixels)
        h = self.init_hidden_state(x) if h is None else h
        _check_number(h, self.num_layers)
        last_states: list[Tensor] = []
        out = x
        for i, layer in enumerate(self.layers):
            _check_state(h[i], layer.state_shape(out), i)
            states, last_state, skip = layer(out, h[i], mask, reset)
            last_states.append(last_state)
            out = states + skip if self.residual else states
            if i < self.num_layers - 1:
                out = self.dropout(out)
        return out, last_states

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Return the default states g(0) = 0.5 for a batch like x: one tensor (B, 1, D, *) per layer."""
        states: list[Tensor] = []
        below = x
        for layer in self.layers:
            below = initial_state(x, layer.state_shape(below))
            states.append(below)
        return states

    def extra_repr(self) -> str:
        return f"{self.layer_sizes[0]}, {self.layer_sizes[1:]}, residual={self.residual}"


class MinGRU(_Stack):
    """A stack of MinGRU layers: layer i + 1 reads the outputs of layer i.

    Args:
        input_size: channels of the input.
        hidden_sizes: channels of each layer's state; an int means a single layer.
        bias: whether the projections have biases.
        norm: normalise each layer's input with a LayerNorm.
        dropout: probability of zeroing an output of every layer except the last, in training.
        residual: add each layer's input to its output, through a linear map without bias where the sizes differ.
        device, dtype: of the parameters.

    Raises:
        ValueError: if a size is below 1, hidden_sizes is empty or dropout is not a probability.

    Example:
        >>> rnn = MinGRU(3, [32, 64], residual=True)
        >>> out, h = rnn(torch.randn(10, 128, 3))  # (10, 128, 64), [(10, 1, 32), (10, 1, 64)]
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: int | list[int],
        *,
        bias: bool = True,
        norm: bool = False,
        dropout: float = 0.0,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = _layer_sizes(input_size, hidden_sizes)
        factory = {"device": device, "dtype": dtype}
        layers = (_MinGRULayer(n_in, n_out, bias, norm, residual, factory) for n_in, n_out in pairwise(sizes))
        super().__init__(sizes, layers, dropout, residual, pixels="")


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, Integral):
        return int(value), int(value)
    value = tuple(value) if isinstance(value, Iterable) else (value,)
    if len(value) != 2 or not all(isinstance(size, Integral) for size in value):
        raise ValueError(
            f"The kernel size, stride and padding must each be an int or (height, width) in pixels, got {value}."
        )
    return int(value[0]), int(value[1])


def _per_layer(name: str, value: int | list, num_layers: int) -> list:
    """Return one value per layer, from an int for all layers or from a list."""
    values = list(value) if isinstance(value, Iterable) else [value] * num_layers
    if len(values) != num_layers:
        raise ValueError(f"{name} must be an int or hold one entry for each of the {num_layers} layers, got {value}.")
    return values


def _geometry(
    kernel_size: int | tuple[int, int], stride: int | tuple[int, int], padding: int | tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    kernel_size, stride, padding = _pair(kernel_size), _pair(stride), _pair(padding)
    if min(kernel_size) < 1 or min(stride) < 1 or min(padding) < 0:
        raise ValueError(
            "Kernel sizes and strides must be at least 1 and paddings at least 0 pixels, got kernel_size="
            f"{kernel_size}, stride={stride}, padding={padding}."
        )
    return kernel_size, stride, padding


def _state_shape(
    x: Tensor, hidden_size: int, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> list[int]:
    """Return the state's shape (B, 1, D, H_out, W_out) for frames x (B, *, H, W) that a convolution reads."""
    height = (x.shape[-2] + 2 * padding[0] - kernel_size[0]) // stride[0] + 1
    width = (x.shape[-1] + 2 * padding[1] - kernel_size[1]) // stride[1] + 1
    if height < 1 or width < 1:
        raise ValueError(
            f"Frames or feature maps of {x.shape[-2]} x {x.shape[-1]} are too small for a kernel of "
            f"{list(kernel_size)} with padding {list(padding)}: use larger frames, a smaller kernel or more padding."
        )
    return [x.shape[0], 1, hidden_size, height, width]


def _num_groups(channels: int) -> int:
    """Return torch-mingru's number of GroupNorm groups.

    This is the largest of 64, 32, 16, 8, 4 and 1 that divides the channels and leaves at least 4 (or all) in a group.
    """
    return next(n for n in (64, 32, 16, 8, 4, 1) if channels % n == 0 and channels // n >= min(4, channels))


class MinConv2dGRUCell(_Cell):
    """One convolutional MinGRU layer: the recurrence of `MinGRUCell` at each pixel, (k, v) = Conv2d(x).

    Args:
        input_size: channels of the frames.
        hidden_size: channels of the state and of the output.
        kernel_size, stride, padding: of the convolution, in pixels; an int or (height, width).
        bias: whether the convolution has a bias.
        device, dtype: of the parameters.

    Raises:
        ValueError: if a size is below 1 or a padding below 0.

    Example:
        >>> cell = MinConv2dGRUCell(3, 8, kernel_size=3, stride=2, padding=1)
        >>> out, h = cell(torch.randn(2, 16, 3, 32, 32))  # (2, 16, 8, 16, 16), [(2, 1, 8, 16, 16)]
        >>> out, h = cell(torch.randn(2, 1, 3, 32, 32), h)  # continues from there
    """

    _pixels: torch.jit.Final[str] = ", H, W"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.kernel_size, self.stride, self.padding = geometry = _geometry(kernel_size, stride, padding)
        input_size, hidden_size = self.layer_sizes
        self.to_gate_hidden = nn.Conv2d(input_size, 2 * hidden_size, *geometry, bias=bias, device=device, dtype=dtype)

    def _shape_of_state(self, x: Tensor) -> list[int]:
        """Return the state's shape (B, 1, hidden_size, H_out, W_out) for frames x (B, T, input_size, H, W)."""
        return _state_shape(x, self.layer_sizes[1], self.kernel_size, self.stride, self.padding)

    def _project(self, x: Tensor) -> Tensor:
        """x (B, T, input_size, H, W) -> pre-activations (B, T, 2 hidden_size, H_out, W_out)."""
        return self.to_gate_hidden(x.flatten(0, 1)).unflatten(0, [x.shape[0], x.shape[1]])


class MinConv2dGRULayer(nn.Module):
    """One layer of the convolutional stack, with parameters under torch-mingru's names.

    Args:
        input_size, hidden_size: channels in and out.
        kernel_size, stride, padding: of the convolution, an int or (height, width).
        bias, norm, residual: as in `MinConv2dGRU`.
        factory: device and dtype of the parameters.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int],
        bias: bool,
        norm: bool,
        residual: bool,
        factory: dict,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.kernel_size, self.stride, self.padding = geometry = _geometry(kernel_size, stride, padding)
        self.gate_hidden = nn.Conv2d(input_size, 2 * hidden_size, *geometry, bias=bias, **factory)
        same_size = self.stride == (1, 1) and all(
            2 * p == k - 1 for p, k in zip(self.padding, self.kernel_size, strict=True)
        )
        self.res_align = nn.Identity()
        self.aligns_residual = residual and not (same_size and input_size == hidden_size)
        if self.aligns_residual:
            self.res_align = nn.Conv2d(input_size, hidden_size, *geometry, bias=False, **factory)
        self.norm = nn.GroupNorm(_num_groups(input_size), input_size, **factory) if norm else nn.Identity()

    def state_shape(self, x: Tensor) -> list[int]:
        """Return the state's shape (B, 1, D, H_out, W_out) for frames x (B, T, C, H, W) or any (B, *, H, W)."""
        return _state_shape(x, self.hidden_size, self.kernel_size, self.stride, self.padding)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, C, H, W) -> pre-activations (B, T, 2D, H_out, W_out), residual (B, T, D, H_out, W_out)."""
        frames = x.flatten(0, 1)  # all frames are one batch of the convolutions
        if torch.is_grad_enabled() or torch.jit.is_tracing():
            # torch 2.13 on the CPU: the backward pass of a GroupNorm crashes if its input is in channels-last format,
            # as frames decoded to H x W x C are, and does not require a gradient. (`contiguous()` would not suffice,
            # since 1 x 1 frames count as contiguous in both formats.)
            frames = frames.flatten(1).view(frames.shape)
        gate_and_candidate = self.gate_hidden(self.norm(frames)).unflatten(0, [x.shape[0], x.shape[1]])
        if self.aligns_residual:
            x = self.res_align(frames).unflatten(0, [x.shape[0], x.shape[1]])
        return gate_and_candidate, x

    def forward(
        self, x: Tensor, h: Tensor, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C, H, W), h (B, 1, D, H_out, W_out) -> states, last state, residual branch."""
        gate_and_candidate, skip = self.project(x)
        states, last_state = _scan(gate_and_candidate, h, mask, reset)
        return states, last_state, skip


class MinConv2dGRU(_Stack):
    """A stack of convolutional MinGRU layers over the frames of clips: layer i + 1 reads the outputs of layer i.

    Args:
        input_size: channels of the frames.
        hidden_sizes: channels of each layer's state; an int means a single layer.
        kernel_sizes, strides, paddings: of the convolutions, in pixels: an int for all layers, or a list with one
            entry per layer, which is an int or (height, width).
        dropout: probability of zeroing an output of every layer except the last, in training.
        residual: add each layer's input to its output; where their channels or frame sizes differ, through a
            convolution without bias that has the layer's kernel, stride and padding.
        bias: whether the gates' convolutions have biases.
        norm: normalise each layer's input with a GroupNorm: the largest of 64, 32, 16, 8, 4 and 1 groups that
            divides the channels and leaves at least 4 (or all) of them in a group.
        device, dtype: of the parameters.

    Raises:
        ValueError: if a size is below 1, a list does not fit the number of layers or dropout is not a probability.

    Example:
        >>> rnn = MinConv2dGRU(3, [16, 32], kernel_sizes=3, strides=2, paddings=1, residual=True)
        >>> out, h = rnn(torch.randn(5, 10, 3, 64, 64))
        >>> out.shape  # and h holds (5, 1, 16, 32, 32) and (5, 1, 32, 16, 16)
        torch.Size([5, 10, 32, 16, 16])
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: int | list[int],
        kernel_sizes: int | list[int] | list[tuple[int, int]],
        *,
        strides: int | list[int] | list[tuple[int, int]] = 1,
        paddings: int | list[int] | list[tuple[int, int]] = 0,
        dropout: float = 0.0,
        residual: bool = False,
        bias: bool = True,
        norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = _layer_sizes(input_size, hidden_sizes)
        factory = {"device": device, "dtype": dtype}
        geometry = {"kernel_sizes": kernel_sizes, "strides": strides, "paddings": paddings}
        of_layers = [_per_layer(name, value, len(sizes) - 1) for name, value in geometry.items()]
        layers = (
            MinConv2dGRULayer(*io, *geometry, bias, norm, residual, factory)
            for io, *geometry in zip(pairwise(sizes), *of_layers, strict=True)
        )
        super().__init__(sizes, layers, dropout, residual, pixels=", H, W")


def _newly_drawn(rnn: nn.Module) -> nn.Module:
    """Return a copy of a layer or stack with newly initialised weights, all of them trainable."""
    if isinstance(rnn, torch.jit.ScriptModule):
        raise ValueError(
            "A scripted layer cannot be initialised again: create the Bidirectional first, then script it."
        )
    for child in rnn.modules():
        # Hooks that compute the weight (the older weight_norm and spectral_norm, prune) set it as an attribute.
        if is_parametrized(child) or isinstance(vars(child).get("weight"), Tensor):
            raise ValueError(
                "The wrapped layers have parametrizations (weight_norm or the like), and parametrized weights cannot "
                "be initialised again: create the Bidirectional first, then register them on it."
            )
    fresh = copy.deepcopy(rnn)
    for child in fresh.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
    return fresh.requires_grad_()


class Bidirectional(nn.Module):
    """Run a MinGRU layer or stack, convolutional or not, over time in both directions and concatenate the outputs.

    As in `nn.GRU(bidirectional=True)`, the backward direction has its own weights and its outputs are aligned in time:
    out[:, t] holds the forward output for steps 0..t and the backward output for steps t..T-1. Unlike in `nn.GRU`, a
    stack runs as a whole in each direction; its layers do not mix directions.

    Args:
        rnn: a layer or stack of this package, called as rnn(x, h, mask, reset). It becomes the forward direction; the
            backward direction is a copy with newly initialised weights, so apply `spread_memory_` and
            parametrizations, and freeze weights, after wrapping.
        shared_weights: use one set of weights for both directions, as torch-mingru does.
        aligned: put the backward outputs in time order. False leaves them in processing order, as torch-mingru does
            and as heads trained on its outputs expect.

    Raises:
        ValueError: if rnn is not a layer or stack of this package, or if it is scripted or its weights are
            parametrized, unless both directions share the weights.

    Example:
        >>> rnn = Bidirectional(MinGRU(3, [32, 64]))
        >>> out, h = rnn(torch.randn(10, 128, 3))  # (10, 128, 128), 4 states: forward, then backward
    """

    layer_sizes: list[int]
    shared_weights: torch.jit.Final[bool]  # a constant, so that TorchScript compiles only the branch taken

    def __init__(self, rnn: nn.Module, *, shared_weights: bool = False, aligned: bool = True) -> None:
        super().__init__()
        if not hasattr(rnn, "init_hidden_state") or isinstance(rnn, Bidirectional):
            raise ValueError(
                f"Bidirectional wraps a recurrent layer or stack of this package, got {type(rnn).__name__}."
            )
        self.rnn = rnn
        self.layer_sizes = list(rnn.layer_sizes)
        self.num_layers = rnn.num_layers
        self.aligned = aligned
        self.shared_weights = shared_weights
        self.backward_rnn = nn.Identity() if shared_weights else _newly_drawn(rnn)

    def forward(
        self, x: Tensor, h: list[Tensor] | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run over x (B, T, input_size, *); h lists the forward direction's states, then the backward direction's.

        `mask` (B, T) is False at padding, `reset` (B, T) is True where a sequence starts; both are boolean.
        The backward direction reads a sequence from its last step, so it resets the state there.

        Returns:
            Outputs (B, T, 2 * hidden, *), forward channels first, and the final states of both directions.

        Raises:
            ValueError: if x, h, mask or reset does not fit.
        """
        h_forward: list[Tensor] | None = None
        h_backward: list[Tensor] | None = None
        if h is not None:
            if len(h) != 2 * self.num_layers:
                raise ValueError(
                    f"h must hold {2 * self.num_layers} states, one per layer and direction, got {len(h)}."
                )
            h_forward, h_backward = h[: self.num_layers], h[self.num_layers :]
        out_forward, h_forward_last = self.rnn(x, h_forward, mask, reset)
        x = x.flip(1)
        if reset is not None:
            if mask is not None:  # padding before the first sequence keeps that sequence's final state
                reset = reset.logical_and(mask.cumsum(1) > mask.to(torch.long))
            # The last step of a sequence is the one before the next sequence's first.
            reset = torch.cat([torch.zeros_like(reset[:, :1]), reset[:, 1:].flip(1)], dim=1)
        if mask is not None:
            mask = mask.flip(1)
        if self.shared_weights:
            out_backward, h_backward_last = self.rnn(x, h_backward, mask, reset)
        else:
            out_backward, h_backward_last = self.backward_rnn(x, h_backward, mask, reset)
        if self.aligned:
            out_backward = out_backward.flip(1)
        return torch.cat([out_forward, out_backward], dim=2), h_forward_last + h_backward_last

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Return the default states for a batch like x: the forward direction's, then the backward direction's."""
        return self.rnn.init_hidden_state(x) + self.rnn.init_hidden_state(x)


_Module = TypeVar("_Module", bound=nn.Module)


def spread_memory_(module: _Module, num_steps: float) -> _Module:
    """Reinitialise, in place, the biases of all MinGRU layers in a module: a variant of chrono initialization.

    Each channel then starts with its own memory of 1 to `num_steps` steps (see `draw_memory_` in scan.py for the
    source). With the default initialisation, layers forget within a few steps and learn longer memories slowly. For
    the text models use `MinGRUConfig.initial_memory`.

    Args:
        module: a layer, a stack, or any module that contains some.
        num_steps: the longest memory, in time steps; at least 1.

    Returns:
        The module.

    Raises:
        ValueError: if num_steps is below 1 or not finite, if no layer is found, or if a layer's bias is missing or
            computed from something else (a parametrization, an adapter).

    Example:
        >>> rnn = spread_memory_(MinGRU(3, [32, 64]), 1024)
    """
    if not 1 <= num_steps < float("inf"):
        raise ValueError(f"num_steps must be finite and at least 1, got {num_steps}.")
    found = [getattr(child, "gate_hidden", getattr(child, "to_gate_hidden", None)) for child in module.modules()]
    projections = [projection for projection in found if projection is not None]
    if not projections:
        raise ValueError(f"{type(module).__name__} contains no MinGRU layer: pass a model or layer that does.")
    if not all(isinstance(getattr(projection, "bias", None), nn.Parameter) for projection in projections):
        raise ValueError(
            "Memory is set through the gates' biases, but a layer's bias is missing or computed from something else: "
            "build the layers with bias=True, and call this before pruning, parametrizing, wrapping or quantizing "
            "them."
        )
    with torch.no_grad():
        for projection in projections:
            draw_memory_(projection.bias, num_steps)
            projection.bias._is_hf_initialized = True  # else the post_init() of an enclosing model zeroes it
    return module


__all__ = ["Bidirectional", "MinConv2dGRU", "MinConv2dGRUCell", "MinGRU", "MinGRUCell", "spread_memory_"]
