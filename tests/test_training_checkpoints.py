"""Interrupted runs: killed at any moment, they resume to the same weights, and the checkpoints on disk are complete.

Each run is a process forked from a server that has already imported everything, so that it starts quickly; SIGKILL
ends it as a power cut would.
"""

import atexit
import errno
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Trainer, TrainingArguments
from transformers.utils import logging

from mingru_hf import MinGRUConfig, MinGRUForCausalLM
from mingru_hf.data.text import ShiftedBlocks, build_tokenizer
from mingru_hf.training import checkpoints, loop
from mingru_hf.training.arguments import SetupError, TrainArguments, option
from mingru_hf.training.checkpoints import (
    STATE_FILE,
    check_new_files,
    check_output_dir,
    check_writable,
    checkpoints_in,
    damage,
    find_checkpoint,
    no_progress_bars,
    read_checkpoint,
    restore_best,
    save_pretrained,
    write_checkpoint,
    write_json,
)
from mingru_hf.training.loop import BatchStream, start, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["mingru_hf.training.loop", "mingru_hf.data.text", "datasets"])
LETTERS = "abcdefg"


def train_counting(
    output_dir, stream=None, settings=(), tokenizer=None, config=None, checksums=(None, None), **changes
):
    """Train a tiny model with dropout on rows that count up, with frequent evaluations and checkpoints.

    `changes` override TrainArguments or, for the names in `fields`, the model's config.
    """
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its default is a system semaphore, which would outlive a killed process
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    values = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 8,
        "max_train_steps": 20,
        "num_warmup_steps": 5,
        "learning_rate": 0.02,
        "logging_steps": 4,
        "eval_steps": 3,
        "checkpointing_steps": "2",
        "mixed_precision": "no",
        "use_cpu": True,
        "resume_from_checkpoint": "latest",
    }
    fields = {"hidden_size": 16, "num_hidden_layers": 2, "id2label": {0: "no", 1: "yes"}}
    fields = {name: changes.pop(name, value) for name, value in fields.items()}
    args = TrainArguments(**(values | changes))
    accelerator = start(args, settings)
    torch.manual_seed(1)
    config = config or MinGRUConfig(vocab_size=9, residual_dropout=0.3, **fields)
    starts = torch.arange(20).unsqueeze(1)
    rows = Dataset.from_dict({"input_ids": ((starts + torch.arange(10)) % 7 + 2).tolist()})
    tokenizer = tokenizer or build_tokenizer("char", [LETTERS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_loss", lambda *args: None)  # it would take most of the time of such small runs
        return train(
            AutoModelForCausalLM.from_config(config),
            stream or rows,
            rows,
            args,
            accelerator,
            processing_class=tokenizer,
            settings=settings,
            checksums=checksums,
        )


def die_in(writer, time, call, number, output_dir):
    """Train, and be killed in the `time`-th run of `writer`, just before its `number`-th use of `call`."""
    module = shutil if call == "rmtree" else os
    write, original = getattr(loop, writer), getattr(module, call)
    runs, calls = itertools.count(1), itertools.count(1)

    def count(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    def watch(*args, **kwargs):
        if next(runs) == time:
            setattr(module, call, count)
        return write(*args, **kwargs)

    setattr(loop, writer, watch)
    train_counting(output_dir)


def train_and_tell(begun, output_dir):
    """Train, after announcing the start through the pipe `begun`."""
    begun.send(True)
    train_counting(output_dir)


class Counting(torch.utils.data.IterableDataset):
    """An endless stream of rows that count up, in the form in which `StreamedBlocks` yields blocks."""

    def __iter__(self):
        return ({"input_ids": (torch.arange(10) + 3 * i) % 7 + 2} for i in itertools.count())


def process(target, *args):
    child = SERVER.Process(target=target, args=args)
    child.start()
    return child


def finish(output_dir):
    """Start or resume a run, and check that it reaches its end."""
    child = process(train_counting, output_dir)
    child.join(120)
    assert child.exitcode == 0


def assert_same_run(output_dir, whole):
    """Assert that weights, optimizer, curve and best step are those of the uninterrupted run."""
    torch.testing.assert_close(
        load_file(output_dir / "model.safetensors"), load_file(whole / "model.safetensors"), rtol=0, atol=0
    )
    names = [path.name for path in checkpoints_in(output_dir)]
    assert names == ["checkpoint-18", "checkpoint-20"]
    for name in names:
        assert damage(output_dir / name) is None
        for file in ("model.safetensors", "best/model.safetensors"):
            assert (output_dir / name / file).exists() == (whole / name / file).exists()
            if (whole / name / file).exists():
                assert (output_dir / name / file).read_bytes() == (whole / name / file).read_bytes()
        tensors, expected = (
            torch.load(d / name / checkpoints.TENSORS_FILE, weights_only=True) for d in (output_dir, whole)
        )
        for mine, other in zip(tensors.pop("processes"), expected.pop("processes"), strict=True):
            assert (mine["python"], mine["numpy"]) == (other["python"], other["numpy"])
            assert torch.equal(mine["torch"], other["torch"])
            assert torch.equal(mine["loss_sum"], other["loss_sum"])
        torch.testing.assert_close(tensors["optimizer"], expected["optimizer"], rtol=0, atol=0)
    assert curve(output_dir) == curve(whole)
    assert not list(output_dir.glob(".*"))


def curve(output_dir):
    """Return the results in metrics.json without the times, which differ from run to run."""
    metrics = json.loads((output_dir / "metrics.json").read_text())
    history = [{k: v for k, v in record.items() if k != "seconds"} for record in metrics["history"]]
    return history, metrics["best"]["step"], metrics["final"], metrics["step"]


def contents(directory):
    """Return the bytes of every file by its path."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the directory of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    finish(directory)
    return directory


# ---- killed ----


@pytest.mark.parametrize("moments", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(moments, tmp_path, whole):
    seconds = json.loads((whole / "metrics.json").read_text())["train_seconds"]
    generator, directory, killed_at = random.Random(7), tmp_path / "run-0", []
    while len(killed_at) < moments:
        begun, its_end = SERVER.Pipe(duplex=False)
        child = process(train_and_tell, its_end, directory)
        assert begun.recv()
        time.sleep(generator.uniform(0, seconds))
        child.kill()
        child.join()
        if child.exitcode == 0:  # it finished before the kill
            assert_same_run(directory, whole)
            directory = tmp_path / f"run-{len(killed_at)}"
            continue
        there = checkpoints_in(directory)
        assert all(damage(path) is None for path in there)
        killed_at.append(there[-1].name if there else "start")
    finish(directory)
    assert_same_run(directory, whole)
    print("killed after", *killed_at)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("writer", "time", "call", "number", "left"),
    [
        ("write_json", 1, "fsync", 1, []),  # before the first checkpoint
        pytest.param("write_checkpoint", 1, "fsync", 3, [], marks=SLOW),
        pytest.param("save_pretrained", 1, "fsync", 2, [2], marks=SLOW),  # during an evaluation
        ("write_checkpoint", 2, "fsync", 5, [2]),  # the second checkpoint also holds the best weights
        pytest.param("write_checkpoint", 2, "rename", 1, [2], marks=SLOW),  # before the checkpoint gets its name
        pytest.param("write_checkpoint", 3, "rename", 2, [2, 4, 6], marks=SLOW),  # before the first is removed
        ("write_checkpoint", 3, "rmtree", 1, [4, 6]),  # while the first is removed
    ],
)
def test_killed_in_the_middle_of_writing(writer, time, call, number, left, tmp_path, whole):
    child = process(die_in, writer, time, call, number, tmp_path / "run")
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    there = checkpoints_in(tmp_path / "run")
    assert [path.name for path in there] == [f"checkpoint-{step}" for step in left]
    assert all(damage(path) is None for path in there)
    finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


# ---- damaged, and no room ----


@pytest.fixture
def run(whole, tmp_path):
    """Copy the uninterrupted run, so that a test can damage it."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", "trainer_state.json", "tokenizer.json"])
@pytest.mark.parametrize("spoil", ["cut", "changed", "missing"])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_is_used(name, spoil, run):
    path = run / "checkpoint-20" / name
    content = path.read_bytes()
    path.unlink()
    if spoil == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif spoil == "changed":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert name in damage(run / "checkpoint-20")
    with pytest.warns(UserWarning, match=f"checkpoint-20 is not a complete checkpoint .*{name}.*the one before"):
        assert find_checkpoint("latest", run) == run / "checkpoint-18"
    with pytest.raises(ValueError, match=f"checkpoint-20 is not a complete checkpoint.*{name}"):
        find_checkpoint(run / "checkpoint-20", run)


def test_going_on_from_the_checkpoint_before_a_damaged_one(run, whole):
    (run / "checkpoint-20" / "training_state.pt").write_bytes(b"half")
    with pytest.warns(UserWarning, match="not a complete checkpoint"):
        train_counting(run)
    assert_same_run(run, whole)


def test_without_a_complete_checkpoint_no_run_starts_over(run):
    """A new run would overwrite the best weights next to the damaged checkpoints."""
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["final"]  # as in a run that was killed
    metrics["arguments"]["output_dir"] = str(run)
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "checkpoint-18" / "generation_config.json").unlink()
    (run / "checkpoint-20" / "config.json").write_text("{}")
    before = contents(run)
    with pytest.raises(
        ValueError,
        match=r"checkpoint-20 is not .*config.json is damaged.*checkpoint-18 is not .*ation_config.json is missing",
    ):
        train_counting(run)
    assert contents(run) == before
    for path in checkpoints_in(run):
        path.rename(run / f"old-{path.name}")
    assert train_counting(run)["step"] == 20


