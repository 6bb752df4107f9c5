#!/usr/bin/env python
"""Time every scan backend side by side, and what others offer: forward, backward, both, error and memory.

    python scripts/benchmark_scan.py --threads 1 2 --dtype float32 bfloat16 --json scan.json --png scan.png

The floor is torch.add(a, b, out=c) of (B, T, D): what the memory takes for reading two numbers and writing one.
"kernel" rows are the fused CPU kernels into preallocated outputs, as the floor is; the other rows pay for the
memory they allocate. All of a shape run interleaved, and medians are shown, so that a busy machine hits all alike.

Beside the backends stand torch.nn.GRU, whose matrix products cannot be taken out of its time, and where they are
installed minGRU-pytorch and mingru-scans (pip install --no-deps minGRU-pytorch mingru-scans einops), without theirs;
with --device cuda also the general scan of accelerated-scan and HGRN's of flash-linear-attention, fed by torch.
"""

import argparse
import ctypes
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mingru_hf.scan import BACKENDS, mingru_scan, scan_reference
from mingru_hf.scan_numba import NUMBA_AVAILABLE, numba_backward, numba_forward

SHAPES = [(8, 1024, 512), (16, 256, 384), (1, 65536, 64), (16, 64, 3136)]
CURVE = [(4, steps, 256) for steps in (64, 256, 1024, 4096, 16384)]  # for --png: time against T
ERROR_CHANNELS = 8  # the float64 loop is slow: the error is taken on as many channels


# --- What others offer. Each is a function of the channels that gives a function (gate and candidate (B, T, 2D),
# --- h0 (B, 1, D)) -> states (B, T, D), or raises ImportError.


class Half(nn.Module):
    """Stands where a peer projects its input: the gate half of what is already projected, or the candidates."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=-1)[self.index]


class Swapped:
    """A tensor whose chunks come in the other order."""

    def __init__(self, x: Tensor):
        self.x = x

    def chunk(self, chunks: int, dim: int) -> tuple[Tensor, ...]:
        return self.x.chunk(chunks, dim=dim)[::-1]


def mingru_pytorch(channels: int) -> Callable:
    from minGRU_pytorch import minGRU

    layer = minGRU(channels)
    del layer.to_hidden_and_gate
    layer.to_hidden_and_gate = Swapped  # its candidates come first
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


def log_carry_and_drive(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, 2D) -> log(1 - z) and z g(candidate), (B, T, D) each: what peers take that scan but compute no gates."""
    gate, candidate = x.chunk(2, dim=-1)
    return F.logsigmoid(-gate), torch.sigmoid(gate) * torch.maximum(candidate + 0.5, torch.sigmoid(candidate))


def accelerated_scan(channels: int) -> Callable:
    from accelerated_scan.scalar import scan

    def forward(x: Tensor, h0: Tensor) -> Tensor:
        log_carry, drive = log_carry_and_drive(x)
        carry = log_carry.exp()
        drive = torch.cat([drive[:, :1] + carry[:, :1] * h0, drive[:, 1:]], dim=1)
        return scan(carry.transpose(1, 2).contiguous(), drive.transpose(1, 2).contiguous()).transpose(1, 2)

    return forward


def fla_hgrn(channels: int) -> Callable:
    from fla.ops.hgrn import chunk_hgrn

    def forward(x: Tensor, h0: Tensor) -> Tensor:
        log_carry, drive = log_carry_and_drive(x)
        return chunk_hgrn(drive, log_carry, initial_state=h0[:, 0])[0]

    return forward


