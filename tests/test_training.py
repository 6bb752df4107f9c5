"""The training loop: what a step sees, what it updates, what is kept on disk, when it stops."""

import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import runpy
import shutil
import socket
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, ResNetConfig

from mingru_hf import (
    MinConvGRUConfig,
    MinConvGRUForVideoClassification,
    MinGRUConfig,
    MinGRUForCausalLM,
    MinGRUForTokenClassification,
)
from mingru_hf.data.text import build_tokenizer
from mingru_hf.training import loop
from mingru_hf.training.arguments import (
    ArgumentParser,
    SetupError,
    TrainArguments,
    add_arguments,
    fixed_settings,
    from_namespace,
    option,
    parse_dataclasses,
)
from mingru_hf.training.checkpoints import check_output_dir, save_pretrained, write_json
from mingru_hf.training.loop import BatchStream, evaluate, resolve_mixed_precision, sample_text, start, summary, train
from mingru_hf.training.memory import keep_freed_memory
from mingru_hf.training.models import load_pretrained, make_config, parse_overrides
from mingru_hf.training.optim import make_optimizer, make_schedule, parameter_groups

ROOT = Path(__file__).parent.parent

# Sums of the same float32 numbers in a different order, through a few steps of Adam, which divides by small roots.
ORDER_OF_SUMS = {"rtol": 1e-3, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _fresh_process():
    """Reset between tests the device and precision that accelerate keeps for the whole process.

    Use one thread: for models this small, more threads only wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def args(tmp_path):
    """Return a function that makes the arguments of a tiny run; keyword arguments override them."""

    def make(**changes):
        values = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 5,
            "max_train_steps": 4,
            "num_warmup_steps": 0,
            "logging_steps": 1,
            "eval_steps": 1000,  # only at the end, for speed
            "mixed_precision": "no",
            "use_cpu": True,
        }
        return TrainArguments(**(values | changes))

    return make


def make_model():
    torch.manual_seed(1)
    return MinGRUForCausalLM(MinGRUConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, initializer_range=0.2))


def make_blocks(num_examples, seed=0):
    """Make rows of 12 tokens that count up from a random token, so that there is something to learn."""
    starts = torch.randint(7, (num_examples, 1), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": ((starts + torch.arange(12)) % 7).tolist()})


def make_answers(num_examples):
    """Make the same rows with labels only for the last 0, 3, 6 or 9 tokens."""
    rows = make_blocks(num_examples)["input_ids"]
    labels = [[-100] * (12 - 3 * (i % 4)) + row[12 - 3 * (i % 4) :] for i, row in enumerate(rows)]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def run(args, model=None, dataset=None, **kwargs):
    """Train a tiny model on 16 examples, validate on 13."""
    accelerator = start(args)
    model = make_model() if model is None else model
    return model, train(model, dataset or make_blocks(16), make_blocks(13, seed=1), args, accelerator, **kwargs)


# ---- what a step sees ----


def test_an_epoch_sees_every_example_once_in_a_new_order():
    stream = iter(BatchStream(num_examples=12, batch_size=4, seed=3))
    epochs = [[i for _ in range(3) for i in next(stream)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = iter(BatchStream(num_examples=12, batch_size=4, seed=4))
    assert [i for _ in range(3) for i in next(other)] != epochs[0]


def test_batches_are_never_short_even_of_a_tiny_dataset():
    stream = iter(BatchStream(num_examples=3, batch_size=8, seed=0))
    assert [len(next(stream)) for _ in range(4)] == [8, 8, 8, 8]


def test_processes_share_the_batches_of_one():
    whole = iter(BatchStream(num_examples=10, batch_size=4, seed=0))
    parts = [iter(BatchStream(10, 0, 2, process_index=rank, num_processes=2)) for rank in range(2)]
    for _ in range(7):
        assert next(whole) == next(parts[0]) + next(parts[1])


# ---- what it updates ----


def test_matrices_decay_and_norms_and_biases_do_not():
    model = make_model()
    decay, keep = parameter_groups(model, 0.3)
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, kept = ({names[id(p)] for p in group["params"]} for group in (decay, keep))
    assert decaying | kept == set(names.values())
    assert not decaying & kept
    assert all(name.endswith("weight") and "norm" not in name for name in decaying)
    assert all("norm" in name or name.endswith("bias") for name in kept)
    assert decaying
    assert kept


def test_tied_weights_are_optimized_once(args):
    model = MinGRUForCausalLM(
        MinGRUConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, tie_word_embeddings=True)
    )
    parameters = [p for group in make_optimizer(model, args()).param_groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))


def test_the_optimizer_is_fused_and_refuses_a_frozen_model(args):
    model = make_model()
    assert make_optimizer(model, args()).defaults["fused"]
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(model.requires_grad_(False), args())


@pytest.mark.parametrize("make_rows", [make_blocks, make_answers])
def test_gradient_accumulation_equals_a_bigger_batch(args, tmp_path, make_rows):
    """Each target has the same weight, however many its micro-batch has; a micro-batch may have none."""
    whole, result = run(args(output_dir=str(tmp_path / "whole")), dataset=make_rows(16))
    AcceleratorState._reset_state()
    pieces, result_of_pieces = run(
        args(output_dir=str(tmp_path / "pieces"), per_device_train_batch_size=1, gradient_accumulation_steps=4),
        dataset=make_rows(16),
    )
    assert result["examples_per_step"] == result_of_pieces["examples_per_step"] == 4
    for a, b in zip(result["history"], result_of_pieces["history"], strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)
    torch.testing.assert_close(whole.state_dict(), pieces.state_dict(), **ORDER_OF_SUMS)


def test_clips_are_not_held_until_the_step_is_complete(args, tmp_path, monkeypatch):
    """Clips are large, and the workers load the next ones in the meantime."""
    model, train_clips, _ = clips()
    drawn, seen = [], []

    class Clips(torch.utils.data.Dataset):
        def __len__(self):
            return len(train_clips)

        def __getitem__(self, index):
            drawn.append(index)
            return train_clips[index]

    model.register_forward_pre_hook(lambda *_: seen.append(len(drawn)))
    arguments = args(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_train_steps=1)
    train(model, Clips(), train_clips[:2], arguments, start(arguments), unit="clip")
    assert seen[:4] == [1, 2, 3, 4]


def test_the_same_seed_gives_the_same_weights_and_another_one_others(args, tmp_path):
    def weights(name, seed):
        AcceleratorState._reset_state()
        return run(args(output_dir=str(tmp_path / name), seed=seed))[0].state_dict()

    first = weights("a", 5)
    torch.testing.assert_close(first, weights("b", 5), rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(first, weights("c", 6), rtol=0, atol=0)


def test_gradients_are_clipped(args, tmp_path, monkeypatch):
    """Even with a bound near 0, AdamW moves the weights (it rescales gradients), so check the norms themselves."""
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *a, **k):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])).item())
        return step(self, *a, **k)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(args(output_dir=str(tmp_path / "clipped"), max_grad_norm=1e-3))
    AcceleratorState._reset_state()
    run(args(output_dir=str(tmp_path / "free"), max_grad_norm=0))
    assert norms[:4] == pytest.approx([1e-3] * 4, rel=1e-2)
    assert min(norms[4:]) > 1e-2


# ---- the learning rate ----


def test_a_short_run_warms_up_for_a_tenth_of_it(args):
    for steps, warmup in ((50, 5), (2000, 100)):
        rate = make_schedule(args(num_warmup_steps=None, learning_rate=1.0, lr_scheduler_type="linear"), steps)
        assert rate(warmup - 1, 0) < rate(warmup, 0) == 1.0 > rate(warmup + 1, 0)


def test_the_schedule_warms_up_and_falls(args):
    rate = make_schedule(args(num_warmup_steps=10, learning_rate=0.5, lr_scheduler_type="linear"), 110)
    assert [rate(step, 0) for step in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.25, 0.5, 0.25, 0])


def test_a_budget_of_seconds_sets_the_schedule_by_the_time_that_has_passed(args):
    rate = make_schedule(
        args(max_train_seconds=60, num_warmup_steps=9, learning_rate=1.0, lr_scheduler_type="linear"), None
    )
    assert [rate(100, share) for share in (0, 0.25, 1)] == pytest.approx([1, 0.75, 0])
    assert [rate(step, 0) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1])


def test_by_time_a_warm_up_ends_with_a_tenth_of_the_run_at_the_latest(args):
    default = {"max_train_seconds": 60, "num_warmup_steps": None, "learning_rate": 1.0}
    rate = make_schedule(args(**default, lr_scheduler_type="constant_with_warmup"), None)
    assert [rate(step, 1e-4) for step in (0, 49, 100)] == pytest.approx([1 / 101, 50 / 101, 1])  # fast steps
    assert [rate(step, step / 40) for step in (0, 2, 4, 5)] == pytest.approx([1 / 101, 0.5, 1, 1])  # slow ones
    rate = make_schedule(args(**default | {"num_warmup_steps": 9}, lr_scheduler_type="constant_with_warmup"), None)
    assert rate(4, 0.5) == pytest.approx(0.5)  # the requested warm-up is not shortened


def test_a_limit_of_seconds_leaves_the_warm_up_of_a_run_of_known_length(args):
    both = args(max_train_seconds=1000, num_warmup_steps=None, learning_rate=1.0, lr_scheduler_type="linear")
    rate = make_schedule(both, 40)
    assert [rate(step, step / 40) for step in (0, 3, 4, 20)] == pytest.approx([0.2, 0.8 * 37 / 40, 0.9, 0.5])
    assert rate(4, 0.5) == pytest.approx(0.5)  # the limit of seconds ends this run


@pytest.mark.parametrize("limit", [{"max_train_steps": 40}, {"max_train_steps": None, "max_train_seconds": 60.0}])
@pytest.mark.parametrize("num_warmup_steps", [None, 0])
def test_a_constant_rate_has_no_warm_up(args, limit, num_warmup_steps):
    arguments = args(**limit, num_warmup_steps=num_warmup_steps, learning_rate=1.0, lr_scheduler_type="constant")
    rate = make_schedule(arguments, arguments.max_train_steps)
    assert [rate(step, step / 40) for step in (0, 1, 39)] == [1, 1, 1]
    assert arguments.warmup_steps(arguments.max_train_steps) == 0


@pytest.fixture
def a_second_a_step(monkeypatch):
    """Advance the loop's clock by one second per step."""
    clock = [0.0]

    def slow(batch):
        clock[0] += 1
        return 48

    monkeypatch.setattr(loop, "_num_tokens", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))