def test_a_full_disk_ends_with_a_clear_error_and_leaves_the_last_checkpoint(tmp_path, whole):
    """A limit on the file size simulates the full disk: the optimizer's state no longer fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write, sizes = checkpoints.write_checkpoint, []

    def shrink(output_dir, step, *args):
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) // 2, before[1]))
        target = write(output_dir, step, *args)
        sizes.append((target / checkpoints.TENSORS_FILE).stat().st_size)
        return target

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "write_checkpoint", shrink)
            with pytest.raises(
                OSError, match=r"checkpoint-6 could not be written.*Free some space.*--resume_from_checkpoint"
            ):
                train_counting(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    assert not list((tmp_path / "run").glob(".*"))
    finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


# ---- what a checkpoint is ----


def test_every_checkpoint_loads_by_its_directory_alone(whole):
    for path in checkpoints_in(whole):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        torch.testing.assert_close(
            model.state_dict(), load_file(path / "model.safetensors"), rtol=0, atol=0, check_stride=False
        )
        assert tokenizer.decode(tokenizer("cab").input_ids) == "cab"


@pytest.mark.parametrize(("limit", "kept"), [(1, [30]), (2, [9, 30]), (None, [1, 2, 9, 30])])
def test_the_newest_are_kept(limit, kept, tmp_path):
    (tmp_path / "checkpoint-mine").mkdir()
    for step in (1, 2, 9, 30):
        write_checkpoint(tmp_path, step, (None,), {"a": torch.zeros(2)}, {"best": None}, limit)
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"checkpoint-{step}" for step in kept]
    assert (tmp_path / "checkpoint-mine").is_dir()


def test_a_finished_run_goes_on_for_longer_and_elsewhere(run, whole, tmp_path):
    result = train_counting(run)  # nothing left to do
    assert curve(run) == curve(whole)
    elsewhere = tmp_path / "elsewhere"
    result = train_counting(elsewhere, max_train_steps=22, resume_from_checkpoint=str(run / "checkpoint-18"))
    assert result["step"] == 22
    assert [path.name for path in checkpoints_in(elsewhere)] == ["checkpoint-20", "checkpoint-22"]
    assert AutoTokenizer.from_pretrained(elsewhere).decode([2, 3]) == "ab"


def test_a_card_that_was_edited_stays_when_the_run_goes_on(run, capsys):
    card = run / "README.md"
    card.write_text(card.read_text().replace("## Results", "## My results"))
    edited = card.read_text()
    train_counting(run)
    assert card.read_text() == edited
    assert "README.md was edited and is kept: add --overwrite_output_dir" in capsys.readouterr().out
    train_counting(run, overwrite_output_dir=True)
    assert "## My results" not in card.read_text()
    train_counting(run, max_train_steps=21)
    assert "21 optimizer steps" in card.read_text()


def test_a_run_that_becomes_longer_is_evaluated_as_often(tmp_path):
    train_counting(tmp_path / "run", max_train_steps=10, eval_steps=None)
    result = train_counting(tmp_path / "run", max_train_steps=40, eval_steps=None)
    evaluated = [record["step"] for record in result["history"] if "eval_loss" in record]
    assert evaluated == [*range(1, 11), *range(12, 41, 4)]


def test_the_best_weights_come_along(run, whole, tmp_path):
    """The resumed run has a learning rate that ruins the model: it keeps the best weights from before."""
    before = (
        load_file(run / "checkpoint-20" / "best" / "model.safetensors")
        if (run / "checkpoint-20" / "best").exists()
        else load_file(run / "checkpoint-20" / "model.safetensors")
    )
    result = train_counting(
        tmp_path / "spoilt",
        max_train_steps=23,
        learning_rate=30.0,
        lr_scheduler_type="constant",
        num_warmup_steps=0,
        resume_from_checkpoint=str(run / "checkpoint-20"),
    )
    assert result["best"]["step"] <= 20
    torch.testing.assert_close(load_file(tmp_path / "spoilt" / "model.safetensors"), before, rtol=0, atol=0)
    assert result["final"]["eval_loss"] == pytest.approx(result["best"]["eval_loss"], rel=1e-6)


def test_epochs_are_checkpoints_too(tmp_path):
    train_counting(tmp_path / "run", checkpointing_steps="epoch", max_train_steps=15, checkpoints_total_limit=0)
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == [
        "checkpoint-7",
        "checkpoint-14",
        "checkpoint-15",
    ]


def test_a_stream_goes_on_where_it_was_left(tmp_path):
    whole = train_counting(tmp_path / "whole", Counting(), max_train_steps=12, checkpoints_total_limit=0)
    assert whole["epoch"] is None
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    result = train_counting(tmp_path / "run", Counting(), max_train_steps=12)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    weights = (load_file(tmp_path / name / "checkpoint-12" / "model.safetensors") for name in ("run", "whole"))
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert result["step"] == 12


def test_a_stream_that_is_read_again_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    train_counting(tmp_path, Counting(), max_train_steps=6)
    shown = {"disable": False, "delay": 0, "mininterval": 0}
    monkeypatch.setattr(loop, "tqdm", lambda *args, **kwargs: tqdm(*args, **kwargs | shown))
    train_counting(tmp_path, Counting(), max_train_steps=8)
    assert "reading the stream again: 100%|██████████| 6/6 [" in capsys.readouterr().err


def test_reading_a_stream_again_is_no_training(tmp_path, monkeypatch):
    """Reading it again neither uses up max_train_seconds nor lowers the reported speed."""
    train_counting(tmp_path, Counting(), max_train_steps=6)
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(loop, "time", clock)

    class Slow(Counting):
        def __iter__(self):
            for number, row in enumerate(super().__iter__()):
                clock.now += 100.0 if number < 6 * 3 else 1.0
                yield row

    result = train_counting(tmp_path, Slow(), max_train_steps=8)
    assert result["train_seconds"] < 100


def test_shifted_blocks_resume_where_they_stopped(tmp_path):
    text = torch.randint(2, 9, (20, 10), generator=torch.Generator().manual_seed(0))
    seen = []

    class Noted(ShiftedBlocks):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    blocks = Noted(Dataset.from_dict({"input_ids": text.tolist()}), seed=1)
    options = {"max_train_steps": 18, "checkpoints_total_limit": 0}  # 2.7 passes
    train_counting(tmp_path / "whole", blocks, **options)
    assert sorted(seen[:40]) == list(range(40))  # the second pass uses other indices than the first
    assert len(set(seen[40:])) == 14
    assert min(seen[40:]) >= 40
    del seen[:]
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", tmp_path / "run" / "checkpoint-10")
    train_counting(tmp_path / "run", blocks, **options)
    assert min(seen) >= 20
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    weights = (load_file(tmp_path / name / "checkpoint-18" / "model.safetensors") for name in ("run", "whole"))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_on_another_validation_set_the_best_weights_are_evaluated_once_more(tmp_path, capsys):
    """Their old loss cannot be compared with later ones; here it is 0, which no later loss could beat."""
    first = train_counting(tmp_path / "run", checksums=(1, 2), max_train_steps=6, checkpoints_total_limit=0)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")  # the best weights are those of step 3, not checkpoint-4's
    first["best"] = json.loads((tmp_path / "run" / "checkpoint-4" / STATE_FILE).read_text())["best"]
    state = tmp_path / "run" / "checkpoint-4" / STATE_FILE
    content = json.loads(state.read_text())
    content["best"]["eval_loss"] = content["progress"]["best"]["eval_loss"] = 0.0
    state.write_text(json.dumps(content))
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    same = train_counting(tmp_path / "same", checksums=(1, 2), max_train_steps=9)
    assert same["best"]["eval_loss"] == 0.0
    assert "validation set has changed" not in capsys.readouterr().out
    again = train_counting(tmp_path / "run", checksums=(1, 3), max_train_steps=9)
    assert f"the best weights so far (step {first['best']['step']}) have validation loss" in capsys.readouterr().out
    assert again["best"]["step"] == 9
    assert again["best"]["eval_loss"] < first["best"]["eval_loss"]
    files = ("run/model.safetensors", "run/checkpoint-9/model.safetensors", "same/checkpoint-9/model.safetensors")
    best, last, of_same = (load_file(tmp_path / file) for file in files)
    torch.testing.assert_close(best, last, rtol=0, atol=0)
    torch.testing.assert_close(of_same, last, rtol=0, atol=0)  # the additional evaluation did not change the training


def test_on_other_training_data_no_run_goes_on(tmp_path):
    train_counting(tmp_path / "run", checksums=(1, 2), max_train_steps=4)
    assert train_counting(tmp_path / "run", max_train_steps=5)["step"] == 5  # without checksums, data are not compared
    with pytest.raises(SetupError, match="belongs to a run on different training data: resume with the original data"):
        train_counting(tmp_path / "run", checksums=(9, 2), max_train_steps=6)


def test_what_has_changed_when_a_run_goes_on_takes_effect(tmp_path, capsys):
    train_counting(tmp_path / "whole", max_train_steps=6, checkpoints_total_limit=0)
    weights = {}
    for name, change in {"same": {}, "decay": {"weight_decay": 0.9}, "beta": {"adam_beta1": 0.5}}.items():
        shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / name / "checkpoint-4")
        train_counting(tmp_path / name, max_train_steps=6, **change)
        weights[name] = load_file(tmp_path / name / "checkpoint-6" / "model.safetensors")
    out = capsys.readouterr().out
    assert "weight_decay 0.1 -> 0.9" in out
    whole = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    torch.testing.assert_close(weights["same"], whole, rtol=0, atol=0)
    matrix, norm = "model.layers.0.mixer.gate_hidden.weight", "model.norm.weight"
    assert weights["decay"][matrix].norm() < whole[matrix].norm()
    assert not torch.equal(weights["beta"][norm], whole[norm])


@dataclass(kw_only=True)
class Task:
    """Arguments of a script."""

    noise: int = option(3, "what the examples are made of", fixed=True)
    cache: str = option("here", "where they lie")


def test_settings_are_recorded_and_the_fixed_ones_stay(tmp_path, capsys):
    result = train_counting(tmp_path / "run", settings=[Task()], max_train_steps=2)
    assert result["arguments"]["cache"] == "here"
    assert result["data_settings"] == {"noise": 3}
    assert "- `noise`: 3" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(SetupError, match="belongs to a run with noise 3, not 4"):
        train_counting(tmp_path / "run", settings=[Task(noise=4)], max_train_steps=4)
    train_counting(tmp_path / "run", settings=[Task(cache="there")], max_train_steps=4)
    assert "changed: max_train_steps 2 -> 4, cache here -> there" in capsys.readouterr().out


def test_a_run_goes_on_with_the_vocabulary_and_labels_it_began_with(tmp_path):
    """The weights rely on the ids of both, so an edit of the data must not change these ids."""
    tokenizer = build_tokenizer("char", [LETTERS])
    run = {"max_train_steps": 2, "tokenizer": tokenizer, "id2label": {0: "down", 1: "up"}}
    train_counting(tmp_path / "run", **run)
    before = contents(tmp_path / "run")
    run["max_train_steps"] = 4
    for change, message in (
        (
            {"tokenizer": build_tokenizer("char", ["aBcdefg"])},
            r"different tokens .*2: 'a' there, 'B' here; 3: 'b' there, 'a'",
        ),
        ({"tokenizer": build_tokenizer("char", ["abcdef"])}, r"different tokens .*8: 'g' there, None here\)"),
        (
            {"id2label": {0: "Up", 1: "down"}},
            r"different labels .*0: 'down' there, 'Up' here; 1: 'up' there, 'down' here",
        ),
        ({"id2label": {0: "down", 1: "up", 2: "left"}}, r"different labels .*2: None there, 'left' here\)"),
    ):
        with pytest.raises(SetupError, match=message + ".*resume with the original data"):
            train_counting(tmp_path / "run", **run | change)
    assert contents(tmp_path / "run") == before
    assert train_counting(tmp_path / "run", **run)["step"] == 4


def test_a_run_goes_on_with_the_model_it_began_with(tmp_path):
    train_counting(tmp_path / "run", max_train_steps=2)
    with pytest.raises(SetupError, match=r"another model .*lm_head.weight: \[9, 16\] there, \[9, 24\] here.*config"):
        train_counting(tmp_path / "run", max_train_steps=4, hidden_size=24)
    with pytest.raises(SetupError, match=r"another model .*layers.1.* there, None here.*config"):
        train_counting(tmp_path / "run", max_train_steps=4, num_hidden_layers=1)
    with pytest.raises(SetupError, match=r"another model \(model_type: 'mingru' there, 'gpt2' here\)"):
        train_counting(tmp_path / "run", max_train_steps=4, config=GPT2Config(vocab_size=9, n_embd=16, n_head=2))


def test_nothing_left_to_do_and_nothing_evaluated_yet(tmp_path):
    train_counting(tmp_path / "first", max_train_steps=4, checkpoints_total_limit=0)
    shutil.copytree(tmp_path / "first" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    result = train_counting(tmp_path / "run", max_train_steps=2)
    assert result["step"] == 2
    weights = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "run/checkpoint-2"))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_early_stopping_is_remembered(tmp_path):
    stop = {
        "learning_rate": 30.0,
        "lr_scheduler_type": "constant",
        "early_stopping_patience": 2,
        "num_warmup_steps": 0,
    }
    first = train_counting(tmp_path / "run", **stop)
    assert first["step"] < 20
    assert train_counting(tmp_path / "run", **stop)["step"] == first["step"]
    longer = {"early_stopping_patience": 3, "max_train_steps": first["step"] + 1}
    assert train_counting(tmp_path / "run", **stop | longer)["step"] == first["step"] + 1


# ---- mistakes ----


def test_other_runs_and_other_data_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"seed 0, not 3"):
        train_counting(run, seed=3)
    with pytest.raises(ValueError, match=r"examples per step 3, not 4"):
        train_counting(run, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match=r"checkpoint-20 of another run.*--resume_from_checkpoint latest"):
        train_counting(run, resume_from_checkpoint=None, overwrite_output_dir=True)
    with pytest.raises(ValueError, match=r"holds checkpoint-20, which would be mistaken"):
        train_counting(run, resume_from_checkpoint=str(run / "checkpoint-18"))
    with pytest.raises(ValueError, match="no such directory"):
        train_counting(tmp_path / "new", resume_from_checkpoint=str(run / "checkpoint-5"))
    for path in checkpoints_in(run):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="holds another run"):  # a finished run without checkpoints: nothing to resume
        train_counting(run)
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["final"]
    metrics["arguments"]["output_dir"] = str(run)
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="holds another run"):  # an interrupted run, but with other arguments
        train_counting(run, learning_rate=0.5)
    assert train_counting(run)["step"] == 20


@pytest.mark.parametrize("resume", [None, "latest", "whole"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_checkpoints_of_another_program_stay(resume, overwrite, tmp_path, whole):
    """transformers' Trainer gives its own checkpoints the same names."""
    output_dir = tmp_path / "run"
    model = MinGRUForCausalLM(MinGRUConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2))
    rows = [{"input_ids": torch.arange(5), "labels": torch.arange(5)}] * 4
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    Trainer(model, TrainingArguments(output_dir, max_steps=4, save_steps=2, **options), train_dataset=rows).train()
    assert "another program" in damage(output_dir / "checkpoint-4")
    before = contents(output_dir)
    resume = whole / "checkpoint-20" if resume == "whole" else resume
    with pytest.raises(ValueError, match=r"checkpoint-4, which this script did not write.*another --output_dir"):
        train_counting(output_dir, resume_from_checkpoint=resume, overwrite_output_dir=overwrite)
    assert contents(output_dir) == before


