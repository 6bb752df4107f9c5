"""The text models: padding, packing, caching, generation, heads, saving, and parity with torch-mingru's models."""

import copy
import itertools
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
)

import mingru_hf
from mingru_hf import (
    MinGRUConfig,
    MinGRUForCausalLM,
    MinGRUForSequenceClassification,
    MinGRUForTokenClassification,
    MinGRUModel,
)
from mingru_hf.data.text import build_tokenizer

CONFIGS = Path(__file__).parent.parent / "scripts" / "configs"

# For float32 logits of a few units; matrix products with different numbers of rows round differently.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
CLASSIFIER = {**SIZES, "pad_token_id": 0, "num_labels": 3, "initializer_range": 0.3}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


def left_padded(ids, count):
    padding = torch.zeros(ids.shape[0], count, dtype=torch.long)
    return torch.cat([padding, ids], dim=1), torch.cat([padding, torch.ones_like(ids)], dim=1)


# --- Forward passes that must agree


def test_any_chunking_equals_the_whole(model, input_ids):
    whole = model(input_ids).logits
    for cuts in ([1] * 12, [5, 1, 6], [2, 10], [11, 1]):
        cache, parts = DynamicCache(config=model.config), []
        for part in input_ids.split(cuts, dim=1):
            parts.append(model(part, cache=cache).logits)
        assert_close(torch.cat(parts, dim=1), whole)


def test_padding_on_either_side_changes_nothing(model, input_ids):
    expected = model(input_ids).logits
    ids, mask = left_padded(input_ids, 4)
    assert_close(model(ids, attention_mask=mask).logits[:, 4:], expected)
    assert_close(
        model(ids.flip(1).roll(0), attention_mask=mask.flip(1)).logits[:, :12], model(input_ids.flip(1)).logits
    )


def test_rows_of_unequal_length_equal_each_alone(model, input_ids):
    lengths = [12, 1, 7]
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    ids = input_ids.masked_fill(~mask, 0)
    output = model(ids, attention_mask=mask.long(), use_cache=True)
    following = model(input_ids[:, :2], cache=output.cache).logits  # continues from each row's last real token
    for row, length in enumerate(lengths):
        alone = model(torch.cat([ids[row, :length], input_ids[row, :2]]).unsqueeze(0)).logits[0]
        assert_close(output.logits[row, :length], alone[:length])
        assert_close(following[row], alone[length:])


def test_masked_tokens_inside_a_row_are_skipped(model, input_ids):
    places = torch.rand(3, 18).argsort(dim=1)[:, :12].sort(dim=1).values
    ids = torch.zeros(3, 18, dtype=torch.long).scatter(1, places, input_ids)
    output = model(ids, attention_mask=(ids != 0).long(), use_cache=True)
    whole = model(torch.cat([input_ids, input_ids[:, :3]], dim=1)).logits
    assert_close(output.logits.gather(1, places.unsqueeze(-1).expand(-1, -1, 40)), whole[:, :12])
    assert_close(model(input_ids[:, :3], cache=output.cache).logits, whole[:, 12:])


def packing(marks, lengths):
    """Return how transformers' collators mark documents of these lengths in one row."""
    return {
        "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)},
        "seq_idx": {
            "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0)
        },
        "cu_seq_lens_q": {"cu_seq_lens_q": F.pad(torch.tensor(lengths).cumsum(0), (1, 0))},
    }[marks]


@pytest.mark.parametrize("marks", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packed_documents_equal_separate_ones(model, input_ids, marks):
    lengths = [5, 1, 1, 3, 12]
    documents = list(input_ids.flatten()[: sum(lengths)].split(lengths))
    packed = torch.cat(documents).unsqueeze(0)
    kwargs = packing(marks, lengths)
    separate = [model(document.unsqueeze(0)).logits[0] for document in documents]
    assert_close(model(packed, **kwargs).logits[0], torch.cat(separate))

    def gradients(logits):
        model.zero_grad()
        logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(torch.cat([model(document.unsqueeze(0)).logits[0] for document in documents]))
    for actual, reference in zip(gradients(model(packed, **kwargs).logits), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("marks", ["seq_idx", "cu_seq_lens_q"])
def test_a_packed_document_may_begin_with_padding(model, input_ids, marks):
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1]])
    kwargs = {
        "seq_idx": {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3]])},
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 3, 8, 9, 12])},
    }[marks]
    ids = input_ids[:1]
    logits = model(ids, attention_mask=mask, **kwargs).logits
    for document in (slice(0, 3), slice(5, 7), slice(10, 12)):
        assert_close(logits[:, document], model(ids[:, document]).logits)


def test_borders_outside_the_rows_count_for_nothing(model, input_ids):
    borders = torch.tensor([0, -100, 0, 24, 24, 36, 37, 99, 36], dtype=torch.int32)
    expected = model(input_ids).logits
    assert_close(model(input_ids, cu_seq_lens_q=borders).logits, expected)
    for wrong in (borders[None], borders[:8].view(4, 2)):
        with pytest.raises(ValueError, match=r"cu_seq_lens_q must have shape \(documents \+ 1,\), got"):
            model(input_ids, cu_seq_lens_q=wrong)


def test_masks_and_borders_on_the_meta_device(model, monkeypatch):
    monkeypatch.delenv("MINGRU_SCAN", raising=False)  # it may ask for kernels of another kind of device
    flags = {"attention_mask": torch.ones(2, 5), "position_ids": torch.zeros(2, 5, dtype=torch.long)}
    model, ids = model.to("meta"), torch.zeros(2, 5, dtype=torch.long, device="meta")
    for name, values in flags.items():
        assert model(ids, **{name: values.to("meta")}).logits.shape == (2, 5, 40)