@pytest.mark.usefixtures("a_second_a_step")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2),
        ({"max_train_seconds": 20.0}, 2),
        ({"max_train_steps": None, "max_train_seconds": 20.0}, 2),
        ({"max_train_steps": None, "max_train_seconds": 2000.0}, 100),
        ({"max_train_seconds": 20.0, "num_warmup_steps": 7}, 7),
        ({"max_train_seconds": 20.0, "lr_scheduler_type": "constant"}, 0),
        ({"lr_scheduler_type": "constant"}, 0),
    ],
)
def test_the_warm_up_that_was_made_is_reported(args, tmp_path, monkeypatch, changes, expected):
    monkeypatch.setattr(loop, "plot_loss", lambda *args: None)
    values = {"max_train_steps": 20, "num_warmup_steps": None, "lr_scheduler_type": "constant_with_warmup"}
    if changes.get("max_train_seconds") == 2000:
        changes = changes | {"early_stopping_patience": 1, "eval_steps": 120, "learning_rate": 1e-9}
        losses = iter([1.0, 2.0])
        monkeypatch.setattr(
            loop, "evaluate", lambda *args, **kwargs: {"eval_loss": next(losses, 1.0), "eval_perplexity": 1.0}
        )
    _, result = run(args(**values | changes))
    rates = [record["learning_rate"] for record in result["history"] if "learning_rate" in record]
    assert result["num_warmup_steps"] == sum(rate < max(rates) for rate in rates) == expected
    assert f"- `num_warmup_steps`: {expected}\n" in (tmp_path / "run" / "README.md").read_text()


def test_more_arguments_of_the_schedule(args):
    rate = make_schedule(
        args(learning_rate=1.0, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr_rate": 0.1}'),
        100,
    )
    assert rate(100, 0) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="cosine_with_min_lr"):
        make_schedule(args(lr_scheduler_type="cosine_with_min_lr"), 100)


# ---- when it stops ----


def test_epochs_make_steps(args):
    _, result = run(args(max_train_steps=None, num_train_epochs=1.5))
    assert result["step"] == 6
    assert result["epoch"] == 1.5


def test_the_speed_is_that_of_the_training_alone(args, monkeypatch):
    """The clock advances by one second per batch, ten per evaluation and five per checkpoint."""
    clock = [0.0]

    def slow(name, seconds):
        function = getattr(loop, name)

        def run_slowly(*args, **kwargs):
            clock[0] += seconds
            return function(*args, **kwargs)

        monkeypatch.setattr(loop, name, run_slowly)

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    slow("_num_tokens", 1.0)
    slow("evaluate", 10.0)
    slow("write_checkpoint", 5.0)
    choices = {"eval_steps": 1, "checkpointing_steps": "1", "resume_from_checkpoint": "latest"}
    for steps, seconds in (
        (1, 1),
        (3, 3 + 10 + 5),
    ):  # the second run resumes from the first; the pause at the end of a run is not counted
        _, result = run(args(max_train_steps=steps, **choices))
        assert result["tokens_per_second"] == 4 * 12
        assert result["train_seconds"] == seconds


def test_a_budget_of_seconds_is_kept(args, monkeypatch):
    monkeypatch.setattr(loop, "plot_loss", lambda *args: None)  # it takes longer than everything else
    _, result = run(args(max_train_steps=None, max_train_seconds=1.5, logging_steps=1000, eval_steps=None))
    assert 1.5 <= result["train_seconds"] < 2.5
    assert result["step"] > 5
    assert 5 <= sum("eval_loss" in record for record in result["history"]) <= 10
    assert result["history"][-2]["learning_rate"] < 1e-4  # the cosine schedule has decayed


