"""The options of a training run: one dataclass, from which the command-line parser is built."""

import argparse
import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


class SetupError(ValueError):
    """A set-up mistake that the user can fix; the scripts print its message on one line."""


def option(
    default: object,
    help: str,
    choices: Sequence[str] | None = None,
    group: str | None = None,
    fixed: bool = False,
    *,
    positive: bool = False,
    least: int | None = None,
):
    """Return a dataclass field with metadata for `--help` and for `check_values`.

    Args:
        default: the field's default; `dataclasses.MISSING` makes the option required.
        help: what the option means, with its unit.
        choices: the allowed values; None allows any.
        group: heading in `--help` for this field and those after it; None continues the previous group.
        fixed: whether the option determines the examples, so that a resumed run must keep the original value.
        positive: whether the value must be finite and greater than 0.
        least: the smallest allowed value; None allows any.
    """
    known = {"help": help, "choices": choices, "group": group, "fixed": fixed, "positive": positive, "least": least}
    return field(default=default, metadata=known)


def check_values(arguments: object) -> None:
    """Check that every field of a dataclass made with `option` has an allowed value; None is always allowed.

    Raises:
        ValueError: if a value is an empty string, not among the choices, or outside the range of its field.
    """
    for f in dataclasses.fields(arguments):
        value, choices, least = getattr(arguments, f.name), f.metadata["choices"], f.metadata["least"]
        if value is None:
            continue
        if value == "":  # for example from an unset shell variable
            raise ValueError(f"{f.name} must not be empty: give it a value, or leave it out")
        if choices and value not in choices:
            raise ValueError(f"{f.name} must be one of {', '.join(choices)}, not {value!r}")
        if f.metadata["positive"] and not 0 < value < math.inf:
            raise ValueError(f"{f.name} must be positive, not {value}")
        if least is not None and not value >= least:
            raise ValueError(f"{f.name} must be {f'at least {least}' if least else '0 or more'}, not {value}")


