"""The scripts as a user runs them: on a tiny text, with a tiny model, and with mistakes."""

import argparse
import functools
import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
import unicodedata
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForVideoClassification,
    AutoTokenizer,
    AutoVideoProcessor,
    ConvNextImageProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetModel,
    pipeline,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN

from mingru_hf import MinGRUForCausalLM
from mingru_hf.data.av import write_video
from mingru_hf.data.moving_shapes import CLASSES
from mingru_hf.data.text import build_tokenizer, load_text_datasets
from mingru_hf.linear import FEW_ROWS_ARE_FASTER
from mingru_hf.scan_numba import NUMBA_AVAILABLE
from mingru_hf.training.checkpoints import unlock_all
from mingru_hf.training.models import prompt_ids

VIDEO = all(map(importlib.util.find_spec, ("av", "torchvision")))
SCRIPTS = Path(__file__).parents[1] / "scripts"
TEXT = "".join(f"LINE {i}:\nthe cat sat on the mat, and the dog sat on log number {i}.\n\n" for i in range(150))
TINY = ["--config_overrides", "hidden_size=16,num_hidden_layers=1", "--block_size", "32", "--use_cpu"]
FAST = ["--mixed_precision", "no", "--num_warmup_steps", "0", "--learning_rate", "0.01", "--eval_steps", "10"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Use one thread: for models this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(name):
    """Import a script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name, *argv):
    """Run a script's main() in this process, after resetting the state that accelerate keeps from the last run."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    load(name).main([str(word) for word in argv])


def run(*words, **kwargs):
    """Run a command in a separate process."""
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=300, **kwargs)


def error_of(capsys, name, *argv):
    """Run a script that must end with exit code 2 and a one-line error, and return that line."""
    with pytest.raises(SystemExit) as error:
        call(name, *argv)
    unlock_all()  # as at the end of the script's process
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"{Path(sys.argv[0]).name}: error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    """Return the directory of a character model after 40 steps."""
    directory = tmp_path_factory.mktemp("runs") / "lm"
    call(
        "train_causal_lm", "--train_file", text_file, "--output_dir", directory, "--max_train_steps", 40, *TINY, *FAST
    )
    return directory


# ---- train_causal_lm ----


def test_training_leaves_a_model_that_loads_by_its_directory_alone(trained):
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert type(model) is MinGRUForCausalLM
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("the cat\nsat").input_ids) == "the cat\nsat"
    metrics = json.loads((trained / "metrics.json").read_text())
    final = metrics["final"]
    assert final["eval_loss"] == final["eval_loss_per_character"]
    assert 0 < final["eval_loss"] < metrics["history"][0]["loss"] - 1
    assert (trained / "loss.png").stat().st_size > 1000
    assert "text.txt" in (trained / "README.md").read_text()


def test_evaluation_gives_the_loss_of_training(text_file, trained, tmp_path, capsys):
    metrics = json.loads((trained / "metrics.json").read_text())
    file = tmp_path / "new" / "scores.json"
    options = ("evaluate_causal_lm", "--model_name_or_path", trained, "--use_cpu", "--mixed_precision", "no")
    held_out = (*options, "--train_file", text_file, "--split", "validation")
    call(*held_out, "--block_size", 32, "--output_file", file)  # the directory of the file is created
    scores = json.loads(file.read_text())
    assert scores["eval_loss"] == pytest.approx(metrics["final"]["eval_loss"], rel=1e-5)
    assert f"loss {scores['eval_loss']:.4f} nats per character, perplexity" in capsys.readouterr().out
    assert "--overwrite_output_file" in error_of(capsys, *held_out, "--output_file", file)

    # When the state is carried over, the block size does not change the loss: it is that of one pass over the text.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    test = tmp_path / "test.txt"
    test.write_text(TEXT[:1000])
    ids = tokenizer(TEXT[:1000], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    for block_size in (32, 333, 5000):
        more = ("--carry_state", "--block_size", block_size, "--output_file", file, "--overwrite_output_file")
        call(*options, "--test_file", test, *more)
        assert json.loads(file.read_text())["eval_loss"] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "plain").write_text("a file")
    assert "plain" in error_of(capsys, *held_out, "--output_file", tmp_path / "plain" / "scores.json")
    assert f"{text_file} has no split 'test', expected one of train, validation" in error_of(
        capsys, *options, "--train_file", text_file
    )
    assert "is a directory, expected a file: give it as dataset_name" in error_of(
        capsys, *options, "--test_file", tmp_path
    )


def test_evaluation_separates_documents_as_training_did(tmp_path, capsys):
    documents, directory, file = tmp_path / "documents.jsonl", tmp_path / "lm", tmp_path / "scores.json"
    documents.write_text("".join(json.dumps({"text": TEXT[50 * i : 50 * i + 90]}) + "\n" for i in range(150)))
    data = ("--train_file", documents, "--cache_dir", tmp_path / "cache", "--packing", "reset")
    call("train_causal_lm", *data, "--output_dir", directory, "--max_train_steps", 10, *TINY, *FAST)
    trained = json.loads((directory / "metrics.json").read_text())["final"]["eval_loss"]
    options = ("evaluate_causal_lm", "--model_name_or_path", directory, "--block_size", 32, "--use_cpu", *data)
    options += ("--split", "validation", "--mixed_precision", "no", "--output_file", file)
    call(*options)
    assert json.loads(file.read_text())["eval_loss"] == pytest.approx(trained, rel=1e-5)
    assert "leave one of them out" in error_of(capsys, *options, "--carry_state")


def test_evaluation_holds_out_what_training_held_out_or_says_what_to_do(trained, text_file, tmp_path, capsys):
    model = shutil.copytree(trained, tmp_path / "lm")
    metrics = json.loads((model / "metrics.json").read_text())
    evaluate = ("evaluate_causal_lm", "--model_name_or_path", model, "--split", "validation", "--use_cpu")
    same = (*evaluate, "--train_file", text_file, "--cache_dir", tmp_path / "cache")
    shutil.copy(text_file, tmp_path / "other.txt")
    for more, message in {
        ("--validation_split_percentage", 20): "trained with validation_split_percentage 10, so the end of",
        ("--train_file", tmp_path / "other.txt"): f"trained with train_file {text_file}, so the end of",
    }.items():
        assert f"{model} was {message}" in error_of(capsys, *same, *more)
    for changes, message in {
        ("streaming", True): "validated on the first 500 documents of a stream",
        ("validation_file", "v.txt"): "validated on v.txt, so the end of",
    }.items():
        arguments = metrics["arguments"] | dict([changes])
        (model / "metrics.json").write_text(json.dumps(metrics | {"arguments": arguments}))
        error = error_of(capsys, *same)
        assert f"{model} was {message}" in error
        assert "as --test_file" in error
        call(*evaluate, "--test_file", text_file)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        shutil.copy(text_file, tmp_path / "data" / f"{split}.txt")
    call(*evaluate, "--dataset_name", tmp_path / "data")  # the data set's own validation split was not trained on
    (model / "metrics.json").unlink()
    call(*same)  # without metrics.json, the training data are unknown


def test_evaluation_ends_documents_where_training_did(tmp_path, capsys):
    """Also for evaluation on one document after training on several, and the other way round."""
    documents, directory, file = tmp_path / "documents.jsonl", tmp_path / "lm", tmp_path / "scores.json"
    texts = [TEXT[:500], TEXT[500:1000], TEXT[1000:4000]]
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = ("--train_file", documents, "--cache_dir", tmp_path / "cache")
    train = ("train_causal_lm", "--max_train_steps", 2, "--per_device_train_batch_size", 4, *TINY, *FAST)
    call(*train, *data, "--output_dir", directory)
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["arguments"]["add_eos"]
    options = ("evaluate_causal_lm", "--model_name_or_path", directory, "--block_size", 32, "--use_cpu")
    options += ("--mixed_precision", "no", "--output_file", file, "--overwrite_output_file")
    held_out = load_text_datasets(train_file=documents, cache_dir=tmp_path / "cache")["validation"]["text"]
    assert len(held_out) == 1
    (tmp_path / "held_out.txt").write_text(held_out[0])
    for source in ((*data, "--split", "validation"), ("--test_file", tmp_path / "held_out.txt")):
        call(*options, *source)
        assert json.loads(file.read_text())["eval_loss"] == pytest.approx(metrics["final"]["eval_loss"], rel=1e-5)
    (tmp_path / "one.txt").write_text(TEXT)
    call(*train, "--train_file", tmp_path / "one.txt", "--output_dir", directory, "--overwrite_output_dir")
    assert not json.loads((directory / "metrics.json").read_text())["arguments"]["add_eos"]
    several = (*options, "--test_file", documents, "--cache_dir", tmp_path / "cache")
    call(*several)
    scores = json.loads(file.read_text())
    assert scores["eval_loss"] == scores["eval_loss_per_character"]  # every token is a character
    assert "was trained on one text" in error_of(capsys, *several, "--packing", "reset")


def test_mistakes_in_evaluation_end_with_one_line(trained, text_file, tmp_path, capsys):
    evaluate = ("evaluate_causal_lm", "--test_file", text_file, "--use_cpu", "--model_name_or_path")
    directory = ("--output_file", tmp_path, "--overwrite_output_file")
    assert f"{tmp_path} is a directory: give the name of a file" in error_of(capsys, *evaluate, trained, *directory)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=64)).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "gpt2")
    short = (*evaluate, tmp_path / "gpt2", "--block_size")
    assert "block_size 65 is more than the model's 64 positions" in error_of(capsys, *short, 65)
    assert "carry_state needs a MinGRU" in error_of(capsys, *short, 64, "--carry_state")
    call(*short, 64)


def test_an_empty_prompt_is_a_token_that_the_model_was_trained_on(trained, tmp_path, capsys):
    """After training on a single text, the tokenizer has no beginning-of-text token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id == 0
    assert tokenizer.decode(prompt_ids(tokenizer, "")[0]) == "\n"
    assert tokenizer.decode(model.generate(max_new_tokens=1)[0, 0]) == "\n"
    write = pipeline("text-generation", str(trained), max_new_tokens=5)
    for prompt in ("\n", "the", ""):
        assert write(prompt)[0]["generated_text"].startswith(prompt or "\n")
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.split("\n\n")))
    data = ("--train_file", documents, "--cache_dir", tmp_path / "cache", "--sample_tokens", 3)
    call("train_causal_lm", *data, "--output_dir", tmp_path / "lm", "--max_train_steps", 1, *TINY, *FAST)
    assert AutoTokenizer.from_pretrained(tmp_path / "lm").bos_token_id == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "lm").config.bos_token_id == 0


