#!/usr/bin/env python
"""Train text models of several architectures for the same time, and compare their losses.

    python scripts/benchmark_training.py --seconds 300 --threads 1 --output_dir runs/comparison
    python scripts/benchmark_training.py --train_file my.txt --models "MinGRU, 3 x 256" "Llama, 4 x 160" \\
        --learning_rates 3e-3 1e-2 --dropouts 0 0.1 --output_dir runs/rates --png rates.png
    python scripts/benchmark_training.py --train_file my.txt --tokenizer_name bpe --output_dir runs/bpe

The models are trained one after the other by the loop of scripts/train_causal_lm.py, each from new weights
and for --seconds. Every run has a directory of its own in --output_dir. A run that is complete there is not
repeated, so a second command can add models, or draw the plot. The table shows every run, the plot each
model's best one.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark_lm import FASTEST_GPT2, GRULM
from benchmarking import HelpFormatter, at_least_one, machine, new_file
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mingru_hf.data.text import (
    ShiftedBlocks,
    build_tokenizer,
    characters_per_token,
    evaluation_blocks,
    group_texts,
    load_text_datasets,
)
from mingru_hf.training.arguments import TrainArguments, as_settings
from mingru_hf.training.checkpoints import write_whole
from mingru_hf.training.loop import start, train


@dataclass(frozen=True)
class Common:
    """What all runs have in common, recorded in their metrics.json."""

    dataset_name: str
    train_file: str | None
    block_size: int
    threads: int
    tokenizer_name: str = "char"
    vocab_size: int | None = None

    def load(self) -> tuple:
        """Load the text.

        Returns:
            The training and the validation blocks, of block_size token ids each, the tokenizer, and the characters per
            token of the validation text.
        """
        text = load_text_datasets(self.dataset_name, train_file=self.train_file)
        tokenizer = build_tokenizer(self.tokenizer_name, text["train"]["text"], self.vocab_size)
        training = group_texts(text["train"], tokenizer, self.block_size)
        validation = evaluation_blocks(text["validation"], tokenizer, self.block_size)
        return training, validation, tokenizer, characters_per_token(text["validation"], validation)


class GRUConfig(PreTrainedConfig):
    """Sizes of a language model on torch.nn.GRU."""

    model_type = "torch_gru"
    vocab_size: int = 96
    hidden_size: int = 512
    num_hidden_layers: int = 3
    dropout: float = 0.0


class GRUForCausalLM(PreTrainedModel):
    """The language model on torch.nn.GRU of scripts/benchmark_lm.py, with torch's own initial weights."""

    config_class = GRUConfig

    def __init__(self, config: GRUConfig):
        super().__init__(config)
        self.model = GRULM(config.vocab_size, config.hidden_size, config.num_hidden_layers, config.dropout)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Keep the weights that torch has drawn."""

    def forward(self, input_ids: Tensor, labels: Tensor, **unused: object) -> CausalLMOutput:
        """Compute the loss and the logits (B, T, vocabulary) of input_ids (B, T)."""
        logits = self.model(input_ids)[0]
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register(GRUConfig.model_type, GRUConfig, exist_ok=True)
AutoModelForCausalLM.register(GRUConfig, GRUForCausalLM, exist_ok=True)

LOSS = "eval_loss_per_character"  # in the records of metrics.json


def mingru(blocks: int, width: int) -> dict:
    """Return the config of a MinGRU with states of this width and a narrower MLP than the default."""
    return {
        "model_type": "mingru",
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "expand": 1,
        "intermediate_size": 2 * width,
    }


def gru(layers: int, width: int) -> dict:
    """Return the config of a language model on torch.nn.GRU."""
    return {"model_type": "torch_gru", "hidden_size": width, "num_hidden_layers": layers}


def transformer(model_type: str, blocks: int, width: int, **others: object) -> dict:
    """Return the config of a transformer with four heads and larger initial weights than the usual 0.02."""
    return {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "initializer_range": width**-0.5,
        **others,
    }


# What is dropped, by model type: outputs of the branches, inputs and outputs of layers, attention weights.
DROPOUTS = {
    "mingru": ["residual_dropout"],
    "torch_gru": ["dropout"],
    "gpt2": ["resid_pdrop", "embd_pdrop"],
    "llama": ["attention_dropout"],
}
# Name, with blocks x width -> config, and a learning rate and a dropout that do well in LOG.md.
MODELS: dict[str, tuple[dict, float, float]] = {
    "MinGRU, 3 x 256": (mingru(3, 256), 1e-2, 0.1),
    "MinGRU, 4 x 320": (mingru(4, 320), 3e-3, 0.1),
    "MinGRU, 3 x 512": (mingru(3, 512), 5e-3, 0.1),
    "MinGRU, 6 x 256": ({"model_type": "mingru", "hidden_size": 256, "num_hidden_layers": 6}, 2e-3, 0.0),
    "torch.nn.GRU, 3 x 256": (gru(3, 256), 6e-3, 0.0),
    "torch.nn.GRU, 3 x 512": (gru(3, 512), 4e-3, 0.0),
    "Llama, 4 x 160": (transformer("llama", 4, 160, intermediate_size=440), 2e-3, 0.0),
    "Llama, 6 x 256": (transformer("llama", 6, 256, intermediate_size=704), 1e-3, 0.0),
    "GPT-2, 4 x 160": (transformer("gpt2", 4, 160, **FASTEST_GPT2), 4e-3, 0.0),
    "GPT-2, 6 x 256": (transformer("gpt2", 6, 256, **FASTEST_GPT2), 2e-3, 0.0),
}


def probability(text: str) -> float:
    """Check and convert a value of --dropouts, as argparse's `type`."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return number


