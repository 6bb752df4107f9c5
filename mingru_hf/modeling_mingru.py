"""The MinGRU text model, in this order: convolution, recurrence, block, model, heads.

Source: Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201.

Legend: B batch, T tokens, E width of a block's input, D of its state, F of its output, V vocabulary,
K taps of the convolution, R steps whose state the cache records.
"""

from collections.abc import Callable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, StoppingCriteriaList
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .cache_mingru import MinGRUCacheLayer, adopt_layers
from .calling import calls_directly, choose_call, direct_call, direct_output, is_plain, module_call, plain_linear
from .configuration_mingru import MinGRUConfig
from .linear import linear
from .loading import LoadingMixin, refuse_unknown, restores_cache
from .losses import check_class_ids, classification_loss, head_loss
from .observers import in_transform
from .scan import adds_bias, draw_memory_, mingru_scan, mingru_step, requested_backend


def _norm(config: MinGRUConfig, size: int, bias: bool) -> nn.Module:
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(size, eps=config.norm_eps, bias=bias)
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(size, eps=config.norm_eps)
    return nn.Identity()


# Arguments by which transformers' collators describe the documents in packed rows, besides position_ids.
_PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@calls_directly
class _Taps(nn.Conv1d):
    """Depthwise convolution that reads its weights only in its own `forward`, for which offloading hooks load them.

    Args:
        size: channels E.
        kernel_size: taps K.
        bias: whether it has a bias.
        scale: factor on PyTorch's default bound for new weights.
    """

    def __init__(self, size: int, kernel_size: int, bias: bool, scale: float):
        super().__init__(size, size, kernel_size, groups=size, bias=bias)
        self.initial_bound = scale / kernel_size**0.5

    def forward(self, padded: Tensor, document: Tensor | None = None) -> Tensor:
        """Convolve padded (B, K - 1 + T, E) to (B, T, E).

        `document` (B, K - 1 + T) holds the number of each step's document; None if all steps are of one document.
        """
        taps = self.kernel_size[0]
        steps = padded.shape[1] - taps + 1
        if document is None and steps > 1:
            return super().forward(padded.transpose(1, 2)).transpose(1, 2)
        weight, bias = self.weight[:, 0].t(), 0.0 if self.bias is None else self.bias  # (K, E), (E)
        if document is None:  # a sum of products is ten times faster than the convolution operator
            return (padded * weight).sum(1, keepdim=True) + bias
        out = padded[:, taps - 1 :] * weight[-1] + bias  # the current token, always in its own document
        for tap in range(taps - 1):
            same = (document[:, tap : tap + steps] == document[:, taps - 1 :]).unsqueeze(-1)
            # Multiply inside `where`: autograd then saves slices of `padded` instead of a tensor of that size per tap.
            out = out + torch.where(same, padded[:, tap : tap + steps] * weight[tap], 0.0)
        return out


