#!/usr/bin/env python
"""Time every scan backend side by side: forward, backward, and both as a user calls them; error and memory.

    python scripts/benchmark_scan.py --threads 1 2 --dtype float32 bfloat16 --json scan.json --png scan.png

The floor is torch.add(a, b, out=c) of (B, T, D): what the memory takes for reading two numbers and writing one.
"kernel" rows are the fused CPU kernels into preallocated outputs, as the floor is; the other rows pay for the
memory they allocate. All of a shape run interleaved, and medians are shown, so that a busy machine hits all alike.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from mingru_hf.scan import BACKENDS, mingru_scan, scan_reference
from mingru_hf.scan_numba import NUMBA_AVAILABLE, numba_backward, numba_forward

SHAPES = [(8, 1024, 512), (16, 256, 384), (1, 65536, 64), (16, 64, 3136)]
CURVE = [(4, steps, 256) for steps in (64, 256, 1024, 4096, 16384)]  # for --png: time against T
ERROR_CHANNELS = 8  # the float64 loop is slow: the error is taken on as many channels


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="numbers of threads to measure with")
    parser.add_argument("--backends", nargs="+", default=None, help="default: all but reference that can run here")
    parser.add_argument("--shapes", nargs="+", default=None, metavar="B,T,D", help="default: the four of the README")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds, of which the median is shown")
    parser.add_argument("--max_seconds", type=float, default=20.0, help="fewer rounds where a shape takes longer")
    parser.add_argument("--json", type=Path, default=None, help="write all numbers to this file")
    parser.add_argument("--png", type=Path, default=None, help="draw time against T to this file (log-log)")
    return parser.parse_args(argv)


def usable(backend: str, dtype: torch.dtype) -> bool:
    """Whether the backend runs on a small CPU tensor of this dtype."""
    try:
        mingru_scan(torch.zeros(1, 2, 4, dtype=dtype), backend=backend)
    except (ValueError, RuntimeError):
        return False
    return True


def make_calls(backends: list[str], shape: tuple[int, int, int], dtype: torch.dtype) -> dict:
    """(row, column) -> function without arguments, to be timed; a pair is (prepare, function)."""
    batch, steps, channels = shape
    x = torch.randn(batch, steps, 2 * channels).to(dtype)
    h0 = torch.rand(batch, 1, channels) + 0.01
    a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    out, grad_out = torch.empty_like(a), torch.empty_like(x)
    calls = {("add", "floor"): (None, lambda _: torch.add(a, b, out=out))}
    if NUMBA_AVAILABLE:
        states = numba_forward(x, h0, None, None, dtype)
        calls["kernel", "forward"] = (None, lambda _: numba_forward(x, h0, None, None, dtype, out))
        calls["kernel", "backward"] = (None, lambda _: numba_backward(b, x, h0, states, None, None, grad_out))
    x_leaf, h0_leaf = x.clone().requires_grad_(), h0.clone().to(dtype).requires_grad_()

    for backend in backends:

        def forward(_, backend=backend):
            with torch.no_grad():
                return mingru_scan(x, h0.to(dtype), backend=backend)

        def graph(backend=backend):
            return mingru_scan(x_leaf, h0_leaf, backend=backend)

        def backward(states):
            torch.autograd.grad(states, (x_leaf, h0_leaf), a)

        calls[backend, "forward"] = (None, forward)
        calls[backend, "backward"] = (graph, backward)
        calls[backend, "both"] = (None, lambda _, graph=graph, backward=backward: backward(graph()))
    return calls


def timed(prepare, function) -> float:
    """Seconds of one call."""
    argument = prepare() if prepare is not None else None
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start


def measure(calls: dict, rounds: int, max_seconds: float) -> dict:
    """Median milliseconds of each call; the rounds go over all of them in turn."""
    seconds = {key: [] for key in calls}
    for call in calls.values():
        timed(*call)
    begin = time.perf_counter()
    for done in range(rounds):
        for key, call in calls.items():
            seconds[key].append(timed(*call))
        if done >= 2 and time.perf_counter() - begin > max_seconds:
            break
    return {key: 1e3 * statistics.median(values) for key, values in seconds.items()}


def errors(backends: list[str], shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error of a state against the float64 loop, on a few channels."""
    x = torch.randn(shape[0], shape[1], 2 * ERROR_CHANNELS).to(dtype)
    with torch.no_grad():
        expected = scan_reference(x.double())
        actual = {backend: mingru_scan(x, backend=backend).double() for backend in backends}
    return {name: ((states - expected) / expected).abs().max().item() for name, states in actual.items()}


