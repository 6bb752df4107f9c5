"""The training loop, to be read from top to bottom: `start`, `train` and its `_Run`, `evaluate`, then their helpers.

A step is one update of the weights. It uses the next `batch x accumulation x processes` examples of an endless
stream: the shuffled epochs, one after another. For a given number of examples per step, the examples of step n depend
only on the seed and n, whether they come as one batch, as accumulated batches or from several processes. The learning
rate is also a function of the step (or of the elapsed time). A run that resumes from a checkpoint therefore needs only
the step, the weights, the optimizer's moments and the random state of dropout. It then does exactly what an
uninterrupted run does, bit for bit on a CPU.
"""

import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import os
import random
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, gather_object
from accelerate.utils import set_seed as set_process_seed
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .arguments import SetupError, TrainArguments, as_settings, fixed_settings
from .checkpoints import (
    METRICS_FILE,
    STATE_FILE,
    check_output_dir,
    check_tokenizer_files,
    check_writable,
    find_checkpoint,
    lock_output_dir,
    read_checkpoint,
    restore_best,
    save_pretrained,
    unlock_output_dir,
    write_checkpoint,
    write_json,
)
from .hub import make_repository, push_directory
from .memory import keep_freed_memory
from .model_card import may_be_rewritten, write_model_card
from .models import load_pretrained, pad_token_id, prompt_ids, read_config_file
from .optim import make_optimizer, make_schedule, make_warmup
from .plots import plot_loss

Metric = Callable[[torch.Tensor, torch.Tensor], float | torch.Tensor]

_DIVERGED = "lower learning_rate, or set mixed_precision to no"
_SAME_DATA = "resume with the original data and tokenizer, or start again in another output_dir"


@dataclass
class Progress:
    """How far a run has come; part of every checkpoint."""

    patience: int | None = None  # evaluations without a better loss that remain before the run stops
    step: int = 0
    epoch: float | None = 0.0  # None for a stream
    tokens: int = 0  # or frames
    seconds: float = 0.0  # since the start, without interruptions
    pauses: float = 0.0  # the part of `seconds` spent on evaluations and checkpoints; the rest is training
    warmup_steps: int = 0  # steps of the warm-up so far
    tenths: int = 0  # tenths of the run that were complete at the last evaluation
    logged_step: int = 0
    best: dict | None = None
    history: list[dict] = field(default_factory=list)

    @property
    def position(self) -> dict:
        """The fields with which every record of `history` begins."""
        return {"step": self.step, "epoch": self.epoch, "seconds": round(self.seconds, 2)}

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds - self.pauses, 1e-9)


@dataclass(frozen=True)
class _Plan:
    """How long a run is, and how often it saves a checkpoint."""

    num_examples: int | None  # per epoch; None for a stream
    examples_per_step: int
    max_steps: int | None
    max_seconds: float | None
    checkpoint_every: int | None  # steps

    @classmethod
    def of(cls, args: TrainArguments, num_examples: int | None, num_processes: int) -> "_Plan":
        examples_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
        max_steps = args.max_train_steps
        if max_steps is None and args.max_train_seconds is None:
            max_steps = math.ceil(args.num_train_epochs * num_examples / examples_per_step)
        checkpoint_every = None
        if args.checkpointing_steps == "epoch":
            checkpoint_every = math.ceil(num_examples / examples_per_step)
        elif args.checkpointing_steps is not None:
            checkpoint_every = int(args.checkpointing_steps)
        return cls(num_examples, examples_per_step, max_steps, args.max_train_seconds, checkpoint_every)

    def __str__(self) -> str:
        limits = [] if self.max_steps is None else [f"{self.max_steps:,} optimizer steps"]
        limits += [] if self.max_seconds is None else [f"{self.max_seconds:,.0f} s"]
        return f"{' or '.join(limits)}, {self.examples_per_step:,} examples a step"

    def fraction(self, step: int, seconds: float) -> float:
        """Return the completed fraction of the run, by the limit (steps or seconds) that is closer."""
        by_step = 0.0 if self.max_steps is None else step / self.max_steps
        return max(by_step, 0.0 if self.max_seconds is None else seconds / self.max_seconds)

    def epoch(self, step: int) -> float | None:
        """Return the number of epochs that `step` steps amount to; None for a stream."""
        return None if self.num_examples is None else round(step * self.examples_per_step / self.num_examples, 4)


