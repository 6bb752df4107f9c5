"""Any shapes, masks and cuts give the reference's numbers; damaged files and wrong inputs give a clear error."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, ResNetConfig

from mingru_hf import (
    MinConvGRUConfig,
    MinConvGRUForVideoClassification,
    MinGRUConfig,
    MinGRUForCausalLM,
    mingru_scan,
)
from mingru_hf.loading import _holds_nan
from mingru_hf.scan_numba import NUMBA_AVAILABLE
from mingru_hf.scan_reference import scan_reference
from mingru_hf.training.checkpoints import save_pretrained

hypothesis = pytest.importorskip("hypothesis", reason="the property tests are written with hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# The same examples in every run, and no deadline: other jobs share the machine.
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
BACKENDS = ["torch", *(["numba"] if NUMBA_AVAILABLE else [])]
# For values of about 1: float32 and float64 sums differ in their order, bfloat16 rounds inputs and outputs.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


@st.composite
def scan_inputs(draw):
    """Draw pre-activations, state, mask and reset of any small shape, scale and dtype, and a position to cut at."""
    batch, steps, channels = draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 9))
    trailing = draw(st.sampled_from([(), (2,), (2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    x = torch.randn((batch, steps, 2 * channels, *trailing), generator=generator, dtype=torch.float64)
    x = (x * draw(st.sampled_from([0.1, 1.0, 30.0]))).to(dtype)
    h0 = torch.rand((batch, 1, channels, *trailing), generator=generator).to(dtype) if draw(st.booleans()) else None

    def flags(likely):
        return torch.rand((batch, steps), generator=generator) < likely if draw(st.booleans()) else None

    return x, h0, flags(0.7), flags(0.2), draw(st.integers(0, steps))


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(inputs=scan_inputs())
def test_scan_equals_the_reference_and_any_cut_of_itself(backend, inputs):
    x, h0, mask, reset, cut = inputs
    states = mingru_scan(x, h0, mask, reset, backend=backend)
    double = [None if tensor is None else tensor.double() for tensor in (x, h0)]
    expected = scan_reference(*double, mask, reset)
    scale = expected.abs().amax().clamp(min=1).item()
    torch.testing.assert_close(states.double(), expected, rtol=0, atol=TOLERANCE[x.dtype] * scale)
    if 0 < cut < x.shape[1]:
        parts = [slice(0, cut), slice(cut, None)]
        first, second = ([flags if flags is None else flags[:, part] for flags in (mask, reset)] for part in parts)
        before = mingru_scan(x[:, :cut], h0, *first, backend=backend)
        after = mingru_scan(x[:, cut:], before[:, -1:], *second, backend=backend)
        torch.testing.assert_close(torch.cat([before, after], 1), states, rtol=0, atol=TOLERANCE[x.dtype] * scale)


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(inputs=scan_inputs())
def test_gradients_of_the_scan_equal_those_of_the_reference(backend, inputs):
    x, h0, mask, reset, _ = inputs
    leaves = [x.double().requires_grad_(), (torch.full_like(x[:, :1, ::2], 0.5) if h0 is None else h0).double()]
    leaves[1].requires_grad_()
    weights = torch.linspace(-1, 1, leaves[1].numel() * x.shape[1], dtype=torch.float64)
    weights = weights.reshape(x.shape[0], x.shape[1], *leaves[1].shape[2:])
    results = []
    for run in (
        lambda: mingru_scan(*leaves, mask, reset, backend=backend),
        lambda: scan_reference(*leaves, mask, reset),
    ):
        results.append(torch.autograd.grad((run() * weights).sum(), leaves))
    for gradient, expected in zip(*results, strict=True):
        scale = expected.abs().amax().clamp(min=1).item()
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10 * scale)


MODELS = {
    "paper": {"hidden_size": 12, "num_hidden_layers": 2, "conv_kernel": 4},
    "stack": {"hidden_size": 8, "hidden_sizes": [10, 12], "conv_kernel": 0, "expand": 1, "use_mlp": False},
}


@pytest.fixture(scope="module", params=MODELS)
def any_model(request):
    torch.manual_seed(0)
    return MinGRUForCausalLM(MinGRUConfig(vocab_size=20, initializer_range=0.3, **MODELS[request.param])).eval()


@st.composite
def batches(draw):
    """Draw rows of documents: ids, a mask with padding anywhere, starts of documents, and column cuts."""
    batch, steps = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(0, 20, (batch, steps), generator=generator)
    mask = torch.rand((batch, steps), generator=generator) < 0.8
    mask[:, draw(st.integers(0, steps - 1))] = True  # no row is empty
    starts = (torch.rand((batch, steps), generator=generator) < 0.2) & mask
    cuts = sorted(draw(st.sets(st.integers(1, steps), max_size=4)) | {steps})
    return ids, mask, starts, cuts


@quick
@given(batch=batches())
@torch.no_grad()
def test_padded_packed_and_cut_rows_equal_each_document_alone(any_model, batch):
    ids, mask, starts, cuts = batch
    positions = torch.where(starts, 0, 7)  # only a 0 has a meaning: a document starts
    whole = any_model(ids, attention_mask=mask.long(), position_ids=positions).logits
    cache, parts, begin = DynamicCache(config=any_model.config), [], 0
    for end in cuts:
        columns = slice(begin, end)
        output = any_model(
            ids[:, columns], attention_mask=mask[:, :end].long(), position_ids=positions[:, columns], cache=cache
        )
        parts.append(output.logits)
        begin = end
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], rtol=1e-4, atol=1e-4)
    for row in range(len(ids)):
        real = mask[row].nonzero().flatten().tolist()
        documents = [[]]
        for column in real:
            if starts[row, column] and documents[-1]:
                documents.append([])
            documents[-1].append(column)
        for columns in documents:
            alone = any_model(ids[row, columns][None]).logits[0]
            torch.testing.assert_close(whole[row, columns], alone, rtol=1e-4, atol=1e-4)


# --- Damaged and foreign files


@pytest.fixture
def directory(tmp_path):
    MinGRUForCausalLM(MinGRUConfig(vocab_size=20, **MODELS["paper"])).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("content", ["", '{"model_type": "mingru", "hidden'])
def test_a_damaged_configuration_is_named(directory, content):
    (directory / "config.json").write_text(content)
    with pytest.raises(OSError, match=r"config\.json"):
        MinGRUForCausalLM.from_pretrained(directory)


def test_missing_weights_are_named(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_vocabulary_of_another_size_is_refused(directory, caplog):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 30}))
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(directory)
    assert "model.embed_tokens.weight | MISMATCH" in caplog.text


def test_a_tokenizer_of_another_model_is_noticed(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(ValueError, match="between 0 and 19, got 3 to 25"):
        model(torch.tensor([[3, 25]]))


def test_another_kind_of_model_is_refused(directory, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="'gpt2' model, not of a 'mingru'"):
        MinGRUForCausalLM.from_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="'mingru' model, not of a 'minconvgru'"):
        MinConvGRUForVideoClassification.from_pretrained(directory)


class Trap:
    """An object whose pickle would create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_code_never_runs(directory, tmp_path):
    (directory / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap(tmp_path / "ran")}, directory / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(directory)
    assert not (tmp_path / "ran").exists()


