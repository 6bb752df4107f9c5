#!/usr/bin/env python
"""Measure the loss of a language model on a text: nats per token and per character, and the perplexity.

    python scripts/evaluate_causal_lm.py --model_name_or_path runs/mine --test_file test.txt
    python scripts/evaluate_causal_lm.py --model_name_or_path runs/tiny --dataset_name Trelis/tiny-shakespeare

Every token of the text except the first is predicted once. By default, the text is cut into blocks, as for
validation during training: with the same block_size and the validation split, the loss equals that validation
loss. With --carry_state, the model keeps its state from block to block, as when it reads a stream, and each
token is predicted from all tokens before it.
"""

import dataclasses
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import tqdm

import mingru_hf  # noqa: F401  registers MinGRU with the Auto classes
from mingru_hf.data.text import (
    DocumentPositions,
    characters_per_token,
    evaluation_blocks,
    has_validation_split,
    load_text_split,
    unknown_share,
)
from mingru_hf.training.arguments import option, parse_dataclasses
from mingru_hf.training.checkpoints import check_writable, write_json
from mingru_hf.training.loop import evaluate, loss_scores, resolve_mixed_precision, summary
from mingru_hf.training.models import check_block_size, check_token_ids, load_pretrained, training_arguments


@dataclass(kw_only=True)
class EvaluateArguments:
    """Options for the model and the text."""

    model_name_or_path: str = option(MISSING, "the model: a directory, or a name on the Hub", group="model")
    output_file: str | None = option(None, "also write the numbers to this JSON file")
    overwrite_output_file: bool = option(False, "replace output_file if it exists")
    dataset_name: str = option(
        "shakespeare", "as in training: the plays, a directory, or a name on the Hub", group="data"
    )
    dataset_config_name: str | None = option(None, "configuration of the dataset")
    train_file: str | None = option(None, "with --split validation: the file that the model was trained on")
    test_file: str | None = option(
        None, "evaluate on this file instead: txt, json, jsonl, ndjson, csv, parquet or arrow"
    )
    split: str = option("test", "the split to evaluate on: test, or validation as held out in training")
    validation_split_percentage: int = option(10, "as in training, for the validation split")
    text_column_name: str | None = option(None, "the column with the text; default: found by its type")
    cache_dir: str | None = option(None, "cache directory of the datasets library")
    block_size: int = option(256, "tokens that the model reads at a time", least=2)
    packing: str = option(
        "concatenate", "as in training: the state at the start of a document", ("concatenate", "reset")
    )
    carry_state: bool = option(False, "keep the state from block to block instead of resetting it")
    per_device_eval_batch_size: int = option(
        64, "blocks per batch, unless the state is carried", group="machine", positive=True
    )
    dataloader_num_workers: int = option(0, "processes that prepare the batches; 0: the main process", least=0)
    mixed_precision: str = option("auto", "precision of the matrix products", ("auto", "no", "bf16", "fp16"))
    use_cpu: bool = option(False, "stay on the CPU even if there is a GPU")

    def __post_init__(self):
        if self.carry_state and self.packing == "reset":
            raise ValueError("carry_state keeps the state, but packing reset clears it: leave one of them out")


def parse_args(argv: list[str] | None) -> tuple:
    """Read the command line."""
    return parse_dataclasses(__doc__, argv, EvaluateArguments)


def check_held_out(args: EvaluateArguments, trained: dict) -> None:
    """Refuse a validation split that training did not hold out, since the model was trained on it.

    Args:
        args: the options that select the text.
        trained: the arguments recorded by training; those of other scripts, without `train_file`, are not checked.

    Raises:
        ValueError: if the end of the text is not the part that training held out.
    """
    if "train_file" not in trained:
        return
    names = ("dataset_name", "dataset_config_name", "train_file", "validation_split_percentage")
    pairs = {name: (trained.get(name), getattr(args, name)) for name in names}
    differing = [name for name, pair in pairs.items() if len({Path(str(value)).name for value in pair}) > 1]
    if trained.get("validation_file") is not None:
        was, advice = f"validated on {trained['validation_file']}", "give that file as --test_file"
    elif trained.get("streaming"):
        first = f"the first {trained['validation_documents']} documents"
        was, advice = f"validated on {first} of a stream", "give those documents, or a new text, as --test_file"
    elif differing:
        values = {name: pairs[name][0] for name in differing}
        told = (f"no {name}" if value is None else f"{name} {value}" for name, value in values.items())
        was = f"trained with {', '.join(told)}"
        advice = "give these options as in training, the same text under the same name, or a new one as --test_file"
    else:
        return
    if args.train_file is None and has_validation_split(args.dataset_name, args.dataset_config_name, args.cache_dir):
        return
    raise ValueError(
        f"{args.model_name_or_path} was {was}, so the end of {args.train_file or args.dataset_name} is not the "
        f"part that training held out: {advice}"
    )


