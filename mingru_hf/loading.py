"""Shared behaviour of this package's models when they are loaded, saved and called."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Self

import torch
from transformers.utils import TransformersKwargs

# Arguments that transformers may pass to any model's forward, that tokenizers return, or that code for older versions
# passes. Any other argument is a mistake of the caller.
_KNOWN_KWARGS = {
    *TransformersKwargs.__annotations__,
    "shift_labels",
    "ignore_index",
    "token_type_ids",
    "special_tokens_mask",
    "offset_mapping",
    "length",
    "cache_position",
}


def refuse_unknown(kwargs: dict) -> None:
    """Raise a TypeError if a forward pass was given an unknown argument that is not None."""
    if _KNOWN_KWARGS.issuperset(kwargs):
        return
    unknown = sorted(name for name, value in kwargs.items() if name not in _KNOWN_KWARGS and value is not None)
    if unknown:
        raise TypeError(f"The model's forward() got unexpected arguments: {', '.join(unknown)}.")


def restores_cache(forward: Callable) -> Callable:
    """Decorate a forward pass so that its `cache` is restored if the pass raises, even a KeyboardInterrupt.

    In compiled code, exceptions are not caught and the cache is not restored.
    """
    index = [*inspect.signature(forward).parameters].index("cache")

    @functools.wraps(forward)
    def restoring(*args, **kwargs):
        cache = args[index] if len(args) > index else kwargs.get("cache")
        if cache is None or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        layers = list(getattr(cache, "layers", ()))
        parts = [part for part in (cache, *layers) if hasattr(part, "snapshot")]
        before = [part.snapshot() for part in parts]
        try:
            return forward(*args, **kwargs)
        except BaseException:
            for part, snapshot in zip(parts, before, strict=True):
                part.restore(snapshot)
            if layers:
                cache.layers[:] = layers
            raise

    return restoring


def _holds_nan(parameter: torch.Tensor) -> bool:
    """Return whether any value is NaN. Checking their sum first is 10 times faster (8-bit types have no sum)."""
    if parameter.dtype.itemsize > 1 and not parameter.sum().isnan():
        return False
    return bool(parameter.isnan().any())  # the sum of inf and -inf is NaN as well


class LoadingMixin:
    """Mixin for a PreTrainedModel: warn about damaged weights, and do not save the code of a user's subclass."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._auto_class = None  # a subclass's file may not be self-contained: saved only if the class is registered

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Self:
        """As in PreTrainedModel, with a warning that names the weights that hold NaN."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        damaged = [
            name
            for name, parameter in model.named_parameters()
            if type(parameter) is torch.nn.Parameter  # quantized weights have types of their own
            and parameter.is_floating_point()
            and parameter.device.type != "meta"
            and _holds_nan(parameter)
        ]
        if damaged:
            warnings.warn(
                f"The weights of this checkpoint contain NaN, and so will the outputs: {', '.join(damaged[:10])}"
                f"{f' and {len(damaged) - 10} more' if len(damaged) > 10 else ''}.",
                stacklevel=2,
            )
        return loaded


__all__ = ["LoadingMixin", "refuse_unknown", "restores_cache"]