PEERS = {
    "minGRU-pytorch": mingru_pytorch,
    "mingru-scans": mingru_scans,
    "torch.nn.GRU": torch_gru,
    "accelerated-scan": accelerated_scan,
    "HGRN": fla_hgrn,
}
OTHER_RECURRENCE = ("torch.nn.GRU",)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="numbers of threads to measure with")
    parser.add_argument("--backends", nargs="+", default=None, help="default: all but reference that can run here")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help="default: all that can run here")
    parser.add_argument("--shapes", nargs="*", default=None, metavar="B,T,D", help="default: the four of the LOG")
    parser.add_argument("--gate_scale", type=float, default=1.0, help="standard deviation of the gates")
    parser.add_argument("--gate_bias", type=float, default=0.0, help="their mean: far below 0 states hardly change")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds, of which the median is shown")
    parser.add_argument("--max_seconds", type=float, default=20.0, help="fewer rounds where a shape takes longer")
    parser.add_argument("--json", type=Path, default=None, help="write all numbers to this file")
    parser.add_argument("--png", type=Path, default=None, help="draw time against T to this file (log-log)")
    return parser.parse_args(argv)


def make_function(name: str, channels: int) -> Callable:
    if name in PEERS:
        return PEERS[name](channels)
    return lambda x, h0: mingru_scan(x, h0, backend=name)