@calls_directly
class MinGRUConv(nn.Module):
    """Causal depthwise convolution over the last K real tokens of the same document, skipping padding."""

    def __init__(self, size: int, kernel_size: int, bias: bool, scale: float = 1.0):
        super().__init__()
        self.kernel_size = kernel_size  # kept here too, since an adapter may replace `conv`
        self.conv = _Taps(size, kernel_size, bias, scale)

    def forward(
        self,
        x: Tensor,
        window: Tensor | None,
        mask: Tensor | None,
        reset: Tensor | None,
        num_recorded: int,
        call: Callable = module_call,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve x (B, T, E), preceded by the inputs in `window`.

        Args:
            x: (B, T, E) inputs.
            window: (B, K - 1, E) inputs before x, zeros where there were none; None means all zeros.
            mask: (B, T) False where a token is to be skipped; None if all are real.
            reset: (B, T) True where a document starts; inputs before it are ignored.
            num_recorded: R, the number of steps at the end after each of which the window is returned; 0 for none.
            call: function to call submodules with, `call(module, *args)`.

        Returns:
            (B, T, E) outputs, undefined at masked tokens, and (B, R, K - 1, E) windows or None.
        """
        steps = x.shape[1]
        taps = self.kernel_size
        if window is not None and window.shape[1:] != (taps - 1, x.shape[2]):
            raise ValueError(
                f"cache holds a window of {tuple(window.shape[1:])} (taps - 1, channels), but this model needs "
                f"{(taps - 1, x.shape[2])}: it belongs to another model."
            )
        if mask is not None:  # move real tokens to the front, in order, so that they are adjacent
            num_real = mask.cumsum(1)  # (B, T)
            positions = torch.where(mask, num_real, num_real[:, -1:] + (~mask).cumsum(1)) - 1
            tokens = torch.arange(steps, device=x.device).expand_as(positions)
            # Equivalent to a stable argsort, which ONNX does not have.
            order = torch.empty_like(positions).scatter(1, positions, tokens)
            x = x.gather(1, order.unsqueeze(-1).expand_as(x))
            reset = None if reset is None else reset.gather(1, order)
        if window is None:
            padded = F.pad(x, (0, 0, taps - 1, 0))
        else:
            padded = torch.cat([window.to(x.dtype), x], dim=1)  # (B, K - 1 + T, E)

        document = None
        if reset is not None:
            document = F.pad(reset.cumsum(1), (taps - 1, 0))  # (B, K - 1 + T), 0 for the inputs before
        out = call(self.conv, padded, document)

        windows = None
        if num_recorded:
            windows = self._windows(padded, None if mask is None else num_real, document, num_recorded)
        if mask is not None:  # move outputs back to the tokens' positions
            rank = (num_real - 1).clamp(min=0)
            out = out.gather(1, rank.unsqueeze(-1).expand_as(out))
        return out, windows

    def _windows(self, padded: Tensor, num_real: Tensor | None, document: Tensor | None, num_recorded: int) -> Tensor:
        """Return (B, R, K - 1, E): the document's last K - 1 real inputs after each of the last R steps.

        `num_real` (B, T) counts the real tokens up to each step; None if all tokens are real.
        """
        length = self.kernel_size - 1
        if num_real is None and document is None:
            return padded.unfold(1, length, 1)[:, -num_recorded:].transpose(2, 3)
        batch, steps = padded.shape[0], padded.shape[1] - length
        if num_real is None:
            num_real = torch.arange(1, steps + 1, device=padded.device).expand(batch, steps)
        seen = num_real[:, -num_recorded:]
        columns = seen.unsqueeze(-1) + torch.arange(length, device=padded.device)  # (B, R, K - 1)
        rows = torch.arange(batch, device=padded.device)[:, None, None]
        windows = padded[rows, columns]
        if document is not None:
            current = document.gather(1, seen + length - 1).unsqueeze(-1)  # the document after the step
            windows = torch.where((document[rows, columns] == current).unsqueeze(-1), windows, 0.0)
        return windows


@calls_directly
class MinGRUMixer(nn.Module):
    """The recurrence of a block: project to gate and candidate, scan over time, project back."""

    def __init__(self, config: MinGRUConfig, input_size: int, output_size: int):
        super().__init__()
        state_size = int(config.expand * output_size)
        self.gate_hidden = nn.Linear(input_size, 2 * state_size, bias=config.use_bias)
        # Set on the linear map, not on the mixer: in models that are not part of transformers, _init_weights is called
        # only for modules that have parameters of their own.
        self.gate_hidden.initial_memory = config.initial_memory
        self.register_module("out_proj", None)
        if config.use_out_proj:
            self.out_proj = nn.Linear(state_size, output_size, bias=config.use_bias)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None,
        mask: Tensor | None,
        reset: Tensor | None,
        num_recorded: int,
        backend: str,
        call: Callable = module_call,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence over x (B, T, E) from state (B, 1, D).

        Returns:
            (B, T, F) outputs, and the last R = `num_recorded` states (B, R, D) in at least float32 (one if R = 0).
        """
        modules = self._modules
        gate_hidden, out_proj = modules["gate_hidden"], modules["out_proj"]
        parameters = plain_linear(gate_hidden) if adds_bias(backend, x) else None
        if parameters is None:
            gate_and_candidate, bias = call(gate_hidden, x), None  # (B, T, 2D)
        else:  # the scan adds the bias, which saves a pass over (B, T, 2D)
            weight, bias = parameters
            gate_and_candidate = linear(x, weight)
        width = gate_and_candidate.shape[-1]
        if width != getattr(gate_hidden, "out_features", width):
            raise ValueError(
                f"gate_hidden returned {width} of its {gate_hidden.out_features} channels, the first half of which "
                "are gates. If the layer is split over processes, gather its output (colwise_gather_output)."
            )
        # Without out_proj, the state enters the residual sum directly and takes the dtype of x, even under autocast.
        out_dtype = x.dtype if out_proj is None else gate_and_candidate.dtype
        # The cache holds the unrounded state even if out_dtype has 16 bits, so that decoding continues exactly.
        wide_dtype = torch.promote_types(out_dtype, torch.float32)
        if call is direct_call and mask is None and reset is None and x.shape[1] == 1:
            recorded = mingru_step(gate_and_candidate, state, bias=bias, backend=backend, dtype=wide_dtype)
            out = recorded if out_dtype == wide_dtype else recorded.to(out_dtype)
        else:
            many = num_recorded > 1
            out, recorded = mingru_scan(
                gate_and_candidate,
                state,
                mask,
                reset,
                bias=bias,
                backend=backend,
                dtype=wide_dtype if many else out_dtype,
                return_last_state=True,
            )
            if many:
                recorded, out = out[:, -num_recorded:], out.to(out_dtype)
        if out_proj is not None:
            out = call(out_proj, out)
        return out, recorded


@calls_directly
class MinGRUMLP(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, config: MinGRUConfig, size: int):
        super().__init__()
        intermediate_size = config.intermediate_size or 4 * size
        self.up_proj = nn.Linear(size, intermediate_size, bias=config.use_bias)
        self.down_proj = nn.Linear(intermediate_size, size, bias=config.use_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, call: Callable = module_call) -> Tensor:
        return call(self.down_proj, self.act_fn(call(self.up_proj, x)))


@calls_directly
class MinGRUBlock(GradientCheckpointingLayer):
    """[x + conv(x)] -> x + out_proj(mingru(norm(x))) -> [x + mlp(norm(x))]"""

    def __init__(self, config: MinGRUConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        sizes = [config.hidden_size, *config.block_sizes]
        input_size, output_size = sizes[layer_idx], sizes[layer_idx + 1]
        self.residual = config.residual
        self.register_module("conv", None)
        if config.conv_kernel:
            # conv(x) is added without a norm: at full scale in many blocks, a few channels would outgrow all others.
            scale = (layer_idx + 1) ** -0.5 if config.residual and config.num_hidden_layers > 6 else 1.0
            self.conv = MinGRUConv(input_size, config.conv_kernel, bias=config.use_bias, scale=scale)
        self.norm = _norm(config, input_size, config.norm_bias)
        self.mixer = MinGRUMixer(config, input_size, output_size)
        self.register_module("res_align", None)
        if config.residual and input_size != output_size:
            self.res_align = nn.Linear(input_size, output_size, bias=False)
        if config.use_mlp:
            self.mlp_norm = _norm(config, output_size, config.norm_bias)
            self.mlp = MinGRUMLP(config, output_size)
        else:
            self.register_module("mlp", None)
        self.output_is_state = not (config.use_out_proj or config.residual or config.use_mlp)
        self.branch_dropout = nn.Dropout(config.residual_dropout)
        is_last = layer_idx == config.num_hidden_layers - 1
        self.block_dropout = nn.Dropout(0.0 if is_last else config.block_dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # outputs start as large as inputs
                module.initial_std = module.in_features**-0.5

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        num_recorded: int | None = None,
        backend: str = "auto",
        call: Callable = module_call,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the block and leave its state in the cache.

        Args:
            hidden_states: (B, T, E).
            mask: (B, T) False at padding; None for no padding.
            reset: (B, T) True at the first token of a document; None for none.
            num_recorded: number of steps that a cache recording its past must be able to undo; None: all of this call.
            backend: backend of the scan, as in `mingru_scan`.
            call: function to call submodules with, `call(module, *args)`.
            cache: the model's cache, or None.

        Returns:
            (B, T, F) hidden states.
        """
        modules = self._modules  # a lookup here costs a fraction of one through nn.Module.__getattr__
        steps = hidden_states.shape[1]
        layer = state = window = windows = None
        if cache is None:
            num_recorded = 0
        else:
            layer = cache.layers[self.layer_idx]
            num_recorded = layer.num_to_record(num_recorded, steps)
            state, window = layer.starting_state(), layer.window
            if state is not None and (window is None) != (modules["conv"] is None):
                raise ValueError("cache belongs to another model: only one of the two has a convolution.")
        if modules["conv"] is not None:
            conv, windows = call(
                modules["conv"],
                hidden_states,
                window=window,
                mask=mask,
                reset=reset,
                num_recorded=num_recorded,
                call=call,
            )
            hidden_states = hidden_states + conv
        normed = call(modules["norm"], hidden_states)
        mixed, states = call(
            modules["mixer"],
            normed,
            state=state,
            mask=mask,
            reset=reset,
            num_recorded=num_recorded,
            backend=backend,
            call=call,
        )
        if layer is not None:
            # The states may be the block's output itself, which the caller may write to.
            layer.append(states.clone() if self.output_is_state else states, windows, num_steps=steps)
        mixed = call(modules["branch_dropout"], mixed)
        if self.residual:
            res_align = modules["res_align"]
            mixed = mixed + (hidden_states if res_align is None else call(res_align, hidden_states))
        hidden_states = mixed
        if modules["mlp"] is not None:
            mlp, normed = modules["mlp"], call(modules["mlp_norm"], hidden_states)
            # A user may have replaced the MLP with another module.
            mlp = call(mlp, normed, call=call) if type(mlp) is MinGRUMLP else mlp(normed)
            hidden_states = hidden_states + call(modules["branch_dropout"], mlp)
        return call(modules["block_dropout"], hidden_states)


class MinGRUPreTrainedModel(LoadingMixin, PreTrainedModel):
    """Base class of the MinGRU text models: configuration, weight initialisation and support for generate()."""

    config: MinGRUConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MinGRUBlock"]
    _skip_keys_device_placement = ["cache"]
    _is_stateful = False  # the state can be rolled back, so generate() need not refuse any mode
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MinGRUBlock}

    @torch.no_grad()
    def _init_weights(self, module):
        if hasattr(module, "initial_std") and self.config.initializer_range is None:
            init.normal_(module.weight, std=module.initial_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if isinstance(module, _Taps):
            # With transformers' default standard deviation of 0.02, four taps would add almost nothing.
            init.uniform_(module.weight, -module.initial_bound, module.initial_bound)
        memory = getattr(module, "initial_memory", 1)
        if memory > 1:
            init.copy_(module.bias, draw_memory_(torch.empty_like(module.bias), memory))


def _at_real_tokens(starts: Tensor, mask: Tensor | None) -> Tensor:
    """Move document starts (B, T) from padding to the document's first real token, if `mask` has one."""
    if mask is None:
        return starts
    document = starts.long().cumsum(1)
    last_seen = (document * mask).cummax(1).values  # document of the last real token so far
    return mask & (document > F.pad(last_seen[:, :-1], (1, 0)))


def _may_inspect(flags: Tensor) -> bool:
    """Return whether to inspect the values of flags (B, T), which may avoid the masked path.

    They are not inspected while tracing, inside a transform (under vmap the answer can differ between samples), on the
    meta device, or for single steps on a GPU, where waiting for the answer costs more than it saves.
    """
    if is_tracing(flags) or in_transform() or flags.is_meta:
        return False
    return flags.device.type == "cpu" or flags.shape[1] > 1


def _check_positions(name: str, numbers: Tensor, batch: int, steps: int) -> None:
    """Raise a ValueError unless `numbers` has the shape (B, T), or (1, T) for all rows."""
    if numbers.dim() != 2 or numbers.shape[0] not in (1, batch) or numbers.shape[1] != steps:
        or_one_row = f" or (1, {steps})" if batch > 1 else ""
        raise ValueError(f"{name} must have shape ({batch}, {steps}){or_one_row}, got {tuple(numbers.shape)}.")


def _packed_starts(
    batch: int, steps: int, mask: Tensor | None, seq_idx: Tensor | None, cu_seq_lens_q: Tensor | None
) -> Tensor | None:
    """Return booleans (B, T), True where a document starts, except a row's first; None if no documents are given."""
    starts = None
    if seq_idx is not None:
        _check_positions("seq_idx", seq_idx, batch, steps)
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).expand(batch, steps)
    if cu_seq_lens_q is not None:
        if cu_seq_lens_q.dim() != 1:
            raise ValueError(f"cu_seq_lens_q must have shape (documents + 1,), got {tuple(cu_seq_lens_q.shape)}.")
        # One element more, since an offset may be that of the end.
        listed = torch.zeros(batch * steps + 1, dtype=torch.bool, device=cu_seq_lens_q.device)
        listed.index_fill_(0, cu_seq_lens_q[1:-1].long().clamp(0, batch * steps), True)
        listed = F.pad(listed[:-1].view(batch, steps)[:, 1:], (1, 0))
        starts = listed if starts is None else starts | listed
    return None if starts is None else _at_real_tokens(starts, mask)


@calls_directly
class MinGRUModel(MinGRUPreTrainedModel):
    """The bare MinGRU text model: embedding, blocks, final norm.

    Args:
        config: sizes and switches.
    """

    def __init__(self, config: MinGRUConfig):
        super().__init__(config)
        # No padding_idx: the mask excludes padding, and the padding token may also be a real token (end of text).
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(MinGRUBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.Identity()
        if config.use_final_norm:
            self.norm = _norm(config, config.output_size, config.final_norm_bias)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @restores_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_recorded: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Compute hidden states for a batch of token sequences.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), or (B, past + T) including the tokens that `cache` has seen; only the last T
                columns are read. 0 marks padding, which may be anywhere and leaves the state unchanged.
            position_ids: (B, T) or (1, T). A 0 starts a new document, except at padding: the state is reset to g(0).
                Other positions have no effect. None: every row continues its document.
            cache: the state to continue from; it is updated in place. In training, gradients flow through a
                DynamicCache. For truncated backpropagation through time, call `layer.detach_()` for each layer in
                cache.layers after every backward pass.
            inputs_embeds: (B, T, hidden_size) instead of input_ids.
            use_cache: whether to return the state after the last token. None: config.use_cache, but False in training.
                A cache that is passed in is always returned.
            num_recorded: with a cache that records its past, the number of steps at the end of this call that `crop`
                must be able to undo. None: all.
            **kwargs: `output_hidden_states`, `return_dict`, and the arguments by which transformers' collators mark
                the documents of packed rows: `seq_idx` (B, T), and `cu_seq_lens_q` (documents + 1,), which holds
                offsets into the flattened rows. A document may begin with padding. Both describe this call only: with
                a cache, the first document of a row continues, whatever its number.

        Returns:
            last_hidden_state (B, T, width of the last block), cache, and hidden_states: the embeddings and each
            block's output, the last one after the final norm.

        Raises:
            ValueError: if both or neither of input_ids and inputs_embeds are given, a token id is out of range (on a
                GPU this is a device-side assertion, as usual in PyTorch), an argument has a wrong shape or holds no
                token, the cache belongs to another kind of model or batch, or a cache is passed in training with
                activation checkpointing.
            TypeError: if an argument is unknown.
        """
        refuse_unknown(kwargs)
        call = choose_call(input_ids if inputs_embeds is None else inputs_embeds)
        hidden_states, cache = self._run(
            call, input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, num_recorded, **kwargs
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, cache=cache)

    def _run(
        self,
        call: Callable,
        input_ids: torch.LongTensor | None,
        attention_mask: Tensor | None,
        position_ids: torch.LongTensor | None,
        cache: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        num_recorded: int | None,
        **kwargs,
    ) -> tuple[Tensor, Cache | None]:
        """As `forward`, but return (last_hidden_state, cache), without an output object or intermediate states."""
        modules = self._modules
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, call)
        elif inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds must have shape (B, T, {self.config.hidden_size}), got {tuple(inputs_embeds.shape)}."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            use_cache = False  # the recomputed forward pass would advance the state a second time
            if cache is not None:
                raise ValueError(
                    "With activation checkpointing, a training step cannot continue from a cache, since recomputation "
                    "would advance its state twice: leave out the cache, or call "
                    "model.activation_checkpointing_disable()."
                )
        batch, steps = inputs_embeds.shape[:2]
        if steps == 0:
            raise ValueError("The inputs are empty, but at least one token is needed.")
        # Early-exit drafting lowers num_hidden_layers temporarily: the norm and the head then read an earlier block.
        depth = self.config.num_hidden_layers
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            self._check_cache(cache, batch, depth)
        begins = cache is None or cache.layers[0].state is None
        mask = self._padding_mask(attention_mask, batch, steps, begins, inputs_embeds.device)
        packing = (kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q"))
        reset = self._document_starts(position_ids, *packing, mask, batch, steps, begins)

        blocks = modules["layers"]._modules
        if depth != len(blocks):
            self._check_early_exit(depth)
        hidden_states = call(modules["embedding_dropout"], inputs_embeds)
        backend = requested_backend(self.config.scan_backend)
        for block in islice(blocks.values(), depth):
            # Pass the cache by keyword: only there does transformers look for it when it recomputes activations.
            hidden_states = call(block, hidden_states, mask, reset, num_recorded, backend, call, cache=cache)
        return call(modules["norm"], hidden_states), cache

    def _check_early_exit(self, depth: int) -> None:
        sizes = self.config.hidden_sizes
        if sizes is not None and sizes[depth - 1] != sizes[-1]:
            raise ValueError(
                f"Early exit after {depth} blocks needs block {depth} to be as wide as the last one, but they are "
                f"{sizes[depth - 1]} and {sizes[-1]} wide."
            )

    def _embed(self, input_ids: Tensor, call: Callable) -> Tensor:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape (B, T), got {tuple(input_ids.shape)}.")
        try:
            return call(self._modules["embed_tokens"], input_ids)
        except IndexError as error:
            low, high = input_ids.aminmax()
            raise ValueError(
                f"Token ids must lie between 0 and {self.config.vocab_size - 1}, got {low.item()} to {high.item()}: "
                "does the tokenizer belong to this model?"
            ) from error

    def _check_cache(self, cache: Cache, batch: int, depth: int) -> None:
        layers = getattr(cache, "layers", ())
        adopt_layers(layers)
        if len(layers) != depth or not all(isinstance(layer, MinGRUCacheLayer) for layer in layers):
            raise ValueError(
                f"cache is a {type(cache).__name__} that holds no state for each of this model's {depth} blocks; "
                "create one with DynamicCache(config=model.config)."
            )
        if layers[0].batch_size not in (-1, batch):
            raise ValueError(f"cache holds {layers[0].batch_size} rows, but the inputs have {batch}.")
        places = [getattr(block, "layer_idx", 0) for block in self._modules["layers"]._modules.values()][:depth]
        if 0 not in places or max(places) >= depth:  # cache layer 0 tells whether a token was seen
            raise ValueError(
                f"The blocks have layer_idx {places}, but the cache has {depth} layers. After removing blocks, set "
                "config.num_hidden_layers, and each block's layer_idx to its position."
            )

    def _padding_mask(
        self, attention_mask: Tensor | None, batch: int, steps: int, begins: bool, device: torch.device
    ) -> Tensor | None:
        """Return the boolean mask (B, T) of this call's tokens; None if there is no padding."""
        if attention_mask is None:
            return None
        shape = attention_mask.shape
        if len(shape) != 2 or shape[0] != batch or shape[1] < steps or (begins and shape[1] > steps):
            raise ValueError(
                f"attention_mask must have shape ({batch}, {steps}), or more columns for tokens that are already "
                f"in the cache; got {tuple(shape)}."
            )
        mask = attention_mask[:, -steps:].bool()
        if _may_inspect(mask) and bool(mask.all()):
            return None
        return mask if mask.device == device else mask.to(device)

    def _document_starts(
        self,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        cu_seq_lens_q: Tensor | None,
        mask: Tensor | None,
        batch: int,
        steps: int,
        begins: bool,
    ) -> Tensor | None:
        """Return booleans (B, T), True where a document starts and the state is reset; None if no state is reset."""
        reset = None
        if position_ids is not None:
            _check_positions("position_ids", position_ids, batch, steps)
            reset = (position_ids == 0).expand(batch, steps)
        if mask is not None and reset is not None:
            reset = reset & mask  # generate() gives padding the position 0
        starts = _packed_starts(batch, steps, mask, seq_idx, cu_seq_lens_q)
        if starts is not None:
            reset = starts if reset is None else reset | starts
        if reset is None:
            return None
        if begins:
            # A row's first real token starts from g(0) in any case.
            if mask is None:
                reset = F.pad(reset[:, 1:], (1, 0))
            else:
                reset = reset & (mask.cumsum(1) > 1)
        return None if _may_inspect(reset) and not bool(reset.any()) else reset


class _EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember which rows they have stopped: generate() appends only padding to those."""

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        self.ended: Tensor | None = None  # (B,) rows stopped so far
        self.padded: Tensor | None = None  # (B,) rows whose last token is padding: they had stopped before it

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.padded = self.ended
        self.ended = done if self.ended is None else self.ended | done
        return done

    def mask(self, always: bool) -> Tensor | None:
        """Return a mask (B, 1), False where the last token is padding; None if there is none, unless `always`."""
        if self.padded is None:
            return torch.ones_like(self.ended).unsqueeze(1) if always else None
        # Reading the values makes the CPU wait for the GPU, but generate() has just done so too, except on MPS.
        if not always and self.padded.device.type != "mps" and not self.padded.any():
            return None
        return ~self.padded.unsqueeze(1)


def _check_new_tokens(
    input_ids: Tensor, position_ids: Tensor | None, next_sequence_length: int | None, cache: Cache | None
) -> None:
    """Raise a ValueError if there is no new token to generate from, or a new token without a position.

    GenerationMixin would slice `[:, -0:]`, or prefill in chunks without positions, and the state would read the whole
    prompt a second time.
    """
    new = input_ids.shape[-1] if next_sequence_length is None else next_sequence_length
    given = new if position_ids is None else position_ids.shape[-1]  # a prefill in chunks slices them beforehand
    if new > 0 and given >= new:
        return
    seen = 0 if cache is None else cache.get_seq_length()
    if new > 0 and (given > 0 or seen == 0):
        raise ValueError(f"position_ids has {given} columns, expected one for each of the {new} tokens.")
    if seen > 0:
        raise ValueError(
            f"The cache has seen {seen} tokens, and the ids passed with it contain no new ones. Pass all ids, at "
            "least one more than the cache has seen, or only the new ids, with an attention_mask over both. A cache "
            "that recorded its past can go back: cache.crop(-1)."
        )
    raise ValueError("The prompt is empty: give at least one token, or leave input_ids out to begin with BOS.")


class MinGRUForCausalLM(MinGRUPreTrainedModel, GenerationMixin):
    """MinGRU with a language-model head.

    Args:
        config: sizes and switches.

    Example:
        >>> model = MinGRUForCausalLM(MinGRUConfig(vocab_size=96, hidden_size=128, num_hidden_layers=2))
        >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5)
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MinGRUConfig):
        super().__init__(config)
        self.model = MinGRUModel(config)
        self.lm_head = nn.Linear(config.output_size, config.vocab_size, bias=config.lm_head_bias)
        self.loss_type = "ForCausalLM"  # not derived from the class name, which a subclass may change
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        cache=None,
        inputs_embeds=None,
        is_first_iteration=False,
        position_ids=None,
        attention_mask=None,
        prompt_length=None,
        ended_rows=None,
        **kwargs,
    ):
        """As in GenerationMixin, but without position_ids after the prefill, where no document starts.

        Args:
            prompt_length, ended_rows: from `_sample`. Tokens after the prompt are real, except those that pad rows
                that have ended.

        Raises:
            ValueError: if the cache has already seen all of the ids or more, if the prompt holds no token, or if
                position_ids has fewer columns than there are new tokens.
        """
        if cache is not None and not is_first_iteration:
            position_ids = None
        if prompt_length is not None and input_ids.shape[1] > prompt_length and next_sequence_length == 1:
            attention_mask = None if ended_rows is None else ended_rows.mask(always=cache.is_compileable)
        for name in ("tokenizer", "assistant_tokenizer"):  # generate() takes them for stop strings and passes them on
            kwargs.pop(name, None)
        _check_new_tokens(input_ids, position_ids, next_sequence_length, cache)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            cache=cache,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            position_ids=position_ids,
            attention_mask=attention_mask,
            **kwargs,
        )

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        """As in GenerationMixin, but turn packing arguments into position_ids, which generate() slices per step."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        packing = {key: model_kwargs.pop(key, None) for key in _PACKING}
        if packing["seq_idx"] is not None or packing["cu_seq_lens_q"] is not None:
            (batch, steps), mask = inputs.shape[:2], model_kwargs.get("attention_mask")
            mask = None if mask is None else mask[:, -steps:].bool()
            starts = _packed_starts(batch, steps, mask, packing["seq_idx"], packing["cu_seq_lens_q"])
            position_ids = model_kwargs.get("position_ids")
            if position_ids is None:
                position_ids = self._prepare_position_ids_for_generation(inputs, model_kwargs)
            position_ids = position_ids.expand(batch, -1).clone()
            position_ids[:, -steps:].masked_fill_(starts, 0)
            model_kwargs["position_ids"] = position_ids
        return inputs, name, model_kwargs

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        """As in GenerationMixin, but if the cache outlives the call, padding does not change states of ended rows."""
        outlives = generation_config.return_dict_in_generate or getattr(kwargs.get("cache"), "_is_user_defined", False)
        if outlives and len(input_ids) > 1 and any(hasattr(item, "eos_token_id") for item in stopping_criteria):
            stopping_criteria = kwargs["ended_rows"] = _EndedRows(stopping_criteria)
        kwargs["prompt_length"] = input_ids.shape[1]
        return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _assisted_decoding(self, input_ids, *args, generation_config, **kwargs):
        """As in GenerationMixin, but restore the cache's recording and the model's depth afterwards."""
        cache, mask = kwargs.get("cache"), kwargs.get("attention_mask")
        layers = [] if cache is None else cache.layers
        recorded = [layer.record_past for layer in layers]
        # The first step reads all ids that it is given. If the mask has the same length, the ids are the whole text,
        # including what the cache has seen already. (generate() drops an all-ones mask, but keeps its length.)
        length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        if cache is not None and length == input_ids.shape[1]:
            cache.reset()
        depth = self.config.num_hidden_layers  # which early-exit drafting lowers temporarily
        try:
            return super()._assisted_decoding(input_ids, *args, generation_config=generation_config, **kwargs)
        finally:
            self.config.num_hidden_layers = depth
            for layer, record_past in zip(layers, recorded, strict=True):
                layer.record_past = record_past

    @staticmethod
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, cache, is_first_iteration=True, **kwargs
    ) -> Tensor | None:
        """Return the mask for a step with a static cache: its own tokens' columns, or None for generated tokens."""
        steps = inputs_embeds.shape[1]
        if attention_mask is None or (not is_first_iteration and attention_mask.shape[1] > steps):
            return None
        return attention_mask[:, -steps:]

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As in GenerationMixin, but an assistant model keeps enough states to undo all the tokens that it drafts.

        Raises:
            ValueError: if inputs_embeds are to be prefilled in chunks: GenerationMixin would split only the ids.
        """
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "prefill_chunk_size splits input_ids into chunks and cannot split inputs_embeds: leave it out, or "
                "give only input_ids."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache, drafts = model_kwargs.get("cache"), generation_config.max_new_tokens
        if cache is not None:
            adopt_layers(cache.layers)
        if cache is not None and generation_config.is_assistant and drafts is not None:
            for layer in cache.layers:
                # Twice: if the main model has another tokenizer, more tokens than the last round's may be undone.
                layer.min_recorded_steps = max(layer.min_recorded_steps, 2 * drafts)

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, workload_hints=None):
        """As in GenerationMixin, but with recurrent states; generate_batch() and servers call this method."""
        # Imported here, so that all else still works with a transformers version that has other internals.
        from .continuous_batching import MinGRUBatchingManager

        manager = getattr(self, "_cached_continuous_batching_manager", None)
        if manager is None:
            generation_config = self.generation_config if generation_config is None else generation_config
            manager = MinGRUBatchingManager(self, generation_config, continuous_batching_config, workload_hints)
        return manager

    def _get_static_cache_init_shape(self):
        return None  # there are no attention heads: the layers create their tensors themselves

    def get_compiled_call(self, compile_config):
        """As in PreTrainedModel, but run the call in which a static cache creates its tensors without compiling it.

        Tensors created within a CUDA graph would lie in its memory, which the next graph overwrites.
        """
        compiled = super().get_compiled_call(compile_config)

        def call(*args, cache=None, **kwargs):
            is_new = cache is not None and not all(layer.is_initialized for layer in cache.layers)
            return (self if is_new else compiled)(*args, cache=cache, **kwargs)

        return call

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @restores_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Predict the next token at each position.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache: as in `MinGRUModel.forward`.
            labels: (B, T) token ids, usually input_ids: the loss at position t is that of predicting labels[:, t + 1];
                -100 leaves a position out.
            logits_to_keep: compute logits for this many positions at the end, or for the positions in a tensor.
                0: all. Below 0: all but that many at the start.
            skip_logits: return the loss without logits, and compute it a few rows at a time, so that the logits are
                never all in memory (unless the model has another `loss_function` or a modified head). None:
                config.skip_logits in training with labels, else False.

        Returns:
            loss (mean over the positions, in nats per token, if labels are given), logits (B, T, vocab_size) unless
            skipped, cache, hidden_states.

        Raises:
            ValueError: as `MinGRUModel.forward`, or if logits are to be skipped without labels.
        """
        if skip_logits is None:
            skip_logits = labels is not None and self.training and self.config.skip_logits
        if skip_logits and labels is None:
            raise ValueError(
                "skip_logits needs labels (shift_labels alone give no loss): pass labels, or leave it out."
            )
        # generate() asks for the logits of the steps that it may undo, which limits the states to keep.
        num_recorded = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 else None
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "num_recorded": num_recorded,
        }
        call = choose_call(input_ids if inputs_embeds is None else inputs_embeds)
        modules = self._modules
        model, all_hidden_states = modules["model"], None
        if call is direct_call and not kwargs and is_plain(model) and not self.config.output_hidden_states:
            hidden_states, cache = model._run(call, **arguments)
        else:
            outputs = model(**arguments, return_dict=True, **kwargs)
            hidden_states, cache = outputs.last_hidden_state, outputs.cache
            all_hidden_states = outputs.hidden_states
        if not isinstance(logits_to_keep, int) or (logits_to_keep and logits_to_keep < hidden_states.shape[1]):
            hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)
        loss = logits = None
        if (
            skip_logits
            and self.loss_function is ForCausalLMLoss
            and plain_linear(modules["lm_head"]) is not None
            and not in_transform()
        ):
            loss = head_loss(hidden_states, self.lm_head, labels, **kwargs)
        else:
            logits = call(modules["lm_head"], hidden_states)  # (B, T, V)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        fields = {  # all of them: `direct_output` adds no defaults
            "loss": loss,
            "logits": None if skip_logits else logits,
            "cache": cache,
            "hidden_states": all_hidden_states,
            "attentions": None,
        }
        if call is direct_call:
            return direct_output(CausalLMOutputWithPast, **fields)
        return CausalLMOutputWithPast(**fields)


