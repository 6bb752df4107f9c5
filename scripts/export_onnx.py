#!/usr/bin/env python
"""Export a model to ONNX: prefill.onnx and decode.onnx for text, clip.onnx and frame.onnx for video.

    python scripts/export_onnx.py --model_name_or_path runs/demo --output_dir runs/onnx --prompt "ROMEO:"
    python scripts/export_onnx.py --model_name_or_path runs/shapes --output_dir runs/onnx --video clip.mp4

The first file of each pair reads a prompt or a clip of any length; the second one reads one more token or
frame. The files use only standard ONNX operators: the recurrence is a Scan over the prompt or clip, and plain
arithmetic for a single step. The state is passed from one call to the next as inputs and outputs: see
`generate` and `classify` in this file. A classifier of texts or tokens is exported to model.onnx, which takes
input_ids and attention_mask.
"""

import importlib.util
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForVideoClassification,
    AutoTokenizer,
    AutoVideoProcessor,
)

import mingru_hf  # noqa: F401  registers MinGRU with the Auto classes
from mingru_hf.exporting import export_programs, export_text_classifier, export_video_programs
from mingru_hf.training.arguments import ArgumentParser
from mingru_hf.training.checkpoints import check_new_files
from mingru_hf.training.models import load_pretrained

TEXT_FILES, VIDEO_FILES = ("prefill.onnx", "decode.onnx"), ("clip.onnx", "frame.onnx")
CLASSIFIER_FILE = "model.onnx"


def parse_args(argv: list[str] | None):
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model_name_or_path", metavar="NAME", required=True, help="directory of the model, or its name on the Hub"
    )
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="directory for the exported files")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace these files if they exist")
    text = parser.add_argument_group("language models")
    text.add_argument("--prompt", metavar="TEXT", help="continue this text with the exported model")
    text.add_argument("--max_new_tokens", metavar="N", type=int, default=100, help="tokens to write")
    video = parser.add_argument_group("video classifiers")
    video.add_argument("--video", metavar="FILE", help="classify a clip from the middle of this video")
    video.add_argument(
        "--frame_size",
        metavar="N",
        type=int,
        nargs="+",
        help="height and width of the frames, or one number for both; default: the processor's crop size",
    )
    return parser, parser.parse_args(argv)


