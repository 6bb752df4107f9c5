"""The recurrent state as a cache layer: everything that transformers does with caches."""

import copy
import importlib.util

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext
from transformers import CompileConfig, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING

import mingru_hf.cache_mingru
from mingru_hf import MinGRUConfig, MinGRUForCausalLM, MinGRUModel
from mingru_hf.cache_mingru import MinGRUCacheLayer, MinGRUStaticCacheLayer

# For float32 logits of a few units; matrix products with different numbers of rows round differently.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MAKERS = [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=1)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def next_logits(model, ids):
    """Return the (B, V) logits after `ids`, computed without a cache."""
    return model(ids, use_cache=False).logits[:, -1]


def test_memory_does_not_grow_with_tokens(model, input_ids):
    def held(cache):
        tensors = [tensor for layer in cache.layers for tensor in (layer.states, layer.windows) if tensor is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    cache = DynamicCache(config=model.config)
    model(input_ids, cache=cache)
    first = held(cache)
    for _ in range(20):
        model(input_ids, cache=cache)
    assert held(cache) == first
    assert cache.get_seq_length() == 21 * input_ids.shape[1]


def test_state_of_a_bfloat16_model_stays_float32(model, input_ids):
    cache = model.bfloat16()(input_ids, use_cache=True).cache
    assert all(layer.states.dtype == torch.float32 for layer in cache.layers)


def test_crop_rolls_back_exactly(model, input_ids):
    cache = DynamicCache(config=model.config)
    model(input_ids[:, :4], cache=cache)
    cache.activate_past_recording()
    model(input_ids[:, 4:9], cache=cache)
    model(input_ids[:, 9:10], cache=cache)
    cache.crop(0)
    cache.crop(-3)
    assert cache.get_seq_length() == 7
    logits = model(input_ids[:, 7:8], cache=cache).logits[:, -1]
    torch.testing.assert_close(logits, next_logits(model, input_ids[:, :8]), **CLOSE)
    cache.crop(-4)  # across calls, back to where recording began
    logits = model(input_ids[:, 4:6], cache=cache).logits[:, -1]
    torch.testing.assert_close(logits, next_logits(model, input_ids[:, :6]), **CLOSE)


def test_crop_of_everything_forgets_everything(model, input_ids):
    cache = model(input_ids, use_cache=True).cache
    cache.crop(-input_ids.shape[1])
    assert cache.get_seq_length() == 0
    logits = model(input_ids, cache=cache).logits[:, -1]
    torch.testing.assert_close(logits, next_logits(model, input_ids), **CLOSE)


def test_crop_says_what_it_cannot_do(model, input_ids):
    cache = model(input_ids, use_cache=True).cache
    for steps in (1, 2):
        with pytest.raises(ValueError, match="activate_past_recording"):
            cache.crop(-steps)
    with pytest.raises(ValueError, match="tokens to remove as a negative number"):
        cache.crop(2)


@pytest.mark.parametrize("detach", [False, True])
@torch.enable_grad()
def test_gradients_flow_through_the_cache_until_it_is_detached(model, input_ids, detach):
    embeds = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    cache = DynamicCache(config=model.config)
    model(inputs_embeds=embeds[:, :5], cache=cache).logits.sum().backward()
    embeds.grad = None
    if detach:
        for layer in cache.layers:
            layer.detach_()
    else:  # the first backward pass has freed the graph of the old cache
        cache = DynamicCache(config=model.config)
        model(inputs_embeds=embeds[:, :5], cache=cache)
    model(inputs_embeds=embeds[:, 5:], cache=cache).logits.square().sum().backward()
    assert embeds.grad[:, :5].any() != detach
    assert embeds.grad[:, 5:].any()


def test_reset_starts_over(model, input_ids):
    cache = model(input_ids, use_cache=True).cache
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(input_ids, cache=cache).logits, model(input_ids).logits)


