#!/usr/bin/env python
"""Test a video classifier on whole videos: several clips of each, several crops of each clip.

    python scripts/evaluate_video_classification.py --model_name_or_path runs/ucf101 --dataset_name ucf101

The defaults are UCF101's protocol: 25 clips per video, five crops of each and their mirror images, majority
vote. For a model trained with --no_flip, the default is only the centre crop. The script writes metrics.json
and confusion_matrix.png, and prints a table of the classes.

By default, seed, validation_split_percentage and fold are those of the model's training, read from
metrics.json in the model's directory. With other values, the model may have been trained on videos of the
validation or test split.
"""

import dataclasses
from dataclasses import MISSING, dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import mingru_hf  # noqa: F401  registers MinConvGRU with the Auto classes
from mingru_hf.data.video import VIEWS, VideoClips, compose
from mingru_hf.training.arguments import option, parse_dataclasses
from mingru_hf.training.checkpoints import check_new_files, write_json
from mingru_hf.training.loop import resolve_mixed_precision
from mingru_hf.training.models import load_pretrained
from mingru_hf.training.plots import plot_confusion
from mingru_hf.training.video import (
    VideoDataArguments,
    confusion_matrix,
    evaluate_videos,
    split_as_in_training,
    views_as_in_training,
)

FILES = METRICS, PICTURE = "metrics.json", "confusion_matrix.png"


@dataclass(kw_only=True)
class EvaluateArguments:
    """Options for the model and the protocol."""

    model_name_or_path: str = option(MISSING, "the model: a directory, or a name on the Hub", group="model")
    output_dir: str | None = option(
        None, "where metrics.json and confusion_matrix.png go; default: evaluation-SPLIT in the model's directory"
    )
    overwrite_output_dir: bool = option(False, "replace these files if they exist")
    split: str = option("test", "the videos to classify", ("train", "validation", "test"), group="protocol")
    clips_per_video: int = option(25, "clips per video, spread evenly from beginning to end", positive=True)
    views: str | None = option(
        None,
        "crops of each clip (five_crops: the corners and the middle; ten_crops: these and their mirror images; "
        "default: ten_crops, or center for a model trained with --no_flip)",
        VIEWS,
    )
    aggregation: str = option("vote", "how the views are combined into a video's class", ("vote", "mean"))
    per_device_eval_batch_size: int = option(32, "views per batch of one process", group="machine", positive=True)
    dataloader_num_workers: int = option(2, "worker processes that decode videos; 0: the main process does", least=0)
    mixed_precision: str = option("auto", "precision of the matrix products", ("auto", "no", "bf16", "fp16"))
    use_cpu: bool = option(False, "stay on the CPU even if there is a GPU")
    seed: int | None = option(
        None, "seed of the validation split, as in training, and of shuffled frames; default: that of training, else 0"
    )


def parse_args(argv: list[str] | None) -> tuple:
    """Read the command line."""
    return parse_dataclasses(
        __doc__, argv, EvaluateArguments, VideoDataArguments, validation_split_percentage=None, fold=None
    )


def main(argv: list[str] | None = None) -> None:
    parser, args, data_args = parse_args(argv)
    with parser.user_errors():
        if args.output_dir is None and not Path(args.model_name_or_path).is_dir():
            raise ValueError("output_dir is required for a model from the Hub")
        output_dir = Path(args.output_dir or Path(args.model_name_or_path) / f"evaluation-{args.split}")
        check_new_files(output_dir, FILES, args.overwrite_output_dir)
        precision = resolve_mixed_precision(args.mixed_precision, args.use_cpu)
        accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=precision)
        model = load_pretrained(AutoModelForVideoClassification, args.model_name_or_path)
        processor = load_pretrained(AutoVideoProcessor, args.model_name_or_path)
        args.views = views_as_in_training(args.views, args.model_name_or_path)
        data_args, args.seed = split_as_in_training(data_args, args.seed, args.split, args.model_name_or_path)
        videos = data_args.load(args.seed)
        if args.split not in videos:
            raise ValueError(
                f"{data_args.dataset_name} has the splits {', '.join(videos)}, but no {args.split}: give --split "
                f"{'validation' if 'validation' in videos else next(iter(videos))}, or a {args.split} directory"
            )
        names = videos[args.split].features["label"].names
        if list(map(compose, model.config.id2label.values())) != list(map(compose, names)):
            raise ValueError(
                f"{args.model_name_or_path} was trained on classes other than those of {data_args.dataset_name}"
            )
        clips = VideoClips(
            videos[args.split], processor, args.clips_per_video, frame_order=data_args.frame_order, seed=args.seed
        )

    result = evaluate_videos(
        model,
        clips,
        accelerator,
        views=args.views,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
    )
    if not accelerator.is_main_process:
        return
    matrix = confusion_matrix(result["label"], result[args.aggregation], len(names))
    seen = matrix.sum(1)
    accuracy = {
        kind: (result[kind] == result["label"])[result["label"] >= 0].double().mean().item()
        for kind in ("vote", "mean")
    }
    classes = {
        name: {"videos": int(count), "accuracy": row[i].item() / count.item() if count else None}
        for i, (name, count, row) in enumerate(zip(names, seen, matrix, strict=True))
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(
        output_dir / METRICS,
        {
            "arguments": dataclasses.asdict(args) | dataclasses.asdict(data_args),
            "videos": int(seen.sum()),
            "unreadable": result["unreadable"],
            "accuracy": accuracy[args.aggregation],
            "accuracy_vote": accuracy["vote"],
            "accuracy_mean": accuracy["mean"],
            "accuracy_view": result["view_accuracy"],
            "classes": classes,
            "confusion_matrix": matrix.tolist(),
        },
    )
    plot_confusion(matrix, names, output_dir / PICTURE)
    width = max(map(len, names))
    for name, row in classes.items():
        share = "" if row["accuracy"] is None else f"{100 * row['accuracy']:6.2f} %"
        print(f"{name:{width}}  {row['videos']:5} videos  {share}")
    if result["unreadable"]:
        print(f"{result['unreadable']} of {len(clips.videos)} videos could not be read and are left out")
    print(
        f"accuracy {100 * accuracy[args.aggregation]:.2f} % of {int(seen.sum())} videos (vote "
        f"{100 * accuracy['vote']:.2f} %, mean {100 * accuracy['mean']:.2f} %, single views "
        f"{100 * result['view_accuracy']:.2f} %); written to {output_dir}"
    )


if __name__ == "__main__":
    main()
