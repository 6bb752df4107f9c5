"""Direct calls of modules for a single token: the same results, and nothing attached to a module is skipped."""

import copy
import pickle
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from mingru_hf import MinGRUConfig, MinGRUForCausalLM
from mingru_hf.calling import direct_output
from mingru_hf.modeling_mingru import MinGRUBlock, MinGRUMixer
from mingru_hf.scan_numba import NUMBA_AVAILABLE

# As in test_modeling_mingru: matrix products with different numbers of rows round differently.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

KINDS = {
    "all parts": {"norm_eps": 0.05},
    "rms norms, untied, narrow": {
        "norm_type": "rms_norm",
        "hidden_sizes": [24, 40],
        "expand": 1,
        "lm_head_bias": True,
    },
    "bare": {
        "norm_type": "none",
        "use_bias": False,
        "use_out_proj": False,
        "expand": 1,
        "conv_kernel": 0,
        "use_mlp": False,
        "residual": False,
    },
    "no biases of norms": {"norm_bias": False, "final_norm_bias": False, "expand": 1, "conv_kernel": 0},
}


@torch.no_grad()
def decode(model, ids):
    """Return (B, T, V) logits, computed one token at a time."""
    cache = DynamicCache(config=model.config)
    return torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in range(ids.shape[1])], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_by_one_equal_the_whole(kind, dtype, input_ids):
    config = MinGRUConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, initializer_range=0.3, **KINDS[kind])
    model = MinGRUForCausalLM(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases, which start at 0, and norms
                parameter += 0.2 * torch.randn_like(parameter)
    whole = model(input_ids).logits
    assert whole.std() > 0.3
    tolerance = {"rtol": 2e-2, "atol": 2e-2 * whole.abs().max().item()} if dtype == torch.bfloat16 else CLOSE
    torch.testing.assert_close(decode(model, input_ids), whole, **tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = decode(model, input_ids)
    if dtype == torch.float32:
        torch.testing.assert_close(in_autocast.float(), whole, rtol=2e-2, atol=3e-2 * whole.abs().max().item())


def test_weights_are_looked_for_where_a_wrapper_has_put_them(input_ids):
    """FSDP replaces parameters by plain tensors, which are views of its own memory."""
    for options in ({}, {"norm_type": "rms_norm"}):
        model = MinGRUForCausalLM(MinGRUConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, **options)).eval()
        expected = decode(model, input_ids)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)):
                weight = module.weight.detach()
                del module.weight
                module.weight = weight
        torch.testing.assert_close(decode(model, input_ids), expected, **CLOSE)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_a_bias_that_is_no_parameter(model, input_ids, kind):
    expected = decode(model, input_ids)
    for module in model.modules():
        if isinstance(module, kind) and module.bias is not None:
            bias = module.bias.detach()
            del module.bias
            module.register_buffer("bias", bias)
    torch.testing.assert_close(decode(model, input_ids), expected, **CLOSE)
    torch.testing.assert_close(model(input_ids).logits, expected, **CLOSE)


def test_embeddings_of_bounded_length(model, input_ids):
    model.model.embed_tokens.max_norm = 0.5
    token_by_token = decode(copy.deepcopy(model), input_ids)
    torch.testing.assert_close(token_by_token, model(input_ids).logits, **CLOSE)


def test_every_hook_sees_every_token(model, input_ids):
    expected, calls = decode(model, input_ids), []
    names = [name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)]
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *args, name=name: calls.append((name, "before")))
        module.register_forward_hook(lambda *args, name=name: calls.append((name, "after")))
    torch.testing.assert_close(decode(model, input_ids), expected, **CLOSE)
    twice = "branch_dropout" if model.config.use_mlp else None  # for the recurrence and for the MLP
    times = {name: 24 if name.split(".")[-1] == twice else 12 for name in names}
    assert Counter(calls) == {(name, when): times[name] for name in names for when in ("before", "after")}


def test_a_hook_on_all_modules_sees_every_token(model, input_ids):
    expected, seen = decode(model, input_ids), []
    with register_module_forward_hook(lambda module, args, output: seen.append(type(module))):
        torch.testing.assert_close(decode(model, input_ids), expected, **CLOSE)
        tokens, seen[:] = list(seen), []
        model(input_ids)
    for kind in (nn.LayerNorm, nn.Linear):
        count = sum(isinstance(module, kind) for module in model.modules())
        assert (tokens.count(kind), seen.count(kind)) == (12 * count, count)


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.1.mixer.gate_hidden", "lm_head", "model.norm", "model.embed_tokens"),
        *("model.embedding_dropout", "model.layers.0.branch_dropout", "model.layers.1.block_dropout"),
    ],
)
@pytest.mark.parametrize("change", ["another class", "a hook", "a hook before", "a forward of its own", "compiled"])
def test_what_is_put_on_a_module_takes_effect(model, input_ids, name, change):
    """Adapters, quantisation and offloading do this; it applies in decoding, in a full pass and in training."""
    original = copy.deepcopy(model)
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])

    def louder(*args):
        return 2 * type(module).forward(module, *args)

    if change == "another class":
        wrapper = nn.Sequential(module, nn.Linear(1, 1))  # stands for any class that torch does not know
        wrapper.forward = louder
        setattr(parent, name.rpartition(".")[2], wrapper)
    elif change == "a hook":
        module.register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "a hook before":
        module.register_forward_pre_hook(lambda module, args: args[0].clamp(1, 20))  # ids stay valid
    elif change == "a forward of its own":
        module.forward = louder
    else:
        module._compiled_call_impl = louder  # as module.compile() sets it
    with torch.no_grad():
        whole, before = model(input_ids).logits, original(input_ids).logits
    assert (whole - before).abs().max() > 0.1
    torch.testing.assert_close(decode(model, input_ids), whole, **CLOSE)
    torch.testing.assert_close(model(input_ids).logits, whole, **CLOSE)


