#!/usr/bin/env python
"""Time torch-mingru's UCF101 classifier (VGG16, five recurrent stacks) against its backbone alone.

    python scripts/benchmark_video.py
    python scripts/benchmark_video.py --video clip.mp4 --frame_step 2 --dtype bfloat16 --json runs/video.json

Forward passes and training steps of the model and of the backbone alone take turns, so that a busy machine
slows all of them alike; medians and their ratios are shown. Peak memory is the amount that a step adds to a
process that runs nothing else.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from benchmarking import HelpFormatter, at_least_one, interleave, machine, new_file, peak_megabytes, write_json
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from transformers import TimmBackboneConfig

from mingru_hf import MinConvGRUConfig, MinConvGRUForVideoClassification
from mingru_hf.video_processing_minconvgru import read_video

STEPS = ("model forward", "backbone forward", "model training", "backbone training")


def read_clips(path: str, batch_size: int, num_frames: int, frame_step: int, size: int) -> Tensor:
    """Read B clips of a video one after another, one frame in `frame_step`: (B, T, 3, size, size) in [-1, 1]."""
    wanted = np.arange(batch_size * num_frames) * frame_step

    def choose(metadata) -> np.ndarray:
        there, needed = metadata.total_num_frames, wanted[-1] + 1
        if there < needed:
            raise ValueError(f"{path} has {there} frames, but {needed} are needed: lower --frame_step.")
        return wanted

    frames = torch.from_numpy(read_video(path, choose)[0]).permute(0, 3, 1, 2)
    resize = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)])
    return 2 * resize(frames).unflatten(0, (batch_size, num_frames)) - 1


def build(args: argparse.Namespace) -> tuple[MinConvGRUForVideoClassification, Tensor]:
    """Build the model with random weights, and a batch of clips (B, T, 3, H, W)."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    backbone = TimmBackboneConfig(backbone="vgg16", out_indices=[0, 1, 2, 3, 4])
    config = MinConvGRUConfig(backbone_config=backbone, feature_pooling=True, num_labels=101)
    if args.video is None:
        clips = torch.randn(args.batch_size, args.num_frames, 3, args.image_size, args.image_size)
    else:
        clips = read_clips(args.video, args.batch_size, args.num_frames, args.frame_step, args.image_size)
    return MinConvGRUForVideoClassification(config), clips


def make_step(name: str, model: MinConvGRUForVideoClassification, clips: Tensor, bf16: bool) -> Callable[[], None]:
    """Return the function for one of STEPS: forward without gradients, or forward and backward."""
    labels, backbone = torch.zeros(len(clips), dtype=torch.long), model.model.backbone
    images = clips.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # as the model passes them

    def step() -> None:
        training = name.endswith("training")
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if name.startswith("model"):
                loss = model(clips, labels=labels).loss
            else:
                loss = sum(maps.float().mean() for maps in backbone(images).feature_maps)
        if training:
            loss.backward()
            model.zero_grad()

    return step


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """Return the peak MB that a step adds to the memory of this process, which must have run nothing else."""
    return peak_megabytes(make_step(name, *build(args), args.dtype == "bfloat16"))


def multiply_adds(step: Callable[[], None]) -> int:
    """Count the multiply-adds of a step's convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() // 2


def seconds_in_scan(step: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds of a training step inside the scan's operators: forward, backward."""
    for _ in range(2):  # the first profile includes the start of the profiler
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            step()
    times = {event.key.split("::")[-1]: event.cpu_time_total / 1e6 for event in recorded.key_averages()}
    return times["scan"], times["scan_backward"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--video", help="a file whose frames are used; default: random frames")
    parser.add_argument("--frame_step", type=int, default=1, help="take every N-th frame of the video", metavar="N")
    parser.add_argument("--batch_size", type=int, default=1, help="clips in a batch")
    parser.add_argument("--num_frames", type=int, default=10, help="frames in a clip")
    parser.add_argument("--image_size", type=int, default=224, help="pixels along a side of a frame")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is autocast")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="CPU threads to use")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="rounds per measurement; the median is shown")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all numbers to this file")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        model, clips = build(args)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    steps = {name: make_step(name, model, clips, args.dtype == "bfloat16") for name in STEPS}
    counts = {
        "model": sum(parameter.numel() for parameter in model.parameters()),
        "backbone": sum(parameter.numel() for parameter in model.model.backbone.parameters()),
    }
    work = {name: multiply_adds(steps[f"{name} forward"]) for name in counts}
    seconds = interleave(steps, args.rounds)
    scan_forward, scan_backward = seconds_in_scan(steps["model training"])
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        memory = dict(zip(STEPS, pool.map(peak_memory, STEPS, [args] * len(STEPS)), strict=True))

    print(
        f"{machine()}, {args.dtype}; clips "
        f"{tuple(clips.shape)}{'' if args.video is None else f' of {Path(args.video).name}'}"
    )
    print(f"{'':18}{'seconds':>8} {'peak MB':>9}")
    for name in STEPS:
        print(f"{name:18}{seconds[name]:8.3f} {memory[name]:9.0f}")
    shares = {
        "multiply_adds": work["model"] / work["backbone"] - 1,
        "heads_forward": seconds["model forward"] / seconds["backbone forward"] - 1,
        "heads_training": seconds["model training"] / seconds["backbone training"] - 1,
        "scan_forward": scan_forward / seconds["backbone forward"],
        "scan_training": (scan_forward + scan_backward) / seconds["backbone training"],
    }
    print(
        f"parameters: {counts['model']:,}, of which backbone {counts['backbone']:,}\n"
        f"multiply-adds of a forward pass: {work['model'] / 1e9:.1f} G, of which backbone "
        f"{work['backbone'] / 1e9:.1f} G\n"
        f"heads over backbone: {shares['multiply_adds']:.1%} of its multiply-adds, {shares['heads_forward']:.1%} of "
        f"its forward time, {shares['heads_training']:.1%} of its training step\n"
        f"scan over backbone: {shares['scan_forward']:.2%} of its forward time, {shares['scan_training']:.2%} of its "
        "training step"
    )
    if args.json:
        report = {"parameters": counts, "multiply_adds": work, "seconds": seconds, "peak_mb": memory, "shares": shares}
        write_json(args.json, {"arguments": vars(args), **report})


if __name__ == "__main__":
    main()
