#!/usr/bin/env python
"""Classify a video frame by frame and print the prediction after each frame that the model reads.

    python scripts/stream_video.py --model_name_or_path runs/shapes --video clip.mp4
    python scripts/stream_video.py --model_name_or_path runs/shapes --video clip.mp4 --output_file seen.mp4
    python scripts/stream_video.py --model_name_or_path runs/shapes --video /dev/video0 --camera

The model reads each frame once, or every N-th frame only, as set by --frame_stride or else the model's
processor. The cache holds the state, whose size is constant. The output file is a video with the prediction
written under each frame, or a PNG with up to eight frames above the curves of the probabilities.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import mingru_hf  # noqa: F401  registers MinConvGRU with the Auto classes
from mingru_hf.data.av import import_av, write_video
from mingru_hf.training.arguments import check_values, option, parse_dataclasses
from mingru_hf.training.models import load_pretrained
from mingru_hf.video_processing_minconvgru import decode_frames, upright

CAMERAS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}


@dataclass(kw_only=True)
class StreamArguments:
    """Options for the model and the video."""

    model_name_or_path: str = option(MISSING, "the model: a directory, or a name on the Hub", group="model")
    video: str = option(MISSING, "a file, or the name of a camera's device", group="video")
    camera: bool = option(False, "--video is the name of a camera")
    frame_stride: int | None = option(
        None, "take every N-th frame; default: the stride of the model's processor", positive=True
    )
    max_frames: int | None = option(None, "stop after N frames of the video", positive=True)
    output_file: str | None = option(
        None, "write the annotated video (.mp4), or frames and curves (.png), to this file"
    )
    overwrite_output_file: bool = option(False, "replace output_file if it exists")
    top_k: int = option(1, "classes to print after each frame", positive=True)
    use_cpu: bool = option(False, "stay on the CPU even if there is a GPU", group="machine")

    def __post_init__(self):
        check_values(self)
        if self.output_file is not None and Path(self.output_file).suffix not in (".mp4", ".png"):
            raise ValueError(f"output_file must end in .mp4 or .png, not {self.output_file}")


def parse_args(argv: list[str] | None) -> tuple:
    """Read the command line."""
    return parse_dataclasses(__doc__, argv, StreamArguments)


def read_frames(container, max_frames: int | None) -> Iterator[np.ndarray]:
    """Yield decoded frames one after another: (H, W, 3) uint8 RGB each, turned upright."""
    for number, frame in enumerate(decode_frames(container)):
        if number == max_frames:
            return
        yield upright(frame.to_ndarray(format="rgb24"), frame)


class Watcher:
    """A video classifier that reads one frame at a time and keeps its state between them.

    Args:
        model: the classifier.
        processor: its video processor.
        device: the device to run on.
    """

    def __init__(self, model, processor, device: torch.device | str):
        self.model, self.processor, self.device = model.to(device).eval(), processor, device
        self.cache = None

    @torch.no_grad()
    def see(self, frame: np.ndarray) -> torch.Tensor:
        """Read one frame (H, W, 3) uint8; return the probabilities (classes,) given all frames so far."""
        inputs = self.processor(frame[None], do_sample_frames=False, return_tensors="pt").to(self.device)
        outputs = self.model(**inputs, cache=self.cache, use_cache=True)
        self.cache = outputs.cache
        return outputs.logits[0].float().softmax(-1).cpu()


def annotate(frame: np.ndarray, text: str) -> np.ndarray:
    """Write a line under a frame, enlarged to be readable: its sides become even and at least 240 pixels."""
    scale = max(1, -(-240 // min(frame.shape[:2])))
    image = Image.fromarray(frame).resize((frame.shape[1] * scale // 2 * 2, frame.shape[0] * scale // 2 * 2), 0)
    canvas = Image.new("RGB", (image.width, image.height + 24))
    canvas.paste(image)
    ImageDraw.Draw(canvas).text((6, image.height + 5), text, fill="white", font_size=13)
    return np.asarray(canvas)


def trained_stride(processor, rate: float | None) -> float:
    """Return the stride with which a processor samples a video of `rate` frames per second (None: unknown).

    Raises:
        ValueError: if the processor samples at a fixed rate and the rate of the video is unknown.
    """
    if processor.fps is None:
        return processor.frame_stride
    if not rate:
        raise ValueError(
            f"the model takes {processor.fps} frames per second, but the video's own rate is unknown: give "
            "--frame_stride"
        )
    return max(1.0, float(rate) / processor.fps)


def watch(watcher: Watcher, frames: Iterator[np.ndarray], args: StreamArguments, stride: float) -> Iterator[tuple]:
    """Classify every `stride`-th frame, print a line, and yield (number, frame, probabilities, line) for every frame.

    Frames in between repeat the last prediction. If the stride is a fraction, its multiples are rounded down to frame
    numbers, as in a clip.
    """
    names = watcher.model.config.id2label
    began, shown = time.perf_counter(), 0
    for number, frame in enumerate(frames):
        if number == int(shown * stride + 1e-6):
            shown += 1
            probabilities = watcher.see(frame)
            best = probabilities.topk(min(args.top_k, len(names)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            line = ", ".join(f"{names[label]} {100 * value:.0f} %" for label, value in pairs)
            print(f"frame {number}: {line}", flush=True)
        yield number, frame, probabilities, line
    print(f"{(number + 1) / (time.perf_counter() - began):.1f} frames/s", file=sys.stderr)


def keep_evenly(seen: Iterator[tuple], limit: int = 64) -> tuple[dict[int, np.ndarray], torch.Tensor]:
    """Keep every n-th frame of a stream of any length; n doubles whenever `limit` frames are kept.

    Args:
        seen: the tuples that `watch` yields.
        limit: number of kept frames at which every other one is dropped.

    Returns:
        Frames (H, W, 3) by their number, fewer than `limit`, and the probabilities (T, classes).
    """
    frames, courses, every = {}, [], 1
    for number, frame, probabilities, _ in seen:
        courses.append(probabilities)
        if number % every == 0:
            frames[number] = frame
        if len(frames) == limit:
            every *= 2
            frames = {number: frame for number, frame in frames.items() if number % every == 0}
    return frames, torch.stack(courses)


def plot_strip(frames: dict[int, np.ndarray], courses: torch.Tensor, names: dict[int, str], path: Path) -> None:
    """Draw up to eight frames in a row above the curves of the five likeliest classes, and save it as PNG.

    Args:
        frames: (H, W, 3) by their number.
        courses: (T, classes) probabilities.
        names: names of the classes, by label.
        path: the file to write.
    """
    chosen = np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)
    numbers = [list(frames)[i] for i in chosen]
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 2])
    for axes, number in zip(top.subplots(1, len(numbers), squeeze=False)[0], numbers, strict=True):
        axes.imshow(frames[number])
        axes.set_title(f"frame {number}", fontsize=8)
        axes.axis("off")
    axes = bottom.subplots()
    for label in courses.max(0).values.topk(min(5, len(names))).indices.tolist():
        axes.plot(courses[:, label], label=names[label], marker=".")
    axes.set(xlabel="frame", ylabel="probability", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    with parser.user_errors():
        av = import_av()
        model = load_pretrained(AutoModelForVideoClassification, args.model_name_or_path)
        if getattr(model.config, "bidirectional", True):  # other classifiers have neither this field nor a cache
            raise ValueError(
                f"{args.model_name_or_path} classifies only whole clips, because it is bidirectional or not a "
                "MinConvGRU: give a MinConvGRU with bidirectional=false, or give the file to "
                "pipeline('video-classification')"
            )
        processor = load_pretrained(AutoVideoProcessor, args.model_name_or_path)
        output_file = args.output_file and Path(args.output_file)
        if output_file and output_file.exists() and not args.overwrite_output_file:
            raise ValueError(f"{output_file} exists: choose another output_file, or add --overwrite_output_file")
        try:
            container = av.open(args.video, format=CAMERAS.get(sys.platform) if args.camera else None)
        except av.FFmpegError as error:
            raise ValueError(f"{args.video} cannot be read as a video: {error}") from None
        if not container.streams.video:
            raise ValueError(f"{args.video} has no video stream: expected a video, not an audio file")
        rate = container.streams.video[0].average_rate
        stride = args.frame_stride or trained_stride(processor, rate)
        frames = read_frames(container, args.max_frames)
        first = next(frames, None)
        if first is None:
            raise ValueError(f"{args.video} has no frame that can be decoded")
    use_accelerator = torch.accelerator.is_available() and not args.use_cpu
    watcher = Watcher(model, processor, torch.accelerator.current_accelerator() if use_accelerator else "cpu")
    with container:
        seen = watch(watcher, chain([first], frames), args, stride)
        if output_file is None:
            for _ in seen:
                pass
            return
        output_file.parent.mkdir(parents=True, exist_ok=True)
        staging = output_file.with_name(f".incomplete-{output_file.name}")
        if output_file.suffix == ".mp4":
            write_video(staging, (annotate(frame, line) for _, frame, _, line in seen), fps=rate or 25)
        else:
            plot_strip(*keep_evenly(seen), model.config.id2label, staging)
        os.replace(staging, output_file)
    print(f"written to {output_file}", file=sys.stderr)


if __name__ == "__main__":
    main()
