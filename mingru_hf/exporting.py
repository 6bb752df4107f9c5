"""Models with their state as plain tensors, for torch.export and for runtimes without cache objects.

    prefill, decode = export_programs(model)  # of a language model
    program = export_text_classifier(model)  # of a classifier of texts or tokens
    clip, frame = export_video_programs(model, 224)  # of a video classifier
    torch.export.save(prefill, "prefill.pt2")  # runs where neither this package nor transformers is installed

The state is a list of tensors. For a text model it holds, for each block, the state (B, 1, D) of the recurrence in
float32 and, if the block has a convolution, the convolution's last inputs (B, taps - 1, E). For a video model it holds
the state (B, 1, D, H, W) of each recurrent layer in float32.

Legend: B batch, T tokens or frames, V vocabulary, D channels of a state, E width of a block's input, L labels,
(C, H, W) a frame or a feature map.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers.cache_utils import DynamicCache

from .modeling_minconvgru import MinConvGRUCache


class _Exportable(nn.Module):
    """A wrapper around a model whose inputs and outputs are only tensors and lists of tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class MinGRUPrefill(_Exportable):
    """Read a prompt: ids -> logits and the state after them.

    Args:
        model: a MinGRUForCausalLM.
        logits_to_keep: compute logits for this many positions at the end only; 0 for all.
    """

    def __init__(self, model: nn.Module, logits_to_keep: int = 0):
        super().__init__(model)
        self.logits_to_keep = logits_to_keep

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """input_ids (B, T), attention_mask (B, T) with 0 at padding -> logits (B, T, V), state."""
        cache = DynamicCache(config=self.model.config)
        output = self.model(
            input_ids, attention_mask=attention_mask, cache=cache, use_cache=True, logits_to_keep=self.logits_to_keep
        )
        return output.logits, state_of(cache)


