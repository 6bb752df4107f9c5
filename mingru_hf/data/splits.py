"""One rule for text and video: which files of a directory are data, and which are to train and to validate on."""

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

# Usual names, the preferred one first. "test" is none of them: the validation loss selects the best weights, so that a
# test split used for it would no longer test anything.
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
SPLIT_NAMES = ("train", *VALIDATION_NAMES, "test")

# Files of rows: the builders of `datasets` by suffix.
TABLES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
# What `datasets` keeps beside the data.
NOT_DATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
# Shards as datasets of the Hub name them.
SHARD = re.compile(rf"(?:data/([\w.]+)|({'|'.join(SPLIT_NAMES)}))-\d{{5}}-of-\d{{5}}\.[^/]+")
# Words for splits within longer names, such as wiki.valid.txt, and the split that each means.
WORDS = {name: name for name in SPLIT_NAMES}
WORDS |= {"training": "train", "testing": "test", "eval": "test", "evaluation": "test"}
WORD = re.compile(rf"(?<![a-z])({'|'.join(WORDS)})(?![a-z])", re.IGNORECASE)


def name_splits(splits: Mapping, source: str) -> dict:
    """Call the validation split "validation", whichever of its usual names it has.

    Args:
        splits: datasets by their names.
        source: of the datasets, for the message.

    Returns:
        The same datasets: "train", perhaps "validation", and the others under their own names.

    Raises:
        ValueError: if there is no "train".
    """
    if "train" not in splits:
        raise ValueError(f"{source} has the splits {', '.join(sorted(splits))}, expected one named train")
    found = next((name for name in VALIDATION_NAMES if name in splits), None)
    return {"validation" if name == found else name: split for name, split in splits.items()}


def suffix_of(file: str) -> str:
    """Return a file's suffix in lower case, of `a.jsonl.gz` the first one."""
    return _uncompressed(file).suffix.lower()


def list_files(directory: Path, suffixes: Container[str]) -> list[str]:
    """List the files in a directory and its folders, linked ones too, that have one of the suffixes (`suffix_of`).

    Returns:
        Paths relative to the directory, in the order of `datasets`; hidden files and folders are left out, and so are
        folders such as `__MACOSX`.
    """
    found, entered = [], set()
    for folder, folders, files in os.walk(directory, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:  # by another link, which may lead around in a circle
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
    """List a directory's files of the kind that takes up most; the others are counted in a warning.

    Args:
        directory: where they lie.
        kinds: by suffix.
        expected: what the directory should hold, for the message.

    Returns:
        The kind, and the paths as of `list_files`.

    Raises:
        ValueError: if there is no file of any kind.
    """
    files = list_files(directory, kinds)
    if not files:
        raise ValueError(f"{directory} holds {expected}")
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
    """Divide a directory's files among splits, by names that are exactly those of `SPLIT_NAMES`.

    A split is a folder, a file or the files of the form NAME-00000-of-00009.parquet directly in the directory, or in
    the folder that holds all of its files (the latter in a folder `data`, of any name). Any other file is for
    training, or, where there is a split "train", left out with a warning. Where no name is exactly "train", words in
    longer names count if there is one in each of them: wiki.train.txt, wiki.valid.txt; training/, testing/.

    Args:
        directory: where the files lie.
        files: relative paths (`list_files`).
        min_folders: folders that a file lies in within a split, at least: 1 for TRAIN/CLASS/*.mp4.

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
            "%s: %d files are left out, such as %s, because they lie outside of its splits %s",
            *(directory, len(rest), rest[0], ", ".join(splits)),
        )
    elif rest:
        splits["train"] = rest
        tops = {file[skipped:].split("/")[0] for file in rest}
        doubtful = sorted(top for top in tops if any(WORDS[word.lower()] != "train" for word in WORD.findall(top)))
        if doubtful:
            logger.warning(
                "%s: taken as training data: %s, since a split is a folder or file named exactly %s",
                *(directory, ", ".join(doubtful[:3]), ", ".join(SPLIT_NAMES)),
            )
    root = directory.resolve()
    return {name: [str(root / file) for file in part] for name, part in splits.items() if part}


def _folder_of_all(files: list[str], min_folders: int) -> str:
    """Return the folders that all files lie in, "a/b/" or "", up to one that names a split or a class."""
    folders = []
    for parts in zip(*(file.split("/")[: -1 - min_folders] for file in files), strict=False):
        if len(set(parts)) > 1 or parts[0] in SPLIT_NAMES:
            break
        folders.append(parts[0] + "/")
    return "".join(folders)


def _word_for_split(inside: str, min_folders: int) -> str | None:
    """Return the split that the words in a file's or its top folder's name tell, if it is one."""
    top, *more = inside.split("/")
    told = {WORDS[word.lower()] for word in WORD.findall(top)} if len(more) > min_folders or min_folders == 0 else ()
    return next(iter(told)) if len(told) == 1 else None


def _split_of(file: str, inside: str, min_folders: int) -> str | None:
    """Return the split that a file belongs to, if it belongs to one; `inside` is its path in the folder of all."""
    top, *more = inside.split("/")
    if top in SPLIT_NAMES and len(more) > min_folders:
        return top
    if min_folders == 0 and (shard := SHARD.fullmatch(file)):
        return shard[1] or shard[2]
    stem = _uncompressed(top).stem
    return stem if not more and min_folders == 0 and stem in SPLIT_NAMES else None


def _uncompressed(file: str) -> Path:
    """Return the path without the suffix of a compression."""
    path = Path(file)
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def declares_configurations(directory: Path) -> bool:
    """Return whether a directory's README.md says which files make which splits, as in a clone from the Hub."""
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
        # An OSError of pyarrow is a plain one without a number; others are of a missing file, the disk or the network.
        if isinstance(error, OSError) and not (type(error) is OSError and error.errno is None):
            raise
        # This one says nothing but that there was an error; its kinds do say more.
        cause = error.__cause__ if type(error) is DatasetGenerationError else error
        raise ValueError(f"{source} cannot be read: {cause}. Repair it, or leave it out.") from error


def read_each(rows: Iterable, source: str) -> Iterator:
    """Yield what a stream holds; raise a ValueError that names its source if `datasets` cannot read on."""
    rows = iter(rows)
    while True:
        with reading(source):
            row = next(rows, None)
        if row is None:
            return
        yield row


def load_files(builder: str, splits: Mapping[str, list[str]], **options) -> DatasetDict | IterableDatasetDict:
    """Load files with `datasets.load_dataset`, which is given them by name and so guesses nothing.

    Args:
        builder: of `datasets`, such as "json".
        splits: paths of files by split.
        options: of `load_dataset`.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if one cannot be read; it is named.
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
