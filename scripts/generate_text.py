#!/usr/bin/env python
"""Continue a prompt with a trained language model and print the text as it is generated.

    python scripts/generate_text.py --model_name_or_path runs/shakespeare --prompt "ROMEO:" --seed 1

Without a prompt, the model writes a new text. The speed is printed to the standard error stream.
"""

import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

import mingru_hf  # noqa: F401  registers MinGRU with the Auto classes
from mingru_hf.training.arguments import ArgumentParser
from mingru_hf.training.models import check_token_ids, load_pretrained, pad_token_id, prompt_ids, unknown_parts


def parse_args(argv: list[str] | None):
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model_name_or_path", metavar="NAME", required=True, help="directory of the model, or its name on the Hub"
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", default="", help="text to continue; default: none")
    prompts.add_argument("--prompt_file", metavar="FILE", help="file with the text to continue, or /dev/stdin")
    parser.add_argument("--max_new_tokens", metavar="N", type=int, default=400, help="tokens to write")
    parser.add_argument(
        "--temperature",
        metavar="X",
        type=float,
        default=0.8,
        help="randomness of the choice; 0: always the likeliest token, 1: the model's own probabilities",
    )
    parser.add_argument("--top_k", metavar="N", type=int, default=0, help="sample from the N likeliest tokens; 0: all")
    parser.add_argument(
        "--top_p", metavar="X", type=float, default=1.0, help="sample from the likeliest tokens of total probability X"
    )
    parser.add_argument("--num_return_sequences", metavar="N", type=int, default=1, help="texts to write")
    parser.add_argument(
        "--seed", metavar="N", type=int, help="seed of the sampling; default: a different one each time"
    )
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU even if there is a GPU")
    args = parser.parse_args(argv)
    with parser.user_errors():
        for name, low, high in (
            ("max_new_tokens", 1, None),
            ("temperature", 0, None),
            ("top_k", 0, None),
            ("top_p", 0, 1),
            ("num_return_sequences", 1, None),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(args, name)
            if value is not None and not (low <= value and (high is None or value <= high)):
                raise ValueError(f"{name} must be {low} {f'to {high}' if high else 'or more'}, not {value}")
        if args.temperature == 0 and args.num_return_sequences > 1:
            raise ValueError("temperature 0 always gives the same text: ask for one sequence, or a temperature")
        if args.prompt_file is not None:
            try:
                # Read the text as training does: keep newlines as they are, and drop a byte order mark.
                with open(args.prompt_file, encoding="utf-8-sig", newline="") as stream:
                    args.prompt = stream.read()
            except FileNotFoundError:
                raise FileNotFoundError(f"no such prompt file: {args.prompt_file}") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"prompt_file {args.prompt_file} is not UTF-8 text: {error}") from None
        try:
            args.prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"prompt {args.prompt!a} is not UTF-8 text: use --prompt_file") from None
    return parser, args


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    if args.seed is not None:
        set_seed(args.seed)
    with parser.user_errors():
        model = load_pretrained(AutoModelForCausalLM, args.model_name_or_path).eval()
        tokenizer = load_pretrained(AutoTokenizer, args.model_name_or_path)
        prompt = prompt_ids(tokenizer, args.prompt)
        check_token_ids(prompt, model)
        if any(weight.isnan().any() for weight in model.parameters() if weight.is_floating_point()):
            raise ValueError(f"{args.model_name_or_path} cannot generate text: some of its weights are NaN")
    unknown = unknown_parts(tokenizer, args.prompt)
    if unknown:
        named = ", ".join(map(repr, unknown[:10])) + ", ..." * (len(unknown) > 10)
        print(
            f"warning: the tokenizer does not know {named}: the model reads {tokenizer.unk_token} instead",
            file=sys.stderr,
        )
    if not args.use_cpu and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    prompt = prompt.to(model.device)

    greedy = args.temperature == 0
    choice = {} if greedy else {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    one = args.num_return_sequences == 1
    began = time.perf_counter()
    sequences = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=args.max_new_tokens,
        do_sample=not greedy,
        num_beams=1,  # regardless of the model's generation_config
        num_return_sequences=args.num_return_sequences,
        pad_token_id=pad_token_id(tokenizer),
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if one else None,
        **choice,
    )
    seconds = time.perf_counter() - began
    if not one:
        for number, sequence in enumerate(sequences, 1):
            print(f"----- {number} of {len(sequences)} -----")
            print(tokenizer.decode(sequence, skip_special_tokens=True))
    written = sequences.shape[0] * (sequences.shape[1] - prompt.shape[1])
    print(f"{written} tokens in {seconds:.1f} s, {written / seconds:,.0f} per second", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the process that reads the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit
        sys.exit(1)