def start(args: TrainArguments, settings: Sequence[object] = ()) -> Accelerator:
    """Set up device, processes, precision, trackers and seed; call this before creating the data and the model.

    From then until the end of `train`, or of the process, no other run can write into `output_dir`.

    Args:
        args: how to train; with `push_to_hub`, `hub_model_id` becomes the repository's full name.
        settings: as for `train`.

    Raises:
        ValueError: if `output_dir` holds another run, is being written to by another run or is not writable,
            `resume_from_checkpoint` is not a complete checkpoint, the device does not support the precision, the
            tracker is not installed, or the launcher's way of distributing the model is not supported.
        OSError: with `push_to_hub`, if the user is not logged in, or the Hub refuses or cannot be reached.
    """
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision=resolve_mixed_precision(args.mixed_precision, args.use_cpu),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to or "tensorboard" if args.with_tracking else None,
        project_dir=args.output_dir,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU: on a CPU use bf16 or no")
    if args.with_tracking and not accelerator.log_with:
        raise ValueError(f"the tracker {args.report_to or 'tensorboard'} is not installed: install it with pip")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"{accelerator.distributed_type.value} is not supported: this loop trains on CPUs or CUDA GPUs with the "
            "whole model in every process (DDP). Change the launcher's configuration, or use transformers' Trainer"
        )
    if accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        warnings.warn(
            "The launcher was asked for several processes but started only one (as `accelerate launch --cpu` does): "
            "use torchrun --nproc_per_node N, or accelerate launch --multi_gpu --num_processes N, with --use_cpu.",
            stacklevel=2,
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.is_main_process:
        check_writable(args.output_dir)  # fail now, not after the data have been prepared
        lock_output_dir(args.output_dir)
    accelerator.wait_for_everyone()  # output_dir is locked: its content no longer changes
    try:
        check_output_dir(
            args.output_dir, args.overwrite_output_dir, args.resume_from_checkpoint, as_settings(args, *settings)
        )
        if args.push_to_hub and accelerator.is_main_process:
            # A missing login must fail now, not after hours of training.
            args.hub_model_id = make_repository(args.hub_name)
    except (ValueError, OSError):
        unlock_output_dir(args.output_dir)
        raise
    accelerator.wait_for_everyone()  # every process has checked output_dir before any of them writes there
    set_seed(args.seed)
    return accelerator


def train(
    model: PreTrainedModel,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    args: TrainArguments,
    accelerator: Accelerator,
    *,
    processing_class: object | None = None,
    collate_fn: Callable[[list], dict] | None = None,
    metrics: dict[str, Metric] | None = None,
    settings: Sequence[object] = (),
    checksums: tuple[int | None, int | None] = (None, None),
    characters_per_token: float | None = None,
    unit: str = "token",
    dataset_name: str = "custom data",
    task: str | None = None,
    auto_class: str = "AutoModel",
) -> dict:
    """Train a model, keep its best weights in `args.output_dir`, and evaluate the saved weights.

    Writes config, weights, tokenizer, README.md, metrics.json and loss.png (main process only). A resumed run keeps a
    README.md that the user has edited, unless `args.overwrite_output_dir` is set. On return the model has its best
    weights, which every process reads from `output_dir`: several machines must share this directory. 16-bit weights
    are first converted to float32, since rounding would lose most updates; `mixed_precision` only sets the precision
    of the matrix products.

    Args:
        model: a PreTrainedModel that returns `.loss`, a mean over targets, and `.logits`.
        train_dataset: a map-style dataset whose items are dicts of tensors of equal shapes; `labels` default to
            `input_ids`. Or an endless torch `IterableDataset` of such items that yields the same ones every time:
            every process reads all of it and takes its share. A step follows the gradient of the mean loss over
            all targets of its batches, across accumulation and processes: every target (a token's label other than
            -100) has the same weight, however many targets its batch has.
        eval_dataset: a map-style dataset for validation.
        args: how to train.
        accelerator: from `start(args)`.
        processing_class: tokenizer or processor to save with the weights.
        collate_fn: makes a batch from a list of items; default: stacks tensors.
        metrics: name -> f(logits, labels), a mean over targets; reported as `eval_NAME`.
        settings: the script's other arguments, as dataclasses made with `option`. They are recorded with `args`; the
            fixed ones must equal those of the checkpoint.
        checksums: checksums of the training and the validation data; None where unknown. A run refuses to resume on
            different training data; if the validation data differ, the best weights so far are evaluated again.
        characters_per_token: average over the validation text, to report nats per character.
        unit: what one target belongs to: token, or clip (the speed is then given in frames).
        dataset_name, task, auto_class: for the model card.

    Returns:
        The content of metrics.json: `arguments` (including `settings`), `data_settings` (the fixed ones of
        `settings`), `parameters`, `examples_per_step`, `num_warmup_steps` (with `max_train_seconds`, those taken so
        far), `mixed_precision`, `history` (records of `step`, `epoch`, `seconds` and `loss` or `eval_*`), `step`,
        `epoch`, `train_seconds`, `tokens_per_second` or, for clips, `frames_per_second` (both without the time for
        evaluations and checkpoints), `best` (a record) and `final` (`eval_*` of the saved weights on all of
        `eval_dataset`). Losses are in nats per target.

    Raises:
        SetupError: if a dataset is empty, a stream is combined with epochs or data loader workers, the schedule
            rejects its arguments, files of another tokenizer in `output_dir` would be loaded with the new one, or the
            checkpoint belongs to another run or has a different vocabulary, labels, processor or model.
        ValueError: if no parameter is trainable, or the validation set has no target.
        FloatingPointError: if the loss or a weight is no longer finite.
        OSError: if the disk is full, or the Hub cannot be reached.
    """
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(unlock_output_dir, args.output_dir)
        _check_data(args, train_dataset, eval_dataset)
        if args.resume_from_checkpoint is None:
            check_tokenizer_files(args.output_dir, processing_class)
        at_the_end.enter_context(_undo_wrapping(model))
        run = _Run(
            model,
            train_dataset,
            eval_dataset,
            args,
            accelerator,
            processing_class=processing_class,
            collate_fn=collate_fn,
            metrics=metrics,
            settings=settings,
            checksums=checksums,
            characters_per_token=characters_per_token,
            unit=unit,
        )
        run.begin()
        while not run.is_over:
            run.update_weights()
            evaluation_due, checkpoint_due = run.update_progress()
            run.log_training_loss()
            with run.pause():
                if evaluation_due:
                    run.evaluate_and_save_best()
                if checkpoint_due or (run.has_stopped_early and run.plan.checkpoint_every is not None):
                    run.save_checkpoint()
        return run.finish(dataset_name, task, auto_class)


@contextlib.contextmanager
def _undo_wrapping(model: PreTrainedModel) -> Iterator[None]:
    """Undo, when the block ends, Accelerate's wrapping of the model's forward and a run's gradient checkpointing.

    accelerator.unwrap_model() would also remove the decorators of the model's own forward.
    """
    own_forward = {name: value for name, value in vars(model).items() if name == "forward"}
    had_checkpointing = model.is_activation_checkpointing
    try:
        yield
    finally:
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)
        vars(model).update(own_forward)
        if model.is_activation_checkpointing and not had_checkpointing:
            model.activation_checkpointing_disable()