def test_only_its_own_checkpoints_are_removed(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, (None,), {}, {"best": None}, 1)
        if step == 1:
            shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-0")
            (tmp_path / "checkpoint-0" / "trainer_state.json").write_text('{"global_step": 0}')
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-0", "checkpoint-3"]


def test_a_config_edited_beside_it_leaves_a_checkpoint_whole(run):
    with (run / "config.json").open("a") as file:
        file.write("\n")
    assert [damage(path) for path in checkpoints_in(run)] == [None, None]


@pytest.mark.parametrize("steps", ["0", "-1", "often", "1.5"])
def test_impossible_intervals_are_refused(steps):
    with pytest.raises(ValueError, match="checkpointing_steps must be"):
        TrainArguments(output_dir="run", checkpointing_steps=steps)


@pytest.mark.parametrize("skipped", [0, 1, 5, 12, 31])
def test_the_data_go_on_where_they_were_left(skipped):
    whole = iter(BatchStream(num_examples=10, batch_size=4, seed=2))
    for _ in range(2 * skipped):
        next(whole)
    parts = [iter(BatchStream(10, 2, 4, rank, num_processes=2, first_batch=2 * skipped)) for rank in range(2)]
    for _ in range(7):
        assert [next(part) for part in parts] == [next(whole), next(whole)]