class MinGRUDecode(_Exportable):
    """Read one more token, or several: ids and state -> logits and the state after them.

    Args:
        model: a MinGRUForCausalLM.
    """

    def forward(self, input_ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """input_ids (B, 1), state as a prefill or an earlier step returned it -> logits (B, 1, V), state."""
        cache = cache_of(self.model, state)
        output = self.model(input_ids, cache=cache, use_cache=True)
        return output.logits, state_of(cache)


def state_of(cache: DynamicCache) -> list[Tensor]:
    """Return the tensors of a cache that has read at least one token, in the order that `MinGRUDecode` expects."""
    tensors = []
    for layer in cache.layers:
        tensors.append(layer.state)
        if layer.window is not None:
            tensors.append(layer.window)
    return tensors


def cache_of(model: nn.Module, state: list[Tensor]) -> DynamicCache:
    """Return a cache that continues from `state`.

    The number of tokens that led to the state is unknown, and the model does not need it.

    Raises:
        ValueError: if `state` has another number of tensors than the model's state.
    """
    cache = DynamicCache(config=model.config)
    parts = 2 if model.config.conv_kernel else 1
    if len(state) != parts * len(cache.layers):
        raise ValueError(f"The state of this model has {parts * len(cache.layers)} tensors, got {len(state)}.")
    for i, layer in enumerate(cache.layers):
        window = state[parts * i + 1].unsqueeze(1) if parts == 2 else None
        layer.append(state[parts * i], window, num_steps=1)
    return cache


def export_programs(model: nn.Module, *, logits_to_keep: int = 0) -> tuple[ExportedProgram, ExportedProgram]:
    """Export a model as two programs, for the prompt and for a single token, with any batch size and prompt length.

    The recurrence becomes torch's `scan` in the prompt's program and plain arithmetic in the token's, so that neither
    contains an operator of this package. An exported scan runs one step after another; if speed on long prompts
    matters and this package is available, run the model itself.

    Args:
        model: a MinGRUForCausalLM; it is exported in evaluation mode.
        logits_to_keep: return this many of the prompt's last logits; 0 for all. If it is above 1, every prompt must
            be longer than this.

    Returns:
        The prefill, `logits, state = prefill.module()(input_ids)` with input_ids (B, T), and the decoding step,
        `logits, state = decode.module()(input_ids, state)` with input_ids (B, 1).

    Raises:
        ValueError: if the model has no language-model head.
    """
    if not hasattr(model, "lm_head"):
        raise ValueError(
            f"Only a MinGRUForCausalLM can be exported as prefill and step, got a {type(model).__name__}."
        )
    batch, steps = Dim("batch", min=1), Dim("steps", min=1 if logits_to_keep < 2 else logits_to_keep + 1)
    # torch.export would make a size of 1 static, so the example sizes are larger.
    ids = torch.zeros((2, 3 + logits_to_keep), dtype=torch.long, device=model.device)
    with _as_exported(model):
        prefill_module, decode_module = MinGRUPrefill(model, logits_to_keep), MinGRUDecode(model)
        prefill = torch.export.export(prefill_module, (ids,), dynamic_shapes={"input_ids": {0: batch, 1: steps}})
        _, state = prefill_module(ids)
        decode = torch.export.export(
            decode_module,
            # Contiguous, as users' tokens are: compiled programs assume the strides of the example.
            (ids[:, :1].contiguous(), state),
            dynamic_shapes={"input_ids": {0: batch}, "state": [{0: batch} for _ in state]},
        )
    return prefill, decode


class MinGRUClassifier(_Exportable):
    """Classify texts or each of their tokens: ids and mask -> logits.

    Args:
        model: a MinGRUForSequenceClassification or MinGRUForTokenClassification.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids (B, T), attention_mask (B, T) with 0 at padding -> logits (B, L), or (B, T, L) for tokens."""
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


def export_text_classifier(model: nn.Module) -> ExportedProgram:
    """Export a classifier of texts or tokens, with any batch size and length; otherwise as `export_programs`.

    Args:
        model: a MinGRUForSequenceClassification or MinGRUForTokenClassification; it is exported in evaluation mode.

    Returns:
        The program, `logits = program.module()(input_ids, attention_mask)`.

    Raises:
        ValueError: if the model is not such a classifier.
    """
    if not hasattr(model, "score"):
        raise ValueError(
            "Only a MinGRUForSequenceClassification or MinGRUForTokenClassification can be exported as a classifier, "
            f"got a {type(model).__name__}."
        )
    sizes = {0: Dim("batch", min=1), 1: Dim("steps", min=1)}
    ids = torch.zeros((2, 3), dtype=torch.long, device=model.device)
    with _as_exported(model):
        return torch.export.export(
            MinGRUClassifier(model),
            (ids, torch.ones_like(ids)),
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        )


class MinConvGRUClip(_Exportable):
    """Read the first frames of a clip, or all of it: frames -> logits and the state after them.

    Args:
        model: a MinConvGRUForVideoClassification.
    """

    def forward(self, frames: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """frames (B, T, C, H, W), attention_mask (B, T) with 0 at padding -> logits (B, L), state.

        For a bidirectional model, which cannot continue from a state, the list is empty.
        """
        cache = None if self.model.config.bidirectional else MinConvGRUCache()
        output = self.model(frames, attention_mask=attention_mask, cache=cache)
        return output.logits, [] if cache is None else cache.states


class MinConvGRUFrame(_Exportable):
    """Read one more frame, or several: frames and state -> logits for the clip so far and the new state.

    Args:
        model: a MinConvGRUForVideoClassification.
    """

    def forward(self, frames: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """frames (B, 1, C, H, W), state as a clip or an earlier frame returned it -> logits (B, L), state."""
        cache = MinConvGRUCache()
        # The model reads cached features only at padding, and there is none, so zeros suffice.
        features = frames.new_zeros(frames.shape[0], sum(self.model.model.feature_sizes))
        cache.update(state, features, num_frames=1)
        output = self.model(frames, cache=cache)
        return output.logits, cache.states


def export_video_programs(
    model: nn.Module, frame_size: int | tuple[int, int]
) -> tuple[ExportedProgram, ExportedProgram | None]:
    """Export a video classifier as two programs, for a clip and for a single frame, with any batch size and length.

    As in `export_programs`, they contain no operator of this package.

    Args:
        model: a MinConvGRUForVideoClassification; it is exported in evaluation mode.
        frame_size: height and width of the frames in pixels, or one number for both.

    Returns:
        The clip program, `logits, state = clip.module()(frames)` with frames (B, T, C, H, W), and the frame program,
        `logits, state = frame.module()(frames, state)` with frames (B, 1, C, H, W), both as the video processor
        returns them. The second is None for a bidirectional model, which can read only whole clips.

    Raises:
        ValueError: if the model is not a video classifier, frame_size is not one or two positive numbers, or the
            frames are too small for the model.
    """
    if not hasattr(model, "classifiers"):
        raise ValueError(
            f"Only a MinConvGRUForVideoClassification can be exported as clip and frame, got a {type(model).__name__}."
        )
    sizes = (frame_size, frame_size) if isinstance(frame_size, int) else tuple(frame_size)
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"frame_size must be a positive number of pixels or (height, width), got {frame_size!r}.")
    channels = getattr(model.config.backbone_config, "num_channels", 3)
    batch, steps = Dim("batch", min=1), Dim("steps", min=1)
    frames = torch.zeros((2, 3, channels, *sizes), dtype=model.dtype, device=model.device)
    with _as_exported(model):
        clip_module, frame_module = MinConvGRUClip(model), MinConvGRUFrame(model)
        _, state = clip_module(frames)  # before the export, so that the model's own errors are raised
        clip = torch.export.export(clip_module, (frames,), dynamic_shapes={"frames": {0: batch, 1: steps}})
        if model.config.bidirectional:
            return clip, None
        frame = torch.export.export(
            frame_module,
            (frames[:, :1].contiguous(), state),
            dynamic_shapes={"frames": {0: batch}, "state": [{0: batch} for _ in state]},
        )
    return clip, frame


@contextlib.contextmanager
def _as_exported(model: nn.Module) -> Iterator[None]:
    """Put the model temporarily into evaluation mode, without gradients or options that would alter the program."""
    in_training = [module for module in model.modules() if module.training]
    options = {"scan_backend": "auto", "backbone_chunk_size": None}  # chunks would fix the batch size
    before = {name: getattr(model.config, name) for name in options if hasattr(model.config, name)}
    # In torch 2.15, the guards of functions compiled earlier leak into the program's constraints. After this reset,
    # those functions are compiled again when they are next called.
    torch.compiler.reset()
    model.eval()
    try:
        for name in before:
            setattr(model.config, name, options[name])
        with torch.no_grad():
            yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
        for module in in_training:
            module.training = True


__all__ = [
    "MinConvGRUClip",
    "MinConvGRUFrame",
    "MinGRUClassifier",
    "MinGRUDecode",
    "MinGRUPrefill",
    "cache_of",
    "export_programs",
    "export_text_classifier",
    "export_video_programs",
    "state_of",
]
