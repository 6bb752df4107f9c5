"""What a run leaves on disk, written so that a crash at any moment leaves the files before it whole."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

RUN_FILES = (
    "metrics.json",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
METRICS_FILE = "metrics.json"
STAGING = ".incomplete"


def check_output_dir(output_dir: str | Path, overwrite: bool = False) -> None:
    """Refuse a directory in which a run would overwrite another's files.

    Args:
        output_dir: need not exist.
        overwrite: the user allows it; files of the same name will be replaced, none deleted.

    Raises:
        ValueError: if it holds another run or model and `overwrite` is False, or is a file.
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir {path} is a file")
    found = [name for name in RUN_FILES if (path / name).exists()]
    if found and not overwrite:
        raise ValueError(
            f"output_dir {path} holds another run ({', '.join(found)}): choose another one, or add "
            "--overwrite_output_dir to replace its files"
        )


def write_json(path: str | Path, content: object) -> None:
    """Write JSON under a temporary name, then rename it to `path`."""
    temporary = Path(path).with_name(f"{STAGING}-{Path(path).name}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def save_pretrained(output_dir: str | Path, *parts: object) -> None:
    """Save models, tokenizers or processors into one directory, each file under a temporary name first.

    A reader of `output_dir` finds every file whole, the old or the new one; other files stay as they are.

    Args:
        output_dir: made if missing.
        parts: whatever has `save_pretrained`; None is skipped.
    """
    output_dir = Path(output_dir)
    staging = output_dir / STAGING
    shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed; no user's file bears this name
    staging.mkdir(parents=True)
    with no_progress_bars():
        for part in parts:
            if part is not None:
                part.save_pretrained(staging)
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    for path in files:
        target = output_dir / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(staging)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' progress bars off the screen for the time of the block."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _sync(path: Path) -> None:
    """Bring a file to the disk, so that the rename that follows never outruns its content."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
