"""AdamW with weight decay on matrices only, and the learning rate as a pure function of step and time."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import get_scheduler

from .arguments import SetupError, TrainArguments


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split trainable parameters into those with weight decay (two or more axes) and those without (norms, biases).

    Args:
        model: the module whose parameters are split; a tied parameter appears once.
        weight_decay: AdamW's coefficient for the first group.

    Returns:
        Two groups for `torch.optim`, the second with `weight_decay` 0; an empty one is left out.
    """
    decay, keep = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 else keep).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, args: TrainArguments) -> torch.optim.AdamW:
    """Make AdamW over `parameter_groups`, with the fused kernel if torch has one for the model's device.

    Raises:
        ValueError: if no parameter is trainable.
    """
    groups = parameter_groups(model, args.weight_decay)
    if not groups:
        raise ValueError("the model has no trainable parameter")
    fused = all(p.device.type in ("cpu", "cuda", "xpu") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), fused=fused)


def make_warmup(args: TrainArguments, max_steps: int | None) -> Callable[[int, float], float]:
    """Make `warmup(step, progress)`, the completed fraction of the warm-up in the update after `step` updates.

    The warm-up takes `args.warmup_steps(max_steps)` steps. A run limited by `max_train_seconds` does not know its
    number of steps in advance; in such a run, a warm-up of default length ends after a tenth of the run at the latest.

    Args:
        args: provides schedule, warm-up and duration.
        max_steps: total number of updates; None: only the duration is known.
    """
    num_steps = args.warmup_steps(max_steps)
    may_end_early = args.max_train_seconds is not None and args.num_warmup_steps is None

    def warmup(step: int, progress: float) -> float:
        share = (step + 1) / (num_steps + 1)
        return min(1.0, max(share, 10 * progress) if may_end_early else share)

    return warmup


def make_schedule(args: TrainArguments, max_steps: int | None) -> Callable[[int, float], float]:
    """Make `rate(step, progress)`, the learning rate for the update after `step` updates.

    A run of known length follows transformers' schedule step by step. A run of known duration (`max_train_seconds`)
    follows the schedule as a function of `progress`, the completed fraction of the run, multiplied by the warm-up of
    `make_warmup`. The schedule has no state: a resumed run needs only its step and its progress.

    Args:
        args: provides peak rate, schedule and warm-up.
        max_steps: total number of updates; None: only the duration is known.

    Raises:
        SetupError: if the schedule rejects `lr_scheduler_kwargs`.
    """
    by_time = args.max_train_seconds is not None
    length = 1000 if by_time else max_steps  # by time: in thousandths of the run
    warmup = make_warmup(args, max_steps)
    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            dummy,
            num_warmup_steps=0 if by_time else args.warmup_steps(max_steps),
            num_training_steps=length,
            scheduler_specific_kwargs=args.scheduler_kwargs(),
        )
    except (TypeError, ValueError) as error:
        raise SetupError(f"lr_scheduler_type {args.lr_scheduler_type}: {error}") from None
    factor = schedule.lr_lambdas[0]

    def rate(step: int, progress: float) -> float:
        if not by_time:
            return args.learning_rate * factor(step)
        return args.learning_rate * warmup(step, progress) * factor(length * progress)

    return rate
