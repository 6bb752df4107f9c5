#!/usr/bin/env python
"""Time training and decoding of a MinGRU language model and of others of the same width and depth.

    python scripts/benchmark_lm.py --dtype float32
    python scripts/benchmark_lm.py --dtype bfloat16 --threads 1 --json runs/lm.json
    python scripts/benchmark_lm.py --dtype bfloat16 --device cuda --compile

The models take turns, so that a busy machine slows all of them alike; medians and their ratios are shown.
"MinGRU" has neither MLP nor convolution, like torch-mingru's model; "MinGRU, default block" uses the defaults
of MinGRUConfig. No model uses dropout, and GPT-2's gelu is a fused one. The process keeps freed memory for
all models, as in the training scripts. The log-scan model is torch-mingru's text model, rebuilt here on the
log-space scan that it uses. Where this package multiplies few rows with its own kernel, decoding is also
timed without the kernel. With --compile, training is also timed with each model compiled by torch.compile.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmarking import (
    HelpFormatter,
    at_least_one,
    device_name,
    interleave,
    is_cuda,
    machine,
    new_file,
    write_json,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedModel

import mingru_hf.linear as own_linear
from mingru_hf import MinGRUConfig, MinGRUForCausalLM, mingru_scan
from mingru_hf.calling import module_call
from mingru_hf.training.memory import keep_freed_memory

COMPILED = ", compiled"  # after the name of a model
MODELS = ("MinGRU", "MinGRU, default block", "log scan", "torch.nn.GRU", "GPT-2", "Mamba")
# GPT-2 without dropout, which the other models do not have and which rules out fused attention, and with the function
# of gelu_new in one operator.
FASTEST_GPT2 = {
    "activation_function": "gelu_pytorch_tanh",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


class LogScanLM(nn.Module):
    """torch-mingru's text model as its users run it: in each layer LayerNorm, log-space scan and residual sum."""

    def __init__(self, vocab_size: int, hidden_size: int, num_layers: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(num_layers))
        self.projections = nn.ModuleList(nn.Linear(hidden_size, 2 * hidden_size) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)  # (B, T, D)
        for norm, projection in zip(self.norms, self.projections, strict=True):
            states = mingru_scan(projection(norm(x)).float(), backend="log")
            x = x + states.to(x.dtype)
        return self.head(self.final_norm(x))