@pytest.mark.parametrize("marks", ["seq_idx", "cu_seq_lens_q"])
def test_the_first_packed_document_continues_from_the_cache(model, input_ids, marks):
    ids = input_ids[:1]
    cache = model(ids[:, :4], use_cache=True).cache
    logits = model(ids[:, 4:], cache=cache, **packing(marks, [3, 5])).logits
    assert_close(logits[:, :3], model(ids[:, :7]).logits[:, 4:])
    assert_close(logits[:, 3:], model(ids[:, 7:]).logits)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}],
    ids=lambda options: "-".join(map(str, options.values())) or "greedy",
)
@pytest.mark.parametrize("marks", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_generate_continues_the_last_packed_document(model, input_ids, marks, options):
    options = {"max_new_tokens": 10, "pad_token_id": 0, "disable_compile": True, **options}
    ids = input_ids[:1]
    expected = model.generate(ids[:, 7:], **options)[:, 5:]
    generated = model.generate(ids, **packing(marks, [4, 3, 5]), **options)[:, 12:]
    assert torch.equal(generated, expected)
    if marks != "cu_seq_lens_q":  # whose offsets would have to be shifted, not padded
        mask = F.pad(torch.ones(1, 12), (2, 0))
        padded = {name: F.pad(tensor, (2, 0)) for name, tensor in packing(marks, [4, 3, 5]).items()}
        generated = model.generate(F.pad(ids, (2, 0)), attention_mask=mask, **padded, **options)[:, 14:]
        assert torch.equal(generated, expected)


@torch.no_grad()
@pytest.mark.parametrize("marks", ["seq_idx", "cu_seq_lens_q"])
def test_generate_goes_on_from_a_cache_with_packed_documents(model, input_ids, marks):
    options = {"max_new_tokens": 6, "pad_token_id": 0}
    ids = input_ids[:1]
    expected = model.generate(ids[:, 7:], **options)[:, 5:]
    cache = model(ids[:, :4], use_cache=True).cache
    generated = model.generate(ids, cache=copy.deepcopy(cache), **packing(marks, [2, 5, 5]), **options)
    assert torch.equal(generated[:, 12:], expected)
    new = model.generate(
        ids[:, 4:], cache=cache, attention_mask=torch.ones(1, 12), **packing(marks, [3, 5]), **options
    )
    assert torch.equal(new[:, 8:], expected)


@pytest.mark.parametrize("seq_idx", [torch.zeros(12), torch.zeros(1, 11), torch.zeros(2, 12)])
def test_seq_idx_of_another_shape_is_refused(model, input_ids, seq_idx):
    with pytest.raises(ValueError, match=r"seq_idx must have shape \(3, 12\) or \(1, 12\), got"):
        model(input_ids, seq_idx=seq_idx)


def test_packed_documents_in_chunks_of_any_border(model, input_ids):
    positions = torch.arange(4).repeat(3).unsqueeze(0)
    ids = input_ids[:1]
    whole = model(ids, position_ids=positions).logits
    for cuts in ([4, 8], [3, 6, 3], [1] * 12):
        cache, parts = DynamicCache(config=model.config), []
        for part, places in zip(ids.split(cuts, dim=1), positions.split(cuts, dim=1), strict=True):
            parts.append(model(part, position_ids=places, cache=cache).logits)
        assert_close(torch.cat(parts, dim=1), whole)


def test_embeddings_instead_of_ids(model, input_ids):
    embeds = model.get_input_embeddings()(input_ids)
    assert_close(model(inputs_embeds=embeds).logits, model(input_ids).logits)


def test_logits_to_keep_and_hidden_states(model, input_ids):
    output = model(input_ids, output_hidden_states=True)
    assert_close(model(input_ids, logits_to_keep=2).logits, output.logits[:, -2:])
    assert_close(model(input_ids, logits_to_keep=-2).logits, output.logits[:, 2:])  # as transformers slices
    widths = [model.config.hidden_size, *model.config.block_sizes]
    assert [state.shape for state in output.hidden_states] == [(3, 12, width) for width in widths]
    assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(input_ids, return_dict=False)[0].shape == (3, 12, 40)


def test_loss_is_that_of_the_next_token(model, input_ids):
    labels = input_ids.clone()
    labels[0, :5] = -100
    output = model(input_ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, input_ids, reentrant):
    model.train()
    model(input_ids, labels=input_ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    output = model(input_ids, labels=input_ids)
    assert output.cache is None
    output.loss.backward()
    for actual, reference in zip(model.parameters(), expected, strict=True):
        assert_close(actual.grad, reference)


@pytest.mark.parametrize("name", ["embedding_dropout", "residual_dropout", "block_dropout"])
def test_dropout_acts_in_training_and_where_its_module_is_switched_on(input_ids, name):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, initializer_range=0.3, **{name: 0.5})
    model = MinGRUForCausalLM(config)

    def varies():
        return not torch.equal(model(input_ids).logits, model(input_ids).logits)

    assert varies()
    model.eval()
    assert not varies()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:  # Monte-Carlo dropout
            module.train()
    assert varies()


@torch.no_grad()
def test_dropout_empties_the_branches_or_the_blocks(input_ids):
    """At 1, residual_dropout makes branches add nothing, and block_dropout makes all blocks but the last output 0."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "conv_kernel": 0, "initializer_range": 0.3}
    model = MinGRUModel(MinGRUConfig(**sizes, residual_dropout=1.0)).train()
    assert_close(model(input_ids).last_hidden_state, model.norm(model.embed_tokens(input_ids)))
    model = MinGRUModel(MinGRUConfig(**sizes, block_dropout=1.0)).train()
    embedded, *blocks, last = model(input_ids, output_hidden_states=True).hidden_states
    assert embedded.any()
    assert last.any()
    assert not any(block.any() for block in blocks)


def test_another_module_may_stand_in_the_place_of_an_mlp(input_ids):
    model = MinGRUForCausalLM(MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2)).eval()
    model.model.layers[0].mlp = torch.nn.Identity()
    ids = model.generate(input_ids, max_new_tokens=3, do_sample=False)
    assert_close(model(ids).logits[:, -1], model(ids, use_cache=False).logits[:, -1])
    assert torch.equal(ids[:, -1], model(ids[:, :-1]).logits[:, -1].argmax(-1))


def test_width_of_the_mlp():
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    widths = [MinGRUModel(MinGRUConfig(**sizes, intermediate_size=size)) for size in (24, None)]
    assert [model.layers[0].mlp.up_proj.out_features for model in widths] == [24, 64]


@torch.no_grad()
def test_autocast_keeps_a_float32_residual_and_16_bit_states(input_ids):
    """States that go straight into the residual sum are float32; those that a matrix product reads are bfloat16."""
    for use_out_proj, expected in ((False, torch.float32), (True, torch.bfloat16)):
        config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, expand=1, use_out_proj=use_out_proj)
        mixer = MinGRUModel(config).train().layers[0].mixer
        seen = []
        if use_out_proj:
            mixer.out_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = mixer(torch.randn(2, 5, 16), None, None, None, 0, "auto")
        assert (seen or [out.dtype]) == [expected]


@torch.no_grad()
def test_a_document_begins_in_a_single_step(model, input_ids):
    cache = model(input_ids, use_cache=True).cache
    logits = model(input_ids[:, :1], cache=cache, position_ids=torch.zeros(1, 1, dtype=torch.long)).logits
    assert_close(logits, model(input_ids[:, :1]).logits)


@torch.no_grad()
def test_a_crop_between_packed_documents_goes_on_with_the_first(model, input_ids):
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(input_ids, cache=cache, position_ids=torch.arange(12).unsqueeze(0) % 6)
    cache.crop(-6)
    logits = model(input_ids[:, 6:7], cache=cache).logits
    assert_close(logits, model(input_ids[:, :7]).logits[:, -1:])


@torch.no_grad()
@pytest.mark.parametrize("marks", ["position_ids", "seq_idx"])
def test_padding_starts_no_document(model, input_ids, marks):
    mask = (torch.arange(12) < 7).long().expand(3, -1)
    places = {"position_ids": torch.arange(12) * mask, "seq_idx": 1 - mask}
    cache = model(input_ids, attention_mask=mask, use_cache=True, **{marks: places[marks]}).cache
    mask = F.pad(mask, (0, 1), value=1)
    logits = model(input_ids[:, 7:8], attention_mask=mask, cache=cache).logits
    assert_close(logits, model(input_ids[:, :8]).logits[:, -1:])


@torch.no_grad()
def test_documents_told_in_two_ways_are_joined(model, input_ids):
    both = {"seq_idx": torch.tensor([[0] * 4 + [1] * 8]), "cu_seq_lens_q": torch.tensor([0, 9, 12, 21, 24, 33, 36])}
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]])
    expected = model(input_ids, position_ids=position_ids).logits
    assert_close(model(input_ids, **both).logits, expected)
    both["position_ids"] = torch.cat([torch.arange(9), torch.arange(3)]).unsqueeze(0)
    del both["cu_seq_lens_q"]
    assert_close(model(input_ids, **both).logits, expected)


def test_a_tagger_builds_no_cache_which_it_could_not_return(input_ids):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_labels=3)
    tagger, caches = MinGRUForTokenClassification(config).eval(), []
    tagger.model.register_forward_hook(lambda module, args, output: caches.append(output.cache))
    expected = tagger(input_ids).logits
    cache = DynamicCache(config=config)
    pieces = [tagger(piece, cache=cache).logits for piece in input_ids.split(4, dim=1)]
    assert_close(torch.cat(pieces, dim=1), expected)
    assert caches == [None] + [cache] * len(pieces)


def test_training_builds_no_cache_unless_asked(model, input_ids):
    assert model(input_ids).cache is not None
    model.train()
    assert model(input_ids).cache is None
    assert model(input_ids, use_cache=True).cache is not None
    model.activation_checkpointing_enable()  # runs forward twice, which would advance the state twice
    assert model(input_ids, use_cache=True).cache is None
    model.eval()
    assert model(input_ids, use_cache=True).cache is not None


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_scan_backends_agree_in_the_model(model, input_ids, backend):
    model.config.scan_backend = "reference"
    expected = model(input_ids).logits
    model.config.scan_backend = backend
    assert_close(model(input_ids).logits, expected)


def test_the_backend_of_the_configuration_is_what_runs(model, input_ids):
    model.config.scan_backend = "log"
    with pytest.raises(ValueError, match="The 'log' scan cannot reset"):
        model(input_ids, position_ids=torch.arange(6).repeat(2).unsqueeze(0))


def test_training_step_compiles_without_a_break(model, input_ids):
    model.train()
    eager = model(input_ids, labels=input_ids).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(input_ids, labels=input_ids).loss
    loss.backward()
    assert_close(loss, eager)
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_packed_and_padded_rows_compile_without_a_break(model, input_ids):
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    kwargs = {"attention_mask": mask, "position_ids": torch.arange(6).repeat(2).unsqueeze(0)}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(input_ids, **kwargs).logits[mask > 0], model(input_ids, **kwargs).logits[mask > 0])


# --- generate()

GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 10},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", GENERATION)
def test_cached_generation_equals_uncached(model, input_ids, mode):
    ids, mask = left_padded(input_ids, 2)
    mask[1, :5] = 0  # rows of unequal length
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        outputs.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=20,
                repetition_penalty=1.3,
                use_cache=use_cache,
                output_scores=True,
                return_dict_in_generate=True,
                **GENERATION[mode],
            )
        )
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert_close(torch.stack(outputs[0].scores), torch.stack(outputs[1].scores))
    assert len(outputs[0].sequences[0].unique()) > 5


def test_padded_rows_generate_what_they_generate_alone(model, input_ids):
    ids, mask = left_padded(input_ids[:1, :7], 5)
    batch = torch.cat([ids, input_ids[1:]])
    mask = torch.cat([mask, torch.ones_like(input_ids[1:])])
    together = model.generate(batch, attention_mask=mask, max_new_tokens=15, repetition_penalty=1.3)
    alone = model.generate(input_ids[:1, :7], max_new_tokens=15, repetition_penalty=1.3)
    assert torch.equal(together[0, 12:], alone[0, 7:])


def test_turns_go_on_from_the_returned_cache(model, input_ids):
    settings = {"max_new_tokens": 6, "repetition_penalty": 1.3}
    first = model.generate(input_ids, return_dict_in_generate=True, **settings)
    following = torch.randint(1, 40, (3, 4))
    full = torch.cat([first.sequences, following], dim=1)
    expected = model.generate(full, **settings)
    assert torch.equal(model.generate(full, cache=first.cache, **settings), expected)


def test_a_turn_with_the_new_ids_alone(model, input_ids):
    settings = {"max_new_tokens": 6}
    first = model.generate(input_ids, return_dict_in_generate=True, **settings)
    following = torch.randint(1, 40, (3, 4))
    expected = model.generate(torch.cat([first.sequences, following], dim=1), **settings)
    # The last token of the first turn has not been read yet: it comes first.
    new = torch.cat([first.sequences[:, -1:], following], dim=1)
    mask = torch.ones(3, first.cache.get_seq_length() + new.shape[1], dtype=torch.long)
    continued = model.generate(new, attention_mask=mask, cache=first.cache, **settings)
    assert torch.equal(continued[:, -6:], expected[:, -6:])


@pytest.mark.parametrize("use_cache", [False, True])
def test_positions_of_too_few_tokens_are_refused(model, input_ids, use_cache):
    with pytest.raises(ValueError, match="position_ids has 3 columns, expected one for each of the 12 tokens"):
        model.generate(input_ids, position_ids=torch.arange(3)[None], use_cache=use_cache, max_new_tokens=2)


def test_positions_of_the_new_tokens_suffice_beside_a_cache(model, input_ids):
    def generate(positions):
        cache = model(input_ids[:, :8], use_cache=True).cache
        return model.generate(input_ids, position_ids=positions[None], cache=cache, max_new_tokens=4)

    positions = torch.tensor([*range(8), 8, 0, 1, 2])  # a document starts among the new tokens
    assert torch.equal(generate(positions[8:]), generate(positions))
    assert not torch.equal(generate(positions[8:]), generate(torch.arange(12)))
    with pytest.raises(ValueError, match="position_ids has 3 columns, expected one for each of the 4 tokens"):
        generate(positions[9:])


@pytest.mark.parametrize("seen", [12, 10])
@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 4}], ids=str)
def test_a_cache_that_has_seen_all_ids_is_refused(model, input_ids, seen, settings):
    """transformers would slice [:, -0:], and the model would read the whole prompt a second time."""
    cache = model(input_ids[:, :12], use_cache=True).cache
    ids = input_ids[:, :seen]
    with pytest.raises(ValueError, match="has seen 12 tokens, and the ids passed with it contain no new ones"):
        model.generate(ids, cache=cache, max_new_tokens=2, **settings)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="The cache has seen 12 tokens"):
        model.generate(inputs_embeds=embeds, cache=cache, max_new_tokens=2)
    assert cache.get_seq_length() == 12  # nothing was consumed
    expected = model.generate(torch.cat([input_ids, input_ids[:, :1]], dim=1), max_new_tokens=2)
    assert torch.equal(
        model.generate(torch.cat([input_ids, input_ids[:, :1]], dim=1), cache=cache, max_new_tokens=2), expected
    )


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_prefill_in_chunks(model, input_ids, chunk):
    expected = model.generate(input_ids, max_new_tokens=8, repetition_penalty=1.3)
    actual = model.generate(input_ids, max_new_tokens=8, repetition_penalty=1.3, prefill_chunk_size=chunk)
    assert torch.equal(actual, expected)
    embeds = model.get_input_embeddings()(input_ids)
    for ids in ({}, {"input_ids": input_ids}):
        with pytest.raises(ValueError, match="prefill_chunk_size splits input_ids into chunks and cannot split"):
            model.generate(**ids, inputs_embeds=embeds, max_new_tokens=8, prefill_chunk_size=chunk)


def test_prompt_lookup_gives_the_greedy_tokens(model, input_ids):
    ids = input_ids[:1].repeat(1, 2)
    expected = model.generate(ids, max_new_tokens=20, repetition_penalty=1.1)
    assert torch.equal(
        model.generate(ids, max_new_tokens=20, repetition_penalty=1.1, prompt_lookup_num_tokens=3), expected
    )


@pytest.mark.parametrize(
    "cache_implementation",
    [
        "static",
        pytest.param(
            "offloaded",
            marks=pytest.mark.skipif(
                torch.version.cuda is not None and not torch.cuda.is_available(),
                reason="transformers makes a stream on the card that this torch is built for",
            ),
        ),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_other_cache_implementations_give_the_same_tokens(model, input_ids, cache_implementation, settings):
    ids, mask = left_padded(input_ids, 2)
    mask[1, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "repetition_penalty": 1.3, **settings}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation=cache_implementation, **settings), expected)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=40)])
@pytest.mark.parametrize("chunk", [None, 11])
def test_padding_at_the_end_of_a_prompt_is_skipped_in_a_chunk_of_one_token(model, input_ids, make, chunk):
    mask = torch.ones_like(input_ids)
    mask[1, 7:] = 0
    cache = make(config=model.config)
    model.generate(input_ids, attention_mask=mask, max_new_tokens=1, cache=cache, prefill_chunk_size=chunk)
    alone = model(input_ids[1:2, :7], use_cache=True).cache
    assert_close(cache.layers[-1].state[1:2], alone.layers[-1].state)
    # The next turn brings one token, which is padding for that row.
    ids = torch.cat([input_ids, torch.tensor([[5], [0], [6]])], dim=1)
    mask = torch.cat([mask, torch.tensor([[1], [0], [1]])], dim=1)
    model.generate(ids, attention_mask=mask, max_new_tokens=1, cache=cache)
    assert_close(cache.layers[-1].state[1:2], alone.layers[-1].state)


@torch.no_grad()
def test_decoding_step_with_a_static_cache_compiles_once(model, input_ids):
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(input_ids[:, :4], cache=cache)
    steps = [compiled(input_ids[:, t : t + 1], cache=cache).logits for t in range(4, 12)]
    assert_close(torch.cat(steps, dim=1), model(input_ids).logits[:, 4:])
    assert len(graphs) == 1
    assert cache.get_seq_length() == 12
    cache.reset()
    assert_close(model(input_ids, cache=cache).logits, model(input_ids).logits)


def test_quantized_cache_is_refused(model, input_ids):
    with pytest.raises(ValueError, match=r"only full attention layers.*mingru"):
        model.generate(input_ids, max_new_tokens=2, cache_implementation="quantized")


@pytest.mark.parametrize("roles", ["assisted by its like", "assisted by GPT-2", "assistant of GPT-2"])
def test_assisted_decoding_gives_the_greedy_tokens(model, input_ids, roles):
    other = copy.deepcopy(model)
    for parameter in other.parameters():  # agrees with the model often, but not always
        parameter.data += 0.02 * torch.randn_like(parameter)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()
    main, assistant = {
        "assisted by its like": (model, other),
        "assisted by GPT-2": (model, gpt2),
        "assistant of GPT-2": (gpt2, model),
    }[roles]
    for each in (main, assistant):
        each.generation_config.update(eos_token_id=39, pad_token_id=0, bos_token_id=1)
    ids = input_ids[:1]
    settings = {"max_new_tokens": 20, "repetition_penalty": 1.3}
    expected = main.generate(ids, **settings)
    assert torch.equal(main.generate(ids, assistant_model=assistant, **settings), expected)


def test_early_exit_drafts_the_greedy_tokens_or_says_why_not(model, input_ids):
    model.generation_config.update(eos_token_id=39, pad_token_id=0)
    ids = input_ids[:1]
    settings = {"max_new_tokens": 20, "repetition_penalty": 1.3}
    expected = model.generate(ids, **settings)
    if model.config.hidden_sizes is None:
        assert torch.equal(model.generate(ids, assistant_early_exit=1, **settings), expected)
    else:
        with pytest.raises(ValueError, match="Early exit after 1 blocks needs block 1 to be as wide as the last"):
            model.generate(ids, max_new_tokens=20, assistant_early_exit=1)


def test_blocks_are_renumbered_after_one_is_removed(input_ids):
    """The cache's first layer tells whether the cache has seen a token."""
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=3, initializer_range=0.3)
    model = MinGRUForCausalLM(config).eval()
    del model.model.layers[0]
    whole = model(input_ids, use_cache=False).logits
    with pytest.raises(
        ValueError, match=r"layer_idx \[1, 2\], but the cache has 3 .*num_hidden_layers, and each block's layer_idx"
    ):
        model(input_ids)
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"layer_idx \[1, 2\], but the cache has 2"):
        model(input_ids)
    for i, block in enumerate(model.model.layers):
        block.layer_idx = i
    cache = model(input_ids[:, :7], use_cache=True).cache
    torch.testing.assert_close(model(input_ids[:, 7:], cache=cache).logits, whole[:, 7:], **CLOSE)


