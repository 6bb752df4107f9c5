#!/usr/bin/env python
"""Train a convolutional MinGRU (or any other video classifier) to classify videos.

    python scripts/train_video_classification.py --dataset_name ucf101 --fold 1 --output_dir runs/ucf101
    python scripts/train_video_classification.py --dataset_name my_videos/ --output_dir runs/mine

The first command trains from scratch; --backbone_name_or_path timm/vgg16.tv_in1k starts from weights
pretrained on ImageNet, as the published result does. The best weights are saved in --output_dir with the
video processor, metrics.json, loss.png and a model card; test them on whole videos with
scripts/evaluate_video_classification.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForVideoClassification, AutoVideoProcessor, ImageProcessingMixin, PreTrainedConfig

from mingru_hf import MinConvGRUForVideoClassification, MinConvGRUVideoProcessor
from mingru_hf.data.video import VideoClips, compose, make_augmentation
from mingru_hf.training.arguments import TrainArguments, option, parse_dataclasses
from mingru_hf.training.loop import start, summary, train
from mingru_hf.training.models import check_one_source, load_pretrained, make_config
from mingru_hf.training.video import VideoDataArguments

CONFIG = Path(__file__).parent / "configs" / "ucf101_vgg16.json"


@dataclass(kw_only=True)
class ModelArguments:
    """Options for the model."""

    model_name_or_path: str | None = option(
        None, "start from this checkpoint (a directory, or a name on the Hub) and its processor", group="model"
    )
    ignore_mismatched_sizes: bool = option(
        False, "use new classifiers if the classes of model_name_or_path differ from the data's"
    )
    config_name: str | None = option(
        None,
        "start from scratch with this config: a JSON file, or a model's directory; default: "
        "scripts/configs/ucf101_vgg16.json",
    )
    config_overrides: str | None = option(None, 'change the config: "stride=1,hidden_sizes=[32,64]" (values are JSON)')
    backbone_name_or_path: str | None = option(
        None,
        "initialize the backbone from this image model, and normalise pixels as it does: timm/NAME, a directory, or a "
        "name on the Hub",
    )
    freeze_backbone: bool = option(False, "train only the recurrent layers and the classifiers")


@dataclass(kw_only=True)
class ClipArguments:
    """Options for the clips; the processor saved with the model makes the same clips at inference.

    With a checkpoint, frames and sizes are those of the checkpoint's processor.
    """

    num_frames: int | None = option(
        None,
        "frames per clip; default: the config's",
        group="clips (frames and sizes only for a model from scratch)",
        positive=True,
    )
    frame_stride: int | None = option(None, "take every N-th frame of the video; default: 1", positive=True)
    clips_per_video: int = option(1, "clips per training video and epoch", fixed=True)
    resize_size: int | None = option(
        None, "pixels of a frame's shorter edge; default: 8/7 of crop_size, rounded", positive=True
    )
    crop_size: int | None = option(None, "width and height of a crop, pixels; default: 224", positive=True)
    min_crop_scale: float = option(
        0.4, "smallest fraction of a frame's area that a random crop takes; 1: the same crop as at inference"
    )
    no_flip: bool = option(False, "do not mirror clips: for classes that differ in left and right")
    color_jitter: float = option(0.0, "largest relative change of brightness, contrast and saturation")


def parse_args(argv: list[str] | None) -> tuple:
    """Read the command line."""
    return parse_dataclasses(
        __doc__,
        argv,
        ModelArguments,
        VideoDataArguments,
        ClipArguments,
        TrainArguments,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        weight_decay=5e-5,
        num_train_epochs=7.0,
        dataloader_num_workers=2,
    )


def resolve_clips(model_args: ModelArguments, clip_args: ClipArguments) -> ClipArguments:
    """Fill in the frames and sizes of the clips from the checkpoint's processor, or else from options and defaults.

    Raises:
        ValueError: if the checkpoint's processor is not that of a MinConvGRU, an option contradicts it, or a crop is
            larger than the frame.
    """
    if model_args.model_name_or_path is not None:
        processor = load_pretrained(AutoVideoProcessor, model_args.model_name_or_path)
        if not hasattr(processor, "frame_stride"):
            raise ValueError(
                f"{model_args.model_name_or_path} has a {type(processor).__name__}, expected the processor of a "
                "MinConvGRU: train other video models with transformers' own scripts"
            )
        crop, size = processor.crop_size, processor.size
        own = {
            "num_frames": processor.num_frames,
            "frame_stride": processor.frame_stride if processor.fps is None else None,
            "resize_size": size["shortest_edge"] if size is not None else None,
            "crop_size": crop["height"] if crop is not None and crop["height"] == crop["width"] else None,
        }
        differing = [name for name, value in own.items() if getattr(clip_args, name) not in (None, value)]
        if differing:
            raise ValueError(
                f"model_name_or_path uses that model's own processor "
                f"({', '.join(f'{name} {value}' for name, value in own.items())}): leave out {' and '.join(differing)}"
            )
        return replace(clip_args, **own)
    num_frames = clip_args.num_frames or _config(model_args).num_frames
    crop_size = clip_args.crop_size or 224
    resize_size = clip_args.resize_size or round(crop_size * 8 / 7)
    if resize_size < crop_size:
        raise ValueError(f"resize_size {resize_size} is less than crop_size {crop_size}")
    return replace(
        clip_args,
        num_frames=num_frames,
        frame_stride=clip_args.frame_stride or 1,
        resize_size=resize_size,
        crop_size=crop_size,
    )


def _config(model_args: ModelArguments, **values: object) -> PreTrainedConfig:
    return make_config(model_args.config_name or str(CONFIG), model_args.config_overrides, **values)


def load_model(model_args: ModelArguments, clip_args: ClipArguments, names: list[str]):
    """Load or make the processor and the model for the classes `names`; freeze the backbone on request.

    `clip_args` are those that `resolve_clips` returned.

    Raises:
        ValueError: if a checkpoint has other classes and `ignore_mismatched_sizes` is not set, or there is no backbone
            to freeze.
    """
    model, processor = _load_model(model_args, clip_args, names)
    if model_args.freeze_backbone:
        if not hasattr(model.base_model, "freeze_backbone"):
            raise ValueError(f"freeze_backbone: a {model.config.model_type} has no backbone that can be frozen")
        model.base_model.freeze_backbone()
    return model, processor


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _load_model(model_args: ModelArguments, clip_args: ClipArguments, names: list[str]):
    id2label = dict(enumerate(names))
    values = {"id2label": id2label, "label2id": {name: number for number, name in id2label.items()}}
    if model_args.model_name_or_path is not None:
        model = load_pretrained(AutoModelForVideoClassification, model_args.model_name_or_path)
        processor = load_pretrained(AutoVideoProcessor, model_args.model_name_or_path)
        if list(map(compose, model.config.id2label.values())) != list(map(compose, names)):
            if not model_args.ignore_mismatched_sizes:
                raise ValueError(
                    f"{model_args.model_name_or_path} was trained on {_listed(model.config.id2label.values())}, but "
                    f"the data has {_listed(names)}: add --ignore_mismatched_sizes to start with new classifiers"
                )
            model = load_pretrained(
                AutoModelForVideoClassification, model_args.model_name_or_path, ignore_mismatched_sizes=True, **values
            )
            for classifier in getattr(model, "classifiers", None) or [model.classifier]:
                classifier.reset_parameters()  # the classes may differ even if their number does not
        return model, processor
    config = _config(model_args, **values)
    config.num_frames = clip_args.num_frames
    pixels = {}
    if model_args.backbone_name_or_path is None:
        model = AutoModelForVideoClassification.from_config(config)
    else:
        fields = config.to_diff_dict()
        for name in ("backbone_config", "model_type", "auto_map", "transformers_version", "dtype"):
            fields.pop(name, None)
        model = MinConvGRUForVideoClassification.from_backbone_pretrained(
            model_args.backbone_name_or_path, out_indices=list(config.backbone_config.out_indices), **fields
        )
        pixels = _pixels_of(model_args.backbone_name_or_path)
    processor = MinConvGRUVideoProcessor(
        num_frames=clip_args.num_frames,
        frame_stride=clip_args.frame_stride,
        size={"shortest_edge": clip_args.resize_size},
        crop_size=clip_args.crop_size,
        **pixels,
    )
    return model, processor


def _pixels_of(backbone: str) -> dict:
    """Return how a pretrained backbone's images are rescaled and normalised, as far as the checkpoint specifies it."""
    if backbone.startswith("timm/"):
        import timm

        pretrained = timm.get_pretrained_cfg(backbone.removeprefix("timm/"))
        return {"image_mean": list(pretrained.mean), "image_std": list(pretrained.std)}
    try:
        pretrained, _ = ImageProcessingMixin.get_image_processor_dict(backbone)
    except OSError:  # the checkpoint has no image processor
        return {}
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return {name: pretrained[name] for name in names if pretrained.get(name) is not None}


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the fraction of clips whose logits (B, classes) give their label, without clips whose label is -100."""
    seen = labels != -100
    return (logits.argmax(-1) == labels)[seen].float().mean()


def main(argv: list[str] | None = None) -> None:
    parser, model_args, data_args, clip_args, args = parse_args(argv)
    with parser.user_errors():
        check_one_source(model_args)
        clip_args = resolve_clips(model_args, clip_args)
        settings = (model_args, data_args, clip_args)
        accelerator = start(args, settings)
        with accelerator.main_process_first():  # the other processes read its cache
            videos = data_args.load(args.seed)
        names = videos["train"].features["label"].names
        model, processor = load_model(model_args, clip_args, names)
        augment = make_augmentation(processor, clip_args.min_crop_scale, not clip_args.no_flip, clip_args.color_jitter)
        options = {"frame_order": data_args.frame_order, "seed": args.seed}
        train_clips = VideoClips(
            videos["train"], processor, clip_args.clips_per_video, augment=augment, training=True, **options
        )
        eval_clips = VideoClips(videos["validation"], processor, **options)
        for clips in (train_clips, eval_clips):
            clips[0]  # if none can be read, fail here and not in a worker of the DataLoader

    accelerator.print(
        f"{model.num_parameters():,} parameters, {len(names)} classes, {len(videos['train']):,} videos to train on, "
        f"{len(videos['validation']):,} to validate on; clips of {processor.num_frames} frames with stride "
        f"{processor.frame_stride}; {accelerator.num_processes} x {accelerator.device.type}, mixed precision "
        f"{accelerator.mixed_precision}"
    )
    with parser.setup_errors():
        result = train(
            model,
            train_clips,
            eval_clips,
            args,
            accelerator,
            processing_class=processor,
            metrics={"accuracy": accuracy},
            settings=settings,
            unit="clip",
            dataset_name=Path(data_args.dataset_name).name,
            task="video-classification",
            auto_class="AutoModelForVideoClassification",
        )
    for clips in (train_clips, eval_clips):
        if clips.unreadable:
            accelerator.print(f"{len(clips.unreadable)} of {len(clips.videos)} videos could not be read")
    accelerator.print(
        f"final {summary(result['final'], 'clip')}\n"
        f"{result['step']} steps in {result['train_seconds']:.0f} s, "
        f"{result['frames_per_second']:,.0f} frames/s; saved in {args.output_dir}"
    )


if __name__ == "__main__":
    main()