class MinGRUForSequenceClassification(MinGRUPreTrainedModel):
    """MinGRU with a linear classifier on the last real token of each row.

    Args:
        config: sizes and switches; `num_labels` and `problem_type` as everywhere in transformers.
    """

    def __init__(self, config: MinGRUConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MinGRUModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.output_size, config.num_labels, bias=False)
        self.loss_function = classification_loss
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @restores_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Classify each row.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache: as in `MinGRUModel.forward`.
            labels: (B,) class ids, -100 to leave a row out; (B, num_labels) floats for multi-label classification or
                regression; (B,) floats for regression with one label.

        Returns:
            loss (if labels are given), logits (B, num_labels) at each row's last real token, cache, hidden_states.
            attention_mask determines which token that is, or pad_token_id if there is no mask. It is the last token
            for inputs_embeds without a mask, and for a single row with neither.

        Raises:
            ValueError: as `MinGRUModel.forward`, `check_class_ids` and `classification_loss`; if there are several
                rows of ids, but neither an attention_mask nor a pad_token_id to find their last real tokens; or if the
                mask says that a row ended before this call.
        """
        _refuse_ended_rows(input_ids if inputs_embeds is None else inputs_embeds, attention_mask)
        if labels is not None:
            check_class_ids(labels, self.config)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        last = self._last_real_token(input_ids, attention_mask, outputs.last_hidden_state)  # (B,)
        rows = torch.arange(last.shape[0], device=last.device)
        logits = self.score(self.dropout(outputs.last_hidden_state[rows, last]))  # (B, num_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )

    def _last_real_token(self, input_ids: Tensor | None, attention_mask: Tensor | None, hidden: Tensor) -> Tensor:
        """Return the column (B,) of each row's last real token; the last column if nothing identifies padding."""
        batch, steps = hidden.shape[:2]
        columns = torch.arange(steps, device=hidden.device)
        if attention_mask is not None:
            return (columns * attention_mask[:, -steps:].to(hidden.device).bool()).argmax(-1)
        if input_ids is not None and self.config.pad_token_id is not None:
            return (columns * (input_ids != self.config.pad_token_id)).argmax(-1)
        if batch > 1 and input_ids is not None:
            raise ValueError("Cannot tell where each row ends: pass an attention_mask, or set config.pad_token_id.")
        return columns[-1].expand(batch)