def status_megabytes(field: str) -> float:
    """A field of /proc/self/status: VmRSS is the memory held now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    raise ValueError(field)


def peak_megabytes(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> float | None:
    """Most memory held during forward + backward beyond the inputs; None where the system does not tell."""
    x = torch.randn(shape[0], shape[1], 2 * shape[2]).to(dtype).requires_grad_()
    weight = torch.ones(shape, dtype=dtype)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = status_megabytes("VmRSS")
        mingru_scan(x, backend=backend).backward(weight)
        return max(0.0, status_megabytes("VmHWM") - before)
    except OSError:
        return None


def measure_shape(backends: list[str], shape: tuple, dtype: torch.dtype, options: argparse.Namespace) -> list[dict]:
    """One row a backend: milliseconds, their ratios to the floor, error and memory."""
    times = measure(make_calls(backends, shape, dtype), options.rounds, options.max_seconds)
    error = errors(backends, shape, dtype)
    floor = times["add", "floor"]
    rows = []
    for backend in dict.fromkeys(name for name, _ in times):
        row = {"backend": backend, "shape": shape, "dtype": str(dtype)[6:], "threads": torch.get_num_threads()}
        for column in ("floor", "forward", "backward", "both"):
            if (backend, column) in times:
                row[f"{column}_ms"] = times[backend, column]
                row[f"{column}_over_add"] = times[backend, column] / floor
        if backend in error:
            row["max_relative_error"] = error[backend]
            row["peak_mb"] = peak_megabytes(backend, shape, dtype)
        rows.append(row)
    return rows


def print_rows(rows: list[dict]) -> None:
    first = rows[0]
    print(f"\n{first['shape']} {first['dtype']}, {first['threads']} thread(s): add {first['floor_ms']:.2f} ms")
    print(f"{'ms (x add)':<10}{'forward':>17}{'backward':>17}{'both':>17}{'error':>10}{'peak MB':>9}")
    for row in rows[1:]:
        cells = ""
        for column in ("forward", "backward", "both"):
            text = f"{row[f'{column}_ms']:.2f} ({row[f'{column}_over_add']:.2f})" if f"{column}_ms" in row else "-"
            cells += f"{text:>17}"
        error = f"{row['max_relative_error']:.1e}" if "max_relative_error" in row else "-"
        memory = f"{row['peak_mb']:.0f}" if row.get("peak_mb") is not None else "-"
        print(f"{row['backend']:<10}{cells}{error:>10}{memory:>9}")


def draw(rows: list[dict], path: Path) -> None:
    """Time of forward + backward against T, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for backend in dict.fromkeys(row["backend"] for row in rows):
        column = "floor_ms" if backend == "add" else "both_ms"
        points = [(row["shape"][1], row[column]) for row in rows if row["backend"] == backend and column in row]
        if points:
            label = "torch.add, the memory floor" if backend == "add" else backend
            axes.plot(*zip(*points, strict=True), "--" if backend == "add" else "o-", label=label)
    batch, _, channels = rows[0]["shape"]
    axes.set(xscale="log", yscale="log", xlabel="time steps T", ylabel="forward + backward, ms")
    axes.set_title(f"MinGRU scan on the CPU, B={batch}, D={channels}, {rows[0]['threads']} thread(s)")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    torch.manual_seed(0)
    shapes = SHAPES if options.shapes is None else [tuple(map(int, text.split(","))) for text in options.shapes]
    candidates = options.backends or [name for name in BACKENDS if name not in ("auto", "reference")]
    before = torch.get_num_threads()
    results, curve = [], []
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            for dtype in (getattr(torch, name) for name in options.dtype):
                backends = [name for name in candidates if usable(name, dtype)]
                for shape in shapes:
                    rows = measure_shape(backends, shape, dtype, options)
                    print_rows(rows)
                    results += rows
        if options.png is not None:
            dtype = getattr(torch, options.dtype[0])
            backends = [name for name in candidates if usable(name, dtype)]
            for shape in CURVE:
                curve += measure_shape(backends, shape, dtype, options)
            draw(curve, options.png)
    finally:
        torch.set_num_threads(before)
    if options.json is not None:
        report = {"torch": torch.__version__, "results": results, "curve": curve}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