def usable(options: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    """The backends and peers that run here, tried on a small input; says why not for the others."""
    names = options.backends or [name for name in BACKENDS if name not in ("auto", "reference")]
    found = []
    for name in [*names, *options.peers]:
        x = torch.zeros(1, 2, 32, dtype=dtype, device=options.device)
        try:
            make_function(name, 16)(x, torch.full_like(x[:, :1, :16], 0.5))
            found.append(name)
        except (ImportError, ValueError, RuntimeError) as error:
            print(f"{str(dtype)[6:]} without {name}: {str(error).splitlines()[0]}")
    return found


def make_calls(functions: dict[str, Callable], shape: tuple[int, int, int], x: Tensor, h0: Tensor) -> dict:
    """(row, column) -> (prepare, function of what that gives), the latter to be timed."""
    a, b = torch.randn_like(x[..., : shape[2]]), torch.randn_like(x[..., : shape[2]])
    out, grad_out = torch.empty_like(a), torch.empty_like(x)
    calls = {("add", "floor"): (None, lambda _: torch.add(a, b, out=out))}
    if NUMBA_AVAILABLE and x.device.type == "cpu":
        states = numba_forward(x, h0, None, None, x.dtype)
        calls["kernel", "forward"] = (None, lambda _: numba_forward(x, h0, None, None, x.dtype, out))
        calls["kernel", "backward"] = (None, lambda _: numba_backward(b, x, h0, states, None, None, grad_out))
    leaves = x.clone().requires_grad_(), h0.clone().requires_grad_()

    for name, function in functions.items():

        def forward(_, function=function):
            with torch.no_grad():
                return function(x, h0)

        def graph(function=function):
            return function(*leaves)

        def backward(states):
            torch.autograd.grad(states, leaves, a)

        calls[name, "forward"] = (None, forward)
        calls[name, "backward"] = (graph, backward)
        calls[name, "both"] = (None, lambda _, graph=graph, backward=backward: backward(graph()))
    return calls


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(prepare: Callable | None, function: Callable, device: str) -> float:
    """Seconds of one call."""
    argument = prepare() if prepare is not None else None
    synchronize(device)
    start = time.perf_counter()
    function(argument)
    synchronize(device)
    return time.perf_counter() - start


def measure(calls: dict, options: argparse.Namespace) -> dict:
    """Median milliseconds of each call; the rounds go over all of them in turn."""
    seconds = {key: [] for key in calls}
    for call in calls.values():
        timed(*call, options.device)
    begin = time.perf_counter()
    for done in range(options.rounds):
        for key, call in calls.items():
            seconds[key].append(timed(*call, options.device))
        if done >= 2 and time.perf_counter() - begin > options.max_seconds:
            break
    return {key: 1e3 * statistics.median(values) for key, values in seconds.items()}


def make_input(shape: tuple[int, int, int], dtype: torch.dtype, options: argparse.Namespace) -> Tensor:
    """Gates and candidates (B, T, 2D)."""
    x = torch.randn(*shape[:2], 2 * shape[2], device=options.device)
    x[..., : shape[2]].mul_(options.gate_scale).add_(options.gate_bias)
    return x.to(dtype)


def largest_errors(names: list[str], x: Tensor) -> dict[str, float]:
    """Largest relative error of a state against the float64 loop."""
    h0 = torch.full_like(x[:, :1, :ERROR_CHANNELS], 0.5)
    with torch.no_grad():
        expected = scan_reference(x.double())
        actual = {name: make_function(name, ERROR_CHANNELS)(x, h0).double() for name in names}
    return {name: ((states - expected) / expected).abs().max().item() for name, states in actual.items()}


def status_megabytes(field: str) -> float:
    """A field of /proc/self/status: VmRSS is the memory held now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    raise ValueError(field)


def peak_megabytes(function: Callable, x: Tensor, h0: Tensor) -> float | None:
    """Most memory held during forward + backward beyond the inputs; None where the system does not tell."""
    x, h0 = x.clone().requires_grad_(), h0.clone().requires_grad_()
    weight = torch.ones_like(x[..., : h0.shape[2]])

    def work():
        torch.autograd.grad(function(x, h0), (x, h0), weight)

    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed must be fetched anew
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = status_megabytes("VmRSS")
        work()
        return max(0.0, status_megabytes("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def measure_shape(names: list[str], shape: tuple, dtype: torch.dtype, options: argparse.Namespace) -> list[dict]:
    """One row a backend or peer: milliseconds, their ratios to the floor, error and memory."""
    functions = {name: make_function(name, shape[2]) for name in names}
    x = make_input(shape, dtype, options)
    h0 = (torch.rand(shape[0], 1, shape[2], device=options.device) + 0.01).to(dtype)
    times = measure(make_calls(functions, shape, x, h0), options)
    few = make_input((*shape[:2], ERROR_CHANNELS), dtype, options)
    error = largest_errors([name for name in names if name not in OTHER_RECURRENCE], few)
    rows = []
    for name in dict.fromkeys(name for name, _ in times):
        row = {"backend": name, "shape": shape, "dtype": str(dtype)[6:], "threads": torch.get_num_threads()}
        for column in ("floor", "forward", "backward", "both"):
            if (name, column) in times:
                row[f"{column}_ms"] = times[name, column]
                row[f"{column}_over_add"] = times[name, column] / times["add", "floor"]
        if name in functions:
            row["peak_mb"] = peak_megabytes(functions[name], x, h0)
        if name in error:
            row["max_relative_error"] = error[name]
        rows.append(row)
    return rows


def print_rows(rows: list[dict]) -> None:
    first = rows[0]
    print(f"\n{first['shape']} {first['dtype']}, {first['threads']} thread(s): add {first['floor_ms']:.2f} ms")
    print(f"{'ms (x add)':<17}{'forward':>17}{'backward':>17}{'both':>17}{'error':>10}{'peak MB':>9}")
    for row in rows[1:]:
        cells = ""
        for column in ("forward", "backward", "both"):
            text = f"{row[f'{column}_ms']:.2f} ({row[f'{column}_over_add']:.2f})" if f"{column}_ms" in row else "-"
            cells += f"{text:>17}"
        error = f"{row['max_relative_error']:.1e}" if "max_relative_error" in row else "-"
        memory = f"{row['peak_mb']:.0f}" if row.get("peak_mb") is not None else "-"
        print(f"{row['backend']:<17}{cells}{error:>10}{memory:>9}")


def draw(rows: list[dict], device: str, path: Path) -> None:
    """Time of forward + backward against T, both axes logarithmic, one line a backend or peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
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
    plt.close(figure)


def finite(value):
    """JSON has no NaN and no infinity: the errors of a scan that breaks down."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    torch.manual_seed(0)
    shapes = SHAPES if options.shapes is None else [tuple(map(int, text.split(","))) for text in options.shapes]
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
        parts = {"results": results, "curve": curve}
        parts = {key: [{k: finite(v) for k, v in row.items()} for row in rows] for key, rows in parts.items()}
        options.json.write_text(json.dumps({"torch": torch.__version__, **parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