def config_of(name: str, dropout: float) -> dict:
    """Return the settings that make a model's config, without those of the text."""
    settings = MODELS[name][0]
    return {**settings, **dict.fromkeys(DROPOUTS[settings["model_type"]], dropout)}


@dataclass(frozen=True)
class Run:
    """What distinguishes a run from the others."""

    name: str
    rate: float
    dropout: float
    seed: int

    @property
    def directory(self) -> str:
        """The name of the run's directory in --output_dir."""
        return re.sub(r"[, ]+", "-", f"{self.name}, {self.rate:g}, {self.dropout:g}, {self.seed}")


def check_same(directory: str, what: str, asked: dict, found: dict) -> None:
    """Raise a ValueError if what is in the directory has not the settings that were asked for."""
    changed = [f"{key} {found.get(key)} instead of {value}" for key, value in asked.items() if found.get(key) != value]
    if changed:
        raise ValueError(f"{directory} holds {what} with {', '.join(changed)}: choose another output_dir")


def complete(run: Run, args: TrainArguments, common: Common) -> dict | None:
    """Read the metrics of the complete run in `args.output_dir`; None if there is no run.

    Raises:
        ValueError: if the run was interrupted, had other settings or another config.
    """
    metrics_file = Path(args.output_dir) / "metrics.json"
    if not metrics_file.exists():
        return None
    result = json.loads(metrics_file.read_text())
    asked = {key: value for key, value in as_settings(args, common).items() if key != "output_dir"}
    check_same(args.output_dir, "a run", asked, result.get("arguments", {}))
    if "final" not in result:
        raise ValueError(f"{args.output_dir} holds an interrupted run: remove it, or choose another output_dir")
    asked, config = config_of(run.name, run.dropout), AutoConfig.from_pretrained(args.output_dir)
    check_same(args.output_dir, "a model", asked, {key: getattr(config, key) for key in asked})
    return result


