import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch

from mingru_hf import MinGRUConfig, MinGRUForCausalLM

NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if NUM_WORKERS > 1:  # the workers and the processes that they start share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // NUM_WORKERS))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton_interpreter import combine_rows_at_once

    combine_rows_at_once()

# Two variants of the text model that together use every part: the paper's block, and torch-mingru's stack.
MODEL_KINDS = {
    "paper": {"hidden_size": 32, "num_hidden_layers": 3, "conv_kernel": 4, "expand": 2},
    "stack": {"hidden_size": 16, "hidden_sizes": [24, 24, 32], "conv_kernel": 0, "expand": 1, "use_mlp": False},
}


@pytest.fixture(autouse=True)
def _same_start():
    """Start each test with the same random numbers, and with nothing compiled that counts towards dynamo's limit."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # importing it takes a second
        torch.compiler.reset()


@pytest.fixture(params=MODEL_KINDS)
def model(request):
    """A tiny causal language model with weights large enough that its outputs vary from token to token."""
    config = MinGRUConfig(vocab_size=40, pad_token_id=0, initializer_range=0.3, **MODEL_KINDS[request.param])
    return MinGRUForCausalLM(config).eval()


@pytest.fixture
def input_ids():
    """(3, 12) token ids, none of them padding."""
    return torch.randint(1, 40, (3, 12))


@pytest.fixture
def scripted_layers_stand_alone(tmp_path):
    """Check that layers, once scripted and saved, give the same outputs in a process without the package."""

    def check(layers, x):
        expected = {}
        for name, layer in layers.items():
            torch.jit.script(layer.eval()).save(tmp_path / f"{name}.pt")
            expected[name] = layer(x)[0].detach()
        torch.save({"x": x, "expected": expected}, tmp_path / "expected.pt")
        code = """
import sys, torch
sys.modules["mingru_hf"] = None  # importing it would raise
data = torch.load("expected.pt")
for name, expected in data["expected"].items():
    out, h = torch.jit.load(f"{name}.pt")(data["x"])
    torch.testing.assert_close(out.detach(), expected, rtol=1e-5, atol=1e-5)
"""
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)

    return check


def pytest_collection_modifyitems(items):
    for item in items:
        if mark := item.get_closest_marker("clients"):
            item.user_properties.append(("client", mark.args[0]))
        if item.get_closest_marker("torchscript") and sys.version_info >= (3, 14):
            item.add_marker(pytest.mark.skip(reason="torch has no TorchScript from Python 3.14 on"))


def pytest_terminal_summary(terminalreporter, config):
    """With `-m clients`, print a table: client, version, outcome, test."""
    if "clients" not in config.option.markexpr:
        return
    terminalreporter.section("clients")
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            client = dict(report.user_properties).get("client", "")
            try:
                version = importlib.metadata.version(client.split()[0])
            except (importlib.metadata.PackageNotFoundError, IndexError):
                version = "-"
            terminalreporter.write_line(f"{client:<20} {version:<10} {outcome:<8} {report.nodeid.split('::')[-1]}")
