"""Exported programs: they give the outputs of the model, also in a process that has only torch."""

import copy
import subprocess
import sys

import pytest
import torch
from torch.export import Dim
from transformers import ConvNextConfig, ResNetConfig

from mingru_hf import (
    MinConvGRUConfig,
    MinConvGRUForVideoClassification,
    MinGRUConfig,
    MinGRUForCausalLM,
    MinGRUForSequenceClassification,
    MinGRUForTokenClassification,
    mingru_scan,
)
from mingru_hf.exporting import (
    MinConvGRUClip,
    MinGRUPrefill,
    cache_of,
    export_programs,
    export_text_classifier,
    export_video_programs,
)

# For logits of a few units in float32; the exported scan rounds in a different order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
KINDS = {
    "paper": {"hidden_size": 16, "num_hidden_layers": 2},
    "stack": {"hidden_size": 8, "hidden_sizes": [12, 16], "conv_kernel": 0, "expand": 1, "use_mlp": False},
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
VIDEO_KINDS = {
    "resnet": {
        "backbone_config": ResNetConfig(**RESNET, out_features=["stage1", "stage2"]),
        "backbone_chunk_size": 4,
        "scan_backend": "torch",
    },
    "convnext": {
        "backbone_config": ConvNextConfig(**CONVNEXT, out_indices=[2]),
        "feature_pooling": True,
        "num_hidden_layers": 3,
        "residual": False,
        "norm": False,
        "pooled_size": 3,
    },
}


def make_video_model(kind, **overrides):
    torch.manual_seed(0)
    options = copy.deepcopy(VIDEO_KINDS[kind]) | {"num_labels": 5} | overrides
    return MinConvGRUForVideoClassification(MinConvGRUConfig(**options)).eval()


@pytest.fixture(scope="module", params=VIDEO_KINDS)
def exported_video(request):
    """Return a video classifier and its two programs."""
    model = make_video_model(request.param).train()
    options = model.config.to_dict()
    programs = export_video_programs(model, (48, 40))
    assert model.training
    assert model.config.to_dict() == options
    return model.eval(), *programs


@pytest.fixture(scope="module", params=KINDS)
def exported(request):
    """Return a model and its two programs, exported while the model was in training mode."""
    torch.manual_seed(0)
    options = {"initializer_range": 0.3, "embedding_dropout": 0.5} | KINDS[request.param]
    model = MinGRUForCausalLM(MinGRUConfig(vocab_size=40, **options)).train()
    programs = export_programs(model)
    return model.eval(), *programs


@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 7), (3, 40), (2, 2)])
@torch.no_grad()
def test_programs_give_the_numbers_of_the_model_at_any_size(exported, batch, steps):
    model, prefill, decode = exported
    ids = torch.randint(0, 40, (batch, steps + 4))
    logits, state = prefill.module()(ids[:, :steps])
    parts = [logits]
    for t in range(steps, steps + 4):
        logits, state = decode.module()(ids[:, t : t + 1], state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, **CLOSE)


