#!/usr/bin/env python
"""Measure which features of generate() work with a model's cache, the speed of decoding, and memory use.

    python scripts/benchmark_generate.py --parts features
    python scripts/benchmark_generate.py --parts speed --threads 2 --rounds 9
    python scripts/benchmark_generate.py --parts batch --threads 2
    python scripts/benchmark_generate.py --parts memory --tokens 1000000 --threads 1

features: a Markdown table for tiny random models: MinGRU, Mamba2, RWKV and GPT-2. Every cell is the result of
a run, compared with the same model run over the whole text without a cache: "exact" (the same greedy tokens),
"wrong" (other tokens, and no error), "refused" (an error), "none" (the model has no such feature). Where no
tokens are generated, logits are compared.
speed: a decoding step compared with the model's matrix products alone, generate() compared with a raw loop,
and the prefill of a long prompt, compared with a log-space scan model and transformers' Mamba and GPT-2. The
measurements take turns; medians are shown.
batch: MinGRU and GPT-2 serve requests of unequal length, with continuous batching and with generate() in
groups.
memory: a model reads and then writes very many tokens; the memory of the process and the time per token are
printed along the way.
"""

import argparse
import copy
import functools
import inspect
import time
import warnings
from collections.abc import Callable

import torch
from benchmark_lm import FASTEST_GPT2, LogScanLM
from benchmarking import HelpFormatter, at_least_one, device_name, interleave, is_cuda, machine, process_megabytes
from torch import Tensor, nn
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    StaticCache,
)
from transformers.utils import logging

from mingru_hf import MinGRUConfig, MinGRUForCausalLM

MODELS = ("MinGRU", "Mamba2", "RWKV", "GPT-2")
VOCABULARY = 40
NEW_TOKENS = 12


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parts = ["features", "speed", "batch", "memory"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=["features"], help="what to measure, see above")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and tokens")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="CPU threads to use")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, metavar="NAME", help="features: only these models; default: all"
    )
    parser.add_argument("--verbose", action="store_true", help="features: print the error behind each 'refused'")
    parser.add_argument(
        "--device", type=device_name, default="cpu", help="speed: where to measure: cpu, cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--rounds", type=at_least_one, default=5, help="speed, batch: rounds per measurement; the median is shown"
    )
    parser.add_argument("--decode_steps", type=at_least_one, default=100, help="speed: tokens decoded per round")
    parser.add_argument("--prompt_length", type=at_least_one, default=8192, help="speed: tokens of the prefill")
    parser.add_argument("--requests", type=at_least_one, default=64, help="batch: requests to serve")
    parser.add_argument("--rows", type=at_least_one, default=16, help="batch: requests served at a time")
    parser.add_argument(
        "--tokens", type=at_least_one, default=1_000_000, help="memory: tokens to read, and then to write"
    )
    return parser.parse_args(argv)


# --- Features


def tiny_models(names: list[str] | None) -> dict[str, PreTrainedModel]:
    """Make random models with weights large enough that each writes 5 to 11 different tokens among 12."""
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "MinGRU": lambda: MinGRUForCausalLM(
            MinGRUConfig(**common, hidden_size=64, num_hidden_layers=3, initializer_range=1.0)
        ),
        "Mamba2": lambda: Mamba2ForCausalLM(
            Mamba2Config(
                **common,
                hidden_size=32,
                num_hidden_layers=3,
                num_heads=8,
                head_dim=8,
                state_size=8,
                n_groups=1,
                chunk_size=4,
                initializer_range=0.3,
            )
        ),
        "RWKV": lambda: RwkvForCausalLM(
            RwkvConfig(**common, hidden_size=32, attention_hidden_size=32, num_hidden_layers=3)
        ),
        "GPT-2": lambda: GPT2LMHeadModel(
            GPT2Config(**common, n_embd=32, n_layer=3, n_head=4, n_positions=512, initializer_range=0.3)
        ),
    }
    models = {name: make().eval() for name, make in makers.items() if names is None or name in names}
    if "RWKV" in models:  # has no initializer_range
        for parameter in models["RWKV"].parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.3)
    return models