def train_new(run: Run, args: TrainArguments, common: Common, data: tuple) -> dict:
    """Train a new model on the data from `common.load()`, and return the content of metrics.json.

    Raises:
        ValueError: if `output_dir` cannot be written to.
        OSError: if the disk is full.
    """
    print(f"\n{run.name}, learning rate {run.rate:g}, dropout {run.dropout:g}, seed {run.seed}", flush=True)
    accelerator = start(args, [common])
    training, validation, tokenizer, characters = data
    config = AutoConfig.for_model(
        **config_of(run.name, run.dropout),
        max_position_embeddings=common.block_size,  # the recurrent models ignore it
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return train(
        AutoModelForCausalLM.from_config(config),
        ShiftedBlocks(training, args.seed),
        validation,
        args,
        accelerator,
        processing_class=tokenizer,
        settings=[common],
        characters_per_token=characters,
        dataset_name=Path(common.train_file).name if common.train_file else common.dataset_name,
        task="text-generation",
        auto_class="AutoModelForCausalLM",
    )


def plot(best: dict[str, dict], path: Path, title: str) -> None:
    """Plot the losses of each model's best run against minutes of training, training loss as a thin line."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, result in best.items():
        history, color = result["history"], f"C{list(MODELS).index(name)}"
        training = [(record["seconds"] / 60, record["loss"]) for record in history if "loss" in record]
        validation = [(record["seconds"] / 60, record[LOSS]) for record in history if LOSS in record]
        label = f"{name}, {result['parameters'] / 1e6:.1f} M parameters: {result['final'][LOSS]:.3f}"
        axes.plot(*zip(*training, strict=True), linewidth=1, color=color, alpha=0.5)
        axes.plot(*zip(*validation, strict=True), marker="o", markersize=4, color=color, label=label)
    lowest = min(result["final"][LOSS] for result in best.values())
    axes.set(xlabel="minutes of training", ylabel="loss (nats per character)", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(lowest - 0.1, lowest + 1.5)
    axes.legend(title="validation loss at the end")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, figure.savefig)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help="train only these; default: all")
    parser.add_argument("--dataset_name", default="shakespeare", help="text, as for scripts/train_causal_lm.py")
    parser.add_argument("--train_file", help="train on this file instead; its last tenth is for validation")
    parser.add_argument("--tokenizer_name", default="char", help="char, bpe, or a pretrained tokenizer")
    parser.add_argument("--vocab_size", type=at_least_one, help="vocabulary size of a bpe tokenizer; default: 4096")
    parser.add_argument("--output_dir", required=True, help="directory of the runs")
    parser.add_argument("--seconds", type=at_least_one, default=900, help="seconds of training for each run")
    parser.add_argument(
        "--learning_rates", nargs="+", type=float, metavar="RATE", help="rates to try; default: one for each model"
    )
    parser.add_argument(
        "--dropouts", nargs="+", type=probability, metavar="P", help="dropouts to try; default: one for each model"
    )
    parser.add_argument("--seeds", type=at_least_one, default=1, help="runs for each of these, with seeds 0, 1, ...")
    parser.add_argument("--batch_size", type=at_least_one, default=16, help="sequences in a batch")
    parser.add_argument("--block_size", type=at_least_one, default=256, help="tokens in a sequence")
    parser.add_argument("--eval_steps", type=at_least_one, default=200, help="steps between evaluations")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="CPU threads to use")
    parser.add_argument("--png", type=new_file, metavar="FILE", help="plot the losses against time to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    common = Common(
        args.dataset_name, args.train_file, args.block_size, args.threads, args.tokenizer_name, args.vocab_size
    )
    runs = [
        Run(name, rate, dropout, seed)
        for name in args.models or MODELS
        for rate in args.learning_rates or [MODELS[name][1]]
        for dropout in args.dropouts or [MODELS[name][2]]
        for seed in range(args.seeds)
    ]
    try:
        settings = [
            TrainArguments(
                output_dir=str(Path(args.output_dir) / run.directory),
                max_train_seconds=args.seconds,
                per_device_train_batch_size=args.batch_size,
                learning_rate=run.rate,
                adam_beta2=0.99,
                eval_steps=args.eval_steps,
                max_eval_samples=100,
                seed=run.seed,
            )
            for run in runs
        ]
        # Mistakes must show before hours of training.
        found = [complete(run, of_run, common) for run, of_run in zip(runs, settings, strict=True)]
        data = common.load()
        results = [
            (run, result or train_new(run, of_run, common, data))
            for run, of_run, result in zip(runs, settings, found, strict=True)
        ]
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.error(str(error))

    print(f"\n{machine()}; {args.seconds} s of training, B={args.batch_size}, T={args.block_size}")
    print(f"{'model':21} parameters    rate dropout seed  steps     tokens/s   nats per character")
    results.sort(key=lambda pair: pair[1]["final"][LOSS])
    best: dict[str, dict] = {}
    for run, result in results:
        best.setdefault(run.name, result)
        print(
            f"{run.name:21} {result['parameters']:10,} {run.rate:7g} {run.dropout:7g} {run.seed:4} "
            f"{result['step']:6,} {result['tokens_per_second']:12,.0f}   {result['final'][LOSS]:.4f}"
        )
    if args.png:
        plot(best, args.png, machine())


if __name__ == "__main__":
    main()
