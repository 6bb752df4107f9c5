"""Third-party trainers and torch's ways to distribute a model over processes, with the text model."""

import multiprocessing
import socket
import sys

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from mingru_hf import MinGRUConfig, MinGRUForCausalLM
from mingru_hf.data.text import build_tokenizer

LETTERS = "abcdefghijklmnop"
TEXTS = [(LETTERS * 2)[i % 16 : i % 16 + 4 + i % 7] for i in range(48)]  # parts of the alphabet, from any letter on


@pytest.fixture
def tokenizer():
    return build_tokenizer("char", [LETTERS])


@pytest.fixture
def model(tokenizer):
    return MinGRUForCausalLM(
        MinGRUConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def arguments(cls, directory, **changes):
    values = {
        "output_dir": str(directory),
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return cls(**(values | changes))


def mean_loss(model, tokenizer, texts=TEXTS, ends=""):
    """Return the mean loss in nats per token over all texts, evaluated one by one."""
    losses = []
    for text in texts:
        ids = tokenizer(text + ends, return_tensors="pt").input_ids
        with torch.no_grad():
            losses.append(F.cross_entropy(model.eval()(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.clients("transformers")
@pytest.mark.parametrize("skip_logits", [False, True])
def test_trainer_with_the_collator_for_language_modeling(model, tokenizer, tmp_path, skip_logits):
    """With padding and gradient accumulation, the mean of the batches' losses is close to that of single texts."""
    model.config.skip_logits = skip_logits
    # With padding on the left, the last pad token would have to predict the first token of the text.
    tokenizer.padding_side = "right"
    rows = Dataset.from_dict({"text": TEXTS}).map(lambda row: tokenizer(row["text"]), remove_columns="text")
    trainer = Trainer(
        model,
        arguments(TrainingArguments, tmp_path, gradient_accumulation_steps=2, per_device_eval_batch_size=16),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    before = mean_loss(model, tokenizer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=0.03)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[0] == pytest.approx(before, rel=0.2)
    assert (tmp_path / "checkpoint-40" / "modeling_mingru.py").is_file()  # it can be loaded without this package
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(mean_loss(model, tokenizer), rel=0.03)
    assert after < before - 1
    logits = trainer.predict(rows.select(range(3))).predictions
    assert logits.shape == (3, max(map(len, TEXTS[:3])), len(tokenizer))


@pytest.mark.clients("transformers")
def test_trainer_learns_the_same_with_and_without_logits(tokenizer, tmp_path):
    rows = Dataset.from_dict({"text": TEXTS}).map(lambda row: tokenizer(row["text"]), remove_columns="text")
    curves = []
    for skip_logits in (False, True):
        torch.manual_seed(0)
        model = MinGRUForCausalLM(MinGRUConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1))
        model.config.skip_logits = skip_logits
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        settings = arguments(TrainingArguments, tmp_path, max_steps=10)
        trainer = Trainer(model, settings, train_dataset=rows, data_collator=collator)
        trainer.train()
        curves.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.clients("trl")
@pytest.mark.filterwarnings("default")  # TRL's own warnings
@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(model, tokenizer, tmp_path, packing):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
    rows = Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(
        model,
        arguments(trl.SFTConfig, tmp_path, packing=packing, max_length=32, bf16=False),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    before = mean_loss(model, tokenizer, ends="<|endoftext|>")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=0.03)  # a mean of the batches' means
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(mean_loss(model, tokenizer, ends="<|endoftext|>"), rel=0.03)
    assert after < before - 1


# ---- Models that several processes share ----


def join(function, rank, port, queue, *args):
    """Run `function` in one of two processes; the first one sends its result to the parent."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    result = function(rank, *args)
    if rank == 0:
        queue.put(result)
    torch.distributed.destroy_process_group()


def in_two_processes(function, *args):
    """Return the result of `function(rank, *args)` in the first of two processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mingru_hf.training.loop", "mingru_hf.data.text", "datasets"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.Queue()
    children = [context.Process(target=join, args=(function, rank, port, queue, *args)) for rank in range(2)]
    for child in children:
        child.start()
    result = queue.get(timeout=120)  # read it before joining: a long result fills the pipe
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    return result


def rows_of_ids():
    return torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(1))


def train_sharded(rank):
    """Train a whole model on all rows, and a sharded one on this process's half of the rows; return both curves."""
    ids, results = rows_of_ids(), []
    mine = ids[2 * rank : 2 * rank + 2]
    for options in ({}, {"tie_word_embeddings": True, "lm_head_bias": True}):
        for skip_logits in (False, True):
            losses = []
            for sharded in (False, True):
                torch.manual_seed(0)
                model = MinGRUForCausalLM(MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, **options))
                if sharded:
                    for block in model.model.layers:
                        fully_shard(block)
                    fully_shard(model)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
                rows = mine if sharded else ids
                for _ in range(4):
                    loss = model(rows, labels=rows, skip_logits=skip_logits).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    mean = loss.detach().clone()
                    torch.distributed.all_reduce(mean)
                    losses.append(mean.item() / 2)
            results.append((losses[:4], losses[4:]))
    return results


forks = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


@forks
def test_two_processes_that_share_a_model_equal_one():
    for whole, sharded in in_two_processes(train_sharded):
        assert sharded == pytest.approx(whole, rel=1e-5)
        assert whole[-1] < whole[0] - 0.1


def recompute_sharded(rank):
    """Return loss and gradients of a model, and of the same model under FSDP1 with recomputed activations."""
    ids, results = rows_of_ids(), []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = net = MinGRUForCausalLM(MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2)).train()
        if sharded:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            policy = ModuleWrapPolicy({type(model.model.layers[0])})
            net = FullyShardedDataParallel(
                model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
            )
        loss = net(ids, labels=ids).loss
        loss.backward()
        with FullyShardedDataParallel.summon_full_params(net, with_grads=True):
            grads = {name: p.grad.tolist() for name, p in model.named_parameters()}
        results.append((loss.item(), {name.replace("_fsdp_wrapped_module.", ""): g for name, g in grads.items()}))
    return results


@forks
@pytest.mark.filterwarnings("ignore:FSDP")
def test_activations_are_recomputed_in_the_first_fsdp():
    whole, sharded = in_two_processes(recompute_sharded)
    assert sharded[0] == pytest.approx(whole[0], rel=1e-6)
    for name, grad in whole[1].items():
        torch.testing.assert_close(torch.tensor(sharded[1][name]), torch.tensor(grad), rtol=1e-4, atol=1e-6)


def compute_in_parallel(rank, path, saved):
    """Compute a saved model's logits, losses, gradients and tokens, first whole, then split over the processes."""
    ids, results = rows_of_ids(), []
    for split in (False, True):
        shares = {"distributed_config": DistributedConfig(tp_size=2, tp_plan="auto")} if split else {}
        model = MinGRUForCausalLM.from_pretrained(path, **shares)
        with torch.no_grad():
            values = [model(ids).logits, model(ids, labels=ids, skip_logits=True).loss]
        values.append(model.generate(ids[:, :5], max_new_tokens=6, do_sample=False))
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        values += [loss.detach(), *(full(parameter.grad) for parameter in model.parameters())]
        results.append([value.tolist() for value in values])
    model.save_pretrained(saved)
    torch.distributed.barrier()
    return results, sum(isinstance(parameter, DTensor) for parameter in model.parameters())


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@forks
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "lm_head_bias": True},
        {"expand": 1, "conv_kernel": 0, "use_mlp": False, "residual": False},
        {"hidden_sizes": [16, 24], "use_bias": False},
    ],
    ids=["default", "tied", "bare", "widening"],
)
def test_tensor_parallelism_equals_one_process(tmp_path, options):
    torch.manual_seed(0)
    model = MinGRUForCausalLM(MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, **options))
    for parameter in model.parameters():  # including biases, which are split along with their matrices
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "whole")
    (whole, split), num_split = in_two_processes(compute_in_parallel, tmp_path / "whole", tmp_path / "split")
    assert num_split >= 3
    for one, two in zip(whole, split, strict=True):
        torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-4, atol=1e-5)
    saved = MinGRUForCausalLM.from_pretrained(tmp_path / "split").state_dict()
    torch.testing.assert_close(saved, model.state_dict(), rtol=0, atol=0)


def split_by_columns(rank):
    model = MinGRUForCausalLM(MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2))
    plan = {
        "model.layers.*.mixer.gate_hidden": ColwiseParallel(),
        "model.layers.*.mixer.out_proj": RowwiseParallel(),
    }
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    try:
        model(rows_of_ids())
    except ValueError as error:
        return str(error)


@forks
def test_a_split_between_gates_and_candidates_is_refused():
    assert "gate_hidden returned 32 of its 64 channels" in in_two_processes(split_by_columns)