# ---- where a run may write ----


def test_nothing_is_left_of_a_look_whether_a_directory_can_be_written(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"x cannot be written to .* choose another one"):
        check_writable(tmp_path / "file" / "x")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a directory that is there and takes no file")
def test_a_directory_that_takes_no_file_is_refused():
    with pytest.raises(ValueError, match="/proc cannot be written to"):
        check_writable("/proc")


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    """The error comes before training, not after it from the library that writes the tokenizer."""
    with pytest.raises(ValueError, match=r"s.udcf6rtie' is not valid UTF-8"):
        check_writable(tmp_path / os.fsdecode(b"s\xf6rtie"))


def test_new_files_replace_none_unless_the_user_allows_it(tmp_path):
    (tmp_path / "a.onnx").touch()
    check_new_files(tmp_path, ["b.onnx"])
    with pytest.raises(ValueError, match=r"already holds a.onnx: .*--overwrite_output_dir"):
        check_new_files(tmp_path, ["a.onnx", "b.onnx"])
    check_new_files(tmp_path, ["a.onnx", "b.onnx"], overwrite=True)
    with pytest.raises(ValueError, match="cannot be written to"):
        check_new_files(tmp_path / "a.onnx", ["b.onnx"])


class Part:
    """A stand-in for a model that saves one file."""

    def save_pretrained(self, directory):
        (directory / "model.safetensors").write_bytes(b"best")