def test_ctrl_c_says_how_to_go_on(text_file, tmp_path, capsys, monkeypatch):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    module = load("train_causal_lm")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", interrupt)
    with pytest.raises(SystemExit) as end:
        module.main([*map(str, ("--train_file", text_file, "--output_dir", tmp_path / "lm", *TINY, *FAST))])
    assert end.value.code == 130
    assert "interrupted; if --checkpointing_steps was set, repeat the command with" in capsys.readouterr().err


def test_documents_without_an_end_are_announced(tmp_path, capsys):
    tokenizer = build_tokenizer("char", [TEXT])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": TEXT[: 300 + i]}) + "\n" for i in range(9)))
    options = ("--tokenizer_name", tmp_path / "tokenizer", "--cache_dir", tmp_path / "cache", "--max_train_steps", 1)
    call("train_causal_lm", "--train_file", documents, *options, "--output_dir", tmp_path / "lm", *TINY, *FAST)
    printed = capsys.readouterr().out
    assert "the tokenizer has no eos token" in printed
    assert "training for 1 optimizer steps, 64 examples a step" in printed


def test_training_prints_the_loss_and_where_the_model_is(text_file, tmp_path, capsys):
    directory = tmp_path / "lm"
    call("train_causal_lm", "--train_file", text_file, "--output_dir", directory, "--max_train_steps", 2, *TINY, *FAST)
    lines = capsys.readouterr().out.splitlines()
    assert "parameters" in lines[0]
    assert lines[-2].startswith("final validation loss")
    assert "nats per character, perplexity" in lines[-2]
    assert lines[-1].endswith(f"saved in {directory}")


def test_training_goes_on_from_a_checkpoint(trained, text_file, tmp_path):
    call(
        "train_causal_lm",
        *("--model_name_or_path", trained, "--train_file", text_file, "--output_dir", tmp_path / "more"),
        *("--max_train_steps", 10, "--block_size", 32, "--use_cpu", *FAST),
    )
    before, after = (json.loads((d / "metrics.json").read_text()) for d in (trained, tmp_path / "more"))
    assert after["history"][0]["loss"] < before["history"][0]["loss"] - 1
    assert after["final"]["eval_loss"] < before["final"]["eval_loss"] + 0.1


def test_training_with_bpe_on_json_reports_both_losses(tmp_path, capsys):
    file = tmp_path / "text.jsonl"
    rows = [{"id": i, "story": line} for i, line in enumerate(TEXT.split("\n\n")) if line]
    file.write_text("\n".join(map(json.dumps, rows)))
    call(
        "train_causal_lm",
        *("--train_file", file, "--text_column_name", "story", "--cache_dir", tmp_path / "cache"),
        *("--tokenizer_name", "bpe", "--vocab_size", 300, "--output_dir", tmp_path / "bpe"),
        *("--max_train_steps", 2, *TINY, *FAST),
    )
    metrics = json.loads((tmp_path / "bpe" / "metrics.json").read_text())
    assert 0 < metrics["final"]["eval_loss_per_character"] < metrics["final"]["eval_loss"]
    final = capsys.readouterr().out.splitlines()[-2]
    assert "nats per token" in final
    assert "nats per character" in final
    assert len(AutoTokenizer.from_pretrained(tmp_path / "bpe")) == 300


def test_documents_apart_a_sample_and_a_way_back(tmp_path, capsys):
    file, directory = tmp_path / "text.jsonl", tmp_path / "run"
    file.write_text("\n".join(json.dumps({"text": line}) for line in TEXT.split("\n\n") if line))
    command = (
        *("train_causal_lm", "--train_file", file, "--cache_dir", tmp_path / "cache", "--packing", "reset"),
        *("--max_train_steps", 20, "--checkpointing_steps", 10, "--sample_tokens", 8, "--gradient_checkpointing"),
        *("--shift_blocks", "--output_dir", directory, *TINY, *FAST),
    )
    call(*command)
    metrics = json.loads((directory / "metrics.json").read_text())
    assert all("sample" in record for record in metrics["history"] if "eval_loss" in record)
    assert "holds checkpoint-20 of another run" in error_of(capsys, *command)
    call(*command, "--resume_from_checkpoint", "latest")
    out = capsys.readouterr().out
    assert f"resuming from {directory / 'checkpoint-20'}" in out
    assert json.loads((directory / "metrics.json").read_text())["final"] == metrics["final"]
    again = (*command, "--resume_from_checkpoint", "latest")
    assert "with seed 0, not 1" in error_of(capsys, *again, "--seed", 1)
    assert "with packing reset, not concatenate" in error_of(capsys, *again, "--packing", "concatenate")
    one_document = tmp_path / "one.txt"
    one_document.write_text(TEXT)
    reset = ("train_causal_lm", "--train_file", one_document, "--packing", "reset", "--use_cpu")
    assert "several documents" in error_of(capsys, *reset, "--output_dir", tmp_path / "other")


def test_documents_as_a_stream(tmp_path, capsys):
    file, directory = tmp_path / "text.jsonl", tmp_path / "run"
    file.write_text("\n".join(json.dumps({"text": line}) for line in TEXT.split("\n\n") if line))
    stream = (
        *("train_causal_lm", "--train_file", file, "--cache_dir", tmp_path / "cache", "--streaming"),
        *("--validation_documents", 20, "--output_dir", directory, *TINY, *FAST),
    )
    bpe = ("--tokenizer_name", "bpe", "--vocab_size", 300)
    assert "give max_train_steps or max_train_seconds" in error_of(capsys, *stream, *bpe)
    stream = (*stream, "--max_train_steps", 40, "--checkpointing_steps", 40)
    assert "--tokenizer_name bpe" in error_of(capsys, *stream)
    assert "leave it out with streaming" in error_of(capsys, *stream, *bpe, "--shift_blocks")
    call(*stream, *bpe, "--packing", "reset")
    assert "a stream of tokens to train on" in capsys.readouterr().out
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["final"]["eval_loss"] < metrics["history"][0]["loss"] - 1
    assert "a stream" in (directory / "README.md").read_text()
    # The resumed run would train on documents that were held out before.
    again = (*stream, *bpe, "--packing", "reset", "--resume_from_checkpoint", "latest", "--validation_documents", 10)
    assert "with validation documents 20, not 10" in error_of(capsys, *again)


def test_a_checkpoint_keeps_its_own_tokenizer(trained, text_file, tmp_path, capsys):
    train = ("train_causal_lm", "--model_name_or_path", trained, "--output_dir", tmp_path / "run", "--use_cpu")
    for kind in ("char", "bpe"):
        error = error_of(capsys, *train, "--train_file", text_file, "--tokenizer_name", kind)
        assert f"tokenizer_name {kind} would change the token ids" in error
        assert "remove it" in error
    MinGRUForCausalLM.from_pretrained(trained).save_pretrained(tmp_path / "bare")
    bare = f"{tmp_path / 'bare'} contains a model but no tokenizer"
    assert bare in error_of(capsys, *train[:2], tmp_path / "bare", *train[3:], "--train_file", text_file)
    assert bare in error_of(capsys, "generate_text", "--model_name_or_path", tmp_path / "bare")
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path / "bare"
    )  # its tokenizer class would load with an empty vocabulary
    assert bare in error_of(capsys, "generate_text", "--model_name_or_path", tmp_path / "bare")


def test_unknown_tokens_are_counted_in_a_warning(trained, text_file, tmp_path, capsys):
    file = tmp_path / "other.txt"
    file.write_text(TEXT.replace("the", "тхе"))
    train = ("train_causal_lm", "--max_train_steps", 1, "--block_size", 32, "--use_cpu", *FAST)
    call(*train, "--model_name_or_path", trained, "--train_file", file, "--output_dir", tmp_path / "run")
    share = 100 * file.read_text().count("тхе") * 3 / len(TEXT)
    said = re.findall(r"warning: (.*) % of the tokens of the (.*) text are <unk>", capsys.readouterr().out)
    assert [name for _, name in said] == ["training", "validation"]
    assert [float(number) for number, _ in said] == pytest.approx([share, share], abs=0.5)
    call(*train, "--model_name_or_path", trained, "--train_file", text_file, "--output_dir", tmp_path / "same")
    assert "warning" not in capsys.readouterr().out