class _Run:
    """The state of one call of `train`: its arguments, the values derived from them, and its progress."""

    def __init__(
        self,
        model: PreTrainedModel,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        args: TrainArguments,
        accelerator: Accelerator,
        *,
        processing_class: object | None,
        collate_fn: Callable[[list], dict] | None,
        metrics: dict[str, Metric] | None,
        settings: Sequence[object],
        checksums: tuple[int | None, int | None],
        characters_per_token: float | None,
        unit: str,
    ):
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
            model.float()
        self.model, self.args, self.accelerator = model, args, accelerator
        self.processing_class, self.collate_fn, self.metrics = processing_class, collate_fn, metrics
        self.characters_per_token, self.unit = characters_per_token, unit
        self.eval_dataset = _as_tensors(eval_dataset)
        self.interim_dataset = _spread(self.eval_dataset, args.max_eval_samples)
        self.output_dir, self.is_main = Path(args.output_dir), accelerator.is_main_process
        self.arguments, self.data_settings = as_settings(args, *settings), fixed_settings(*settings)
        num_examples = None if isinstance(train_dataset, IterableDataset) else len(train_dataset)
        self.plan = _Plan.of(args, num_examples, accelerator.num_processes)
        self.identity = {
            "seed": args.seed,
            "examples_per_step": self.plan.examples_per_step,
            "training_examples": num_examples,
            **self.data_settings,
        }
        self.training_checksum = checksums[0]
        # Two losses can only be compared if they were measured on the same examples.
        self.evaluated_on = {"examples": len(self.interim_dataset), "checksum": checksums[1]}

        checkpoint = find_checkpoint(args.resume_from_checkpoint, self.output_dir)
        self.now, saved, self.best_is_stale = Progress(patience=args.early_stopping_patience), None, False
        if checkpoint is not None:
            saved = self.load_checkpoint(checkpoint)
        elif args.resume_from_checkpoint is not None:
            accelerator.print(f"no checkpoint in {self.output_dir} yet: starting from the beginning")
        accelerator.print(f"training for {self.plan}")

        self.rate, self.warmup = make_schedule(args, self.plan.max_steps), make_warmup(args, self.plan.max_steps)
        if args.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.to(accelerator.device)
        optimizer = make_optimizer(model, args)
        # net: the model, perhaps in a DDP wrapper, with autocast around its forward pass
        self.net, self.optimizer = accelerator.prepare(model, optimizer)
        set_process_seed(args.seed, device_specific=True)  # dropout differs between processes
        if args.with_tracking:
            named = {tracker: {"name": self.output_dir.name} for tracker in ("trackio", "wandb")}
            named["trackio"]["resume"] = "never" if checkpoint is None else "allow"
            accelerator.init_trackers("runs", config=_tracker_config(self.arguments), init_kwargs=named)
        first_batch = self.now.step * args.gradient_accumulation_steps * accelerator.num_processes
        self.batches = _make_batches(_as_tensors(train_dataset), args, accelerator, collate_fn, first_batch)
        self.loss_sum = torch.zeros((), device=accelerator.device)  # of the steps since the last point of the curve
        if self.best_is_stale:
            self.reevaluate_best()
        if saved is not None:
            self.restore_training_state(saved)
        self.passed, self.last_pause = self.plan.fraction(self.now.step, self.now.seconds), 0.0

    @property
    def has_stopped_early(self) -> bool:
        return self.now.patience == 0

    @property
    def is_over(self) -> bool:
        return self.passed >= 1 or self.has_stopped_early

    def load_checkpoint(self, checkpoint: Path) -> dict:
        """Load a checkpoint's progress, put its weights into the model and its best weights into the output directory.

        Returns:
            The saved tensors, for `restore_training_state`.

        Raises:
            SetupError: if the checkpoint belongs to another run, has a different vocabulary, labels, processor or
                model, or was written by an incompatible version.
        """
        state, saved = read_checkpoint(checkpoint)
        _check_state(state, checkpoint / STATE_FILE)
        changed = {
            name: f"{name} {state['arguments'][name]} -> {value}"
            for name, value in self.arguments.items()
            if state["arguments"].get(name, value) != value and name not in ("output_dir", "resume_from_checkpoint")
        }
        changes = f"; changed: {', '.join(changed.values())}" if changed else ""
        _check_identity(state["run"], self.identity, checkpoint, changes)
        self.now = Progress(**state["progress"])
        _load_weights(self.model, self.processing_class, checkpoint)
        saved_checksum = state.get("training_checksum")
        if _differ(saved_checksum, self.training_checksum):
            raise SetupError(f"{checkpoint} belongs to a run on different training data: {_SAME_DATA}{changes}")
        if self.is_main and self.now.best is not None:
            restore_best(checkpoint, self.output_dir)
        if self.training_checksum is None:
            self.training_checksum = saved_checksum
        before = state.get("evaluated_on", {})
        changed_set = any(_differ(before.get(name), value) for name, value in self.evaluated_on.items())
        self.best_is_stale = self.now.best is not None and changed_set
        if "early_stopping_patience" in changed:
            self.now.patience = self.args.early_stopping_patience
        self.accelerator.print(f"resuming from {checkpoint}{changes}")
        return saved

    def reevaluate_best(self) -> None:
        """Evaluate the best weights so far on the current validation set, so that later losses are comparable."""
        model = self.model
        current = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.accelerator.wait_for_everyone()  # the main process puts the weights into the output directory
        model.load_state_dict(load_pretrained(type(model), self.output_dir).state_dict())
        scores = self.evaluate(self.interim_dataset)
        model.load_state_dict(current)
        self.accelerator.print(
            f"the validation set has changed; on it, the best weights so far (step {self.now.best['step']}) have "
            f"{summary(scores, self.unit)}"
        )
        self.now.best = self.now.best | scores

    def restore_training_state(self, saved: dict) -> None:
        """Restore the optimizer, the gradient scaler, this process's random state and the sum of losses."""
        groups = self.optimizer.param_groups
        asked = [{name: group[name] for name in ("weight_decay", "betas")} for group in groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, values in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(values)  # from the arguments, which may have changed
        scaler, processes = self.accelerator.scaler, saved["processes"]
        if scaler is not None and saved["scaler"] is not None:
            scaler.load_state_dict(saved["scaler"])
        if len(processes) == self.accelerator.num_processes:
            own = processes[self.accelerator.process_index]
            _set_random_state(own)
            loss_sum = own["loss_sum"]
        else:  # the number of processes has changed: dropout starts from the seed again
            loss_sum = torch.stack([process["loss_sum"] for process in processes]).mean()
        self.loss_sum = loss_sum.to(self.accelerator.device)

    def begin(self) -> None:
        """Mark the output directory as this run's, and start the clock."""
        self.accelerator.wait_for_everyone()  # every process has read the checkpoint, which may soon be deleted
        if self.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_json(self.output_dir / METRICS_FILE, self.report())
        if not self.is_over:  # before the clock starts: a resumed stream is first read up to the current step
            self.batches = itertools.chain([next(self.batches)], self.batches)
        # If the run has been made longer, fewer tenths of it are complete.
        self.now.tenths = min(self.now.tenths, math.floor(10 * self.passed))
        by_time = self.plan.max_seconds is not None
        self.bar = tqdm(
            initial=self.now.seconds if by_time else self.now.step,
            total=self.plan.max_seconds if by_time else self.plan.max_steps,
            unit="s" if by_time else "step",
            bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]",
            disable=None if self.is_main else True,  # None: shown on a terminal, not in a log file
            mininterval=0.5,
        )
        self.net.train()
        self.began = time.perf_counter() - self.now.seconds

    def update_weights(self) -> None:
        """Take one optimizer step."""
        args, accelerator, now, optimizer = self.args, self.accelerator, self.now, self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self.rate(now.step, self.passed)
        now.warmup_steps += self.warmup(now.step, self.passed) < 1
        for batch, targets, weight in self.batches_of_step():
            batch = _prepare(batch, accelerator.device)
            with accelerator.accumulate(self.net):  # syncs processes in the last pass only; backward divides the loss
                loss = self.net(**batch, **_loss_alone(self.model)).loss * weight
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(self.net.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if targets > 0:  # the mean over no targets is NaN, though its gradients are 0
                self.loss_sum = self.loss_sum + loss.detach().float() / args.gradient_accumulation_steps
            now.tokens += _num_tokens(batch) * accelerator.num_processes
        now.step += 1

    def batches_of_step(self) -> Iterator[tuple[dict, int, float | torch.Tensor]]:
        """Yield each batch of a step with its number of targets and its weight; the mean of the weights is 1.

        Batches with labels per token are kept until the targets of all of them are counted, and are weighted by their
        numbers of targets. All other batches have one target per row or per token, so their weights are equal; they
        may be large (video clips) and are yielded one by one.
        """
        accelerator, num_batches = self.accelerator, self.args.gradient_accumulation_steps
        batches = itertools.islice(self.batches, num_batches)
        first = next(batches)
        if "labels" not in first or first["labels"].ndim != 2:
            for batch in itertools.chain([first], batches):
                yield batch, _num_targets(self.model, batch), 1.0
            return
        batches = [first, *batches]
        counts = [_num_targets(self.model, batch) for batch in batches]
        total = sum(counts)
        if accelerator.num_processes > 1:
            total = accelerator.reduce(torch.tensor(float(total), device=accelerator.device), "sum")
        for batch, count in zip(batches, counts, strict=True):
            yield batch, count, count * num_batches * accelerator.num_processes / total if count > 0 else 0.0

    def update_progress(self) -> tuple[bool, bool]:
        """Update `now`, and return whether an evaluation and a checkpoint are due."""
        now, plan, args = self.now, self.plan, self.args
        now.seconds = _common_seconds(self.began, args, self.accelerator)
        now.pauses, self.last_pause = now.pauses + self.last_pause, 0.0
        now.epoch = plan.epoch(now.step)
        self.passed = plan.fraction(now.step, now.seconds)
        done, tenths = self.passed >= 1, math.floor(10 * self.passed)
        evaluation_due = done or (now.step % args.eval_steps == 0 if args.eval_steps else tenths > now.tenths)
        checkpoint_due = plan.checkpoint_every is not None and (done or now.step % plan.checkpoint_every == 0)
        if evaluation_due:
            now.tenths = tenths
        if (evaluation_due or checkpoint_due) and self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()  # queued work counts as training, not as part of the pause
            now.seconds = _common_seconds(self.began, args, self.accelerator)
        return evaluation_due, checkpoint_due

    def log_training_loss(self) -> None:
        """Update the progress bar; if a point of the training curve is due, add the mean loss since the last one."""
        now, bar = self.now, self.bar
        if now.step % self.args.logging_steps == 0 or self.passed >= 1:
            loss = self.accelerator.reduce(self.loss_sum / (now.step - now.logged_step), "mean").item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the training loss is {loss} at step {now.step}: {_DIVERGED}")
            values = {"loss": loss, "learning_rate": self.optimizer.param_groups[0]["lr"]}
            now.history.append({**now.position, **values})
            self.accelerator.log(values, step=now.step)
            bar.set_postfix_str(f"loss {loss:.3f}, {self.speed}", refresh=False)
            self.loss_sum, now.logged_step = torch.zeros_like(self.loss_sum), now.step
        bar.update(1 if self.plan.max_seconds is None else min(now.seconds, bar.total) - bar.n)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Measure the block's time as a pause; the next step, whose seconds include it, adds it to `now.pauses`."""
        began = time.perf_counter()
        yield
        self.last_pause = time.perf_counter() - began

    def evaluate_and_save_best(self) -> None:
        """Evaluate the model, and save its weights if they are the best so far."""
        args, now, accelerator, bar = self.args, self.now, self.accelerator, self.bar
        scores = self.evaluate(self.interim_dataset)
        if not math.isfinite(scores["eval_loss"]):
            raise FloatingPointError(f"the validation loss is {scores['eval_loss']} at step {now.step}: {_DIVERGED}")
        now.history.append({**now.position, **scores})
        accelerator.log({f"eval/{name[5:]}": value for name, value in scores.items()}, step=now.step)
        improved = now.best is None or scores["eval_loss"] < now.best["eval_loss"]
        if improved:
            now.best, now.patience = now.history[-1], args.early_stopping_patience
        elif now.patience is not None:
            now.patience -= 1
        sample = None
        if self.is_main and args.sample_tokens and isinstance(self.processing_class, PreTrainedTokenizerBase):
            sample = sample_text(self.model, self.processing_class, args.sample_tokens, args.seed)
            now.history[-1]["sample"] = sample
        self.net.train()
        if not self.is_main:
            return
        if improved:
            save_pretrained(self.output_dir, self.model, self.processing_class)
        write_json(self.output_dir / METRICS_FILE, self.report())
        epoch = "" if now.epoch is None else f"epoch {now.epoch:.2f}, "
        bar.write(
            f"step {now.step}, {epoch}{now.seconds:.0f} s, {self.speed}: {summary(scores, self.unit)}"
            f"{' (best)' * improved}"
        )
        if sample is not None:
            bar.write(textwrap.indent(sample, "    "))
            accelerator.log({"sample": sample}, step=now.step)
        plot_loss(now.history, self.output_dir / "loss.png", f"nats per {self.unit}")
        if self.has_stopped_early:
            bar.write(f"stopped early: no better loss in {args.early_stopping_patience} evaluations")

    def save_checkpoint(self) -> None:
        """Write a checkpoint with everything that a resumed run needs.

        Raises:
            FloatingPointError: if a weight or the training loss is not finite, which makes the checkpoint useless.
        """
        accelerator, now = self.accelerator, self.now
        finite = torch.stack([self.loss_sum.isfinite(), *(p.isfinite().all() for p in self.model.parameters())]).all()
        processes = gather_object([{"loss_sum": self.loss_sum.cpu(), **_random_state()}])
        if not all(gather_object([finite.item()])):
            raise FloatingPointError(f"weights or training loss are not finite at step {now.step}: {_DIVERGED}")
        if self.is_main:
            scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
            progress = dataclasses.asdict(now)
            write_checkpoint(
                self.output_dir,
                now.step,
                (self.model, self.processing_class),
                {"optimizer": self.optimizer.state_dict(), "scaler": scaler, "processes": processes},
                {
                    "run": self.identity,
                    "best": now.best,
                    "training_checksum": self.training_checksum,
                    "evaluated_on": self.evaluated_on,
                    "progress": progress,
                    "arguments": self.arguments,
                },
                self.args.checkpoints_total_limit or None,
            )

    def finish(self, dataset_name: str, task: str | None, auto_class: str) -> dict:
        """Evaluate the saved weights on the whole validation set, and write metrics.json and the model card."""
        args, accelerator, model = self.args, self.accelerator, self.model
        self.bar.close()
        if self.is_main and self.now.best is None:  # there was no step left to take, and no earlier evaluation
            save_pretrained(self.output_dir, model, self.processing_class)
        accelerator.wait_for_everyone()
        model.load_state_dict(load_pretrained(type(model), self.output_dir).state_dict())
        result = self.report()
        accelerator.print(f"evaluating the best weights on all {len(self.eval_dataset):,} validation examples")
        result["final"] = self.evaluate(self.eval_dataset)
        if self.is_main:
            write_json(self.output_dir / METRICS_FILE, result)
            card = self.output_dir / "README.md"
            if args.overwrite_output_dir or may_be_rewritten(card):
                about = {"dataset_name": dataset_name, "task": task, "auto_class": auto_class, "unit": self.unit}
                write_model_card(card, model, args, result, **about)
            else:
                accelerator.print(
                    f"{card} was edited and is kept: add --overwrite_output_dir to replace it with a card with these "
                    f"results, which are in {METRICS_FILE}"
                )
        accelerator.log({f"final/{name[5:]}": value for name, value in result["final"].items()}, step=self.now.step)
        accelerator.wait_for_everyone()
        # A DDP wrapper that outlives its process group hangs.
        self.net, self.optimizer = accelerator.free_memory(self.net, self.optimizer)
        accelerator.end_training()
        if args.push_to_hub and self.is_main:
            push_directory(args.output_dir, args.hub_name)
        return result

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        return evaluate(
            self.model,
            dataset,
            self.accelerator,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=self.collate_fn,
            metrics=self.metrics,
            characters_per_token=self.characters_per_token,
        )

    @property
    def speed(self) -> str:
        return f"{self.now.tokens_per_second:,.0f} {'tokens' if self.unit == 'token' else 'frames'}/s"

    def report(self) -> dict:
        """Return the content of metrics.json so far."""
        args, now = self.args, self.now
        by_time = args.max_train_seconds is not None
        return {
            "arguments": self.arguments,
            "data_settings": self.data_settings,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "examples_per_step": self.plan.examples_per_step,
            "num_warmup_steps": now.warmup_steps if by_time else args.warmup_steps(self.plan.max_steps),
            "mixed_precision": self.accelerator.mixed_precision,
            "history": now.history,
            "step": now.step,
            "epoch": now.epoch,
            "train_seconds": round(now.seconds, 2),
            f"{'tokens' if self.unit == 'token' else 'frames'}_per_second": round(now.tokens_per_second, 1),
            "best": now.best,
        }


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int = 0,
    collate_fn: Callable[[list], dict] | None = None,
    metrics: dict[str, Metric] | None = None,
    characters_per_token: float | None = None,
) -> dict[str, float]:
    """Evaluate a model once on every example of a dataset, divided among the processes; leave the model in eval mode.

    All processes take the buffers of the first one, whose model is saved: the last forward pass has updated
    BatchNorm's running statistics in each process with that process's own examples.

    Args:
        model, dataset, accelerator, collate_fn, metrics, characters_per_token: as for `train`.
        batch_size: examples per batch of one process.
        num_workers: workers of the DataLoader.

    Returns:
        The scores of `loss_scores`, and `eval_NAME` for every metric; means over all targets.

    Raises:
        ValueError: if the dataset has no target.
    """
    model.eval()
    broadcast(list(model.buffers()))
    metrics = metrics or {}
    share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    loader = DataLoader(
        Subset(_as_tensors(dataset), share),
        batch_size=batch_size,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),
    )
    # mps has no float64; float32 holds the counts to 1e-7
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    numbers = {"dtype": dtype, "device": accelerator.device}
    counts, means = [0], [torch.zeros(1 + len(metrics), **numbers)]  # of the batches
    for batch in tqdm(loader, "evaluating", leave=False, disable=None if accelerator.is_main_process else True):
        targets = _num_targets(model, batch)  # before the batch moves: reading a count from a GPU would wait for it
        if targets == 0:
            continue  # the mean over no targets is NaN
        batch = _prepare(batch, accelerator.device)
        outputs = model(**batch, **_loss_alone(model, skip_logits=not metrics))
        values = [outputs.loss, *(metric(outputs.logits, batch["labels"]) for metric in metrics.values())]
        counts.append(targets)
        means.append(torch.stack([torch.as_tensor(value, **numbers).reshape(()) for value in values]))
    counts = torch.tensor(counts, dtype=torch.float64)
    totals = torch.cat([counts.sum(0, keepdim=True), counts @ torch.stack(means).cpu().double()])
    targets, loss, *others = accelerator.reduce(totals.to(**numbers), "sum").tolist()
    if targets == 0:
        raise ValueError("the validation set has no targets: every label is -100, or every row has only one token")
    scores = loss_scores(loss / targets, characters_per_token)
    return scores | {f"eval_{name}": total / targets for name, total in zip(metrics, others, strict=True)}


