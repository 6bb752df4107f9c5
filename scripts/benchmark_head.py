#!/usr/bin/env python
"""Measure the peak memory and time of a language model's head in training: all logits at once or in pieces.

    python scripts/benchmark_head.py --vocab_size 50257
    python scripts/benchmark_head.py --vocab_size 50257 --dtype bfloat16 --batch_size 16

Memory is the amount that a forward and backward pass adds to the process, or to the allocated memory of a
GPU: activations, logits and gradients. The memory of the process is known on Linux only.
"""

import argparse
from collections.abc import Callable

import torch
from benchmarking import HelpFormatter, at_least_one, device_name, interleave, machine, peak_megabytes

from mingru_hf import MinGRUConfig, MinGRUForCausalLM


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=50257, help="rows of the head's weight")
    parser.add_argument("--hidden_size", type=int, default=384, help="channels of every layer")
    parser.add_argument("--num_layers", type=int, default=2, help="layers below the head")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is autocast")
    parser.add_argument("--device", type=device_name, default="cpu", help="where to measure: cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="CPU threads to use")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="rounds per measurement; the median is shown")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = MinGRUConfig(
        vocab_size=args.vocab_size, hidden_size=args.hidden_size, num_hidden_layers=args.num_layers, expand=1
    )
    model = MinGRUForCausalLM(config).to(args.device)
    ids = torch.randint(args.vocab_size, (args.batch_size, args.sequence_length)).to(args.device)

    def make_step(skip_logits: bool) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad()
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = model(ids, labels=ids, skip_logits=skip_logits).loss
            loss.backward()
            losses[skip_logits] = loss.item()

        return step

    losses: dict[bool, float] = {}
    steps = {"all logits": make_step(False), "in pieces": make_step(True)}
    memory = {}
    for name, step in steps.items():
        step()  # allocations that only the first step makes do not count
        model.zero_grad()
        memory[name] = peak_megabytes(step, args.device)
    seconds = interleave(steps, args.rounds, args.device)
    print(
        f"{machine(args.device)}, {args.dtype}; {args.num_layers} layers, {args.hidden_size} wide, "
        f"vocabulary {args.vocab_size}, B={args.batch_size}, T={args.sequence_length}; "
        f"losses {losses[False]:.6f} and {losses[True]:.6f}"
    )
    for name in steps:
        print(f"{name:12} {memory[name]:8,.0f} MB   {seconds[name]:8.4f} s per step")


if __name__ == "__main__":
    main()
