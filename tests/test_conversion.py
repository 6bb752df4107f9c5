"""torch-mingru's checkpoints become models with the same outputs, or raise an error that names what does not fit."""

import importlib.util
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_modeling_minconvgru import ReferenceClassifier
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from mingru_hf import MinConv2dGRU, MinGRU
from mingru_hf.conversion import convert, read_checkpoint
from mingru_hf.data.text import build_tokenizer

ROOT = Path(__file__).parent.parent
TOLERANCE = {"rtol": 0, "atol": 1e-5}


class TextExample(nn.Module):
    """torch-mingru's text example with its module names; without `ln`, its selective-copying example."""

    def __init__(self, vocab_size=31, embedding=12, hidden_sizes=(6, 8, 8, 10), final_norm=True, residual=True):
        super().__init__()
        self.emb = nn.Embedding(vocab_size, embedding)
        self.rnn = MinGRU(embedding, list(hidden_sizes), norm=True, dropout=0.15, residual=residual)
        self.ln = nn.LayerNorm(hidden_sizes[-1], bias=False) if final_norm else nn.Identity()
        self.fc = nn.Linear(hidden_sizes[-1], vocab_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out, _ = self.rnn(self.emb(ids))
        return self.fc(self.ln(out))


EXAMPLES = {
    "text": {},
    "copying": {"vocab_size": 6, "embedding": 4, "hidden_sizes": (16, 16, 16), "final_norm": False},
    "equal widths": {"embedding": 8, "hidden_sizes": (8, 8)},
    "no residual": {"embedding": 8, "hidden_sizes": (8, 8), "residual": False},
    "no residual, widths differ": {"residual": False},
}


def text_reference(state, ids, residual):
    """Compute the example's equations in float64 with a loop over time, without this package's modules."""
    state = {name: tensor.double() for name, tensor in state.items()}
    x = state["emb.weight"][ids]
    for i in range(sum(name.endswith("gate_hidden.weight") for name in state)):
        layer = {name.removeprefix(f"rnn.layers.{i}."): tensor for name, tensor in state.items()}
        normed = F.layer_norm(x, x.shape[-1:], layer["norm.weight"], layer["norm.bias"])
        gate, candidate = F.linear(normed, layer["gate_hidden.weight"], layer["gate_hidden.bias"]).chunk(2, -1)
        z, g = torch.sigmoid(gate), torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
        h, states = torch.full_like(z[:, 0], 0.5), []
        for t in range(ids.shape[1]):
            h = (1 - z[:, t]) * h + z[:, t] * g[:, t]
            states.append(h)
        out = torch.stack(states, 1)
        if residual:
            out = out + (F.linear(x, layer["res_align.weight"]) if "res_align.weight" in layer else x)
        x = out
    if "ln.weight" in state:
        x = F.layer_norm(x, x.shape[-1:], state["ln.weight"])
    return F.linear(x, state["fc.weight"], state["fc.bias"]).float()


def call(*argv):
    spec = importlib.util.spec_from_file_location("convert", ROOT / "scripts" / "convert_torch_mingru.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(word) for word in argv])


def save(example, path, kind):
    if kind == "state dict":
        torch.save(example.state_dict(), path)
    else:
        torch.jit.save(torch.jit.script(example), path)
    return path


@pytest.mark.parametrize("kind", ["state dict", pytest.param("TorchScript", marks=pytest.mark.torchscript)])
@pytest.mark.parametrize("name", EXAMPLES)
def test_text_and_copying_models_keep_their_logits(name, kind, tmp_path):
    example = TextExample(**EXAMPLES[name]).eval()
    with torch.no_grad():
        for parameter in example.parameters():  # with default values, a norm that is not converted would go unnoticed
            parameter.add_(torch.randn_like(parameter) * 0.2)
    state = read_checkpoint(save(example, tmp_path / "model.pt", kind))
    torch.testing.assert_close(state, dict(example.state_dict()), rtol=0, atol=0)

    residual = EXAMPLES[name].get("residual", True)
    model = convert(state, residual=residual)
    ids = torch.randint(0, example.emb.num_embeddings, (3, 17))
    with torch.no_grad():
        logits, expected = model(ids).logits, text_reference(state, ids, residual)
        print(f"{name}, {kind}: largest difference {(logits - expected).abs().max():.1e}")  # shown by pytest -rP
        torch.testing.assert_close(logits, expected, **TOLERANCE)
        torch.testing.assert_close(logits, example(ids), **TOLERANCE)


@pytest.fixture(scope="module")
def video_example():
    """Return torch-mingru's video example, with weights that carry the signal through to the last stage."""
    pytest.importorskip("timm", reason="VGG16, its backbone, comes from timm")
    torch.manual_seed(0)
    example = ReferenceClassifier(7).eval()
    for parameter in example.feature_parts.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return example


class Holder(nn.Module):
    """The parts of the video example in a module that TorchScript can compile."""

    def __init__(self, example):
        super().__init__()
        self.feature_parts, self.heads = example.feature_parts, example.heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("kind", ["state dict", pytest.param("TorchScript", marks=pytest.mark.torchscript)])
def test_video_models_keep_their_logits(video_example, kind, tmp_path):
    frames = torch.randn(2, 3, 3, 64, 48)
    path = tmp_path / "model.pt"
    with torch.no_grad():
        if kind == "state dict":
            torch.save(video_example.state_dict(), path)
        else:
            torch.jit.save(torch.jit.script(Holder(video_example)), path)
        model = convert(read_checkpoint(path))
        logits, expected = model(frames).logits, video_example(frames)
    print(f"video, {kind}: largest difference {(logits - expected).abs().max():.1e}")
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    assert (expected[0] - expected[1]).abs().max() > 0.01  # the logits depend on the frames
    assert model.config.num_labels == 7


def test_script_writes_a_video_directory_that_the_pipeline_takes(video_example, tmp_path):
    pytest.importorskip("av", reason="the video-classification pipeline needs PyAV")
    path = save(video_example, tmp_path / "model.pt", "state dict")
    call("--checkpoint_path", path, "--output_dir", tmp_path / "out")
    classify = pipeline("video-classification", model=str(tmp_path / "out"), device="cpu")
    answers = classify(np.zeros((12, 64, 64, 3), dtype=np.uint8), top_k=7)
    assert {answer["label"] for answer in answers} == {f"LABEL_{i}" for i in range(7)}


def pop_all(state, prefix):
    for name in [name for name in state if name.startswith(prefix)]:
        state.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("feature_parts.3.2.bias"), "missing.*features_19.bias"),
        (
            lambda state: state.update({"feature_parts.0.1.weight": torch.ones(1)}),
            r"not belong.*feature_parts\.0\.1",
        ),
        (lambda state: state.update({"heads.0.fc.scale": torch.ones(1)}), r"not belong.*heads\.0\.fc\.scale"),
        (lambda state: state.pop("heads.2.fc.weight"), r"missing: heads\.2\.fc\.weight"),
        (lambda state: pop_all(state, "heads.0."), r"missing: heads\.0\..*heads\.0\.fc\.weight"),
        (lambda state: pop_all(state, "heads.3."), r"missing: heads\.3\..*heads\.3\.fc\.weight"),
        (lambda state: state.update({"feature_parts.0.0.weight": torch.ones(8, 3, 3, 3)}), "shape.*expected"),
    ],
)
def test_what_does_not_fit_a_video_model_is_named(video_example, change, message):
    state = dict(video_example.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        convert(state)


def test_script_writes_a_directory_that_loads(tmp_path, capsys):
    tokenizer = build_tokenizer("char", ["abcdefg\n"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    example = TextExample(vocab_size=len(tokenizer)).eval()
    path = save(example, tmp_path / "model.pt", "state dict")
    call("--checkpoint_path", path, "--output_dir", tmp_path / "out", "--tokenizer_name", tmp_path / "tokenizer")
    assert f"all {len(example.state_dict())} tensors" in capsys.readouterr().out
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("feed", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        torch.testing.assert_close(logits, example(ids), **TOLERANCE)

    with pytest.raises(SystemExit):
        call("--checkpoint_path", path, "--output_dir", tmp_path / "out")
    assert "overwrite_output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("rnn.layers.2.gate_hidden.bias"), "missing.*layers.2.mixer.gate_hidden.bias"),
        (lambda state: state.pop("fc.weight"), "missing: fc.weight"),
        (lambda state: state.update({"head.weight": torch.ones(1)}), "not belong.*head.weight"),
        (lambda state: state.update({"rnn.layers.1.res_align.bias": torch.ones(8)}), "not belong.*res_align.bias"),
        (
            lambda state: state.update({"rnn.layers.2.res_align.weight": torch.ones(8, 8)}),
            "not belong.*2.res_align",
        ),
        (lambda state: state.update({"ln.weight": torch.ones(9)}), r"shape.*ln.weight \[9\], expected \[10\]"),
        (
            lambda state: state["rnn.layers.1.res_align.weight"].t_(),
            r"shape.*res_align.weight \[6, 8\], expected \[8, 6\]",
        ),
        (lambda state: state.pop("emb.weight"), "one of torch-mingru's examples.*rnn.layers.0"),
        (lambda state: state.pop("rnn.layers.1.gate_hidden.weight"), "missing|shape"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state = dict(TextExample().state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        convert(state)


class Trap:
    """An object whose pickle would create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_no_file_runs_code(tmp_path):
    torch.save({"emb.weight": Trap(tmp_path / "ran")}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="could run code"):
        read_checkpoint(tmp_path / "state.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("model/constants.pkl", pickle.dumps(()))
        archive.writestr("model/data.pkl", pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(ValueError, match="pathlib"):
        read_checkpoint(tmp_path / "script.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_models_wrappers_are_taken_off(wrapper, tmp_path):
    state = TextExample().state_dict()
    save_file({wrapper + name: tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    torch.save({wrapper + name: tensor for name, tensor in state.items()}, tmp_path / "model.pt")
    for name in ("model.safetensors", "model.pt"):
        torch.testing.assert_close(read_checkpoint(tmp_path / name), dict(state), rtol=0, atol=0)


@pytest.mark.torchscript
def test_an_archive_without_parameters_is_refused(tmp_path):
    torch.jit.freeze(torch.jit.script(nn.Linear(2, 3).eval())).save(tmp_path / "frozen.pt")
    with pytest.raises(
        ValueError, match=r"frozen\.pt is a TorchScript archive without parameters: torch\.jit\.freeze"
    ):
        read_checkpoint(tmp_path / "frozen.pt")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.safetensors is damaged"):
        read_checkpoint(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        read_checkpoint(tmp_path / "nothing.pt")
    torch.save({"model": TextExample().state_dict(), "step": 3}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match=r"instead of a state dict.*model"):
        read_checkpoint(tmp_path / "nested.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt is not a checkpoint"):
        read_checkpoint(tmp_path / "text.pt")
    # The first byte of this file is a pickle opcode for reading a memo entry that does not exist.
    (tmp_path / "junk.pt").write_text("junk\n")
    with pytest.raises(ValueError, match=r"junk\.pt is damaged or not a PyTorch checkpoint"):
        read_checkpoint(tmp_path / "junk.pt")
    torch.save(TextExample().state_dict(), tmp_path / "cut.pt")
    content = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(tmp_path / "cut.pt")


# ---- other forms of the examples ----


def assert_same_logits(example, state=None, **kwargs):
    model = convert(dict(example.state_dict()) if state is None else state, **kwargs)
    assert not model.training
    ids = torch.randint(0, example.emb.num_embeddings, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, example(ids), **TOLERANCE)


@pytest.mark.parametrize("part", [r"gate_hidden\.bias", r"layers\.\d\.norm\.bias", r"fc\.bias"])
def test_biases_that_a_checkpoint_has_not_are_left_out(part):
    example, state = TextExample().eval(), {}
    for name, parameter in example.named_parameters():
        if re.search(part, name):
            nn.init.zeros_(parameter)
        else:
            state[name] = nn.init.normal_(parameter.detach(), std=0.3)
    assert len(state) < len(example.state_dict())
    assert_same_logits(example, state)


def test_without_any_norm():
    example = TextExample(final_norm=False)
    example.rnn = MinGRU(12, [6, 10], norm=False, residual=True)
    assert_same_logits(example.eval())


def test_the_bias_of_the_last_norm_is_taken_over():
    example = TextExample().eval()
    example.ln = nn.LayerNorm(10)
    nn.init.normal_(example.ln.bias)
    assert_same_logits(example)


def test_the_width_of_the_embedding_tells_too_that_there_are_no_residual_sums():
    assert_same_logits(TextExample(embedding=12, hidden_sizes=(8, 8), residual=False).eval())


def test_a_model_has_the_dtype_of_its_tensors():
    state = {name: tensor.bfloat16() for name, tensor in TextExample().state_dict().items()}
    assert {parameter.dtype for parameter in convert(state).parameters()} == {torch.bfloat16}


def test_names_that_only_begin_like_known_ones_are_refused():
    state = dict(TextExample().state_dict())
    with pytest.raises(ValueError, match=r"do not belong to this kind of model: fc\.weight_scale\."):
        convert(state | {"fc.weight_scale": torch.ones(31, 10)})
    with pytest.raises(ValueError, match=r"do not belong to this kind of model: x0, .*, x19 and 5 more\."):
        convert(state | {f"x{i}": torch.ones(1) for i in range(25)})
    without_layers = {name: tensor for name, tensor in state.items() if not name.startswith("rnn.")}
    with pytest.raises(ValueError, match=r"missing: rnn\.layers\.0\.gate_hidden\.weight"):
        convert(without_layers)


class OtherVideo(ReferenceClassifier):
    """A video example with one layer per head, other kernel and pooling sizes, and no norms or residual sums."""

    def __init__(self, num_labels):
        super().__init__(num_labels)
        for head, size in zip(self.heads, (64, 128, 256, 512, 512), strict=True):
            head["rnn"] = MinConv2dGRU(size, [size], 1, strides=2, paddings=1, norm=False, residual=False)
            head["fc"] = nn.Linear(size * 9, num_labels)

    def forward(self, frames):
        logits, x = [], frames.flatten(0, 1)
        for part, head in zip(self.feature_parts, self.heads, strict=True):
            x = part(x)
            outputs, _ = head["rnn"](x.unflatten(0, frames.shape[:2]))
            logits.append(head["fc"](F.adaptive_avg_pool2d(outputs[:, -1], 3).flatten(1)))
        return torch.stack(logits).mean(0)


def test_the_tensors_of_a_video_model_tell_its_form():
    pytest.importorskip("timm", reason="VGG16, its backbone, comes from timm")
    example, frames = OtherVideo(3).eval(), torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(convert(dict(example.state_dict()))(frames).logits, example(frames), **TOLERANCE)


def test_a_video_model_without_heads_is_refused(video_example):
    state = {name: tensor for name, tensor in video_example.state_dict().items() if "heads" not in name}
    with pytest.raises(ValueError, match=r"missing: heads\.0\.rnn\.layers\.0\.gate_hidden\.weight"):
        convert(state)


# ---- files ----


class Tensors(nn.Module):
    """Tensors of every kind, some of them views of the same memory."""

    def __init__(self):
        super().__init__()
        base = torch.randn(4, 6)
        self.weight = nn.Parameter(base)
        for name, tensor in {"part": base[1:, 2:5], "turned": base.t(), "number": torch.tensor(3)}.items():
            self.register_buffer(name, tensor)
        for dtype in ("float64", "float16", "bfloat16", "int32", "bool"):
            self.register_buffer(f"of_{dtype}", (10 * torch.randn(5)).to(getattr(torch, dtype)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.torchscript
def test_an_archive_may_hold_tensors_of_any_type_and_views(tmp_path):
    model = Tensors()
    torch.jit.script(model).save(tmp_path / "model.pt")
    state = read_checkpoint(tmp_path / "model.pt")
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=0)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "again.safetensors")
    state["turned"].zero_()
    assert torch.equal(state["weight"], model.weight)  # the loaded tensors share no memory


@pytest.mark.torchscript
@pytest.mark.parametrize("damage", ["missing", "short", "odd", "flipped", "pickle", "directory"])
def test_a_damaged_archive_is_refused(damage, tmp_path):
    torch.jit.script(nn.Linear(20, 30)).save(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as whole:
        contents = {name: whole.read(name) for name in whole.namelist()}
    data = max(contents, key=lambda name: len(contents[name]) if "/data/" in name else 0)
    if damage == "pickle":
        data = next(name for name in contents if name.endswith("/data.pkl"))
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        for name, content in contents.items():
            if name != data:
                archive.writestr(name, content)
            elif damage != "missing":
                archive.writestr(
                    name, {"short": content[:40], "odd": content[:41], "pickle": b""}.get(damage, content)
                )
    if damage == "flipped":
        content = bytearray((tmp_path / "bad.pt").read_bytes())
        content[content.index(contents[data][:40])] ^= 1
        (tmp_path / "bad.pt").write_bytes(content)
    if damage == "directory":
        content = (tmp_path / "bad.pt").read_bytes()
        (tmp_path / "bad.pt").write_bytes(content.replace(b"PK\x01\x02", b"PK\x09\x09"))
    with pytest.raises(ValueError, match=r"bad\.pt is a damaged TorchScript archive"):
        read_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        # A small file could otherwise claim any amount of memory.
        (torch.zeros(1).expand(10**9, 6), "do not store all elements"),
        (torch.eye(6).to_sparse(), "do not store all elements"),
        (torch.ones(6, 6, device="meta"), "do not store all elements"),
        (torch.ones(6, 6).long(), r"not floating-point: emb\.weight \(torch\.int64\)"),
        (torch.ones(6, 6) * 1j, "not floating-point"),
        (torch.tensor(1.0), r"are not matrices: emb\.weight"),
        (torch.ones(0, 6), r"are not matrices: emb\.weight"),
    ],
    ids=["expanded", "sparse", "meta", "integer", "complex", "number", "empty"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # issued by torch 2.15
def test_a_tensor_that_is_no_weight_is_named(tensor, message, tmp_path):
    torch.save(TextExample().state_dict() | {"emb.weight": tensor}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        convert(read_checkpoint(tmp_path / "model.pt"))


@pytest.mark.torchscript
def test_an_archive_asks_for_no_more_memory_than_it_has(tmp_path):
    model = nn.Linear(2, 3)
    model.weight = nn.Parameter(torch.zeros(1).expand(10**9, 2))
    torch.jit.script(model).save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"size \(1000000000, 2\) has only 1 stored numbers"):
        read_checkpoint(tmp_path / "model.pt")


def test_a_directory_or_a_list_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_checkpoint(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt contains list instead of a state dict"):
        read_checkpoint(tmp_path / "list.pt")
    torch.save({0: torch.ones(2)}, tmp_path / "numbers.pt")
    with pytest.raises(ValueError, match=r"numbers\.pt contains 0 instead of a state dict"):
        read_checkpoint(tmp_path / "numbers.pt")


def test_a_wrapper_is_taken_off_only_where_it_holds_all_names(tmp_path):
    state = {"module.weight": torch.zeros(2), "weight": torch.ones(2)}
    torch.save(state, tmp_path / "model.pt")
    torch.testing.assert_close(read_checkpoint(tmp_path / "model.pt"), state)


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(TextExample().state_dict(), tmp_path / "model.pt")
    assert {tensor.device.type for tensor in read_checkpoint(tmp_path / "model.pt").values()} == {"cpu"}
