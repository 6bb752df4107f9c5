"""Upload the directory of a trained model to the Hugging Face Hub."""

import json
import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

from .checkpoints import BEST_DIRECTORY, STATE_FILE, TENSORS_FILE, write_whole

# The tag of a model card that was written by training.
GENERATED = "generated-by-mingru-hf"
# From where its example loads the model.
SOURCE = re.compile(r'(from_pretrained\(|model=)"[^"]*"')

# Hidden files, and what is needed to resume a run but not to use the model, in its directory or in a checkpoint's.
IGNORED = (".*", "*/.*", "checkpoint-*", "__pycache__/*", STATE_FILE, TENSORS_FILE, f"{BEST_DIRECTORY}/*")


def files_to_upload(directory: str | Path) -> list[str]:
    """List the files that `push_directory` uploads, after checking that they make a model.

    Args:
        directory: what a training script, `save_pretrained` or a conversion wrote.

    Returns:
        Paths relative to the directory, sorted.

    Raises:
        FileNotFoundError: if there is no such directory, or config.json or weights are missing.
        ValueError: if a file of weights is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no such model directory: {directory}")
    weights, index = ["model.safetensors"], directory / "model.safetensors.index.json"
    if index.is_file() and not (directory / weights[0]).is_file():  # as transformers reads them
        weights = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in ("config.json", *weights) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} holds no complete model: {', '.join(missing)} missing")
    for name in weights:
        try:
            with safe_open(directory / name, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{directory / name} is damaged: {error}") from None
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return list(filter_repo_objects(files, ignore_patterns=list(IGNORED)))


def make_repository(name: str, private: bool = True) -> str:
    """Make a model repository on the Hub if it does not exist, and return its full name.

    Args:
        name: `owner/name`, or `name` alone in the user's own namespace.
        private: whether a new one is private; an existing one is not changed.

    Raises:
        OSError: if nobody is logged in, or the Hub cannot be reached or refuses.
    """
    if get_token() is None:
        raise OSError("not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    try:
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id
    except HTTPError as error:
        raise OSError(f"the Hub did not make the repository {name}: {error}") from error


def name_model_card(path: str | Path, name: str) -> None:
    """Make a model card written by training load the model from the repository; other cards are not changed.

    Args:
        path: the README.md, which need not exist.
        name: of the repository.
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

    A model card written by training then loads the model from the repository.

    Args:
        directory: the model's directory.
        name, private: as in `make_repository`.
        commit_message: the commit's title.

    Returns:
        The URL of the repository.

    Raises:
        FileNotFoundError, ValueError: as `files_to_upload`.
        OSError: as `make_repository`, or if the upload was interrupted.
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
            f"the upload of {directory} to {repository} was interrupted and has changed no file there: repeat it with "
            f"scripts/push_to_hub.py. The cause: {error}"
        ) from error
    return f"{api.endpoint}/{repository}"