def loss_scores(loss: float, characters_per_token: float | None) -> dict[str, float]:
    """Return `eval_loss` (nats per target) and `eval_perplexity`.

    If `characters_per_token` is given, return the loss in nats and in bits per character as well.
    """
    scores = {"eval_loss": loss, "eval_perplexity": math.exp(loss) if loss < 700 else math.inf}
    if characters_per_token is not None:
        scores["eval_loss_per_character"] = loss / characters_per_token
        scores["eval_bits_per_character"] = loss / characters_per_token / math.log(2)
    return scores


def sample_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_tokens: int, seed: int = 0) -> str:
    """Sample a text without a prompt, at temperature 0.8; the random state of the training is not changed.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        num_tokens: largest number of new tokens; limited further by the number of the model's positions.
        seed: seed for the sampling.
    """
    prompt = prompt_ids(tokenizer, "").to(model.device)
    longest = getattr(model.config, "max_position_embeddings", None) or math.inf
    devices = [] if model.device.type == "cpu" else [model.device]  # besides the CPU, which fork_rng always includes
    with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"):
        torch.manual_seed(seed)
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=int(min(num_tokens, longest - prompt.shape[1])),
            do_sample=True,
            temperature=0.8,
            top_k=0,
            pad_token_id=pad_token_id(tokenizer),
        )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


