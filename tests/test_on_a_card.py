"""Whole models on a CUDA card give the results of the CPU; the kernels are tested in test_scan_triton.py."""

import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, ResNetConfig

from mingru_hf import (
    Bidirectional,
    MinConv2dGRU,
    MinConvGRUCache,
    MinConvGRUConfig,
    MinConvGRUForVideoClassification,
    MinGRU,
)

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
    # The compiler gives this advice on cards from the A100 on.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

# Sums of a few hundred float32 numbers in a different order.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(autouse=True)
def _float32_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def on_card(model):
    return copy.deepcopy(model).to(DEVICE)


def assert_close(on_card, on_cpu):
    torch.testing.assert_close(on_card.cpu(), on_cpu, **CLOSE)


def test_logits_and_gradients(model, on_card, input_ids):
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    for net, device in ((model, "cpu"), (on_card, DEVICE)):
        ids = input_ids.to(device)
        net(ids, attention_mask=mask.to(device), labels=ids).loss.backward()
    with torch.no_grad():
        assert_close(on_card(input_ids.to(DEVICE)).logits, model(input_ids).logits)
    for (name, parameter), expected in zip(on_card.named_parameters(), model.parameters(), strict=True):
        largest = expected.grad.abs().max()
        assert (parameter.grad.cpu() - expected.grad).abs().max() <= 1e-3 * largest, name


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=lambda options: next(iter(options), "greedy"),
)
def test_generated_tokens(model, on_card, input_ids, options):
    ids = input_ids[:1] if "prompt_lookup_num_tokens" in options else input_ids
    mask = torch.ones_like(ids)
    mask[1:2, :8] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, **options}
    expected = model.generate(ids, attention_mask=mask, **settings)
    tokens = on_card.generate(ids.to(DEVICE), attention_mask=mask.to(DEVICE), **settings)
    assert torch.equal(tokens.cpu(), expected)


def test_continuous_batching(model, on_card):
    prompts = [torch.randint(1, 40, (length,)).tolist() for length in (3, 17, 9, 30)]
    settings = GenerationConfig(max_new_tokens=8, do_sample=False)
    config = ContinuousBatchingConfig(max_requests_per_batch=3, max_batch_tokens=16)
    expected, results = (
        [result.generated_tokens for result in net.generate_batch(prompts, settings, config).values()]
        for net in (model, on_card)
    )
    assert results == expected


@torch.no_grad()
def test_a_step_after_the_prompt(model, on_card, input_ids):
    cache = DynamicCache(config=on_card.config)
    logits = [on_card(ids, cache=cache).logits for ids in input_ids.to(DEVICE).split([7, 1, 1, 3], dim=1)]
    assert_close(torch.cat(logits, dim=1), model(input_ids).logits)


def test_training_in_16_bits(on_card, input_ids):
    ids = input_ids.to(DEVICE)
    optimizer = torch.optim.AdamW(on_card.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = on_card(ids, labels=ids, skip_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", ["text", "video", "bidirectional"])
def test_layers(kind):
    layer, x = {
        "text": (MinGRU(5, [8, 12], residual=True, norm=True), torch.randn(3, 40, 5)),
        "video": (MinConv2dGRU(3, [8, 6], kernel_sizes=3, paddings=1, norm=True), torch.randn(2, 9, 3, 10, 8)),
        "bidirectional": (Bidirectional(MinGRU(5, [8])), torch.randn(3, 40, 5)),
    }[kind]
    layer = layer.eval()
    on_card = copy.deepcopy(layer).to(DEVICE)
    out, states = layer(x)
    card_out, card_states = on_card(x.to(DEVICE))
    assert_close(card_out, out)
    for state, expected in zip(card_states, states, strict=True):
        assert_close(state, expected)


@torch.no_grad()
def test_video_as_a_clip_and_as_a_stream():
    backbone = ResNetConfig(hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", out_features=["stage1", "stage2"])
    model = MinConvGRUForVideoClassification(MinConvGRUConfig(backbone_config=backbone, num_labels=5)).eval()
    frames = torch.randn(2, 7, 3, 48, 40)
    expected = model(frames).logits
    model, frames = model.to(DEVICE), frames.to(DEVICE)
    assert_close(model(frames).logits, expected)
    cache = MinConvGRUCache()
    for frame in frames.split(1, dim=1):
        logits = model(frame, cache=cache).logits
    assert_close(logits, expected)


def test_a_mask_on_the_cpu(model, on_card, input_ids):
    """As for models in transformers, the attention mask may be on the CPU: all ones, or with padding."""
    for masked in (0, 3):
        mask = torch.ones_like(input_ids)
        mask[0, :masked] = 0
        with torch.no_grad():
            logits = on_card(input_ids.to(DEVICE), attention_mask=mask).logits
            assert_close(logits[0, masked:], model(input_ids, attention_mask=mask).logits[0, masked:])
