"""The video model: parity with torch-mingru's classifier, streaming, padding, the backbone, saving, losses, errors."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForVideoClassification,
    BertConfig,
    BitConfig,
    ConvNextConfig,
    Dinov2Config,
    DynamicCache,
    ResNetConfig,
    ResNetForImageClassification,
)

from mingru_hf import (
    MinConv2dGRU,
    MinConvGRUCache,
    MinConvGRUConfig,
    MinConvGRUForVideoClassification,
    MinConvGRUModel,
)

# For float32 logits of a few units; convolutions with different batch sizes sum in different orders.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
MODEL_KINDS = {
    "resnet": {"backbone_config": ResNetConfig(**RESNET, out_features=["stem", "stage2"])},
    "convnext": {
        "backbone_config": ConvNextConfig(**CONVNEXT, out_indices=[1, 2]),
        "feature_pooling": [True, False],
        "hidden_sizes": [8, 4],
        "num_hidden_layers": 1,
        "stride": 1,
        "kernel_size": 2,
        "padding": 0,
        "pooled_size": 3,
        "norm": False,
    },
    "plain": {
        "backbone_config": ResNetConfig(**RESNET, out_features=["stage1"]),
        "num_hidden_layers": 3,
        "residual": False,
        "pooled_size": 1,
    },
}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


def make_model(kind="resnet", **overrides):
    """Return a tiny classifier whose weights are large enough that its logits vary from frame to frame."""
    options = copy.deepcopy(MODEL_KINDS[kind]) | {"num_labels": 5, "initializer_range": 0.5} | overrides
    model = MinConvGRUForVideoClassification(MinConvGRUConfig(**options)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after some training
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


@pytest.fixture(params=MODEL_KINDS)
def model(request):
    return make_model(request.param)


@pytest.fixture
def frames():
    """(3, 7, 3, 32, 24): three clips of seven frames."""
    return torch.randn(3, 7, 3, 32, 24)


# --- What it computes


class ReferenceClassifier(nn.Module):
    """torch-mingru's UCF101 classifier: VGG16 split after its pooling layers, and a head on each part's features."""

    def __init__(self, num_labels):
        super().__init__()
        self.feature_parts, channels, sizes = nn.ModuleList(), 3, []
        for size, num_convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            part = nn.Sequential()
            for _ in range(num_convs):
                part.extend([nn.Conv2d(channels, size, 3, padding=1), nn.ReLU()])
                channels = size
            self.feature_parts.append(part.append(nn.MaxPool2d(2)))
            sizes.append(size)
        self.heads = nn.ModuleList(
            nn.ModuleDict(
                {"rnn": MinConv2dGRU(size, [size, size], 3, strides=2, paddings=1, norm=True, residual=True)}
            )
            for size in sizes
        )
        for head, size in zip(self.heads, sizes, strict=True):
            head["fc"] = nn.Linear(size * 4, num_labels)

    def forward(self, frames):
        logits, x = [], frames.flatten(0, 1)
        for part, head in zip(self.feature_parts, self.heads, strict=True):
            x = part(x)
            outputs, _ = head["rnn"](x.unflatten(0, frames.shape[:2]))
            logits.append(head["fc"](F.adaptive_avg_pool2d(outputs[:, -1], 2).flatten(1)))
        return torch.stack(logits).mean(0)


def converted(state_dict):
    """Rename torch-mingru's parameters; indices continue from part to part, as in torchvision's and timm's VGG."""
    starts = [0, 5, 10, 17, 24]  # number of layers before each part
    result = {}
    for name, tensor in state_dict.items():
        group, depth, rest = name.split(".", 2)
        if group == "feature_parts":
            layer, kind = rest.split(".")
            result[f"model.backbone._backbone.features_{starts[int(depth)] + int(layer)}.{kind}"] = tensor
        elif rest.startswith("rnn."):
            result[f"model.stacks.{depth}.{rest.removeprefix('rnn.')}"] = tensor
        else:
            result[f"classifiers.{depth}.{rest.removeprefix('fc.')}"] = tensor
    return result