class BatchStream:
    """An endless iterable of this process's batches of indices, taken from the shuffled epochs one after another.

    The order of epoch e depends only on `seed` and e. A batch may cross the end of an epoch, so that none is short.

    Args:
        num_examples: size of the dataset.
        seed: seed of the epochs' orders.
        batch_size: examples per batch of one process.
        process_index: the process among `num_processes`; each takes its slice of every global batch.
        num_processes: total number of processes.
        first_batch: number of the first batch, counted over all processes.
        redraws_each_epoch: keep counting indices across epochs: example i of epoch e has the index
            i + e * num_examples, so that the dataset can redraw it. A dataset requests this by an attribute of the
            same name.
    """

    def __init__(
        self,
        num_examples: int,
        seed: int,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        first_batch: int = 0,
        redraws_each_epoch: bool = False,
    ):
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self.process_index, self.num_processes, self.first_batch = process_index, num_processes, first_batch
        self.redraws_each_epoch = redraws_each_epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch, skipped = divmod(self.first_batch * self.batch_size, self.num_examples)
        stream = itertools.chain.from_iterable(map(self.order, itertools.count(epoch)))
        stream = itertools.islice(stream, skipped, None)
        batches = iter(lambda: list(itertools.islice(stream, self.batch_size)), [])
        for number, batch in enumerate(batches, start=self.first_batch):
            if number % self.num_processes == self.process_index:
                yield batch

    def order(self, epoch: int) -> list[int]:
        """Return the order of all examples in an epoch; epochs are counted from 0."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.num_examples, generator=generator, device="cpu")
        return (order + epoch * self.num_examples if self.redraws_each_epoch else order).tolist()


def resolve_mixed_precision(choice: str, use_cpu: bool = False) -> str:
    """Resolve `auto` to bf16 if the training device supports it natively, else to no.

    Args:
        choice: auto, no, bf16 or fp16; all but auto are returned unchanged.
        use_cpu: train on the CPU even if there is a GPU.
    """
    if choice != "auto":
        return choice
    if torch.cuda.is_available() and not use_cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if torch.accelerator.is_available() and not use_cpu:  # mps, xpu: not tested
        return "no"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()  # every CPU with AMX has it too
    return "bf16" if native else "no"


def summary(scores: dict[str, float], unit: str = "token") -> str:
    """Format the scores of `evaluate` as one line, the loss in nats."""
    loss, per_character = scores["eval_loss"], scores.get("eval_loss_per_character")
    words = [f"validation loss {loss:.4f} nats per {'character' if loss == per_character else unit}"]
    if per_character not in (None, loss):
        words.append(f"{per_character:.4f} nats per character")
    if unit == "token":
        words.append(f"perplexity {scores['eval_perplexity']:.3f}")
    known = ("eval_loss", "eval_loss_per_character", "eval_bits_per_character", "eval_perplexity")
    words += [f"{name[5:]} {value:.4f}" for name, value in scores.items() if name not in known]
    return ", ".join(words)


def _check_data(args: TrainArguments, train_dataset: Dataset, eval_dataset: Dataset) -> None:
    """Refuse empty datasets, and arguments that do not work with a stream.

    Raises:
        SetupError: if a dataset is empty, or an argument does not work with a stream.
    """
    for name, dataset in (("training", train_dataset), ("validation", eval_dataset)):
        if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
            raise SetupError(f"the {name} set has no examples")
    if isinstance(train_dataset, IterableDataset):
        if (args.max_train_steps or args.max_train_seconds) is None or args.checkpointing_steps == "epoch":
            raise SetupError(
                "a stream has no epochs: give max_train_steps or max_train_seconds, and numeric checkpointing_steps"
            )
        if args.dataloader_num_workers:
            raise SetupError("a stream is read by the training processes themselves: leave out dataloader_num_workers")


def _spread(dataset: Dataset, count: int | None) -> Dataset:
    """Take `count` examples spread evenly over a dataset; None: all."""
    if count is None or count >= len(dataset):
        return dataset
    return Subset(dataset, [i * (len(dataset) - 1) // max(1, count - 1) for i in range(count)])


def _make_batches(
    dataset: Dataset, args: TrainArguments, accelerator: Accelerator, collate_fn: Callable | None, first_batch: int
) -> Iterator[dict]:
    """Return this process's endless batches of the training set from `first_batch` on (counted over all processes)."""
    numbers = (args.per_device_train_batch_size, accelerator.process_index, accelerator.num_processes, first_batch)
    if isinstance(dataset, IterableDataset):
        return map(collate_fn or default_collate, _batches_of_stream(dataset, *numbers))
    loader = DataLoader(
        dataset,
        batch_sampler=BatchStream(len(dataset), args.seed, *numbers, getattr(dataset, "redraws_each_epoch", False)),
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # so that the workers' seed is not drawn from the global generator
    )
    return iter(loader)


