#!/usr/bin/env python
"""Measure what a language model's head costs in training: peak memory and time, all logits at once or in pieces.

    python scripts/benchmark_head.py --vocab_size 50257
    python scripts/benchmark_head.py --vocab_size 50257 --dtype bfloat16 --batch_size 16

Memory is what a forward and backward pass adds to the process (Linux only): activations, logits and gradients.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from mingru_hf import MinGRUConfig, MinGRUForCausalLM


def peak_memory(step: Callable[[], None]) -> float:
    """MB by which `step` raises the resident memory of this process at its worst."""

    def status(name: str) -> float:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the high-water mark back
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        parser.error("memory is read from /proc, which only Linux has")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = MinGRUConfig(
        vocab_size=args.vocab_size, hidden_size=args.hidden_size, num_hidden_layers=args.num_layers, expand=1
    )
    model = MinGRUForCausalLM(config)
    ids = torch.randint(args.vocab_size, (args.batch_size, args.sequence_length))

    def make_step(skip_logits: bool) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = model(ids, labels=ids, skip_logits=skip_logits).loss
            loss.backward()
            losses[skip_logits] = loss.item()

        return step

    losses: dict[bool, float] = {}
    steps = {"all logits": make_step(False), "in pieces": make_step(True)}
    memory, seconds = {}, {name: [] for name in steps}
    for name, step in steps.items():
        step()  # what only the first step allocates is not counted
        model.zero_grad()
        memory[name] = peak_memory(step)
    for _ in range(args.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.dtype}; {args.num_layers} layers, "
        f"{args.hidden_size} wide, vocabulary {args.vocab_size}, B={args.batch_size}, T={args.sequence_length}; "
        f"losses {losses[False]:.6f} and {losses[True]:.6f}"
    )
    for name in steps:
        print(f"{name:12} {memory[name]:8,.0f} MB   {statistics.median(seconds[name]):6.3f} s a step")


if __name__ == "__main__":
    main()
