"""The recurrent state as a layer of transformers' own caches.

Importing this file makes `DynamicCache(config=model.config)` build `MinGRUCacheLayer`s for a MinGRU model, and
`StaticCache` their twins in fixed memory. A layer holds a state of fixed size, and yet does what an attention layer's
cache does: it counts tokens, so generate() can slice prompts, continue over turns and prefill in pieces, and with
`activate_past_recording()` it keeps the last states, so that `crop` rolls back exactly. That is why it is none of
transformers' linear attention layers, which cannot go back.

Legend: B batch, R recorded steps, D channels of the state, W the convolution's window (taps - 1), E its channels.
"""

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from .scan_reference import initial_state


class MinGRUCacheLayer(CacheLayerMixin):
    """The state of one MinGRU block after the tokens seen so far; memory does not grow with their number.

    Attributes:
        states: (B, R, D) float32 (float64 for float64 models), the state after each of the last R steps, oldest
            first; None before the first step. R is 1 unless the past is recorded.
        windows: (B, R, W, E) last inputs of the convolution in front, after each of those steps; None without one.
        seq_length: steps (tokens, padding included) that led to the newest state.
    """

    _layer_type = "mingru"
    is_croppable = True
    supports_early_init = False
    # States kept at least while recording, over several calls if need be: an assistant model drafts its tokens in one
    # call each before some of them are taken back.
    min_recorded_steps = 256

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.states: Tensor | None = None
        self.windows: Tensor | None = None
        self.seq_length = 0
        self._record_past = False

    @property
    def record_past(self) -> bool:
        """Whether to keep more than the newest state; set to False, the others are forgotten."""
        return self._record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        was_recorded, self._record_past = self._record_past, value
        if was_recorded and not value:
            self._forget_past()

    @property
    def state(self) -> Tensor | None:
        """(B, 1, D) newest state, None before the first step."""
        states = self.states
        return states if states is None or states.shape[1] == 1 else states[:, -1:]

    @property
    def window(self) -> Tensor | None:
        """(B, W, E) newest window of the convolution, None before the first step or without a convolution."""
        return None if self.windows is None else self.windows[:, -1]

    def starting_state(self) -> Tensor | None:
        """As `state`, for a step that may save it for its backward pass."""
        state = self.state
        if state is None or not torch.is_grad_enabled():
            return state
        # A static one is written to before the backward pass, and autograd saves none that inference_mode() has made.
        return state.clone() if self.is_compileable or state.is_inference() else state

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first step."""
        return -1 if self.states is None else self.states.shape[0]

    def num_to_record(self, requested: int | None, num_steps: int) -> int:
        """How many states of a call of `num_steps` steps to hand to `append`, if `requested` may be cropped."""
        if not self._record_past:
            return 1
        # One more than may be cropped: the state to go back to.
        return num_steps if requested is None else min(num_steps, max(requested + 1, self.min_recorded_steps))

    def append(self, states: Tensor, windows: Tensor | None, num_steps: int) -> None:
        """Take over the states after the last R of `num_steps` steps just run.

        Args:
            states: (B, R, D) states, 1 <= R <= num_steps.
            windows: (B, R, W, E) windows of the convolution after the same steps, or None.
            num_steps: tokens of this call, padding included.
        """
        complete = states.shape[1] == num_steps
        if self._record_past and self.states is not None and complete:  # no gap between the old states and the new
            limit = max(self.min_recorded_steps, num_steps + 1)
            states = torch.cat([self.states, states], dim=1)[:, -limit:]
            windows = None if windows is None else torch.cat([self.windows, windows], dim=1)[:, -limit:]
        # Copies where these are slices: a slice would keep the states of the whole forward pass in memory.
        self.states = states if complete else states.clone()
        self.windows = None if windows is None else windows.clone()
        self.seq_length += num_steps
        self.is_initialized = True

    def snapshot(self) -> tuple:
        """What `restore` goes back to; it holds until the tensors are written to."""
        return self.states, self.windows, self.seq_length, self.is_initialized

    def restore(self, snapshot: tuple) -> None:
        """Take back all steps since `snapshot()`, after an exception among them."""
        self.states, self.windows, self.seq_length, self.is_initialized = snapshot

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first step brings its state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Refuse keys and values: this layer belongs to a MinGRU block.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "This cache was built for a MinGRU model and holds recurrent states, not keys and values; build the "
            "cache from the configuration of the model you pass it to."
        )

    def get_seq_length(self) -> int | Tensor:
        """Tokens seen, padding included; from the first call on a tensor () where the memory is static."""
        return self.seq_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask over the tokens seen and the `query_length` new ones."""
        return self.seq_length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def activate_past_recording(self) -> None:
        """From now on keep past states too, so that `crop` can go back to them.

        These are the state before the last call and those after each of its steps, unless its `num_recorded` asked for
        fewer, and at least those after the last `min_recorded_steps` steps. So a long prompt costs as much memory as
        the states of all its tokens; with `logits_to_keep=1`, as in generate(), that of `min_recorded_steps`.
        """
        self.record_past = True

    def _forget_past(self) -> None:
        self._map(lambda tensor: tensor[:, -1:].clone())

    def crop(self, tokens_to_remove: int) -> None:
        """Go back by -tokens_to_remove steps; 0 changes nothing.

        Args:
            tokens_to_remove: minus the number of steps to take back, as transformers passes it.

        Raises:
            ValueError: if the argument is positive or the states of that time are no longer held.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"A recurrent cache is cropped by minus the number of tokens to remove, got {tokens_to_remove}."
            )
        steps = -tokens_to_remove
        if steps == 0:
            return
        if steps == self.seq_length:
            self.reset()
            return
        recorded = 0 if self.states is None else self.states.shape[1]
        if steps >= recorded:
            advice = "Call cache.activate_past_recording() before running the steps to be taken back."
            if steps > self.seq_length:
                advice = "No more steps have been run."
            elif self._record_past and recorded >= self.min_recorded_steps:
                advice = "Raise min_recorded_steps of each of cache.layers before running the steps to be taken back."
            raise ValueError(
                f"Cannot take back {steps} of {self.seq_length} steps: the states after the last {recorded} are held. "
                f"{advice}"
            )
        self.states = self.states[:, :-steps]
        if self.windows is not None:
            self.windows = self.windows[:, :-steps]
        self.seq_length -= steps

    def reset(self) -> None:
        """Forget all steps: the next one starts from g(0) = 0.5."""
        self.states, self.windows, self.seq_length, self.is_initialized = None, None, 0, False

    def detach_(self) -> None:
        """Cut the state off from the graph behind it, between the pieces of truncated backpropagation through time."""
        self._map(Tensor.detach)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row beam_idx[i] for row i."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Nothing to move: a state is as small as the hidden states of one token."""

    def prefetch(self) -> None:
        """Nothing to move back."""

    def _map(self, function) -> None:
        if self.states is not None:
            self.states = function(self.states)
        if self.windows is not None:
            self.windows = function(self.windows)