def _batches_of_stream(
    stream: IterableDataset, batch_size: int, process_index: int, num_processes: int, first_batch: int
) -> Iterator[list]:
    """Yield this process's batches of a stream, divided among the processes as in `BatchStream`."""
    examples = iter(stream)
    shown = {"unit": " batches", "delay": 1, "leave": False, "disable": None if process_index == 0 else True}
    again = tqdm(range(first_batch), "reading the stream again", **shown)
    for number in itertools.chain(again, itertools.count(first_batch)):
        batch = list(itertools.islice(examples, batch_size))
        if len(batch) < batch_size:
            raise ValueError("the stream of training examples has ended, but it must be endless")
        if number >= first_batch and number % num_processes == process_index:
            yield batch


def _differ(one: object, other: object) -> bool:
    """Return whether two values are known and not equal."""
    return None not in (one, other) and one != other


def _check_state(state: dict, path: Path) -> None:
    """Refuse a trainer_state.json that this version cannot read.

    Raises:
        SetupError: if a part is missing, or `progress` holds an unknown field.
    """
    missing = [name for name in ("run", "arguments", "progress") if not isinstance(state.get(name), dict)]
    if missing:
        raise SetupError(f"{path} lacks {', '.join(missing)}: resume from another checkpoint")
    unknown = sorted(state["progress"].keys() - {f.name for f in dataclasses.fields(Progress)})
    if unknown:
        raise SetupError(
            f"{path} holds {', '.join(unknown)} in its progress, which this version of mingru-hf does not know: "
            "resume with the version that wrote it"
        )


