"""generate_batch() and its manager: every request gets what generate() gives it alone, in any batch."""

import ast
import copy
import inspect
import textwrap

import pytest
import torch
from accelerate import cpu_offload
from transformers import ContinuousBatchingConfig, GenerationConfig

# Tight limits: two or three requests at a time, prompts in pieces.
TIGHT = ContinuousBatchingConfig(max_requests_per_batch=3, max_batch_tokens=8)


def prompts_of(count, longest=20):
    lengths = torch.randint(1, longest + 1, (count,)).tolist()
    return [torch.randint(1, 40, (length,)).tolist() for length in lengths]


def generated_alone(model, prompt, **options):
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def greedy(**options):
    return GenerationConfig(do_sample=False, **options)


@pytest.fixture
def manager(model):
    """Yield a running manager; stop it after the test."""
    config = ContinuousBatchingConfig(max_batch_tokens=8)
    with model.continuous_batching_context_manager(greedy(), continuous_batching_config=config) as manager:
        yield manager


def results_of(manager, count):
    results = {}
    while len(results) < count:
        result = manager.get_result(timeout=60)
        assert result is not None, "no result within a minute"
        if result.is_finished():
            results[result.request_id] = result
    return results


def results_at_once(model, prompts, generation_config, config=None):
    """Return the results in the order of the prompts, all of which are queued before the first step."""
    manager = model.init_continuous_batching(generation_config, config)
    ids = manager.add_requests(prompts)
    manager.start()
    results = results_of(manager, len(prompts) * (generation_config.num_return_sequences or 1))
    manager.stop()
    return [results[request_id] for request_id in ids]


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, None),
        ({"eos_token_id": list(range(3, 40, 4))}, TIGHT),
        ({"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9, 4]]}, TIGHT),
    ],
    ids=["roomy", "rows that end", "processors that read the tokens so far"],
)
def test_tokens_are_those_of_generate(model, options, config):
    prompts = prompts_of(9)
    results = model.generate_batch(
        prompts, greedy(max_new_tokens=12, **options), continuous_batching_config=config, progress_bar=False
    )
    assert [result.prompt_ids for result in results.values()] == prompts
    expected = [generated_alone(model, prompt, max_new_tokens=12, **options) for prompt in prompts]
    assert [result.generated_tokens for result in results.values()] == expected
    if "eos_token_id" in options:
        assert len({len(tokens) for tokens in expected}) > 1  # some rows ended while others continued


def test_bfloat16_and_float64(model):
    prompts = prompts_of(4)
    for dtype in (torch.float64, torch.bfloat16):
        model.to(dtype)
        results = model.generate_batch(prompts, greedy(max_new_tokens=6), continuous_batching_config=TIGHT)
        for prompt, result in zip(prompts, results.values(), strict=True):
            assert result.error is None
            assert len(result.generated_tokens) == 6
            if dtype == torch.float64:
                assert result.generated_tokens == generated_alone(model, prompt, max_new_tokens=6)


def test_log_probabilities(model):
    config = ContinuousBatchingConfig(max_requests_per_batch=2, return_logprobs=True)
    for result in model.generate_batch(
        prompts_of(4), greedy(max_new_tokens=5), continuous_batching_config=config
    ).values():
        ids = torch.tensor([result.prompt_ids + result.generated_tokens])
        log_probs = model(ids).logits[0, -6:-1].log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor(result.generated_tokens).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_log_probabilities_of_a_model_in_16_bits(model):
    model.bfloat16()
    prompt, config = prompts_of(1)[0], ContinuousBatchingConfig(return_logprobs=True)
    (result,) = results_at_once(model, [prompt], greedy(max_new_tokens=1), config)
    expected = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1).max().item()
    assert abs(result.logprobs[0] - expected) < 1e-3


