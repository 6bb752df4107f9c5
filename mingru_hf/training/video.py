"""Code shared by the video scripts: the options and datasets, and the test protocol for whole videos."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import DatasetDict
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.video import FRAME_ORDERS, FitAndCrop, VideoClips, clip_positions, load_video_datasets
from ..video_processing_minconvgru import VideoReadError
from .arguments import option
from .models import training_arguments


@dataclass(kw_only=True)
class VideoDataArguments:
    """Options for the dataset of videos."""

    dataset_name: str = option(
        "ucf101",
        "ucf101; or a directory with CLASS/*.mp4, or with train/CLASS/*.mp4 and likewise validation/ and test/; or a "
        "dataset on the Hub",
        group="data",
    )
    dataset_config_name: str | None = option(None, "configuration of the dataset")
    video_column_name: str | None = option(None, "the column with the videos; default: found by its type")
    label_column_name: str | None = option(None, "the column with the classes; default: label, or found by its type")
    validation_split_percentage: int = option(
        10, "percent of the training videos to validate on if there is no validation split"
    )
    fold: int = option(1, "UCF101's split: 1, 2 or 3")
    ucf101_path: str | None = option(None, "directory of UCF101's videos; default: the environment's UCF101_PATH")
    ucf101_annpath: str | None = option(
        None, "directory of classInd.txt and the lists; default: the environment's UCF101_ANNPATH"
    )
    cache_dir: str | None = option(None, "cache directory of the datasets library")
    frame_order: str = option(
        "forward",
        "order of a clip's frames; shuffled is a control without temporal order",
        FRAME_ORDERS,
        fixed=True,
    )

    def load(self, seed: int) -> DatasetDict:
        """Load the datasets (`load_video_datasets`); `seed` is for the validation split."""
        source = dataclasses.asdict(self)
        del source["frame_order"]
        return load_video_datasets(**source, seed=seed)


def split_as_in_training(
    data_args: VideoDataArguments, seed: int | None, split: str, directory: str | Path
) -> tuple[VideoDataArguments, int]:
    """Fill in the arguments that split a dataset, so that no held-out video is one that the model was trained on.

    Args:
        data_args: None for `validation_split_percentage` or `fold` means the value used in training.
        seed: None likewise.
        split: train, validation or test.
        directory: the model's directory, where metrics.json records its training, or a checkpoint.

    Returns:
        The arguments and the seed without None: as they were given, or else as in training, or else the defaults.

    Raises:
        ValueError: if the fold differs from that of training on the same dataset; other differences only cause a
            warning.
    """
    trained = training_arguments(directory)
    same_data = Path(trained.get("dataset_name") or "").name == Path(data_args.dataset_name).name
    matters = [] if split == "test" else ["seed", "validation_split_percentage"]
    if data_args.dataset_name == "ucf101":
        matters.append("fold")
    values = {"seed": seed} | {n: getattr(data_args, n) for n in ("validation_split_percentage", "fold")}
    for name in matters:
        given, there = values[name], trained.get(name)
        if not same_data or None in (given, there) or given == there:
            continue
        if name == "fold":
            raise ValueError(
                f"{directory} was trained on {data_args.dataset_name} with fold {there}, not {given}: the {split} "
                "videos would differ from those in training. Remove --fold"
            )
        warnings.warn(
            f"{directory} was trained on {data_args.dataset_name} with {name} {there}, not {given}: unless the "
            f"dataset has a validation split, the {split} videos differ from those in training. Remove --{name}.",
            stacklevel=2,
        )
    unknown = [f"--{name}" for name in matters if values[name] is None and name not in trained]
    if unknown:
        warnings.warn(
            f"{directory} has no metrics.json with its training arguments: set {', '.join(unknown)} as in training, "
            f"or the {split} videos will differ.",
            stacklevel=2,
        )
    defaults = {"seed": 0} | {f.name: f.default for f in dataclasses.fields(data_args)}
    for name in [name for name in values if values[name] is None]:
        values[name] = trained.get(name, defaults[name])
    seed = values.pop("seed")
    return dataclasses.replace(data_args, **values), seed


def views_as_in_training(views: str | None, directory: str | Path) -> str:
    """Choose the crops to test on, so that no clip is mirrored for a model that distinguishes left from right.

    Args:
        views: center, five_crops or ten_crops; None: ten_crops, or center if training had `no_flip`.
        directory: the model's directory, as for `split_as_in_training`.

    Raises:
        ValueError: if ten_crops is requested for a model that was trained with `no_flip`.
    """
    no_flip = training_arguments(directory).get("no_flip")
    if no_flip and views == "ten_crops":
        raise ValueError(
            f"{directory} was trained with no_flip, but half of ten_crops are mirror images: use --views center or "
            "five_crops"
        )
    return views or ("center" if no_flip else "ten_crops")


@torch.no_grad()
def evaluate_videos(
    model: PreTrainedModel,
    clips: VideoClips,
    accelerator: Accelerator,
    *,
    views: str = "ten_crops",
    batch_size: int = 32,
    num_workers: int = 0,
) -> dict:
    """Classify whole videos from several clips of each and several crops of each clip, as is usual for UCF101.

    The videos are divided among the processes. A view is one crop of one clip. `mean` is the class with the highest
    mean probability over a video's views; `vote` is the class that most views predict, ties broken by the mean.

    Args:
        model: a video classifier; left in eval mode.
        clips: the videos to classify; its `clips_per_video` and `frame_order` are used, its augmentation is not.
        accelerator: provides the device and the processes.
        views: center, five_crops, or ten_crops (the five and their mirror images).
        batch_size: views per batch.
        num_workers: processes that decode.

    Returns:
        `label`, `mean` and `vote`, each (videos,) class indices, -1 for a video that cannot be read; `view_accuracy`,
        the fraction of single views that are right; `unreadable`, the number of videos left out.

    Raises:
        ValueError: if no video can be read, or `views` is unknown.
    """
    model.to(accelerator.device).eval()
    crop = FitAndCrop(clips.processor, views)
    per_clip = {"center": 1, "five_crops": 5, "ten_crops": 10}[views]
    share = range(accelerator.process_index, len(clips.videos), accelerator.num_processes)
    loader = DataLoader(
        _WholeVideos(clips, share), batch_size=None, num_workers=num_workers, generator=torch.Generator()
    )
    # One row per video: label, mean and vote (each + 1, since 0 marks a video not seen), right views, views.
    rows = torch.zeros(len(clips.videos), 5, dtype=torch.long)
    labels = clips.videos["label"]
    for video, frames in tqdm(loader, total=len(share), disable=None if accelerator.is_main_process else True):
        if len(frames) == 0:
            continue
        probabilities = []
        for piece in frames.split(max(1, batch_size // per_clip)):  # (clips, N, C, H, W)
            seen = [crop(clip) for clip in piece.to(accelerator.device)]  # resizing again changes nothing
            seen = [view for clip in seen for view in (clip if isinstance(clip, list) else [clip])]
            inputs = clips.processor(
                seen, do_sample_frames=False, do_resize=False, do_center_crop=False, return_tensors="pt"
            )
            with accelerator.autocast():
                logits = model(inputs["pixel_values_videos"].to(accelerator.device)).logits
            probabilities.append(logits.float().softmax(-1).cpu())
        probabilities = torch.cat(probabilities)  # (views, classes)
        mean, choices = probabilities.mean(0), probabilities.argmax(-1)
        votes = torch.bincount(choices, minlength=len(mean))
        right = int((choices == labels[video]).sum())
        best = (votes + mean).argmax()  # a mean is less than one vote
        rows[video] = torch.tensor([labels[video] + 1, int(mean.argmax()) + 1, int(best) + 1, right, len(choices)])
    rows = accelerator.reduce(rows.to(accelerator.device), "sum").cpu()
    label, mean, vote, right, count = rows.unbind(1)
    if not count.any():
        raise ValueError(f"all {len(rows)} videos are unreadable or too short: see the warnings")
    return {
        "label": label - 1,
        "mean": mean - 1,
        "vote": vote - 1,
        "view_accuracy": right.sum().item() / count.sum().item(),
        "unreadable": int((count == 0).sum()),
    }


def confusion_matrix(labels: torch.Tensor, predictions: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count the videos of each class (row) by predicted class (column); labels of -1 are left out."""
    seen = labels >= 0
    pairs = labels[seen] * num_classes + predictions[seen]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


