"""The README.md next to the weights: what the model is, what its results are and how to load it."""

import json
import re
import zlib
from pathlib import Path

import accelerate
import datasets
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from .arguments import TrainArguments
from .checkpoints import write_whole
from .hub import GENERATED, SOURCE

_SEAL = "<!-- written by training, CRC-32"

METRIC_NAMES = {
    "eval_loss": ("loss", "Validation loss (nats per token)"),
    "eval_perplexity": ("perplexity", "Perplexity"),
    "eval_loss_per_character": ("loss_per_character", "Validation loss (nats per character)"),
    "eval_bits_per_character": ("bits_per_character", "Validation loss (bits per character)"),
    "eval_accuracy": ("accuracy", "Accuracy"),
}
LOADING = {
    "text-generation": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

import mingru_hf  # registers MinGRU with the Auto classes

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("\\n", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200, do_sample=True)[0]))""",
    "video-classification": """\
from transformers import pipeline

import mingru_hf  # registers MinConvGRU with the Auto classes

classify = pipeline("video-classification", model="{name}")
print(classify("video.mp4"))  # a file, or its frames as an array (T, H, W, 3) of bytes""",
    None: """\
from transformers import {auto_class}

import mingru_hf  # registers MinGRU with the Auto classes

model = {auto_class}.from_pretrained("{name}")""",
}
HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)


def write_model_card(
    path: str | Path,
    model: nn.Module,
    args: TrainArguments,
    results: dict,
    dataset_name: str,
    task: str | None = None,
    auto_class: str = "AutoModel",
    unit: str = "token",
) -> None:
    """Write a model card in the Hub's format, with the results as a `model-index`.

    Args:
        path: the README.md to write.
        model: provides its config and its number of parameters.
        args: how the model was trained.
        results: the return value of `train`.
        dataset_name: name of the training data, as shown to the reader.
        task: the Hub's pipeline tag (`text-generation`), None if none fits.
        auto_class: the Auto class with which the example loads the model.
        unit: what one target belongs to: token, or clip.
    """
    name = args.hub_name
    # Where the example loads the model from, escaped as in a Python string.
    source = name if args.push_to_hub else json.dumps(Path(args.output_dir).as_posix(), ensure_ascii=False)[1:-1]
    metrics = [
        (kind, title.replace("token", unit), results["final"][key])
        for key, (kind, title) in METRIC_NAMES.items()
        if key in results["final"] and (unit == "token" or kind != "perplexity")
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=[model.config.model_type, GENERATED],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task or "other",
                dataset_type="other",
                dataset_name=dataset_name,
                dataset_split="validation",
                metric_type=kind,
                metric_name=title,
                metric_value=round(value, 6),
            )
            for kind, title, value in metrics
        ],
    )
    sizes = [
        (key, getattr(model.config, key))
        for key in ("hidden_size", "hidden_sizes", "num_hidden_layers", "vocab_size", "num_frames")
        if getattr(model.config, key, None) is not None
    ]
    epochs = "a stream" if results["epoch"] is None else f"{results['epoch']:.2f} epochs"
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        "---",
        data.to_yaml(),
        "---",
        f"# {name}",
        "",
        f"`{type(model).__name__}` with {parameters:,} parameters "
        f"({', '.join(f'{key} {value}' for key, value in sizes)}), trained on {_as_text(dataset_name)} "
        "with mingru-hf.",
        "",
        "## Results",
        "",
        "Results of the saved weights on the validation set. The curve is in `metrics.json` and drawn in `loss.png`.",
        "",
        "| Metric | Value |",
        "|---|---|",
        *(f"| {title} | {value:.4f} |" for _, title, value in metrics),
        "",
        "![Loss over the optimizer steps](loss.png)",
        "",
        "## Use",
        "",
        "```python",
        LOADING.get(task, LOADING[None]).format(name=source, auto_class=auto_class),
        "```",
        "",
        "If mingru-hf is not installed, leave out its import and pass `trust_remote_code=True` to every call that "
        "loads: the model's code is stored next to its weights.",
        "",
        "## Training",
        "",
        f"{results['step']:,} optimizer steps of {results['examples_per_step']} examples "
        f"({epochs}) in {results['train_seconds']:,.0f} s, "
        f"mixed precision {results['mixed_precision']}.",
        "",
        *(f"- `{key}`: {getattr(args, key)}" for key in HYPERPARAMETERS),
        f"- `num_warmup_steps`: {results['num_warmup_steps']}",
        *(f"- `{key}`: {value}" for key, value in results["data_settings"].items()),
        "",
        f"Transformers {transformers.__version__}, PyTorch {torch.__version__}, "
        f"Datasets {datasets.__version__}, Accelerate {accelerate.__version__}.",
        "",
    ]
    text = "\n".join(lines)
    write_whole(path, lambda temporary: temporary.write_text(f"{text}\n{_seal(text)}", encoding="utf-8"))


def may_be_rewritten(path: str | Path) -> bool:
    """Return whether a card is missing, or unchanged since training wrote it (changes by `name_model_card` aside).

    Args:
        path: the README.md.
    """
    if not Path(path).exists():
        return True
    content = Path(path).read_text(encoding="utf-8", errors="replace")
    text, found, seal = content.rpartition(f"\n{_SEAL}")
    return bool(found) and _SEAL + seal == _seal(text)


def _seal(text: str) -> str:
    """Return a card's last line: an HTML comment with a checksum that shows whether the card has been edited."""
    return f"{_SEAL} {zlib.crc32(SOURCE.sub('', text).encode()):08x} -->\n"


def _as_text(name: str) -> str:
    """Escape a name so that Markdown shows it literally, on one line."""
    return re.sub(r"([\\`*_\[\]<>&~|$])", r"\\\1", " ".join(name.split()))