def test_reference_configuration_equals_torch_mingrus_classifier():
    pytest.importorskip("timm", reason="the reference backbone, VGG16, comes from timm")
    from transformers import TimmBackboneConfig

    backbone = TimmBackboneConfig(backbone="vgg16", out_indices=[0, 1, 2, 3, 4])
    model = MinConvGRUForVideoClassification(
        MinConvGRUConfig(backbone_config=backbone, feature_pooling=True, num_labels=7)
    )
    reference = ReferenceClassifier(7)
    for parameter in reference.feature_parts.parameters():  # keep the signal alive down to the last stage
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    model.load_state_dict(converted(reference.state_dict()))  # strict: nothing is missing or left over
    frames = torch.randn(2, 3, 3, 64, 48)
    labels = torch.tensor([3, 0])
    outputs, expected = model(frames, labels=labels), reference(frames)
    assert_close(outputs.logits, expected)
    assert (expected[0] - expected[1]).abs().max() > 0.01  # the logits depend on the frames
    names = ["feature_parts.0.0.weight", "feature_parts.4.4.bias", "heads.0.rnn.layers.1.gate_hidden.weight"]
    names += ["heads.4.rnn.layers.0.res_align.weight", "heads.2.rnn.layers.0.norm.weight", "heads.3.fc.weight"]
    parameters, ours = dict(reference.named_parameters()), dict(model.named_parameters())
    actual = torch.autograd.grad(outputs.loss, [ours[next(iter(converted({name: None})))] for name in names])
    torch.testing.assert_close(
        actual,
        torch.autograd.grad(F.cross_entropy(expected, labels), [parameters[n] for n in names]),
        rtol=1e-3,
        atol=1e-5,
    )


def test_logits_are_the_mean_over_stages_of_what_the_core_layers_give(model, frames):
    config = model.config
    with torch.no_grad():
        maps = model.model.backbone(frames.flatten(0, 1)).feature_maps
        pooling = [config.feature_pooling] * 2 if config.feature_pooling is False else config.feature_pooling
        frame_logits = []
        for stage, (x, pool) in enumerate(zip(maps, pooling, strict=False)):
            x = F.max_pool2d(x, 2) if pool else x
            sizes = [(config.hidden_sizes or model.model.backbone.channels)[stage]] * config.num_hidden_layers
            rnn = MinConv2dGRU(
                x.shape[1],
                sizes,
                config.kernel_size,
                strides=config.stride,
                paddings=config.padding,
                norm=config.norm,
                residual=config.residual,
            )
            rnn.load_state_dict(model.model.stacks[stage].state_dict())
            out, _ = rnn(x.unflatten(0, frames.shape[:2]))
            pooled = F.adaptive_avg_pool2d(out.flatten(0, 1), config.pooled_size).flatten(1).unflatten(0, (3, 7))
            frame_logits.append(model.classifiers[stage](pooled))
        expected = sum(frame_logits) / len(frame_logits)
        outputs = model(frames, output_frame_logits=True)
    assert len(frame_logits) == config.num_stages
    assert_close(outputs.frame_logits, expected)
    assert_close(outputs.logits, expected[:, -1])
    assert expected.diff(dim=1).abs().mean() > 0.01  # they vary from frame to frame


def test_hidden_states_are_feature_maps_and_layer_outputs(frames):
    model = make_model()
    with torch.no_grad():
        outputs = model.model(frames, output_hidden_states=True)
        assert model(frames).hidden_states is None
        maps = model.model.backbone(frames.flatten(0, 1)).feature_maps
    assert len(outputs.hidden_states) == 2 * (1 + 2)
    assert_close(outputs.hidden_states[0], maps[0].unflatten(0, (3, 7)))
    assert_close(outputs.hidden_states[3], maps[1].unflatten(0, (3, 7)))
    pooled = [F.adaptive_avg_pool2d(outputs.hidden_states[i].flatten(0, 1), 2).flatten(1) for i in (2, 5)]
    assert_close(outputs.last_hidden_state, torch.cat(pooled, -1).unflatten(0, (3, 7)))
    assert_close(outputs.pooler_output, outputs.last_hidden_state[:, -1])


def test_both_directions_meet_at_every_frame(frames):
    model = make_model(bidirectional=True)
    forward, backward = make_model(), make_model()
    weights = model.state_dict()
    assert not torch.equal(
        weights["model.stacks.0.layers.0.gate_hidden.weight"],
        weights["model.backward_stacks.0.layers.0.gate_hidden.weight"],
    )
    for one, name in ((forward, "stacks"), (backward, "backward_stacks")):
        one.model.backbone.load_state_dict(model.model.backbone.state_dict())
        one.model.stacks.load_state_dict(getattr(model.model, name).state_dict())
    with torch.no_grad():
        outputs = model.model(frames, output_hidden_states=True)
        there = forward.model(frames, output_hidden_states=True)
        back = backward.model(frames.flip(1), output_hidden_states=True)
    parts = outputs.last_hidden_state.split([32, 32, 48, 48], dim=-1)  # two directions of each stage
    assert_close(torch.cat(parts[::2], -1), there.last_hidden_state)
    assert_close(torch.cat(parts[1::2], -1), back.last_hidden_state.flip(1))
    parts = outputs.pooler_output.split([32, 32, 48, 48], dim=-1)
    assert_close(torch.cat(parts[::2], -1), there.pooler_output)
    assert_close(torch.cat(parts[1::2], -1), back.pooler_output)
    assert_close(outputs.hidden_states[1][:, :, 8:], back.hidden_states[1].flip(1))


# --- Streaming


