#!/usr/bin/env python
"""Upload a trained model's directory to the Hugging Face Hub: weights, code, tokenizer, model card, logs.

    python scripts/push_to_hub.py --model_dir runs/shakespeare --hub_model_id me/mingru-shakespeare --dry_run

A new repository is private. Log in first with `hf auth login`.
"""

from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from mingru_hf.training.arguments import ArgumentParser
from mingru_hf.training.hub import files_to_upload, push_directory


def parse_args(argv: list[str] | None):
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model_dir", metavar="DIR", required=True, help="directory of the model")
    parser.add_argument("--hub_model_id", metavar="NAME", help="owner/name on the Hub; default: the directory's name")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument(
        "--commit_message", metavar="TEXT", default="Trained with mingru-hf", help="title of the commit"
    )
    parser.add_argument("--dry_run", action="store_true", help="list the files without uploading them")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    name = args.hub_model_id or Path(args.model_dir).resolve().name
    with parser.user_errors():
        validate_repo_id(name)
        files = files_to_upload(args.model_dir)
        size = sum((Path(args.model_dir) / file).stat().st_size for file in files)
        print("\n".join(files))
        summary = f"{len(files)} files, {size / 1e6:,.1f} MB"
        if args.dry_run:
            print(f"{summary}, would be uploaded to {name}")
            return
        url = push_directory(args.model_dir, name, private=not args.public, commit_message=args.commit_message)
    print(f"{summary}, uploaded to {url}")


if __name__ == "__main__":
    main()
