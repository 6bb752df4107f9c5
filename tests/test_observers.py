"""Observers: torch's transforms, modes and hooks are detected, and a torch with other private names still works."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mingru_hf.observers import differentiates_in_transform, has_global_hooks, in_transform, is_observed

UNKNOWN = """
import torch, torch._C._functorch as functorch
{change}
from mingru_hf import MinGRU, MinGRUConfig, MinGRUForCausalLM
from mingru_hf.observers import differentiates_in_transform, has_global_hooks, in_transform, is_observed

assert (is_observed(), in_transform(), has_global_hooks(), differentiates_in_transform()) == (True, True, True, False)
torch.manual_seed(0)
config = MinGRUConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, bos_token_id=0, eos_token_id=None)
model = MinGRUForCausalLM(config)
ids = torch.randint(20, (2, 7))
model(ids, labels=ids).loss.backward()
model.eval()
out = model.generate(ids, max_new_tokens=5, do_sample=False)
assert torch.equal(out, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
"""


def test_nobody_watches():
    assert (is_observed(), in_transform(), differentiates_in_transform()) == (False, False, False)


def test_torch_func_is_noticed():
    seen = []

    def function(x):
        seen.append((is_observed(), in_transform(), differentiates_in_transform()))
        return x.sum()

    x = torch.ones(3)
    torch.func.grad(function)(x)
    torch.func.vmap(function)(x[:, None])
    torch.func.vmap(torch.func.grad(function))(x[:, None])
    assert seen == [(True, True, True), (True, True, False), (True, True, True)]


def test_forward_mode_is_noticed():
    with forward_ad.dual_level():
        assert is_observed()
        assert differentiates_in_transform()


def test_modes_are_noticed():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Mode():
        assert is_observed()
        assert not in_transform()


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_are_noticed(kind):
    assert not has_global_hooks()
    with getattr(hooks, f"register_module_{kind}_hook")(lambda *args: None):
        assert has_global_hooks()
    assert not has_global_hooks()


@pytest.mark.parametrize(
    "change",
    ["del functorch.maybe_current_level", "from torch.autograd import forward_ad; del forward_ad._current_level"],
)
def test_a_torch_with_other_names_runs_the_model(change):
    process = subprocess.run([sys.executable, "-c", UNKNOWN.format(change=change)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
