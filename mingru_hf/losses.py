"""Losses of the heads: next-token prediction without all logits in memory at once, and classification.

Legend: N rows (tokens), E width of the head's input, V vocabulary, B rows of the batch, L labels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_tracing

from .linear import linear
from .observers import in_transform

# At most this many logits exist at a time on a CPU. With a vocabulary of 50,257, the logits of all tokens would be by
# far the largest tensors of a small model's training step; with a few hundred characters, a piece is the whole batch.
PIECE_ELEMENTS = 2**23
# More on other devices (256 MB in float32): a piece takes a dozen kernel launches, and reads and writes the whole
# gradient of the head.
DEVICE_PIECE_ELEMENTS = 2**26
# In float16, sum at most this many rows at a time, and divide inputs by a power of 2 first: inputs below 255 cannot
# overflow, and inputs down to 0.001 keep full precision.
_HALF_ROWS, _HALF_SCALE = 4096, 16.0


def head_loss(
    hidden_states: Tensor,
    head: nn.Linear,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """Compute the mean cross-entropy of the next tokens, as `ForCausalLMLoss` does on `head(hidden_states)`.

    Loss and gradients equal those of transformers' `ForCausalLMLoss` up to rounding: matrix products run in autocast's
    dtype, the rest in float32. The gradients are computed along with the loss, so that the logits of each piece are
    computed only once. Gradients that are to be differentiated again (`create_graph`) are recomputed from all logits
    at once.

    Args:
        hidden_states: (B, T, E) inputs of the head.
        head: its weight (V, E), and its bias (V,) if it has one.
        labels: (B, T) token ids, predicted one position earlier; `ignore_index` leaves a position out.
        num_items_in_batch: number to divide the sum by. None: the number of positions that are not left out.
        ignore_index: label of the positions to leave out.
        shift_labels: (B, T) labels that are already shifted to the positions that predict them, instead of `labels`.
        **kwargs: ignored; callers pass all losses the same arguments.

    Returns:
        () float32, nats per token.

    Raises:
        ValueError: if the labels do not fit the hidden states.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"labels have the shape {tuple(shift_labels.shape)}, expected {tuple(hidden_states.shape[:-1])}: one "
            "label for each position that is passed to the head."
        )
    target = shift_labels.reshape(-1).to(hidden_states.device, torch.long)
    device = _autocast_device(hidden_states)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    loss = _HeadLoss.apply(rows, head.weight, head.bias, target, ignore_index, dtype, torch.is_grad_enabled())
    if num_items_in_batch is not None:
        return _share(loss, num_items_in_batch)
    count = (target != ignore_index).sum()
    # As in torch, the mean of no losses is NaN and its gradients are 0; an infinite factor would make these NaN.
    return torch.where(count > 0, loss / count.clamp(min=1), torch.nan)


