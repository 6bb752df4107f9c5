"""The MinConvGRU video model, read top to bottom: cache, recurrent layer, stack, model, classifier.

Source: torch-mingru (github.com/cheind/mingru), after Ballas et al. 2015, "Delving Deeper into Convolutional Networks
for Learning Video Representations", arXiv:1511.06432.

Legend: B clips, T frames, C x H x W of a frame or feature map, D channels of a recurrent state, P cells along a side
of the pooled output, F = D x P x P (twice that if bidirectional) pooled features of a stage, N frames of all clips.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, AutoConfig, TimmBackboneConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_tracing

from .configuration_minconvgru import MinConvGRUConfig
from .layers import MinConv2dGRULayer
from .loading import LoadingMixin, refuse_unknown, restores_cache
from .losses import check_class_ids, classification_loss
from .scan import mingru_scan


class MinConvGRUCache:
    """The state of a model after a stream of frames; its size does not depend on the number of frames.

    Pass an empty cache with the first frames of a stream, and the same cache with the frames that follow.

    Attributes:
        states: (B, 1, D, H, W) for each recurrent layer, stage by stage, float32 (float64 for float64 models); empty
            before the first frames.
        features: (B, F of all stages) pooled outputs at each clip's last real frame; None before the first frames.
        seq_length: number of frames seen, padding included.
    """

    def __init__(self) -> None:
        self.reset()

    @property
    def batch_size(self) -> int:
        """Number of clips held; -1 before the first frames."""
        return -1 if self.features is None else self.features.shape[0]

    def get_seq_length(self) -> int:
        """Return the number of frames seen, padding included."""
        return self.seq_length

    def update(self, states: list[Tensor], features: Tensor, num_frames: int) -> None:
        """Store the states and features after `num_frames` more frames, shaped as in the attributes."""
        # Store copies: a slice would keep the states of all frames of the call in memory.
        self.states = [state.clone() for state in states]
        self.features = features.clone()
        self.seq_length += num_frames

    def snapshot(self) -> tuple:
        """Return the contents, for `restore`."""
        return self.states, self.features, self.seq_length

    def restore(self, snapshot: tuple) -> None:
        """Undo all updates since `snapshot()`, after an exception during a forward pass."""
        self.states, self.features, self.seq_length = snapshot

    def reset(self) -> None:
        """Forget all frames: the next frames begin new clips."""
        self.states: list[Tensor] = []
        self.features: Tensor | None = None
        self.seq_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace clip i with clip beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the clips `indices`, in that order."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every clip `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def to(self, device: torch.device | str) -> "MinConvGRUCache":
        """Move the tensors to a device and return the cache."""
        self._map(lambda tensor: tensor.to(device))
        return self

    def _map(self, function) -> None:
        self.states = [function(state) for state in self.states]
        self.features = None if self.features is None else function(self.features)


@dataclass
class MinConvGRUModelOutput(ModelOutput):
    """Output of MinConvGRUModel.

    Args:
        last_hidden_state: (B, T, F of all stages) pooled outputs for every frame. At padding they are those of the
            last real frame before it (for backward stacks, of the next one after it), or zeros if there is none.
        pooler_output: (B, F of all stages) pooled outputs for the clips: those of the last real frame, and for
            backward stacks those of the first.
        cache: the state to continue from, if requested.
        hidden_states: for each stage the feature map (B, T, C, H, W), then the output of each recurrent layer.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    cache: MinConvGRUCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MinConvGRUVideoClassifierOutput(ModelOutput):
    """Output of MinConvGRUForVideoClassification.

    Args:
        loss: a scalar, if labels are given.
        logits: (B, num_labels) for the clips.
        frame_logits: (B, T, num_labels) after each frame, if requested.
        cache: the state to continue from, if requested.
        hidden_states: as in MinConvGRUModelOutput.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    frame_logits: Tensor | None = None
    cache: MinConvGRUCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MinConvGRULayer(GradientCheckpointingLayer, MinConv2dGRULayer):
    """A recurrent layer (norm -> convolution -> scan over time) with its residual branch."""

    def __init__(self, config: MinConvGRUConfig, input_size: int, hidden_size: int):
        super().__init__(
            input_size,
            hidden_size,
            config.kernel_size,
            config.stride,
            config.padding,
            bias=True,
            norm=config.norm,
            residual=config.residual,
            factory={},
        )
        self.config = config

    def forward(
        self, x: Tensor, state: Tensor | None, mask: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer over the frames.

        Args:
            x: (B, T, C, H, W) feature maps or outputs of the layer below.
            state: (B, 1, D, H_out, W_out) before the first frame; None starts from g(0) = 0.5.
            mask: (B, T) False at padding, which leaves the state unchanged; None if there is no padding.
            keep_state: whether to return the state after the last frame.

        Returns:
            Outputs (B, T, D, H_out, W_out), undefined at padding, and the state (B, 1, D, H_out, W_out) or None.

        Raises:
            ValueError: if x is too small for the convolution, or the state does not fit.
        """
        shape = self.state_shape(x)
        if state is not None and list(state.shape) != shape:
            raise ValueError(
                f"cache holds a state of shape {list(state.shape)}, but these frames need {shape} (B, 1, D, H, W): "
                "it belongs to another model or to frames of another size."
            )
        gate_and_candidate, skip = self.project(x)
        # The scan returns the last state unrounded (float32 for 16-bit models), so that a stream continues from the
        # exact state.
        states, last_state = mingru_scan(
            gate_and_candidate, state, mask, backend=self.config.scan_backend, return_last_state=True
        )
        return states + skip if self.config.residual else states, last_state if keep_state else None


