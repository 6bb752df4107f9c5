"""Moving shapes: short videos of eight classes that only the order of the frames tells apart.

A shape has four coordinates: horizontal and vertical position, angle and size. Each coordinate is periodic: a shape
that leaves the frame on one side enters it on the other, and a shape that has grown to the largest size starts again
at the smallest. In each video, one coordinate changes; the class says which one and in which direction. Anything less
than the ordered sequence therefore says little about the class:

- A single frame says nothing: each coordinate starts at a random point of its period, so at every time step the four
  are uniform and independent, whatever the class.
- All frames without their order show which coordinate changes, but not in which direction: at most half of the answers
  can be right.
- The reversed sequence belongs to the opposite class: left for right, growing for shrinking.
"""

import math
import os
import re
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .av import import_av, write_video

CLASSES = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "growing", "shrinking")
SPLITS = ("train", "validation", "test")
# Smallest and largest step per frame, in periods of each coordinate: 1.3 to 2.7 pixels of 64 (positions), 10 to 15
# degrees, and 5 to 6 % of the way from the smallest to the largest size.
STEPS = ((1 / 48, 1 / 24), (1 / 48, 1 / 24), (10 / 360, 15 / 360), (0.05, 0.06))
RADII = (0.10, 0.42)  # smallest and largest, in widths of the frame
SUPERSAMPLING = 4
MIN_CONTRAST = 80  # difference in luma, which lies in 0 to 255

# Outlines around (0, 0), x to the right and y down. Each shows its angle, if only up to half a turn (the bar).
SHAPES = (
    ((-0.8, -0.6), (1.0, 0.0), (-0.8, 0.6)),  # wedge
    ((-1.0, -0.35), (1.0, -0.35), (1.0, 0.35), (-1.0, 0.35)),  # bar
    ((-1.0, -0.25), (0.2, -0.25), (0.2, -0.7), (1.0, 0.0), (0.2, 0.7), (0.2, 0.25), (-1.0, 0.25)),  # arrow
    tuple((math.cos(a), math.sin(a) - 0.4) for a in np.linspace(0, math.pi, 12)),  # half disc
)


def trajectory(label: int, num_frames: int, generator: np.random.Generator) -> np.ndarray:
    """Draw a random trajectory of a shape's four coordinates.

    Args:
        label: index into `CLASSES`.
        num_frames: frames T.
        generator: source of the randomness.

    Returns:
        (T, 4) horizontal position, vertical position (down), angle (clockwise) and size, in periods: [0, 1).
    """
    axis, backwards = divmod(label, 2)
    backwards ^= axis in (0, 1)  # the classes of the positions are listed backwards first: left, right, up, down
    step = generator.uniform(*STEPS[axis])
    course = np.zeros((num_frames, 4))
    course[:, axis] = (-step if backwards else step) * np.arange(num_frames)
    return (generator.random(4) + course) % 1.0