def test_rows_can_be_reordered_repeated_and_selected(model, input_ids):
    prompt, new = input_ids[:, :8], input_ids[:, 8:9]
    rows = torch.tensor([2, 0, 0])
    for change, expected in (
        (lambda cache: cache.reorder_cache(rows), prompt[rows]),
        (lambda cache: cache.batch_select_indices(rows[:2]), prompt[rows[:2]]),
        (lambda cache: cache.batch_repeat_interleave(2), prompt.repeat_interleave(2, dim=0)),
    ):
        cache = model(prompt, use_cache=True).cache
        change(cache)
        assert cache.batch_size == len(expected)
        following = new[:1].expand(len(expected), -1)
        logits = model(following, cache=cache).logits[:, -1]
        torch.testing.assert_close(logits, next_logits(model, torch.cat([expected, following], dim=1)), **CLOSE)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("make", "fill"), [(MAKERS[0], torch.inference_mode), (MAKERS[1], torch.no_grad)])
@torch.enable_grad()
def test_a_cache_filled_without_gradients_goes_on_with_them(model, input_ids, make, fill, steps):
    gradients = []
    for cache_class, without_gradients in ((make, fill), (DynamicCache, torch.no_grad)):
        cache = cache_class(config=model.config)
        with without_gradients():
            model(input_ids[:, :4], cache=cache)
        logits = model(input_ids[:, 4 : 4 + steps], cache=cache).logits
        gradients.append(torch.autograd.grad(logits.square().sum(), list(model.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1])


def static_inputs(model, cache, ids):
    """Return the indices of the inputs that a compiled step writes to, and of those with a static address."""
    written, static = [], []

    def look(graph, inputs):
        metadata = TracingContext.get().fw_metadata
        written.extend(metadata.mutated_inp_runtime_indices)
        static.extend(metadata.static_input_indices)
        return make_boxed_func(graph.forward)

    step = torch.compile(
        model.forward, fullgraph=True, dynamic=False, backend=lambda *args: aot_module_simplified(*args, look)
    )
    step(ids, cache=cache)
    return written, static


def test_a_static_cache_stays_in_its_place(model, input_ids):
    """Otherwise inductor skips CUDA graphs, since a step writes to tensors that may have moved."""
    cache = StaticCache(config=model.config, max_cache_len=1)
    model(input_ids[:, :8], cache=cache)
    tensors = [tensor for layer in cache.layers for tensor in (layer.states, layer.windows) if tensor is not None]
    places = [tensor.data_ptr() for tensor in tensors]
    expected = model(input_ids[[2, 0, 0], 8:9], cache=model(input_ids[[2, 0, 0], :8], use_cache=True).cache).logits
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(model(input_ids[[2, 0, 0], 8:9], cache=cache).logits, expected, **CLOSE)
    cache.reset()
    model(input_ids, cache=cache)
    after = [tensor for layer in cache.layers for tensor in (layer.states, layer.windows) if tensor is not None]
    assert [tensor.data_ptr() for tensor in after] == places
    written, static = static_inputs(model, cache, input_ids[:, :1])
    assert len(written) == len(places) + len(cache.layers)
    assert set(written) <= set(static)


@pytest.mark.parametrize("chunk", [None, 3, 20])
def test_generation_compiles_only_calls_that_find_a_static_caches_tensors(model, input_ids, chunk):
    """Tensors that the first call created in a CUDA graph would be overwritten by the next graph."""
    made_within = []

    def look(graph, inputs):
        made_within.append(not any("states" in node.name for node in graph.graph.find_nodes(op="placeholder")))
        return graph

    settings = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "prefill_chunk_size": chunk}
    expected = model.generate(input_ids, disable_compile=True, **settings)
    compiling = CompileConfig(backend=look, mode=None, dynamic=True)
    compiling._compile_all_devices = True
    assert torch.equal(model.generate(input_ids, compile_config=compiling, **settings), expected)
    assert made_within
    assert not any(made_within)


@pytest.mark.parametrize("rows", [[False, True, False], [True, False, True], [True, True, True]])
@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=1)])
def test_rows_can_be_chosen_by_a_mask(model, input_ids, make, rows):
    rows = torch.tensor(rows)
    cache = make(config=model.config)
    model(input_ids[:, :8], cache=cache)
    cache.batch_select_indices(rows)
    logits = model(input_ids[rows, 8:9], cache=cache).logits[:, -1]
    torch.testing.assert_close(logits, next_logits(model, input_ids[rows, :9]), **CLOSE)


