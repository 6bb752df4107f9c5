"""Load videos to train on, from datasets with a Video column, folders of files or UCF101, as clips decoded on demand.

A dataset here has one row per video: `video` (a file's path, or its bytes; never decoded by `datasets` itself, which
would need torchcodec) and `label` (a class). `VideoClips` cuts clips from the videos in the DataLoader's workers.
"""

import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Video, load_dataset
from torchvision.transforms import v2

from ..video_processing_minconvgru import MinConvGRUVideoProcessor, VideoReadError, read_video
from .splits import (
    TABLES,
    WORDS,
    declares_configurations,
    files_of_one_kind,
    list_files,
    load_files,
    name_splits,
    reading,
    split_files,
)

logger = logging.getLogger(__name__)

# Containers that PyAV reads.
VIDEO_EXTENSIONS = (
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"),
    *(".vob", ".webm", ".wmv"),
)
# Tables that describe the videos of a folder, in the format that `datasets` documents for "videofolder".
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FRAME_ORDERS = ("forward", "shuffled")
IGNORE_INDEX = -100
VIEWS = ("center", "five_crops", "ten_crops")  # crops of a frame to test on


def load_video_datasets(
    dataset_name: str,
    dataset_config_name: str | None = None,
    *,
    video_column_name: str | None = None,
    label_column_name: str | None = None,
    validation_split_percentage: int = 10,
    fold: int = 1,
    ucf101_path: str | Path | None = None,
    ucf101_annpath: str | Path | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
) -> DatasetDict:
    """Load labelled videos; a validation set is split off, by video, where there is none (`name_splits`).

    Args:
        dataset_name: `ucf101`; a directory of videos (CLASS/*.mp4, or SPLIT/CLASS/*.mp4 with train, validation, test),
            or of .parquet, .arrow, .json or .csv files (`split_files`); or a dataset on the Hub.
        dataset_config_name: configuration of a dataset on the Hub.
        video_column_name, label_column_name: the columns; None: the first of type Video, and `label` or else the first
            of type ClassLabel.
        validation_split_percentage: percent of the training videos to validate on if there is no validation set.
        fold, ucf101_path, ucf101_annpath: as for `load_ucf101`.
        seed: seed of the split.
        cache_dir: where `datasets` keeps what it downloads and prepares.

    Returns:
        Datasets `train`, `validation` and perhaps `test`, with columns `video` and `label`. Videos without a label
        (null, or -1 in a ClassLabel) are left out, with a warning that counts them.

    Raises:
        FileNotFoundError: if there is no such dataset on the Hub.
        ValueError: if the directory or a column does not exist, there is no video, a video lies outside the folders of
            the classes, there is only one class, or a file cannot be read.
    """
    if not 0 < validation_split_percentage < 100:
        raise ValueError(f"validation_split_percentage must be above 0, below 100, not {validation_split_percentage}")
    if dataset_name == "ucf101":
        return load_ucf101(ucf101_path, ucf101_annpath, fold, validation_split_percentage, seed)
    directory = Path(dataset_name)
    if directory.is_dir():
        splits = _load_directory(directory, dataset_config_name, cache_dir)
    elif directory.exists() or dataset_name.startswith((".", "/", "~")):
        raise ValueError(f"dataset_name: no such directory: {directory}")
    else:
        with reading(dataset_name):
            splits = load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir)
    splits = DatasetDict(name_splits(splits, dataset_name))
    splits = _normalize_columns(splits, dataset_name, video_column_name, label_column_name)
    if "validation" not in splits:
        parts = splits["train"].train_test_split(validation_split_percentage / 100, seed=seed)
        splits |= {"train": parts["train"], "validation": parts["test"]}
    if splits["train"].features["label"].num_classes < 2:
        raise ValueError(f"{dataset_name} has only one class: expected a folder for each of two or more")
    return splits


