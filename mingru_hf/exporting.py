"""The text model with its state as plain tensors, for torch.export and for runtimes that know no cache objects.

    prefill, decode = export_programs(model)
    torch.export.save(prefill, "prefill.pt2")  # runs where neither this package nor transformers is installed

The state is a list: for each block the (B, 1, D) state of the recurrence, float32, and, with a convolution in front,
the (B, taps - 1, E) last inputs of it.

Legend: B batch, T tokens, V vocabulary, D channels of a block's state, E width of its input.
"""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers.cache_utils import DynamicCache


class MinGRUPrefill(nn.Module):
    """Read a prompt: ids -> logits and the state behind them.

    Args:
        model: a MinGRUForCausalLM.
        logits_to_keep: compute logits for this many places at the end only; 0 for all.
    """

    def __init__(self, model: nn.Module, logits_to_keep: int = 0):
        super().__init__()
        self.model = model
        self.logits_to_keep = logits_to_keep

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """input_ids (B, T), attention_mask (B, T) with 0 at padding -> logits (B, T, V), state."""
        cache = DynamicCache(config=self.model.config)
        output = self.model(
            input_ids, attention_mask=attention_mask, cache=cache, use_cache=True, logits_to_keep=self.logits_to_keep
        )
        return output.logits, state_of(cache)


class MinGRUDecode(nn.Module):
    """Read one more token, or several: ids and state -> logits and the state behind them.

    Args:
        model: a MinGRUForCausalLM.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

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
        logits_to_keep: return this many of the prompt's last logits; 0 for all.

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
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    backend, model.config.scan_backend = model.config.scan_backend, "auto"
    batch, steps = Dim("batch", min=1), Dim("steps", min=1)
    ids = torch.zeros((2, 3), dtype=torch.long, device=model.device)  # sizes other than 1, which would be fixed
    try:
        with torch.no_grad():
            prefill_module, decode_module = MinGRUPrefill(model, logits_to_keep), MinGRUDecode(model)
            prefill = torch.export.export(prefill_module, (ids,), dynamic_shapes={"input_ids": {0: batch, 1: steps}})
            _, state = prefill_module(ids)
            decode = torch.export.export(
                decode_module,
                (ids[:, :1].contiguous(), state),  # as users' tokens: compilers read memory by these strides
                dynamic_shapes={"input_ids": {0: batch}, "state": [{0: batch} for _ in state]},
            )
    finally:
        model.config.scan_backend = backend
        for module in in_training:
            module.training = True
    return prefill, decode


__all__ = ["MinGRUDecode", "MinGRUPrefill", "cache_of", "export_programs", "state_of"]