def test_several_sequences_a_prompt(model):
    prompts = prompts_of(3)
    config = GenerationConfig(do_sample=True, max_new_tokens=8, num_return_sequences=4, top_k=0)
    results = model.generate_batch(prompts, config, continuous_batching_config=TIGHT)
    assert len(results) == 12
    for i, prompt in enumerate(prompts):
        own = list(results.values())[4 * i : 4 * i + 4]
        assert all(result.prompt_ids == prompt and len(result.generated_tokens) == 8 for result in own)
        assert len({tuple(result.generated_tokens) for result in own}) > 1


def test_sampling_follows_the_probabilities(model):
    prompt, count = prompts_of(1)[0], 400
    config = GenerationConfig(do_sample=True, max_new_tokens=1, temperature=0.7, top_k=3)
    draws = [
        [result.generated_tokens[0] for result in results_at_once(model, [prompt] * count, config, seeded)]
        for seeded in (ContinuousBatchingConfig(seed=1), ContinuousBatchingConfig(seed=1))
    ]
    assert draws[0] == draws[1]
    tokens = torch.tensor(draws[0])
    best = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).topk(3)
    shares = torch.stack([(tokens == token).float().mean() for token in best.indices])
    assert shares.sum() == 1
    assert (shares - best.values.softmax(-1)).abs().max() < 4 * 0.5 / count**0.5  # four standard deviations


def shapes_of_calls(model, then=lambda shapes: None):
    """Return a list to which each call adds the shape of its ids; `then` is called with the list each time."""
    shapes = []

    def look(module, args, kwargs):
        shapes.append(tuple((args or (kwargs.get("input_ids"),))[0].shape))
        then(shapes)

    model.register_forward_pre_hook(look, with_kwargs=True)
    return shapes


@pytest.mark.parametrize("num_return_sequences", [1, 2])
def test_the_bounds_of_the_configuration_hold(model, num_return_sequences):
    shapes = shapes_of_calls(model)
    prompts = [torch.randint(1, 40, (length,)).tolist() for length in (7, 1, 4, 4, 5, 2, 3, 1)]
    sampled = GenerationConfig(do_sample=True, max_new_tokens=9, num_return_sequences=num_return_sequences)
    results_at_once(model, prompts, sampled, TIGHT)
    assert max(rows for rows, steps in shapes if steps == 1) <= 3
    assert max(rows * steps for rows, steps in shapes) <= 8


def test_a_model_in_training_generates_as_in_evaluation(model):
    seen = []
    shapes_of_calls(model, lambda shapes: seen.append((model.training, torch.is_grad_enabled())))
    model.train().generate_batch([[1, 2]], greedy(max_new_tokens=2))
    assert set(seen) == {(False, False)}


def test_a_prefill_fills_the_budget(model):
    shapes = shapes_of_calls(model)
    prompts = [torch.randint(1, 40, (length,)).tolist() for length in (4, 3, 4)]
    results_at_once(model, prompts, greedy(max_new_tokens=2), TIGHT)
    assert shapes[:2] == [(2, 4), (2, 1)]


def test_a_prompt_that_is_cancelled_is_read_no_further(model):
    manager = model.init_continuous_batching(greedy(max_new_tokens=4), TIGHT)
    long, short = torch.randint(1, 40, (40,)).tolist(), [5, 6]
    cancelled, kept = manager.add_requests([long, short])
    shapes = shapes_of_calls(model, lambda shapes: len(shapes) == 2 and manager.cancel_request(cancelled))
    manager.start()
    result = manager.get_result(timeout=60)
    manager.stop()
    assert (result.request_id, result.is_finished()) == (kept, True)
    assert shapes == [(1, 8), (1, 8), (1, 2), (1, 1), (1, 1), (1, 1)]


def test_an_error_of_the_model_fails_all_requests(model):
    def fail(shapes):
        if len(shapes) == 4:
            raise RuntimeError("no memory today")

    shapes_of_calls(model, fail)
    results = results_at_once(model, prompts_of(6), greedy(max_new_tokens=9), TIGHT)
    assert all("no memory today" in result.error for result in results)
    assert results[0].generated_tokens  # the tokens from before the error are kept