def load_ucf101(
    video_dir: str | Path | None = None,
    annotation_dir: str | Path | None = None,
    fold: int = 1,
    validation_split_percentage: int = 10,
    seed: int = 0,
) -> DatasetDict:
    """Load UCF101 (arXiv 1212.0402) from its two archives, UCF101.rar and UCF101TrainTestSplits, unpacked.

    Clips of a class with the same number g01..g25 are cut from the same source video. The validation set takes all
    clips of some source videos in the training list, the same share of every class: clips of one source video in both
    sets would make the validation accuracy too high.

    Args:
        video_dir: CLASS/v_CLASS_gXX_cYY.avi; None: the environment variable UCF101_PATH.
        annotation_dir: classInd.txt, trainlist0N.txt and testlist0N.txt; None: UCF101_ANNPATH.
        fold: 1, 2 or 3.
        validation_split_percentage: percent of each class's source videos (at least one) to validate on.
        seed: seed for the choice of these source videos.

    Returns:
        `train`, `validation` and `test` with `video`, `label` and `group` (the source video's number). Files that
        are listed but missing on the disk are left out, with a warning that counts them.

    Raises:
        ValueError: if a directory or an annotation file is missing or not as expected, or there is no video.
    """
    if fold not in (1, 2, 3):
        raise ValueError(f"UCF101 has the folds 1, 2 and 3, not {fold}")
    video_dir = _ucf101_directory(video_dir, "ucf101_path", "UCF101_PATH", "the folders of the classes")
    annotation_dir = _ucf101_directory(annotation_dir, "ucf101_annpath", "UCF101_ANNPATH", "classInd.txt")
    names = [line.split()[1] for line in _ucf101_lines(annotation_dir / "classInd.txt", r"\d+ \w+")]
    rows, missing = {}, []
    for split in ("train", "test"):
        found = []
        pattern = r"\w+/v_\w+_g\d+_c\d+\.avi( \d+)?"
        for line in _ucf101_lines(annotation_dir / f"{split}list0{fold}.txt", pattern):
            file = line.split()[0]
            name, group = file.split("/")[0], int(re.search(r"_g(\d+)_", file)[1])
            if name not in names:
                raise ValueError(f"{annotation_dir / 'classInd.txt'} has no class {name}, which {file} belongs to")
            if (video_dir / file).is_file():
                found.append({"video": str(video_dir / file), "label": names.index(name), "group": group})
            else:
                missing.append(file)
        if not found:
            raise ValueError(
                f"{video_dir} contains none of the videos in {split}list0{fold}.txt, such as {missing[-1]}"
            )
        rows[split] = found
    if missing:
        logger.warning("UCF101: %d listed videos are missing, among them %s", len(missing), ", ".join(missing[:3]))

    generator = np.random.default_rng(seed)
    chosen = set()
    for label in range(len(names)):
        groups = sorted({row["group"] for row in rows["train"] if row["label"] == label})
        count = max(1, round(len(groups) * validation_split_percentage / 100))
        chosen |= {(label, int(group)) for group in generator.permutation(groups)[: min(count, len(groups) - 1)]}
    parts = {
        "train": [row for row in rows["train"] if (row["label"], row["group"]) not in chosen],
        "validation": [row for row in rows["train"] if (row["label"], row["group"]) in chosen],
        "test": rows["test"],
    }
    if not parts["validation"]:
        raise ValueError(
            f"no class of trainlist0{fold}.txt has two source videos on disk, so none is left to validate on"
        )
    return DatasetDict({name: _dataset(part, names) for name, part in parts.items()})


