#!/usr/bin/env python
"""Convert a checkpoint of torch-mingru's examples (a state dict or TorchScript archive) to a model directory.

    python scripts/convert_torch_mingru.py --checkpoint_path model.pt --output_dir runs/converted

No code from the file is executed. The conversion uses every tensor, or fails with an error that names the
unused ones.
"""

from transformers import AutoTokenizer

from mingru_hf.conversion import convert, read_checkpoint
from mingru_hf.training.arguments import ArgumentParser
from mingru_hf.training.checkpoints import check_output_dir, save_pretrained
from mingru_hf.video_processing_minconvgru import MinConvGRUVideoProcessor


def parse_args(argv: list[str] | None):
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint_path", metavar="FILE", required=True, help="file written by torch-mingru")
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="directory for the converted model")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the files of a model that is already there"
    )
    parser.add_argument(
        "--tokenizer_name",
        metavar="NAME",
        help="tokenizer to save with the model: a directory, or a name on the Hub",
    )
    parser.add_argument(
        "--no_residual",
        action="store_true",
        help="for text models whose layers are all as wide as the embedding: the model has no residual sums",
    )
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    with parser.user_errors():
        check_output_dir(args.output_dir, args.overwrite_output_dir)
        state = read_checkpoint(args.checkpoint_path)
        model = convert(state, residual=not args.no_residual)
        tokenizer = None
        if args.tokenizer_name is not None:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
            if len(tokenizer) > model.config.vocab_size:
                raise ValueError(
                    f"tokenizer_name: {args.tokenizer_name} has {len(tokenizer)} tokens, but the model has "
                    f"{model.config.vocab_size}: it is not the tokenizer that the model was trained with"
                )
        processor = None
        if model.config.model_type == "minconvgru":  # samples clips as torch-mingru's example does
            processor = MinConvGRUVideoProcessor(num_frames=model.config.num_frames)
        save_pretrained(args.output_dir, model, tokenizer, processor)
    print(
        f"{type(model).__name__} with {model.num_parameters():,} parameters, from all {len(state)} tensors of "
        f"{args.checkpoint_path}; saved in {args.output_dir}"
    )


if __name__ == "__main__":
    main()
