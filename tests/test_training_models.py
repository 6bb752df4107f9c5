"""Options that name a model or a tokenizer: what they load, and the errors if they cannot load it."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from mingru_hf import MinGRUConfig, MinGRUForCausalLM
from mingru_hf.data.text import build_tokenizer
from mingru_hf.training.models import (
    check_one_source,
    load_pretrained,
    make_config,
    pad_token_id,
    parse_overrides,
    prompt_ids,
    unknown_parts,
)

SOURCES = ("config_name", "config_overrides", "backbone_name_or_path")


def options(**given):
    return SimpleNamespace(**dict.fromkeys(("model_name_or_path", "tokenizer_name", *SOURCES)) | given)


@pytest.mark.parametrize("name", SOURCES)
def test_a_checkpoint_is_not_described_a_second_time(name):
    check_one_source(options(**{name: "x"}))
    check_one_source(options(model_name_or_path="m"))
    with pytest.raises(ValueError, match=f"leave out {name}"):
        check_one_source(options(model_name_or_path="m", **{name: "x"}))


def test_a_checkpoint_accepts_an_existing_tokenizer():
    check_one_source(options(model_name_or_path="m", tokenizer_name="gpt2"))
    check_one_source(options(tokenizer_name="char"))
    check_one_source(SimpleNamespace(model_name_or_path="m"))  # a script without the other options


def test_overrides_go_before_values_and_values_before_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"vocab_size": 5, "hidden_size": 8, "remark": "schön"}', encoding="utf-8")
    config = make_config(str(path), "vocab_size=3", vocab_size=4, hidden_size=16)
    assert (config.vocab_size, config.hidden_size, config.remark) == (3, 16, "schön")
    assert make_config(str(path), "remark=none").remark == "none"  # the file has this field


def test_blanks_and_equals_signs_in_overrides():
    assert parse_overrides(" a = 1 ,, b = x y , c=d=e,f=[1,2],g=[3], ") == {
        **{"a": 1, "b": "x y", "c": "d=e", "f": [1, 2], "g": [3]}
    }


class Asked:
    """A stand-in for an Auto class that records the names that it is asked for."""

    names, error = [], None

    @classmethod
    def from_pretrained(cls, name):
        assert not logging.is_progress_bar_enabled()
        cls.names.append(str(name))
        if cls.error is not None:
            raise cls.error
        return cls


@pytest.fixture
def asked(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Asked, "names", [])
    return Asked


def test_only_what_can_be_a_name_is_looked_up_on_the_hub(asked, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("gpt2", "owner/name-1.0", "o_w/n"):
        assert load_pretrained(asked, name) is asked
    assert asked.names == ["gpt2", "owner/name-1.0", "o_w/n"]
    for name in ("runs/gone", "./gone", "../gone", "/gone", "a/b/c", "~/gone", "owner/", "a name"):
        with pytest.raises(FileNotFoundError, match=f"no such model directory: {name}"):
            load_pretrained(asked, name)
    assert len(asked.names) == 3
    assert logging.is_progress_bar_enabled()


def test_an_error_says_whether_the_hub_was_asked(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(asked, "error", OSError("nothing there"))
    with pytest.raises(
        OSError, match="owner/name is not a local directory, and could not be loaded from the Hub: nothing there"
    ):
        load_pretrained(asked, "owner/name")
    (tmp_path / "config.json").touch()
    with pytest.raises(OSError, match=r"^nothing there$"):
        load_pretrained(asked, tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt", "spiece.model"])
def test_a_tokenizer_is_made_of_a_file_of_its_own(file, tmp_path):
    class Words(Asked, PreTrainedTokenizerBase):
        pass

    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match="contains a model but no tokenizer"):
        load_pretrained(Words, tmp_path)
    (tmp_path / file).touch()
    assert load_pretrained(Words, tmp_path) is Words


def words(**tokens):
    """Build a tokenizer that drops white space."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def test_a_text_begins_with_the_prompt_or_the_token_for_it_or_a_new_line():
    characters = build_tokenizer("char", ["ab\n"])
    assert prompt_ids(characters, "ba").tolist() == [[4, 3]]
    assert prompt_ids(characters, "").tolist() == [[0]]
    characters.bos_token = None
    assert prompt_ids(characters, "").tolist() == [[2]]
    assert prompt_ids(words(bos_token="b"), " \n").tolist() == [[1]]
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        prompt_ids(words(), " ")
    assert prompt_ids(words(), "a").dtype == torch.long