def _share(loss: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """Return this batch's share of the mean over `num_items_in_batch`: its sum of losses () divided by that."""
    return loss / (num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


def _autocast_device(tensor: Tensor) -> str:
    """Return the device type to ask autocast about: "cpu" for "meta" tensors, whose type autocast does not know."""
    return "cpu" if tensor.is_meta else tensor.device.type


def _cross_entropies(logits: Tensor, index: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor | None]:
    """Return float32 cross-entropies (n, 1) of the targets (n, 1), and their gradients (n, V); may alter `logits`."""
    if logits.is_cpu:
        p = logits.float()
        chosen = p.gather(1, index)
        top = p.amax(1, keepdim=True)
        total = p.sub_(top).exp_().sum(1, keepdim=True)
        losses = total.log() + top - chosen
        p = p.div_(total) if with_gradients else None
    else:  # on other devices memory traffic takes the time, and exponentials are free
        p = logits.log_softmax(1, dtype=torch.float32)
        losses = -p.gather(1, index)
        p = p.exp_() if with_gradients else None
    return losses, None if p is None else p.scatter_add_(1, index, p.new_full((), -1.0).expand(p.shape[0], 1))


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies, and its gradients with respect to rows, weight and bias."""

    @staticmethod
    def forward(ctx, rows, weight, bias, target, ignore_index, dtype, with_grad):
        need_rows, need_weight, need_bias = (with_grad and need for need in ctx.needs_input_grad[:3])
        counts = target != ignore_index
        index = torch.where(counts, target, 0).unsqueeze(1)  # (N, 1)
        counts = counts.unsqueeze(1)
        x, w = rows.to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)  # dtype of sums over pieces
        loss = rows.new_zeros((), dtype=torch.float32)
        rows_grad = torch.empty_like(rows, dtype=_held(rows)) if need_rows else None
        weight_grad = torch.zeros_like(weight, dtype=exact) if need_weight else None
        bias_grad = torch.zeros_like(bias, dtype=exact) if need_bias else None
        size = max(1, (PIECE_ELEMENTS if weight.device.type == "cpu" else DEVICE_PIECE_ELEMENTS) // weight.shape[0])
        with torch.autocast(_autocast_device(rows), enabled=False):
            for start in range(0, rows.shape[0], size):
                piece = slice(start, start + size)
                with_gradients = need_rows or need_weight or need_bias
                losses, p = _cross_entropies(linear(x[piece], w, b), index[piece], with_gradients)
                loss += (losses * counts[piece]).sum()
                if p is None:
                    continue
                p.mul_(counts[piece])  # now the gradients of the logits
                if need_bias:
                    bias_grad += p.sum(0)
                p = p.to(dtype)
                if need_rows:
                    rows_grad[piece] = linear(p, w.t())
                if need_weight and dtype == exact:
                    weight_grad.addmm_(p.t(), x[piece])
                elif need_weight and dtype == torch.float16:
                    # A sum over many rows may exceed the range of float16.
                    for part, x_part in zip(p.split(_HALF_ROWS), x[piece].split(_HALF_ROWS), strict=True):
                        weight_grad.add_(part.t() @ (x_part / _HALF_SCALE), alpha=_HALF_SCALE)
                elif need_weight:
                    weight_grad += p.t() @ x[piece]
                del p  # before the next logits are computed
        ctx.save_for_backward(
            rows_grad,
            None if weight_grad is None else weight_grad.to(_held(weight)),
            None if bias_grad is None else bias_grad.to(_held(bias)),
            *(rows, weight, bias, target),
        )
        ctx.ignore_index, ctx.dtype = ignore_index, dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        *grads, rows, weight, bias, target = ctx.saved_tensors
        inputs = rows, weight, bias
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            needed = ctx.needs_input_grad[:3]
            grads = _differentiable_gradients(grad, inputs, needed, target, ctx.ignore_index, ctx.dtype)
        else:
            grads = (
                None if g is None else (g * grad.to(g.dtype)).to(tensor.dtype)
                for g, tensor in zip(grads, inputs, strict=True)
            )
        return *grads, None, None, None, None


def _differentiable_gradients(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    needed: tuple[bool, ...],
    target: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> list[Tensor | None]:
    """Return gradients of the summed cross-entropies for rows, weight and bias that autograd can differentiate."""
    # Views, since the rows may have been computed from a tied weight, and gradients by that path must not be included.
    rows, weight, bias = inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    with torch.autocast(_autocast_device(rows), enabled=False):
        logits = F.linear(rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).float()
        loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        grads = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return [next(grads) if need else None for need in needed]


def _held(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a gradient before it is divided by the number of tokens, which float16 may not hold."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def check_class_ids(labels: Tensor, config: PreTrainedConfig) -> None:
    """Raise a ValueError for class ids that are out of range, before a model runs and advances its state.

    Class ids on a GPU are not checked, since this would make the CPU wait; there they cause a device-side assertion,
    as usual in PyTorch.

    Args:
        labels: as in `classification_loss`; labels that are not class ids are not checked.
        config: configuration of the model.

    Raises:
        ValueError: if a class id is out of range.
    """
    if is_tracing(labels) or in_transform() or labels.device.type != "cpu" or labels.numel() == 0:
        return
    are_class_ids = config.problem_type in (None, "single_label_classification") and config.num_labels > 1
    if not are_class_ids or labels.is_floating_point():
        return
    low, high = labels.where(labels != -100, 0).aminmax()
    if low < 0 or high >= config.num_labels:
        raise ValueError(
            f"Labels must lie between 0 and {config.num_labels - 1} (or be -100), got {low.item()} to {high.item()}."
        )


def classification_loss(
    labels: Tensor,
    pooled_logits: Tensor,
    config: PreTrainedConfig,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs,
) -> Tensor:
    """Compute the loss of a classifier of whole rows or clips, as transformers' `ForSequenceClassificationLoss` does.

    `ForSequenceClassificationLoss` ignores `num_items_in_batch` for regression and multi-label classification, so that
    their losses are n times too large if gradients are accumulated over n batches. This function always divides by it.

    Args:
        labels: (B,) class ids, -100 to leave a row out; (B, L) floats for multi-label classification or regression;
            (B,) floats for regression with L = 1.
        pooled_logits: (B, L).
        config: configuration of the model; its `problem_type` is filled in if it is None.
        num_items_in_batch: number of items in all the micro-batches of an update, as a trainer counts them. The sum is
            divided by it, so that the losses of the micro-batches add up to the mean. None: the mean of this batch.
        **kwargs: ignored; callers pass all losses the same arguments.

    Returns:
        () float32 or wider.

    Raises:
        ValueError: if the problem type is unknown, or if the labels for regression or multi-label classification do
            not fit the logits.
    """
    if config.problem_type is None:
        if pooled_logits.shape[-1] == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    logits = pooled_logits.to(torch.promote_types(pooled_logits.dtype, torch.float32))
    labels = labels.to(logits.device)
    if config.problem_type == "regression":
        loss, arguments = F.mse_loss, (logits.squeeze(), labels.to(logits.dtype).squeeze())
    elif config.problem_type == "single_label_classification":
        loss, arguments = F.cross_entropy, (logits, labels.view(-1).long())
    elif config.problem_type == "multi_label_classification":
        loss, arguments = F.binary_cross_entropy_with_logits, (logits, labels.to(logits.dtype))
    else:
        raise ValueError(
            "config.problem_type must be 'regression', 'single_label_classification', 'multi_label_classification' "
            f"or None, got {config.problem_type!r}."
        )
    if loss is not F.cross_entropy and not is_tracing(labels) and arguments[0].shape != arguments[1].shape:
        raise ValueError(  # else they would be broadcast
            f"labels for {config.problem_type} have the shape {tuple(labels.shape)}, expected {tuple(logits.shape)}."
        )
    if num_items_in_batch is None:
        return loss(*arguments)
    return _share(loss(*arguments, reduction="sum"), num_items_in_batch)


__all__ = ["check_class_ids", "classification_loss", "head_loss"]