def _refuse_ended_rows(inputs: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raise a ValueError if a mask that covers earlier calls says that a row ended in one of them."""
    if inputs is None or attention_mask is None or inputs.dim() < 2 or attention_mask.dim() != 2 or in_transform():
        return
    steps = inputs.shape[1]
    if is_tracing(attention_mask) or attention_mask.shape[1] <= steps:
        return
    real = attention_mask.bool()
    if (real[:, :-steps].any(1) & ~real[:, -steps:].any(1)).any():
        raise ValueError(
            "A row that continues from the cache has only padding in this call: its logits came with an earlier one. "
            "Remove the rows that have ended (cache.batch_select_indices)."
        )


class MinGRUForTokenClassification(MinGRUPreTrainedModel):
    """MinGRU with a linear classifier on every token; each sees the tokens up to itself.

    To use both directions, apply the layer `Bidirectional(MinGRU(...))` to embeddings of your own.

    Args:
        config: sizes and switches; `num_labels` as everywhere in transformers.
    """

    def __init__(self, config: MinGRUConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MinGRUModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.output_size, config.num_labels)
        self.loss_type = "ForTokenClassification"  # not derived from the class name, which a subclass may change
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @restores_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Classify each token.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache: as in `MinGRUModel.forward`, but
                the output has no field for a cache: one that is passed in is updated in place.
            labels: (B, T) class ids; -100 leaves a token out.

        Returns:
            loss (if labels are given), logits (B, T, num_labels), hidden_states.

        Raises:
            ValueError: as `MinGRUModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            return_dict=True,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))  # (B, T, num_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


# `Trainer` looks up in this table for which models label smoothing must shift the labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MinGRUConfig.model_type] = MinGRUForCausalLM.__name__

# Saving one of these models also saves this file, and the files that it imports, with the weights.
MinGRUModel.register_for_auto_class("AutoModel")
MinGRUForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MinGRUForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MinGRUForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "MinGRUCacheLayer",
    "MinGRUForCausalLM",
    "MinGRUForSequenceClassification",
    "MinGRUForTokenClassification",
    "MinGRUModel",
    "MinGRUPreTrainedModel",
]
