"""Utilities shared by the benchmarks: timing, memory measurement, command-line options and reports.

Times are in seconds; 1 MB is 1e6 bytes. A device is "cpu", "cuda", or a GPU by its number, as in "cuda:1".
"""

import argparse
import ctypes
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks; adds an option's default to its help unless None, False or stated there."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, argparse.SUPPRESS) or default is False or "default" in action.help:
            return action.help
        return f"{action.help} (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"


def device_name(name: str) -> str:
    """Check the value of --device, as argparse's `type`."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from None
    return name


def new_file(name: str) -> Path:
    """Check and convert the name of a file to write, as argparse's `type`."""
    path = Path(name)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{name} already exists: choose another name, or remove it first")
    return path


def at_least_one(text: str) -> int:
    """Check and convert an option's integer, such as that of --rounds, as argparse's `type`."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def is_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def machine(device: str | torch.device = "cpu") -> str:
    """Return torch's version and the hardware that it runs on, for the first line of a report."""
    if is_cuda(device):
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def synchronize(device: str | torch.device) -> None:
    """Wait until a GPU has finished all queued work; on a CPU, do nothing."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def seconds_of(step: Callable[[], Any], device: str | torch.device = "cpu") -> float:
    """Time one step, from an idle device until it is idle again."""
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - began


def interleave(
    steps: dict[Hashable, Any],
    rounds: int,
    device: str | torch.device = "cpu",
    *,
    timed: Callable[[Any, str], float] = seconds_of,
    max_seconds: float = math.inf,
) -> dict[Hashable, float]:
    """Time steps that take turns, so that a busy machine slows all of them alike.

    Args:
        steps: functions without arguments, or whatever `timed` takes, by name.
        rounds: timed runs of each step, after one warm-up run that is not counted.
        device: where the steps run.
        timed: returns the seconds that a step takes on a device.
        max_seconds: after this time no further round begins, but at least three are run if `rounds` allows.

    Returns:
        The median seconds of each step, by name.
    """
    seconds = {name: [] for name in steps}
    for step in steps.values():
        timed(step, device)
    began = time.perf_counter()
    for done in range(rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, device))
        if done >= 2 and time.perf_counter() - began > max_seconds:
            break
    return {name: statistics.median(values) for name, values in seconds.items()}


def process_megabytes(field: str = "VmRSS") -> float:
    """Return the MB that the process holds now (VmRSS) or held at its peak (VmHWM) on Linux; NaN on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


def peak_megabytes(step: Callable[[], Any], device: str | torch.device = "cpu") -> float:
    """Return the peak MB that `step` adds to the memory of the GPU or this process; NaN if it cannot be measured."""
    if is_cuda(device):
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system, so that `step` must request it again
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except (OSError, AttributeError):
        return math.nan
    before = process_megabytes("VmRSS")
    step()
    return max(0.0, process_megabytes("VmHWM") - before)


def write_json(path: Path, report: dict) -> None:
    """Write a report. NaN and infinity, which JSON does not have, become strings, as do paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(report), indent=2, default=str) + "\n")


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