def test_a_static_cache_is_static_again_after_drafts(model, input_ids):
    cache = StaticCache(config=model.config, max_cache_len=1)
    ids = input_ids[:1]
    first = model.generate(ids, max_new_tokens=8, cache=cache, prompt_lookup_num_tokens=3, do_sample=False)
    assert cache.is_compileable
    places = [layer.states.data_ptr() for layer in cache.layers]
    assert all(torch.is_tensor(layer.seq_length) for layer in cache.layers)
    ids = torch.cat([first, input_ids[1:2, :4]], dim=1)
    settings = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    assert torch.equal(model.generate(ids, cache=cache, **settings), model.generate(ids, use_cache=False, **settings))
    cache.reset()
    torch.testing.assert_close(model(input_ids[:1], cache=cache).logits, model(input_ids[:1]).logits, **CLOSE)
    assert [layer.states.data_ptr() for layer in cache.layers] == places


def test_a_copy_goes_its_own_way(model, input_ids):
    cache = model(input_ids[:, :8], use_cache=True).cache
    fork = copy.deepcopy(cache)
    model(input_ids[:, 8:], cache=cache)
    logits = model(input_ids[:, 8:9], cache=fork).logits[:, -1]
    torch.testing.assert_close(logits, next_logits(model, input_ids[:, :9]), **CLOSE)


def test_a_saved_cache_goes_on(model, input_ids, tmp_path):
    cache = model(input_ids[:, :8], use_cache=True).cache
    torch.save(cache, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    logits = model(input_ids[:, 8:9], cache=loaded).logits[:, -1]
    torch.testing.assert_close(logits, next_logits(model, input_ids[:, :9]), **CLOSE)


def test_foreign_caches_are_refused(model, input_ids):
    for theirs in (DynamicCache(), DynamicCache(config=GPT2Config(n_layer=3))):
        with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
            model(input_ids, cache=theirs)
    deeper = DynamicCache(config=model.config)
    deeper.layers.append(MinGRUCacheLayer())
    with pytest.raises(ValueError, match="holds no state for each of this model's 3 blocks"):
        model(input_ids, cache=deeper)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=3, n_head=2, n_positions=32))
    with pytest.raises(ValueError, match="recurrent states, not keys and values"):
        gpt2(input_ids, cache=DynamicCache(config=model.config))
    cache = model(input_ids, use_cache=True).cache
    with pytest.raises(ValueError, match="cache holds 3 rows, but the inputs have 2"):
        model(input_ids[:2], cache=cache)


def tensors_of(cache):
    return [tensor for layer in cache.layers for tensor in (layer.states, layer.windows) if tensor is not None]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 3}], ids=["prompt", "drafts"])
def test_a_cache_holds_its_newest_state_alone(model, input_ids, make, settings):
    """Not a slice, which would keep all the prompt's states in memory, nor the states recorded for drafts."""
    cache = make(config=model.config)
    if settings:
        model.generate(input_ids[:1], cache=cache, max_new_tokens=10, **settings)
    else:
        model(input_ids, cache=cache)
    for tensor in tensors_of(cache):
        assert tensor.shape[1] == 1
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_how_far_a_recording_goes_back(model, input_ids):
    ids = input_ids[:1].repeat(1, 100)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :4], cache=cache)
    model(ids[:, 4:504], cache=cache)
    cache.crop(-500)  # all steps of a call, however many
    logits = model(ids[:, 4:5], cache=cache).logits[:, -1]
    torch.testing.assert_close(logits, next_logits(model, ids[:, :5]), **CLOSE)
    model(ids[:, 5:705], cache=cache, logits_to_keep=400)
    cache.crop(-400)  # or as many of them as logits_to_keep asked for
    logits = model(ids[:, 305:306], cache=cache).logits[:, -1]
    torch.testing.assert_close(logits, next_logits(model, ids[:, :306]), **CLOSE)
    model(ids[:, 306:308], cache=cache)
    model(ids[:, 308:1008], cache=cache, logits_to_keep=1)  # leaves a gap, so older states are dropped
    for steps in (256, 300):
        with pytest.raises(
            ValueError, match=f"Cannot take back {steps} of 1008 steps: only the states after the last 256"
        ):
            cache.crop(-steps)
    with pytest.raises(ValueError, match="Raise min_recorded_steps"):  # recording was on
        cache.crop(-300)
    model(ids[:, 1008:1108], cache=cache)
    assert {tensor.shape[1] for tensor in tensors_of(cache)} == {256}  # the limit holds across calls, too