def test_steps_end_a_budget_of_seconds_early(args):
    _, result = run(args(max_train_steps=3, max_train_seconds=600))
    assert result["step"] == 3


def test_early_stopping_and_the_best_weights(args, monkeypatch, capsys):
    """By the fake losses the third evaluation is the best: its weights are kept, and the run ends after two more."""
    losses, seen = iter([3.0, 3.5, 2.0, 2.5, 2.0, 1.0]), []

    def fake(model, *args, **kwargs):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"eval_loss": next(losses), "eval_perplexity": 1.0}

    monkeypatch.setattr(loop, "evaluate", fake)
    model, result = run(args(max_train_steps=50, eval_steps=1, early_stopping_patience=2))
    assert result["step"] == 5
    assert result["best"]["step"] == 3
    torch.testing.assert_close(model.state_dict(), seen[2], rtol=0, atol=0)
    assert (seen[2]["lm_head.weight"] != seen[4]["lm_head.weight"]).any()
    out = capsys.readouterr().out
    assert re.findall(r"step (\d+), .*\(best\)$", out, re.MULTILINE) == ["1", "3"]
    assert "stopped early: no better loss in 2 evaluations" in out


def test_a_loss_that_is_not_finite_ends_the_run(args, tmp_path):
    model = make_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"nan at step 1.*learning_rate"):
        run(args(), model)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("which", ["weight", "loss"])
def test_no_checkpoint_holds_what_is_not_finite(args, tmp_path, monkeypatch, which):
    """Earlier checkpoints stay; otherwise every resumed run would fail, with none left to go back to."""
    model, update = make_model(), loop._Run.update_weights

    def diverge(run):
        update(run)
        if run.now.step == 6:
            with torch.no_grad():
                (model.lm_head.weight[0, 0] if which == "weight" else run.loss_sum).fill_(float("inf"))

    monkeypatch.setattr(loop._Run, "update_weights", diverge)
    arguments = args(max_train_steps=8, logging_steps=50, eval_steps=50, checkpointing_steps="2")
    with pytest.raises(FloatingPointError, match="not finite at step 6: lower learning_rate"):
        run(arguments, model)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    monkeypatch.undo()
    arguments.resume_from_checkpoint = "latest"
    assert run(arguments)[1]["step"] == 8


def test_the_model_comes_back_as_it_was(args, tmp_path):
    """The autocast wrapper is removed; the model's own `forward` and activation checkpointing are restored."""
    arguments = args(mixed_precision="bf16", gradient_checkpointing=True)
    model, _ = run(arguments)
    assert not model.is_activation_checkpointing
    assert "forward" not in vars(model)
    ids = torch.arange(6).unsqueeze(0)
    saved = MinGRUForCausalLM.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(model(ids).logits, saved(ids).logits, rtol=0, atol=0)
    under_autocast = set()

    def forward(*args, **kwargs):
        under_autocast.add(torch.is_autocast_enabled("cpu"))
        return type(model).forward(model, *args, **kwargs)

    model.forward = forward
    model.activation_checkpointing_enable()
    arguments = args(mixed_precision="bf16", gradient_checkpointing=True, output_dir=str(tmp_path / "again"))
    run(arguments, model)
    assert under_autocast == {True}
    assert model.forward is forward
    assert model.is_activation_checkpointing


@pytest.mark.parametrize("place", ["_make_batches", "_Run.update_progress"])
def test_the_model_comes_back_as_it_was_from_a_run_that_fails(args, monkeypatch, place):
    """For example when a run in a notebook is interrupted, during its set-up or later."""
    model = make_model()
    monkeypatch.setattr(f"mingru_hf.training.loop.{place}", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(args(mixed_precision="bf16", gradient_checkpointing=True), model)
    assert not model.is_activation_checkpointing
    assert "forward" not in vars(model)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # caused by dynamo itself
def test_a_step_may_be_compiled(args, tmp_path, monkeypatch):
    """Like `accelerate launch --dynamo_backend inductor`, but without generating inductor's code."""
    _, expected = run(args())
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    AcceleratorState._reset_state(reset_partial_state=True)  # only a process's first Accelerator reads the variable
    compiled = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compiled.append(model) or compile_(model, **kwargs))
    model, result = run(args(output_dir=str(tmp_path / "compiled")))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert compiled == [model]
    losses = ([record["loss"] for record in r["history"] if "loss" in record] for r in (result, expected))
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)
    assert set(load_file(tmp_path / "compiled" / "model.safetensors")) == set(model.state_dict())  # no _orig_mod


# ---- several processes ----


def counting():
    """Return a tiny model, its training set and its validation set."""
    return make_model(), make_answers(16), make_blocks(13, seed=1)


def clips():
    """Return the same for a video model whose backbone normalises by batch statistics."""
    torch.manual_seed(1)
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    config = MinConvGRUConfig(backbone_config=ResNetConfig(**sizes, out_features=["stage1"]), num_labels=2)
    examples = [{"pixel_values_videos": torch.randn(2, 3, 32, 32), "labels": torch.tensor(i % 2)} for i in range(29)]
    return MinConvGRUForVideoClassification(config), examples[:16], examples[16:]


