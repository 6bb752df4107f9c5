"""The recurrent state as a layer of transformers' own caches.

Importing this file makes `DynamicCache(config=model.config)` build `MinGRUCacheLayer`s for a MinGRU model, and
`StaticCache` build `MinGRUStaticCacheLayer`s, whose tensors keep their addresses. A layer holds a state of fixed size
but supports what an attention layer's cache does. It counts tokens, so generate() can slice prompts, continue over
several turns and prefill in chunks. After `activate_past_recording()` it keeps the last states, so `crop` rolls back
exactly. transformers' linear attention layers cannot be rolled back, so this layer is not based on them.

Legend: B batch, R recorded steps, D channels of the state, W the convolution's window (taps - 1), E its channels.
"""

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from .scan_reference import initial_state


class MinGRUCacheLayer(CacheLayerMixin):
    """The state of one MinGRU block after the tokens seen so far; its memory does not grow with their number.

    Attributes:
        states: (B, R, D) float32 (float64 for float64 models), the state after each of the last R steps, oldest
            first; None before the first step. R is 1 unless the past is recorded.
        windows: (B, R, W, E) last inputs of the convolution after each of those steps; None without a convolution.
        seq_length: number of steps (tokens, including padding) up to the newest state.
    """

    _layer_type = "mingru"
    is_croppable = True
    supports_early_init = False
    # Minimum number of states to keep while recording, over several calls if necessary: an assistant model drafts each
    # token in a call of its own before some of the tokens are undone.
    min_recorded_steps = 256

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.states: Tensor | None = None
        self.windows: Tensor | None = None
        self.seq_length = 0
        self._record_past = False

    @property
    def record_past(self) -> bool:
        """Whether to keep more than the newest state. Setting it to False discards the older states."""
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
        """As `state`, but as a tensor that autograd can save for the backward pass."""
        state = self.state
        if state is None or not torch.is_grad_enabled():
            return state
        # A static layer overwrites its state before the backward pass, and autograd cannot save inference tensors.
        return state.clone() if self.is_compileable or state.is_inference() else state

    @property
    def batch_size(self) -> int:
        """Number of rows; -1 before the first step."""
        return -1 if self.states is None else self.states.shape[0]

    def num_to_record(self, requested: int | None, num_steps: int) -> int:
        """Return how many of `num_steps` states to pass to `append` so that `requested` (None: all) can be cropped."""
        if not self._record_past:
            return 1
        # One more than may be cropped: the state to return to.
        return num_steps if requested is None else min(num_steps, max(requested + 1, self.min_recorded_steps))

    def append(self, states: Tensor, windows: Tensor | None, num_steps: int) -> None:
        """Store the states after the last R of the `num_steps` steps just run.

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
        # Copy slices: a slice would keep the states of the whole forward pass in memory.
        self.states = states if complete else states.clone()
        self.windows = None if windows is None else windows.clone()
        self.seq_length += num_steps
        self.is_initialized = True

    def snapshot(self) -> tuple:
        """Return what `restore` needs to undo later steps; valid until the tensors are written to."""
        return self.states, self.windows, self.seq_length, self.is_initialized

    def restore(self, snapshot: tuple) -> None:
        """Undo all steps since `snapshot()`, after one of them raised an exception."""
        self.states, self.windows, self.seq_length, self.is_initialized = snapshot

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first step provides the state."""

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
        """Return the number of tokens seen, with padding; in a static layer a tensor () from the first call on."""
        return self.seq_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of the mask over the tokens seen and the `query_length` new ones."""
        return self.seq_length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def activate_past_recording(self) -> None:
        """Start keeping past states, so that `crop` can return to them.

        The layer then keeps the state before the last call and the state after each of its steps, or fewer if its
        `num_recorded` asked for fewer, but at least the states after the last `min_recorded_steps` steps. A long
        prompt therefore costs the memory of the states of all its tokens; with `logits_to_keep=1`, as in generate(),
        it costs that of `min_recorded_steps` states.
        """
        self.record_past = True

    def _forget_past(self) -> None:
        self._map(lambda tensor: tensor[:, -1:].clone())

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last -tokens_to_remove steps; 0 changes nothing.

        Args:
            tokens_to_remove: minus the number of steps to undo, as transformers passes it.

        Raises:
            ValueError: if the argument is positive or the state to return to is no longer held.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "crop() of a recurrent cache expects the number of tokens to remove as a negative number, got "
                f"{tokens_to_remove}."
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
                advice = "The cache has not seen that many steps."
            elif self._record_past and recorded >= self.min_recorded_steps:
                advice = "Raise min_recorded_steps on each of cache.layers before running the steps to be taken back."
            raise ValueError(
                f"Cannot take back {steps} of {self.seq_length} steps: only the states after the last {recorded} are "
                f"kept. {advice}"
            )
        self.states = self.states[:, :-steps]
        if self.windows is not None:
            self.windows = self.windows[:, :-steps]
        self.seq_length -= steps

    def reset(self) -> None:
        """Forget all steps: the next one starts from g(0) = 0.5."""
        self.states, self.windows, self.seq_length, self.is_initialized = None, None, 0, False

    def detach_(self) -> None:
        """Detach the state from the autograd graph, between segments of truncated backpropagation through time."""
        self._map(Tensor.detach)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace each row i by row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Do nothing: a state is as small as the hidden states of one token."""

    def prefetch(self) -> None:
        """Do nothing: `offload` moves nothing."""

    def _map(self, function) -> None:
        if self.states is not None:
            self.states = function(self.states)
        if self.windows is not None:
            self.windows = function(self.windows)