@dataclass(kw_only=True)
class TrainArguments:
    """How to train; every field is an option of the training scripts, where `--help` explains it.

    Counts are in optimizer steps (updates) unless stated otherwise; a step uses
    `per_device_train_batch_size x gradient_accumulation_steps x processes` examples.

    Raises:
        ValueError: if a value is malformed or outside its range, an option would have no effect without another one
            that is missing, or two options contradict each other.
    """

    output_dir: str = option(
        dataclasses.MISSING,
        "where the model, tokenizer, metrics.json, loss.png and README.md go",
        group="output",
    )
    overwrite_output_dir: bool = option(
        False,
        "write into a directory that already holds a run or a model: files of the same name are replaced, none is "
        "deleted",
    )
    checkpointing_steps: str | None = option(
        None,
        "save a resumable checkpoint, output_dir/checkpoint-STEP, every N optimizer steps or every epoch, and "
        "at the end of the run: a number, or epoch; default: never",
    )
    checkpoints_total_limit: int = option(2, "keep only the newest N checkpoints; 0: all", least=0)
    resume_from_checkpoint: str | None = option(
        None,
        "resume from this checkpoint, or from the latest one in output_dir (from the start if there is none yet): "
        "a directory, or latest",
    )
    with_tracking: bool = option(False, "log curves and samples to the tracker named by --report_to")
    report_to: str | None = option(
        None,
        "tracker: tensorboard (under output_dir/runs), trackio, wandb, ..., or all that are installed; default: "
        "tensorboard",
    )
    push_to_hub: bool = option(
        False,
        "upload output_dir to the Hugging Face Hub at the end; a new repository is private (`hf auth login` first)",
    )
    hub_model_id: str | None = option(None, "owner/name on the Hub; default: the last part of output_dir")

    per_device_train_batch_size: int = option(
        64, "examples per batch of one process", group="optimization", positive=True
    )
    gradient_accumulation_steps: int = option(
        1, "batches whose gradients are accumulated for one optimizer step", positive=True
    )
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", positive=True)
    lr_scheduler_type: str = option(
        "cosine", "learning-rate schedule (inverse_sqrt: not with max_train_seconds)", SCHEDULES
    )
    lr_scheduler_kwargs: str | None = option(
        None, "further arguments for the schedule, as JSON: '{\"min_lr_rate\": 0.1}' for cosine_with_min_lr"
    )
    num_warmup_steps: int | None = option(
        None,
        "steps over which the learning rate rises from 0; default: 100, or a tenth of a shorter run (of its seconds "
        "with max_train_seconds); constant has none",
        least=0,
    )
    weight_decay: float = option(0.1, "AdamW's weight decay for matrices; norms and biases have none", least=0)
    adam_beta1: float = option(0.9, "AdamW's beta1")
    adam_beta2: float = option(0.999, "AdamW's beta2")
    max_grad_norm: float = option(1.0, "clip gradients to this norm; 0: off", least=0)

    num_train_epochs: float = option(
        3.0, "passes over the data; ignored with max_train_steps or max_train_seconds", group="duration", positive=True
    )
    max_train_steps: int | None = option(None, "total number of optimizer steps", positive=True)
    max_train_seconds: float | None = option(
        None,
        "total wall-clock seconds, evaluations included, except the final one; the learning rate then "
        "follows the fraction of this time that has passed",
        positive=True,
    )
    early_stopping_patience: int | None = option(None, "stop after N evaluations without a better loss", positive=True)

    per_device_eval_batch_size: int = option(
        64, "examples per batch of one process", group="evaluation", positive=True
    )
    eval_steps: int | None = option(
        None, "optimizer steps between evaluations; default: a tenth of the run", positive=True
    )
    max_eval_samples: int | None = option(
        None,
        "evaluate on N examples, spread evenly over the validation set, during training; the final evaluation, of the "
        "best model, uses them all",
        positive=True,
    )
    sample_tokens: int = option(
        0, "tokens of the sample text that a model with a tokenizer writes at every evaluation; 0: none", least=0
    )
    logging_steps: int = option(10, "optimizer steps between two points of the training curve", positive=True)

    seed: int = option(0, "seed of the weights, the order of the data and dropout", group="machine", least=0)
    mixed_precision: str = option(
        "auto",
        "precision of the matrix products (auto: bf16 where the CPU or GPU supports it, else no)",
        ("auto", "no", "bf16", "fp16"),
    )
    gradient_checkpointing: bool = option(
        False, "keep only the blocks' inputs and recompute the rest in the backward pass: less memory, more time"
    )
    use_cpu: bool = option(False, "stay on the CPU even if there is a GPU")
    dataloader_num_workers: int = option(0, "processes that load data; 0: the main process", least=0)

    def __post_init__(self):
        check_values(self)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError("hub_model_id has no effect without push_to_hub: add --push_to_hub")
        if self.report_to is not None and not self.with_tracking:
            raise ValueError("report_to has no effect without with_tracking: add --with_tracking")
        if self.lr_scheduler_type == "constant" and self.num_warmup_steps:
            raise ValueError("lr_scheduler_type constant has no warm-up: choose constant_with_warmup for one")
        if self.lr_scheduler_type == "inverse_sqrt" and self.max_train_seconds is not None:
            raise ValueError(
                "lr_scheduler_type inverse_sqrt depends on the number of steps, but with max_train_seconds a schedule "
                "follows the time: choose another one, or use max_train_steps alone"
            )
        steps = self.checkpointing_steps
        if steps not in (None, "epoch") and not (str(steps).isdigit() and int(steps) > 0):
            raise ValueError(f"checkpointing_steps must be a positive number of steps, or epoch, not {steps!r}")
        self.scheduler_kwargs()

    @property
    def hub_name(self) -> str:
        """The repository's name on the Hub, with or without its owner."""
        return self.hub_model_id or Path(self.output_dir).resolve().name

    def warmup_steps(self, max_steps: int | None) -> int:
        """Return `num_warmup_steps`, or its default for a run of `max_steps` (None: unknown); 0 for `constant`."""
        if self.lr_scheduler_type == "constant":
            return 0
        if self.num_warmup_steps is not None:
            return self.num_warmup_steps
        return 100 if max_steps is None else min(100, max_steps // 10)

    def scheduler_kwargs(self) -> dict:
        """Parse `lr_scheduler_kwargs`.

        Raises:
            ValueError: if the option is not a JSON object.
        """
        try:
            kwargs = json.loads(self.lr_scheduler_kwargs or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"lr_scheduler_kwargs is not JSON: {error}") from None
        if not isinstance(kwargs, dict):
            raise ValueError("lr_scheduler_kwargs must be a JSON object, such as '{\"min_lr_rate\": 0.1}'")
        return kwargs


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that shows defaults in the help, and reports errors on one line (exit code 2) without usage.

    transformers' HfArgumentParser also makes options from dataclasses, but supports neither such errors nor `fixed`.
    """

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        """Parse as argparse does; from then on, stdout and stderr escape characters that they cannot encode."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        return super().parse_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextmanager
    def user_errors(self) -> Iterator[None]:
        """Exit with a one-line message if the block raises an error that a wrong argument or file can cause.

        Ctrl-C also exits with one line, and with exit code 130.

        Use this for the set-up, not for the training: a bug in the training must keep its traceback.
        """
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            self.error(str(error) or type(error).__name__)
        except KeyboardInterrupt:
            self.exit(130, f"\n{self.prog}: interrupted\n")

    @contextmanager
    def setup_errors(self) -> Iterator[None]:
        """Exit with a one-line message on SetupError, a non-finite loss or Ctrl-C only; use this for the training."""
        try:
            yield
        except KeyboardInterrupt:
            advice = "if --checkpointing_steps was set, repeat the command with --resume_from_checkpoint latest"
            self.exit(130, f"\n{self.prog}: interrupted; {advice} to continue from the newest checkpoint\n")
        except SetupError as error:
            self.error(str(error))
        except FloatingPointError as error:
            self.exit(1, f"{self.prog}: {error}\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help in two columns; a text ends with the default, unless that is None or False or the text mentions one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action):
        plain = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        if plain or "default" in action.help:
            return action.help
        return f"{action.help} [%(default)s]"

    def _format_usage(self, usage, actions, groups, prefix):
        required = [a for a in actions if a.required]
        return super()._format_usage(usage, required, [], prefix).rstrip() + " [options]\n\n"


def add_arguments(parser: argparse.ArgumentParser, cls: type, **defaults: object) -> None:
    """Add every field of a dataclass made with `option` to a parser.

    Args:
        parser: gets one option per field.
        cls: the dataclass.
        defaults: defaults that replace those of the dataclass, by field name.
    """
    hints, group = typing.get_type_hints(cls), parser
    for f in dataclasses.fields(cls):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        default = defaults.get(f.name, f.default)
        flag, help = f"--{f.name}", f.metadata["help"].replace("%", "%%")
        kind = hints[f.name]
        if isinstance(kind, types.UnionType):  # `int | None`
            kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
        if kind is bool:
            group.add_argument(flag, action="store_true", default=default, help=help)
            continue
        choices, metavar = f.metadata["choices"], {int: "N", float: "X", str: "TEXT"}[kind]
        if choices:
            help, metavar = f"{help}: {', '.join(choices)}", "NAME"
        value = {"required": True} if default is dataclasses.MISSING else {"default": default}
        group.add_argument(flag, type=kind, choices=choices, metavar=metavar, help=help, **value)


def as_settings(*parts: object) -> dict:
    """Return the fields of dataclasses made with `option` as one dict."""
    return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}


def fixed_settings(*parts: object) -> dict:
    """Return the fields of these dataclasses that are marked `fixed`: a resumed run must not change them."""
    return {
        f.name: getattr(part, f.name) for part in parts for f in dataclasses.fields(part) if f.metadata.get("fixed")
    }


def from_namespace(cls: type, namespace: argparse.Namespace):
    """Make an instance of the dataclass `cls` from the parsed options that have the names of its fields."""
    return cls(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls)})


def parse_dataclasses(description: str, argv: list[str] | None, *classes: type, **defaults: object) -> tuple:
    """Parse a command line into dataclasses made with `option`; return the parser and one object per class.

    Args:
        description: description of the script, for `--help`.
        argv: the command-line arguments; None: those of the process.
        classes: the dataclasses, in the order in which `--help` lists their options.
        defaults: defaults that replace those of the dataclasses, by field name.
    """
    parser = ArgumentParser(description=description)
    for cls in classes:
        add_arguments(parser, cls, **defaults)
    namespace = parser.parse_args(argv)
    with parser.user_errors():
        objects = [from_namespace(cls, namespace) for cls in classes]
        for arguments in objects:
            check_values(arguments)
        return parser, *objects