def test_early_exit_between_blocks_of_one_width(input_ids):
    sizes = {"hidden_size": 16, "hidden_sizes": [24, 24, 24], "conv_kernel": 0}
    model = MinGRUForCausalLM(MinGRUConfig(vocab_size=40, initializer_range=0.3, **sizes)).eval()
    settings = {"max_new_tokens": 10, "repetition_penalty": 1.3, "eos_token_id": 39, "pad_token_id": 0}
    expected = model.generate(input_ids[:1], **settings)
    assert torch.equal(model.generate(input_ids[:1], assistant_early_exit=1, **settings), expected)


def test_generation_from_embeddings(model, input_ids):
    ids, mask = left_padded(input_ids, 2)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "repetition_penalty": 1.0}
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **settings)[:, ids.shape[1] :]
    for use_cache in (True, False):
        assert torch.equal(model.generate(inputs_embeds=embeds, use_cache=use_cache, **settings), expected)


def test_generation_from_nothing(model):
    model.generation_config.bos_token_id = 1
    assert model.generate(max_new_tokens=3).shape == (1, 4)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=r"(is|are) empty"):
            model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=3, use_cache=use_cache)


def test_old_cache_argument_still_works_with_a_warning(model, input_ids):
    cache = model(input_ids[:, :8], use_cache=True).cache
    with pytest.warns(FutureWarning, match="past_key_values"):
        logits = model(input_ids[:, 8:], past_key_values=cache).logits
    assert_close(logits, model(input_ids).logits[:, 8:])
    with pytest.warns(FutureWarning, match="past_key_values"):
        inputs = model.prepare_inputs_for_generation(input_ids[:, 8:], past_key_values=cache)
    assert inputs["cache"] is cache


