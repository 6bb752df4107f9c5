"""Upload the directory of a trained model to the Hugging Face Hub."""

import json
import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

from .checkpoints import BEST_DIRECTORY, STATE_FILE, TENSORS_FILE, write_whole

# Tag of the model cards that training writes.
GENERATED = "generated-by-mingru-hf"
# The part of a card's example that says where to load the model from.
SOURCE = re.compile(r'(from_pretrained\(|model=)"[^"]*"')

# Hidden files, and files of a run's or a checkpoint's directory that serve to resume a run but not to use the model.
IGNORED = (".*", "*/.*", "checkpoint-*", "__pycache__/*", STATE_FILE, TENSORS_FILE, f"{BEST_DIRECTORY}/*")


def files_to_upload(directory: str | Path) -> list[str]:
    """List the files that `push_directory` uploads, after checking that they form a complete model.

    Args:
        directory: a directory written by a training script, `save_pretrained` or a conversion.

    Returns:
        Paths relative to the directory, sorted.

    Raises:
        FileNotFoundError: if there is no such directory, or config.json or weights are missing.
        ValueError: if a weight file is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no such model directory: {directory}")
    weights, index = ["model.safetensors"], directory / "model.safetensors.index.json"
    if index.is_file() and not (directory / weights[0]).is_file():  # the precedence in transformers
        weights = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in ("config.json", *weights) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} does not contain a complete model: it lacks {', '.join(missing)}")
    for name in weights:
        try:
            with safe_open(directory / name, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{directory / name} is damaged: {error}") from None
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return list(filter_repo_objects(files, ignore_patterns=list(IGNORED)))


def make_repository(name: str, private: bool = True) -> str:
    """Create a model repository on the Hub if it does not exist, and return its full name.

    Args:
        name: `owner/name`, or just `name` for the user's own namespace.
        private: whether a new repository is private; an existing one is not changed.

    Raises:
        OSError: if the user is not logged in, or the Hub cannot be reached or refuses.
    """
    if get_token() is None:
        raise OSError("not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    try:
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id
    except HTTPError as error:
        raise OSError(f"the Hub could not create the repository {name}: {error}") from error


def name_model_card(path: str | Path, name: str) -> None:
    """Make the example in a model card load the model from the repository; only cards written by training are changed.

    Args:
        path: the README.md, which need not exist.
        name: full name of the repository.
    """
    path = Path(path)
    if not path.is_file() or GENERATED.encode() not in path.read_bytes():
        return
    text = SOURCE.sub(rf'\1"{name}"', path.read_text(encoding="utf-8"))
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def push_directory(
    directory: str | Path, name: str, private: bool = True, commit_message: str = "Trained with mingru-hf"
) -> str:
    """Upload a model directory as one commit: all of it, or nothing.

    Before the upload, `name_model_card` makes the example in the model card load the model from the repository.

    Args:
        directory: the model's directory.
        name, private: as in `make_repository`.
        commit_message: the commit's title.

    Returns:
        The URL of the repository.

    Raises:
        FileNotFoundError, ValueError: as in `files_to_upload`.
        OSError: as in `make_repository`, or if the upload is interrupted.
    """
    files_to_upload(directory)
    repository = make_repository(name, private)
    name_model_card(Path(directory) / "README.md", repository)
    api = HfApi()
    try:
        api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message=commit_message,
            ignore_patterns=list(IGNORED),
        )
    except HTTPError as error:
        raise OSError(
            f"the upload of {directory} to {repository} was interrupted and changed no file there: repeat it with "
            f"scripts/push_to_hub.py. The cause: {error}"
        ) from error
    return f"{api.endpoint}/{repository}"
