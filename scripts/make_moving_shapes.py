#!/usr/bin/env python
"""Write the moving shapes dataset: videos of eight classes that only the order of the frames tells apart.

    python scripts/make_moving_shapes.py --output_dir data/moving_shapes

A shape moves left, right, up or down, turns clockwise or counter-clockwise, grows or shrinks, and nothing
else about it changes; see mingru_hf/data/moving_shapes.py. The files are named SPLIT/CLASS/NUMBER.mp4;
`load_dataset("videofolder", data_dir=...)` and scripts/train_video_classification.py can read them.
"""

import time
from dataclasses import MISSING, dataclass

from mingru_hf.data.moving_shapes import write_moving_shapes
from mingru_hf.training.arguments import option, parse_dataclasses


@dataclass(kw_only=True)
class ShapeArguments:
    """Options for the videos."""

    output_dir: str = option(MISSING, "directory to create", group="output")
    overwrite_output_dir: bool = option(False, "replace a directory that contains only such videos")
    num_train: int = option(4000, "training videos")
    num_validation: int = option(400, "validation videos")
    num_test: int = option(800, "test videos")
    num_frames: int = option(16, "frames per video", group="videos")
    size: int = option(64, "width and height of a frame, pixels")
    fps: int = option(8, "frames per second")
    seed: int = option(0, "seed of all videos", group="machine")
    num_proc: int = option(1, "processes that render and encode")


def parse_args(argv: list[str] | None) -> tuple:
    """Read the command line."""
    return parse_dataclasses(__doc__, argv, ShapeArguments)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    began = time.perf_counter()
    with parser.user_errors():
        values = vars(args).copy()
        directory = write_moving_shapes(overwrite=values.pop("overwrite_output_dir"), **values)
    count = args.num_train + args.num_validation + args.num_test
    print(f"{count:,} videos in {time.perf_counter() - began:.0f} s; written to {directory}")


if __name__ == "__main__":
    main()