# --- Heads


def test_sequence_classification_reads_the_last_real_token(input_ids):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_labels=3, initializer_range=0.3)
    classifier = MinGRUForSequenceClassification(config).eval()
    alone = classifier(input_ids[:1, :7]).logits
    ids, mask = left_padded(input_ids[:1, :7], 5)
    assert_close(classifier(ids, attention_mask=mask).logits, alone)
    right, right_mask = torch.cat([ids[:, 5:], ids[:, :5]], dim=1), torch.cat([mask[:, 5:], mask[:, :5]], dim=1)
    assert_close(classifier(right, attention_mask=right_mask).logits, alone)
    with pytest.raises(ValueError, match="where each row ends"):
        classifier(input_ids)
    classifier.config.pad_token_id = 0
    assert_close(classifier(right).logits, alone)
    last = torch.ones_like(ids)  # without a mask, all tokens are read
    assert_close(classifier(ids).logits, classifier(ids, attention_mask=last).logits)
    assert_close(classifier(inputs_embeds=classifier.get_input_embeddings()(input_ids[:1, :7])).logits, alone)


def make_classifier():
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_labels=3, initializer_range=0.3)
    return MinGRUForSequenceClassification(config).eval()


@torch.no_grad()
def test_a_row_that_has_ended_is_not_classified_at_its_padding(input_ids):
    classifier, mask, rows = make_classifier(), torch.ones_like(input_ids), torch.tensor([0, 2])
    mask[1, 5:] = 0
    cache = classifier(input_ids[:, :6], attention_mask=mask[:, :6], use_cache=True).cache
    with pytest.raises(ValueError, match="only padding in this call"):
        classifier(input_ids[:, 6:], attention_mask=mask, cache=cache)
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, T\), got \(12,\)"):
        classifier(input_ids[0], attention_mask=mask)
    cache.batch_select_indices(rows)  # the refused call has not advanced the cache
    logits = classifier(input_ids[rows, 6:], attention_mask=mask[rows], cache=cache).logits
    assert_close(logits, classifier(input_ids, attention_mask=mask).logits[rows])