@torch.no_grad()
def test_programs_run_in_a_process_without_the_package(exported, tmp_path):
    model, prefill, decode = exported
    ids = torch.randint(0, 40, (2, 11))
    torch.export.save(prefill, tmp_path / "prefill.pt2")
    torch.export.save(decode, tmp_path / "decode.pt2")
    torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    code = """
import sys
sys.modules["mingru_hf"] = sys.modules["transformers"] = None  # importing them fails
import torch
data = torch.load("expected.pt")
prefill, decode = (torch.export.load(f"{name}.pt2").module() for name in ("prefill", "decode"))
logits, state = prefill(data["ids"][:, :9])
parts = [logits]
for t in (9, 10):
    logits, state = decode(data["ids"][:, t : t + 1], state)
    parts.append(logits)
torch.testing.assert_close(torch.cat(parts, dim=1), data["logits"], rtol=1e-4, atol=1e-4)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("kept", [1, 2, 5])
@torch.no_grad()
def test_prefill_returns_as_many_logits_as_asked_for(exported, kept):
    model = exported[0]
    prefill, _ = export_programs(model, logits_to_keep=kept)
    for steps in (1 if kept == 1 else kept + 1, 11):
        ids = torch.randint(0, 40, (2, steps))
        torch.testing.assert_close(prefill.module()(ids)[0], model(ids).logits[:, -kept:], **CLOSE)


@torch.no_grad()
def test_prefill_with_padding(exported):
    model = exported[0]
    ids = torch.randint(1, 40, (3, 9))
    mask = torch.arange(9) >= torch.tensor([0, 3, 8])[:, None]
    shape = {0: Dim("batch", min=1), 1: Dim("steps", min=1)}
    program = torch.export.export(
        MinGRUPrefill(model, logits_to_keep=1),
        (ids[:2].contiguous(), mask[:2].long()),
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
    )
    logits, state = program.module()(ids, mask.long())
    assert logits.shape == (3, 1, 40)
    following = model(ids[:, :2], cache=cache_of(model, state)).logits
    for row, start in enumerate((0, 3, 8)):
        alone = model(torch.cat([ids[row, start:], ids[row, :2]]).unsqueeze(0)).logits[0]
        torch.testing.assert_close(logits[row, 0], alone[-3], **CLOSE)
        torch.testing.assert_close(following[row], alone[-2:], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exported_scan_knows_masks_and_resets(dtype):
    """The inputs have NaN at padding, and an initial state with another dtype and non-contiguous strides."""

    class Scan(torch.nn.Module):
        def forward(self, x, h0, mask, reset):
            return mingru_scan(x, h0, mask, reset, dtype=torch.float32)  # the states, not yet rounded to x.dtype

    x, h0 = torch.randn(2, 9, 12, dtype=dtype), torch.rand(6, 1, 2, dtype=torch.float64).transpose(0, 2)
    mask, reset = torch.rand(2, 9) < 0.7, torch.rand(2, 9) < 0.3
    steps = {1: Dim("steps", min=1)}
    program = torch.export.export(Scan(), (x, h0, mask, reset), dynamic_shapes=(steps, None, steps, steps))
    assert not any("mingru" in str(node.target) for node in program.graph.nodes)
    for length in (1, 9, 40):
        mask, reset = torch.rand(2, length) < 0.7, torch.rand(2, length) < 0.3
        x = torch.where(mask.unsqueeze(-1), torch.randn(2, length, 12), torch.nan).to(dtype)
        expected = mingru_scan(x, h0, mask, reset, backend="reference", dtype=torch.float32)
        torch.testing.assert_close(program.module()(x, h0, mask, reset), expected)


@pytest.mark.parametrize("steps", [1, 5])
def test_a_backend_that_is_asked_for_is_exported_as_it_is(steps):
    class Scan(torch.nn.Module):
        def forward(self, x):
            return mingru_scan(x, backend="torch")

    program = torch.export.export(Scan(), (torch.randn(2, steps, 12),))
    assert sum("mingru" in str(node.target) for node in program.graph.nodes) == 1


def test_modules_kept_in_evaluation_stay_there(exported):
    model = copy.deepcopy(exported[0]).train()
    model.model.norm.eval()
    export_programs(model)
    assert model.training
    assert model.lm_head.training
    assert not model.model.norm.training


@pytest.mark.parametrize("forced", ["config", "environment"])
def test_a_forced_backend_does_not_reach_the_programs(exported, monkeypatch, forced):
    model = copy.deepcopy(exported[0])
    if forced == "config":
        model.config.scan_backend = "torch"
    else:
        monkeypatch.setenv("MINGRU_SCAN", "torch")
    for program in export_programs(model):
        assert not any("mingru" in str(node.target) for node in program.graph.nodes)
    assert model.config.scan_backend == ("torch" if forced == "config" else "auto")


def test_a_model_without_a_head_is_refused(exported):
    with pytest.raises(ValueError, match=r"Only a MinGRUForCausalLM can be exported .* got a MinGRUModel"):
        export_programs(exported[0].model)


def test_a_state_of_another_model_is_refused(exported):
    with pytest.raises(ValueError, match=r"The state of this model has \d tensors, got 1"):
        cache_of(exported[0], [torch.rand(1, 1, 4)])


def test_a_prompt_is_a_scan_in_each_block_and_a_token_none(exported):
    model, *programs = exported
    operators = ([str(node.target) for node in p.graph.nodes if node.op == "call_function"] for p in programs)
    assert [sum("scan" in name for name in names) for names in operators] == [model.config.num_hidden_layers, 0]


def assert_made_for_contiguous(programs, name):
    """Assert that programs were exported with contiguous tokens or frames: compilers rely on their strides."""
    for program in programs:
        (inputs,) = (node.meta["val"] for node in program.graph.nodes if node.name == name)
        assert inputs.is_contiguous()


def test_programs_are_made_for_contiguous_tokens(exported):
    assert_made_for_contiguous(exported[1:], "input_ids")


def test_a_state_with_too_many_tensors_is_refused(exported):
    model, prefill, _ = exported
    _, state = prefill.module()(torch.zeros((1, 3), dtype=torch.long))
    with pytest.raises(ValueError, match=rf"The state of this model has {len(state)} tensors, got {len(state) + 1}"):
        cache_of(model, [*state, state[0]])


def test_a_failed_export_leaves_the_model_as_it_was(exported, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no export today")

    model = copy.deepcopy(exported[0]).train()
    model.config.scan_backend = "torch"
    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(RuntimeError, match="no export today"):
        export_programs(model)
    assert model.training
    assert model.config.scan_backend == "torch"


@pytest.mark.parametrize("model_class", [MinGRUForSequenceClassification, MinGRUForTokenClassification])
@torch.no_grad()
def test_classifiers_of_texts_and_tokens(model_class):
    options = {"initializer_range": 0.3, "num_labels": 3, "classifier_dropout": 0.5} | KINDS["paper"]
    model = model_class(MinGRUConfig(vocab_size=40, **options)).train()
    program = export_text_classifier(model).module()
    model.eval()
    ids = torch.randint(0, 40, (3, 9))
    for mask in (torch.arange(9) < torch.tensor([[9], [4], [1]]), torch.arange(9) >= torch.tensor([[0], [4], [8]])):
        logits, expected = program(ids, mask.long()), model(ids, attention_mask=mask).logits
        real = mask if logits.dim() == 3 else slice(None)
        torch.testing.assert_close(logits[real], expected[real], **CLOSE)


@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (3, 7), (2, 2)])
@torch.no_grad()
def test_video_programs_give_the_numbers_of_the_model_at_any_size(exported_video, batch, steps):
    model, clip, frame = exported_video
    frames = torch.randn(batch, steps + 3, 3, 48, 40)
    logits, state = clip.module()(frames[:, :steps])
    torch.testing.assert_close(logits, model(frames[:, :steps]).logits, **CLOSE)
    for t in range(steps, steps + 3):
        logits, state = frame.module()(frames[:, t : t + 1], state)
        torch.testing.assert_close(logits, model(frames[:, : t + 1]).logits, **CLOSE)


def test_video_programs_hold_operators_of_torch_alone(exported_video):
    for program in exported_video[1:]:
        operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert operators
        assert not [name for name in operators if "mingru" in name]


def test_video_programs_are_made_for_contiguous_frames(exported_video):
    assert_made_for_contiguous(exported_video[1:], "frames")


@torch.no_grad()
def test_a_bidirectional_video_model_has_a_program_for_clips_alone():
    """The model in this test takes grey frames in float64."""
    backbone = ResNetConfig(**RESNET, num_channels=1, out_features=["stage1", "stage2"])
    model = make_video_model("resnet", bidirectional=True, backbone_config=backbone).double()
    clip, frame = export_video_programs(model, 32)
    assert frame is None
    frames = torch.randn(1, 6, 1, 32, 32, dtype=torch.float64)
    logits, state = clip.module()(frames)
    assert state == []
    torch.testing.assert_close(logits, model(frames).logits, **CLOSE)


@torch.no_grad()
def test_clips_with_padding(exported_video):
    model = exported_video[0]
    frames = torch.randn(2, 5, 3, 48, 40)
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    logits, _ = MinConvGRUClip(model)(frames, mask)
    torch.testing.assert_close(logits[1:], model(frames[1:, :3]).logits, **CLOSE)


def test_other_models_and_frames_too_small_are_refused(exported):
    with pytest.raises(ValueError, match=r"Only a MinConvGRUForVideoClassification .* got a MinGRUForCausalLM"):
        export_video_programs(exported[0], 32)
    with pytest.raises(ValueError, match=r"as a classifier, got a MinGRUForCausalLM"):
        export_text_classifier(exported[0])
    for size in (0, (64,), (64, 64, 3), "64"):
        with pytest.raises(ValueError, match=r"a positive number of pixels or \(height, width\), got "):
            export_video_programs(make_video_model("convnext"), size)
    with pytest.raises(ValueError, match="too small for feature_pooling"):
        export_video_programs(make_video_model("convnext"), 4)