class MinConvGRUStack(nn.Module):
    """The recurrent layers of one stage and one direction of time."""

    def __init__(self, config: MinConvGRUConfig, input_size: int, hidden_size: int):
        super().__init__()
        sizes = [input_size] + [hidden_size] * config.num_hidden_layers
        self.layers = nn.ModuleList(MinConvGRULayer(config, n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, states: list[Tensor] | None, mask: Tensor | None, keep_states: bool
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """x (B, T, C, H, W) -> each layer's outputs (B, T, D, H_out, W_out) and last state (None if not kept)."""
        outputs, last_states = [], []
        for i, layer in enumerate(self.layers):
            x = x if i == 0 else self.dropout(x)
            x, last_state = layer(x, None if states is None else states[i], mask, keep_states)
            outputs.append(x)
            last_states.append(last_state)
        return outputs, last_states


class MinConvGRUPreTrainedModel(LoadingMixin, PreTrainedModel):
    """Base class of all MinConvGRU models: configuration, initialisation and the use of pretrained backbones."""

    config: MinConvGRUConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["MinConvGRULayer"]
    _skip_keys_device_placement = ["cache"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # These are the recurrent layers' convolutions; the backbone initialises its own. They use torch's default
        # initialisation, as in torch-mingru: no single standard deviation suits kernels of both 16 and 512 channels.
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Self:
        """Load a model as PreTrainedModel does, and keep a frozen backbone frozen.

        PreTrainedModel creates new parameters that all require gradients.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.freeze_backbone:
            model.base_model.freeze_backbone()
        return loaded

    @classmethod
    def from_backbone_pretrained(
        cls,
        backbone_name_or_path: str,
        *,
        out_indices: list[int] | None = None,
        out_features: list[str] | None = None,
        **kwargs,
    ) -> Self:
        """Build a model on a pretrained image backbone; recurrent layers and classifiers are newly initialised.

        The model is returned in evaluation mode, as by `from_pretrained`.

        Args:
            backbone_name_or_path: a checkpoint of an image model, on the Hub or in a directory; "timm/NAME" loads
                timm's weights of that name.
            out_indices: indices of the stages whose feature maps are used, counted from the first. None: the
                checkpoint's choice, or for timm the last stage.
            out_features: the same stages by name; stages of timm backbones are chosen by index only.
            **kwargs: fields of `MinConvGRUConfig`.

        Raises:
            ValueError: if the checkpoint is not that of a backbone or lacks a stage.
            OSError: if the checkpoint is not found.
            ImportError: if timm is needed and not installed.

        Example:
            >>> model = MinConvGRUForVideoClassification.from_backbone_pretrained(
            ...     "timm/vgg16.tv_in1k", out_indices=[0, 1, 2, 3, 4], feature_pooling=True, num_labels=101
            ... )
        """
        stages = {"out_indices": out_indices, "out_features": out_features}
        stages = {name: value for name, value in stages.items() if value is not None}
        if backbone_name_or_path.startswith("timm/"):
            if out_features is not None:
                raise ValueError(
                    "The stages of a timm backbone must be chosen with out_indices, not with out_features."
                )
            try:
                import timm
            except ImportError as error:
                raise ImportError(f"{backbone_name_or_path} needs timm: pip install timm.") from error
            name, out_indices = backbone_name_or_path.removeprefix("timm/"), out_indices or [-1]
            backbone_config = TimmBackboneConfig(backbone=name, out_indices=out_indices)
            # Avoid TimmBackbone.from_pretrained: in transformers 5.24 it loses the batch norms' running statistics.
            pretrained = timm.create_model(name, pretrained=True, features_only=True, out_indices=out_indices)
            weights = {f"_backbone.{key}": tensor for key, tensor in pretrained.state_dict().items()}
        else:
            backbone_config = AutoConfig.from_pretrained(backbone_name_or_path, **stages)
            if type(backbone_config) not in MODEL_FOR_BACKBONE_MAPPING:
                raise ValueError(
                    f"{backbone_name_or_path} holds a {backbone_config.model_type} model, which transformers cannot "
                    "use as a backbone."
                )
            backbone_class = MODEL_FOR_BACKBONE_MAPPING[type(backbone_config)]
            weights = backbone_class.from_pretrained(backbone_name_or_path, config=backbone_config).state_dict()
        model = cls(MinConvGRUConfig(backbone_config=backbone_config, **kwargs))
        model.base_model.backbone.load_state_dict(weights)
        return model.eval()


class MinConvGRUModel(MinConvGRUPreTrainedModel):
    """The bare video model: a backbone on every frame, recurrent stacks over its feature maps, pooled outputs.

    Args:
        config: configuration of the model.

    Raises:
        ValueError: if the backbone lacks one of the requested stages.
    """

    def __init__(self, config: MinConvGRUConfig):
        super().__init__(config)
        self.backbone = _load_backbone(config)
        channels = self.backbone.channels
        hidden_sizes = channels if config.hidden_sizes is None else config.hidden_sizes
        sizes = list(zip(channels, hidden_sizes, strict=True))
        self.stacks = nn.ModuleList(MinConvGRUStack(config, *size) for size in sizes)
        directions = 1
        if config.bidirectional:
            self.backward_stacks = nn.ModuleList(MinConvGRUStack(config, *size) for size in sizes)
            directions = 2
        self.feature_sizes = [directions * size * config.pooled_size**2 for size in hidden_sizes]  # F of each stage
        for module in self.backbone.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_order_channels_first)
        pooling = config.feature_pooling
        self.feature_pooling = [pooling] * len(sizes) if isinstance(pooling, bool) else pooling
        self.gradient_checkpointing = False
        self.post_init()
        self.backbone.requires_grad_(not config.freeze_backbone)

    def freeze_backbone(self) -> None:
        """Freeze the backbone from now on: it stays in evaluation mode and gets no gradients."""
        self.config.freeze_backbone = True
        self.backbone.requires_grad_(False).eval()

    def unfreeze_backbone(self) -> None:
        """Train the backbone too from now on."""
        self.config.freeze_backbone = False
        self.backbone.requires_grad_(True).train(self.training)

    def train(self, mode: bool = True) -> "MinConvGRUModel":
        """Set the mode as nn.Module does, but keep a frozen backbone, and so its batch norms, in evaluation mode."""
        super().train(mode)
        if self.config.freeze_backbone:
            self.backbone.eval()
        return self

    @can_return_tuple
    @restores_cache
    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MinConvGRUCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MinConvGRUModelOutput:
        """Compute pooled features of clips.

        Args:
            pixel_values_videos: (B, T, C, H, W) frames as the video processor returns them, of any floating dtype.
            attention_mask: (B, T) 0 at padding, on either side or in between. The backbone skips padding (except when
                traced) and the states pass through it unchanged, so a padded clip gives the outputs of the clip alone.
            cache: the state to continue from; it is updated in place. It keeps the autograd graph of the frames seen
                so far unless they ran under `torch.no_grad()`.
            use_cache: return the state after the last frame. A cache that is passed in is always returned.
            output_hidden_states: return feature maps and outputs of all layers. None: config.output_hidden_states.
            pixel_values: another name for pixel_values_videos.
            **kwargs: `return_dict`.

        Returns:
            last_hidden_state (B, T, F of all stages), pooler_output (B, F of all stages), cache, hidden_states.

        Raises:
            ValueError: if the frames are missing, have a wrong shape or dtype, or are too small for the layers; if
                the mask has a wrong shape or, without a cache, leaves a clip without a frame; if the cache belongs to
                another model, batch or frame size; or if a bidirectional model is to use a cache.
            TypeError: if an argument is unknown.
        """
        refuse_unknown(kwargs)
        if (pixel_values_videos is None) == (pixel_values is None):
            raise ValueError("Give exactly one of pixel_values_videos and pixel_values.")
        frames = pixel_values_videos if pixel_values is None else pixel_values
        self._check_frames(frames)
        frames = frames.to(self._parameter_dtype(frames))  # processors return float32 only
        use_cache = bool(use_cache) or cache is not None
        if use_cache and self.config.bidirectional:
            raise ValueError(
                "A bidirectional model reads a clip from its end too, so it cannot continue from a cache: pass whole "
                "clips without cache and use_cache."
            )
        if cache is not None:
            self._check_cache(cache, frames.shape[0])
        elif use_cache:
            cache = MinConvGRUCache()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        mask = self._padding_mask(attention_mask, frames, may_be_empty=use_cache)

        num_layers = self.config.num_hidden_layers
        goes_on = use_cache and cache.batch_size != -1
        if goes_on and torch.is_grad_enabled() and not is_tracing(frames) and cache.features.is_inference():
            cache._map(torch.clone)  # autograd cannot save tensors that were created in inference_mode()
        past_features = cache.features.split(self.feature_sizes, dim=-1) if goes_on else [None] * len(self.stacks)
        features, clip_features, states, hidden_states = [], [], [], []
        for stage, maps in enumerate(self._feature_maps(frames, mask)):
            past_states = cache.states[stage * num_layers : (stage + 1) * num_layers] if goes_on else None
            outputs, last_states = self.stacks[stage](maps, past_states, mask, use_cache)
            states.extend(last_states)
            features.append(self._pool(outputs[-1], mask, past_features[stage]))  # (B, T, F)
            clip_features.append(features[-1][:, -1])  # (B, F)
            if self.config.bidirectional:
                backward_mask = None if mask is None else mask.flip(1)
                backward, _ = self.backward_stacks[stage](maps.flip(1), None, backward_mask, False)
                features.append(self._pool(backward[-1], backward_mask).flip(1))
                clip_features.append(features[-1][:, 0])
                outputs = [torch.cat([a, b.flip(1)], dim=2) for a, b in zip(outputs, backward, strict=True)]
            if output_hidden_states:
                hidden_states.extend([maps, *outputs])
        pooler_output = torch.cat(clip_features, dim=-1)
        if use_cache:
            cache.update(states, pooler_output, frames.shape[1])
        return MinConvGRUModelOutput(
            last_hidden_state=torch.cat(features, dim=-1),
            pooler_output=pooler_output,
            cache=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )

    def _parameter_dtype(self, frames: Tensor) -> torch.dtype:
        """Return the model's dtype, or the frames' dtype in DataParallel replicas, whose parameters() is empty."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), frames.dtype)

    def _check_frames(self, frames: Tensor) -> None:
        channels = getattr(self.config.backbone_config, "num_channels", 3)
        if frames.dim() != 5 or 0 in frames.shape[:2] or frames.shape[2] != channels:
            raise ValueError(
                f"pixel_values_videos must have shape (B, T, {channels}, H, W) with at least one clip and frame, got "
                f"{tuple(frames.shape)}; a single clip needs a batch axis too."
            )
        if not frames.is_floating_point():
            raise ValueError(
                f"pixel_values_videos must be floating point, got {frames.dtype}: the video processor scales and "
                "normalises uint8 frames."
            )

    def _check_cache(self, cache: MinConvGRUCache, batch: int) -> None:
        if not hasattr(cache, "features"):
            raise ValueError(f"cache is a {type(cache).__name__}; a stream of frames needs a MinConvGRUCache().")
        if cache.batch_size == -1:
            return
        if cache.batch_size != batch:
            raise ValueError(f"cache holds {cache.batch_size} clips, but the frames are from {batch}.")
        num_states, num_features = len(self.stacks) * self.config.num_hidden_layers, sum(self.feature_sizes)
        if len(cache.states) != num_states or cache.features.shape[-1] != num_features:
            raise ValueError(
                f"cache holds {len(cache.states)} states and {cache.features.shape[-1]} features per clip, but this "
                f"model needs {num_states} and {num_features}: it belongs to another model."
            )

    def _padding_mask(self, attention_mask: Tensor | None, frames: Tensor, may_be_empty: bool) -> Tensor | None:
        """Return a (B, T) boolean mask, False at padding; None if there is no padding."""
        if attention_mask is None:
            return None
        if attention_mask.shape != frames.shape[:2]:
            raise ValueError(
                f"attention_mask must have shape {tuple(frames.shape[:2])} (B, T), got {tuple(attention_mask.shape)}."
            )
        mask = attention_mask.bool()
        if is_tracing(mask):
            return mask.to(frames.device)
        if mask.all():
            return None
        if not may_be_empty and not mask.any(1).all():
            raise ValueError("attention_mask masks every frame of a clip: keep at least one frame of each.")
        return mask.to(frames.device)

    def _feature_maps(self, frames: Tensor, mask: Tensor | None) -> list[Tensor]:
        """frames (B, T, C, H, W) -> one feature map (B, T, C_i, H_i, W_i) per stage, zeros at padding.

        When tracing, the backbone runs on padding too, so the maps there are not zeros.
        """
        images = frames.flatten(0, 1)  # (N, C, H, W)
        real = None
        if mask is not None and not is_tracing(mask):
            real = mask.flatten().nonzero().squeeze(1)
            real = real if len(real) else real.new_zeros(1)  # at least one frame, to find out the size of the maps
            images = images[real]
        # On the CPU, convolutions are faster in this memory format, and poolings many times faster.
        if images.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        frozen = self.config.freeze_backbone
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        trains = images.requires_grad or any(parameter.requires_grad for parameter in self.backbone.parameters())
        trains = trains and not frozen
        run = self._checkpoint_backbone if checkpointing and trains else self._run_backbone
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            chunk = self.config.backbone_chunk_size
            pieces = [run(piece) for piece in (images.split(chunk) if chunk else [images])]
        stages = pieces[0] if len(pieces) == 1 else [torch.cat(maps) for maps in zip(*pieces, strict=True)]
        if real is not None:
            stages = [
                maps.new_zeros(frames.shape[0] * frames.shape[1], *maps.shape[1:]).index_copy(0, real, maps)
                for maps in stages
            ]
        stages = [maps.unflatten(0, frames.shape[:2]) for maps in stages]
        if (
            checkpointing
            and not trains
            and getattr(self._gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
        ):
            # Reentrant checkpointing gives a layer gradients only if its input requires them.
            stages = [maps.requires_grad_() for maps in stages]
        return stages

    def _checkpoint_backbone(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run `_run_backbone` with activation checkpointing.

        The backward pass runs the backbone again and then restores its buffers, so that batch norms update their
        running statistics only once per batch.
        """
        first = True

        def run(images: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            nonlocal first
            statistics = [] if first else [(buffer, buffer.clone()) for buffer in self.backbone.buffers()]
            first = False
            try:
                return self._run_backbone(images)
            finally:
                for buffer, value in statistics:
                    buffer.data.copy_(value)  # .data hides the write from autograd, which has saved the buffers

        # Reentrant checkpointing computes gradients only if an input requires one, hence the additional scalar.
        return self._gradient_checkpointing_func(run, images, images.new_zeros((), requires_grad=True))

    def _run_backbone(self, images: Tensor) -> tuple[Tensor, ...]:
        """images (N, C, H, W) -> one feature map (N, C_i, H_i, W_i) per stage."""
        stages = []
        outputs = self.backbone(images).feature_maps
        if getattr(getattr(self.backbone, "_backbone", None), "output_fmt", "NCHW") == "NHWC":  # some timm models
            outputs = [maps.movedim(3, 1) for maps in outputs]
        for maps, channels, pooling in zip(outputs, self.backbone.channels, self.feature_pooling, strict=True):
            if maps.dim() != 4 or maps.shape[1] != channels:
                raise ValueError(
                    f"Expected feature maps (N, {channels}, H, W) from the backbone, got {tuple(maps.shape)}: check "
                    "its options (reshape_hidden_states of transformers), or choose other stages."
                )
            if pooling and min(maps.shape[-2:]) < 2:
                raise ValueError(
                    f"Frames of {images.shape[-2]} x {images.shape[-1]} pixels leave a feature map of "
                    f"{maps.shape[-2]} x {maps.shape[-1]}, too small for feature_pooling: use larger frames."
                )
            stages.append(F.max_pool2d(maps, 2) if pooling else maps)
        return tuple(stages)

    def _pool(self, outputs: Tensor, mask: Tensor | None, past: Tensor | None = None) -> Tensor:
        """Average to P x P cells, and repeat the last real frame's features at padding.

        Args:
            outputs: (B, T, D, H, W) outputs of a stack.
            mask: (B, T) False at padding, or None.
            past: (B, F) features before the first frame; None for zeros.

        Returns:
            (B, T, F) features.
        """
        pooled = F.adaptive_avg_pool2d(outputs.flatten(0, 1), self.config.pooled_size)
        pooled = pooled.flatten(1).unflatten(0, outputs.shape[:2])
        if mask is None:
            return pooled
        steps = torch.arange(mask.shape[1], device=mask.device)
        last_real = torch.where(mask, steps, -1).cummax(dim=1).values.unsqueeze(-1)  # (B, T, 1); -1: none
        held = pooled.gather(1, last_real.clamp(min=0).expand_as(pooled))
        past = torch.zeros_like(pooled[:, :1]) if past is None else past.unsqueeze(1)
        return torch.where(last_real >= 0, held, past)


def _order_channels_first(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Put a backbone GroupNorm's input into channels-first memory if it needs no gradient (forward pre-hook).

    Otherwise torch 2.13 crashes in the backward pass of the norm on a CPU, see MinConv2dGRULayer.project.
    """
    images = args[0]
    if images.requires_grad or images.device.type != "cpu" or not torch.is_grad_enabled():
        return None
    return (images.flatten(1).view(images.shape), *args[1:])


def _load_backbone(config: MinConvGRUConfig) -> nn.Module:
    """Build the backbone with new weights; replace timm's errors about missing stages by a clear message."""
    try:
        # Use the dtype of the surrounding layers, even if the config comes from a checkpoint with another dtype.
        return AutoBackbone.from_config(config.backbone_config, dtype=torch.get_default_dtype())
    except (AssertionError, IndexError) as error:
        raise ValueError(
            f"The backbone lacks one of the stages out_indices={config.backbone_config.out_indices}."
        ) from error


class MinConvGRUForVideoClassification(MinConvGRUPreTrainedModel):
    """The video model with a linear classifier on the pooled features of each stage; their logits are averaged.

    Args:
        config: configuration of the model; `num_labels`, `id2label` and `problem_type` work as in any transformers
            model.

    Example:
        >>> model = MinConvGRUForVideoClassification(MinConvGRUConfig(num_labels=6)).eval()
        >>> cache = MinConvGRUCache()
        >>> for frame in torch.randn(10, 1, 1, 3, 112, 112):  # (B, T, C, H, W) each
        ...     logits = model(frame, cache=cache).logits  # for the clip so far
    """

    def __init__(self, config: MinConvGRUConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MinConvGRUModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifiers = nn.ModuleList(nn.Linear(size, config.num_labels) for size in self.model.feature_sizes)
        self.loss_function = classification_loss
        self.post_init()

    @can_return_tuple
    @restores_cache
    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: MinConvGRUCache | None = None,
        use_cache: bool | None = None,
        output_frame_logits: bool = False,
        output_hidden_states: bool | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MinConvGRUVideoClassifierOutput:
        """Classify clips.

        Args:
            pixel_values_videos, attention_mask, cache, use_cache, output_hidden_states, pixel_values: as in
                `MinConvGRUModel.forward`.
            labels: (B,) class ids, -100 to leave a clip out; (B, num_labels) floats for several labels per clip, or
                for regression; (B,) floats for regression with one label.
            output_frame_logits: return logits after every frame too.

        Returns:
            loss (if labels are given), logits (B, num_labels) after the last real frame so far, frame_logits
            (B, T, num_labels) if requested, cache, hidden_states. At padding, frame_logits are those of the last
            real frame before it. The clip logits of a bidirectional model combine the forward features at the last
            frame with the backward features at the first, so they need not equal the logits of any frame.

        Raises:
            ValueError: as in `MinConvGRUModel.forward`, `check_class_ids` and `classification_loss`.
        """
        if labels is not None:
            check_class_ids(labels, self.config)
        outputs = self.model(
            pixel_values_videos=pixel_values_videos,
            attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            pixel_values=pixel_values,
            return_dict=True,
            **kwargs,
        )
        logits = self._classify(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return MinConvGRUVideoClassifierOutput(
            loss=loss,
            logits=logits,
            frame_logits=self._classify(outputs.last_hidden_state) if output_frame_logits else None,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
        )

    def _classify(self, features: Tensor) -> Tensor:
        """(B, *, F of all stages) -> (B, *, num_labels), the mean of the stages' logits."""
        stages = self.dropout(features).split(self.model.feature_sizes, dim=-1)
        logits = [classifier(part) for classifier, part in zip(self.classifiers, stages, strict=True)]
        return torch.stack(logits).mean(dim=0)


# Saving one of these models copies this file and the files it imports next to the weights.
MinConvGRUModel.register_for_auto_class("AutoModel")
MinConvGRUForVideoClassification.register_for_auto_class("AutoModelForVideoClassification")

__all__ = [
    "MinConvGRUCache",
    "MinConvGRUForVideoClassification",
    "MinConvGRUModel",
    "MinConvGRUPreTrainedModel",
]