@torch.no_grad()
def test_a_row_that_begins_late_is_classified_in_pieces(input_ids):
    classifier, cache = make_classifier(), None
    ids, mask = left_padded(input_ids[:1], 6)
    for stop in range(3, ids.shape[1] + 1, 3):
        outputs = classifier(ids[:, stop - 3 : stop], attention_mask=mask[:, :stop], cache=cache, use_cache=True)
        cache = outputs.cache
    assert_close(outputs.logits, classifier(input_ids[:1]).logits)


def test_a_classifier_has_gradients_for_each_sample(input_ids):
    classifier, labels = make_classifier(), torch.tensor([0, 2, 1])
    parameters = {name: p.detach() for name, p in classifier.named_parameters()}

    def loss(parameters, ids, label):
        inputs = {"input_ids": ids[None], "labels": label[None], "use_cache": False}
        return torch.func.functional_call(classifier, parameters, (), inputs).loss

    gradients = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, input_ids, labels)
    classifier(input_ids[1:2], labels=labels[1:2]).loss.backward()
    assert_close(gradients["score.weight"][1], classifier.score.weight.grad)


def test_a_wrong_label_does_not_move_the_state_on(input_ids):
    classifier = make_classifier()
    cache = DynamicCache(config=classifier.config)
    with pytest.raises(ValueError, match="Labels must lie between 0 and 2"):
        classifier(input_ids, attention_mask=torch.ones_like(input_ids), cache=cache, labels=torch.tensor([0, 3, 1]))
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (3, torch.tensor([0, 2, 1]), "single_label_classification"),
        (3, torch.rand(3, 3), "multi_label_classification"),
        (1, torch.rand(3), "regression"),
    ],
)
def test_sequence_classification_losses(input_ids, num_labels, labels, problem):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_labels=num_labels, pad_token_id=0)
    output = MinGRUForSequenceClassification(config)(input_ids, labels=labels)
    assert output.logits.shape == (3, num_labels)
    expected = {
        "single_label_classification": lambda: F.cross_entropy(output.logits, labels),
        "multi_label_classification": lambda: F.binary_cross_entropy_with_logits(output.logits, labels),
        "regression": lambda: F.mse_loss(output.logits.squeeze(), labels),
    }[problem]()
    assert_close(output.loss, expected)


