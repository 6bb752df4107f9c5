"""Rules shared by text and video: which files of a directory are data, and to which split each of them belongs."""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml
from datasets import DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub import metadata_load

logger = logging.getLogger(__name__)

# Usual names of a validation split, the preferred one first. "test" is not among them: the validation loss selects the
# best weights, so a test split used for it would no longer test anything.
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
SPLIT_NAMES = ("train", *VALIDATION_NAMES, "test")

# Files of rows: suffix -> builder of `datasets`.
TABLES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
# Files that `datasets` keeps next to the data.
NOT_DATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
# Shards, named as in datasets on the Hub.
SHARD = re.compile(rf"(?:data/([\w.]+)|({'|'.join(SPLIT_NAMES)}))-\d{{5}}-of-\d{{5}}\.[^/]+")
# Words for splits within longer names, such as wiki.valid.txt, and the split that each means.
WORDS = {name: name for name in SPLIT_NAMES}
WORDS |= {"training": "train", "testing": "test", "eval": "test", "evaluation": "test"}
WORD = re.compile(rf"(?<![a-z])({'|'.join(WORDS)})(?![a-z])", re.IGNORECASE)


def name_splits(splits: Mapping, source: str) -> dict:
    """Rename the validation split to "validation", whichever of its usual names it has.

    Args:
        splits: datasets by split name.
        source: where the datasets come from, for the error message.

    Returns:
        The same datasets: "train", perhaps "validation", and the others under their own names.

    Raises:
        ValueError: if there is no "train".
    """
    if "train" not in splits:
        raise ValueError(f"{source} has the splits {', '.join(sorted(splits))}, but none named train")
    found = next((name for name in VALIDATION_NAMES if name in splits), None)
    return {"validation" if name == found else name: split for name, split in splits.items()}


def suffix_of(file: str) -> str:
    """Return a file's suffix in lower case, ignoring that of a compression: ".jsonl" for `a.jsonl.gz`."""
    return _uncompressed(file).suffix.lower()