class MinGRUStaticCacheLayer(MinGRUCacheLayer):
    """A MinGRUCacheLayer whose tensors keep their addresses, for compiled decoding steps and CUDA graphs.

    The first call creates the tensors; later calls copy into them. The number of tokens is a tensor too, so that
    counting does not cause recompilation. While the past is recorded, the layer behaves like `MinGRUCacheLayer`.

    Args:
        max_cache_len: ignored, since the state has the same size for any number of tokens.
    """

    _layer_type = None  # set below the class: set here, it would replace the dynamic layer's entry

    def __init__(self, max_cache_len: int | None = None, **kwargs) -> None:
        super().__init__()

    @property
    def is_compileable(self) -> bool:
        """Whether the tensors keep their addresses, which they do unless the past is recorded."""
        return not self.record_past

    def append(self, states: Tensor, windows: Tensor | None, num_steps: int) -> None:
        """As in MinGRUCacheLayer, but copy into the tensors that the first call created."""
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
        """As in MinGRUCacheLayer, but the tensors keep their addresses."""
        fields, copies = snapshot
        super().restore(fields)
        for tensor, copy in copies:
            # Outside inference mode, a write to an inference tensor takes place, but torch then raises an error.
            with torch.inference_mode(torch.is_inference_mode_enabled() or tensor.is_inference()):
                tensor.copy_(copy)

    def _settle(self, states: Tensor, windows: Tensor | None) -> None:
        """Adopt tensors that keep their addresses from now on, and count tokens in a tensor."""
        self.states, self.windows, self.is_initialized = states, windows, True
        self.seq_length = torch.full((), int(self.seq_length), dtype=torch.long, device=states.device)
        if not torch.compiler.is_compiling():  # if these mutated inputs are not marked, inductor skips CUDA graphs
            for tensor in (self.states, self.windows, self.seq_length):
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    def _forget_past(self) -> None:
        self.detach_()
        super()._forget_past()
        if self.states is not None:
            self._settle(self.states, self.windows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order; if their number is unchanged, the tensors keep their addresses."""

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
    """Replace, in place, layers that another copy of this file created.

    Checkpoints that carry their own code share transformers' table of cache layers. All of them get the layers of the
    copy that was imported last, which may be another version.

    Args:
        layers: the layers of a cache.

    Raises:
        ValueError: if a layer of another copy holds a state.
    """
    for index, layer in enumerate(layers):
        name = getattr(layer, "_layer_type", None)
        if name != MinGRUCacheLayer._layer_type or isinstance(layer, MinGRUCacheLayer):
            continue
        if layer.get_seq_length() > 0:
            raise ValueError(
                "cache was filled by a MinGRU model that runs another copy of this code: run the tokens through this "
                "model instead."
            )
        is_static = type(layer).__name__ == MinGRUStaticCacheLayer.__name__
        layers[index] = MinGRUStaticCacheLayer() if is_static else MinGRUCacheLayer()
        layers[index].record_past = layer.record_past
        layers[index].min_recorded_steps = layer.min_recorded_steps


MinGRUStaticCacheLayer._layer_type = MinGRUCacheLayer._layer_type
STATIC_LAYER_TYPE_MAPPING[MinGRUCacheLayer._layer_type] = MinGRUStaticCacheLayer


__all__ = ["MinGRUCacheLayer", "MinGRUStaticCacheLayer", "adopt_layers"]