@pytest.mark.parametrize(
    ("model_class", "labels"),
    [
        (MinGRUForSequenceClassification, torch.tensor([0, 2, 1])),
        (MinGRUForSequenceClassification, torch.rand(3, 3)),
        (MinGRUForTokenClassification, torch.arange(36).reshape(3, 12) % 3),
    ],
)
def test_losses_of_accumulated_batches_add_up(input_ids, model_class, labels):
    """As Trainer accumulates gradients, the losses of the micro-batches sum to the mean over the batch."""
    if labels.shape == input_ids.shape:
        labels = labels.clone()
        labels[0, :7] = -100
    model = model_class(MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_labels=3, pad_token_id=0))
    count = labels.ne(-100).sum()
    parts = [
        model(ids, labels=part, num_items_in_batch=count).loss
        for ids, part in zip(input_ids.split([1, 2]), labels.split([1, 2]), strict=True)
    ]
    assert_close(sum(parts), model(input_ids, labels=labels).loss)


@pytest.mark.parametrize(
    ("model_class", "labels"),
    [
        (MinGRUForSequenceClassification, torch.tensor([0, 2, 1])),
        (MinGRUForSequenceClassification, torch.eye(3)),
        (MinGRUForTokenClassification, torch.arange(36).reshape(3, 12) % 3),
    ],
)
def test_losses_of_a_16_bit_model_are_float32(input_ids, model_class, labels):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_labels=3, pad_token_id=0)
    output = model_class(config).bfloat16()(input_ids, labels=labels)
    logits = output.logits.float().view(-1, 3)
    loss = F.binary_cross_entropy_with_logits if labels.is_floating_point() else F.cross_entropy
    expected = loss(logits, labels if labels.is_floating_point() else labels.flatten())
    torch.testing.assert_close(output.loss, expected)


class Tagger(MinGRUForTokenClassification):
    """A subclass for which transformers, going by the class name, would use a language model's loss."""


class Judge(MinGRUForSequenceClassification):
    """The same for sequence classification."""


@pytest.mark.parametrize("model_class", [Tagger, Judge])
def test_subclasses_keep_the_loss_unless_they_bring_one(input_ids, model_class):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_labels=3, pad_token_id=0)
    model, labels = model_class(config), input_ids % 3 if model_class is Tagger else torch.tensor([0, 2, 1])
    output = model(input_ids, labels=labels)
    assert_close(output.loss, F.cross_entropy(output.logits.reshape(-1, 3), labels.flatten()))
    model.loss_function = lambda **kwargs: kwargs["labels"].sum()
    assert model(input_ids, labels=labels).loss == labels.sum()


def test_an_unknown_problem_type_is_named(input_ids):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, pad_token_id=0, problem_type="ranking")
    with pytest.raises(ValueError, match="ranking"):
        MinGRUForSequenceClassification(config)(input_ids, labels=torch.tensor([0, 1, 1]))


def test_what_a_bert_tokenizer_returns_is_taken(input_ids):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_labels=3, pad_token_id=0)
    for model in (MinGRUForSequenceClassification(config), MinGRUForCausalLM(config)):
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        expected = model(**inputs).logits
        assert_close(model(**inputs, token_type_ids=torch.zeros_like(input_ids)).logits, expected)


def test_token_classification(input_ids):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_labels=5)
    labels = torch.randint(0, 5, (3, 12))
    labels[0, 3] = -100
    output = MinGRUForTokenClassification(config)(input_ids, labels=labels)
    assert output.logits.shape == (3, 12, 5)
    assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))


# --- Saving and loading


@pytest.mark.parametrize("tied", [False, True])
def test_saved_models_load_through_the_auto_classes(tmp_path, input_ids, tied):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, tie_word_embeddings=tied, num_labels=4)
    model = MinGRUForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MinGRUForCausalLM
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, rtol=0, atol=0)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MinGRUModel
    torch.testing.assert_close(
        base(input_ids).last_hidden_state, model.model(input_ids).last_hidden_state, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("auto", "expected"),
    [
        (AutoModelForSequenceClassification, MinGRUForSequenceClassification),
        (AutoModelForTokenClassification, MinGRUForTokenClassification),
    ],
)
def test_heads_load_through_the_auto_classes(tmp_path, input_ids, auto, expected):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_labels=4, pad_token_id=0)
    model = expected(config).eval()
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is expected
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, rtol=0, atol=0)


def test_saved_weights_give_the_same_numbers_in_another_process(tmp_path, model, input_ids):
    model.save_pretrained(tmp_path)
    tokens = model.generate(input_ids, max_new_tokens=5)
    torch.save({"ids": input_ids, "tokens": tokens}, tmp_path / "expected.pt")
    code = f"""
import torch, mingru_hf
from transformers import AutoModelForCausalLM
data = torch.load("expected.pt")
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert torch.equal(model.generate(data["ids"], max_new_tokens=5), data["tokens"])
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# --- One class for the paper's model and torch-mingru's


class TorchMinGRUText(nn.Module):
    """torch-mingru's text model over our layers: `emb`, `rnn`, `ln` without bias, `fc`."""

    def __init__(self, config):
        super().__init__()
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rnn = mingru_hf.MinGRU(config.hidden_size, config.hidden_sizes, norm=True, residual=True)
        self.ln = nn.LayerNorm(config.hidden_sizes[-1], bias=False) if config.use_final_norm else nn.Identity()
        self.fc = nn.Linear(config.hidden_sizes[-1], config.vocab_size)

    def forward(self, ids):
        return self.fc(self.ln(self.rnn(self.emb(ids))[0]))


@pytest.mark.parametrize("name", ["text_torch_mingru", "selective_copying"])
def test_torch_mingrus_models_are_expressed_exactly(name):
    config = MinGRUConfig.from_json_file(CONFIGS / f"{name}.json")
    config.vocab_size = 50
    model = MinGRUForCausalLM(config).double().eval()
    theirs = TorchMinGRUText(config).double()
    renamed = {}
    for key, value in theirs.state_dict().items():
        key = key.replace("emb.", "model.embed_tokens.").replace("rnn.layers.", "model.layers.")
        key = key.replace("gate_hidden", "mixer.gate_hidden").replace("ln.", "model.norm.").replace("fc.", "lm_head.")
        renamed[key] = value
    model.load_state_dict(renamed)  # strict: every parameter on both sides
    ids = torch.randint(0, 50, (2, 20))
    torch.testing.assert_close(model(ids).logits, theirs(ids))