def whole(model: PreTrainedModel, ids: Tensor, **kwargs) -> Tensor:
    """Return the logits (B, T, V) of one pass without a cache."""
    return model(ids, use_cache=False, **kwargs).logits


def greedy(model: PreTrainedModel, ids: Tensor, count: int = NEW_TOKENS) -> Tensor:
    """Return `ids` followed by `count` greedy tokens, each computed by a pass over the whole text."""
    for _ in range(count):
        ids = torch.cat([ids, whole(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def generate(model: PreTrainedModel, ids: Tensor | None, **kwargs):
    """Call generate() with an attention mask, or it would treat pad tokens that the model wrote as padding."""
    if ids is not None:
        kwargs.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **{"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Return whether logits agree up to rounding, or tokens agree exactly."""
    if not actual.is_floating_point():
        return torch.equal(actual, expected)
    return bool((actual - expected).abs().max() <= 1e-4 * expected.abs().max())


def served(
    prompts: list[list[int]], counts: list[int], model: PreTrainedModel, rows: int
) -> tuple[list[list[int]], float]:
    """Generate counts[i] greedy tokens after prompts[i] by continuous batching, with up to `rows` requests at a time.

    Returns:
        The tokens, and the seconds from the first request to the last result; starting and stopping the service is
        not counted.
    """
    pages = 2 * rows * (max(map(len, prompts)) + max(counts)) // 16 + rows
    config = ContinuousBatchingConfig(
        max_requests_per_batch=rows, page_size=16, num_blocks=pages, max_batch_tokens=512
    )
    settings = GenerationConfig(do_sample=False, pad_token_id=0)
    results = {}
    with model.continuous_batching_context_manager(settings, continuous_batching_config=config) as manager:
        began = time.perf_counter()
        requests = [manager.add_request(*pair) for pair in zip(prompts, [None] * len(prompts), counts, strict=True)]
        while len(results) < len(requests):
            result = manager.get_result(timeout=60)
            if result is None or result.error is not None:
                raise RuntimeError("the request was not served" if result is None else result.error)
            results[result.request_id] = result.generated_tokens
        seconds = time.perf_counter() - began
    return [results[request] for request in requests], seconds


class NotAvailable(Exception):
    """The model lacks what a feature needs, such as a cache in its output."""


def state_arguments(output) -> dict:
    """Return the state in a forward pass's output as keyword arguments for the next pass."""
    for name in ("cache", "state"):
        if getattr(output, name, None) is not None:
            return {name: getattr(output, name)}
    raise NotAvailable


def returned_cache(output):
    if getattr(output, "cache", None) is None:
        raise NotAvailable
    return output.cache


def cached_tokens(model, ids):
    return generate(model, ids), greedy(model, ids)


def left_padding(model, ids):
    lengths = [ids.shape[1], 5, 9]
    mask = torch.stack([(torch.arange(ids.shape[1]) >= ids.shape[1] - n).long() for n in lengths])
    together = generate(model, ids[:3] * mask, attention_mask=mask)[:, ids.shape[1] :]
    alone = [greedy(model, ids[row : row + 1, -n:])[0, n:] for row, n in enumerate(lengths)]
    return together, torch.stack(alone)


def right_padding(model, ids):
    lengths, new = torch.tensor([ids.shape[1], 5, 9]), ids[1:, :3]
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    output = model(ids[:3] * mask, attention_mask=mask, use_cache=True)
    going_on = state_arguments(output) | {"attention_mask": torch.cat([mask, torch.ones_like(new)], dim=1)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        going_on["position_ids"] = lengths[:, None] + torch.arange(3)
    alone = [whole(model, torch.cat([ids[row, :n], new[row]])[None])[0, n:] for row, n in enumerate(lengths)]
    return model(new, use_cache=True, **going_on).logits, torch.stack(alone)


def beams(model, ids):
    settings = {"num_beams": 3, "num_return_sequences": 2}
    return generate(model, ids, **settings), generate(model, ids, use_cache=False, **settings)


def forward_in_chunks(model, ids):
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], use_cache=True, **state_arguments(first))
    return torch.cat([first.logits, second.logits], dim=1), whole(model, ids)


def prefill_chunks(model, ids):
    return generate(model, ids, prefill_chunk_size=5), greedy(model, ids)


def turn_with_all_ids(model, ids):
    first = generate(model, ids, return_dict_in_generate=True)
    full = torch.cat([first.sequences, ids[:, :4]], dim=1)
    return generate(model, full, cache=returned_cache(first)), greedy(model, full)


def turn_after_an_early_end(model, ids):
    """Continue a batch in which some rows ended early; the attention mask hides the padding after their end."""
    written = generate(model, ids)[:, ids.shape[1] :]
    candidates = written[:, 1:4].flatten().tolist()
    end = next(token for token in candidates if not (written == token).any(1).all())
    first = generate(model, ids, eos_token_id=end, return_dict_in_generate=True)
    padding = (first.sequences[:, ids.shape[1] :] == end).cumsum(1).cumsum(1) > 1
    real = torch.cat([torch.ones_like(ids), (~padding).long(), torch.ones_like(ids[:, :4])], dim=1)
    full = torch.cat([first.sequences, ids[:, :4]], dim=1)
    together = generate(model, full, attention_mask=real, cache=returned_cache(first))[:, full.shape[1] :]
    alone = [greedy(model, row[mask.bool()][None])[0, -NEW_TOKENS:] for row, mask in zip(full, real, strict=True)]
    return together, torch.stack(alone)


def turn_with_new_ids(model, ids):
    first = generate(model, ids, return_dict_in_generate=True)
    cache = returned_cache(first)
    full = torch.cat([first.sequences, ids[:, :4]], dim=1)
    new = full[:, -5:]  # the last token of the first turn has not been read yet
    output = generate(model, new, attention_mask=torch.ones_like(full), cache=cache)
    return output[:, -NEW_TOKENS:], greedy(model, full)[:, -NEW_TOKENS:]


def rollback(model, ids):
    cache = returned_cache(model(ids[:, :8], use_cache=True))
    cache.activate_past_recording()
    model(ids[:, 8:12], use_cache=True, cache=cache)
    cache.crop(-3)
    return model(ids[:, 9:], use_cache=True, cache=cache).logits, whole(model, ids)[:, 9:]


def prompt_lookup(model, ids):
    return generate(model, ids[:1], prompt_lookup_num_tokens=3), greedy(model, ids[:1])


def assisted(model, ids):
    assistant = copy.deepcopy(model)
    for parameter in assistant.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return generate(model, ids[:1], assistant_model=assistant), greedy(model, ids[:1])


def turn_after_prompt_lookup(model, ids):
    first = generate(model, ids[:1], return_dict_in_generate=True)
    second = torch.cat([first.sequences, ids[1:2, :4]], dim=1)
    cache = returned_cache(first)
    second = generate(model, second, cache=cache, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    third = torch.cat([second.sequences, ids[2:3]], dim=1)
    return generate(model, third, cache=returned_cache(second)), greedy(model, third)


def static(model, ids):
    return generate(model, ids, cache_implementation="static"), greedy(model, ids)


def packed_documents(model, ids):
    lengths = [7, 1, ids.shape[1] - 8]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids[:1], position_ids=positions, use_cache=False).logits
    return packed, torch.cat([whole(model, document) for document in ids[:1].split(lengths, dim=1)], dim=1)


def continuous_batching(model, ids):
    prompts = [row[-n:] for row, n in zip(ids, (16, 5, 9, 1), strict=True)]
    results, _ = served([prompt.tolist() for prompt in prompts], [NEW_TOKENS] * len(prompts), model, rows=2)
    expected = [greedy(model, prompt[None])[0, len(prompt) :] for prompt in prompts]
    return torch.tensor(results), torch.stack(expected)


def embeddings(model, ids):
    embeds = model.get_input_embeddings()(ids)
    return generate(model, None, inputs_embeds=embeds), greedy(model, ids)[:, ids.shape[1] :]


def cache_bytes(value) -> int:
    """Return the bytes of all tensors in a cache or a list of states."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, (list, tuple)):
        return sum(cache_bytes(item) for item in value)
    if isinstance(value, dict):
        return sum(cache_bytes(item) for item in value.values())
    return cache_bytes(vars(value)) if hasattr(value, "__dict__") else 0


def constant_memory(model, ids):
    short, long = (cache_bytes(state_arguments(model(ids.repeat(1, n), use_cache=True))) for n in (1, 4))
    return "grows" if long > short else "constant"


FEATURES = {
    "cached generation equals uncached": cached_tokens,
    "left padding": left_padding,
    "right padding, then continuing": right_padding,
    "beams, several sequences": beams,
    "`inputs_embeds`": embeddings,
    "packed documents (`position_ids`)": packed_documents,
    "forward in pieces": forward_in_chunks,
    "`prefill_chunk_size`": prefill_chunks,
    "next turn with all ids": turn_with_all_ids,
    "next turn, a row had ended early": turn_after_an_early_end,
    "next turn with the new ids": turn_with_new_ids,
    "rollback (`crop`)": rollback,
    "prompt lookup": prompt_lookup,
    "assisted decoding": assisted,
    "next turns after prompt lookup": turn_after_prompt_lookup,
    "static cache": static,
    "continuous batching (`generate_batch`)": continuous_batching,
    "size of the cache": constant_memory,
}


def try_out(feature, model: PreTrainedModel, seed: int) -> tuple[str, str]:
    """Return the table cell for a feature, and the error if the cell is "refused"."""
    torch.manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (4, 16))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = feature(copy.deepcopy(model), ids)
            return result if isinstance(result, str) else ("exact" if same(*result) else "wrong"), ""
    except NotAvailable:
        return "none", ""
    except Exception as error:  # whichever error a model raises, the feature is unusable
        return "refused", f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def print_features(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Try every feature on every model, and print the table."""
    torch.manual_seed(args.seed)
    models = tiny_models(args.models)
    table: dict[str, dict[str, str]] = {}
    print(f"| feature | {' | '.join(models)} |\n|---{'|---' * len(models)}|")
    for name, feature in FEATURES.items():
        cells = {model_name: try_out(feature, model, args.seed) for model_name, model in models.items()}
        table[name] = {model_name: cell for model_name, (cell, _) in cells.items()}
        print(f"| {name} | {' | '.join(table[name].values())} |", flush=True)
        if args.verbose:
            for model_name, (_, error) in cells.items():
                print(f"    {model_name}: {error}" if error else "", end="\n" if error else "")
    return table


# --- Speed


class Products(nn.Module):
    """Only the matrix products of a decoding step: the linear layers of the blocks, one after the other."""

    def __init__(self, hidden_size: int, num_layers: int):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(hidden_size, 2 * hidden_size) for _ in range(num_layers))
        self.hidden_size = hidden_size

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = linear(x)[..., : self.hidden_size]
        return x


def raw_loop(model: PreTrainedModel, cache_of: Callable, first: Tensor, steps: int) -> Callable[[], None]:
    """Return a function that decodes `steps` greedy tokens after `first` (B, 1) by calling the model directly."""

    @torch.inference_mode()
    def run() -> None:
        ids, cache = first, cache_of()
        for _ in range(steps):
            ids = model(ids, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return run


def print_speed(args: argparse.Namespace) -> None:
    """Time decoding steps and prefill of models with width 384, 6 layers and a vocabulary of 96."""
    size, depth, steps, device = 384, 6, args.decode_steps, args.device
    common = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = MinGRUConfig(**common, hidden_size=size, num_hidden_layers=depth, expand=1, conv_kernel=0, use_mlp=False)
    mingru = MinGRUForCausalLM(config).eval().to(device)
    longest = max(args.prompt_length, steps + 1)
    gpt2_config = GPT2Config(**common, n_embd=size, n_layer=depth, n_head=6, n_positions=longest, **FASTEST_GPT2)
    gpt2 = GPT2LMHeadModel(gpt2_config).eval().to(device)
    mamba = MambaForCausalLM(MambaConfig(**common, hidden_size=size, num_hidden_layers=depth)).eval().to(device)
    products = Products(size, depth).to(device)
    graphs = {"triton.cudagraphs": is_cuda(device)}  # generate(), too, uses CUDA graphs on a GPU
    compiled_gpt2 = torch.compile(gpt2, fullgraph=True, dynamic=False, options=graphs)
    compiled, unguarded = (
        torch.compile(MinGRUForCausalLM(config).eval().to(device), fullgraph=True, dynamic=False, options=options)
        for options in (
            graphs,
            {**graphs, "guard_filter_fn": lambda guards: [False] * len(guards), "cpp_wrapper": True},
        )
    )
    print(f"{machine(device)}; {depth} layers, {size} wide, float32")

    for batch_size in (1, 16):
        torch._dynamo.reset()  # a graph without guards would be reused for another batch size
        x = torch.randn(batch_size, 1, size, device=device)
        prompt = torch.ones(batch_size, 1, dtype=torch.long, device=device)

        @torch.inference_mode()
        def linears(x=x) -> None:
            for _ in range(steps):
                products(x)

        def generated(prompt=prompt) -> None:
            mingru.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False, use_cache=True
            )

        def static(model, prompt=prompt):
            def make() -> StaticCache:
                cache = StaticCache(config=model.config, max_cache_len=steps + 1)
                model(prompt, cache=cache)  # allocates its tensors
                return cache

            return make

        def dynamic(model):
            return lambda: DynamicCache(config=model.config)

        runs = {
            "linears": linears,
            "MinGRU, raw loop": raw_loop(mingru, dynamic(mingru), prompt, steps),
            "MinGRU, generate()": generated,
            "MinGRU, static + compile": raw_loop(compiled, static(mingru), prompt, steps),
            "the same, no guards, C++": raw_loop(unguarded, static(mingru), prompt, steps),
            "Mamba, raw loop": raw_loop(mamba, dynamic(mamba), prompt, steps),
            "GPT-2, raw loop": raw_loop(gpt2, dynamic(gpt2), prompt, steps),
            "GPT-2, static + compile": raw_loop(compiled_gpt2, static(gpt2), prompt, steps),
        }
        seconds = interleave(runs, args.rounds, device)
        print(f"\ndecoding, B={batch_size}, {steps} tokens    ms per step   over the {depth} linears")
        for name, value in seconds.items():
            print(f"{name:30} {1e3 * value / steps:10.3f}   {value / seconds['linears']:10.2f}")
        extra = 1e3 * (seconds["MinGRU, generate()"] - seconds["MinGRU, raw loop"]) / steps
        print(f"generate() adds {extra:.3f} ms per step")

    ids = torch.randint(2, 96, (1, args.prompt_length)).to(device)
    log_scan = LogScanLM(96, size, depth).eval().to(device)

    def prefill(model):
        @torch.inference_mode()
        def run() -> None:
            model(ids, use_cache=True, logits_to_keep=1) if isinstance(model, PreTrainedModel) else model(ids)

        return run

    default_block = MinGRUForCausalLM(MinGRUConfig(**common, hidden_size=size, num_hidden_layers=depth))
    readers = {
        "MinGRU": mingru,
        "MinGRU, default block": default_block.eval().to(device),
        "log scan": log_scan,
        "Mamba": mamba,
        "GPT-2": gpt2,
    }
    seconds = interleave({name: prefill(model) for name, model in readers.items()}, min(args.rounds, 3), device)
    print(f"\nprefill, B=1, T={args.prompt_length}        ms   over MinGRU's")
    for name, value in seconds.items():
        print(f"{name:22} {1e3 * value:10.1f}   {value / seconds['MinGRU']:10.2f}")


# --- Batches


def in_groups(
    prompts: list[list[int]], counts: list[int], model: PreTrainedModel, rows: int
) -> tuple[list[Tensor], float]:
    """Serve requests with generate(): `rows` at a time, padded to the longest and run until the last one has ended."""
    began, results = time.perf_counter(), []
    for first in range(0, len(prompts), rows):
        group = prompts[first : first + rows]
        longest = max(map(len, group))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in group])
        most = max(counts[first : first + rows])
        results.append(generate(model, ids, attention_mask=(ids != 0).long(), max_new_tokens=most))
    return results, time.perf_counter() - began


def print_batch(args: argparse.Namespace) -> None:
    """Print tokens per second for prompts and outputs of 16 to 256 tokens each; models as in `print_speed`."""
    common = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = MinGRUConfig(**common, hidden_size=384, num_hidden_layers=6, expand=1, conv_kernel=0, use_mlp=False)
    gpt2_config = GPT2Config(**common, n_embd=384, n_layer=6, n_head=6, n_positions=1024, **FASTEST_GPT2)
    models = {"MinGRU": MinGRUForCausalLM(config).eval(), "GPT-2": GPT2LMHeadModel(gpt2_config).eval()}
    lengths = torch.randint(16, 257, (2, args.requests)).tolist()
    prompts = [torch.randint(2, 96, (length,)).tolist() for length in lengths[0]]
    ways = {"continuous batching": served, "generate() in groups": in_groups}
    runs = {
        f"{model_name}, {way_name}": functools.partial(way, prompts, lengths[1], model, args.rows)
        for model_name, model in models.items()
        for way_name, way in ways.items()
    }
    seconds = interleave(runs, args.rounds, timed=lambda run, device: run()[1])
    print(f"{machine('cpu')}; 6 layers, 384 wide, float32")
    print(f"\n{args.requests} requests, {args.rows} at a time     seconds   tokens/s")
    for name, value in seconds.items():
        print(f"{name:30} {value:10.2f} {sum(lengths[1]) / value:10,.0f}")