def train_as_one_of(rank, num_processes, port, batch_size, directory, task):
    """Train a tiny model for a few steps as one of several processes, set up by torchrun's environment variables."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = TrainArguments(
        output_dir=str(directory),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=5,
        max_train_steps=6,
        num_warmup_steps=0,
        learning_rate=0.01,
        logging_steps=1,
        eval_steps=3,
        checkpointing_steps="3",
        resume_from_checkpoint="latest",
        mixed_precision="no",
        use_cpu=True,
    )
    accelerator = start(arguments)
    assert accelerator.num_processes == num_processes
    train(*task(), arguments, accelerator)


def train_in_processes(num_processes, directory, task=counting):
    """Train in `num_processes` processes on 8 examples per step, and return the losses."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mingru_hf.training.loop", "mingru_hf.data.text", "datasets"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (num_processes, port, 8 // num_processes, directory, task)
    children = [context.Process(target=train_as_one_of, args=(rank, *arguments)) for rank in range(num_processes)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["examples_per_step"] == 8
    losses = [record.get("loss", record.get("eval_loss")) for record in metrics["history"]]
    assert len(losses) == 6 + 2
    return [*losses, metrics["final"]["eval_loss"]]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_processes_equal_one_with_twice_the_batch_and_go_on_as_they_would_have(tmp_path):
    one, two = (train_in_processes(number, tmp_path / str(number)) for number in (1, 2))
    assert one == pytest.approx(two, rel=1e-4)
    assert two[-2] < two[0] - 0.1
    ours, theirs = (load_file(tmp_path / str(number) / "model.safetensors") for number in (1, 2))
    torch.testing.assert_close(ours, theirs, **ORDER_OF_SUMS)
    shutil.rmtree(tmp_path / "2" / "checkpoint-6")
    assert train_in_processes(2, tmp_path / "2") == two
    torch.testing.assert_close(load_file(tmp_path / "2" / "model.safetensors"), theirs, rtol=0, atol=0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_the_loss_that_selects_the_best_weights_is_that_of_the_saved_ones(tmp_path):
    """Each process sees different examples, so BatchNorm's running statistics differ between processes."""
    train_in_processes(2, tmp_path, clips)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["final"]["eval_loss"] == pytest.approx(metrics["best"]["eval_loss"], rel=1e-6)


def test_a_launcher_that_started_one_process_for_two_is_found_out(args, monkeypatch):
    """`accelerate launch --cpu --num_processes 2` sets the address of a group and starts one process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(UserWarning, match=r"started only one.*torchrun --nproc_per_node N"):
        start(args())


@pytest.mark.parametrize("kind", ["FSDP", "MULTI_XPU"])
def test_other_ways_to_distribute_are_refused(args, monkeypatch, kind):
    monkeypatch.setattr(loop.Accelerator, "distributed_type", loop.DistributedType[kind])
    with pytest.raises(ValueError, match=rf"{kind} is not supported.*CPUs or CUDA GPUs.*Trainer"):
        start(args())


# ---- less memory, and a look at the text ----


def test_gradient_checkpointing_changes_no_weight(args, tmp_path):
    plain, _ = run(args(output_dir=str(tmp_path / "plain")))
    AcceleratorState._reset_state()
    forwards, model = [], make_model()
    model.model.layers[0].mixer.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    run(args(output_dir=str(tmp_path / "saving"), gradient_checkpointing=True, max_train_steps=4), model)
    assert sum(forwards) == 2 * 4  # each backward pass repeats the forward pass with gradients
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), **ORDER_OF_SUMS)


def test_training_asks_for_no_logits(args):
    model, kinds = make_model(), []
    model.register_forward_hook(lambda module, args, output: kinds.append((module.training, output.logits is None)))
    run(args(), model, metrics={"zero": lambda logits, labels: logits.sum() * 0})
    assert set(kinds) == {(True, True), (False, False)}


def test_a_sample_at_every_evaluation_and_the_same_weights(args, tmp_path, capsys):
    tokenizer = build_tokenizer("char", ["abcde"])
    plain, model = make_dropping_model(), make_dropping_model()
    run(args(output_dir=str(tmp_path / "plain"), eval_steps=2), plain, processing_class=tokenizer)
    AcceleratorState._reset_state()
    capsys.readouterr()
    model, result = run(
        args(output_dir=str(tmp_path / "talking"), eval_steps=2, sample_tokens=9), model, processing_class=tokenizer
    )
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    samples = [record["sample"] for record in result["history"] if "eval_loss" in record]
    assert len(samples) == 2
    assert all(set(sample) <= set("abcde<unk>") for sample in samples)
    assert any(samples)
    out = capsys.readouterr().out
    assert all(f"    {sample}" in out for sample in samples if sample)


# ---- evaluation ----


def test_an_evaluation_shows_how_far_it_is(args, monkeypatch, capsys):
    """The bar is below that of training, or in its place at the end, after a line that says what is evaluated."""
    tqdm, bars, shown = loop.tqdm, [], {"disable": False, "mininterval": 0}
    monkeypatch.setattr(loop, "tqdm", lambda *args, **kwargs: bars.append(tqdm(*args, **kwargs | shown)) or bars[-1])
    run(args(eval_steps=2))
    assert [bar.total for bar in bars] == [4, 3, 3, 3]  # 4 steps; 13 examples in batches of 5
    assert [bar.n for bar in bars] == [4, 3, 3, 3]
    assert [bar.pos for bar in bars] == [0, 1, 1, 0]
    printed = capsys.readouterr()
    assert "evaluating the best weights on all 13 validation examples" in printed.out
    assert "evaluating: 100%" in printed.err
    assert not printed.err.rpartition("\r")[2].strip()  # the bar is cleared


def test_evaluation_is_the_mean_over_all_targets(args):
    """The batches have 5, 5 and 3 rows, and the number of labels varies by row."""
    arguments = args()
    accelerator = start(arguments)
    model, blocks = make_model().eval(), make_blocks(13)
    labels = torch.tensor(blocks["input_ids"])
    for row in range(13):
        labels[row, 12 - row % 7 :] = -100
    dataset = blocks.add_column("labels", labels.tolist())
    scores = evaluate(
        model,
        dataset,
        accelerator,
        batch_size=5,
        metrics={"constant": lambda logits, labels: torch.tensor(0.25)},
        characters_per_token=2.0,
    )

    class Wrapped(torch.nn.Module):  # a wrapper such as PEFT's or torch.compile's
        def forward(self, **kwargs):
            return model(**kwargs)

    alone = evaluate(Wrapped(), dataset, accelerator, batch_size=1)
    assert alone["eval_loss"] == pytest.approx(scores["eval_loss"], rel=1e-6)
    with torch.no_grad():
        logits = model(torch.tensor(blocks["input_ids"])).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
    assert scores["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert scores["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert scores["eval_loss_per_character"] == pytest.approx(expected / 2, rel=1e-6)
    assert 2 ** scores["eval_bits_per_character"] == pytest.approx(math.exp(expected / 2), rel=1e-6)
    assert scores["eval_constant"] == pytest.approx(0.25)


def test_labels_of_tokens_count_where_they_are(args):
    """A token classifier does not shift labels: the first and the last count, whatever the batch size."""
    torch.manual_seed(1)
    config = MinGRUConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, initializer_range=0.5, num_labels=3)
    model, rows = MinGRUForTokenClassification(config).eval(), make_blocks(7)
    labels = torch.full((7, 12), -100)
    labels[0, 0] = 1  # one label in the first row, and a varying number in the others
    for row in range(1, 7):
        labels[row, : 2 * row] = row % 3
    with torch.no_grad():
        logits = model(torch.tensor(rows["input_ids"])).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    dataset, accelerator = rows.add_column("labels", labels.tolist()), start(args())
    for batch_size in (1, 4, 7):
        scores = evaluate(model, dataset, accelerator, batch_size=batch_size)
        assert scores["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_draws_no_random_number(args):
    """The dropout of training would otherwise draw different numbers."""
    arguments = args()
    accelerator, model = start(arguments), make_model()
    before = torch.get_rng_state()
    evaluate(model, make_blocks(13), accelerator, batch_size=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_without_a_target_is_an_error(args):
    arguments = args()
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[-100] * 3]})
    with pytest.raises(ValueError, match="has no targets"):
        evaluate(make_model(), dataset, start(arguments), batch_size=5)


def test_evaluations_on_a_part_and_the_final_one_on_all(args, monkeypatch):
    sizes, evaluate_ = [], loop.evaluate

    def spy(model, dataset, *args, **kwargs):
        sizes.append(len(dataset))
        return evaluate_(model, dataset, *args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", spy)
    run(args(max_train_steps=2, eval_steps=1, max_eval_samples=3))
    assert sizes == [3, 3, 13]


def test_one_line_of_summary():
    scores = {"eval_loss": 1.5, "eval_perplexity": math.exp(1.5)}
    assert summary(scores) == "validation loss 1.5000 nats per token, perplexity 4.482"
    assert "1.5000 nats per character" in summary(scores | {"eval_loss_per_character": 1.5})
    both = summary(scores | {"eval_loss_per_character": 0.5, "eval_accuracy": 0.25})
    assert (
        both == "validation loss 1.5000 nats per token, 0.5000 nats per character, perplexity 4.482, accuracy 0.2500"
    )


# ---- what is kept ----


def test_the_saved_model_evaluates_to_the_logged_loss(args, tmp_path):
    arguments = args(max_train_steps=20, learning_rate=0.01, eval_steps=10)
    model, result = run(arguments, dataset_name="counting", task="text-generation")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(saved.state_dict(), model.state_dict(), rtol=0, atol=0)
    AcceleratorState._reset_state()
    again = evaluate(saved, make_blocks(13, seed=1), loop.Accelerator(cpu=True), batch_size=5)
    assert again == pytest.approx(result["final"], rel=1e-6)
    assert result["final"]["eval_loss"] == pytest.approx(result["best"]["eval_loss"], rel=1e-6)
    assert result["final"]["eval_loss"] < 1.5 < result["history"][0]["loss"]

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics == result
    assert metrics["arguments"]["learning_rate"] == 0.01
    assert [record["step"] for record in metrics["history"] if "eval_loss" in record] == [10, 20]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.startswith("---\n")
    for part in (
        "model-index",
        "trust_remote_code=True",
        "pipeline_tag: text-generation",
        "counting",
        f"{result['final']['eval_loss']:.4f}",
        "- `num_warmup_steps`: 0",
        f'from_pretrained("{tmp_path / "run"}")',  # the directory, from which the model can be loaded
    ):
        assert part in card
    assert not list((tmp_path / "run").glob(".*"))


def test_the_card_speaks_of_what_was_trained(args, tmp_path):
    run(args(max_train_steps=1), unit="clip", auto_class="AutoModelForCausalLM", dataset_name="counting")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "nats per clip" in card
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path / "run"}")' in card
    assert "trained on counting" in card


def test_the_directory_of_another_run_is_refused_and_its_files_stay(args, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    (directory / "data").mkdir()
    (directory / "data" / "README.md").write_text("mine")
    check_output_dir(directory)  # neither notes nor data count as a run
    for name in ("README.md", "tokenizer.json", "scan.py", "modeling_mingru.py"):
        (directory / name).write_text("mine")
        with pytest.raises(ValueError, match=rf"a run would overwrite \({name}\).*--overwrite_output_dir"):
            start(args())
        (directory / name).unlink()
    (directory / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds another run \(config.json\).*--overwrite_output_dir"):
        start(args())
    _, result = run(args(overwrite_output_dir=True), processing_class=build_tokenizer("char", ["abcde"]))
    assert result["step"] == 4
    assert (directory / "notes.txt").read_text() == (directory / "data" / "README.md").read_text() == "mine"
    for path in directory.iterdir():  # another run would replace any file that a run wrote
        (tmp_path / path.name).mkdir()
        if path.name not in ("notes.txt", "data"):
            shutil.copy(path, tmp_path / path.name)
            with pytest.raises(ValueError, match=re.escape(path.name)):
                check_output_dir(tmp_path / path.name)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        check_output_dir(tmp_path / "file")


def test_a_crash_while_saving_leaves_the_files_before_it_whole(tmp_path):
    class Half:
        def save_pretrained(self, directory):
            (directory / "model.safetensors").write_text("half")
            raise OSError("disk full")

    save_pretrained(tmp_path, make_model())
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tmp_path, Half())
    assert (tmp_path / "model.safetensors").read_bytes() == before
    save_pretrained(tmp_path, make_model(), None)
    assert not (tmp_path / ".incomplete").exists()
    with pytest.raises(TypeError):
        write_json(tmp_path / "config.json", {"a": object()})
    json.loads((tmp_path / "config.json").read_text())


def test_tracking_writes_curves_and_samples_for_tensorboard(args, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tokenizer = build_tokenizer("char", ["abcde"])
    _, result = run(args(with_tracking=True, eval_steps=2, sample_tokens=9), processing_class=tokenizer)
    [file] = [f for f in (tmp_path / "run" / "runs").rglob("events.out.tfevents.*") if f.parent.name == "runs"]
    events = event_accumulator.EventAccumulator(str(file)).Reload()
    history = result["history"]
    losses = {record["step"]: record["loss"] for record in history if "loss" in record}
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(losses)
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 4]
    samples = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("sample/text_summary")]
    assert samples == [record["sample"] for record in history if "sample" in record]


def test_a_tracker_that_is_not_installed_is_named(args):
    with (
        pytest.warns(UserWarning, match="comet_ml"),
        pytest.raises(ValueError, match="tracker comet_ml is not installed"),
    ):
        start(args(with_tracking=True, report_to="comet_ml"))


@pytest.mark.clients("trackio")
def test_tracking_with_trackio(args, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read only when trackio is first imported
    trackio = pytest.importorskip("trackio")
    name = f"run-{uuid.uuid4()}"
    tracked = args(
        output_dir=str(tmp_path / name), with_tracking=True, report_to="trackio", eval_steps=2, sample_tokens=9
    )
    run(tracked, processing_class=build_tokenizer("char", ["abcde"]))
    assert [logged.name for logged in trackio.Api().runs("runs")].count(name) == 1


def test_push_to_hub_makes_the_repository_first_and_uploads_last(args, tmp_path, monkeypatch):
    calls = []

    def push(directory, name):
        calls.append(("upload", name))
        assert (tmp_path / "run" / "README.md").is_file()  # everything is written by then

    def make_repository(name):
        calls.append(("create", name))
        return f"me/{name}"

    monkeypatch.setattr(loop, "make_repository", make_repository)
    monkeypatch.setattr(loop, "push_directory", push)
    run(args(push_to_hub=True, hub_model_id="counting"))
    assert calls == [("create", "counting"), ("upload", "me/counting")]
    assert 'from_pretrained("me/counting")' in (tmp_path / "run" / "README.md").read_text()


# ---- mixed precision ----


def test_bfloat16_trains(args):
    _, result = run(args(mixed_precision="bf16", max_train_steps=20, learning_rate=0.01))
    assert result["mixed_precision"] == "bf16"
    assert result["final"]["eval_loss"] < 1.5


def test_auto_is_bfloat16_where_the_cpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert resolve_mixed_precision("auto", use_cpu=True) == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert resolve_mixed_precision("auto", use_cpu=True) == "no"
    assert resolve_mixed_precision("fp16") == "fp16"


def test_fp16_on_a_cpu_is_refused(args):
    with pytest.raises(ValueError, match="fp16"):
        start(args(mixed_precision="fp16"))


def test_weights_of_16_bits_are_trained_in_float32(args, tmp_path):
    model, _ = run(args(learning_rate=1e-6, max_train_steps=2), make_model().bfloat16())
    before = make_model().bfloat16().float().state_dict()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.float32


# ---- options ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of auto, no, bf16, fp16"),
        ({"hub_model_id": "me/it"}, "push_to_hub"),
        ({"report_to": "trackio"}, "add --with_tracking"),
        ({"lr_scheduler_kwargs": "min=1"}, "not JSON"),
        ({"lr_scheduler_kwargs": "[1]"}, "JSON object"),
        (
            {"lr_scheduler_type": "constant", "num_warmup_steps": 9},
            "constant has no warm-up: choose constant_with_warmup",
        ),
        (
            {"lr_scheduler_type": "inverse_sqrt", "max_train_seconds": 9.0},
            "inverse_sqrt depends on the number of steps",
        ),
    ],
)
def test_impossible_arguments_are_refused(args, change, message):
    with pytest.raises(ValueError, match=message):
        args(**change)


def test_streams_need_steps_and_may_not_end(args):
    class Short(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([{"input_ids": torch.arange(6)}] * 6)

    for change in ({"max_train_steps": None}, {"checkpointing_steps": "epoch"}):
        arguments = args(**change)
        with pytest.raises(ValueError, match="a stream has no epochs"):
            train(make_model(), Short(), make_blocks(4), arguments, start(arguments))
    arguments = args(dataloader_num_workers=1)
    with pytest.raises(ValueError, match="leave out dataloader_num_workers"):
        train(make_model(), Short(), make_blocks(4), arguments, start(arguments))
    arguments = args()
    with pytest.raises(ValueError, match="has ended"):
        train(make_model(), Short(), make_blocks(4), arguments, start(arguments))


@pytest.mark.usefixtures("a_second_a_step")
def test_a_stream_may_be_read_for_a_time(args):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return ({"input_ids": (torch.arange(12) + i) % 7} for i in itertools.count())

    arguments = args(max_train_steps=None, max_train_seconds=3.0)
    result = train(make_model(), Endless(), make_blocks(4), arguments, start(arguments))
    assert (result["step"], result["epoch"]) == (3, None)


def test_empty_datasets_are_refused(args):
    arguments = args()
    with pytest.raises(ValueError, match="validation set has no examples"):
        train(make_model(), make_blocks(4), make_blocks(0), arguments, start(arguments))


def test_every_field_is_an_option_with_its_default():
    parser = ArgumentParser(prog="x")
    add_arguments(parser, TrainArguments, max_train_steps=7)
    parsed = from_namespace(TrainArguments, parser.parse_args(["--output_dir", "out", "--use_cpu", "--seed", "3"]))
    assert parsed == TrainArguments(output_dir="out", use_cpu=True, seed=3, max_train_steps=7)


def test_a_wrong_option_ends_with_one_line(capsys):
    parser = ArgumentParser(prog="x")
    with pytest.raises(SystemExit) as error, parser.user_errors():
        raise ValueError("two\nlines")
    assert error.value.code == 2
    assert capsys.readouterr().err == "x: error: two lines\n"


def test_missing_packages_are_named_with_the_command(monkeypatch):
    find = importlib.util.find_spec
    missing = ("accelerate", "datasets")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(ImportError, match="needs accelerate and datasets: pip install accelerate datasets"):
        runpy.run_path(str(ROOT / "mingru_hf" / "training" / "__init__.py"))


# ---- configs and checkpoints by name ----


def test_overrides_are_json_and_may_hold_lists():
    parsed = parse_overrides("hidden_sizes=[8, 16],use_mlp=false,hidden_act=relu, expand=1.5")
    assert parsed == {"hidden_sizes": [8, 16], "use_mlp": False, "hidden_act": "relu", "expand": 1.5}
    assert parse_overrides(None) == {}


def test_a_config_is_made_from_file_values_and_overrides(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "mingru", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 5}')
    for name in (str(path), str(tmp_path)):
        config = make_config(name, "num_hidden_layers=3", vocab_size=11)
        assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (8, 3, 11)
    assert make_config(None, "hidden_size=12", vocab_size=4).hidden_size == 12


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (None, None, "no such file"),
        ("{", None, "not JSON"),
        ("[]", None, "does not contain a JSON object"),
        ("{}", "nonsense=1", "no field 'nonsense'"),
        ("{}", "hidden_size", "expected name=value"),
        ("{}", "hidden_size=-4", "config"),
        ("{}", "hidden_size=wide", "config"),
    ],
)
def test_impossible_configs_are_refused(tmp_path, content, overrides, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_config(str(path), overrides)


def test_a_directory_without_a_model_is_not_asked_for_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        load_pretrained(AutoModelForCausalLM, tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_pretrained(AutoModelForCausalLM, tmp_path)


def test_freed_memory_is_kept_for_the_next_step(tmp_path):
    """Count the pages that the system has to clear, in steps that each allocate and free 160 MiB of tensors."""
    if platform.libc_ver()[0] != "glibc":  # another C library manages memory in its own way, and is left to it
        assert not keep_freed_memory()
        return
    code = f"""
import resource, torch
from mingru_hf.training.arguments import TrainArguments
from mingru_hf.training.loop import start

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        tensors = [torch.ones(2**21) for _ in range(20)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(3)
print(faults(3))
start(TrainArguments(output_dir={str(tmp_path / "run")!r}, use_cpu=True, mixed_precision="no"))
faults(3)
print(faults(3))
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    before, after = (int(line) for line in process.stdout.splitlines())
    assert before > 3 * 2**15  # a page has 4 KiB
    assert after < before / 20


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_who_has_set_up_malloc_keeps_it_so(variable, monkeypatch):
    monkeypatch.setenv(variable, "1")
    assert not keep_freed_memory()


# ---- in every step ----


def test_a_start_seeds_the_weights_that_are_drawn_after_it(args):
    start(args(seed=3))
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))


def make_dropping_model():
    torch.manual_seed(1)
    return MinGRUForCausalLM(MinGRUConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, residual_dropout=0.5))


def test_dropout_depends_on_the_seed_and_not_on_what_was_drawn_before(args, tmp_path):
    weights = []
    for name in "ab":
        AcceleratorState._reset_state()
        arguments = args(output_dir=str(tmp_path / name))
        accelerator, model = start(arguments), make_dropping_model()
        torch.rand(5 if name == "a" else 6)
        train(model, make_blocks(16), make_blocks(13), arguments, accelerator)
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_every_update_is_made_in_training_mode(args):
    """Even if the model comes in evaluation mode from `from_pretrained`, and after an evaluation."""
    model, modes = make_model().eval(), []
    model.register_forward_hook(lambda module, args, output: modes.append(module.training))
    run(args(max_train_steps=3, eval_steps=1), model)
    evaluation = [False] * 3  # batches of 5, 5 and 3
    assert modes == 3 * [True, *evaluation] + evaluation


def test_matrices_and_norms_follow_the_same_learning_rate(args, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spy(self, *a, **k):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *a, **k)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(args(learning_rate=0.5, lr_scheduler_type="linear"))
    assert rates == [[rate, rate] for rate in (0.5, 0.375, 0.25, 0.125)]


def test_accumulated_gradients_are_clipped_as_a_whole(args, tmp_path):
    whole, _ = run(args(output_dir=str(tmp_path / "whole"), max_grad_norm=0.01))
    AcceleratorState._reset_state()
    size = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    pieces, _ = run(args(output_dir=str(tmp_path / "pieces"), max_grad_norm=0.01, **size))
    torch.testing.assert_close(whole.state_dict(), pieces.state_dict(), **ORDER_OF_SUMS)


def test_points_of_the_curve_are_means_of_the_steps_since_the_last_one(args, tmp_path):
    _, all_steps = run(args(max_train_steps=5))
    AcceleratorState._reset_state()
    _, result = run(args(max_train_steps=5, logging_steps=2, output_dir=str(tmp_path / "some")))
    losses, means = ([r["loss"] for r in each["history"] if "loss" in r] for each in (all_steps, result))
    expected = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert means == pytest.approx(expected, rel=1e-5)


def test_a_part_of_an_epoch_makes_a_step(args):
    _, result = run(args(max_train_steps=None, num_train_epochs=1.1))  # 4.4 batches
    assert result["step"] == 5


class Workers(torch.utils.data.Dataset):
    """Rows that only a worker process may read."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is None:
            raise RuntimeError("read by the main process")
        return {"input_ids": torch.arange(6)}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_load_the_data(args):
    arguments = args(max_train_steps=2, dataloader_num_workers=1)
    assert train(make_model(), Workers(), Workers(), arguments, start(arguments))["step"] == 2


def test_orders_of_neighbouring_seeds_are_not_those_of_neighbouring_epochs():
    zero, one = (BatchStream(num_examples=50, seed=seed, batch_size=1) for seed in (0, 1))
    assert zero.order(1) != one.order(0)


@pytest.mark.usefixtures("a_second_a_step")
def test_seconds_end_a_number_of_steps_early(args):
    _, result = run(args(max_train_steps=50, max_train_seconds=3.0))
    assert result["step"] == 3


def test_a_tracked_run_goes_on_only_where_the_training_does(args, monkeypatch):
    asked = []
    monkeypatch.setattr(loop.Accelerator, "init_trackers", lambda self, *args, **kwargs: asked.append(kwargs))
    options = {"with_tracking": True, "checkpointing_steps": "2", "resume_from_checkpoint": "latest"}
    for steps in (2, 4):
        AcceleratorState._reset_state()
        run(args(**options, max_train_steps=steps))
    assert [kwargs["init_kwargs"]["trackio"]["resume"] for kwargs in asked] == ["never", "allow"]
    assert asked[0]["init_kwargs"]["trackio"]["name"] == asked[0]["init_kwargs"]["wandb"]["name"] == "run"


# ---- evaluations during the run ----


def watch_evaluations(monkeypatch, losses):
    """Make the evaluations of a run return these losses in turn, and 1.0 after the last."""
    losses = iter(losses)
    monkeypatch.setattr(
        loop, "evaluate", lambda *args, **kwargs: {"eval_loss": next(losses, 1.0), "eval_perplexity": 1.0}
    )


def test_a_better_loss_renews_the_patience(args, monkeypatch):
    watch_evaluations(monkeypatch, [5.0, 6.0, 4.0, 5.0, 3.0, 4.0, 4.0])
    _, result = run(args(max_train_steps=20, eval_steps=1, early_stopping_patience=2))
    assert result["step"] == 7


def test_stopping_early_makes_a_checkpoint_only_where_they_are_asked_for(args, monkeypatch, tmp_path):
    for name, choice in (("none", {}), ("some", {"checkpointing_steps": "100"})):
        AcceleratorState._reset_state()
        watch_evaluations(monkeypatch, [1.0, 2.0])
        _, result = run(
            args(output_dir=str(tmp_path / name), max_train_steps=9, eval_steps=1, early_stopping_patience=1, **choice)
        )
        assert result["step"] == 2
        assert (tmp_path / name / "checkpoint-2").exists() == bool(choice)


def test_a_validation_loss_that_is_not_finite_ends_the_run(args, monkeypatch, tmp_path):
    watch_evaluations(monkeypatch, [2.0, math.nan])
    with pytest.raises(FloatingPointError, match="the validation loss is nan at step 2"):
        run(args(eval_steps=1))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())  # written after the first evaluation
    assert [record["eval_loss"] for record in metrics["history"] if "eval_loss" in record] == [2.0]
    assert "final" not in metrics


def test_the_part_to_evaluate_on_is_spread_from_the_first_to_the_last(args, monkeypatch):
    seen, evaluate_ = [], loop.evaluate

    def spy(model, dataset, *args, **kwargs):
        seen.append([row["input_ids"].tolist() for row in dataset])
        return evaluate_(model, dataset, *args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", spy)
    run(args(max_train_steps=1, max_eval_samples=3))
    rows = make_blocks(13, seed=1)["input_ids"][:]
    assert seen[0] == [rows[0], rows[6], rows[12]]


def test_all_evaluations_use_the_collate_function_and_the_length_of_tokens(args):
    def halves(rows):
        return {"input_ids": torch.stack([torch.as_tensor(row["input_ids"])[:6] for row in rows])}

    _, result = run(args(eval_steps=2), collate_fn=halves, characters_per_token=2.0)
    scores = [record for record in result["history"] if "eval_loss" in record]
    assert len(scores) == 2
    for record in (*scores, result["final"]):
        assert record["eval_loss_per_character"] == pytest.approx(record["eval_loss"] / 2)
    assert result["final"]["eval_loss"] == pytest.approx(result["best"]["eval_loss"], rel=1e-6)


def test_the_final_scores_are_tracked(args, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, result = run(args(with_tracking=True))
    [file] = [f for f in (tmp_path / "run" / "runs").rglob("events.out.tfevents.*") if f.parent.name == "runs"]
    events = event_accumulator.EventAccumulator(str(file)).Reload()
    assert [event.value for event in events.Scalars("final/loss")] == pytest.approx([result["final"]["eval_loss"]])


# ---- an evaluation alone ----


def test_a_model_in_training_mode_is_evaluated_without_dropout(args):
    arguments = args()
    accelerator = start(arguments)
    once, again = (
        evaluate(make_dropping_model().train(), make_blocks(13), accelerator, batch_size=5) for _ in range(2)
    )
    assert once == again == evaluate(make_dropping_model().eval(), make_blocks(13), accelerator, batch_size=5)


def test_a_batch_without_a_target_does_not_count(args):
    rows = make_blocks(6)["input_ids"][:]
    labels = [[-100] * 12 if i in (2, 3) else row for i, row in enumerate(rows)]
    some = Dataset.from_dict({"input_ids": rows, "labels": labels})
    accelerator = start(args())
    scores = evaluate(make_model(), some, accelerator, batch_size=2)
    assert scores == pytest.approx(evaluate(make_model(), some.select([0, 1, 4, 5]), accelerator, batch_size=2))


def test_metrics_of_any_kind_of_number_keep_their_digits(args):
    kinds = {"float": 1 / 3, "array": np.array([1 / 3]), "tensor": torch.tensor([1 / 3], dtype=torch.float64)}
    metrics = {name: lambda logits, labels, value=value: value for name, value in kinds.items()}
    scores = evaluate(make_model(), make_blocks(13), start(args()), batch_size=5, metrics=metrics)
    assert [scores[f"eval_{name}"] for name in kinds] == pytest.approx([1 / 3] * 3, rel=1e-15)


def test_a_perplexity_beyond_all_numbers_is_infinite(args):
    arguments, model = args(), make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    scores = evaluate(model, make_blocks(13), start(arguments), batch_size=5)
    assert 710 < scores["eval_loss"] < math.inf
    assert scores["eval_perplexity"] == math.inf


# ---- samples ----


def test_a_sample_depends_on_its_seed_alone_and_ends_where_the_positions_do():
    tokenizer = build_tokenizer("char", ["abcde"])
    model = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=1)).eval()
    model.generation_config.suppress_tokens = [0, 1]  # no end-of-text token ends the text early
    texts = [sample_text(model, tokenizer, 100, seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    assert [len(text) for text in texts] == [7] * 4  # 8 positions, of which the start token takes one
    model = make_model().eval()
    model.generation_config.suppress_tokens = [0, 1]
    assert len(sample_text(model, tokenizer, 40)) == 40  # MinGRU has no limit of positions


# ---- more of several processes ----


def dropping():
    """Return a model whose dropout each process draws independently, with its training and validation sets."""
    return make_dropping_model(), make_blocks(16), make_blocks(13, seed=1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_every_process_goes_on_with_its_own_dropout_and_counts_the_tokens_of_all(tmp_path):
    whole = train_in_processes(2, tmp_path, dropping)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["progress"]["tokens"] == 6 * 8 * 12
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert train_in_processes(2, tmp_path, dropping) == whole


# ---- more about options ----

POSITIVE = [
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "num_train_epochs"),
    *("max_train_steps", "max_train_seconds", "early_stopping_patience", "per_device_eval_batch_size"),
    *("eval_steps", "max_eval_samples", "logging_steps"),
]
NOT_NEGATIVE = [
    *("checkpoints_total_limit", "sample_tokens", "num_warmup_steps", "weight_decay", "max_grad_norm"),
    *("dataloader_num_workers", "seed"),
]


@pytest.mark.parametrize("name", POSITIVE)
def test_numbers_that_must_be_positive(args, name):
    for value in (0, -1, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be positive, not {value}"):
            args(**{name: value})


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_numbers_that_may_be_zero(args, name):
    assert getattr(args(**{name: 0}), name) == 0
    for value in (-1, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be 0 or more, not {value}"):
            args(**{name: value})


@pytest.mark.parametrize("name", ["adam_beta1", "adam_beta2"])
def test_decays_of_moments_lie_below_one(args, name):
    for value in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\)"):
            args(**{name: value})


def test_the_optimizer_has_the_numbers_that_were_asked_for(args):
    asked = args(learning_rate=0.5, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95)
    groups = make_optimizer(make_model(), asked).param_groups
    assert [(group["lr"], group["betas"]) for group in groups] == [(0.5, (0.8, 0.95))] * 2
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


@pytest.mark.parametrize("kwargs", ['{"nonsense": 1}', '{"num_cycles": "many"}'])
def test_what_a_schedule_does_not_know_is_an_error_of_the_set_up(args, kwargs):
    with pytest.raises(SetupError, match="lr_scheduler_type cosine_with_min_lr: "):
        make_schedule(args(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=kwargs), 100)


def test_default_lengths_of_the_warm_up(args):
    arguments = args(num_warmup_steps=None)
    assert [arguments.warmup_steps(steps) for steps in (None, 5000, 50, 5)] == [100, 100, 5, 0]


def test_the_name_on_the_hub_is_that_of_the_directory_or_the_one_given(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert TrainArguments(output_dir=".").hub_name == "mine"
    assert TrainArguments(output_dir="x", push_to_hub=True, hub_model_id="me/it").hub_name == "me/it"


@dataclass(kw_only=True)
class Options:
    """Options of a script."""

    share: int = option(10, "50% of it", group="numbers")
    loud: bool = option(False, "say more", fixed=True)
    kind: str = option("a", "which", ("a", "b"), fixed=True)
    place: str = option("here", "where; default: here")


def parse(*words, **defaults):
    parser = ArgumentParser(prog="x")
    add_arguments(parser, Options, **defaults)
    return from_namespace(Options, parser.parse_args(words))


def test_a_script_has_defaults_of_its_own():
    assert parse(share=20, loud=True) == Options(share=20, loud=True)
    assert parse("--share", "30", share=20) == Options(share=30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sha", "3"), "unrecognized arguments: --sha 3"),
        (("--kind", "c"), "--kind: invalid choice: 'c'"),
        (("--share", "many"), "invalid int value"),
    ],
)
def test_words_that_are_no_options_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*words)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["output_dir", "resume_from_checkpoint", "report_to", "lr_scheduler_kwargs"])
def test_an_empty_text_is_no_value(args, name):
    """An empty value usually comes from an unset shell variable; as a path it would mean the current directory."""
    with pytest.raises(ValueError, match=f"^{name} must not be empty: give it a value, or leave it out$"):
        args(**{name: ""})


def test_options_of_any_class_are_held_against_what_they_may_be(capsys):
    @dataclass(kw_only=True)
    class Data:
        train_file: str | None = option(None, "the text")
        block_size: int = option(256, "tokens", positive=True)

    for words, message in (
        (["--train_file", ""], "train_file must not be empty"),
        (["--block_size", "0"], "block_size must be positive"),
    ):
        with pytest.raises(SystemExit):
            parse_dataclasses("", words, Data)
        assert message in capsys.readouterr().err


def test_what_is_required_is_said(capsys):
    parser = ArgumentParser(prog="x")
    add_arguments(parser, TrainArguments)
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert capsys.readouterr().err == "x: error: the following arguments are required: --output_dir\n"


def test_help_tells_each_default_once():
    parser = ArgumentParser(prog="x")
    add_arguments(parser, Options)
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    for line in ("--share N 50% of it [10]", "--loud say more", "--kind NAME which: a, b [a]"):
        assert line in lines
    assert "--place TEXT where; default: here" in lines
    assert "numbers:" in lines


def test_only_fixed_options_stay_as_they_were():
    assert fixed_settings(Options(), Options(loud=True)) == {"loud": True, "kind": "a"}


@pytest.mark.parametrize("raised", [ValueError(), OSError("no\nroom"), ImportError("no room")])
def test_errors_of_a_user_end_with_one_line_and_others_keep_their_traceback(raised, capsys):
    parser = ArgumentParser(prog="x")
    with pytest.raises(SystemExit), parser.user_errors():
        raise raised
    assert capsys.readouterr().err == f"x: error: {'no room' if str(raised) else 'ValueError'}\n"
    with pytest.raises(type(raised)), parser.setup_errors():
        raise raised
    with pytest.raises(SystemExit), parser.setup_errors():
        raise SetupError("no room")