def test_the_papers_block_written_by_hand(input_ids):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, initializer_range=0.3)
    model = MinGRUForCausalLM(config).double().eval()
    x = model.model.embed_tokens(input_ids)
    for block in model.model.layers:
        conv = block.conv.conv
        x = x + F.conv1d(F.pad(x.mT, (3, 0)), conv.weight, conv.bias, groups=16).mT
        projected = block.mixer.gate_hidden(block.norm(x))
        h, states = torch.full((3, 32), 0.5, dtype=torch.double), []
        for t in range(12):
            z, v = torch.sigmoid(projected[:, t, :32]), projected[:, t, 32:]
            h = (1 - z) * h + z * torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
            states.append(h)
        x = x + block.mixer.out_proj(torch.stack(states, dim=1))
        x = x + block.mlp.down_proj(F.gelu(block.mlp.up_proj(block.mlp_norm(x))))
    torch.testing.assert_close(model(input_ids).logits, model.lm_head(model.model.norm(x)))


# --- Wrong input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.randn(1, 2, 16)}, "exactly one"),
        ({"input_ids": torch.tensor([[3, 40]])}, "between 0 and 39, got 3 to 40"),
        ({"input_ids": torch.tensor([3, 4])}, r"input_ids must have shape \(B, T\)"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, "inputs are empty"),
        ({"inputs_embeds": torch.randn(1, 2, 17)}, "inputs_embeds must have shape"),
        ({"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 4)}, "attention_mask must"),
        ({"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(1, 5)}, "attention_mask must"),
        ({"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 6)}, "attention_mask must"),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 1, 5, 5)},
            "attention_mask must have shape",
        ),
        (
            {"input_ids": torch.ones(2, 1, dtype=torch.long), "attention_mask": torch.ones(2, 1, 1, 1)},
            "attention_mask must have shape",
        ),
        ({"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2)}, "attention_mask must"),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "position_ids": torch.arange(4)[None]},
            "position_ids must",
        ),
        (
            {"input_ids": torch.ones(1, 5, dtype=torch.long), "position_ids": torch.arange(4)[None]},
            r"position_ids must have shape \(1, 5\), got \(1, 4\)",
        ),
    ],
)
def test_wrong_input_is_named(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model(**kwargs)


def test_borders_of_documents_in_several_rows(model):
    """The offsets in cu_seq_lens_q continue from row to row, as for flash attention."""
    ids = torch.randint(1, 40, (3, 7))
    packed = model(ids, cu_seq_lens_q=torch.tensor([0, 3, 7, 14, 15, 20, 21])).logits
    for row, borders in enumerate(([0, 3, 7], [0, 7], [0, 1, 6, 7])):
        for first, last in itertools.pairwise(borders):
            assert_close(packed[row, first:last], model(ids[row : row + 1, first:last]).logits[0])
    cache = model(ids, use_cache=True).cache  # the first document of each row continues
    whole = model(torch.cat([ids, ids], dim=1)).logits[:, 7:]
    assert_close(model(ids, cache=cache, cu_seq_lens_q=torch.tensor([0, 7, 14, 21])).logits, whole)


def test_what_tokenizers_and_older_code_pass_on_is_accepted(model, input_ids):
    expected = model(input_ids).logits
    extra = {"cache_position": torch.arange(12), "special_tokens_mask": torch.zeros_like(input_ids)}
    assert_close(model(input_ids, **extra).logits, expected)


def test_unknown_arguments_are_not_swallowed(model, input_ids):
    with pytest.raises(TypeError, match="attention_maks"):
        model(input_ids, attention_maks=torch.ones_like(input_ids))
    model(input_ids, head_mask=None)  # as old programs pass it; None asks for nothing


def test_nothing_is_logged_while_saving_and_loading(tmp_path, model, caplog):
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not caplog.records


def test_generation_stops_at_strings():
    """generate() needs the tokenizer for stop strings, but the model does not take it as an argument."""
    tokenizer = build_tokenizer("char", ["abcdefg.\n"])
    model = MinGRUForCausalLM(MinGRUConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2)).eval()
    ids = tokenizer("abc", return_tensors="pt").input_ids
    options = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": [tokenizer.unk_token_id]}
    free = tokenizer.decode(model.generate(ids, **options)[0])
    stop = free[3:5]
    stopped = model.generate(ids, **options, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(stopped[0]) == free[: 3 + free[3:].index(stop) + 2]


@pytest.mark.parametrize("make", [MinGRUForCausalLM, AutoModelForCausalLM.from_config], ids=["class", "auto"])
@pytest.mark.parametrize("initializer_range", [None, 0.05])
def test_new_weights_have_the_deviation_they_should(make, initializer_range):
    sizes = {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 1, "conv_kernel": 4}
    model = make(MinGRUConfig(**sizes, initializer_range=initializer_range))
    block = model.model.layers[0]
    # Uniform within +-1 / sqrt(taps), as in PyTorch for one input channel per group.
    assert block.conv.conv.weight.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)
    assert block.conv.conv.weight.abs().max().item() <= 0.5
    for linear in (block.mixer.gate_hidden, block.mixer.out_proj, block.mlp.down_proj):
        expected = initializer_range or linear.in_features**-0.5
        assert linear.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert not linear.bias.any()
    model.resize_token_embeddings(128, mean_resizing=False)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        for rows in weight.split(64):
            assert rows.std().item() == pytest.approx(initializer_range or 0.02, rel=0.05)


@pytest.mark.parametrize(("depth", "residual", "shrinks"), [(6, True, False), (9, True, True), (9, False, False)])
def test_the_convolutions_of_deep_models_begin_smaller(depth, residual, shrinks):
    config = MinGRUConfig(vocab_size=64, hidden_size=256, num_hidden_layers=depth, use_mlp=False, residual=residual)
    for i, block in enumerate(MinGRUModel(config).layers):
        expected = 0.5 / (i + 1) ** 0.5 if shrinks else 0.5
        assert block.conv.conv.weight.abs().max().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("make", [MinGRUForCausalLM, AutoModelForCausalLM.from_config], ids=["class", "auto"])
def test_a_new_state_remembers_as_long_as_asked(make, tmp_path):
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "expand": 64}
    for layer in make(MinGRUConfig(**sizes)).model.layers:
        assert not layer.mixer.gate_hidden.bias.any()
    model = make(MinGRUConfig(**sizes, initial_memory=256))
    gates, candidates = zip(*(layer.mixer.gate_hidden.bias.chunk(2) for layer in model.model.layers), strict=True)
    assert not torch.stack(candidates).any()
    memory = 1 / torch.sigmoid(torch.stack(gates)) - 1  # z = 1 / (1 + m)
    assert 1 <= memory.min() < 1.1
    assert 230 < memory.max() <= 256
    # Log-uniform: as many channels remember up to 16 steps as remember 16 to 256.
    assert (memory < 16).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(gates[0], gates[1])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # loaded weights are not drawn again
    assert again.config.initial_memory == 256
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_a_single_token_is_no_exception(model, input_ids):
    """A single token takes a shorter code path, which must know the same settings and arguments."""
    cache = model(input_ids, use_cache=True).cache
    model.config.output_hidden_states = True
    states = model(input_ids[:, :1], cache=cache).hidden_states
    assert [tuple(state.shape[:2]) for state in states] == [(3, 1)] * 4
    with pytest.raises(TypeError, match="no_such_argument"):
        model(input_ids[:, :1], cache=cache, no_such_argument=1)


@torch.no_grad()
def test_logits_to_keep_may_be_places(model, input_ids):
    places = torch.tensor([2, 7])
    assert_close(model(input_ids, logits_to_keep=places).logits, model(input_ids).logits[:, places])


@torch.no_grad()
def test_caches_and_embeddings_that_do_not_fit_are_refused(model, input_ids):
    one_row = model(input_ids[:1], use_cache=True).cache
    with pytest.raises(ValueError, match="cache holds 1 rows, but the inputs have 3"):
        model(input_ids, cache=one_row)
    shallow = copy.deepcopy(one_row)
    shallow.layers.pop()
    with pytest.raises(ValueError, match="no state for each of this model's 3 blocks"):
        model(input_ids[:1], cache=shallow)
    with pytest.raises(ValueError, match="inputs_embeds must have shape"):
        model(inputs_embeds=torch.randn(5, model.config.hidden_size))


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_kernel": 0}, "only one of the two has a convolution"),
        ({"conv_kernel": 3}, r"a window of \(2, 8\) .* needs \(3, 8\): it belongs to another model"),
        ({"hidden_size": 16}, r"a window of \(3, 16\) .* needs \(3, 8\): it belongs to another model"),
        ({"expand": 3}, r"h0 must have shape \(3, 1, 16\)"),
    ],
)
def test_a_cache_of_a_model_of_other_sizes_is_refused(input_ids, change, message):
    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1}
    theirs = MinGRUForCausalLM(MinGRUConfig(**sizes | change))(input_ids, use_cache=True).cache
    with pytest.raises(ValueError, match=message):
        MinGRUForCausalLM(MinGRUConfig(**sizes))(input_ids, cache=theirs)