def _check_identity(saved: dict, present: dict, checkpoint: Path, changes: str) -> None:
    """Refuse to resume with other data, or another order of the data, than in the checkpoint's run.

    The message ends with `changes`, which may explain the difference.

    Raises:
        SetupError: if seed, examples per step, the size of the training set or a fixed setting differs.
    """
    for name, value in present.items():
        if saved.get(name, value) != value:
            raise SetupError(
                f"{checkpoint} belongs to a run with {name.replace('_', ' ')} {saved[name]}, not {value}: resume with "
                "the same data, tokenizer, block_size, seed and per_device_train_batch_size x "
                f"gradient_accumulation_steps x processes{changes}"
            )


def _load_weights(model: PreTrainedModel, processing_class: object | None, checkpoint: Path) -> None:
    """Load a checkpoint's weights into a model, after checking that they have the same meaning in both.

    Raises:
        SetupError: if the model type, a label, a token, a value of the processor or the shape of a weight differs.
    """
    config = "resume with its config_name and config_overrides"
    types = ({"model_type": t} for t in (read_config_file(checkpoint).get("model_type"), model.config.model_type))
    # Otherwise transformers would initialise the weights at random, with only a warning.
    _check_same(checkpoint, "another model", *types, config)
    saved = load_pretrained(type(model), checkpoint)
    _check_same(checkpoint, "different labels", saved.config.id2label, model.config.id2label, _SAME_DATA)
    if isinstance(processing_class, PreTrainedTokenizerBase):
        tokenizers = (load_pretrained(type(processing_class), checkpoint), processing_class)
        tokens = ({number: token for token, number in t.get_vocab().items()} for t in tokenizers)
        _check_same(checkpoint, "different tokens", *tokens, _SAME_DATA)
    elif processing_class is not None:
        processors = (load_pretrained(type(processing_class), checkpoint), processing_class)
        values = [json.loads(processor.to_json_string()) | {"auto_map": None} for processor in processors]
        _check_same(
            checkpoint,
            "another processor",
            *values,
            "resume with the options and the version that it was started with",
        )
    weights = saved.state_dict()
    shapes = ({name: list(w.shape) for name, w in part.items()} for part in (weights, model.state_dict()))
    _check_same(checkpoint, "another model", *shapes, config)
    model.load_state_dict(weights)


