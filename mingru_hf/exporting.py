"""The models with their state as plain tensors, for torch.export and for runtimes that know no cache objects.

    prefill, decode = export_programs(model)  # of a language model
    program = export_text_classifier(model)  # of a classifier of texts or tokens
    clip, frame = export_video_programs(model, 224)  # of a video classifier
    torch.export.save(prefill, "prefill.pt2")  # runs where neither this package nor transformers is installed

The state is a list. Of a text model: for each block the (B, 1, D) state of the recurrence, float32, and, with a
convolution in front, the (B, taps - 1, E) last inputs of it. Of a video model: for each recurrent layer its state
(B, 1, D, H, W), float32.

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
    """A model under a signature of tensors and lists of them alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class MinGRUPrefill(_Exportable):
    """Read a prompt: ids -> logits and the state behind them.

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
    """Read one more token, or several: ids and state -> logits and the state behind them.

    Args:
        model: a MinGRUForCausalLM.
    """

    def forward(self, input_ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """input_ids (B, 1), state as a prefill or an earlier step returned it -> logits (B, 1, V), state."""
        cache = cache_of(self.model, state)
        output = self.model(input_ids, cache=cache, use_cache=True)
        return output.logits, state_of(cache)


def state_of(cache: DynamicCache) -> list[Tensor]:
    """The tensors of a cache that has read at least one token, in the order that `MinGRUDecode` takes."""
    tensors = []
    for layer in cache.layers:
        tensors.append(layer.state)
        if layer.window is not None:
            tensors.append(layer.window)
    return tensors


def cache_of(model: nn.Module, state: list[Tensor]) -> DynamicCache:
    """A cache that continues from `state`; how many tokens are behind it is not known, and the model does not need it.

    Raises:
        ValueError: if the number of tensors is not that of the model's state.
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

    The recurrence of the prompt becomes torch's `scan` and that of the token plain arithmetic, so that neither holds
    an operator of this package. An exported scan runs step after step; where speed on long prompts counts and the
    package is at hand, run the model itself.

    Args:
        model: a MinGRUForCausalLM; it is exported as it is in evaluation.
        logits_to_keep: return this many of the prompt's last logits; 0 for all. With more than 1, every prompt must
            be longer than that.

    Returns:
        The prefill, `logits, state = prefill.module()(input_ids)`, and the step, `logits, state =
        decode.module()(input_ids, state)`, with input_ids (B, T) and (B, 1).

    Raises:
        ValueError: if the model has no language-model head.
    """
    if not hasattr(model, "lm_head"):
        raise ValueError(
            f"Only a MinGRUForCausalLM can be exported as prefill and step, got a {type(model).__name__}."
        )
    batch, steps = Dim("batch", min=1), Dim("steps", min=1 if logits_to_keep < 2 else logits_to_keep + 1)
    # Sizes other than 1, which would be fixed.
    ids = torch.zeros((2, 3 + logits_to_keep), dtype=torch.long, device=model.device)
    with _as_exported(model):
        prefill_module, decode_module = MinGRUPrefill(model, logits_to_keep), MinGRUDecode(model)
        prefill = torch.export.export(prefill_module, (ids,), dynamic_shapes={"input_ids": {0: batch, 1: steps}})
        _, state = prefill_module(ids)
        decode = torch.export.export(
            decode_module,
            (ids[:, :1].contiguous(), state),  # as users' tokens: compilers read memory by these strides
            dynamic_shapes={"input_ids": {0: batch}, "state": [{0: batch} for _ in state]},
        )
    return prefill, decode


class MinGRUClassifier(_Exportable):
    """Classify texts or their tokens: ids and mask -> logits.

    Args:
        model: a MinGRUForSequenceClassification or MinGRUForTokenClassification.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids (B, T), attention_mask (B, T) with 0 at padding -> logits (B, L), or (B, T, L) of tokens."""
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


def export_text_classifier(model: nn.Module) -> ExportedProgram:
    """Export a classifier of texts or tokens, with any batch size and length; as in `export_programs` otherwise.

    Args:
        model: a MinGRUForSequenceClassification or MinGRUForTokenClassification; it is exported as it is in
            evaluation.

    Returns:
        `logits = program.module()(input_ids, attention_mask)`.

    Raises:
        ValueError: if the model is no such classifier.
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
    """Read the first frames of a clip, or all of it: frames -> logits and the state behind them.

    Args:
        model: a MinConvGRUForVideoClassification.
    """

    def forward(self, frames: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """frames (B, T, C, H, W), attention_mask (B, T) with 0 at padding -> logits (B, L), state.

        A bidirectional model has no state to go on from: the list is empty.
        """
        cache = None if self.model.config.bidirectional else MinConvGRUCache()
        output = self.model(frames, attention_mask=attention_mask, cache=cache)
        return output.logits, [] if cache is None else cache.states


class MinConvGRUFrame(_Exportable):
    """Read one more frame, or several: frames and state -> logits for the clip so far and the state behind them.

    Args:
        model: a MinConvGRUForVideoClassification.
    """

    def forward(self, frames: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """frames (B, 1, C, H, W), state as a clip or an earlier frame returned it -> logits (B, L), state."""
        cache = MinConvGRUCache()
        # Features are looked at where a frame is padding, and none is.
        features = frames.new_zeros(frames.shape[0], sum(self.model.model.feature_sizes))
        cache.update(state, features, num_frames=1)
        output = self.model(frames, cache=cache)
        return output.logits, cache.states


def export_video_programs(
    model: nn.Module, frame_size: int | tuple[int, int]
) -> tuple[ExportedProgram, ExportedProgram | None]:
    """Export a video classifier as two programs, for a clip and for a single frame, with any batch size and length.

    As in `export_programs`, they hold no operator of this package.

    Args:
        model: a MinConvGRUForVideoClassification; it is exported as it is in evaluation.
        frame_size: height and width of the frames in pixels, or one number for both.

    Returns:
        The clip's, `logits, state = clip.module()(frames)`, and the frame's, `logits, state = frame.module()(frames,
        state)`, with frames (B, T, C, H, W) and (B, 1, C, H, W) as the video processor returns them; None in place
        of the frame's for a bidirectional model, which reads whole clips alone.

    Raises:
        ValueError: if the model is no video classifier, frame_size is not one or two positive numbers, or the frames
            are too small for the model.
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
        _, state = clip_module(frames)  # first of all, for errors of the model's own
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
    """In evaluation, without gradients, and without options that would show in a program."""
    in_training = [module for module in model.modules() if module.training]
    options = {"scan_backend": "auto", "backbone_chunk_size": None}  # pieces of a batch fix its size
    before = {name: getattr(model.config, name) for name in options if hasattr(model.config, name)}
    # In torch 2.15, guards of what was compiled before get into a program's constraints. All compile anew after this.
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