@pytest.mark.parametrize("owner", [nn.LayerNorm, nn.Linear, nn.Embedding, MinGRUMixer, MinGRUBlock])
def test_a_patch_on_a_class_takes_effect(model, input_ids, owner, monkeypatch):
    """Libraries patch classes to install faster or quantised versions."""
    original, calls = owner.forward, []
    monkeypatch.setattr(owner, "forward", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    decode(model, input_ids)
    for_each_token, calls[:] = len(calls) / 12, []
    model(input_ids)
    assert for_each_token == len(calls) == sum(isinstance(module, owner) for module in model.modules())


@pytest.mark.parametrize("name", ["linear", "layer_norm"])
def test_a_patch_on_a_function_takes_effect(model, input_ids, name, monkeypatch):
    """Programs that emulate other number formats patch functions."""
    original, calls = getattr(F, name), []
    monkeypatch.setattr(F, name, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    decode(model, input_ids)
    for_each_token, calls[:] = len(calls) / 12, []
    with torch.no_grad():
        model(input_ids)
    kind = {"linear": nn.Linear, "layer_norm": nn.LayerNorm}[name]
    assert for_each_token == len(calls) == sum(isinstance(module, kind) for module in model.modules())


def test_a_patch_from_before_the_import_takes_effect():
    program = """
from torch import nn
original, calls = nn.Linear.forward, []
nn.Linear.forward = lambda *args: calls.append(1) or original(*args)
import torch
from mingru_hf import MinGRU
rnn = MinGRU(256, [256, 256])
with torch.no_grad():
    rnn(torch.randn(2, 1, 256))
rnn(torch.randn(2, 9, 256))
assert len(calls) == 4, calls
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_subclass_of_the_body_is_called(model, input_ids):
    calls = []

    class Body(type(model.model)):
        def forward(self, *args, **kwargs):
            calls.append(1)
            return super().forward(*args, **kwargs)

    model.model.__class__ = Body
    decode(model, input_ids)
    assert len(calls) == 12


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_matter(model, input_ids, device):
    expected = decode(model, input_ids)
    with torch.device(device):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            steps = [model(token, cache=cache).logits for token in input_ids.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=0)


def test_parameters_keep_their_order():
    """Optimizers save their state by parameter index: another order would break resumed runs."""
    config = MinGRUConfig(vocab_size=8, hidden_size=8, hidden_sizes=[8, 12], num_hidden_layers=2)
    names = [name for name, _ in MinGRUForCausalLM(config).named_parameters()]
    linears = ["mixer.gate_hidden", "mixer.out_proj", "res_align", "mlp_norm", "mlp.up_proj", "mlp.down_proj"]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    assert modules == [
        "model.embed_tokens",
        *(f"model.layers.0.{name}" for name in ("conv.conv", "norm", *linears) if name != "res_align"),
        *(f"model.layers.1.{name}" for name in ("conv.conv", "norm", *linears)),
        "model.norm",
        "lm_head",
    ]


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 5])
def test_outputs_are_tuples_if_the_config_says_so(model, input_ids, steps):
    expected = model(input_ids[:, :steps], use_cache=False).logits
    model.config.return_dict = False
    (logits,) = model(input_ids[:, :steps], use_cache=False)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_gradients_meet_a_backward_hook(model, input_ids):
    mixer, seen = model.model.layers[0].mixer, []
    model(input_ids, labels=input_ids).loss.backward()
    expected = mixer.gate_hidden.weight.grad.clone()
    model.zero_grad()
    mixer.gate_hidden.register_full_backward_pre_hook(lambda module, grads: tuple(3 * grad for grad in grads))
    model(input_ids, labels=input_ids).loss.backward()
    torch.testing.assert_close(mixer.gate_hidden.weight.grad, 3 * expected, rtol=1e-4, atol=1e-6)
    other = model.model.layers[1].mixer.gate_hidden
    other.register_full_backward_hook(lambda module, inputs, outputs: seen.append(module))
    model(input_ids, labels=input_ids).loss.backward()
    model(input_ids[:, :1]).logits.sum().backward()  # a single token is no exception
    assert seen == [other, other]


def test_frozen_or_missing_biases_need_no_gradient(model, input_ids):
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.requires_grad_(False)
    model(input_ids, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


def test_transforms_and_modes_see_every_operator(model, input_ids):
    token = input_ids[:, :1]
    others = [model, copy.deepcopy(model)]
    with torch.no_grad():
        for parameter in others[1].parameters():
            parameter.mul_(0.5)
        parameters, buffers = stack_module_state(others)
        together = torch.vmap(
            lambda p, b: functional_call(model, (p, b), (token,), {"use_cache": False}).logits, randomness="error"
        )(parameters, buffers)
        for result, other in zip(together, others, strict=True):
            torch.testing.assert_close(result, other(token, use_cache=False).logits, **CLOSE)
        with FlopCounterMode(display=False) as counter:
            model(token)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert counter.get_total_flops() == 2 * len(token) * weights


@pytest.mark.parametrize("skip_logits", [False, True])
def test_gradients_of_each_row(model, input_ids, monkeypatch, skip_logits):
    """This is torch.func's usual way to compute per-sample gradients, for example for differential privacy."""
    monkeypatch.delenv("MINGRU_SCAN", raising=False)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, row):
        arguments = {"labels": row[None], "skip_logits": skip_logits}
        return functional_call(model, parameters, (row[None],), arguments).loss

    together = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, input_ids)
    for i, row in enumerate(input_ids):
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][i], parameter.grad, rtol=1e-3, atol=1e-5)