@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors.index.json"])
def test_files_of_another_kind_of_model_are_refused_where_others_are_replaced(name, tmp_path):
    """For example, transformers would load the adapter into the new model."""
    for file in (name, "config.json"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(
        ValueError, match=rf"another model \({name}\), which would be loaded together with the new one: .*move"
    ):
        check_output_dir(tmp_path, overwrite=True)


def test_files_of_another_tokenizer_are_refused_before_the_training(tmp_path):
    tokenizer = build_tokenizer("char", [LETTERS])
    changes = {"resume_from_checkpoint": None, "overwrite_output_dir": True, "max_train_steps": 1}
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    (tmp_path / "added_tokens.json").write_text('{"<theirs>": 77}')
    with pytest.raises(SetupError, match=r"another model \(added_tokens.json, chat_template.jinja\)"):
        train_counting(tmp_path, tokenizer=tokenizer, checkpointing_steps=None, **changes)
    (tmp_path / "added_tokens.json").unlink()
    tokenizer.chat_template = "{{ 2 }}"  # saving it replaces the other template
    train_counting(tmp_path, tokenizer=tokenizer, checkpointing_steps=None, **changes)
    assert type(tokenizer).from_pretrained(tmp_path).chat_template == "{{ 2 }}"


def arguments(output_dir, **changes):
    return TrainArguments(output_dir=str(output_dir), mixed_precision="no", use_cpu=True, **changes)


def start_and_wait(channel, output_dir):
    """Start a run, and end it when told to, so that no file remains."""
    start(arguments(output_dir))
    channel.send(True)
    channel.recv()
    atexit._run_exitfuncs()  # as at the end of a script; multiprocessing skips these functions


@pytest.mark.parametrize("killed", [True, False])
def test_a_directory_that_another_run_writes_to_is_refused(killed, tmp_path):
    ours, theirs = SERVER.Pipe()
    child = process(start_and_wait, theirs, tmp_path / "a" / "run")
    assert ours.recv()
    for changes in ({}, {"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
        with pytest.raises(ValueError, match=r"another run is writing to output_dir .*run: wait until it ends"):
            start(arguments(tmp_path / "a" / "run", **changes))
    if killed:
        child.kill()
    else:
        ours.send(True)
    child.join()
    assert killed or not list(tmp_path.iterdir())
    start(arguments(tmp_path / "a" / "run"))
    checkpoints.unlock_output_dir(tmp_path / "a" / "run")
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_does_not_give_up_its_parents_directory(tmp_path):
    start(arguments(tmp_path))
    child = os.fork()
    if child == 0:
        try:
            checkpoints.lock_output_dir(tmp_path)
        except ValueError:
            checkpoints.unlock_all()
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert (tmp_path / checkpoints.LOCK_FILE).exists()
    checkpoints.unlock_output_dir(tmp_path)


def test_runs_of_one_process_follow_each_other_in_one_directory(tmp_path, monkeypatch):
    for _ in range(2):  # the first run goes no further than this
        start(arguments(tmp_path))
    with pytest.raises(SetupError, match="the training set has no examples"):
        train(None, [], [], arguments(tmp_path), None)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(loop, "lock_output_dir", lambda path: write_json(path + "/metrics.json", {}))
    with pytest.raises(ValueError, match="holds another run"):  # one that ended just before
        start(arguments(tmp_path))


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_takes_a_run(number, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(checkpoints.fcntl, "lockf", refuse)
    checkpoints.lock_output_dir(tmp_path)
    checkpoints.unlock_output_dir(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """A run that ends may remove the file after this run has opened it and before it has locked it."""
    lock, path = checkpoints.fcntl.lockf, tmp_path / checkpoints.LOCK_FILE

    def remove_once(*args):
        monkeypatch.setattr(checkpoints.fcntl, "lockf", lock)
        path.unlink()
        lock(*args)

    monkeypatch.setattr(checkpoints.fcntl, "lockf", remove_once)
    checkpoints.lock_output_dir(tmp_path)
    assert path.exists()
    checkpoints.unlock_output_dir(tmp_path)


def checkpoint(directory, step=2, best=None, limit=None, part=None, **tensors):
    """Write a small checkpoint; `best` is the step of the best weights so far."""
    return write_checkpoint(directory, step, (part,), tensors, {"best": best and {"step": best}}, limit)


def test_going_on_elsewhere_replaces_nothing_there(tmp_path):
    resume = checkpoint(tmp_path / "run", 4)
    check_output_dir(tmp_path / "new", resume=resume)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds another run \(config.json\)"):
        check_output_dir(tmp_path / "other", resume=resume)
    checkpoint(tmp_path / "older", 2)
    with pytest.raises(ValueError, match=r"older holds checkpoint-2, which would be mistaken"):
        check_output_dir(tmp_path / "older", resume=resume)


def test_any_file_that_a_run_writes_may_be_replaced_if_the_user_allows_it(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"a run would overwrite \(README.md\)"):
        check_output_dir(tmp_path)
    check_output_dir(tmp_path, overwrite=True)


def test_a_run_without_a_checkpoint_yet_starts_again_however_it_is_called(tmp_path):
    before = {"seed": 1, "resume_from_checkpoint": None, "overwrite_output_dir": True, "hub_model_id": "me/it"}
    write_json(tmp_path / "metrics.json", {"arguments": before})
    now = {"seed": 1, "resume_from_checkpoint": "latest", "overwrite_output_dir": False, "hub_model_id": None}
    check_output_dir(tmp_path, resume="latest", arguments=now)
    for resume, arguments in ((None, before), ("latest", now | {"seed": 2})):
        with pytest.raises(ValueError, match="holds another run"):
            check_output_dir(tmp_path, resume=resume, arguments=arguments)


def test_a_checkpoint_of_weights_alone_is_of_another_program(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "model.safetensors").write_bytes(b"theirs")
    with pytest.raises(ValueError, match="holds checkpoint-7, which this script did not write"):
        check_output_dir(tmp_path, resume="latest", overwrite=True)
    checkpoint(tmp_path, 8, limit=1)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-7", "checkpoint-8"]


# ---- single files ----


def test_a_directory_with_a_longer_name_is_no_checkpoint(tmp_path):
    checkpoint(tmp_path, 30)
    shutil.copytree(tmp_path / "checkpoint-30", tmp_path / "checkpoint-30-old")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-30"]


def test_damage_anywhere_in_a_large_file_is_recognised(tmp_path):
    path = checkpoint(tmp_path, a=torch.zeros(10**6)) / checkpoints.TENSORS_FILE
    content = bytearray(path.read_bytes())
    content[2 * 10**6] ^= 1
    path.write_bytes(content)
    assert damage(path.parent) == "training_state.pt is damaged: it differs from what was written"


def test_only_weights_that_are_not_the_checkpoints_own_lie_beside_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"best")
    assert not (checkpoint(tmp_path, 2, best=2) / "best").exists()
    assert (checkpoint(tmp_path, 3, best=2) / "best" / "model.safetensors").read_bytes() == b"best"


def test_a_file_system_without_links_takes_copies(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "model.safetensors").write_bytes(b"best")
    path = checkpoint(tmp_path, 3, best=2)
    restore_best(path, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "model.safetensors").read_bytes() == b"best"


def test_a_checkpoint_may_have_any_name(tmp_path):
    path = checkpoint(tmp_path, 2, best=2, part=Part()).rename(tmp_path / "best")  # its own weights are the best
    restore_best(path, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "model.safetensors").read_bytes() == b"best"


def test_only_the_files_that_a_checkpoint_lists_come_back(tmp_path):
    """Other files in its directory are the user's or a stranger's."""
    path = checkpoint(tmp_path / "run", 2, best=2, part=Part())
    (path / "notes.txt").write_text("old")
    (path / "passwords.txt").symlink_to("/etc/passwd")
    (tmp_path / "run" / "notes.txt").write_text("new")
    restore_best(path, tmp_path / "run")
    names = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert names == ["checkpoint-2", "model.safetensors", "notes.txt"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "new"


@pytest.mark.parametrize(
    "name", ["{absolute}", "../secret.json", "best/../../secret.json", "link.json", "folder/secret.json"]
)
def test_a_checkpoint_that_lists_files_elsewhere_is_refused(name, tmp_path):
    path = checkpoint(tmp_path, 2, best=1)
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (path / "link.json").symlink_to(secret)
    (path / "folder").symlink_to(tmp_path)
    state = json.loads((path / STATE_FILE).read_text())
    state["files"][name.format(absolute=secret)] = checkpoints._fingerprint(secret)
    (path / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"checkpoint-2 is not a complete checkpoint: .*json lies outside it"):
        find_checkpoint(path, tmp_path)


def test_the_checkpoint_that_was_just_written_stays(tmp_path):
    """Checkpoints of later steps may be there if they are damaged."""
    for step in (4, 6):
        (checkpoint(tmp_path, step) / checkpoints.TENSORS_FILE).write_bytes(b"half")
    assert checkpoint(tmp_path, 3, limit=1).is_dir()


def test_restored_weights_leave_nothing_half_written_and_no_checkpoint_changed(run):
    """Also after a restore that was killed: its temporary file is a hard link to a checkpoint's weights."""
    os.link(run / "checkpoint-18" / "model.safetensors", run / ".incomplete-model.safetensors")
    for _ in range(2):
        restore_best(run / "checkpoint-20", run)
        assert not list(run.glob(".*"))
        assert [damage(path) for path in checkpoints_in(run)] == [None, None]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / ".incomplete-checkpoint-2" / "best").mkdir(parents=True)
    (tmp_path / ".incomplete-checkpoint-1-old").mkdir()
    for name in ("metrics.json", "model-00001-of-00002.safetensors", "tokenizer.json", "README.md"):
        (tmp_path / f".incomplete-{name}").touch()
    (tmp_path / ".mine").touch()
    (tmp_path / ".incomplete-downloads").mkdir()
    checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".incomplete-downloads", ".mine", "checkpoint-2"]

    (tmp_path / ".incomplete").mkdir()
    (tmp_path / ".incomplete" / "old.safetensors").touch()
    save_pretrained(tmp_path, Part())
    assert not (tmp_path / "old.safetensors").exists()
    assert not (tmp_path / ".incomplete").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_checkpoint_that_was_moved_to_another_disk_stays_there(there, tmp_path):
    """The symlink left in its place is removed as the checkpoint would have been."""
    (tmp_path / "disk").mkdir()
    moved = checkpoint(tmp_path / "run", 1).rename(tmp_path / "disk" / "checkpoint-1")
    for name in ("checkpoint-1", ".incomplete-checkpoint-0-old", ".incomplete"):
        (tmp_path / "run" / name).symlink_to(moved)
    checkpoint(tmp_path / "run", 2, limit=1)
    save_pretrained(tmp_path / "run", None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    assert damage(moved) is None
    target = moved if there else tmp_path / "gone"
    (tmp_path / "run" / "checkpoint-3").symlink_to(target)
    assert not checkpoint(tmp_path / "run", 3).is_symlink()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o007, 0o660)])
def test_every_file_may_be_read_as_the_umask_says(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        config = MinGRUConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)
        parts = (MinGRUForCausalLM(config), build_tokenizer("char", [LETTERS]))
        save_pretrained(tmp_path / "run", *parts)
        write_checkpoint(tmp_path / "run", 1, parts, {}, {"best": None})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in contents(tmp_path / "run")} == {mode}