def test_loading_and_running_write_nothing_into_the_directory(directory):
    """The directory may be read-only or in use. Root can write to it anyway, so modification times are compared."""
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    for path in (*directory.iterdir(), directory):
        path.chmod(0o555 if path.is_dir() else 0o444)
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=3)
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    directory.chmod(0o755)


def test_nan_in_the_weights_is_named_at_load(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mixer.gate_hidden.weight"][3, 2] = torch.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"contain NaN.*: model\.layers\.1\.mixer\.gate_hidden\.weight\.$"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("values", [[], [1.0], [5e4] * 9, [torch.inf], [torch.inf, -torch.inf]])
def test_nan_is_told_from_infinity(dtype, values):
    assert not _holds_nan(torch.tensor(values).to(dtype))
    assert _holds_nan(torch.tensor([*values, torch.nan, 2.0]).to(dtype))


def test_weights_without_nan_are_only_summed_at_load(directory, monkeypatch):
    """Checking value by value for NaN took five sixths of the time to load a large model."""
    isnan, sizes = torch.Tensor.isnan, []
    monkeypatch.setattr(torch.Tensor, "isnan", lambda tensor: sizes.append(tensor.numel()) or isnan(tensor))
    AutoModelForCausalLM.from_pretrained(directory)
    assert set(sizes) == {1}


def test_nan_in_the_weights_of_a_video_model_is_named_at_load(tmp_path):
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", out_features=["stage1"]
    )
    model = MinConvGRUForVideoClassification(MinConvGRUConfig(backbone_config=backbone, num_labels=2))
    torch.nn.init.constant_(model.classifiers[0].bias, torch.nan)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"contain NaN.*: classifiers\.0\.bias"):
        MinConvGRUForVideoClassification.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_old_model_whole(directory, monkeypatch):
    shutil.copytree(directory, directory.parent / "before")
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(directory, MinGRUForCausalLM(MinGRUConfig(vocab_size=30, **MODELS["paper"])))
    for path in (directory.parent / "before").iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes()