def export(model, output_dir: str | Path, frame_size: int | tuple[int, int] | None = None) -> list[str]:
    """Export a model to ONNX files and return their names.

    A language model: prefill.onnx takes input_ids (B, T), decode.onnx input_ids (B, 1) and state_0, ...; both return
    logits, only of the last token, and new_state_0, ..., the states for the next call of decode.onnx.

    A classifier of texts or tokens: model.onnx takes input_ids and attention_mask (B, T) and returns logits.

    A video classifier: clip.onnx takes frames (B, T, C, H, W), frame.onnx frames (B, 1, C, H, W) and state_0, ...,
    with H and W from `frame_size`; both return logits for the clip so far, and new_state_0, .... A bidirectional model
    has no frame.onnx.

    B and T are dynamic.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if frame_size is not None:
        names, inputs, programs = VIDEO_FILES, ["frames"], export_video_programs(model, frame_size)
    elif hasattr(model, "score"):
        names, inputs, programs = [CLASSIFIER_FILE], ["input_ids", "attention_mask"], [export_text_classifier(model)]
    else:
        names, inputs, programs = TEXT_FILES, ["input_ids"], export_programs(model, logits_to_keep=1)
    programs = {name: program for name, program in zip(names, programs, strict=True) if program is not None}
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".incomplete-") as staging:
        for name, program in programs.items():
            _, *states = program.graph_signature.user_outputs
            states = [f"state_{i}" for i in range(len(states))]
            reads_states = len(program.graph_signature.user_inputs) > len(inputs)
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", r"`isinstance\(treespec", FutureWarning
                )  # a warning about torch's own code
                onnx_program = torch.onnx.export(
                    program,
                    input_names=[*inputs, *(states if reads_states else [])],
                    output_names=["logits", *(f"new_{state}" for state in states)],
                    dynamo=True,
                    verbose=False,
                )
            onnx_program.save(Path(staging) / name)
        for path in Path(staging).iterdir():  # large weights are in a separate file
            os.replace(path, output_dir / path.name)
    for name in set(names) - programs.keys():
        (output_dir / name).unlink(missing_ok=True)  # left over from another model
    return list(programs)


def _session(path: Path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _states(state: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"state_{i}": tensor for i, tensor in enumerate(state)}


def generate(output_dir: str | Path, input_ids: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """Continue input_ids (B, T) greedily with onnxruntime; return (B, T + max_new_tokens)."""
    prefill, decode = (_session(Path(output_dir) / name) for name in TEXT_FILES)
    logits, *state = prefill.run(None, {"input_ids": input_ids})
    for _ in range(max_new_tokens):
        next_ids = logits[:, -1].argmax(-1, keepdims=True)  # (B, 1)
        input_ids = np.concatenate([input_ids, next_ids], axis=1)
        logits, *state = decode.run(None, {"input_ids": next_ids, **_states(state)})
    return input_ids


def classify(output_dir: str | Path, frames: np.ndarray) -> np.ndarray:
    """Classify frames (B, T, C, H, W) with onnxruntime, one by one if frame.onnx exists: logits (B, classes)."""
    clip_path, frame_path = (Path(output_dir) / name for name in VIDEO_FILES)
    clip = _session(clip_path)
    if not frame_path.is_file():
        return clip.run(None, {"frames": frames})[0]
    frame = _session(frame_path)
    logits, *state = clip.run(None, {"frames": frames[:, :1]})
    for t in range(1, frames.shape[1]):
        logits, *state = frame.run(None, {"frames": frames[:, t : t + 1], **_states(state)})
    return logits


def export_text(args, auto_class: type) -> None:
    """Export a text model, and continue the prompt if there is one."""
    model = load_pretrained(auto_class, args.model_name_or_path).float().eval()
    tokenizer = None if args.prompt is None else load_pretrained(AutoTokenizer, args.model_name_or_path)
    _say(export(model, args.output_dir), args.output_dir)
    if tokenizer is not None:
        input_ids = tokenizer(args.prompt, return_tensors="np").input_ids.astype(np.int64)
        print(tokenizer.decode(generate(args.output_dir, input_ids, args.max_new_tokens)[0]))


def export_video(args) -> None:
    """Export a video classifier, and classify the video if there is one."""
    model = load_pretrained(AutoModelForVideoClassification, args.model_name_or_path).float().eval()
    frame_size, inputs = args.frame_size, None
    if frame_size is None or args.video is not None:
        try:
            processor = load_pretrained(AutoVideoProcessor, args.model_name_or_path)
        except OSError as error:
            raise OSError(f"the frame size is unknown without a video processor: pass --frame_size. {error}") from None
        frame_size = frame_size or [processor.crop_size["height"], processor.crop_size["width"]]
        if args.video is not None:
            crop_size = {"height": frame_size[0], "width": frame_size[-1]}
            inputs = processor(args.video, crop_size=crop_size, return_tensors="np")
    _say(export(model, args.output_dir, (frame_size[0], frame_size[-1])), args.output_dir)
    if inputs is not None:
        logits = classify(args.output_dir, np.asarray(inputs["pixel_values_videos"], dtype=np.float32))[0]
        best, odds = int(logits.argmax()), np.exp(logits - logits.max())
        print(f"{args.video}: {model.config.id2label[best]} {100 * odds[best] / odds.sum():.0f} %")


def _say(written: list[str], output_dir: str) -> None:
    print(f"{' and '.join(written)} {'is' if len(written) == 1 else 'are'} in {output_dir}")


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    with parser.user_errors():
        runs = args.prompt is not None or args.video is not None
        packages = ["onnx", "onnxscript"] + ["onnxruntime"] * runs
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"the export needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        if args.frame_size is not None and (len(args.frame_size) > 2 or min(args.frame_size) < 1):
            raise ValueError("frame_size takes one or two positive numbers")
        check_new_files(args.output_dir, (*TEXT_FILES, *VIDEO_FILES, CLASSIFIER_FILE), args.overwrite_output_dir)
        config = load_pretrained(AutoConfig, args.model_name_or_path)
        architecture = (config.architectures or [""])[0]
        is_video = config.model_type == "minconvgru"
        auto_class = AutoModelForCausalLM
        if architecture.endswith("ForSequenceClassification"):
            auto_class = AutoModelForSequenceClassification
        elif architecture.endswith("ForTokenClassification"):
            auto_class = AutoModelForTokenClassification
        if args.prompt is not None and (is_video or auto_class is not AutoModelForCausalLM):
            raise ValueError("prompt is only for language models")
        for name in ("video", "frame_size"):
            if getattr(args, name) is not None and not is_video:
                raise ValueError(f"{name} is only for video classifiers")
        if is_video:
            export_video(args)
        else:
            export_text(args, auto_class)


if __name__ == "__main__":
    main()
