#!/usr/bin/env python
"""Export a language model to ONNX: prefill.onnx reads a prompt, decode.onnx reads one more token.

    python scripts/export_onnx.py --model_name_or_path runs/demo --output_dir runs/onnx --prompt "ROMEO:"

Both are made of standard operators: the recurrence is a Scan over the prompt and plain arithmetic in a single
step. The state is passed from one call to the next as inputs and outputs: see `generate` in this file.
"""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mingru_hf  # noqa: F401  registers MinGRU with the Auto classes
from mingru_hf.exporting import export_programs
from mingru_hf.training.arguments import ArgumentParser
from mingru_hf.training.checkpoints import check_new_files
from mingru_hf.training.models import load_pretrained


def parse_args(argv: list[str] | None):
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model_name_or_path", metavar="NAME", required=True, help="directory of the model, or its name on the Hub"
    )
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="where prefill.onnx and decode.onnx go")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace these files if they exist")
    parser.add_argument("--prompt", metavar="TEXT", help="continue this text with the exported model")
    parser.add_argument("--max_new_tokens", metavar="N", type=int, default=100, help="tokens to write")
    return parser, parser.parse_args(argv)


def export(model, output_dir: str | Path) -> None:
    """Write prefill.onnx (input_ids (B, T)) and decode.onnx (input_ids (B, 1), state_0, ...) for any B and T.

    Both return logits, only of the last token, and the state: state_0, ... for the next call of decode.onnx.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    prefill, decode = export_programs(model, logits_to_keep=1)
    states = [f"state_{i}" for i in range(len(decode.graph_signature.user_inputs) - 1)]
    for name, program, inputs in (("prefill", prefill, []), ("decode", decode, states)):
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r"`isinstance\(treespec", FutureWarning
            )  # a warning about torch's own code
            onnx_program = torch.onnx.export(
                program,
                input_names=["input_ids", *inputs],
                output_names=["logits", *(f"new_{state}" for state in states)],
                dynamo=True,
                verbose=False,
            )
        onnx_program.save(output_dir / f"{name}.onnx")


def generate(output_dir: str | Path, input_ids: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """Continue input_ids (B, T) greedily with onnxruntime; return (B, T + max_new_tokens)."""
    import onnxruntime

    prefill, decode = (
        onnxruntime.InferenceSession(Path(output_dir) / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("prefill", "decode")
    )
    logits, *state = prefill.run(None, {"input_ids": input_ids})
    for _ in range(max_new_tokens):
        next_ids = logits[:, -1].argmax(-1, keepdims=True)  # (B, 1)
        input_ids = np.concatenate([input_ids, next_ids], axis=1)
        inputs = {f"state_{i}": tensor for i, tensor in enumerate(state)}
        logits, *state = decode.run(None, {"input_ids": next_ids, **inputs})
    return input_ids


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    with parser.user_errors():
        packages = ["onnx", "onnxscript"] + ["onnxruntime"] * (args.prompt is not None)
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"the export needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        check_new_files(args.output_dir, ("prefill.onnx", "decode.onnx"), args.overwrite_output_dir)
        model = load_pretrained(AutoModelForCausalLM, args.model_name_or_path).float().eval()
        tokenizer = None if args.prompt is None else load_pretrained(AutoTokenizer, args.model_name_or_path)
        export(model, args.output_dir)
        print(f"prefill.onnx and decode.onnx are in {args.output_dir}")
        if tokenizer is not None:
            input_ids = tokenizer(args.prompt, return_tensors="np").input_ids.astype(np.int64)
            print(tokenizer.decode(generate(args.output_dir, input_ids, args.max_new_tokens)[0]))


if __name__ == "__main__":
    main()
