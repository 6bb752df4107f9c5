"""What transformers runs around a model, with the recurrent cache: the rest of generate(), Trainer, collators."""

import copy
import threading

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz .,;:!?"


def tokenizer_of(pieces):
    """Return a tokenizer whose tokens are three special ones, then `pieces` in order; the longest match wins."""
    vocab = {piece: i for i, piece in enumerate(["<pad>", "<s>", "</s>", *pieces])}
    merges = [(piece[0], piece[1]) for piece in pieces if len(piece) == 2]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def count_forwards(model):
    """Return a list to which each forward pass of the model's body adds its number of tokens."""
    calls = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return calls


# --- Numbers


def test_scores_of_cached_generation_are_those_of_the_whole_pass(model, input_ids):
    output = model.generate(
        input_ids, max_new_tokens=20, repetition_penalty=1.3, output_logits=True, return_dict_in_generate=True
    )
    logits = torch.stack(output.logits, dim=1)
    whole = model(output.sequences[:, :-1], use_cache=False).logits[:, input_ids.shape[1] - 1 :]
    assert (logits - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_bfloat16_scores_and_tokens(model, input_ids):
    """With and without a cache, tokens agree wherever the best two scores differ by more than rounding."""
    model.bfloat16()
    output = model.generate(
        input_ids, max_new_tokens=20, repetition_penalty=1.3, output_logits=True, return_dict_in_generate=True
    )
    logits = torch.stack(output.logits, dim=1)
    whole = model(output.sequences[:, :-1], use_cache=False).logits[:, input_ids.shape[1] - 1 :].float()
    bound = 2e-2 * whole.abs().max()
    assert (logits - whole).abs().max() <= bound
    best, second = whole.topk(2).values.unbind(-1)
    clear = best - second > 2 * bound
    assert clear.any()
    assert torch.equal(logits.argmax(-1)[clear], whole.argmax(-1)[clear])


@pytest.mark.parametrize(
    "assisted", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=["lookup", "model"]
)
@pytest.mark.parametrize("new_ids_alone", [False, True])
def test_turns_around_assisted_decoding(model, input_ids, assisted, new_ids_alone):
    """The cache counts each token once, whichever ids a turn passes: later turns rely on this count."""
    if "assistant_model" in assisted:
        assisted = {"assistant_model": copy.deepcopy(model)}
    ids, cache = input_ids[:1], None
    for turn, options in enumerate(({}, assisted, {}, assisted)):
        mask = torch.ones_like(ids)
        passed = ids if cache is None or not new_ids_alone else ids[:, cache.get_seq_length() :]
        output = model.generate(
            passed, attention_mask=mask, cache=cache, max_new_tokens=5, return_dict_in_generate=True, **options
        )
        expected = model.generate(ids, attention_mask=mask, use_cache=False, max_new_tokens=5)
        assert torch.equal(output.sequences[:, -5:], expected[:, -5:]), turn
        ids, cache = expected, output.cache
        assert cache.get_seq_length() == ids.shape[1] - 1
        assert cache.layers[0].states.shape[1] == 1
        ids = torch.cat([ids, torch.randint(1, 40, (1, 2 + turn))], dim=1)


def test_hidden_states_of_each_generated_token(model, input_ids):
    output = model.generate(
        input_ids, max_new_tokens=4, output_hidden_states=True, return_dict_in_generate=True, do_sample=False
    )
    whole = model(output.sequences[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
    for depth, expected in enumerate(whole):
        parts = torch.cat([step[depth] for step in output.hidden_states], dim=1)
        torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-4)


# --- generate()


def test_generation_from_the_bos_token_with_and_without_cache(model):
    model.generation_config.update(bos_token_id=1)
    settings = {"max_new_tokens": 12, "repetition_penalty": 1.3}
    cached = model.generate(**settings)
    assert cached.shape == (1, 13)
    assert cached[0, 0] == 1
    assert torch.equal(cached, model.generate(use_cache=False, **settings))


def test_own_processors_and_criteria_see_every_step(model, input_ids):
    class Avoid(LogitsProcessor):
        def __call__(self, ids, scores):
            return scores.index_fill(1, ids[0, -1:], -torch.inf)

    class Enough(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((ids.shape[0],), ids.shape[1] >= 19)

    outputs = [
        model.generate(
            input_ids[:1],
            max_new_tokens=30,
            use_cache=use_cache,
            logits_processor=LogitsProcessorList([Avoid()]),
            stopping_criteria=StoppingCriteriaList([Enough()]),
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*outputs)
    assert outputs[0].shape == (1, 19)
    assert (outputs[0][0, 12:] != outputs[0][0, 11:-1]).all()


def test_text_comes_out_of_a_streamer(model):
    tokenizer = tokenizer_of(LETTERS)
    inputs = tokenizer("a word, ", return_tensors="pt", return_token_type_ids=False)
    settings = {"max_new_tokens": 20, "repetition_penalty": 1.3, "pad_token_id": 0}
    expected = model.generate(**inputs, **settings)[0, inputs.input_ids.shape[1] :]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **settings, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == tokenizer.decode(expected)
    thread.join()


def test_forks_of_one_cache_take_their_own_ways(model, input_ids):
    """One prompt read once, three continuations."""
    with torch.no_grad():
        cache = model(input_ids[:1], use_cache=True).cache
    for first in (3, 7, 11):
        ids = torch.cat([input_ids[:1], torch.tensor([[first]])], dim=1)
        expected = model.generate(ids, max_new_tokens=8, repetition_penalty=1.3)
        actual = model.generate(ids, max_new_tokens=8, repetition_penalty=1.3, cache=copy.deepcopy(cache))
        assert torch.equal(actual, expected)
    assert cache.get_seq_length() == 12


def test_a_turn_after_a_crop_and_after_the_disk(model, input_ids, tmp_path):
    """Undo the tokens that a user edited, save the cache, and continue in another session with the full ids."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(input_ids, cache=cache)
    cache.crop(-5)
    torch.save(cache, tmp_path / "cache.pt")
    cache = torch.load(tmp_path / "cache.pt", weights_only=False)
    ids = torch.cat([input_ids[:, :7], input_ids[:, :4].flip(1)], dim=1)
    expected = model.generate(ids, max_new_tokens=8, repetition_penalty=1.3)
    assert torch.equal(model.generate(ids, cache=cache, max_new_tokens=8, repetition_penalty=1.3), expected)


def test_generation_on_a_compiled_model_compiles_once_a_shape(model, input_ids):
    settings = {"max_new_tokens": 6, "repetition_penalty": 1.3, "cache_implementation": "static"}
    expected = model.generate(input_ids, **settings)
    longer = model.generate(input_ids, **settings | {"max_new_tokens": 10})
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(model.generate(input_ids, **settings), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(model.generate(input_ids, **settings | {"max_new_tokens": 10}), longer)


# --- Rows that end before others, and caches that are passed on


class StopAt(StoppingCriteria):
    """Stops the rows whose last token is `token`."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("stopped_by", ["eos", "criterion"])
@pytest.mark.parametrize("way", ["returned", "own cache", "static"])
def test_a_row_that_ends_early_goes_on_in_the_next_turn(model, input_ids, way, stopped_by):
    """generate() appends padding to the row: the next turn's mask hides it, and the state must not have read it."""
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    if way == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    elif way == "own cache":
        settings |= {"cache": DynamicCache(config=model.config), "return_dict_in_generate": False}
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    free = model.generate(input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 12:]
    end = next(token for token in free[:, 1:4].flatten().tolist() if (free == token).any(1).sum() < 3)
    if stopped_by == "eos":
        settings["eos_token_id"] = end
    else:
        settings |= {"eos_token_id": 39, "stopping_criteria": StoppingCriteriaList([StopAt(end)])}
    output = model.generate(input_ids, attention_mask=mask, **settings)
    sequences = output if way == "own cache" else output.sequences
    ended = (sequences[:, 12:] == end).int().cumsum(1).cumsum(1) > 1  # after the first end token
    assert ended.any()
    assert not ended.any(1).all()
    following = torch.randint(1, 40, (3, 5))
    ids = torch.cat([sequences, following], dim=1)
    mask = torch.cat([mask, (~ended).long(), torch.ones_like(following)], dim=1)
    cache = settings["cache"] if way == "own cache" else output.cache
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **settings, use_cache=False)
    actual = model.generate(ids, **settings, cache=cache)
    assert torch.equal(actual, expected)


def test_generated_tokens_need_no_mask(model, input_ids):
    """This holds after a padded prompt, too: with a mask, a block runs nearly twice as many operations."""
    masks = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    model.generate(input_ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    hook.remove()
    assert [given is None for given in masks] == [False, True, True, True]


@pytest.mark.parametrize("training", [False, True])
def test_a_cache_that_is_passed_comes_back(model, input_ids, training):
    model.train(training)
    with torch.no_grad():
        expected = model(input_ids).logits[:, -1]
        cache = DynamicCache(config=model.config)
        for piece in input_ids.split(5, dim=1):
            output = model(piece, cache=cache, use_cache=None if training else False)
            cache = output.cache
    torch.testing.assert_close(output.logits[:, -1], expected, rtol=1e-4, atol=1e-4)
    assert model(input_ids, use_cache=False).cache is None


def test_activation_checkpointing_refuses_to_go_on_from_a_cache(model, input_ids):
    """Recomputed blocks would advance the state twice; transformers drops the cache and only logs a message."""
    model.activation_checkpointing_enable()
    model.train()
    with torch.enable_grad(), pytest.raises(ValueError, match="leave out the cache"):
        model(input_ids, cache=DynamicCache(config=model.config))
    with torch.enable_grad():
        assert model(input_ids).cache is None
    with torch.no_grad():
        assert model(input_ids, cache=DynamicCache(config=model.config)).cache.get_seq_length() == 12


# --- Drafts


def test_prompt_lookup_takes_several_tokens_a_forward_in_bounded_memory(model, input_ids):
    ids = input_ids[:1]
    expected = model.generate(ids, max_new_tokens=400)  # without a penalty, the tiny model ends in a loop
    cache, held = DynamicCache(config=model.config), []

    def measure(module, args, output):
        # A slice's storage is that of the tensor it was cut from.
        held.append([layer.states.untyped_storage().nbytes() / 4 / layer.states.shape[2] for layer in cache.layers])

    hook = model.register_forward_hook(measure)
    output = model.generate(ids, max_new_tokens=400, prompt_lookup_num_tokens=5, cache=cache)
    hook.remove()
    assert torch.equal(output, expected)
    assert len(held) < 400 / 2
    for steps, layer in zip(zip(*held, strict=True), cache.layers, strict=True):
        assert 12 < max(steps) <= type(layer).min_recorded_steps + 12


def test_a_plain_turn_follows_an_assisted_one(model, input_ids):
    ids = input_ids[:1]
    first = model.generate(ids, max_new_tokens=10, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    following = torch.cat([first.sequences, input_ids[1:2, :5]], dim=1)
    expected = model.generate(following, max_new_tokens=10, repetition_penalty=1.3)
    actual = model.generate(following, cache=first.cache, max_new_tokens=10, repetition_penalty=1.3)
    assert torch.equal(actual, expected)
    for layer in first.cache.layers:
        assert layer.states.shape[1] == 1  # nothing is recorded any more
        assert layer.states.untyped_storage().nbytes() == layer.states.nbytes


def test_a_cache_that_records_goes_on_recording_after_drafts(model, input_ids):
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    first = model.generate(input_ids[:1], max_new_tokens=10, prompt_lookup_num_tokens=3, cache=cache)
    model(first[:, -1:], cache=cache)
    cache.crop(-5)
    ids = torch.cat([first[:, :-5], input_ids[1:2, :1]], dim=1)
    torch.testing.assert_close(model(ids[:, -1:], cache=cache).logits, model(ids).logits[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("assistant", ["alike", "the same"])
def test_speculative_sampling_of_the_best_token_is_greedy(model, input_ids, assistant):
    """With top_k=1 only one token can be sampled, so both acceptance and rejection must lead to it."""
    other = copy.deepcopy(model)
    if assistant == "alike":
        for parameter in other.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    for each in (model, other):
        each.generation_config.update(eos_token_id=39, pad_token_id=0)
    ids = input_ids[:1]
    settings = {"max_new_tokens": 25, "repetition_penalty": 1.1}
    expected = model.generate(ids, **settings)
    calls = count_forwards(model)
    sampling = {"do_sample": True, "top_k": 1, "assistant_model": other}
    assert torch.equal(model.generate(ids, **settings, **sampling), expected)
    assert len(calls) < 25


def test_an_assistant_can_take_back_all_of_a_long_draft(model, input_ids):
    config = copy.deepcopy(model.generation_config)
    config.update(is_assistant=True, assistant_confidence_threshold=0.0, return_dict_in_generate=True)
    ids = input_ids[:1]
    cache = model.generate(ids, generation_config=config, max_new_tokens=300).cache
    assert cache.get_seq_length() == 12 + 299
    cache.crop(-299)
    following = torch.cat([ids, input_ids[1:2]], dim=1)
    expected = model.generate(following, max_new_tokens=5, repetition_penalty=1.3)
    assert torch.equal(model.generate(following, cache=cache, max_new_tokens=5, repetition_penalty=1.3), expected)


def test_assistants_with_another_tokenizer(model):
    """Universal assisted decoding: drafts are re-tokenised, and crop goes back over what was cropped before."""
    tokenizer = tokenizer_of(LETTERS)
    theirs = tokenizer_of([*reversed(LETTERS), "ab", "th", "an", "is", "at"])
    torch.manual_seed(1)
    other = type(model)(type(model.config)(**model.config.to_dict() | {"vocab_size": len(theirs)})).eval()
    for each in (model, other):
        each.generation_config.update(eos_token_id=2, pad_token_id=0, bos_token_id=1)
    inputs = tokenizer("that and this, ", return_tensors="pt", return_token_type_ids=False)
    settings = {"max_new_tokens": 15, "suppress_tokens": [0, 1, 36, 37, 38, 39]}  # leaves only tokens with a text
    expected = model.generate(**inputs, **settings)
    actual = model.generate(
        **inputs, **settings, assistant_model=other, tokenizer=tokenizer, assistant_tokenizer=theirs
    )
    assert torch.equal(actual, expected)


# --- Training around the cache


def test_flattened_documents_equal_separate_rows(model, input_ids):
    """transformers' collator puts all documents into one row; loss and gradients equal those of separate rows."""
    model.train()
    documents = [input_ids[0, :5], input_ids[1, :1], input_ids[2]]
    batch = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True)(
        [{"input_ids": document.tolist()} for document in documents]
    )
    flat = model(**batch).loss
    flat.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    counts = torch.tensor([float(len(document) - 1) for document in documents])
    losses = [model(document[None], labels=document[None]).loss for document in documents if len(document) > 1]
    separate = (torch.stack(losses) * counts[counts > 0]).sum() / counts.sum()
    separate.backward()
    torch.testing.assert_close(flat, separate)
    for actual, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad, rtol=1e-3, atol=1e-4 * float(parameter.grad.abs().max()))


def test_label_smoothing_of_the_trainer_shifts_the_labels(model, input_ids, tmp_path):
    """Trainer looks up in a table of transformers' own models whether a model predicts the next token."""
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": input_ids, "labels": input_ids})
    logits = model(input_ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, input_ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_trainer_evaluates_without_tripping_over_the_cache(model, input_ids, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, 40, (8, 12))]
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        shifted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        return {"accuracy": float((shifted.argmax(-1) == labels).mean())}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        num_train_epochs=1,
        eval_strategy="epoch",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics)
    trainer.train()
    metrics = trainer.evaluate()
    assert isinstance(seen[-1], np.ndarray)  # logits alone, not a tuple with a cache in it
    assert seen[-1].shape == (8, 12, 40)
    model.eval()
    batch = torch.stack([row["input_ids"] for row in rows])
    accuracy = (model(batch).logits[:, :-1].argmax(-1) == batch[:, 1:]).float().mean()
    assert metrics["eval_accuracy"] == pytest.approx(accuracy.item())
    loss, logits, labels = trainer.prediction_step(model, {"input_ids": batch, "labels": batch}, False)
    torch.testing.assert_close(logits, model(batch).logits)
    torch.testing.assert_close(loss, model(batch, labels=batch).loss)
    assert torch.equal(labels, batch)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}], ids=str)
def test_an_error_while_drafting_leaves_model_and_cache_as_they_were(model, input_ids, options):
    if "assistant_early_exit" in options and model.config.hidden_sizes is not None:
        options = {"assistant_early_exit": 3}  # its blocks differ in width: a draft as deep as the model
    ids, depth, calls = input_ids[:1], model.config.num_hidden_layers, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 6:
            raise RuntimeError("no more")

    cache = DynamicCache(config=model.config)
    expected = model(ids).logits
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more"):
        model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=20, **options)
    hook.remove()
    assert model.config.num_hidden_layers == depth
    assert not any(layer.record_past for layer in cache.layers)
    torch.testing.assert_close(model(ids).logits, expected)