def _check_same(checkpoint: Path, what: str, saved: dict, present: dict, advice: str) -> None:
    """Raise a SetupError that names the first differences, if there are any."""
    differing = [name for name in sorted(saved.keys() | present.keys()) if saved.get(name) != present.get(name)]
    if differing:
        examples = "; ".join(f"{n}: {saved.get(n)!r} there, {present.get(n)!r} here" for n in differing[:3])
        more = f"; {len(differing) - 3} more" if len(differing) > 3 else ""
        raise SetupError(f"{checkpoint} belongs to a run with {what} ({examples}{more}): {advice}")


def _random_state() -> dict:
    """Return the states of this process's random number generators, for `torch.load(weights_only=True)` to load."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: dict) -> None:
    """Set this process's random number generators to the states that `_random_state` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _as_tensors(dataset: Dataset) -> Dataset:
    """Make a `datasets.Dataset` return tensors; any other dataset already does."""
    return dataset.with_format("torch") if hasattr(dataset, "with_format") else dataset


def _prepare(batch: dict, device: torch.device) -> dict:
    """Move a batch to the device; a batch without labels is a language model's and gets its inputs as labels."""
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return batch if "labels" in batch else {**batch, "labels": batch["input_ids"]}


def _num_targets(model: PreTrainedModel, batch: dict) -> int:
    """Count the targets of a batch: the labels other than -100 that enter the loss."""
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    # Causal language models shift their labels (B, T) by one token; token classifiers do not.
    shifts = labels.ndim == 2 and getattr(model, "loss_type", None) != "ForTokenClassification"
    return int(((labels[:, 1:] if shifts else labels) != -100).sum())


def _num_tokens(batch: dict) -> int:
    """Count a batch's tokens, or its frames if it holds clips (B, T, C, H, W)."""
    inputs = batch.get("input_ids", next(iter(batch.values())))
    return inputs.shape[0] * inputs.shape[1]


def _loss_alone(model: PreTrainedModel, skip_logits: bool = True) -> dict:
    """Return the arguments of the model's forward, where it has them, that disable the cache and the unused logits."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in (("use_cache", False), ("skip_logits", skip_logits)) if name in known}


def _common_seconds(began: float, args: TrainArguments, accelerator: Accelerator) -> float:
    """Return the seconds since `began`; with `max_train_seconds` they are the same in all processes."""
    seconds = time.perf_counter() - began
    if args.max_train_seconds is None or accelerator.num_processes == 1:
        return seconds
    return broadcast(torch.tensor(seconds, device=accelerator.device)).item()


def _tracker_config(arguments: dict) -> dict:
    """Return the arguments in types that trackers accept: only numbers and strings."""
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in arguments.items()}