def test_documents_that_cannot_be_read_end_with_one_line(tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "a"}\n{"text":\n')
    train = ("train_causal_lm", "--train_file", file, "--output_dir", tmp_path / "run", "--use_cpu")
    streamed = ("--streaming", "--tokenizer_name", "bpe", "--max_train_steps", 1)
    for more in ((), streamed):
        assert f"{file} cannot be read: JSON parse error" in error_of(capsys, *train, *more)


def test_any_other_causal_model_trains_too(text_file, tmp_path, capsys):
    config = tmp_path / "gpt2.json"
    config.write_text('{"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}')
    train = (
        *("train_causal_lm", "--train_file", text_file, "--config_name", config, "--output_dir", tmp_path / "gpt2"),
        *("--max_train_steps", 2, "--use_cpu", *FAST, "--block_size"),
    )
    assert "block_size 33 is more than the model's 32 positions" in error_of(capsys, *train, 33)
    call(*train, 32)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").config.model_type == "gpt2"


def test_mistakes_in_training_end_with_one_line(trained, text_file, tmp_path, capsys):
    train = ("train_causal_lm", "--output_dir", tmp_path / "run", "--use_cpu")
    assert "holds another run" in error_of(capsys, "train_causal_lm", "--output_dir", trained, "--use_cpu")
    assert "missing.txt" in error_of(capsys, *train, "--train_file", tmp_path / "missing.txt")
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "empty" in error_of(capsys, *train, "--train_file", empty)
    assert "block_size" in error_of(capsys, *train, "--train_file", text_file, "--block_size", 100_000)
    assert "no such file" in error_of(capsys, *train, "--train_file", text_file, "--config_name", "missing.json")
    assert "'x'" in error_of(capsys, *train, "--train_file", text_file, "--config_overrides", "x=1")
    error = error_of(capsys, *train, "--train_file", text_file, "--config_overrides", "vocab_size=3")
    assert "vocab_size 3 is less than the" in error
    assert "config" in error_of(capsys, *train, "--train_file", text_file, "--config_overrides", "hidden_size=0")
    error = error_of(capsys, *train, "--train_file", "not-looked-for.txt", "--config_overrides", "hiden_size=8")
    assert "mingru has no field 'hiden_size'; did you mean 'hidden_size'?" in error
    assert "no such model" in error_of(capsys, *train, "--train_file", text_file, "--model_name_or_path", "./nothing")
    both = ("--model_name_or_path", trained, "--config_name", trained)
    assert "leave out config_name" in error_of(capsys, *train, *both)
    assert "must be positive" in error_of(capsys, *train, "--max_train_steps", 0)
    assert "invalid int value" in error_of(capsys, *train, "--max_train_steps", "many")
    assert "required: --output_dir" in error_of(capsys, "train_causal_lm")
    assert not (tmp_path / "run").exists()
    nowhere = error_of(capsys, "train_causal_lm", "--output_dir", empty / "run", "--train_file", "missing.txt")
    assert f"output_dir {empty / 'run'} cannot be written to" in nowhere


def test_a_run_goes_on_with_another_validation_text(text_file, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(TEXT[:500])
    train = ("train_causal_lm", "--output_dir", tmp_path / "run", "--train_file", text_file, *TINY, *FAST)
    train += ("--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
    call(*train, "--max_train_steps", 2, "--validation_file", text_file)
    assert "validation set has changed" not in capsys.readouterr().out
    call(*train, "--max_train_steps", 4, "--validation_file", other)
    assert "validation set has changed" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_another_text(text_file, tmp_path, capsys):
    """An edit can keep the number of blocks and yet change the token ids or the data."""
    edited, reordered = tmp_path / "edited.txt", tmp_path / "reordered.txt"
    edited.write_text(TEXT.replace("dog", "dög"))
    reordered.write_text(TEXT.replace("dog", "god"))
    for kind in ("char", "bpe"):
        train = ("train_causal_lm", "--output_dir", tmp_path / kind, "--tokenizer_name", kind, *TINY, *FAST)
        train += ("--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
        train += ("--vocab_size", 300) if kind == "bpe" else ()
        call(*train, "--train_file", text_file, "--max_train_steps", 2)
        kept = (tmp_path / kind / "tokenizer.json").read_bytes()
        if kind == "char":
            error = error_of(capsys, *train, "--train_file", edited, "--max_train_steps", 4)
            assert "checkpoint-2 belongs to a run with different tokens" in error
            assert "None there, 'ö' here" in error
        error = error_of(capsys, *train, "--train_file", reordered, "--max_train_steps", 4)
        assert f"run {'with different tokens' if kind == 'bpe' else 'on different training data'}" in error
        call(*train, "--train_file", text_file, "--max_train_steps", 4)
        assert json.loads((tmp_path / kind / "metrics.json").read_text())["step"] == 4
        assert (tmp_path / kind / "tokenizer.json").read_bytes() == kept


# ---- generate_text ----


def test_generation_streams_one_text(trained, capsys):
    call("generate_text", "--model_name_or_path", trained, "--prompt", "LINE", "--max_new_tokens", 20, "--use_cpu")
    out, err = capsys.readouterr()
    assert out.startswith("LINE")
    assert "per second" in err


def test_generation_repeats_itself_with_a_seed_and_without_a_temperature(trained, tmp_path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the dog")

    def text(*argv):
        call("generate_text", "--model_name_or_path", trained, "--max_new_tokens", 30, "--use_cpu", *argv)
        return capsys.readouterr().out

    assert text("--prompt", "the dog", "--seed", 1) == text("--prompt_file", prompt, "--seed", 1)
    assert text("--prompt", "the dog", "--seed", 1) != text("--prompt", "the dog", "--seed", 2)
    greedy = text("--prompt", "the dog", "--temperature", 0)
    assert greedy == text("--prompt", "the dog", "--seed", 7, "--top_k", 1)
    assert greedy == text("--prompt", "the dog", "--seed", 8, "--top_p", 0.0001)


def test_output_that_cannot_show_a_character_shows_its_code(tmp_path):
    """On Windows, a file may only take the characters of one language; what a run prints must not end it."""
    (tmp_path / "text.txt").write_text("smörgåsbord\n" * 200, encoding="utf-8")
    options = "--tokenizer_name char --block_size 8 --per_device_train_batch_size 2 --max_train_steps 2 --use_cpu"
    sizes = "hidden_size=8,num_hidden_layers=1"
    train = [SCRIPTS / "train_causal_lm.py", "--train_file", tmp_path / "text.txt", "--config_overrides", sizes]
    sample = [SCRIPTS / "generate_text.py", "--model_name_or_path", tmp_path / "out", "--prompt", "å"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for command in (
        [*train, *options.split(), "--output_dir", tmp_path / "out"],
        [*sample, "--max_new_tokens", 5, "--use_cpu"],
    ):
        process = run(sys.executable, *command, env=environment)
        assert process.returncode == 0, process.stderr
        assert "\\x" in process.stdout + process.stderr


def test_a_prompt_file_is_read_as_training_reads_its_text(trained, tmp_path, monkeypatch, capsys):
    """Newlines are kept and a byte order mark is removed, also from a pipe."""
    prompts, module = [], load("generate_text")
    monkeypatch.setattr(module, "prompt_ids", lambda tokenizer, prompt: prompts.append(prompt) or torch.tensor([[2]]))
    generate = ["--model_name_or_path", str(trained), "--max_new_tokens", "1", "--use_cpu", "--prompt_file"]
    content, file = b"\xef\xbb\xbfLINE\r\n the dog", tmp_path / "prompt.txt"
    file.write_bytes(content)
    module.main([*generate, str(file)])
    end, pipe = os.pipe()
    os.write(pipe, content)
    os.close(pipe)
    module.main([*generate, f"/dev/fd/{end}"])
    os.close(end)
    assert prompts == ["LINE\r\n the dog"] * 2


def test_generation_names_what_the_tokenizer_does_not_know(trained, capsys):
    generate = ("generate_text", "--model_name_or_path", trained, "--max_new_tokens", 2, "--use_cpu", "--prompt")
    call(*generate, "the é😀<unk>é dog")
    assert "warning: the tokenizer does not know 'é', '😀': the model reads <unk> instead" in capsys.readouterr().err
    call(*generate, "the dog")
    assert "warning" not in capsys.readouterr().err


def test_generation_of_several_texts_from_nothing(trained, capsys):
    call(
        "generate_text",
        *("--model_name_or_path", trained, "--max_new_tokens", 10, "--num_return_sequences", 3, "--seed", 0),
        "--use_cpu",
    )
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("-----")] == [
        f"----- {i} of 3 -----" for i in (1, 2, 3)
    ]
    assert "<|endoftext|>" not in out


def test_mistakes_in_generation_end_with_one_line(trained, tmp_path, capsys):
    generate = ("generate_text", "--model_name_or_path", trained)
    assert "no such prompt file" in error_of(capsys, *generate, "--prompt_file", tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt is not UTF-8" in error_of(capsys, *generate, "--prompt_file", tmp_path / "latin.txt")
    assert "not allowed with" in error_of(capsys, *generate, "--prompt_file", "a", "--prompt", "b")
    assert "prompt 'gr\\udcf6' is not UTF-8" in error_of(capsys, *generate, "--prompt", "gr\udcf6")
    assert "temperature must be" in error_of(capsys, *generate, "--temperature", -1)
    assert "temperature 0" in error_of(capsys, *generate, "--temperature", 0, "--num_return_sequences", 2)
    assert "top_p must be" in error_of(capsys, *generate, "--top_p", 1.5)
    assert "no such model" in error_of(capsys, "generate_text", "--model_name_or_path", tmp_path / "missing")
    assert "no config.json" in error_of(capsys, "generate_text", "--model_name_or_path", tmp_path)
    for seed in (-1, 2**32):
        assert f"seed must be 0 to 4294967295, not {seed}" in error_of(capsys, *generate, "--seed", seed)


def test_a_model_and_a_tokenizer_that_do_not_fit_end_with_one_line(trained, text_file, tmp_path, capsys):
    other = shutil.copytree(trained, tmp_path / "other")
    build_tokenizer("char", [TEXT + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]).save_pretrained(other)
    message = "it is not the tokenizer that the model was trained with"
    model = ("--model_name_or_path", other, "--use_cpu")
    assert message in error_of(capsys, "generate_text", *model, "--prompt", "uuu")
    assert message in error_of(capsys, "evaluate_causal_lm", *model, "--test_file", text_file)


def test_generation_tells_weights_that_are_no_numbers_and_searches_no_beams(trained, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(trained)
    model.generation_config.num_beams = 2
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path)
    generate = ("generate_text", "--model_name_or_path", tmp_path, "--max_new_tokens", 5, "--use_cpu")
    call(*generate)
    model.lm_head.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="contain NaN"):
        assert f"{tmp_path} cannot generate text" in error_of(capsys, *generate)


def test_ctrl_c_before_the_first_step_ends_with_one_line(trained, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    module = load("generate_text")
    monkeypatch.setattr(module, "load_pretrained", interrupt)
    with pytest.raises(SystemExit) as end:
        module.main(["--model_name_or_path", str(trained)])
    assert end.value.code == 130
    assert capsys.readouterr().err.strip().endswith(": interrupted")


# ---- train_selective_copying ----


def test_selective_copying_learns_a_small_task(tmp_path, capsys):
    call(
        "train_selective_copying",
        *("--num_noise_tokens", 6, "--num_memorize_tokens", 2, "--vocab_size", 4, "--output_dir", tmp_path / "run"),
        *(
            "--num_train_examples",
            2000,
            "--num_eval_examples",
            100,
            "--max_train_steps",
            200,
            "--num_warmup_steps",
            10,
        ),
        *("--config_overrides", "hidden_size=4,hidden_sizes=[32,32]", "--learning_rate", 0.01, "--use_cpu"),
    )
    accuracy = json.loads((tmp_path / "run" / "metrics.json").read_text())["final"]["eval_accuracy"]
    assert accuracy > 0.9  # chance: 0.5
    assert f"accuracy {100 * accuracy:.2f} %" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.hidden_sizes == [32, 32]

    longer = (
        *("train_selective_copying", "--model_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "longer"),
        *("--num_noise_tokens", 12, "--num_memorize_tokens", 2, "--num_eval_examples", 100, "--use_cpu"),
    )
    assert "has 4 tokens, but vocab_size is 6" in error_of(capsys, *longer)
    assert "leave out config_overrides" in error_of(capsys, *longer, "--config_overrides", "hidden_size=8")
    config = SCRIPTS / "configs" / "selective_copying.json"
    assert "leave out config_name" in error_of(capsys, *longer, "--config_name", config)
    call(*longer, "--vocab_size", 4, "--num_train_examples", 100, "--max_train_steps", 2, "--learning_rate", 1e-5)
    assert json.loads((tmp_path / "longer" / "metrics.json").read_text())["final"]["eval_accuracy"] > 0.7


def test_mistakes_in_selective_copying_end_with_one_line(tmp_path, capsys):
    copying = ("train_selective_copying", "--output_dir", tmp_path / "run", "--use_cpu")
    assert "vocab_size" in error_of(capsys, *copying, "--vocab_size", 2)
    assert "no such file" in error_of(capsys, *copying, "--config_name", "missing.json")


# ---- videos ----

VIDEO_SCRIPTS = [
    pytest.param(name, marks=pytest.mark.skipif(not VIDEO, reason="needs PyAV and torchvision: the extra video"))
    for name in (
        "make_moving_shapes",
        "train_video_classification",
        "evaluate_video_classification",
        "stream_video",
    )
]
TINY_VIDEO = [
    *("--config_name", SCRIPTS / "configs" / "moving_shapes.json", "--num_frames", 4, "--no_flip", "--use_cpu"),
    *(
        "--config_overrides",
        "hidden_sizes=[4,4],num_hidden_layers=1",
        "--crop_size",
        32,
        "--dataloader_num_workers",
        0,
    ),
    *("--per_device_train_batch_size", 4, "--mixed_precision", "no", "--num_warmup_steps", 0),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Write a few moving shapes of 32 pixels, of which one training and one test file are broken."""
    pytest.importorskip("av", reason="videos are written by PyAV")
    pytest.importorskip("torchvision", reason="transformers' video processors are built on torchvision")
    directory = tmp_path_factory.mktemp("data") / "shapes"
    sizes = ("--num_train", 16, "--num_validation", 8, "--num_test", 16, "--num_frames", 6, "--size", 32)
    call("make_moving_shapes", "--output_dir", directory, *sizes)
    (directory / "train" / "up" / "000002.mp4").write_bytes(b"broken")
    (directory / "test" / "up" / "000010.mp4").write_bytes(b"broken")
    return directory


@pytest.fixture(scope="module")
def video_model(shapes, tmp_path_factory):
    """Return the directory of a video classifier after two epochs."""
    directory = tmp_path_factory.mktemp("runs") / "video"
    cache = tmp_path_factory.mktemp("cache")
    call(
        "train_video_classification",
        *("--dataset_name", shapes, "--cache_dir", cache, "--output_dir", directory, *TINY_VIDEO),
        *("--num_train_epochs", 2, "--eval_steps", 4),
    )
    return directory


def test_a_video_classifier_is_trained_and_saved_with_its_processor(video_model):
    model = AutoModelForVideoClassification.from_pretrained(video_model)
    processor = AutoVideoProcessor.from_pretrained(video_model)
    assert set(model.config.id2label.values()) == set(CLASSES)
    assert model.config.num_frames == processor.num_frames == 4
    assert processor.crop_size == {"height": 32, "width": 32}
    metrics = json.loads((video_model / "metrics.json").read_text())
    assert metrics["frames_per_second"] > 0
    assert "tokens_per_second" not in metrics
    assert metrics["step"] == 8  # another video replaces the broken one
    assert 0 <= metrics["final"]["eval_accuracy"] <= 1
    card = (video_model / "README.md").read_text()
    assert "Validation loss (nats per clip)" in card
    assert "Perplexity" not in card


def test_training_leaves_unreadable_validation_videos_out(shapes, tmp_path, capsys):
    """The scores of the training script then equal those of the evaluation script."""
    shutil.copytree(shapes, tmp_path / "shapes")
    (tmp_path / "shapes" / "validation" / "up" / "000002.mp4").write_bytes(b"broken")
    data = ("--dataset_name", tmp_path / "shapes", "--cache_dir", tmp_path / "cache")
    options = (*TINY_VIDEO, "--max_train_steps", 2, "--per_device_eval_batch_size", 1)  # one batch has no target
    call("train_video_classification", *data, "--output_dir", tmp_path / "run", *options)
    assert "1 of 8 videos could not be read" in capsys.readouterr().out
    test = ("evaluate_video_classification", "--model_name_or_path", tmp_path / "run", *data, "--split", "validation")
    test += ("--clips_per_video", 1, "--views", "center", "--use_cpu", "--mixed_precision", "no")
    call(*test, "--dataloader_num_workers", 0)
    evaluated = json.loads((tmp_path / "run" / "evaluation-validation" / "metrics.json").read_text())
    assert evaluated["unreadable"] == 1
    final = json.loads((tmp_path / "run" / "metrics.json").read_text())["final"]
    assert final["eval_accuracy"] == pytest.approx(evaluated["accuracy"])
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "run").eval()
    processor = AutoVideoProcessor.from_pretrained(tmp_path / "run")
    losses = []
    for path in (tmp_path / "shapes" / "validation").rglob("*.mp4"):
        if path.parent.name != "up":
            with torch.no_grad():
                labels = torch.tensor([model.config.label2id[path.parent.name]])
                losses.append(model(**processor(str(path), return_tensors="pt"), labels=labels).loss.item())
    assert len(losses) == 7
    assert final["eval_loss"] == pytest.approx(sum(losses) / 7, abs=1e-5)


def test_a_pretrained_backbone_stays_as_it_is_when_frozen(shapes, tmp_path):
    config = json.loads((SCRIPTS / "configs" / "moving_shapes.json").read_text())["backbone_config"]
    config.pop("model_type")
    backbone = ResNetModel(ResNetConfig(**config))
    backbone.save_pretrained(tmp_path / "backbone")
    train = ("train_video_classification", "--dataset_name", shapes, "--cache_dir", tmp_path / "cache", *TINY_VIDEO)
    steps = ("--max_train_steps", 2, "--frame_order", "shuffled", "--learning_rate", 0.01)
    given = ("--backbone_name_or_path", tmp_path / "backbone", "--freeze_backbone")
    call(*train, *steps, *given, "--output_dir", tmp_path / "run")
    trained = AutoModelForVideoClassification.from_pretrained(tmp_path / "run")
    assert trained.config.hidden_sizes == [4, 4]
    assert trained.config.freeze_backbone
    expected = backbone.state_dict()
    for name, value in trained.model.backbone.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)

    # The checkpoint of the backbone has no image processor, so ImageNet's statistics are used.
    assert list(AutoVideoProcessor.from_pretrained(tmp_path / "run").image_mean) == IMAGENET_DEFAULT_MEAN

    # Training that starts from this model uses the processor saved with it.
    more = ("--model_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "more", "--max_train_steps", 1)
    call("train_video_classification", "--dataset_name", shapes, "--cache_dir", tmp_path / "cache", *more, "--use_cpu")
    assert AutoVideoProcessor.from_pretrained(tmp_path / "more").num_frames == 4


def test_pixels_are_normalised_as_for_the_pretrained_backbone(shapes, tmp_path, capsys, monkeypatch):
    config = json.loads((SCRIPTS / "configs" / "moving_shapes.json").read_text())["backbone_config"]
    config.pop("model_type")
    ResNetModel(ResNetConfig(**config)).save_pretrained(tmp_path / "backbone")
    own = {"image_mean": [0.5, 0.5, 0.4], "image_std": [0.5, 0.4, 0.5], "rescale_factor": 1 / 127.5}
    ConvNextImageProcessor(**own).save_pretrained(tmp_path / "backbone")
    train = ("train_video_classification", "--dataset_name", shapes, "--cache_dir", tmp_path / "cache")
    train += ("--output_dir", tmp_path / "run", "--max_train_steps", 1)
    call(*train, "--backbone_name_or_path", tmp_path / "backbone", *TINY_VIDEO)
    saved = json.loads((tmp_path / "run" / "video_preprocessor_config.json").read_text())
    assert {name: saved[name] for name in own} == own
    train = (*train, "--overwrite_output_dir", "--use_cpu", "--model_name_or_path", tmp_path / "backbone")
    assert "is a resnet model, which AutoVideoProcessor does not load" in error_of(capsys, *train)

    timm = pytest.importorskip("timm", reason="its backbones have numbers of their own")
    script, create = load("train_video_classification"), timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **kwargs | {"pretrained": False}))
    model_args = script.ModelArguments(
        backbone_name_or_path="timm/test_resnet.r160_in1k",
        config_name=str(SCRIPTS / "configs" / "moving_shapes.json"),
        config_overrides="hidden_sizes=[4,4]",
    )
    clip_args = script.resolve_clips(model_args, script.ClipArguments())
    _, processor = script.load_model(model_args, clip_args, ["a", "b"])
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5] * 3, [0.5] * 3)


def test_the_backbone_of_a_checkpoint_is_frozen_too(video_model, shapes, tmp_path):
    more = ("--model_name_or_path", video_model, "--output_dir", tmp_path / "more", "--freeze_backbone", "--use_cpu")
    steps = ("--max_train_steps", 2, "--learning_rate", 0.01, "--dataloader_num_workers", 0)
    call("train_video_classification", "--dataset_name", shapes, "--cache_dir", tmp_path / "cache", *more, *steps)
    before, after = (AutoModelForVideoClassification.from_pretrained(d) for d in (video_model, tmp_path / "more"))
    assert after.config.freeze_backbone
    for name, value in after.model.backbone.state_dict().items():
        torch.testing.assert_close(value, before.model.backbone.state_dict()[name], rtol=0, atol=0)
    assert not all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_a_checkpoints_own_processor_makes_the_clips(video_model, shapes, tmp_path, capsys):
    train = ("train_video_classification", "--model_name_or_path", video_model, "--output_dir", tmp_path / "more")
    train += ("--dataset_name", shapes, "--cache_dir", tmp_path / "cache", "--use_cpu", "--max_train_steps", 1)
    error = error_of(capsys, *train, "--num_frames", 4, "--frame_stride", 2, "--crop_size", 224)
    assert "own processor (num_frames 4, frame_stride 1, resize_size 37, crop_size 32)" in error
    assert error.endswith("leave out frame_stride and crop_size")
    assert not (tmp_path / "more").exists()
    call(*train, "--num_frames", 4, "--crop_size", 32, "--dataloader_num_workers", 0)
    clips = {"num_frames": 4, "frame_stride": 1, "resize_size": 37, "crop_size": 32}
    for directory in (video_model, tmp_path / "more"):
        assert clips.items() <= json.loads((directory / "metrics.json").read_text())["arguments"].items()
    processor = AutoVideoProcessor.from_pretrained(tmp_path / "more")
    processor.crop_size, processor.do_center_crop = None, False
    processor.save_pretrained(tmp_path / "more")
    module = load("train_video_classification")
    resolved = module.resolve_clips(
        module.ModelArguments(model_name_or_path=str(tmp_path / "more")), module.ClipArguments()
    )
    assert (resolved.resize_size, resolved.crop_size) == (37, None)


@pytest.mark.parametrize("names", [("left", "right"), tuple("abcdefgh")], ids=["fewer", "as many"])
def test_a_trained_model_learns_other_classes(video_model, shapes, tmp_path, capsys, names):
    for old, new in zip(CLASSES, names, strict=False):
        for split in ("train", "validation"):
            shutil.copytree(shapes / split / old, tmp_path / "other" / split / new)
    train = ("train_video_classification", "--model_name_or_path", video_model, "--output_dir", tmp_path / "run")
    train += ("--dataset_name", tmp_path / "other", "--cache_dir", tmp_path / "cache", "--use_cpu")
    train += ("--max_train_steps", 1, "--learning_rate", 1e-9, "--dataloader_num_workers", 0)
    error = error_of(capsys, *train)
    assert f"but the data has {names[0]!r}, {names[1]!r}" in error.replace("\n", " ")
    assert "add --ignore_mismatched_sizes" in error
    call(*train, "--ignore_mismatched_sizes")
    before, after = (AutoModelForVideoClassification.from_pretrained(d) for d in (video_model, tmp_path / "run"))
    assert sorted(after.config.id2label.values()) == sorted(names)
    for name, weight in before.model.named_parameters():
        torch.testing.assert_close(after.get_parameter(f"model.{name}"), weight, rtol=1e-5, atol=1e-6)
    for old, new in zip(before.classifiers, after.classifiers, strict=True):
        assert new.weight.shape == (len(names), old.in_features)
        assert old.weight.shape != new.weight.shape or not torch.allclose(old.weight, new.weight, atol=1e-3)


def test_a_run_does_not_go_on_with_other_classes_or_pixels(shapes, tmp_path, capsys):
    shutil.copytree(shapes, tmp_path / "shapes")
    train = ("train_video_classification", "--dataset_name", tmp_path / "shapes", "--cache_dir", tmp_path / "cache")
    train += ("--output_dir", tmp_path / "run", "--checkpointing_steps", 1, *TINY_VIDEO)
    call(*train, "--max_train_steps", 1)
    resume = (*train, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    error = error_of(capsys, *resume, "--crop_size", 24)
    assert (
        "checkpoint-1 belongs to a run with another processor (crop_size: {'height': 32, 'width': 32} there" in error
    )
    call(*resume)
    for split in ("train", "validation", "test"):
        (tmp_path / "shapes" / split / "left").rename(tmp_path / "shapes" / split / "west")
    error = error_of(capsys, *resume)
    assert "checkpoint-2 belongs to a run with different labels" in error
    assert "'left' there" in error


def test_a_model_may_spell_its_classes_otherwise(video_model, shapes, tmp_path):
    """The folder name has ü as one character, the model's label as two, as macOS writes it."""
    shutil.copytree(video_model, tmp_path / "model", ignore=shutil.ignore_patterns("evaluation*"))
    shutil.copytree(shapes, tmp_path / "shapes")
    composed, apart = (unicodedata.normalize(form, "üp") for form in ("NFC", "NFD"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"] = {n: apart if name == "up" else name for n, name in config["id2label"].items()}
    config["label2id"] = {name: int(n) for n, name in config["id2label"].items()}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for split in ("train", "validation", "test"):
        (tmp_path / "shapes" / split / "up").rename(tmp_path / "shapes" / split / composed)
    data = ("--dataset_name", tmp_path / "shapes", "--cache_dir", tmp_path / "cache", "--use_cpu")
    data += ("--model_name_or_path", tmp_path / "model", "--dataloader_num_workers", 0)
    views = ("--clips_per_video", 1, "--views", "center", "--mixed_precision", "no")
    call("evaluate_video_classification", *data, *views)
    call("train_video_classification", *data, "--output_dir", tmp_path / "run", "--max_train_steps", 1)


def test_a_video_classifier_is_tested_on_whole_videos(video_model, shapes, tmp_path, capsys, caplog):
    test = ("evaluate_video_classification", "--model_name_or_path", video_model, "--dataset_name", shapes)
    machine = (
        "--cache_dir",
        tmp_path / "cache",
        "--use_cpu",
        "--mixed_precision",
        "no",
        "--dataloader_num_workers",
        0,
    )
    call(*test, *machine, "--clips_per_video", 3)
    again = error_of(capsys, *test, *machine)
    assert "already holds metrics.json, confusion_matrix.png" in again
    assert "--overwrite_output_dir" in again
    metrics = json.loads((video_model / "evaluation-test" / "metrics.json").read_text())
    assert (metrics["videos"], metrics["unreadable"]) == (15, 1)
    assert metrics["arguments"]["views"] == "center"  # because it was trained with --no_flip
    assert "000010.mp4" in caplog.text
    matrix = torch.tensor(metrics["confusion_matrix"])
    assert matrix.sum().item() == 15
    assert metrics["accuracy"] == metrics["accuracy_vote"] == pytest.approx(matrix.trace().item() / 15)
    for number, (name, row) in enumerate(metrics["classes"].items()):
        assert row["videos"] == (1 if name == "up" else 2)
        assert row["accuracy"] == matrix[number, number].item() / row["videos"]
    assert (video_model / "evaluation-test" / "confusion_matrix.png").stat().st_size > 1000
    assert "cannot be" in error_of(capsys, *test, *machine, "--output_dir", video_model / "config.json")
    call(*test, *machine, "--clips_per_video", 3, "--overwrite_output_dir")
    assert json.loads((video_model / "evaluation-test" / "metrics.json").read_text())["classes"] == metrics["classes"]
    out = capsys.readouterr().out
    assert "1 of 16 videos could not be read" in out
    assert f"accuracy {100 * metrics['accuracy']:.2f} % of 15 videos" in out

    # The mean over a single view of one clip is the model's output for that clip.
    call(*test, *machine, "--clips_per_video", 1, "--views", "center", "--output_dir", tmp_path / "one")
    one = json.loads((tmp_path / "one" / "metrics.json").read_text())
    model = AutoModelForVideoClassification.from_pretrained(video_model).eval()
    processor = AutoVideoProcessor.from_pretrained(video_model)
    names, right = list(model.config.id2label.values()), 0
    for path in (shapes / "test").rglob("*.mp4"):
        if path.name != "000010.mp4":
            with torch.no_grad():
                logits = model(**processor(str(path), return_tensors="pt")).logits
            right += names[logits.argmax().item()] == path.parent.name
    assert one["accuracy"] == one["accuracy_mean"] == one["accuracy_view"] == pytest.approx(right / 15)


@pytest.fixture
def own_videos(shapes, tmp_path):
    """Return the directories of videos without a validation split and of a model trained on them with seed 3."""
    directory = tmp_path / "mine"
    for split in ("train", "test"):
        for path in (shapes / split).rglob("*.mp4"):
            (directory / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, directory / path.parent.name / f"{split[:2]}{path.name}")
    call(
        "train_video_classification",
        *("--dataset_name", directory, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"),
        *("--seed", 3, "--validation_split_percentage", 30, "--max_train_steps", 1, "--checkpointing_steps", 1),
        *TINY_VIDEO,
    )
    return directory, tmp_path / "run"


def test_the_videos_that_training_held_out_are_evaluated(own_videos, tmp_path, monkeypatch, capsys, recwarn):
    directory, model = own_videos
    video = importlib.import_module("mingru_hf.training.video")
    data = importlib.import_module("mingru_hf.data.video")
    evaluated, evaluate = [], video.evaluate_videos

    def spy(model, clips, *args, **kwargs):
        evaluated.append({Path(row["path"]).name for row in clips.videos["video"]})
        return evaluate(model, clips, *args, **kwargs)

    monkeypatch.setattr(video, "evaluate_videos", spy)
    cache = ("--cache_dir", tmp_path / "cache")
    test = ("evaluate_video_classification", "--dataset_name", directory, "--split", "validation", *cache, "--use_cpu")
    test += ("--views", "center", "--clips_per_video", 1, "--mixed_precision", "no", "--dataloader_num_workers", 0)
    given = {"validation_split_percentage": 30, "cache_dir": str(tmp_path / "cache")}
    splits = data.load_video_datasets(str(directory), seed=3, **given)
    held_out = {Path(row["path"]).name for row in splits["validation"]["video"]}
    for place in (model, model / "checkpoint-1"):
        call(*test, "--model_name_or_path", place)
        assert evaluated.pop() == held_out
    arguments = json.loads((model / "evaluation-validation" / "metrics.json").read_text())["arguments"]
    assert (arguments["seed"], arguments["validation_split_percentage"], arguments["fold"]) == (3, 30, 1)
    test += ("--model_name_or_path", model, "--output_dir", tmp_path / "again")
    call(*test, "--seed", 3)
    for option, value in (("--seed", 1), ("--validation_split_percentage", 50)):
        with pytest.warns(UserWarning, match=f"was trained on .* Remove {option}"):
            call(*test, option, value, "--overwrite_output_dir")

    (model / "metrics.json").unlink()
    assert not [warning for warning in recwarn if "metrics.json" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"no metrics.json .* --validation_split_percentage as in training"):
        call(*test, "--seed", 3, "--overwrite_output_dir")


def test_a_stream_ends_where_the_whole_clip_does(video_model, shapes, tmp_path, capsys):
    path = shapes / "test" / "left" / "000000.mp4"
    stream = ("stream_video", "--model_name_or_path", video_model, "--video", path, "--use_cpu", "--top_k", 8)
    call(*stream)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"frame {i}" for i in range(6)]
    model = AutoModelForVideoClassification.from_pretrained(video_model).eval()
    pixels = AutoVideoProcessor.from_pretrained(video_model)(str(path), num_frames=6, return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels).logits[0].softmax(-1)
    said = dict(part.rsplit(" ", 2)[:2] for part in lines[-1].split(": ")[1].split(", "))
    for number, name in model.config.id2label.items():
        assert float(said[name]) == pytest.approx(100 * expected[number].item(), abs=0.6)  # printed in whole percent

    call(*stream, "--output_file", tmp_path / "out.mp4", "--frame_stride", 2, "--max_frames", 5)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["frame 0", "frame 2", "frame 4"]
    with pytest.importorskip("av").open(str(tmp_path / "out.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5
    assert frames[0].shape == (256 + 24, 256, 3)
    assert frames[0][256:].max() > 200  # the line of text
    call(*stream, "--output_file", tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert "--overwrite_output_file" in error_of(capsys, *stream, "--output_file", tmp_path / "out.png")
    call(*stream, "--output_file", tmp_path / "out.png", "--overwrite_output_file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.png"]


def test_a_stream_shows_a_phones_video_upright(tmp_path):
    av = pytest.importorskip("av", reason="videos are written by PyAV")
    frames = np.zeros((2, 32, 48, 3), np.uint8)
    frames[:, :16] = 250
    write_video(tmp_path / "phone.mp4", frames)
    data = bytearray((tmp_path / "phone.mp4").read_bytes())
    start = data.index(b"tkhd") + 44  # the display matrix
    data[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # 90 degrees clockwise
    (tmp_path / "phone.mp4").write_bytes(data)
    with av.open(str(tmp_path / "phone.mp4")) as container:
        seen = np.stack(list(load("stream_video").read_frames(container, None)))
    assert seen.shape == (2, 48, 32, 3)
    assert (seen[:, :, 18:] > 200).all()
    assert (seen[:, :, :14] < 50).all()


def test_a_stream_skips_damaged_frames(video_model, tmp_path, capsys):
    av = pytest.importorskip("av", reason="videos are written by PyAV")
    path = tmp_path / "damaged.mp4"
    write_video(path, np.zeros((4, 32, 48, 3), np.uint8))
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    stream = ("stream_video", "--model_name_or_path", video_model, "--video", path, "--use_cpu")
    for damaged in ([packets[1]], packets):
        data = bytearray(path.read_bytes())
        for start, size in damaged:
            data[start : start + size] = b"\xff" * size
        path.write_bytes(data)
        if len(damaged) == 1:
            call(*stream)
            assert [line[:7] for line in capsys.readouterr().out.splitlines()] == ["frame 0", "frame 1", "frame 2"]
    assert "damaged.mp4 has no frame that can be decoded" in error_of(capsys, *stream)


def test_a_strip_spans_a_long_video_evenly():
    script = load("stream_video")
    for length in (1, 63, 64, 1000, 100_000):
        seen = ((number, number, torch.tensor([number]), "") for number in range(length))
        frames, courses = script.keep_evenly(seen)
        numbers = list(frames)
        every = numbers[1] if length > 1 else 1
        assert numbers == list(range(0, length, every))
        assert len(numbers) <= 64
        assert every <= max(1, length / 31)
        assert courses.flatten().tolist() == list(range(length))


def test_a_stream_has_the_rate_of_the_models_clips(video_model, shapes, tmp_path, capsys):
    shutil.copytree(video_model, tmp_path / "model")
    processor = AutoVideoProcessor.from_pretrained(video_model)
    path = shapes / "test" / "left" / "000000.mp4"
    with pytest.importorskip("av").open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
    stream = ("stream_video", "--model_name_or_path", tmp_path / "model", "--video", path, "--use_cpu")
    for changes, expected in (
        ({"fps": rate / 2}, [0, 2, 4]),
        ({"fps": rate / 1.5}, [0, 1, 3, 4]),
        ({"fps": None, "frame_stride": 2.5}, [0, 2, 5]),
    ):
        for name, value in changes.items():
            setattr(processor, name, value)
        processor.save_pretrained(tmp_path / "model")
        call(*stream)
        out = capsys.readouterr().out
        assert [line.split(":")[0] for line in out.splitlines()] == [f"frame {number}" for number in expected]
    processor.fps = 5
    with pytest.raises(ValueError, match="give --frame_stride"):
        load("stream_video").trained_stride(processor, None)


def test_mistakes_with_videos_end_with_one_line(video_model, shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("UCF101_PATH", raising=False)
    cache = ("--cache_dir", tmp_path / "cache")
    assert "exists" in error_of(capsys, "make_moving_shapes", "--output_dir", shapes)
    train = ("train_video_classification", "--output_dir", tmp_path / "run", *cache, *TINY_VIDEO)
    assert "UCF101_PATH" in error_of(capsys, *train)
    (tmp_path / "empty").mkdir()
    assert "contains no videos" in error_of(capsys, *train, "--dataset_name", tmp_path / "empty")
    given = (*train, "--dataset_name", shapes)
    assert "is less than crop_size" in error_of(capsys, *given, "--resize_size", 16)
    assert "frame_stride must be positive" in error_of(capsys, *given, "--frame_stride", 0)
    error = error_of(capsys, *given, "--num_frames", 1000)
    assert "videos are unreadable or too short" in error
    assert "Lower num_frames or frame_stride" in error
    assert "min_crop_scale" in error_of(capsys, *given, "--min_crop_scale", 0)
    error = error_of(capsys, *given, "--model_name_or_path", video_model)
    assert "leave out config_name and config_overrides" in error
    test = ("evaluate_video_classification", "--model_name_or_path", video_model, "--use_cpu", *cache)
    test += ("--output_dir", tmp_path / "evaluation")
    assert "no such directory" in error_of(capsys, *test, "--dataset_name", "./missing")
    for name in ("left", "right"):
        shutil.copytree(shapes / "test" / name, tmp_path / "two" / name)
    assert "classes other than those of" in error_of(
        capsys, *test, "--dataset_name", tmp_path / "two", "--split", "train"
    )
    assert "no test: give --split validation" in error_of(capsys, *test, "--dataset_name", tmp_path / "two")
    assert "clips_per_video" in error_of(capsys, *test, "--clips_per_video", 0)
    assert "use --views center" in error_of(capsys, *test, "--dataset_name", shapes, "--views", "ten_crops")
    stream = ("stream_video", "--model_name_or_path", video_model)
    assert "cannot be read" in error_of(capsys, *stream, "--video", shapes / "train" / "up" / "000002.mp4")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    assert "sound.wav has no video stream" in error_of(capsys, *stream, "--video", tmp_path / "sound.wav")
    assert "must end in .mp4 or .png" in error_of(capsys, *stream, "--video", "a.mp4", "--output_file", "a.gif")
    config = AutoConfig.from_pretrained(video_model, bidirectional=True)
    AutoModelForVideoClassification.from_config(config).save_pretrained(tmp_path / "both")
    error = error_of(capsys, "stream_video", "--model_name_or_path", tmp_path / "both", "--video", "a.mp4")
    assert "classifies only whole clips, because it is bidirectional" in error
    assert not (tmp_path / "run").exists()


def test_the_export_says_what_to_install_and_replaces_no_file(capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace(__spec__=SimpleNamespace(name="onnx")))
    export = ("export_onnx", "--model_name_or_path", "any", "--output_dir", tmp_path)
    assert "pip install onnxscript" in error_of(capsys, *export)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    (tmp_path / "decode.onnx").write_bytes(b"mine")
    error = error_of(capsys, *export)
    assert "already holds decode.onnx" in error
    assert "--overwrite_output_dir" in error
    assert "frame_size takes one or two" in error_of(capsys, *export, "--frame_size", 3, 4, 5)


def test_the_export_knows_text_from_video(capsys, monkeypatch, trained, video_model, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    export = ("export_onnx", "--output_dir", tmp_path, "--model_name_or_path")
    assert "prompt is only for language models" in error_of(capsys, *export, video_model, "--prompt", "A")
    assert "video is only for video classifiers" in error_of(capsys, *export, trained, "--video", "a.mp4")
    assert "frame_size is only for video classifiers" in error_of(capsys, *export, trained, "--frame_size", 8)
    assert not any(tmp_path.iterdir())


def test_a_model_of_another_kind_is_named(trained, video_model, tmp_path, capsys):
    for name in ("generate_text", "evaluate_causal_lm"):
        error = error_of(capsys, name, "--model_name_or_path", video_model)
        assert f"{video_model} is a minconvgru model, which AutoModelForCausalLM does not load" in error
    for name, *more in (("stream_video", "--video", "a.mp4"), ("evaluate_video_classification", "--use_cpu")):
        error = error_of(capsys, name, "--model_name_or_path", trained, *more)
        assert f"{trained} is a mingru model, which AutoModelForVideoClassification does not load" in error


def test_a_run_that_diverges_ends_with_one_line(text_file, tmp_path, capsys):
    train = ("train_causal_lm", "--train_file", text_file, "--output_dir", tmp_path / "run", *TINY, *FAST)
    with pytest.raises(SystemExit) as error:
        call(*train, "--max_train_steps", 20, "--learning_rate", 1e30, "--max_grad_norm", 0)
    assert error.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"loss is (nan|inf) at step \d+", line)


def test_the_server_names_a_model_that_is_not_there(tmp_path):
    done = run(sys.executable, SCRIPTS / "serve.py", tmp_path / "missing")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("serve.py: error: ")


def test_the_server_says_what_to_install(monkeypatch):
    serve = importlib.import_module("transformers.cli.serve")
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    command_line = importlib.import_module("transformers.cli.transformers")
    monkeypatch.setattr(command_line, "check_cli_update", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["serve.py", "model"])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(SCRIPTS / "serve.py"), run_name="__main__")
    assert error.value.code.startswith("serve.py: error: ")  # Python prints it on stderr and exits with status 1
    assert "pip install transformers[serving]" in error.value.code


# ---- all of them, in processes of their own ----


TEXT_SCRIPTS = ["train_causal_lm", "generate_text", "train_selective_copying"]
SHARING_SCRIPTS = ["convert_torch_mingru", "export_onnx", "push_to_hub"]
# The options that each script requires.
MODEL, OUTPUT = ["--model_name_or_path", "model"], ["--output_dir", "out"]
MINIMAL = {
    "train_causal_lm": OUTPUT,
    "generate_text": MODEL,
    "train_selective_copying": OUTPUT,
    "make_moving_shapes": OUTPUT,
    "train_video_classification": OUTPUT,
    "evaluate_video_classification": MODEL,
    "stream_video": [*MODEL, "--video", "clip.mp4"],
    "convert_torch_mingru": ["--checkpoint_path", "model.pt", *OUTPUT],
    "export_onnx": [*MODEL, *OUTPUT],
    "push_to_hub": ["--model_dir", "model"],
}


@pytest.mark.parametrize("name", [*TEXT_SCRIPTS, *VIDEO_SCRIPTS, *SHARING_SCRIPTS])
def test_help_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as end:
        call(name, "--help")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"\n    python scripts/{name}.py --" in out  # the example starts on its own line
    assert max(map(len, out.splitlines())) <= 110
    assert not re.search(r"(\[.*\]) \1", out)  # each default is shown once

    parser, *_ = load(name).parse_args(MINIMAL[name])
    options = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    for action in options:
        assert action.help, action.option_strings
        takes_a_value = action.nargs != 0
        assert bool(action.metavar) == takes_a_value, action.option_strings  # explicit, unlike --output_dir OUTPUT_DIR


def test_as_a_user_runs_them(text_file, tmp_path):
    directory = tmp_path / "lm"
    command = [sys.executable, SCRIPTS / "train_causal_lm.py", "--train_file", text_file, "--output_dir", directory]
    trained = run(*command, "--max_train_steps", 2, *TINY, *FAST)
    assert trained.returncode == 0, trained.stderr
    assert "Warning" not in trained.stderr
    sampled = run(
        sys.executable,
        SCRIPTS / "generate_text.py",
        "--model_name_or_path",
        directory,
        "--prompt",
        "LINE",
        "--use_cpu",
    )
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith("LINE")
    assert "Warning" not in sampled.stderr


@pytest.mark.slow
def test_two_processes_equal_one(text_file, tmp_path):
    """Two processes with batch size 8 each give the losses of one with batch size 16, without dropout."""
    launchers = {
        "one": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1),
        "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2),
        "accelerate": (
            *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0),
        ),
    }
    metrics = {}
    for name, launcher in launchers.items():
        directory, processes = tmp_path / name, 1 if name == "one" else 2
        result = run(
            *(sys.executable, *launcher, SCRIPTS / "train_causal_lm.py", "--train_file", text_file),
            *("--output_dir", directory, *TINY, *FAST),
            *("--max_train_steps", 20, "--per_device_train_batch_size", 16 // processes, "--logging_steps", 1),
        )
        assert result.returncode == 0, result.stderr
        assert f"{processes} x cpu" in result.stdout
        assert "started only one" not in result.stderr
        metrics[name] = json.loads((directory / "metrics.json").read_text())
    one = metrics.pop("one")
    for two in metrics.values():
        assert one["examples_per_step"] == two["examples_per_step"] == 16
        for a, b in zip(one["history"], two["history"], strict=True):
            name = "loss" if "loss" in a else "eval_loss"
            assert a[name] == pytest.approx(b[name], rel=1e-3)  # sums in a different order, through 20 steps of Adam
        assert one["final"]["eval_loss"] == pytest.approx(two["final"]["eval_loss"], rel=1e-3)


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_only_is_reported(text_file, tmp_path):
    result = run(
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2),
        *(SCRIPTS / "train_causal_lm.py", "--train_file", text_file, "--output_dir", tmp_path / "run", *TINY, *FAST),
        *("--max_train_steps", 1),
    )
    assert result.returncode == 0, result.stderr
    assert "1 x cpu" in result.stdout
    assert "asked for several processes but started only one" in result.stderr


# ---- benchmarks ----


@pytest.fixture
def benchmarking(monkeypatch):
    """Import the module that the benchmarks share; scripts/ is on the path, as for a script run by its path."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmarking")


@pytest.mark.parametrize("name", ["generate", "head", "linear", "lm", "scan", "training", "video"])
def test_help_of_the_benchmarks_explains_every_option(name, capsys, benchmarking):
    if name == "video":
        pytest.importorskip("torchvision", reason="the benchmark needs it")
    with pytest.raises(SystemExit) as end:
        call(f"benchmark_{name}", "--help")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"python scripts/benchmark_{name}.py --" in out
    assert "(default: " in out
    assert max(map(len, out.splitlines())) <= 110
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert "--threads" in names
    texts = out.partition("options:")[2].replace("\n                 ", " ").splitlines()
    assert all(re.search(r"  +\S+.* [a-z]+", line) for line in texts if line.startswith("  --")), texts


def test_benchmarks_take_turns_and_see_memory(benchmarking, tmp_path):
    turns, seconds = [], {"a": iter([9.0, 3.0, 1.0, 2.0]), "b": iter([9.0, 5.0, 5.0, 5.0])}

    def timed(name, device):
        turns.append(name)
        return next(seconds[name])

    assert benchmarking.interleave({"a": "a", "b": "b"}, 3, timed=timed) == {"a": 2.0, "b": 5.0}
    assert "".join(turns) == "abababab"  # the first round is not counted
    if sys.platform == "linux":
        assert benchmarking.process_megabytes() > 50
        assert 35 < benchmarking.peak_megabytes(lambda: torch.ones(10_000_000)) < 60
    benchmarking.write_json(tmp_path / "new" / "a.json", {"a": [{"b": float("nan")}, 1.5, (2, 3)]})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": [{"b": "nan"}, 1.5, [2, 3]]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card is there")
@pytest.mark.parametrize("name", ["benchmark_generate", "benchmark_head", "benchmark_lm", "benchmark_scan"])
def test_a_device_that_is_not_there_is_named(benchmarking, name, capsys):
    for device in ("cuda", "gpu"):
        assert f"'{device}' is not available" in error_of(capsys, name, "--device", device)


def test_head_benchmark_compares_pieces_with_all_logits(benchmarking, capsys):
    words = ["--vocab_size", 50, "--hidden_size", 8, "--num_layers", 1, "--sequence_length", 9, "--threads", 1]
    call("benchmark_head", *words, "--rounds", 1, "--dtype", "bfloat16")
    assert re.search(r"bfloat16; 1 layers.*\nall logits +.* MB +\S+ s per step\nin pieces", capsys.readouterr().out)


def test_linear_benchmark_compares_the_kernel_with_torch(benchmarking, capsys):
    words = ["--rows", 1, 99, "--inputs", 256, "--outputs", 128, "--megabytes", 1, "--threads", 1, "--rounds", 1]
    if not NUMBA_AVAILABLE:
        assert "there is no kernel to measure: numba cannot be imported" in error_of(
            capsys, "benchmark_linear", *words
        )
        return
    call("benchmark_linear", *words)
    *_, one, many = (line.split() for line in capsys.readouterr().out.splitlines())
    assert one[:3] == ["256", "128", "1"]
    assert float(one[5]) == pytest.approx(float(one[3]) / float(one[4]), rel=0.1)
    assert many[2:6:2] == ["99", "-"]


def test_lm_benchmark_compares_training_and_decoding(benchmarking, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # inductor takes long
    models = ["MinGRU", "MinGRU, default block", "log scan", "GPT-2"]
    words = ["--hidden_size", 8, "--num_layers", 1, "--num_heads", 2, "--sequence_length", 9, "--batch_size", 2]
    words += ["--threads", 1, "--rounds", 1, "--decode_steps", 2, "--compile", "--models", *models]
    call("benchmark_lm", *words, "--json", tmp_path / "lm.json")
    report = json.loads((tmp_path / "lm.json").read_text())
    compiled = [f"{name}, compiled" for name in models]
    assert list(report["training"]) == [*models, *compiled, "products, torch's", "products, ours"]
    ours = ["MinGRU", "MinGRU, default block"]
    twins = [f"{name}, torch's products" for name in ours] if FEW_ROWS_ARE_FASTER else []
    assert list(report["decoding"]) == [*ours, "GPT-2", *twins]
    assert report["decoding"]["MinGRU"]["ms_2"] > 0
    assert 0 < report["share_of_scan"] < 1
    with pytest.raises(SystemExit):
        call("benchmark_lm", *words, "--json", tmp_path / "lm.json")
    assert "lm.json already exists: choose another name, or remove it first" in capsys.readouterr().err
    assert json.loads((tmp_path / "lm.json").read_text()) == report


def test_training_benchmark_compares_models_and_repeats_no_run(benchmarking, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    runs, picture = tmp_path / "runs", tmp_path / "new" / "losses.png"
    words = ["--train_file", tmp_path / "text.txt", "--batch_size", 2, "--eval_steps", 5, "--threads", 1]
    one_second = [*words, "--output_dir", runs, "--block_size", 16, "--seconds", 1]
    two_rates = ["--models", "torch.nn.GRU, 3 x 256", "--learning_rates", 1e-3, 1e-2]
    call("benchmark_training", *one_second, *two_rates)
    *_, best, worst = capsys.readouterr().out.splitlines()
    names = [row[:21] for row in (best, worst)]
    assert names == ["torch.nn.GRU, 3 x 256"] * 2
    assert {row.split()[5] for row in (best, worst)} == {"0.001", "0.01"}
    assert float(best.split()[-1]) < float(worst.split()[-1])
    metrics = runs / "torch.nn.GRU-3-x-256-0.01-0-0" / "metrics.json"
    seen = json.loads(metrics.read_text())
    assert 1 <= seen["train_seconds"] < 10
    assert f"{seen['final']['eval_loss_per_character']:.4f}" in best + worst

    two_models = ["--models", "torch.nn.GRU, 3 x 256", "MinGRU, 3 x 256", "--learning_rates", 1e-2]
    call("benchmark_training", *one_second, *two_models, "--png", picture)
    out = capsys.readouterr().out
    assert "MinGRU, 3 x 256, learning rate 0.01, dropout 0.1, seed 0" in out
    assert "torch.nn.GRU, 3 x 256, learning rate" not in out  # that run is complete
    assert (best if best.split()[5] == "0.01" else worst) in out
    assert picture.stat().st_size > 10_000

    config = runs / "torch.nn.GRU-3-x-256-0.01-0-0" / "config.json"
    right = config.read_text()
    config.write_text(right.replace('"hidden_size": 256', '"hidden_size": 255'))
    text = error_of(capsys, "benchmark_training", *one_second, *two_rates)
    assert "holds a model with hidden_size 255 instead of 256: choose another output_dir" in text
    config.write_text(right)
    text = error_of(capsys, "benchmark_training", *one_second, *two_rates, "--seconds", 2)
    assert "holds a run with max_train_seconds 1 instead of 2: choose another output_dir" in text
    metrics.write_text(json.dumps({key: value for key, value in seen.items() if key != "final"}))
    text = error_of(capsys, "benchmark_training", *one_second, *two_rates)
    assert "holds an interrupted run: remove it, or choose another output_dir" in text
    metrics.write_text("{}")  # another program's
    text = error_of(capsys, "benchmark_training", *one_second, *two_rates[:3], 2e-2, 1e-2)
    assert "torch.nn.GRU-3-x-256-0.01-0-0 holds a run with" in text
    assert not (runs / "torch.nn.GRU-3-x-256-0.02-0-0").exists()  # mistakes show before any training
    gpt2 = [*words, "--output_dir", tmp_path, "--models", "GPT-2, 4 x 160", "--block_size", 300, "--seconds", 1]
    call("benchmark_training", *gpt2, "--dropouts", 0.5)
    assert capsys.readouterr().out.splitlines()[-1].startswith("GPT-2, 4 x 160 ")
    assert AutoConfig.from_pretrained(tmp_path / "GPT-2-4-x-160-0.004-0.5-0").resid_pdrop == 0.5
    assert "must be at least 0 and below 1, got 1.5" in error_of(
        capsys, "benchmark_training", *gpt2, "--dropouts", 1.5
    )

    bpe = [*words, "--tokenizer_name", "bpe", "--vocab_size", 300, "--block_size", 16, "--seconds", 1]
    call("benchmark_training", *bpe, *two_models, "--output_dir", tmp_path / "bpe")
    for name in ("MinGRU-3-x-256-0.01-0.1-0", "torch.nn.GRU-3-x-256-0.01-0-0"):
        run = tmp_path / "bpe" / name
        assert AutoConfig.from_pretrained(run).vocab_size == 300
        final = json.loads((run / "metrics.json").read_text())["final"]
        assert 0 < final["eval_loss_per_character"] < final["eval_loss"]  # a token has several characters


def test_scan_benchmark_compares_all_that_can_run(tmp_path, capsys, benchmarking):
    report, picture = tmp_path / "scan.json", tmp_path / "scan.png"
    words = ["--shapes", "2,20,8", "--rounds", 1, "--dtype", "float32", "bfloat16", "--json", report]
    call("benchmark_scan", *words)
    rows = {(row["dtype"], row["backend"]): row for row in json.loads(report.read_text())["results"]}
    for name in ("log", "torch", "torch.nn.GRU"):
        assert rows["float32", name]["forward_ms"] > 0
        assert rows["float32", name]["both_over_add"] > 0
    assert rows["float32", "torch"]["max_relative_error"] <= 1e-5
    assert rows["bfloat16", "torch"]["max_relative_error"] <= 2.0**-8
    assert ("bfloat16", "log") not in rows
    out = capsys.readouterr().out
    assert "bfloat16 without log: The 'log' scan works in float32 and float64 only" in out
    assert "(2, 20, 8) bfloat16, 1 thread(s): add" in out

    module = load("benchmark_scan")
    module.CURVE = [(1, 16, 4), (1, 64, 4)]
    module.main(["--shapes", "--rounds", "1", "--backends", "torch", "--peers", "--png", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


class _NoGradientOfTheState(torch.autograd.Function):
    """Return no gradient for the state, as flash-linear-attention's HGRN does; the recurrence is a different one."""

    @staticmethod
    def forward(ctx, x, h0):
        return x[..., : h0.shape[2]].cumsum(1) + h0

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([grad, grad], dim=-1), None


class _NoBackward(_NoGradientOfTheState):
    @staticmethod
    def backward(ctx, grad):
        raise AssertionError


def test_scan_benchmark_on_a_card(tmp_path, capsys, monkeypatch, benchmarking):
    """Run the code for a CUDA card on a CPU that is made to look like one."""
    module, waits = load("benchmark_scan"), []
    for place in (module, benchmarking):
        monkeypatch.setattr(place, "is_cuda", lambda device: True)
    stubs = {"synchronize": lambda device: waits.append(device), "get_device_name": lambda device: "a card"}
    stubs |= {"reset_peak_memory_stats": lambda device: None, "memory_allocated": lambda device: 10**6}
    stubs |= {"max_memory_allocated": lambda device: 4 * 10**6}
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def key_averages(self):
            kinds = [("CUDA", False, 3000), ("CUDA", False, 1000), ("CUDA", True, 4000), ("CPU", False, 4000)]
            return [
                SimpleNamespace(
                    device_type=SimpleNamespace(name=name), is_user_annotation=mark, self_device_time_total=us
                )
                for name, mark, us in kinds
            ]

    monkeypatch.setattr(module, "profile", Profile)
    monkeypatch.setattr(module, "NUMBA_AVAILABLE", False)
    monkeypatch.setattr(module, "enough", lambda calls, device: 8)
    monkeypatch.setattr(module, "INPUT_BYTES", 3 * 2 * 20 * 16 * 4)  # the size of three inputs of that shape
    monkeypatch.setitem(module.PEERS, "HGRN", lambda channels: _NoGradientOfTheState.apply)
    monkeypatch.setitem(module.PEERS, "accelerated-scan", lambda channels: _NoBackward.apply)
    words = ["--shapes", "2,20,8", "--rounds", "1", "--backends", "torch", "--json", str(tmp_path / "scan.json")]
    module.main([*words, "--peers", "HGRN", "accelerated-scan"])
    rows = {row["backend"]: row for row in json.loads((tmp_path / "scan.json").read_text())["results"]}
    assert list(rows) == ["add", "torch", "HGRN"]
    assert rows["HGRN"]["backward_kernels_ms"] == pytest.approx(4 / 8)  # 4 ms of kernels in eight calls
    assert rows["HGRN"]["both_kernels_over_add"] == pytest.approx(1)
    assert rows["torch"]["both_ms"] > 0
    assert rows["torch"]["peak_mb"] == 3
    assert rows["torch"]["device"] == "a card"
    assert len(waits) > 20
    out = capsys.readouterr().out
    assert "float32 without accelerated-scan: AssertionError()\n" in out
    assert "(2, 20, 8) float32, a card: add" in out
    assert re.search(r"torch( +\d+\.\d, 500\.0 \(1\.00\)){3}", out)


def test_scan_benchmark_fills_its_samples_with_calls_in_turn(benchmarking, monkeypatch):
    module, made = load("benchmark_scan"), []
    variants = [(lambda number=number: number, made.append) for number in range(3)]
    module.in_a_row(variants, 5)()
    module.in_a_row(variants, 2)()
    assert made == [0, 1, 2, 0, 1, 0, 1]
    assert module.enough(variants, "cpu") == 1
    monkeypatch.setattr(module, "is_cuda", lambda device: True)
    monkeypatch.setattr(module, "seconds_of_call", lambda calls, count, device: 0.003)
    assert module.enough(variants, "cuda") == 4


@pytest.mark.slow
def test_video_benchmark_compares_the_model_with_its_backbone(tmp_path):
    pytest.importorskip("timm", reason="VGG16 comes from it")
    report = tmp_path / "video.json"
    words = ["--image_size", 32, "--num_frames", 2, "--rounds", 1, "--threads", 1, "--json", report]
    result = run(sys.executable, SCRIPTS / "benchmark_video.py", *words)
    assert result.returncode == 0, result.stderr
    figures = json.loads(report.read_text())
    assert figures["parameters"] == {"model": 48_278_073, "backbone": 14_714_688}
    assert figures["shares"]["multiply_adds"] > 0.1
    assert figures["seconds"]["model forward"] > 0
    assert all(figures["peak_mb"][f"{part} training"] > 1 for part in ("model", "backbone"))
    assert 0 < figures["shares"]["scan_training"] < 1


def test_video_benchmark_names_a_missing_file(capsys, tmp_path, benchmarking):
    for package in ("av", "timm", "torchvision"):
        pytest.importorskip(package, reason="the benchmark needs it")
    assert "nowhere.mp4" in error_of(capsys, "benchmark_video", "--video", tmp_path / "nowhere.mp4")