@torch.no_grad()
def loss_of_stream(model, blocks, accelerator: Accelerator) -> float:
    """Return the nats per token of a text cut by `evaluation_blocks`, read once with the state carried throughout."""
    cache, counts, losses = DynamicCache(config=model.config), [], []
    for row in tqdm(blocks.with_format("torch"), desc="blocks"):
        # Each block begins with the last token of the previous block; the last block is padded.
        targets = row["labels"].long()[None, 1:]
        counts.append(int((targets != -100).sum()))
        ids, targets = row["input_ids"].long()[None, :-1].to(accelerator.device), targets.to(accelerator.device)
        with accelerator.autocast():
            output = model(ids, labels=targets, shift_labels=targets, cache=cache, skip_logits=True)
        losses.append(output.loss.float())
    counts = torch.tensor(counts, dtype=torch.float64)
    return (counts @ torch.stack(losses).cpu().double() / counts.sum()).item()


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    with parser.user_errors():
        if args.output_file is not None and Path(args.output_file).exists() and not args.overwrite_output_file:
            raise ValueError(f"{args.output_file} exists: choose another output_file, or add --overwrite_output_file")
        if args.output_file is not None:
            if Path(args.output_file).is_dir():
                raise ValueError(f"output_file {args.output_file} is a directory: give the name of a file")
            check_writable(Path(args.output_file).parent)
        precision = resolve_mixed_precision(args.mixed_precision, args.use_cpu)
        accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=precision)
        if args.carry_state and accelerator.num_processes > 1:
            raise ValueError("carry_state reads one text from beginning to end: start only one process")
        model = load_pretrained(AutoModelForCausalLM, args.model_name_or_path).to(accelerator.device).eval()
        tokenizer = load_pretrained(AutoTokenizer, args.model_name_or_path)
        if args.carry_state and model.config.model_type != "mingru":
            raise ValueError(
                f"carry_state needs a MinGRU, but {args.model_name_or_path} is a {model.config.model_type} model"
            )
        check_block_size(args.block_size, model)
        trained = training_arguments(args.model_name_or_path)
        if args.split == "validation" and args.test_file is None:
            check_held_out(args, trained)
        names = ("dataset_name", "dataset_config_name", "train_file", "validation_split_percentage")
        source = {name: getattr(args, name) for name in names}
        text = load_text_split(args.split, args.test_file, args.text_column_name, args.cache_dir, **source)
        add_eos = trained.get("add_eos", len(text) > 1) and tokenizer.eos_token_id is not None
        if args.packing == "reset" and tokenizer.eos_token_id is None:
            raise ValueError("packing reset needs a tokenizer with an eos token")
        if args.packing == "reset" and len(text) > 1 and not add_eos:
            raise ValueError(
                f"packing reset needs a model trained on several documents, but {args.model_name_or_path} was trained "
                "on one text"
            )
        blocks = evaluation_blocks(text, tokenizer, args.block_size, add_eos=add_eos)
        for rows in blocks.with_format("torch").iter(1000):
            check_token_ids(rows["input_ids"], model)

    share = unknown_share(blocks, tokenizer)
    if share > 0.001:
        accelerator.print(
            f"warning: {100 * share:.1f} % of the tokens are {tokenizer.unk_token}, unknown to the tokenizer"
        )
    ratio = characters_per_token(text, blocks)
    if args.carry_state:
        scores = loss_scores(loss_of_stream(model, blocks, accelerator), ratio)
    else:
        model = accelerator.prepare_model(model, evaluation_mode=True)
        collate_fn = DocumentPositions(tokenizer.eos_token_id) if args.packing == "reset" else None
        scores = evaluate(
            model,
            blocks,
            accelerator,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            collate_fn=collate_fn,
            characters_per_token=ratio,
        )
    accelerator.print(summary(scores).removeprefix("validation "))
    if args.output_file is not None and accelerator.is_main_process:
        Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output_file, scores | {"arguments": dataclasses.asdict(args)})


if __name__ == "__main__":
    main()