def test_the_same_prompt_is_run_once(model):
    tokens = shapes_of_calls(model)
    prompt = prompts_of(1)[0]
    results = results_at_once(model, [prompt] * 8, greedy(max_new_tokens=3))
    assert tokens[0] == (1, len(prompt))
    assert set(tokens[1:]) == {(8, 1)}
    assert all(result.generated_tokens == results[0].generated_tokens for result in results)


def test_long_prompts_do_not_hold_up_those_that_generate(model):
    shapes = shapes_of_calls(model)
    short, long = [5, 6], torch.randint(1, 40, (40,)).tolist()
    results = results_at_once(model, [short, long], greedy(max_new_tokens=9), TIGHT)
    pieces = [place for place, shape in enumerate(shapes) if shape[1] > 1]
    assert [shapes[place] for place in pieces] == [(1, 2), *[(1, 8)] * 5]
    assert pieces[1:] == [2, 4, 6, 8, 10]  # a step of the short request between any two
    shapes.clear()
    for prompt, result in zip((short, long), results, strict=True):
        assert result.generated_tokens == generated_alone(model, prompt, max_new_tokens=9)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "each between 0 and 39; got none"),
        ([3, 40], "each between 0 and 39; got 3 to 40"),
        ([-1, 3], "each between 0 and 39; got -1 to 3"),
        ("ROMEO:", "must be a list of token ids"),
    ],
    ids=["empty", "too high", "negative", "text"],
)
def test_a_prompt_that_cannot_be_run_fails_alone(model, prompt, message):
    good = prompts_of(2)
    results = list(model.generate_batch([good[0], prompt, good[1]], greedy(max_new_tokens=4)).values())
    assert message in results[1].error
    assert results[1].generated_tokens == []
    for place in (0, 2):
        assert results[place].error is None
        assert results[place].generated_tokens == generated_alone(model, good[place // 2], max_new_tokens=4)


def test_a_prompt_may_be_a_tensor(model):
    prompt = prompts_of(1)[0]
    result = next(iter(model.generate_batch([torch.tensor(prompt)], greedy(max_new_tokens=4)).values()))
    assert result.prompt_ids == prompt
    assert result.generated_tokens == generated_alone(model, prompt, max_new_tokens=4)


def test_requests_come_and_go_while_others_run(model, manager):
    """Each has its own number of tokens; one is cancelled while it generates, one while its prompt is read."""
    prompts = prompts_of(6)
    endless = manager.add_request(prompts[0], max_new_tokens=2000, streaming=True)
    assert manager.get_result(timeout=60).request_id == endless
    reading = manager.add_request(torch.randint(1, 40, (4000,)).tolist(), max_new_tokens=2)
    ids = [manager.add_request(prompts[i], max_new_tokens=3 * i) for i in range(1, 6)]
    manager.cancel_request(reading)
    results = results_of(manager, 5)
    assert set(results) == set(ids)
    for i, request_id in enumerate(ids, start=1):
        assert results[request_id].generated_tokens == generated_alone(model, prompts[i], max_new_tokens=3 * i)

    manager.cancel_request(endless)
    last = manager.add_request(prompts[1], max_new_tokens=4)
    assert results_of(manager, 1)[last].generated_tokens == generated_alone(model, prompts[1], max_new_tokens=4)
    assert not manager.batch_processor.has_pending_requests()


def test_streaming_brings_each_token(model, manager):
    prompt = prompts_of(1)[0]
    manager.add_request(prompt, request_id="mine", max_new_tokens=7, streaming=True)
    lengths = [len(result.generated_tokens) for result in manager.request_id_iter("mine")]
    assert lengths == list(range(1, 8))


def test_a_name_may_be_used_again(model):
    manager, results = model.init_continuous_batching(greedy()), []
    manager.start()
    for _ in range(2):
        manager.add_request([3, 4], request_id="mine", max_new_tokens=3)
        results.append(manager.get_result(timeout=20))
    manager.stop(hard_stop=True, block=True)
    assert [result and len(result.generated_tokens) for result in results] == [3, 3]


def test_a_name_that_is_taken_fails_the_second_request_alone(model, manager):
    prompts, lengths = prompts_of(4), (300, 40, 5, 5)
    manager.add_request(prompts[0], request_id="other", max_new_tokens=lengths[0])
    manager.add_request(prompts[1], request_id="mine", max_new_tokens=lengths[1], streaming=True)
    manager.add_request(prompts[2], request_id="mine", max_new_tokens=lengths[2])  # while the first one waits or runs
    failed, finished = [], {}
    while len(finished) < 2 or not failed:
        result = manager.get_result(timeout=60)
        assert result is not None
        if result.error is not None:
            failed.append(result)
        elif result.is_finished():
            finished[result.request_id] = result
    for number, name in enumerate(("other", "mine")):
        expected = generated_alone(model, prompts[number], max_new_tokens=lengths[number])
        assert finished[name].generated_tokens == expected
    assert len(failed) == 1
    assert "A request 'mine' already exists" in failed[0].error
    assert failed[0].generated_tokens == []
    assert manager.is_running()


@pytest.mark.parametrize(
    "bad",
    [{"request_id": ["mine"]}, {"request_id": (["mine"],)}, {"request_id": "a__child#0"}, {"max_new_tokens": "many"}],
    ids=str,
)
def test_a_request_that_would_stop_the_thread_is_refused(model, manager, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        manager.add_request([3, 4], **bad)
    with pytest.raises(ValueError, match="request_id must be a string"):
        manager.cancel_request(["mine"])
    request = manager.add_request([3, 4], max_new_tokens=3)
    assert results_of(manager, 1)[request].generated_tokens == generated_alone(model, [3, 4], max_new_tokens=3)


def test_a_name_is_taken_together_with_those_of_further_sequences(model):
    sampled = GenerationConfig(do_sample=True, num_return_sequences=2)
    with model.continuous_batching_context_manager(sampled) as manager:
        manager.add_request([3, 4], request_id="mine", max_new_tokens=200)
        manager.add_request([3, 4], request_id="mine", max_new_tokens=2)
        results = [manager.get_result(timeout=60) for _ in range(3)]
    assert sorted(result.request_id for result in results if result.error is None) == ["mine", "mine__child#0"]
    assert [result.request_id for result in results if result.error is not None] == ["mine"]


def test_a_temperature_of_0_fails_its_request_alone(model):
    config = ContinuousBatchingConfig(per_request_processors=True)
    sampled = GenerationConfig(do_sample=True, temperature=0.9)
    with model.continuous_batching_context_manager(sampled, continuous_batching_config=config) as manager:
        good = manager.add_request([3, 4], max_new_tokens=6)
        bad = manager.add_request([5], max_new_tokens=6, temperature=0.0)
        results = {result.request_id: result for result in (manager.get_result(timeout=60) for _ in range(2))}
    assert "temperature must be above 0" in results[bad].error
    assert len(results[good].generated_tokens) == 6


def test_pause_lets_the_weights_change_between_steps(model, manager):
    prompt = prompts_of(1)[0]
    manager.add_request(prompt, max_new_tokens=2000, streaming=True)
    manager.get_result(timeout=60)
    with manager.pause(), torch.no_grad():
        model.lm_head.weight.neg_()
    request = manager.add_request(prompt, max_new_tokens=3)
    results = results_of(manager, 1)
    assert results[request].generated_tokens == generated_alone(model, prompt, max_new_tokens=3)
    manager.stop(hard_stop=True, block=True)


def test_requests_with_a_temperature_of_their_own(model):
    prompts = prompts_of(4)
    config = ContinuousBatchingConfig(per_request_processors=True)
    sampled = GenerationConfig(do_sample=True, temperature=0.9, top_k=20)
    with model.continuous_batching_context_manager(sampled, continuous_batching_config=config) as manager:
        ids = [manager.add_request(prompt, max_new_tokens=6, top_k=1) for prompt in prompts]
        wild = manager.add_request(prompts[0], max_new_tokens=6, temperature=50.0)
        results = results_of(manager, 5)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert results[request_id].generated_tokens == generated_alone(model, prompt, max_new_tokens=6)
    assert len(results[wild].generated_tokens) == 6


def test_a_manager_that_is_kept(model):
    prompts = prompts_of(2)
    for _ in range(2):
        results = model.generate_batch(prompts, greedy(max_new_tokens=4), persistent_manager=True)
        assert [result.generated_tokens for result in results.values()] == [
            generated_alone(model, prompt, max_new_tokens=4) for prompt in prompts
        ]
    kept = model.init_continuous_batching()
    assert kept is model.init_continuous_batching()
    model.destroy_cached_continuous_batching_manager()
    assert kept is not model.init_continuous_batching()


def test_weights_that_are_elsewhere(model):
    prompts = prompts_of(3)
    expected = [generated_alone(model, prompt, max_new_tokens=4, do_sample=False) for prompt in prompts]
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    results = offloaded.generate_batch(prompts, greedy(max_new_tokens=4))
    assert [result.generated_tokens for result in results.values()] == expected
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="weights are on the meta device"):
        empty.generate_batch(prompts, greedy(max_new_tokens=4))


def test_what_a_batch_cannot_do_is_refused(model):
    for option in (
        {"num_beams": 3},
        {"stop_strings": ["a"]},
        {"guidance_scale": 2.0},
        {"min_new_tokens": 2},
        {"begin_suppress_tokens": [3]},
        {"exponential_decay_length_penalty": (2, 1.1)},
        {"encoder_repetition_penalty": 3.0},
        {"encoder_no_repeat_ngram_size": 1},
        {"forced_eos_token_id": 1},
        {"max_time": 1.0},
    ):
        with pytest.raises(ValueError, match=f"does not support {next(iter(option))}"):
            model.generate_batch([[1, 2]], greedy(max_new_tokens=2, **option))
    with pytest.raises(ValueError, match="give max_new_tokens"):
        model.generate_batch([[1, 2]], greedy())
    assert model.generate_batch([]) == {}


@pytest.mark.parametrize("owner", ["options", "generation_config", "config"])
def test_a_token_that_ends_is_enough(model, owner):
    ends = list(range(40))  # any token
    if owner != "options":
        getattr(model, owner).eos_token_id = ends
    config = greedy(eos_token_id=ends if owner == "options" else None)
    before = dict(vars(config))
    (result,) = model.generate_batch([[1, 2]], config).values()
    assert len(result.generated_tokens) == 1
    with model.continuous_batching_context_manager(config) as manager:
        manager.add_request([1, 2], max_new_tokens=4)
        manager.add_request([1, 2], max_new_tokens=4, eos_token_id=-1)  # nothing ends this one early
        results = results_of(manager, 2).values()
    assert sorted(len(result.generated_tokens) for result in results) == [1, 4]
    assert vars(config) == before


def test_what_transformers_own_methods_read_is_there(model):
    """Neither class calls its parent's __init__: if an update adds an attribute, this test notices, not a thread."""
    manager = model.init_continuous_batching(greedy(max_new_tokens=2))
    missing = set()
    for ours in (manager, manager._create_batch_processor()):
        for name in dir(type(ours)):
            member = inspect.getattr_static(type(ours), name)
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if inspect.isfunction(function) and function.__module__.startswith("transformers.") and name != "__init__":
                tree = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
                reads = {
                    node.attr
                    for node in tree
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
                }
                missing |= {f"{name}: {attribute}" for attribute in reads if not hasattr(ours, attribute)}
    # Set by the loop, or read by methods of the processor that only transformers' own manager calls.
    assert missing == {
        "_run_generation_loop: current_batch",
        "_generation_loop_body: current_batch",
        "reset: offloading_manager",
        "reset: cache",
        "warmup: model_runner",
    }