class VideoClips(torch.utils.data.Dataset):
    """Clips of videos as `{"pixel_values_videos": (N, C, H, W) float32, "labels": int}`, decoded on demand.

    Item i is clip `i % clips_per_video` of video `i // clips_per_video`. In training, its position in the video
    and its augmentation are random but depend only on the seed and i: item `i + e * len(self)` is the same clip
    redrawn for epoch e, whichever worker makes it. Otherwise the clips are spread evenly from beginning to end; a
    single one is in the middle.

    A file that cannot be decoded or is too short is reported in a warning once and listed in `unreadable`, and the
    next readable video takes its place. Outside training, the label of the item is then -100, so that losses and
    metrics leave it out. Every access tries the file again: an item must not depend on the items drawn before it, or
    a resumed run would see different items.

    Args:
        videos: a dataset with columns `video` and `label`.
        processor: chooses the frames of a clip and prepares their pixels.
        clips_per_video: clips of each video.
        augment: a function from (N, C, H, W) uint8 to (N, C, crop height, crop width) uint8 that uses torch's global
            random generator; it replaces the processor's resizing and cropping. None keeps the processor's.
        training: draw the clips' positions at random.
        frame_order: forward, or shuffled (a control: how much can be learned without temporal order).
        seed: seed of all randomness.
    """

    redraws_each_epoch = True  # makes training's `BatchStream` keep counting indices across epochs

    def __init__(
        self,
        videos: Dataset,
        processor: MinConvGRUVideoProcessor,
        clips_per_video: int = 1,
        *,
        augment: Callable[[torch.Tensor], torch.Tensor] | None = None,
        training: bool = False,
        frame_order: str = "forward",
        seed: int = 0,
    ):
        if clips_per_video < 1:
            raise ValueError(f"clips_per_video must be positive, not {clips_per_video}")
        if frame_order not in FRAME_ORDERS:
            raise ValueError(f"frame_order must be one of {', '.join(FRAME_ORDERS)}, not {frame_order!r}")
        self.videos, self.processor, self.clips_per_video = videos, processor, clips_per_video
        self.augment, self.training, self.frame_order, self.seed = augment, training, frame_order, seed
        self._unreadable = torch.zeros(len(videos), dtype=torch.bool).share_memory_()  # workers write here too

    def __len__(self) -> int:
        return len(self.videos) * self.clips_per_video

    def __iter__(self) -> Iterator[dict[str, torch.Tensor | int]]:
        return map(self.__getitem__, range(len(self)))  # by default, iteration would go on through all epochs

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        epoch, clip = divmod(index, len(self))
        with torch.random.fork_rng(devices=[]):
            state = np.random.SeedSequence((self.seed, epoch, clip)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0]) >> 1)
            first, number = divmod(clip, self.clips_per_video)
            if self.training:
                position = (number + torch.rand(()).item()) / self.clips_per_video
            else:
                position = clip_positions(self.clips_per_video)[number]
            for step in range(len(self.videos)):
                video = (first + step) % len(self.videos)
                try:
                    frames = self.read(video, [position])[0]
                except VideoReadError as error:
                    self.report(video, error)
                else:
                    label = self.videos[video]["label"] if self.training or step == 0 else IGNORE_INDEX
                    return {"pixel_values_videos": self.prepare(frames), "labels": label}
        raise ValueError(
            f"all {len(self.videos)} videos are unreadable or too short for a clip: the warnings say why. "
            "Lower num_frames or frame_stride, or repair the files"
        )

    def read(self, video: int, positions: list[float], **kwargs) -> np.ndarray:
        """Decode clips of one video.

        Args:
            video: the video's row.
            positions: where the clips lie, each from 0 (the beginning) to 1 (the end).
            kwargs: passed to `read_video`.

        Returns:
            (clips, N, H, W, 3) uint8.

        Raises:
            VideoReadError: if the video cannot be decoded, or is too short.
        """

        def choose(metadata):
            return np.concatenate([self.processor.sample_frames(metadata, position=p) for p in positions])

        source = self.videos[video]["video"]
        frames, _ = read_video(source["bytes"] if source["bytes"] is not None else source["path"], choose, **kwargs)
        return frames.reshape(len(positions), -1, *frames.shape[1:])

    def prepare(self, frames: np.ndarray) -> torch.Tensor:
        """Make the model's input from one clip: (N, H, W, 3) uint8 to (N, C, crop height, crop width) float32."""
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
        if self.frame_order == "shuffled":
            frames = frames[torch.randperm(len(frames), device="cpu")]
        sizing = {}
        if self.augment is not None:
            frames, sizing = self.augment(frames), {"do_resize": False, "do_center_crop": False}
        inputs = self.processor(frames, do_sample_frames=False, return_tensors="pt", **sizing)
        return inputs["pixel_values_videos"][0]

    def report(self, video: int, error: Exception) -> None:
        """Warn about an unreadable video the first time it is met, and record it."""
        if not self._unreadable[video]:
            logger.warning("skipped %s: %s", self.name(video), error)
        self._unreadable[video] = True

    def name(self, video: int) -> str:
        """Return a video's path, or a name made from its row if it has no path."""
        return self.videos[video]["video"]["path"] or f"video {video}"

    @property
    def unreadable(self) -> list[str]:
        """Names of the videos found unreadable so far, by any worker."""
        return [self.name(video) for video in self._unreadable.nonzero().flatten().tolist()]