class GRULM(nn.Module):
    """A language model on torch.nn.GRU, with dropout before and after each layer."""

    def __init__(self, vocab_size: int, hidden_size: int, num_layers: int, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.rnn = nn.GRU(hidden_size, hidden_size, num_layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, state = self.rnn(self.dropout(self.embedding(ids)), state)
        return self.head(self.dropout(out)), state


class MatrixProducts(nn.Module):
    """Only the matrix products of the MinGRU model, each with its own input: the roofline.

    `call` applies a linear layer to its input: as torch does, or as the model does.
    """

    def __init__(self, vocab_size: int, hidden_size: int, num_layers: int, call: Callable[..., Tensor]):
        super().__init__()
        widths = [2 * hidden_size] * num_layers + [vocab_size]
        self.projections = nn.ModuleList(nn.Linear(hidden_size, width, bias=False) for width in widths)
        self.call = call

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [self.call(projection, x) for projection, x in zip(self.projections, inputs, strict=True)]


def build_models(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Make the models to compare, by name; ours come first."""
    sizes = (args.vocab_size, args.hidden_size, args.num_layers)
    common = {"vocab_size": args.vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    longest = max(args.sequence_length, args.decode_steps + 1)
    makers: dict[str, Callable[[], nn.Module]] = {
        "MinGRU": lambda: MinGRUForCausalLM(
            MinGRUConfig(
                **common,
                hidden_size=args.hidden_size,
                num_hidden_layers=args.num_layers,
                expand=1,
                conv_kernel=0,
                use_mlp=False,
            )
        ),
        "MinGRU, default block": lambda: MinGRUForCausalLM(
            MinGRUConfig(**common, hidden_size=args.hidden_size, num_hidden_layers=args.num_layers)
        ),
        "log scan": lambda: LogScanLM(*sizes),
        "torch.nn.GRU": lambda: GRULM(*sizes),
        "GPT-2": lambda: GPT2LMHeadModel(
            GPT2Config(
                **common,
                n_embd=args.hidden_size,
                n_layer=args.num_layers,
                n_head=args.num_heads,
                n_positions=longest,
                **FASTEST_GPT2,
            )
        ),
        "Mamba": lambda: MambaForCausalLM(
            MambaConfig(**common, hidden_size=args.hidden_size, num_hidden_layers=args.num_layers)
        ),
    }
    return {name: make().to(args.device) for name, make in makers.items() if not args.models or name in args.models}


def training_step(model: nn.Module, ids: Tensor, autocast: bool, compiled: bool = False) -> Callable[[], None]:
    """Return a function that makes one update on the batch `ids` (B, T): forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            output = forward(ids, use_cache=False) if isinstance(model, PreTrainedModel) else forward(ids)
        logits = output.logits if isinstance(model, PreTrainedModel) else output
        logits = logits[0] if isinstance(logits, tuple) else logits
        F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def matrix_product_step(model: MatrixProducts, ids: Tensor, hidden_size: int, autocast: bool) -> Callable[[], None]:
    """Return a function that runs only the matrix products, forward and backward."""
    dtype = torch.bfloat16 if autocast else torch.float32  # that of the products under autocast
    new = {"dtype": dtype, "device": ids.device}
    inputs = [torch.randn(*ids.shape, hidden_size, **new, requires_grad=True) for _ in model.projections]
    grads = [torch.randn(*ids.shape, projection.out_features, **new) for projection in model.projections]

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            outs = model(inputs)
        torch.autograd.backward(outs, grads)
        model.zero_grad()
        for x in inputs:
            x.grad = None

    return step


def decoder(model: nn.Module, batch_size: int, steps: int) -> Callable[[], None] | None:
    """Return a function that decodes `steps` greedy tokens with the model's cache; None for a model without one."""
    first = torch.zeros(batch_size, 1, dtype=torch.long, device=next(model.parameters()).device)

    @torch.inference_mode()
    def decode() -> None:
        ids, state = first, None
        cache = DynamicCache(config=model.config) if isinstance(model, PreTrainedModel) else None
        for _ in range(steps):
            if cache is not None:
                logits = model(ids, cache=cache, use_cache=True).logits
            else:
                logits, state = model(ids, state)
            ids = logits[:, -1:].argmax(-1)

    return None if isinstance(model, LogScanLM) else decode


def with_torchs_products(decode: Callable[[], None]) -> Callable[[], None]:
    """Return a function that runs `decode` without this package's kernel for linear maps of few rows."""

    def run() -> None:
        own_linear.FEW_ROWS_ARE_FASTER = False
        try:
            decode()
        finally:
            own_linear.FEW_ROWS_ARE_FASTER = True

    return run


def decoders(models: dict[str, nn.Module], batch_size: int, steps: int) -> dict[str, Callable[[], None]]:
    """Return decoding functions by name; for our models also without the package's kernel where they use it."""
    made = {name: decoder(model, batch_size, steps) for name, model in models.items()}
    made = {name: decode for name, decode in made.items() if decode is not None}
    if own_linear.FEW_ROWS_ARE_FASTER and not is_cuda(next(next(iter(models.values())).parameters()).device):
        ours = [name for name in made if name.startswith("MinGRU")]
        made |= {f"{name}, torch's products": with_torchs_products(made[name]) for name in ours}
    return made


def share_of_scan(step: Callable[[], None]) -> float:
    """Return the fraction of a training step's CPU time inside the scan operator, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    events = recorded.key_averages()
    scan = sum(event.cpu_time_total for event in events if event.key.startswith("mingru_hf") and "::scan" in event.key)
    return scan / sum(event.self_cpu_time_total for event in events)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help="compare only these; default: all")
    parser.add_argument("--hidden_size", type=int, default=384, help="channels of every layer")
    parser.add_argument("--num_layers", type=int, default=6, help="layers of every model")
    parser.add_argument("--num_heads", type=int, default=6, help="attention heads of GPT-2")
    parser.add_argument("--vocab_size", type=int, default=96, help="different tokens")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences in a batch; decoding takes 1 as well")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens in a sequence to train on")
    parser.add_argument("--decode_steps", type=int, default=64, help="tokens decoded per round")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of autocast in training and of the weights in decoding",
    )
    parser.add_argument("--compile", action="store_true", help="also train the models compiled by torch.compile")
    parser.add_argument("--device", type=device_name, default="cpu", help="where to measure: cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="CPU threads to use")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="rounds per measurement; the median is shown")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all numbers to this file")
    args = parser.parse_args(argv)
    keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    models = build_models(args)
    ids = torch.randint(0, args.vocab_size, (args.batch_size, args.sequence_length)).to(args.device)
    autocast = args.dtype == "bfloat16"
    print(
        f"{machine(args.device)}, {args.dtype}; {args.num_layers} layers, {args.hidden_size} wide, "
        f"vocabulary {args.vocab_size}, B={args.batch_size}, T={args.sequence_length}"
    )

    steps = {name: training_step(model, ids, autocast) for name, model in models.items()}
    if args.compile:
        steps |= {f"{name}{COMPILED}": training_step(model, ids, autocast, True) for name, model in models.items()}
    ways = {"products, torch's": lambda module, x: module(x), "products, ours": module_call}
    sizes = (args.vocab_size, args.hidden_size, args.num_layers)
    products = {name: MatrixProducts(*sizes, way).to(args.device) for name, way in ways.items()}
    modules = {**models, **products}
    for name, model in products.items():
        steps[name] = matrix_product_step(model, ids, args.hidden_size, autocast)
    seconds = interleave(steps, args.rounds, args.device)
    reference = next(iter(models))
    report: dict[str, dict] = {"training": {}, "decoding": {}}
    print(f"\n{'training':31} parameters   tokens/s   time per step over {reference}'s")
    for name, value in seconds.items():
        count = sum(parameter.numel() for parameter in modules[name.removesuffix(COMPILED)].parameters())
        tokens = ids.numel() / value
        ratio = value / seconds[reference]
        report["training"][name] = {"parameters": count, "tokens_per_second": tokens, "ratio": ratio}
        print(f"{name:31} {count:10,} {tokens:10,.0f}   {ratio:8.2f}")
    if reference == "MinGRU" and not is_cuda(args.device):
        report["share_of_scan"] = share_of_scan(steps["MinGRU"])
        print(f"MinGRU: {100 * report['share_of_scan']:.0f} % of a step's CPU time in the scan")

    decoding: dict[int, dict[str, float]] = {}  # seconds by batch size and model
    for model in models.values():
        model.eval().to(getattr(torch, args.dtype))
    for batch_size in (1, args.batch_size):
        decoding[batch_size] = interleave(decoders(models, batch_size, args.decode_steps), args.rounds, args.device)
    columns = f"     B=1 {f'B={args.batch_size}':>6}"
    print(f"\n{'decoding, ms per step':38} {columns}   {args.decode_steps} steps from an empty cache")
    for name in decoding[1]:
        times = [1e3 * decoding[batch_size][name] / args.decode_steps for batch_size in (1, args.batch_size)]
        report["decoding"][name] = dict(zip(("ms_1", f"ms_{args.batch_size}"), times, strict=True))
        print(f"{name:38} {times[0]:8.3f} {times[1]:6.3f}")
    if args.json:
        write_json(args.json, {"arguments": vars(args), **report})


if __name__ == "__main__":
    main()