class _WholeVideos(Dataset):
    """Dataset of (row, (clips, N, C, H, W) uint8) per video, resized but not cropped; empty if it cannot be read."""

    def __init__(self, clips: VideoClips, share: range):
        self.clips, self.share = clips, share

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        video, clips = self.share[index], self.clips
        try:
            frames = torch.from_numpy(clips.read(video, clip_positions(clips.clips_per_video), fit=self.fit))
        except VideoReadError as error:
            clips.report(video, error)
            return video, torch.empty(0, dtype=torch.uint8)
        if clips.frame_order == "shuffled":
            generator = torch.Generator().manual_seed(clips.seed * 1_000_003 + video)
            frames = torch.stack(
                [clip[torch.randperm(len(clip), generator=generator, device="cpu")] for clip in frames]
            )
        return video, frames.permute(0, 1, 4, 2, 3)

    def fit(self, frame: np.ndarray) -> np.ndarray:
        """Resize a frame, (H, W, 3) uint8, as the processor does: once per frame, even if several clips contain it."""
        inputs = self.clips.processor(
            torch.from_numpy(frame).permute(2, 0, 1)[None],
            do_sample_frames=False,
            do_center_crop=False,
            do_rescale=False,
            do_normalize=False,
            return_tensors="pt",
        )
        return inputs["pixel_values_videos"][0, 0].permute(1, 2, 0).numpy()