@torch.no_grad()
def test_no_cache_where_the_configuration_says_so(model, input_ids):
    model.config.use_cache = False
    assert model(input_ids).cache is None
    assert model(input_ids, use_cache=True).cache is not None


@torch.no_grad()
def test_sequence_classification_goes_on_from_its_cache(input_ids):
    model = MinGRUForSequenceClassification(MinGRUConfig(**CLASSIFIER)).eval()
    first = model(input_ids[:, :7], use_cache=True)
    assert_close(model(input_ids[:, 7:], cache=copy.deepcopy(first.cache)).logits, model(input_ids).logits)
    assert model(input_ids, use_cache=False).cache is None
    mask = torch.ones_like(input_ids)
    mask[1, :3] = mask[2, 10:] = 0  # in tokens that the cache has seen, and in new ones
    first = model(input_ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
    goes_on = model(input_ids[:, 7:], attention_mask=mask, cache=first.cache).logits
    assert_close(goes_on, model(input_ids, attention_mask=mask).logits)


@torch.no_grad()
@pytest.mark.parametrize("model_class", [MinGRUForSequenceClassification, MinGRUForTokenClassification])
def test_dropout_in_front_of_the_classifier(input_ids, model_class):
    model = model_class(MinGRUConfig(**CLASSIFIER, classifier_dropout=1.0)).train()
    scores = model(input_ids).logits
    assert_close(scores, model.score.bias.expand_as(scores) if model.score.bias is not None else 0 * scores)


@torch.no_grad()
def test_rows_of_embeddings_end_at_the_last_token(input_ids):
    """Embeddings do not show where the padding is."""
    model = MinGRUForSequenceClassification(MinGRUConfig(**{**CLASSIFIER, "pad_token_id": None})).eval()
    embeddings = model.model.embed_tokens(input_ids)
    expected = torch.cat([model(inputs_embeds=row.unsqueeze(0)).logits for row in embeddings])
    assert_close(model(inputs_embeds=embeddings).logits, expected)


@torch.no_grad()
def test_padding_inside_packed_rows_of_generate(model, input_ids):
    """generate() uses the mask and the positions that it is given, and leaves them unchanged."""
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    seq_idx = torch.tensor([[0] * 5 + [1] * 7])
    position_ids = torch.arange(12).unsqueeze(0) + 5
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, "seq_idx": seq_idx}
    out = model.generate(input_ids, position_ids=position_ids, **settings)
    assert torch.equal(position_ids, torch.arange(12).unsqueeze(0) + 5)
    alone = model.generate(input_ids[1:2, 5:], max_new_tokens=6, do_sample=False)
    assert torch.equal(out[1, 12:], alone[0, 7:])


@torch.no_grad()
def test_generate_knows_where_the_last_packed_document_begins(model, input_ids):
    """It begins after padding, in a mask that also covers cached tokens, or where position_ids restart."""
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = torch.cat([model.generate(row[None, 8:], **settings)[:, 4:] for row in input_ids])
    seq_idx = torch.tensor([[0] * 4 + [1] * 8])
    mask = torch.ones_like(input_ids)
    mask[:, 4:8] = 0
    generated = model.generate(input_ids, attention_mask=mask, seq_idx=seq_idx, **settings)
    assert torch.equal(generated[:, 12:], expected)
    cache = model(input_ids[:, :2], use_cache=True).cache
    generated = model.generate(input_ids[:, 2:], cache=cache, attention_mask=mask, seq_idx=seq_idx[:, 2:], **settings)
    assert torch.equal(generated[:, 10:], expected)
    position_ids = torch.cat([torch.arange(8), torch.arange(4)]).repeat(3, 1)
    given = position_ids.clone()
    generated = model.generate(input_ids, position_ids=given, seq_idx=seq_idx, **settings)
    assert torch.equal(generated[:, 12:], expected)
    assert torch.equal(given, position_ids)