def list_files(directory: Path, suffixes: Container[str]) -> list[str]:
    """List the files with one of the suffixes (`suffix_of`) in a directory and its folders, including linked ones.

    Returns:
        Paths relative to the directory, in the order of `datasets`. Hidden files and folders, folders such as
        `__MACOSX` and the files of `NOT_DATA` are left out.
    """
    found, entered = [], set()
    for folder, folders, files in os.walk(directory, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:  # through another link; links may form a cycle
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        inside = Path(folder).relative_to(directory)
        found += [
            (inside / name).as_posix()
            for name in files
            if name[0] != "." and name not in NOT_DATA and suffix_of(name) in suffixes
            if os.path.isfile(os.path.join(folder, name))
        ]
    return sorted(found)


def files_of_one_kind(directory: Path, kinds: Mapping[str, str], expected: str) -> tuple[str, list[str]]:
    """List a directory's files of the kind that takes up the most bytes; a warning counts the others.

    Args:
        directory: where the files lie.
        kinds: kind of file by suffix.
        expected: end of the error message, which says what the directory should hold.

    Returns:
        The kind, and the paths as returned by `list_files`.

    Raises:
        ValueError: if there is no file of any kind.
    """
    files = list_files(directory, kinds)
    if not files:
        raise ValueError(f"{directory} contains {expected}")
    sizes = Counter()
    for file in files:
        sizes[kinds[suffix_of(file)]] += (directory / file).stat().st_size
    kind = sizes.most_common(1)[0][0]
    chosen = [file for file in files if kinds[suffix_of(file)] == kind]
    others = [file for file in files if kinds[suffix_of(file)] != kind]
    if others:
        logger.warning(
            "%s: only its %d files of the kind %s are read; %d others are left out, such as %s",
            *(directory, len(chosen), kind, len(others), others[0]),
        )
    return kind, chosen


def split_files(directory: Path, files: list[str], min_folders: int = 0) -> dict[str, list[str]]:
    """Divide a directory's files among splits by name.

    A split is a folder, or a file, whose name (without suffix) is exactly one of `SPLIT_NAMES`, directly in the
    directory or in the folder that holds all of its files; or shards directly in the directory, such as
    train-00000-of-00009.parquet (in a folder `data`, under any split name). Any other file is training data, or is
    left out with a warning if there is a split "train". If no name is exactly "train", words within longer names
    count, provided that each name contains one: wiki.train.txt, wiki.valid.txt; training/, testing/.

    Args:
        directory: where the files lie.
        files: relative paths (`list_files`).
        min_folders: minimum number of folders between a split and its files: 1 for TRAIN/CLASS/*.mp4.

    Returns:
        Absolute paths by split, "train" first if there is one.
    """
    splits, rest = {"train": []}, []
    skipped = len(_folder_of_all(files, min_folders))
    names = [_split_of(file, file[skipped:], min_folders) for file in files]
    if "train" not in names:
        words = [_word_for_split(file[skipped:], min_folders) for file in files]
        if "train" in words and None not in words:
            names = words
    for file, name in zip(files, names, strict=True):
        (rest if name is None else splits.setdefault(name, [])).append(file)
    if rest and splits["train"]:
        logger.warning(
            "%s: %d files are left out, such as %s, because they belong to none of its splits: %s",
            *(directory, len(rest), rest[0], ", ".join(splits)),
        )
    elif rest:
        splits["train"] = rest
        tops = {file[skipped:].split("/")[0] for file in rest}
        doubtful = sorted(top for top in tops if any(WORDS[word.lower()] != "train" for word in WORD.findall(top)))
        if doubtful:
            logger.warning(
                "%s: used as training data: %s, since a split must be a folder or file named exactly one of %s",
                *(directory, ", ".join(doubtful[:3]), ", ".join(SPLIT_NAMES)),
            )
    root = directory.resolve()
    return {name: [str(root / file) for file in part] for name, part in splits.items() if part}


def _folder_of_all(files: list[str], min_folders: int) -> str:
    """Return the path of folders, "a/b/" or "", that hold all files; it ends before a folder of a split or a class."""
    folders = []
    for parts in zip(*(file.split("/")[: -1 - min_folders] for file in files), strict=False):
        if len(set(parts)) > 1 or parts[0] in SPLIT_NAMES:
            break
        folders.append(parts[0] + "/")
    return "".join(folders)


def _word_for_split(inside: str, min_folders: int) -> str | None:
    """Return the split that the words in the name of a file or its top folder indicate, if they agree on one."""
    top, *more = inside.split("/")
    told = {WORDS[word.lower()] for word in WORD.findall(top)} if len(more) > min_folders or min_folders == 0 else ()
    return next(iter(told)) if len(told) == 1 else None


def _split_of(file: str, inside: str, min_folders: int) -> str | None:
    """Return the split that a file belongs to, if any; `inside` is its path within the folder that holds all files."""
    top, *more = inside.split("/")
    if top in SPLIT_NAMES and len(more) > min_folders:
        return top
    if min_folders == 0 and (shard := SHARD.fullmatch(file)):
        return shard[1] or shard[2]
    stem = _uncompressed(top).stem
    return stem if not more and min_folders == 0 and stem in SPLIT_NAMES else None


def _uncompressed(file: str) -> Path:
    """Return the path without a compression suffix."""
    path = Path(file)
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def declares_configurations(directory: Path) -> bool:
    """Return whether a directory's README.md says which files form which splits, as in a clone from the Hub."""
    readme = directory / "README.md"
    try:
        return readme.is_file() and "configs" in (metadata_load(readme) or {})
    except (ValueError, yaml.YAMLError):  # a README of another kind, or in another encoding
        return False


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Raise a ValueError that names the source if `datasets` cannot read it."""
    try:
        yield
    except (DatasetsError, OSError, ValueError) as error:
        # pyarrow raises plain OSErrors without an errno; others are about a missing file, the disk or the network.
        if isinstance(error, OSError) and not (type(error) is OSError and error.errno is None):
            raise
        # A DatasetGenerationError says only that an error occurred; its subclasses say more.
        cause = error.__cause__ if type(error) is DatasetGenerationError else error
        raise ValueError(f"{source} cannot be read: {cause}. Repair it, or leave it out.") from error


def read_each(rows: Iterable, source: str) -> Iterator:
    """Yield the rows of a stream; raise a ValueError that names its source if `datasets` cannot read a row."""
    rows = iter(rows)
    while True:
        with reading(source):
            row = next(rows, None)
        if row is None:
            return
        yield row


def load_files(builder: str, splits: Mapping[str, list[str]], **options) -> DatasetDict | IterableDatasetDict:
    """Load files with `datasets.load_dataset`, passing each by name so that it guesses nothing.

    Args:
        builder: a builder of `datasets`, such as "json".
        splits: paths of files by split.
        options: further arguments of `load_dataset`.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file cannot be read; the message names it.
    """
    files = [file for part in splits.values() for file in part]
    data_files = {name: [glob.escape(file) for file in part] for name, part in splits.items()}
    source = files[0] if len(files) == 1 else f"one of {files[0]} and {len(files) - 1} other files"
    try:
        with reading(source):
            return load_dataset(builder, data_files=data_files, **options)
    except ValueError:
        for file in files if len(files) > 1 else ():
            with reading(file):
                alone = {**options, "data_files": glob.escape(file), "split": "train", "streaming": True}
                for _ in load_dataset(builder, **alone).iter(1000):
                    pass
        raise