def render(course: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Render a shape with a random outline and random colours along a trajectory.

    Args:
        course: (T, 4) from `trajectory`.
        size: width and height of a frame, in pixels.
        generator: source of the outline and the colours.

    Returns:
        (T, size, size, 3) uint8 RGB.
    """
    outline = np.array(SHAPES[generator.integers(len(SHAPES))])
    background, color = _colors(generator)
    width = size * SUPERSAMPLING
    frames = np.empty((len(course), size, size, 3), np.uint8)
    for frame, (x, y, angle, scale) in zip(frames, course, strict=True):
        radius = width * RADII[0] * (RADII[1] / RADII[0]) ** scale
        sine, cosine = math.sin(2 * math.pi * angle), math.cos(2 * math.pi * angle)
        points = radius * outline @ np.array([[cosine, sine], [-sine, cosine]]) + np.array([x, y]) * width
        image = Image.new("RGB", (width, width), background)
        draw = ImageDraw.Draw(image)
        for shift_x in (-width, 0, width):  # a shape that leaves on one side enters on the other
            for shift_y in (-width, 0, width):
                draw.polygon([(px + shift_x, py + shift_y) for px, py in points], fill=color)
        frame[:] = np.asarray(image.reduce(SUPERSAMPLING))
    return frames


def make_moving_shape(label: int, num_frames: int = 16, size: int = 64, seed: int | tuple[int, ...] = 0) -> np.ndarray:
    """Make the frames of one video; the same arguments give the same frames.

    Args:
        label: index into `CLASSES`.
        num_frames: frames T, 2 or more.
        size: width and height in pixels; even, as the codec requires.
        seed: seed of everything except the class.

    Returns:
        (T, size, size, 3) uint8 RGB.

    Raises:
        ValueError: if the label is not a class, `num_frames` or `size` is too small, or `size` is odd.
    """
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"label {label} is not a class: expected 0 to {len(CLASSES) - 1}")
    if num_frames < 2:
        raise ValueError(f"num_frames is {num_frames}, expected at least 2: one frame does not show the class")
    if size < 16 or size % 2:
        raise ValueError(f"size is {size} pixels, expected an even number of at least 16")
    generator = np.random.default_rng(seed)
    return render(trajectory(label, num_frames, generator), size, generator)


def write_moving_shapes(
    output_dir: str | Path,
    num_train: int = 4000,
    num_validation: int = 400,
    num_test: int = 800,
    num_frames: int = 16,
    size: int = 64,
    fps: int = 8,
    seed: int = 0,
    num_proc: int = 1,
    overwrite: bool = False,
) -> Path:
    """Write the dataset in the layout that `datasets`' videofolder reads: SPLIT/CLASS/NUMBER.mp4.

    The classes are equally frequent in each split. The same arguments give the same frames, though the encoder may
    round them differently; a larger split begins with the videos of a smaller one.

    Args:
        output_dir: written under a temporary name in the same folder, and renamed once complete.
        num_train, num_validation, num_test: number of videos in each split.
        num_frames, size, fps: frames, width and height in pixels, and frames per second of each video.
        seed: seed of all videos.
        num_proc: processes that render and encode.
        overwrite: replace an `output_dir` that holds nothing but such a dataset.

    Returns:
        `output_dir` as a path.

    Raises:
        ValueError: if `output_dir` exists and may not be replaced, a number is too small, or `size` is odd.
        ImportError: if PyAV is missing.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        if not overwrite:
            raise ValueError(f"{output_dir} exists: choose another output_dir, or add --overwrite_output_dir")
        if (foreign := _foreign_file(output_dir)) is not None:
            raise ValueError(f"{output_dir} holds other files, such as {foreign}: choose another output_dir")
    counts = dict(zip(SPLITS, (num_train, num_validation, num_test), strict=True))
    for split, count in counts.items():
        if count < len(CLASSES):
            raise ValueError(f"num_{split} is {count}, expected at least one video per class: {len(CLASSES)}")
    if seed < 0 or num_proc < 1 or fps < 1:
        raise ValueError(f"seed, num_proc and fps must be at least 0, 1 and 1, got {seed}, {num_proc} and {fps}")
    import_av()
    make_moving_shape(0, num_frames, size)  # refuses bad sizes before anything is written

    place = output_dir.resolve()  # if output_dir is a link, its target is replaced and the link stays
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=place.parent))
    try:
        jobs = []
        for split_number, (split, count) in enumerate(counts.items()):
            for name in CLASSES:
                (staging / split / name).mkdir(parents=True)
            for number in range(count):
                label = number % len(CLASSES)
                path = staging / split / CLASSES[label] / f"{number:06d}.mp4"
                jobs.append((path, label, (seed, split_number, number)))
        with ProcessPoolExecutor(num_proc) if num_proc > 1 else nullcontext() as pool:
            mapped = pool.map if pool else map
            columns = zip(*jobs, strict=True)
            chunks = {"chunksize": 32} if pool else {}
            for _ in mapped(_write_one, *columns, repeat(num_frames), repeat(size), repeat(fps), **chunks):
                pass
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)  # mkdtemp makes a directory that only its owner can read
        if place.exists():
            old = Path(tempfile.mkdtemp(prefix=".old-", dir=place.parent))
            os.rename(place, old / place.name)
            try:
                os.rename(staging, place)
            except OSError:
                os.rename(old / place.name, place)
                raise
            finally:
                shutil.rmtree(old)
        else:
            os.rename(staging, place)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return output_dir


def _foreign_file(directory: Path) -> str | None:
    """Return the name of a file or folder that `write_moving_shapes` would not write; None if there is none."""
    if not directory.is_dir():
        return directory.name
    ours = re.compile(rf"({'|'.join(SPLITS)})(/({'|'.join(CLASSES)})(/\d{{6}}\.mp4)?)?")
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or path.is_dir() == name.endswith(".mp4") or not ours.fullmatch(name):
            return name
    return None


def _write_one(path: Path, label: int, seed: tuple[int, ...], num_frames: int, size: int, fps: int) -> None:
    write_video(path, make_moving_shape(label, num_frames, size, seed), fps)


def _colors(generator: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw a random background colour and a random colour that is visibly brighter."""
    luma = np.array([0.299, 0.587, 0.114])
    while True:
        background, color = generator.integers(0, 256, (2, 3))
        if luma @ (color - background) >= MIN_CONTRAST:
            return tuple(background.tolist()), tuple(color.tolist())