@pytest.mark.parametrize("cuts", [[1] * 7, [3, 3, 1], [7], [2, 4, 1]])
def test_any_pieces_of_a_stream_equal_the_whole_clip(model, frames, cuts):
    with torch.no_grad():
        whole = model(frames, output_frame_logits=True)
        cache, parts = MinConvGRUCache(), []
        for piece in frames.split(cuts, dim=1):
            outputs = model(piece, cache=cache, output_frame_logits=True)
            assert outputs.cache is cache
            parts.append(outputs.frame_logits)
            assert_close(outputs.logits, outputs.frame_logits[:, -1])
    assert_close(torch.cat(parts, dim=1), whole.frame_logits)
    assert_close(outputs.logits, whole.logits)
    assert cache.get_seq_length() == 7
    assert whole.cache is None


def test_gradients_flow_through_the_pieces_of_a_stream(frames):
    model = make_model()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(frames).logits.square().sum(), parameters)
    cache = MinConvGRUCache()
    for piece in frames.split([2, 5], dim=1):
        logits = model(piece, cache=cache).logits
    torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), parameters), expected, rtol=1e-3, atol=1e-3)


def test_a_stream_goes_on_with_gradients_after_inference_mode(frames):
    model = make_model()
    gradients = []
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            cache = model(frames[:, :2], use_cache=True).cache
        loss = model(frames[:, 2:], cache=cache).logits.square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@torch.no_grad()
def test_frames_of_another_precision_are_taken(frames):
    """The video processor returns float32, whatever the model was loaded in."""
    model = make_model().bfloat16()
    assert_close(model(frames).logits, model(frames.bfloat16()).logits)


@torch.no_grad()
def test_a_replica_without_parameters_of_its_own_runs(frames):
    """DataParallel creates such replicas, with plain tensors in place of the parameters."""
    model = make_model()
    expected, replica = model(frames).logits, copy.deepcopy(model)
    for module in replica.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            setattr(module, name, None if parameter is None else parameter.data)
    assert_close(replica(frames).logits, expected)


def test_a_wrong_label_does_not_move_the_stream_on(frames):
    cache = MinConvGRUCache()
    with pytest.raises(ValueError, match="Labels must lie between 0 and 4"):
        make_model()(frames, cache=cache, labels=torch.tensor([0, 7, 1]))
    assert cache.batch_size == -1


def test_a_call_that_fails_leaves_the_stream_as_it_was(model, frames):
    def fail(*args):
        raise torch.OutOfMemoryError

    with torch.no_grad():
        expected, cache = model(frames).logits, MinConvGRUCache()
        model(frames[:, :3], cache=cache)
        hook = model.classifiers[0].register_forward_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            model(frames[:, 3:], cache=cache)
        hook.remove()
        with pytest.raises(ValueError, match="batch"):
            model(frames[:, 3:], cache=cache, labels=torch.tensor([0, 1]))
        assert cache.get_seq_length() == 3
        assert_close(model(frames[:, 3:], cache=cache).logits, expected)