def test_the_parts_of_a_prompt_that_the_model_does_not_see():
    characters = build_tokenizer("char", ["ab"])
    assert unknown_parts(characters, "aéb<unk>€é") == ["é", "€"]
    assert unknown_parts(characters, "abba") == []
    assert unknown_parts(words(unk_token="?"), "a word b ?") == ["word"]
    assert unknown_parts(words(), "a word") == []
    assert unknown_parts(SimpleNamespace(unk_token_id=1, is_fast=False), "a") == []


@pytest.mark.parametrize(
    ("pad", "eos", "expected"), [(3, 5, 3), (0, 5, 0), (None, 5, 5), (None, 0, 0), (None, None, 0)]
)
def test_texts_that_end_early_are_filled_up(pad, eos, expected):
    assert pad_token_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == expected


def test_damaged_weights_are_named(tmp_path):
    MinGRUForCausalLM(MinGRUConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)).save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=f"the weights of {tmp_path} are damaged"):
        load_pretrained(AutoModelForCausalLM, tmp_path)


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGES = {
    "type": (lambda d: change_config(d, hidden_size="x"), "'hidden_size' expected int, got str"),
    "value": (lambda d: change_config(d, hidden_size=-3), "hidden_size must be above 0"),
    "shapes": (lambda d: change_config(d, hidden_size=16), "do not have the shapes that its config.json asks for"),
    "dtype": (lambda d: change_config(d, dtype="foo"), "no attribute 'foo'"),
    "form": (lambda d: change_config(d, id2label=5), "a file in it may be damaged"),
    "number": (lambda d: (d / "config.json").write_text("5"), "a file in it may be damaged"),
    "index": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        "a file in it may be damaged: .*weight_map",
    ),
    "pickle": (lambda d: (d / "pytorch_model.bin").write_bytes(pickle.dumps(print, 2)), "contain more than tensors"),
    "empty": (lambda d: (d / "pytorch_model.bin").touch(), "a file in it may be damaged: EOFError"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_told_in_one_line(damage, tmp_path):
    MinGRUForCausalLM(MinGRUConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)).save_pretrained(tmp_path)
    change, message = DAMAGES[damage]
    if damage in ("index", "pickle", "empty"):
        (tmp_path / "model.safetensors").unlink()
    change(tmp_path)
    with pytest.raises((ValueError, OSError), match=f"(?s){tmp_path}.*{message}"):
        load_pretrained(AutoModelForCausalLM, tmp_path)


def test_what_is_no_fault_of_the_files_keeps_its_class(monkeypatch, tmp_path):
    (tmp_path / "config.json").touch()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_pretrained(AutoModelForCausalLM, tmp_path)


@pytest.mark.parametrize(("text", "first"), [("a b\n", "\n"), ("a b", " "), ("ab", "<|endoftext|>")])
def test_an_empty_prompt_is_a_token_that_occurs_in_the_text(text, first):
    tokenizer = build_tokenizer("char", [text])
    assert tokenizer.decode(prompt_ids(tokenizer, "")[0]) == "<|endoftext|>"
    tokenizer.bos_token = None
    assert tokenizer.decode(prompt_ids(tokenizer, "")[0]) == first


def test_overrides_that_no_config_takes_are_told_in_one_line():
    for override, message in {
        "model_type=llama": "set it in the JSON file given as config_name",
        "dtype=foo": "no attribute 'foo'",
        "id2label=5": "config: 'int' object",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_config(None, override)


def test_choices_of_a_run_are_fields_too():
    config = make_config(None, "scan_backend=torch,skip_logits=true")
    assert config.scan_backend == "torch"
    assert config.skip_logits