@pytest.mark.parametrize("error", [SafetensorError("No space left"), RuntimeError("file write failed")])
def test_errors_of_the_libraries_that_write_say_what_to_do_too(error, tmp_path):
    class Part:
        def save_pretrained(self, directory):
            raise error

    with pytest.raises(OSError, match=r"could not be written \(.* bytes free there\): .*Free some space"):
        write_checkpoint(tmp_path, 2, (Part(),), {}, {"best": None})
    assert not list(tmp_path.iterdir())


class Trap:
    """An object whose pickle would create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_checkpoint_runs_code(tmp_path):
    path = checkpoint(tmp_path, trap=Trap(tmp_path / "ran"))
    with pytest.raises(Exception, match="Weights only load failed"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs the names of open files")
def test_what_is_renamed_is_on_the_disk_first(tmp_path, monkeypatch):
    """After a power cut, no file name may exist without its content."""
    synced, renamed = set(), []
    sync, replace, rename = os.fsync, os.replace, os.rename

    def note(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def watch(move):
        def run(source, target, **kwargs):
            inside = [Path(source), *(Path(source).rglob("*") if Path(source).is_dir() else ())]
            renamed.append((Path(target).name, {str(file) for file in inside} <= synced))
            move(source, target, **kwargs)

        return run

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", watch(replace))
    monkeypatch.setattr(os, "rename", watch(rename))
    write_json(tmp_path / "metrics.json", {})
    save_pretrained(tmp_path, MinGRUConfig())
    checkpoint(tmp_path, a=torch.zeros(2))
    assert {"metrics.json", "config.json", "checkpoint-2"} <= {name for name, _ in renamed}
    assert all(is_synced for _, is_synced in renamed)
    assert str(tmp_path) in synced  # the directory with the new names too


def test_directories_that_cannot_be_flushed(tmp_path, monkeypatch):
    """On some network file systems a flush gives EINVAL for directories only; every other failure is an error."""

    def fail(number, is_kind):
        def flush(descriptor):
            if is_kind(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", flush)

    fail(errno.EINVAL, stat.S_ISDIR)
    assert checkpoint(tmp_path, a=torch.zeros(2)).is_dir()
    for kind in ((errno.EIO, stat.S_ISDIR), (errno.EINVAL, stat.S_ISREG)):
        fail(*kind)
        with pytest.raises(OSError, match="could not be written"):
            checkpoint(tmp_path, a=torch.zeros(2))


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_they_were_after_a_save(shown):
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        with no_progress_bars():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


# ---- what else a run goes on with ----


def test_a_run_does_not_go_on_with_more_or_fewer_examples(run):
    rows = [{"input_ids": torch.arange(10) % 7 + 2}] * 21
    with pytest.raises(SetupError, match="belongs to a run with training examples 20, not 21"):
        train_counting(run, rows)
    with pytest.raises(SetupError, match=r"processes; changed: learning_rate .* -> 0.5"):  # other changes are named
        train_counting(run, rows, learning_rate=0.5)


def test_a_run_with_settings_starts_again_before_its_first_checkpoint(tmp_path):
    whole = train_counting(tmp_path / "run", settings=[Task()], max_train_steps=2, checkpointing_steps=None)
    del whole["final"]
    write_json(tmp_path / "run" / "metrics.json", whole)
    with pytest.raises(ValueError, match="holds another run"):
        train_counting(tmp_path / "run", settings=[Task(noise=4)], max_train_steps=2, checkpointing_steps=None)
    again = train_counting(tmp_path / "run", settings=[Task()], max_train_steps=2, checkpointing_steps=None)
    assert again["step"] == 2


class Noisy(torch.utils.data.Dataset):
    """Rows that count up from a start drawn by Python's and NumPy's generators at each access."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        start = index + random.randrange(3) + np.random.randint(3)
        return {"input_ids": (start + torch.arange(10)) % 7 + 2}