def test_a_stream_in_bfloat16_goes_on_from_the_exact_state(frames):
    model, frames = make_model().bfloat16(), frames.bfloat16()
    with torch.no_grad():
        whole = model(frames, use_cache=True)
        cache = MinConvGRUCache()
        for piece in frames.split(1, dim=1):
            outputs = model(piece, cache=cache)
    assert outputs.logits.dtype == torch.bfloat16
    assert {state.dtype for state in cache.states} == {torch.float32}
    torch.testing.assert_close(outputs.logits, whole.logits, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(cache.states, whole.cache.states, rtol=2e-2, atol=2e-2)


def test_memory_does_not_grow_with_the_frames(frames):
    model, cache, sizes = make_model(), MinConvGRUCache(), []
    with torch.no_grad():
        for _ in range(3):
            model(frames, cache=cache)
            tensors = [*cache.states, cache.features]
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert len(set(sizes)) == 1
    assert sizes[0] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert cache.get_seq_length() == 21


def test_a_cache_is_copied_saved_and_reordered(frames, tmp_path):
    model = make_model()
    with torch.no_grad():
        whole = model(frames).logits
        cache = model(frames[:, :4], use_cache=True).cache
        torch.save(cache, tmp_path / "cache.pt")
        fork = copy.deepcopy(cache)
        assert_close(model(frames[:, 4:], cache=fork).logits, whole)
        assert_close(model(frames[:, 4:], cache=torch.load(tmp_path / "cache.pt", weights_only=False)).logits, whole)

        order = torch.tensor([2, 0])
        fork = copy.deepcopy(cache)
        fork.reorder_cache(order)
        assert_close(model(frames[order, 4:], cache=fork).logits, whole[order])

        fork = copy.deepcopy(cache)
        fork.batch_repeat_interleave(2)
        assert fork.batch_size == 6
        rest = frames[:, 4:].repeat_interleave(2, dim=0)
        assert_close(model(rest, cache=fork).logits, whole.repeat_interleave(2, dim=0))

        cache.reset()
        assert_close(model(frames, cache=cache.to("cpu")).logits, whole)


# --- Clips of unequal length


def pad(clips, lengths, side):
    """Return clips (B, T, ...) cut to their first frames and padded with strong noise, and the mask."""
    frames, mask = 10 * torch.randn_like(clips), torch.zeros(clips.shape[:2], dtype=torch.long)
    for row, length in enumerate(lengths):
        place = {"right": slice(0, length), "left": slice(clips.shape[1] - length, None)}.get(side)
        if side == "between":
            place = torch.arange(clips.shape[1])[-2 * length + 1 :: 2][:length]
        frames[row, place] = clips[row, :length]
        mask[row, place] = 1
    return frames, mask


@pytest.mark.parametrize("side", ["right", "left", "between"])
@pytest.mark.parametrize("kind", [*MODEL_KINDS, "bidirectional"])
def test_a_padded_clip_equals_the_clip_alone(kind, side, frames):
    model = make_model("resnet", bidirectional=True) if kind == "bidirectional" else make_model(kind)
    lengths = [4, 1, 2] if side == "between" else [7, 1, 4]
    padded, mask = pad(frames, lengths, side)
    with torch.no_grad():
        outputs = model(padded, attention_mask=mask, output_frame_logits=True)
        for row, length in enumerate(lengths):
            alone = model(frames[row : row + 1, :length], output_frame_logits=True)
            assert_close(outputs.logits[row], alone.logits[0])
            assert_close(outputs.frame_logits[row, mask[row].bool()], alone.frame_logits[0])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("cuts", [[1] * 7, [3, 3, 1]])
def test_padded_clips_stream(side, cuts, frames):
    """A piece without a frame of a clip, before its first or after its last one, leaves its state unchanged."""
    model = make_model()
    lengths = [7, 1, 4]
    padded, mask = pad(frames, lengths, side)
    with torch.no_grad():
        whole = model(padded, attention_mask=mask, output_frame_logits=True)
        cache, parts = MinConvGRUCache(), []
        for piece, piece_mask in zip(padded.split(cuts, dim=1), mask.split(cuts, dim=1), strict=True):
            outputs = model(piece, attention_mask=piece_mask, cache=cache, output_frame_logits=True)
            parts.append(outputs.frame_logits)
    assert_close(outputs.logits, whole.logits)
    assert_close(torch.cat(parts, 1), whole.frame_logits)
    if side == "right":  # padding repeats the logits of the last real frame
        assert_close(whole.frame_logits[1], whole.logits[1].expand(7, -1))


def test_a_clip_may_pause_in_a_stream(frames):
    model, cache = make_model(), MinConvGRUCache()
    pause = torch.zeros(3, 2)
    with torch.no_grad():
        expected = model(frames).logits
        half = model(frames[:, :4], cache=cache).logits
        assert_close(model(frames[:, :2], attention_mask=pause, cache=cache).logits, half)
        assert_close(model(frames[:, 4:], cache=cache).logits, expected)


def test_padding_touches_neither_gradients_nor_running_statistics(frames):
    alone, model = make_model().train(), None
    model = copy.deepcopy(alone)
    padded, mask = pad(frames, [4, 4, 4], "left")
    alone(frames[:, :4]).logits.square().sum().backward()
    model(padded, attention_mask=mask).logits.square().sum().backward()
    for (name, expected), actual in zip(alone.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    for expected, actual in zip(alone.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)


# --- The backbone


def test_a_frozen_backbone_stays_as_it_is(frames, tmp_path):
    model = make_model(freeze_backbone=True)
    before = copy.deepcopy(model.model.backbone.state_dict())
    model.save_pretrained(tmp_path)
    for one in (model, MinConvGRUForVideoClassification.from_pretrained(tmp_path)):
        one.train()
        assert one.training
        assert not any(module.training for module in one.model.backbone.modules())
        assert not any(parameter.requires_grad for parameter in one.model.backbone.parameters())
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        one(frames, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        assert all(parameter.grad is None for parameter in one.model.backbone.parameters())
        assert all(p.grad is not None for n, p in one.named_parameters() if "backbone" not in n)
        torch.testing.assert_close(one.model.backbone.state_dict(), before)
    model.model.unfreeze_backbone()
    model(frames, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(module.training for module in model.model.backbone.modules())
    assert not torch.equal(
        model.model.backbone.state_dict()[next(n for n in before if "running_mean" in n)],
        before[next(n for n in before if "running_mean" in n)],
    )
    model.model.freeze_backbone()
    model.zero_grad(set_to_none=True)
    model(frames, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.backbone.parameters())
    assert not model.model.backbone.training


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("frozen", ["embedder", "convolutions"])
@pytest.mark.parametrize("layer_type", ["preactivation", "bottleneck"])
def test_a_half_frozen_backbone_with_group_norms_trains(layer_type, frozen, channels_last, frames):
    """In channels-last memory format, in which convolutions run on a CPU, torch 2.13 would crash here."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 2, "out_indices": [2]}
    model = make_model(backbone_config=BitConfig(layer_type=layer_type, **sizes)).train()
    bit = model.model.backbone.bit
    for name, parameter in bit.named_parameters():
        parameter.requires_grad_(parameter.ndim < 4 if frozen == "convolutions" else "embedder" not in name)
    if channels_last:  # the memory layout of decoded frames
        frames = frames.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        model = model.to(memory_format=torch.channels_last)
    model(frames, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert bit.embedder.convolution.weight.grad is None
    trained = [parameter for parameter in bit.encoder.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("chunk", [1, 4, 100, 0])
def test_the_backbone_sees_a_chosen_number_of_frames_at_once(chunk, frames):
    model = make_model(backbone_chunk_size=chunk)
    seen = []
    model.model.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        logits = model(frames).logits
        model.config.backbone_chunk_size = None
        assert_close(logits, model(frames).logits)
    assert seen[:-1] == {1: [1] * 21, 4: [4] * 5 + [1], 100: [21], 0: [21]}[chunk]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [None, "by the model", "by hand"])
@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_gradient_checkpointing_changes_no_gradient(kind, frozen, reentrant, frames):
    model = make_model(kind, freeze_backbone=frozen == "by the model", backbone_chunk_size=5).train()
    if frozen == "by hand":  # as PEFT does
        model.model.backbone.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    model(frames, labels=torch.tensor([0, 1, 2])).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    moved = copy.deepcopy(model.state_dict())  # batch norms' statistics
    model.load_state_dict(before)
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    hook = model.model.stacks[0].layers[0].gate_hidden.register_forward_pre_hook(lambda *args: calls.append(1))
    model(frames, labels=torch.tensor([0, 1, 2])).loss.backward()
    hook.remove()
    assert len(calls) == 2  # forward, and once more in backward
    torch.testing.assert_close(model.state_dict(), moved)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None) == (not parameter.requires_grad)
        if parameter.requires_grad:
            error = {"rtol": 1e-3, "atol": 1e-4, "msg": lambda m, n=name: f"{n}: {m}"}
            torch.testing.assert_close(parameter.grad, expected[name], **error)


def test_a_pretrained_backbone_is_taken_over(frames, tmp_path):
    classifier = ResNetForImageClassification(ResNetConfig(**RESNET))
    classifier.save_pretrained(tmp_path)
    model = MinConvGRUForVideoClassification.from_backbone_pretrained(
        str(tmp_path), out_features=["stage1", "stage2"], num_labels=4, freeze_backbone=True
    )
    expected = classifier.resnet.state_dict()
    loaded = model.model.backbone.state_dict()
    assert set(loaded) == set(expected)
    torch.testing.assert_close(loaded, expected)
    assert model.model.backbone.channels == [8, 12]
    assert model(frames).logits.shape == (3, 4)
    assert not any(parameter.requires_grad for parameter in model.model.backbone.parameters())
    base = MinConvGRUModel.from_backbone_pretrained(str(tmp_path), out_indices=[0])
    torch.testing.assert_close(base.backbone.state_dict(), expected)
    assert base.backbone.out_features == ["stem"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_backbone_saved_in_16_bits_gives_a_model_of_one_dtype(dtype, frames, tmp_path):
    classifier = ResNetForImageClassification(ResNetConfig(**RESNET)).to(dtype)
    classifier.save_pretrained(tmp_path / "backbone")
    model = MinConvGRUForVideoClassification.from_backbone_pretrained(str(tmp_path / "backbone"), num_labels=4)
    expected = classifier.float().resnet.state_dict()
    torch.testing.assert_close(model.model.backbone.state_dict(), expected, rtol=0, atol=0)
    assert model(frames).logits.dtype == model.dtype == torch.float32
    model.to(dtype).save_pretrained(tmp_path / "model")
    config = MinConvGRUConfig.from_pretrained(tmp_path / "model")
    for new in (MinConvGRUForVideoClassification(config), MinConvGRUForVideoClassification._from_config(config)):
        assert new(frames.to(new.dtype)).logits.dtype == new.dtype
        assert {p.dtype for p in new.parameters()} == {new.dtype}


def test_a_pretrained_timm_backbone_is_taken_over(frames, monkeypatch):
    """Random weights replace the downloaded ones, including the statistics of batch norms."""
    timm = pytest.importorskip("timm", reason="the backbone comes from it")
    created, create_model = [], timm.create_model

    def create(name, pretrained=False, **kwargs):
        created.append(create_model(name, pretrained=False, **kwargs))
        if pretrained:
            for tensor in created[-1].state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.1, 0.2)
        return created[-1]

    monkeypatch.setattr(timm, "create_model", create)
    model = MinConvGRUForVideoClassification.from_backbone_pretrained("timm/resnet10t", out_indices=[1, 3])
    expected = {f"_backbone.{name}": tensor for name, tensor in created[0].state_dict().items()}
    torch.testing.assert_close(model.model.backbone.state_dict(), expected)
    assert model.model.backbone.channels == [64, 256]
    assert not model.training
    assert model(frames).logits.shape == (3, 2)


def test_what_is_no_backbone_is_not_taken_over(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a bert model, which transformers cannot use as a backbone"):
        MinConvGRUModel.from_backbone_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="chosen with out_indices"):
        MinConvGRUModel.from_backbone_pretrained("timm/vgg16.tv_in1k", out_features=["features.3"])


def test_feature_maps_with_the_channels_last_are_turned():
    pytest.importorskip("timm", reason="the backbone comes from it")
    from transformers import TimmBackboneConfig

    backbone = TimmBackboneConfig(backbone="swin_tiny_patch4_window7_224", out_indices=[0, 1])
    model, frames = make_model(backbone_config=backbone), torch.randn(1, 2, 3, 224, 224)
    with torch.no_grad():
        hidden_states = model(frames, output_hidden_states=True).hidden_states
        maps = model.model.backbone(frames[0]).feature_maps  # (N, H, W, C)
    assert maps[0].shape == (2, 56, 56, 96)
    assert_close(hidden_states[0][0], maps[0].permute(0, 3, 1, 2))


def test_a_backbone_that_gives_no_maps_is_named():
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, out_indices=[1, 2]
    )
    make_model(backbone_config=config)(torch.randn(1, 2, 3, 28, 28))
    config.reshape_hidden_states = False
    with pytest.raises(ValueError, match=r"feature maps \(N, 16, H, W\) from the backbone, got \(2, 5, 16\)"):
        make_model(backbone_config=config)(torch.randn(1, 2, 3, 28, 28))


# --- Saving and loading


@pytest.mark.parametrize("kind", [*MODEL_KINDS, "bidirectional", "timm"])
def test_saved_models_load_through_the_auto_classes(kind, tmp_path, frames):
    if kind == "timm":
        pytest.importorskip("timm", reason="one of the backbones comes from it")
        from transformers import TimmBackboneConfig

        model = make_model(backbone_config=TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 3]))
    else:
        model = make_model("resnet", bidirectional=True) if kind == "bidirectional" else make_model(kind)
    model.config.id2label = dict(enumerate("abcde"))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    loaded = AutoModelForVideoClassification.from_pretrained(tmp_path)
    assert type(loaded) is MinConvGRUForVideoClassification
    assert loaded.config.id2label[2] == "c"
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        assert_close(loaded(frames).logits, model(frames).logits)
        base, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert type(base) is MinConvGRUModel
        assert not report["missing_keys"]
        assert_close(base(frames).pooler_output, model.model(frames).pooler_output)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 5


def test_new_layers_are_drawn_by_their_size():
    torch.manual_seed(0)
    model = make_model(backbone_config=ResNetConfig(**(RESNET | {"hidden_sizes": [64, 16]}), out_indices=[1, 2]))
    for stage, channels in enumerate((64, 16)):
        layer = model.model.stacks[stage].layers[0]
        for conv in (layer.gate_hidden, layer.res_align):
            expected = (3 * 9 * channels) ** -0.5  # that of nn.Conv2d
            assert abs(conv.weight.std().item() / expected - 1) < 0.1
        assert not layer.gate_hidden.bias.any()
    assert abs(model.classifiers[0].weight.std().item() / 0.5 - 1) < 0.1


CODE = """
import sys
for name in ("mingru_hf", "numba", "triton"):
    sys.modules[name] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification

data = torch.load("data.pt")
model = AutoModelForVideoClassification.from_pretrained("model", trust_remote_code=True)
base = AutoModel.from_pretrained("model", trust_remote_code=True)
new = AutoModel.from_config(AutoConfig.from_pretrained("config_only", trust_remote_code=True), trust_remote_code=True)
with torch.no_grad():
    assert base(data["frames"]).pooler_output.shape == new(data["frames"]).pooler_output.shape
    torch.testing.assert_close(model(data["frames"]).logits, data["logits"], rtol=1e-4, atol=1e-4)
    cache = model(data["frames"][:, :4], use_cache=True).cache
    torch.testing.assert_close(model(data["frames"][:, 4:], cache=cache).logits, data["logits"], rtol=1e-4, atol=1e-4)
"""


def test_a_saved_directory_loads_without_the_package(frames, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    model.config.save_pretrained(tmp_path / "config_only")
    for directory in ("model", "config_only"):
        files = {path.name for path in (tmp_path / directory).glob("*.py")}
        assert {"configuration_minconvgru.py", "modeling_minconvgru.py", "layers.py", "scan.py"} <= files
        assert "modeling_mingru.py" not in files
    with torch.no_grad():
        torch.save({"frames": frames, "logits": model(frames).logits}, tmp_path / "data.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    environment["MINGRU_SCAN"] = ""  # the code hides the kernels
    command = [sys.executable, "-P", "-W", "error", "-c", CODE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compile_and_export_take_the_model_whole(frames):
    model = make_model()
    mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3, [1] * 2 + [0] * 5])
    with torch.no_grad():
        expected = model(frames, attention_mask=mask).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_close(compiled(frames, attention_mask=mask).logits, expected)
        exported = torch.export.export(model, (frames,), {"attention_mask": mask}).module()
        assert_close(exported(frames, attention_mask=mask).logits, expected)


def test_autocast_streams(frames):
    model, cache = make_model(), MinConvGRUCache()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole = model(frames).logits
        for piece in frames.split(2, dim=1):
            logits = model(piece, cache=cache).logits
    assert {state.dtype for state in cache.states} == {torch.float32}
    torch.testing.assert_close(logits, whole, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        torch.testing.assert_close(whole.float(), model(frames).logits, rtol=5e-2, atol=5e-2)


def test_trainer_trains_and_evaluates(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs it")
    from transformers import Trainer, TrainingArguments

    clips = [{"pixel_values_videos": torch.randn(3, 3, 16, 16), "labels": i} for i in range(5)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(
        model,
        arguments,
        train_dataset=clips,
        eval_dataset=clips,
        compute_metrics=lambda outputs: {"shape": list(outputs.predictions.shape)},
    )
    trainer.train()
    assert trainer.evaluate()["eval_shape"] == [5, 5]
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- Labels


def test_loss_for_each_kind_of_problem(frames):
    model = make_model()
    labels = torch.tensor([4, -100, 1])
    outputs = model(frames, labels=labels)
    assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    assert model.config.problem_type == "single_label_classification"
    assert_close(model(frames, labels=labels, return_dict=False)[0], outputs.loss)
    model.config.return_dict = False
    assert_close(model(frames, labels=labels)[0], outputs.loss)

    model = make_model()
    labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    outputs = model(frames, labels=labels)
    assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, labels))

    model = make_model(num_labels=1)
    labels = torch.tensor([0.5, -2.0, 7.0])
    outputs = model(frames, labels=labels)
    assert_close(outputs.loss, F.mse_loss(outputs.logits[:, 0], labels))
    model.loss_function = lambda labels, pooled_logits, config, **kwargs: 2 * F.l1_loss(pooled_logits[:, 0], labels)
    assert_close(model(frames, labels=labels).loss, 2 * F.l1_loss(outputs.logits[:, 0], labels))


def test_a_training_step_waits_for_no_number_of_a_device(frames):
    """Tensors on the meta device have no values, so reading one raises an error."""
    outputs = make_model().to("meta")(frames.to("meta"), labels=torch.zeros(3, dtype=torch.long, device="meta"))
    outputs.loss.backward()
    assert outputs.loss.shape == ()


@pytest.mark.parametrize(
    "labels", [torch.tensor([4, -100, 1]), torch.rand(3, 5), torch.rand(3)], ids=["class ids", "several", "regression"]
)
def test_losses_of_accumulated_batches_add_up(frames, labels):
    """As Trainer accumulates gradients, the losses of the micro-batches sum to the mean over the batch."""
    model = make_model(num_labels=1 if labels.dim() == 1 and labels.is_floating_point() else 5)
    count = labels.ne(-100).sum()
    parts = [
        model(clips, labels=part, num_items_in_batch=count).loss
        for clips, part in zip(frames.split([1, 2]), labels.split([1, 2]), strict=True)
    ]
    assert_close(sum(parts), model(frames, labels=labels).loss)


def test_dropout_acts_between_layers_and_before_the_classifiers(frames):
    model = make_model("resnet", classifier_dropout=1.0).train()
    expected = torch.stack([classifier.bias for classifier in model.classifiers]).mean(0).expand(3, 5)
    assert_close(model(frames).logits, expected)
    model = make_model("plain", dropout=1.0, num_hidden_layers=2)
    before = model(frames, output_hidden_states=True).hidden_states
    after = model.train()(frames, output_hidden_states=True).hidden_states
    layer = model.model.stacks[0].layers[1]
    assert before[2].std(dim=(0, 3, 4)).max() > 1e-3
    assert_close(after[2], layer(torch.zeros_like(after[1]), None, None, False)[0])
    assert after[1].any()


# --- What it refuses


def cache_of(frames, **overrides):
    cache = MinConvGRUCache()
    with torch.no_grad():
        make_model(**overrides)(frames, cache=cache)
    return cache


CLIPS = torch.zeros(2, 3, 3, 32, 32)
IDS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(CLIPS[:, :, :2]), r"\(B, T, 3, H, W\) .* got \(2, 3, 2, 32, 32\)"),
        (lambda m: m(CLIPS[:, :0]), "at least one clip and frame"),
        (lambda m: m(CLIPS[:0]), "at least one clip and frame"),
        (lambda m: m(CLIPS[0]), "a single clip needs a batch axis too"),
        (lambda m: m(CLIPS.to(torch.uint8)), "must be floating point, got torch.uint8"),
        (lambda m: m(), "exactly one of pixel_values_videos and pixel_values"),
        (lambda m: m(CLIPS, pixel_values=CLIPS), "exactly one of pixel_values_videos and pixel_values"),
        (lambda m: m(CLIPS, attention_mask=torch.ones(2, 4)), r"must have shape \(2, 3\) \(B, T\), got \(2, 4\)"),
        (lambda m: m(CLIPS, attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]])), "masks every frame of a clip"),
        (lambda m: m(CLIPS, labels=torch.tensor([0, 5])), r"between 0 and 4 \(or be -100\), got 0 to 5"),
        (lambda m: m(CLIPS, labels=torch.tensor([-1, 0])), "got -1 to 0"),
        (lambda m: m(CLIPS, cache=cache_of(CLIPS[:1])), "holds 1 clips, but the frames are from 2"),
        (lambda m: m(CLIPS, cache=cache_of(torch.zeros(2, 3, 3, 64, 64))), "or to frames of another size"),
        (lambda m: m(CLIPS, cache=cache_of(CLIPS, num_hidden_layers=3)), "it belongs to another model"),
        (lambda m: m(CLIPS, cache=cache_of(CLIPS, pooled_size=1)), "it belongs to another model"),
        (lambda m: m(CLIPS, cache=cache_of(CLIPS, stride=1)), "it belongs to another model"),
        (lambda m: m(CLIPS, cache=DynamicCache()), r"a DynamicCache; a stream of frames needs a MinConvGRUCache\(\)"),
    ],
)
def test_wrong_input_is_named(call, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        call(model)


def test_other_refusals():
    with pytest.raises(TypeError, match="got unexpected arguments: pixel_value"):
        make_model()(CLIPS, pixel_value=CLIPS)
    bidirectional = make_model(bidirectional=True)
    for options in ({"cache": MinConvGRUCache()}, {"use_cache": True}):
        with pytest.raises(ValueError, match="cannot continue from a cache"):
            bidirectional(CLIPS, **options)
    with pytest.raises(ValueError, match="Frames of 4 x 4 pixels leave a feature map of 1 x 1"):
        make_model("convnext", feature_pooling=True)(CLIPS[..., :4, :4])
    with pytest.raises(ValueError, match="maps of 1 x 1 are too small for a kernel"):
        make_model("convnext", feature_pooling=False)(CLIPS[..., :4, :4])


def test_a_refused_piece_leaves_the_stream_as_it_was(frames):
    model, cache = make_model(), MinConvGRUCache()
    with torch.no_grad():
        model(frames[:, :4], cache=cache)
        with pytest.raises(ValueError, match="another size"):
            model(torch.zeros(3, 2, 3, 64, 64), cache=cache)
        assert_close(model(frames[:, 4:], cache=cache).logits, model(frames).logits)


def test_a_timm_backbone_without_the_stage_is_refused():
    pytest.importorskip("timm", reason="the backbone comes from it")
    from transformers import TimmBackboneConfig

    with pytest.raises(ValueError, match=r"lacks one of the stages out_indices=\[9\]"):
        MinConvGRUModel(MinConvGRUConfig(backbone_config=TimmBackboneConfig(backbone="vgg16", out_indices=[9])))


def test_frames_may_be_called_pixel_values(frames):
    model = make_model()
    with torch.no_grad():
        assert_close(model(pixel_values=frames).logits, model(frames).logits)


@torch.no_grad()
def test_dropout_acts_between_the_layers_alone(frames):
    """At a probability of 1, the first layer sees the feature maps, and the second sees zeros."""
    model = make_model(dropout=1.0, num_hidden_layers=2, norm=False, residual=False).model.train()
    model.freeze_backbone()
    _, first, second = model(frames, output_hidden_states=True).hidden_states[:3]
    layers = model.stacks[0].layers
    kept, _ = layers[0](model(frames, output_hidden_states=True).hidden_states[0], None, None, False)
    assert_close(first, kept)
    nothing, _ = layers[1](torch.zeros_like(first), None, None, False)
    assert_close(second, nothing)


def test_the_backend_that_is_configured_runs(frames):
    with pytest.raises(ValueError, match="'log' scan works in float32"):
        make_model(scan_backend="log").bfloat16()(frames.bfloat16())


def test_a_backbone_unfrozen_in_evaluation_stays_in_evaluation(frames):
    model = make_model().model.eval()
    model.freeze_backbone()
    model.unfreeze_backbone()
    assert not model.backbone.training
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())