class MinGRUStaticCacheLayer(MinGRUCacheLayer):
    """The same in tensors that stay where they are, for compiled decoding steps and CUDA graphs.

    The first call makes the tensors; later ones copy into them. The number of tokens is a tensor too, so that counting
    does not compile anew. While the past is recorded the layer is as dynamic as its twin.

    Args:
        max_cache_len: not needed, since the state has one size for any number of tokens.
    """

    _layer_type = None  # set below: at this place it would take the dynamic layer's entry

    def __init__(self, max_cache_len: int | None = None, **kwargs) -> None:
        super().__init__()

    @property
    def is_compileable(self) -> bool:
        """Whether the tensors have a fixed place, which they have unless the past is recorded."""
        return not self.record_past

    def append(self, states: Tensor, windows: Tensor | None, num_steps: int) -> None:
        """As in MinGRUCacheLayer, into the tensors made by the first call."""
        if self.record_past:
            super().append(states, windows, num_steps)
            return
        states, windows = states[:, -1:], None if windows is None else windows[:, -1:]
        if not torch.is_tensor(self.seq_length):  # the first call, or the first after the past was recorded
            self._settle(states.detach().clone(), None if windows is None else windows.detach().clone())
        else:
            self.states.copy_(states.detach())
            if windows is not None:
                self.windows.copy_(windows.detach())
        self.seq_length += num_steps

    def snapshot(self) -> tuple:
        """As in MinGRUCacheLayer, with copies of the tensors that the next steps write to."""
        fixed = [t for t in (self.states, self.windows, self.seq_length) if torch.is_tensor(t)]
        return super().snapshot(), [(tensor, tensor.clone()) for tensor in fixed]

    def restore(self, snapshot: tuple) -> None:
        """As in MinGRUCacheLayer; the tensors stay where they are."""
        fields, copies = snapshot
        super().restore(fields)
        for tensor, copy in copies:
            # Outside inference mode torch writes to tensors made in it, and refuses afterwards.
            with torch.inference_mode(torch.is_inference_mode_enabled() or tensor.is_inference()):
                tensor.copy_(copy)

    def _settle(self, states: Tensor, windows: Tensor | None) -> None:
        """Take tensors which stay where they are from now on, and count in one."""
        self.states, self.windows, self.is_initialized = states, windows, True
        self.seq_length = torch.full((), int(self.seq_length), dtype=torch.long, device=states.device)
        if not torch.compiler.is_compiling():  # else inductor leaves CUDA graphs out, since these are written to
            for tensor in (self.states, self.windows, self.seq_length):
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    def _forget_past(self) -> None:
        self.detach_()
        super()._forget_past()
        if self.states is not None:
            self._settle(self.states, self.windows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order; as many rows stay where they are."""

        def select(tensor: Tensor) -> Tensor:
            selected = tensor[indices.to(tensor.device)]
            return selected if self.record_past or selected.shape != tensor.shape else tensor.copy_(selected)

        self._map(select)

    def reset(self) -> None:
        """Forget all steps, keeping the tensors: the next step starts from g(0) = 0.5."""
        if self.record_past or not torch.is_tensor(self.seq_length):
            super().reset()
            return
        self.states.copy_(initial_state(self.states, self.states.shape))
        if self.windows is not None:
            self.windows.zero_()
        self.seq_length.zero_()


def adopt_layers(layers: list[CacheLayerMixin]) -> None:
    """Replace layers that another copy of this file made, in place.

    Checkpoints with code of their own share transformers' table of layers, where the last one imported is found by
    all; its layers need not be of the same version.

    Args:
        layers: of a cache.

    Raises:
        ValueError: if a layer of another copy holds a state.
    """
    for index, layer in enumerate(layers):
        name = getattr(layer, "_layer_type", None)
        if name != MinGRUCacheLayer._layer_type or isinstance(layer, MinGRUCacheLayer):
            continue
        if layer.get_seq_length() > 0:
            raise ValueError(
                "cache was filled by a MinGRU model whose code is another copy than this model's: run the tokens "
                "through this model instead."
            )
        is_static = type(layer).__name__ == MinGRUStaticCacheLayer.__name__
        layers[index] = MinGRUStaticCacheLayer() if is_static else MinGRUCacheLayer()
        layers[index].record_past = layer.record_past
        layers[index].min_recorded_steps = layer.min_recorded_steps


MinGRUStaticCacheLayer._layer_type = MinGRUCacheLayer._layer_type
STATIC_LAYER_TYPE_MAPPING[MinGRUCacheLayer._layer_type] = MinGRUStaticCacheLayer


__all__ = ["MinGRUCacheLayer", "MinGRUStaticCacheLayer", "adopt_layers"]