def clip_positions(clips_per_video: int) -> list[float]:
    """Spread clips evenly over a video: 0 is its beginning, 1 its end; a single clip is in the middle."""
    return [0.5] if clips_per_video == 1 else np.linspace(0, 1, clips_per_video).tolist()


def compose(name: object) -> object:
    """Convert a class name, if it is a string, to composed Unicode (NFC): macOS splits ü into two characters."""
    return unicodedata.normalize("NFC", name) if isinstance(name, str) else name


def make_augmentation(
    processor: MinConvGRUVideoProcessor, min_crop_scale: float = 0.4, flip: bool = True, color_jitter: float = 0.0
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make the random augmentation for training, the same for all frames of a clip.

    Args:
        processor: its `crop_size` is the size of the result.
        min_crop_scale: smallest fraction of the frame's area that a crop covers, with aspect ratios from 3:4 to 4:3;
            1: the processor's own resizing and cropping.
        flip: mirror half of the clips; unsuitable if left and right differ in meaning.
        color_jitter: largest relative change of brightness, contrast and saturation; 0: none.

    Returns:
        A function from (N, C, H, W) uint8 to (N, C, crop height, crop width) uint8.

    Raises:
        ValueError: if a number lies outside its range.
    """
    if not 0 < min_crop_scale <= 1:
        raise ValueError(f"min_crop_scale must lie in (0, 1], not {min_crop_scale}")
    if not 0 <= color_jitter < 1:
        raise ValueError(f"color_jitter must lie in [0, 1), not {color_jitter}")
    height, width = processor.crop_size["height"], processor.crop_size["width"]
    if min_crop_scale < 1:
        steps = [v2.RandomResizedCrop((height, width), scale=(min_crop_scale, 1.0), antialias=True)]
    else:
        steps = [FitAndCrop(processor)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    return v2.Compose(steps)


class FitAndCrop(torch.nn.Module):
    """Resize and crop as the processor does at inference; pixel values stay between 0 and 255.

    Args:
        processor: the processor whose settings apply.
        views: one crop (`center`), `five_crops` (corners and centre) or `ten_crops` (these and their mirror images).
    """

    def __init__(self, processor: MinConvGRUVideoProcessor, views: str = "center"):
        super().__init__()
        if views not in VIEWS:
            raise ValueError(f"views must be one of {', '.join(VIEWS)}, not {views!r}")
        self.processor, self.views = processor, views

    def forward(self, frames: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Return (N, C, crop height, crop width) uint8, or a list of them if there are several views."""
        inputs = self.processor(
            frames,
            do_sample_frames=False,
            do_rescale=False,
            do_normalize=False,
            do_center_crop=self.views == "center" and self.processor.do_center_crop,
            return_tensors="pt",
        )
        frames = inputs["pixel_values_videos"][0]
        if self.views == "center":
            return frames
        size = (self.processor.crop_size["height"], self.processor.crop_size["width"])
        return list((v2.FiveCrop if self.views == "five_crops" else v2.TenCrop)(size)(frames))


def _load_directory(directory: Path, config_name: str | None, cache_dir: str | None) -> DatasetDict:
    """Load a directory's videos, with the names of their folders as classes, or its tables."""
    videos = list_files(directory, VIDEO_EXTENSIONS)
    tables = [file for file in list_files(directory, TABLES) if Path(file).name in METADATA_FILES]
    if videos and tables:
        return load_files("videofolder", split_files(directory, sorted(videos + tables)), cache_dir=cache_dir)
    if not videos:
        if config_name is not None or declares_configurations(directory):
            with reading(str(directory)):
                return load_dataset(str(directory), config_name, cache_dir=cache_dir)
        expected = (
            "no videos: expected CLASS/*.mp4 or train/CLASS/*.mp4 in it, or files with a column of videos "
            f"({', '.join(TABLES)})"
        )
        builder, files = files_of_one_kind(directory, TABLES, expected)
        return load_files(builder, split_files(directory, files), cache_dir=cache_dir)

    splits, root = split_files(directory, videos, min_folders=1), directory.resolve()
    paths = {name: [Path(file) for file in files] for name, files in splits.items()}
    examples: dict[int, Path] = {}  # one for each number of folders above a video, SPLIT not counted
    for path in (path.relative_to(root) for part in paths.values() for path in part):
        folders = len(path.parts) - 1
        examples.setdefault(folders - (folders > 1 and path.parts[0] in WORDS), path)
    if len(examples) > 1 or 0 in examples:
        raise ValueError(
            f"{directory}: the class of {examples[min(examples)]} is unclear, expected every video in the folder "
            "of its class, as CLASS/*.mp4 or train/CLASS/*.mp4. Move it, or remove it."
        )
    names = sorted({compose(path.parent.name) for part in paths.values() for path in part})
    return DatasetDict(
        {
            split: _dataset([{"video": str(p), "label": names.index(compose(p.parent.name))} for p in part], names)
            for split, part in paths.items()
        }
    )


def _normalize_columns(splits: DatasetDict, dataset_name: str, video: str | None, label: str | None) -> DatasetDict:
    """Reduce each split to the columns `video` (not decoded) and `label` (the same ClassLabel in all splits)."""
    features = splits["train"].features
    if video is None:
        video = next((name for name, feature in features.items() if isinstance(feature, Video)), None)
    if label is None:
        classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        label = "label" if "label" in features else classes[0] if classes else None
    for kind, name in (("video", video), ("label", label)):
        if name is None or name not in features:
            raise ValueError(
                f"{dataset_name} has no column {name or f'that looks like the {kind}'}: name one of "
                f"{', '.join(features)} with {kind}_column_name (a folder needs a subfolder per class)"
            )
    unknown = (None, -1) if isinstance(features[label], ClassLabel) else (None,)
    for split, dataset in list(splits.items()):
        dataset = dataset.select_columns([video, label]).rename_columns({video: "video", label: "label"})
        labelled = [row for row, value in enumerate(dataset["label"]) if value not in unknown]
        if len(labelled) < len(dataset):
            missing = len(dataset) - len(labelled)
            logger.warning("%s: %d of %d videos in %s have no label", dataset_name, missing, len(dataset), split)
            dataset = dataset.select(labelled)
        splits[split] = dataset.cast_column("video", Video(decode=False))
        if len(dataset) == 0:
            del splits[split]
    if "train" not in splits:
        raise ValueError(f"{dataset_name} has no video to train on, or none with a label")
    if not isinstance(features[label], ClassLabel):
        names = sorted({compose(value) for dataset in splits.values() for value in dataset.unique("label")})
        numbers = {name: number for number, name in enumerate(names)}
        feature = ClassLabel(names=[str(name) for name in names])
        for split, dataset in splits.items():
            labels = [numbers[compose(value)] for value in dataset["label"]]
            splits[split] = dataset.remove_columns("label").add_column("label", labels).cast_column("label", feature)
    return splits


def _dataset(rows: list[dict], names: list[str]) -> Dataset:
    """Make a dataset from rows with `video` (path), `label` and perhaps `group`."""
    dataset = Dataset.from_list(rows).cast_column("video", Video(decode=False))
    return dataset.cast_column("label", ClassLabel(names=names))


def _ucf101_directory(given: str | Path | None, argument: str, variable: str, content: str) -> Path:
    """Return a directory of UCF101, given as an argument or by an environment variable."""
    path = given or os.environ.get(variable)
    if not path:
        raise ValueError(f"UCF101 not found: give {argument}, or set {variable} to the directory with {content}")
    if not Path(path).is_dir():
        raise ValueError(f"{argument}: no such directory: {path} (expected {content} in it)")
    return Path(path)


def _ucf101_lines(path: Path, pattern: str) -> list[str]:
    """Read the lines of an annotation file, each of which must match `pattern`."""
    if not path.is_file():
        raise ValueError(f"no annotation file {path}: unpack UCF101TrainTestSplits-RecognitionTask.zip there")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(pattern, line):
            raise ValueError(f"{path}, line {number}, has an unexpected format: {line!r}")
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines
