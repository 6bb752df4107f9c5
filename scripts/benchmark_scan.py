#!/usr/bin/env python
"""Measure every scan backend and the scans of other packages: time, error and memory.

    python scripts/benchmark_scan.py --threads 1 2 --dtype float32 bfloat16 --json scan.json --png scan.png

Times are of the forward pass, the backward pass and both. The floor is torch.add(a, b, out=c) of (B, T, D):
the time to read two numbers and write one. "kernel" rows are the fused CPU kernels with preallocated outputs,
as for the floor; the other rows include the allocation of their outputs. All measurements of a shape take
turns, so that a busy machine slows all of them alike; medians are shown.

Also timed are torch.nn.GRU, including its matrix products, and, if installed, minGRU-pytorch and mingru-scans
(pip install --no-deps minGRU-pytorch mingru-scans einops), without their matrix products. With --device cuda,
these are joined by the general scan of accelerated-scan and the HGRN scan of flash-linear-attention, if
installed; torch computes their inputs from the gates and candidates.

On a GPU (--device cuda), a time is the mean over many consecutive calls whose inputs alternate and together
exceed the GPU's caches. The first number is the time from call to call, Python included; the second is the
time that the GPU itself works on a call, according to torch's profiler, with its ratio to that of the floor.
"""

import argparse
import math
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import torch
from benchmarking import (
    HelpFormatter,
    at_least_one,
    device_name,
    interleave,
    is_cuda,
    new_file,
    peak_megabytes,
    seconds_of,
    synchronize,
    write_json,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mingru_hf.scan import BACKENDS, mingru_scan
from mingru_hf.scan_numba import NUMBA_AVAILABLE, numba_backward, numba_forward
from mingru_hf.scan_reference import decay_and_drive, scan_reference

SHAPES = [(8, 1024, 512), (16, 256, 384), (1, 65536, 64), (16, 64, 3136)]
CURVE = [(4, steps, 256) for steps in (64, 256, 1024, 4096, 16384)]  # for --png: time against T
ERROR_CHANNELS = 8  # the float64 loop is slow: the error is taken on this many channels
SAMPLE_SECONDS = 0.01  # on a GPU: minimum time of consecutive calls, so that waiting for their end is negligible
MAX_COPIES = 64  # if so many inputs still fit the GPU's caches, the launch dominates the time anyway
INPUT_BYTES = 2**28  # on a GPU: minimum total size of the alternating inputs, larger than any cache


# --- Scans of other packages. Each function takes the number of channels and returns a function (gate and candidate
# --- (B, T, 2D), h0 (B, 1, D)) -> states (B, T, D), or raises ImportError.


class Half(nn.Module):
    """Replacement for a peer's input projection: returns the gates or candidates from an input already projected."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=-1)[self.index]


class Swapped:
    """Wrapper around a tensor whose `chunk` returns the chunks in reverse order."""

    def __init__(self, x: Tensor):
        self.x = x

    def chunk(self, chunks: int, dim: int) -> tuple[Tensor, ...]:
        return self.x.chunk(chunks, dim=dim)[::-1]


def mingru_pytorch(channels: int) -> Callable:
    from minGRU_pytorch import minGRU

    layer = minGRU(channels)
    del layer.to_hidden_and_gate
    layer.to_hidden_and_gate = Swapped  # this layer expects the candidates first
    return layer


def mingru_scans(channels: int) -> Callable:
    from mingru import MinGRU

    layer = MinGRU(channels, channels)
    layer.linear_z, layer.linear_h = Half(0), Half(1)
    return layer


def torch_gru(channels: int) -> Callable:
    layer = nn.GRU(channels, channels, batch_first=True)

    def forward(x: Tensor, h0: Tensor) -> Tensor:
        layer.to(x.device, x.dtype)
        return layer(x[..., :channels], h0.transpose(0, 1).contiguous())[0]

    return forward


def accelerated_scan(channels: int) -> Callable:
    from accelerated_scan.scalar import scan

    def forward(x: Tensor, h0: Tensor) -> Tensor:
        decay, drive = decay_and_drive(x)
        drive = torch.cat([drive[:, :1] + decay[:, :1] * h0, drive[:, 1:]], dim=1)
        return scan(decay.transpose(1, 2).contiguous(), drive.transpose(1, 2).contiguous()).transpose(1, 2)

    return forward


def fla_hgrn(channels: int) -> Callable:
    from fla.ops.hgrn import chunk_hgrn

    def forward(x: Tensor, h0: Tensor) -> Tensor:
        decay, drive = decay_and_drive(x)
        return chunk_hgrn(drive, decay.log(), initial_state=h0[:, 0])[0]

    return forward


PEERS = {
    "minGRU-pytorch": mingru_pytorch,
    "mingru-scans": mingru_scans,
    "torch.nn.GRU": torch_gru,
    "accelerated-scan": accelerated_scan,
    "HGRN": fla_hgrn,
}
OTHER_RECURRENCE = ("torch.nn.GRU",)


def shape_of(text: str) -> tuple[int, int, int]:
    """Check and convert a value of --shapes, as argparse's `type`."""
    numbers = tuple(int(number) for number in text.split(","))
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be B,T,D, three integers of at least 1, got {text!r}")
    return numbers


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--device", type=device_name, default="cpu", help="where to measure: cpu, cuda, cuda:1, ...")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=dtypes, help="dtypes of the inputs")
    parser.add_argument(
        "--threads", nargs="+", type=at_least_one, default=[1], help="numbers of threads to measure with"
    )
    backends = [name for name in BACKENDS if name != "auto"]
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=backends,
        metavar="NAME",
        help="backends to measure; default: all that can run here, except reference",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        default=list(PEERS),
        choices=list(PEERS),
        metavar="NAME",
        help="scans from other packages; default: all that can run here",
    )
    parser.add_argument(
        "--shapes", nargs="*", type=shape_of, metavar="B,T,D", help="shapes to measure; default: the four in LOG.md"
    )
    parser.add_argument("--gate_scale", type=float, default=1.0, help="standard deviation of the gates")
    parser.add_argument(
        "--gate_bias", type=float, default=0.0, help="mean of the gates; far below 0, states hardly change"
    )
    parser.add_argument(
        "--rounds", type=at_least_one, default=11, help="interleaved rounds, of which the median is shown"
    )
    parser.add_argument(
        "--max_seconds", type=float, default=20.0, help="seconds after which a shape gets no more rounds"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--png", type=new_file, metavar="FILE", help="draw time against T to this file (log-log)")
    return parser.parse_args(argv)


def make_function(name: str, channels: int) -> Callable:
    if name in PEERS:
        return PEERS[name](channels)
    return lambda x, h0: mingru_scan(x, h0, backend=name)


def gradients(states: Tensor, leaves: tuple[Tensor, Tensor], weight: Tensor, retain_graph: bool = False) -> None:
    """Run the backward pass from `states` to the pre-activations and h0; HGRN has no gradient for h0."""
    torch.autograd.grad(states, leaves, weight, retain_graph=retain_graph, allow_unused=True)


def usable(options: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    """Return the backends and peers that run a small input forward and backward here; print why others do not."""
    names = options.backends or [name for name in BACKENDS if name not in ("auto", "reference")]
    found = []
    for name in [*names, *options.peers]:
        x = torch.zeros(1, 2, 32, dtype=dtype, device=options.device)
        leaves = x.requires_grad_(), torch.full_like(x[:, :1, :16], 0.5).requires_grad_()
        try:
            states = make_function(name, 16)(*leaves)
            gradients(states, leaves, torch.ones_like(states))
            synchronize(options.device)
            found.append(name)
        except Exception as error:  # whichever error a peer raises, the others are still measured
            print(f"{str(dtype)[6:]} without {name}: {(str(error).strip() or repr(error)).splitlines()[0]}")
    return found


# A timed call: (prepare or None, a function that takes the result of prepare, or None).
Call = tuple[Callable | None, Callable]


def make_calls(functions: dict[str, Callable], shape: tuple[int, int, int], x: Tensor, h0: Tensor) -> dict:
    """Return the calls to time, by (row, column) of the table."""
    a, b = torch.randn_like(x[..., : shape[2]]), torch.randn_like(x[..., : shape[2]])
    out, grad_out = torch.empty_like(a), torch.empty_like(x)
    calls: dict[tuple[str, str], Call] = {("add", "floor"): (None, lambda _: torch.add(a, b, out=out))}
    if NUMBA_AVAILABLE and x.device.type == "cpu":
        states, _ = numba_forward(x, h0, None, None, x.dtype)
        calls["kernel", "forward"] = (None, lambda _: numba_forward(x, h0, None, None, x.dtype, out))
        calls["kernel", "backward"] = (None, lambda _: numba_backward(b, None, x, h0, states, None, None, grad_out))
    leaves = x.clone().requires_grad_(), h0.clone().requires_grad_()

    for name, function in functions.items():

        def forward(_, function=function):
            with torch.no_grad():
                return function(x, h0)

        def graph(function=function):
            return function(*leaves)

        calls[name, "forward"] = (None, forward)
        calls[name, "backward"] = (graph, lambda states: gradients(states, leaves, a, retain_graph=is_cuda(x.device)))
        calls[name, "both"] = (None, lambda _, graph=graph: gradients(graph(), leaves, a))
    return calls


def in_a_row(calls: list[Call], count: int) -> Callable[[], None]:
    """Prepare calls that differ only in their inputs; return a function that cycles through them for `count` calls."""
    prepared = [(function, prepare() if prepare is not None else None) for prepare, function in calls[:count]]

    def run() -> None:
        for function, argument in islice(cycle(prepared), count):
            function(argument)

    return run


def seconds_of_call(calls: list[Call], count: int, device: str) -> float:
    """Return the mean seconds from call to call."""
    return seconds_of(in_a_row(calls, count), device) / count


def seconds_of_kernels(calls: list[Call], count: int, device: str) -> float:
    """Return the seconds that a GPU works on a call; NaN if the profiler records no kernels."""
    run = in_a_row(calls, count)
    for _ in range(2):  # the first profile may miss what runs while the profiler starts
        synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run()
            synchronize(device)
    kernels = [e for e in recorded.key_averages() if e.device_type.name == "CUDA" and not e.is_user_annotation]
    return sum(event.self_device_time_total for event in kernels) / 1e6 / count or math.nan


def enough(calls: list[Call], device: str) -> int:
    """Return how many consecutive calls make a sample: one on a CPU, on a GPU enough to fill SAMPLE_SECONDS."""
    if not is_cuda(device):
        return 1
    seconds_of_call(calls, len(calls), device)  # warm-up: compiles and allocates
    count = 1
    while count * seconds_of_call(calls, count, device) < SAMPLE_SECONDS:
        count *= 2
    return count


def measure(calls: dict[tuple[str, str], list[Call]], options: argparse.Namespace) -> tuple[dict, dict]:
    """Return the median milliseconds from call to call and, on a GPU, the milliseconds of a call's kernels."""
    steps = {key: (variants, enough(variants, options.device)) for key, variants in calls.items()}
    seconds = interleave(
        steps,
        options.rounds,
        options.device,
        timed=lambda step, device: seconds_of_call(*step, device),
        max_seconds=options.max_seconds,
    )
    kernels = {}
    if is_cuda(options.device):
        kernels = {key: 1e3 * seconds_of_kernels(*step, options.device) for key, step in steps.items()}
    return {key: 1e3 * value for key, value in seconds.items()}, kernels


def make_input(shape: tuple[int, int, int], dtype: torch.dtype, options: argparse.Namespace) -> Tensor:
    """Draw random gates and candidates (B, T, 2D)."""
    x = torch.randn(*shape[:2], 2 * shape[2], device=options.device)
    x[..., : shape[2]].mul_(options.gate_scale).add_(options.gate_bias)
    return x.to(dtype)


def largest_errors(names: list[str], x: Tensor) -> dict[str, float]:
    """Return the largest relative error of each scan's states, compared with the float64 loop."""
    h0 = torch.full_like(x[:, :1, :ERROR_CHANNELS], 0.5)
    with torch.no_grad():
        expected = scan_reference(x.double())
        actual = {name: make_function(name, ERROR_CHANNELS)(x, h0).double() for name in names}
    return {name: ((states - expected) / expected).abs().max().item() for name, states in actual.items()}


def memory_of_training(function: Callable, x: Tensor, h0: Tensor) -> float:
    """Return the peak memory of forward + backward beyond the inputs, in MB."""
    leaves = x.clone().requires_grad_(), h0.clone().requires_grad_()
    weight = torch.ones_like(x[..., : h0.shape[2]])
    return peak_megabytes(lambda: gradients(function(*leaves), leaves, weight), x.device)


def measure_shape(names: list[str], shape: tuple, dtype: torch.dtype, options: argparse.Namespace) -> list[dict]:
    """Return one row for each backend or peer: milliseconds, their ratios to the floor, error and memory."""
    x = make_input(shape, dtype, options)
    h0 = (torch.rand(shape[0], 1, shape[2], device=options.device) + 0.01).to(dtype)
    if is_cuda(x.device) and not torch.backends.cudnn.is_acceptable(x):
        names = [name for name in names if name != "torch.nn.GRU"]  # it would run step by step, for minutes
    functions = {name: make_function(name, shape[2]) for name in names}
    copies = min(math.ceil(INPUT_BYTES / x.nbytes), MAX_COPIES) if is_cuda(x.device) else 1
    inputs = [x, *(x.clone() for _ in range(copies - 1))]
    variants = [make_calls(functions, shape, each, h0) for each in inputs]
    times, kernels = measure({key: [calls[key] for calls in variants] for key in variants[0]}, options)
    del inputs, variants
    few = make_input((*shape[:2], ERROR_CHANNELS), dtype, options)
    error = largest_errors([name for name in names if name not in OTHER_RECURRENCE], few)
    rows = []
    for name in dict.fromkeys(name for name, _ in times):
        row = {"backend": name, "shape": shape, "dtype": str(dtype)[6:], "threads": torch.get_num_threads()}
        row["device"] = torch.cuda.get_device_name(x.device) if is_cuda(x.device) else "cpu"
        for column in ("floor", "forward", "backward", "both"):
            if (name, column) in times:
                row[f"{column}_ms"] = times[name, column]
                row[f"{column}_over_add"] = times[name, column] / times["add", "floor"]
            if (name, column) in kernels:
                row[f"{column}_kernels_ms"] = kernels[name, column]
                row[f"{column}_kernels_over_add"] = kernels[name, column] / kernels["add", "floor"]
        if name in functions:
            row["peak_mb"] = memory_of_training(functions[name], x, h0)
        if name in error:
            row["max_relative_error"] = error[name]
        rows.append(row)
    return rows


def cell(row: dict, column: str) -> str:
    """Format ms and their ratio to the floor; on a GPU, us of a call and of its kernels, with the kernels' ratio."""
    if f"{column}_ms" not in row:
        return "-"
    if f"{column}_kernels_ms" not in row:
        return f"{row[f'{column}_ms']:.2f} ({row[f'{column}_over_add']:.2f})"
    call, kernels = 1e3 * row[f"{column}_ms"], 1e3 * row[f"{column}_kernels_ms"]
    return f"{call:.1f}, {kernels:.1f} ({row[f'{column}_kernels_over_add']:.2f})"


def print_rows(rows: list[dict]) -> None:
    first, columns = rows[0], ("forward", "backward", "both")
    if "floor_kernels_ms" in first:
        title, width, where = "us: call, GPU (x add)", 28, first["device"]
        floor = f"{1e3 * first['floor_ms']:.1f} us, {1e3 * first['floor_kernels_ms']:.1f} us of the GPU"
    else:
        title, width, where = "ms (x add)", 17, f"{first['threads']} thread(s)"
        floor = f"{first['floor_ms']:.2f} ms"
    print(f"\n{first['shape']} {first['dtype']}, {where}: add {floor}")
    print(f"{title:<{width}}{''.join(f'{column:>{width}}' for column in columns)}{'error':>10}{'peak MB':>9}")
    for row in rows[1:]:
        cells = "".join(f"{cell(row, column):>{width}}" for column in columns)
        error = f"{row['max_relative_error']:.1e}" if "max_relative_error" in row else "-"
        memory = f"{row['peak_mb']:.0f}" if "peak_mb" in row else "-"
        print(f"{row['backend']:<{width}}{cells}{error:>10}{memory:>9}")


def draw(rows: list[dict], device: str, path: Path) -> None:
    """Plot the time of forward + backward against T, on logarithmic axes, with one line for each backend or peer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    labels = {"add": "torch.add: the memory floor", "log": "log (torch-mingru's scan)"}
    for name in dict.fromkeys(row["backend"] for row in rows):
        column = "floor_ms" if name == "add" else "both_ms"
        points = [(row["shape"][1], row[column]) for row in rows if row["backend"] == name and column in row]
        if points:
            style = ":" if name == "add" else "--" if name in PEERS else "-"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=labels.get(name, name))
    batch, _, channels = rows[0]["shape"]
    axes.set(xscale="log", yscale="log", xlabel="time steps T", ylabel="forward + backward, ms")
    where = f"CPU, threads: {rows[0]['threads']}" if device == "cpu" else device
    axes.set_title(f"B = {batch}, D = {channels}, {rows[0]['dtype']}, {where}", fontsize="medium")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    torch.manual_seed(0)
    shapes = SHAPES if options.shapes is None else options.shapes
    scans = {dtype: usable(options, dtype) for dtype in (getattr(torch, name) for name in options.dtype)}
    before = torch.get_num_threads()
    results, curve = [], []
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            for dtype, names in scans.items():
                for shape in shapes:
                    rows = measure_shape(names, shape, dtype, options)
                    print_rows(rows)
                    results += rows
        if options.png is not None:
            dtype, names = next(iter(scans.items()))
            for shape in CURVE:
                rows = measure_shape(names, shape, dtype, options)
                print_rows(rows)
                curve += rows
            draw(curve, options.device, options.png)
    finally:
        torch.set_num_threads(before)
    if options.json is not None:
        write_json(options.json, {"torch": torch.__version__, "results": results, "curve": curve})


if __name__ == "__main__":
    main()
