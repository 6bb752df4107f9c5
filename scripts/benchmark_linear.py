#!/usr/bin/env python
"""Measure the linear maps of a decoding step on the CPU: torch's, and this package's kernel for few rows.

    python scripts/benchmark_linear.py --threads 1
    python scripts/benchmark_linear.py --dtype bfloat16 --inputs 768 --outputs 3072 50257 --rows 1 4

A pass multiplies by enough different matrices to fill --megabytes, more than the last-level cache holds, so
that the weights are read from memory as in a model. For comparison, `torch.sum` over the same weights does
little more than read them.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmarking import HelpFormatter, at_least_one, interleave, machine
from torch import Tensor

from mingru_hf.linear import FEW_ROWS_ARE_FASTER
from mingru_hf.scan_numba import NUMBA_AVAILABLE, numba_linear, unavailable_reason

COLUMNS = "{:>7} {:>8} {:>5} {:>10} {:>10} {:>14} {:>12} {:>12} {:>14}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--rows", type=at_least_one, nargs="+", default=[1, 2, 4, 8, 16], help="sequences in a step")
    parser.add_argument("--inputs", type=at_least_one, nargs="+", default=[384, 1536], help="input channels")
    parser.add_argument("--outputs", type=at_least_one, nargs="+", default=[384, 1536, 50257], help="output channels")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of all tensors")
    parser.add_argument(
        "--megabytes", type=at_least_one, default=50, help="MB of weights in a pass, at least one matrix"
    )
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="CPU threads to use")
    parser.add_argument("--rounds", type=at_least_one, default=15, help="rounds per measurement; the median is shown")
    args = parser.parse_args(argv)
    if not NUMBA_AVAILABLE:
        parser.error(f"there is no kernel to measure: {unavailable_reason()}")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    taken = "uses" if FEW_ROWS_ARE_FASTER else "does not use"
    print(f"{machine()}, {args.dtype}; the package {taken} the kernel on this machine")
    microseconds, speeds = ("torch us", "kernel us", "times as fast"), ("torch GB/s", "kernel GB/s", "torch.sum GB/s")
    print(COLUMNS.format("inputs", "outputs", "rows", *microseconds, *speeds))
    for inputs in args.inputs:
        for outputs in args.outputs:
            size = inputs * outputs * dtype.itemsize
            weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(max(1, int(args.megabytes * 1e6 / size)))]
            for rows in args.rows:
                measure(torch.randn(rows, 1, inputs).to(dtype), weights, torch.randn(outputs).to(dtype), args.rounds)


@torch.no_grad()
def measure(x: Tensor, weights: list[Tensor], bias: Tensor, rounds: int) -> None:
    """Print one line: us per linear map, GB/s of weights read; "-" where the kernel leaves the map to torch."""

    def over_weights(function: Callable[[Tensor], Tensor | None]) -> Callable[[], list]:
        return lambda: [function(weight) for weight in weights]

    steps = {"torch": over_weights(lambda w: F.linear(x, w, bias)), "sum": over_weights(torch.sum)}
    if numba_linear(x, weights[0], bias) is not None:
        steps["kernel"] = over_weights(lambda w: numba_linear(x, w, bias))
    seconds = {name: value / len(weights) for name, value in interleave(steps, rounds).items()}
    us = {name: f"{value * 1e6:.1f}" for name, value in seconds.items()}
    speed = {name: f"{weights[0].nbytes / value / 1e9:.1f}" for name, value in seconds.items()}
    ratio = f"{seconds['torch'] / seconds['kernel']:.2f}" if "kernel" in seconds else "-"
    times = us["torch"], us.get("kernel", "-"), ratio
    print(
        COLUMNS.format(x.shape[-1], len(bias), len(x), *times, speed["torch"], speed.get("kernel", "-"), speed["sum"])
    )


if __name__ == "__main__":
    main()