# --- Memory


@torch.inference_mode()
def measure_memory(
    tokens: int, pieces: int = 10, piece_length: int = 1000
) -> dict[str, list[tuple[int, float, float]]]:
    """Read about `tokens` tokens in chunks of at most `piece_length`, then write as many; the number is rounded.

    Returns:
        For "read" and "written": (tokens so far, MB of the process, us per token) after each of `pieces` parts.
    """
    config = MinGRUConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    model = MinGRUForCausalLM(config).eval()
    cache = DynamicCache(config=config)
    part = max(tokens // pieces, 1)
    number = -(-part // piece_length)
    piece_length = -(-part // number)
    part = number * piece_length
    ids = torch.randint(0, VOCABULARY, (1, piece_length))
    model(ids, cache=cache, logits_to_keep=1)  # warm up
    points: dict[str, list[tuple[int, float, float]]] = {"read": [], "written": []}
    for number in range(1, pieces + 1):
        began = time.perf_counter()
        for _ in range(part // piece_length):
            output = model(ids, cache=cache, logits_to_keep=1)
        points["read"].append((number * part, process_megabytes(), 1e6 * (time.perf_counter() - began) / part))
    token = output.logits.argmax(-1)
    for number in range(1, pieces + 1):
        began = time.perf_counter()
        for _ in range(part):
            token = model(token, cache=cache).logits.argmax(-1)
        points["written"].append((number * part, process_megabytes(), 1e6 * (time.perf_counter() - began) / part))
    assert cache.get_seq_length() == piece_length * (1 + pieces * (part // piece_length)) + pieces * part
    return points


def print_memory(args: argparse.Namespace) -> None:
    for name, points in measure_memory(args.tokens).items():
        print(f"\n{name:>12} tokens   process MB us per token")
        for count, megabytes, microseconds in points:
            print(f"{count:19,} {megabytes:12.1f} {microseconds:12.2f}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    parts = {"features": print_features, "speed": print_speed, "batch": print_batch, "memory": print_memory}
    for part in args.parts:
        parts[part](args)


if __name__ == "__main__":
    main()