def test_crop_says_when_recording_should_have_begun(model, input_ids):
    cache = DynamicCache(config=model.config)
    model(input_ids[:, :9], cache=cache)
    cache.activate_past_recording()
    model(input_ids[:, 9:], cache=cache)
    with pytest.raises(ValueError, match=r"Call cache.activate_past_recording\(\) before"):
        cache.crop(-5)
    with pytest.raises(ValueError, match="The cache has not seen that many steps"):
        cache.crop(-input_ids.shape[1] - 1)


def test_what_transformers_asks_of_a_cache(model, input_ids):
    for make in MAKERS:
        cache = make(config=model.config)
        model(input_ids, cache=cache)
        assert cache.is_croppable
        assert cache.get_mask_sizes(3, 0) == (15, 0)
        assert cache.get_max_length() == -1
    assert cache.is_compileable
    cache.activate_past_recording()
    assert not cache.is_compileable


def test_a_static_cache_counts_from_zero_after_a_reset(model, input_ids):
    cache = StaticCache(config=model.config, max_cache_len=1)
    cache.reset()  # nothing to forget yet
    for recorded in (True, False):
        cache.layers[0].record_past = recorded
    model(input_ids, cache=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    cache.activate_past_recording()
    model(input_ids, cache=cache)
    assert cache.get_seq_length() == 12
    cache.reset()
    model(input_ids[:, :2], cache=cache)
    with pytest.raises(ValueError, match="Cannot take back 3 of 2 steps"):
        cache.crop(-3)


def test_a_static_cache_counts_on_after_drafts(model, input_ids):
    cache = StaticCache(config=model.config, max_cache_len=1)
    first = model.generate(input_ids[:1], max_new_tokens=8, cache=cache, prompt_lookup_num_tokens=3, do_sample=False)
    assert cache.get_seq_length() == first.shape[1] - 1


def test_an_empty_cache_of_another_copy_is_replaced_in_kind(model, input_ids, monkeypatch):
    for mapping in (DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING):  # importing the copy registers it there
        monkeypatch.setitem(mapping, "mingru", mapping["mingru"])
    spec = importlib.util.spec_from_file_location("mingru_hf.copied_cache", mingru_hf.cache_mingru.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for make, kind in zip(MAKERS, (MinGRUCacheLayer, MinGRUStaticCacheLayer), strict=True):
        cache = make(config=model.config)
        assert not isinstance(cache.layers[0], MinGRUCacheLayer)
        model(input_ids, cache=cache)
        assert {type(layer) for layer in cache.layers} == {kind}
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(input_ids, cache=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 9
    cache = DynamicCache(config=model.config)
    cache.layers[-1].append(torch.rand(3, 1, 4), None, num_steps=1)  # a state whose format may differ
    with pytest.raises(ValueError, match="that runs another copy of this code"):
        model(input_ids, cache=cache)


def test_recording_that_ends_leaves_the_newest_state(model, input_ids):
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=9)):
        cache.activate_past_recording()
        with torch.no_grad():
            model(input_ids, cache=cache)
            newest = cache.layers[0].state.clone()
            cache.layers[0].record_past = False  # as transformers does on Apple's GPUs
        assert cache.layers[0].states.shape[1] == 1
        assert torch.equal(cache.layers[0].state, newest)


@torch.enable_grad()
def test_a_static_cache_keeps_no_graph_after_recording(model, input_ids):
    cache = StaticCache(config=model.config, max_cache_len=1)
    cache.activate_past_recording()
    model(input_ids, cache=cache)
    for layer in cache.layers:
        layer.record_past = False
    assert not any(tensor.requires_grad for tensor in tensors_of(cache))
    copy.deepcopy(cache)  # a tensor with a graph cannot be deep-copied


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("seen", [0, 5])
@pytest.mark.parametrize("kind", ["dynamic", "recording", "static", "static recording"])
def test_a_call_that_fails_half_way_leaves_the_cache_as_it_was(model, input_ids, kind, seen, error):
    expected = model(input_ids).logits
    cache = StaticCache(model.config, max_cache_len=1) if "static" in kind else DynamicCache(config=model.config)
    if "recording" in kind:
        cache.activate_past_recording()
    if seen:
        model(input_ids[:, :seen], cache=cache)

    def fail(*args):
        raise error

    for ids in (input_ids[:, seen:], input_ids[:, seen : seen + 1]):  # several steps at once, and one
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(ids, cache=cache)
        hook.remove()
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [seen] * len(cache.layers)
    torch.testing.assert_close(model(input_ids[:, seen:], cache=cache).logits, expected[:, seen:])
    if "recording" in kind and seen:
        cache.crop(seen - 12 - 1)
        again = model(input_ids[:, seen - 1 :], cache=cache).logits
        torch.testing.assert_close(again, expected[:, seen - 1 :])


@pytest.mark.parametrize("seen", [0, 5])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_call_that_fails_behind_the_blocks_leaves_the_cache_as_it_was(model, input_ids, kind, seen):
    expected = model(input_ids).logits
    cache = StaticCache(model.config, max_cache_len=1) if kind == "static" else DynamicCache(config=model.config)
    if seen:
        model(input_ids[:, :seen], cache=cache)

    def fail(*args):
        raise torch.OutOfMemoryError

    for module in (model.lm_head, model.model):
        hook = module.register_forward_hook(fail)
        for ids in (input_ids[:, seen:], input_ids[:, seen : seen + 1]):
            with pytest.raises(torch.OutOfMemoryError):
                model(ids, cache=cache)
        hook.remove()
    for wrong in ({"labels": torch.zeros(1, 2, dtype=torch.long)}, {"logits_to_keep": torch.tensor([50])}):
        with pytest.raises((ValueError, IndexError)):
            model(input_ids[:, seen:], cache=cache, **wrong)
    assert int(cache.get_seq_length()) == seen
    torch.testing.assert_close(model(input_ids[:, seen:], cache=cache).logits, expected[:, seen:])


@pytest.mark.parametrize("make", MAKERS)
def test_an_error_outside_inference_mode_is_told_of_a_cache_made_in_it(model, input_ids, make):
    cache = make(config=model.config)
    with torch.inference_mode():
        model(input_ids[:, :5], cache=cache)
    with pytest.raises(ValueError, match="Token ids must lie between 0 and 39, got 40 to 40"):
        model(torch.full((3, 1), 40), cache=cache)
    if make is not DynamicCache:  # torch writes to the first block's state before it raises
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            model(input_ids[:, 6:7], cache=cache)
    with torch.inference_mode():
        logits = model(input_ids[:, 5:6], cache=cache).logits[:, -1]
        torch.testing.assert_close(logits, next_logits(model, input_ids[:, :6]), **CLOSE)


def test_a_cache_that_does_not_fit_one_block_is_refused_as_it_was(input_ids):
    config = MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, initializer_range=0.3)
    model = MinGRUForCausalLM(config).eval()
    other = MinGRUForCausalLM(MinGRUConfig(vocab_size=40, hidden_size=16, hidden_sizes=[16, 24])).eval()
    cache = model(input_ids[:, :5], use_cache=True).cache
    with pytest.raises(ValueError, match=r"h0 must have shape \(3, 1, 48\)"):
        other(input_ids[:, 5:6], cache=cache)
    torch.testing.assert_close(model(input_ids[:, 5:], cache=cache).logits, model(input_ids).logits[:, 5:])


@pytest.mark.parametrize("recording", [False, True])
def test_an_output_may_be_written_to(input_ids, recording):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "expand": 1, "initializer_range": 0.3}
    alone = {"residual": False, "use_mlp": False, "use_final_norm": False}  # the states themselves are the output
    model = MinGRUModel(MinGRUConfig(vocab_size=40, **sizes, **alone)).eval()
    expected, cache = model(input_ids).last_hidden_state, DynamicCache(config=model.config)
    if recording:
        cache.activate_past_recording()
    for t in range(12):
        out = model(input_ids[:, t : t + 1], cache=cache).last_hidden_state
        torch.testing.assert_close(out[:, 0], expected[:, t])
        out.zero_()