def test_gradients_of_each_row_of_unequal_lengths_and_documents(model, input_ids, monkeypatch):
    monkeypatch.delenv("MINGRU_SCAN", raising=False)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    mask = torch.ones_like(input_ids)
    mask[0, 9:] = mask[1, :3] = 0
    labels = torch.where(mask == 1, input_ids, -100)
    positions = torch.arange(12).repeat(len(input_ids), 1)
    positions[:, 5:] -= 5  # two documents a row
    positions[2, 2:5] -= 2  # and three in this one

    def loss(parameters, row, mask, labels, positions):
        arguments = {"attention_mask": mask[None], "labels": labels[None], "position_ids": positions[None]}
        return functional_call(model, parameters, (row[None],), arguments).loss

    rows = input_ids, mask, labels, positions
    together = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0))(parameters, *rows)
    for i in range(len(input_ids)):
        expected = torch.func.grad(loss)(parameters, *(tensor[i] for tensor in rows))
        model.zero_grad()
        loss(dict(model.named_parameters()), *(tensor[i] for tensor in rows)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(expected[name], parameter.grad, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(together[name][i], parameter.grad, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_an_output_made_directly_is_like_any_other(model, input_ids):
    fields = {"loss": None, "logits": torch.ones(2, 3), "cache": DynamicCache(config=model.config)}
    fields |= {"hidden_states": None, "attentions": None}
    for _ in range(2):
        output, expected = direct_output(CausalLMOutputWithPast, **fields), CausalLMOutputWithPast(**fields)
        assert type(output) is type(expected)
        assert list(output) == list(expected) == ["logits", "cache"]
        assert vars(output) == vars(expected)
        assert output[0] is output["logits"] is output.logits is fields["logits"]
        assert output.to_tuple() == expected.to_tuple()
        assert pytree.tree_structure(output) == pytree.tree_structure(expected)
        assert list(pickle.loads(pickle.dumps(output))) == list(expected)
        output["loss"] = torch.zeros(())
        assert list(output) == ["logits", "cache", "loss"]
        assert output.loss is output["loss"]
    step = model(input_ids[:, :1])
    assert list(step) == ["logits", "cache"]
    assert model(input_ids[:, :1], return_dict=False)[0] is not None


@pytest.mark.skipif(not NUMBA_AVAILABLE, reason="numba is not installed")
def test_decoding_goes_the_short_way(model, input_ids):
    """No module with parameters is called except the model itself: the speed of decoding depends on this."""
    called = []
    original = nn.Module.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Module, "__call__", lambda self, *args, **kwargs: called.append(self) or original(self, *args, **kwargs)
        )
        decode(model, input_ids)
    activation = [module for module in called if module is not model]
    assert all(not list(module.parameters()) for module in activation)
    assert called.count(model) == 12


@torch.no_grad()
def test_blocks_compiled_one_by_one_decode_the_same(model, input_ids):
    """The uncompiled model around the blocks chooses direct calls; those inside the blocks must be traceable."""
    expected = model.generate(input_ids, max_new_tokens=5, do_sample=False)
    for block in model.model.layers:
        block.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=64):  # the blocks share code, and so its limit
        assert torch.equal(model.generate(input_ids, max_new_tokens=5, do_sample=False), expected)