def test_the_generators_of_python_and_numpy_go_on_too(tmp_path):
    options = {"max_train_steps": 8, "checkpoints_total_limit": 0, "logging_steps": 1}
    train_counting(tmp_path / "whole", Noisy(), **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    train_counting(tmp_path / "run", Noisy(), **options)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_the_training_loss_so_far_is_the_mean_over_the_processes_whatever_their_number_is_now(run, tmp_path):
    state, tensors = read_checkpoint(run / "checkpoint-18")
    other = {**tensors["processes"][0], "loss_sum": tensors["processes"][0]["loss_sum"] + 40}
    tensors["processes"].append(other)
    path = write_checkpoint(
        tmp_path / "two", 18, (AutoModelForCausalLM.from_pretrained(run / "checkpoint-18"),), tensors, state, None
    )
    for file in (run / "checkpoint-18").glob("*token*"):
        shutil.copy(file, path)
    result = train_counting(tmp_path / "on", resume_from_checkpoint=str(path))
    before = json.loads((run / "metrics.json").read_text())
    first, last = ([r["loss"] for r in each["history"] if "loss" in r][-1] for each in (before, result))
    assert last == pytest.approx(first + 20 / 4, abs=0.5)  # dropout draws differ


def test_a_file_that_could_not_be_written_to_its_end_is_as_it_was(tmp_path):
    def write_half(path):
        path.write_text("half")
        raise OSError("disk full")

    (tmp_path / "metrics.json").write_text("whole")
    with pytest.raises(OSError, match="disk full"):
        checkpoints.write_whole(tmp_path / "metrics.json", write_half)
    assert (tmp_path / "metrics.json").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_a_checkpoint_whose_list_of_files_was_cut_short_does_not_stop_the_run(run):
    path = run / "checkpoint-20" / "trainer_state.json"
    path.write_text(path.read_text()[:50])
    check_output_dir(run, resume="latest")  # does not warn yet: the run itself does, once
    with pytest.warns(UserWarning, match=r"checkpoint-20 .* is not valid JSON\): resuming from the one before"):
        assert find_checkpoint("latest", run) == run / "checkpoint-18"


@pytest.mark.parametrize(
    "metrics", ["{ half", '{"arguments": {"seed": 1}}', '{"arguments": {"seed": 0}, "final": {}}']
)
def test_only_an_interrupted_run_of_the_same_arguments_begins_again(metrics, tmp_path):
    (tmp_path / "metrics.json").write_text(metrics)
    with pytest.raises(ValueError, match=r"holds another run \(metrics.json\)"):
        check_output_dir(tmp_path, resume="latest", arguments={"seed": 0})
    (tmp_path / "metrics.json").write_text('{"arguments": {"seed": 0}}')
    check_output_dir(tmp_path, resume="latest", arguments={"seed": 0})
    # A run derives add_eos from its text.
    (tmp_path / "metrics.json").write_text('{"arguments": {"seed": 0, "add_eos": true}}')
    check_output_dir(tmp_path, resume="latest", arguments={"seed": 0})


def test_a_tokenizer_with_several_chat_templates_is_saved_whole(tmp_path):
    """The templates are in a separate folder."""
    tokenizer = build_tokenizer("char", [LETTERS])
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool": "{{ 2 }}"}
    for _ in range(2):
        save_pretrained(tmp_path, tokenizer)
    checkpoint = write_checkpoint(tmp_path, 1, (tokenizer,), {}, {"best": None})
    restore_best(checkpoint, tmp_path / "elsewhere")  # as a run that resumes there does first
    for directory in (tmp_path, checkpoint, tmp_path / "elsewhere"):
        assert type(tokenizer).from_pretrained(directory).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("metrics", ["[]", "3", '{"arguments": null}'])
def test_metrics_of_another_program_are_no_run_to_go_on_with(metrics, tmp_path):
    (tmp_path / "metrics.json").write_text(metrics)
    with pytest.raises(ValueError, match=r"holds another run \(metrics.json\)"):
        check_output_dir(tmp_path, resume="latest", arguments={"seed": 0})


def test_a_checkpoint_that_lists_no_file_is_not_complete(run):
    path = run / "checkpoint-20" / STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))
    assert damage(path.parent) == "trainer_state.json does not list training_state.pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"progress": {"step": 20, "mood": 1, "luck": 2}}, "holds luck, mood in its progress, which this version"),
        ({"run": None, "arguments": []}, "lacks run, arguments: resume from another"),
    ],
)
def test_a_state_of_another_version_is_an_error_that_names_the_file(change, message, run):
    path = run / "checkpoint-20" / STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SetupError, match=rf"checkpoint-20/trainer_state.json {message}"):
        train_counting(run)


@pytest.mark.parametrize("state", ["[]", "3", '{"files": []}', '{"files": null}'])
def test_a_state_of_any_other_form_is_another_programs(state, tmp_path):
    (tmp_path / "trainer_state.json").write_text(state)
    assert "another program wrote it" in damage(tmp_path)
