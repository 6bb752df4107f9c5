"""Load what a script's options name: a model (a config file with overrides, or a checkpoint) and its tokenizer."""

import difflib
import json
import pickle
import re
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints import METRICS_FILE, STATE_FILE, no_progress_bars

TOKENIZER_FILES = ("*token*", "*vocab*", "*.model")


def check_one_source(args: object) -> None:
    """Refuse options that describe a new model, or a new vocabulary, together with a checkpoint to start from.

    Args:
        args: an object with `model_name_or_path` and those of `config_name`, `config_overrides`,
            `backbone_name_or_path` and `tokenizer_name` that the script has; None for options that are not given.

    Raises:
        ValueError: if both are given.
    """
    names = ("config_name", "config_overrides", "backbone_name_or_path")
    given = [name for name in names if getattr(args, name, None) is not None]
    if args.model_name_or_path is not None and given:
        raise ValueError(f"model_name_or_path loads an existing model as it is: leave out {' and '.join(given)}")
    if args.model_name_or_path is not None and getattr(args, "tokenizer_name", None) in ("char", "bpe"):
        raise ValueError(
            f"tokenizer_name {args.tokenizer_name} would change the token ids, and the embeddings of "
            f"{args.model_name_or_path} would no longer fit them: remove it to use the model's own tokenizer"
        )


def make_config(config_name: str | None, overrides: str | None = None, **values: object) -> PreTrainedConfig:
    """Make the config of a new model from a JSON file and changes to it.

    The changes are applied to the file's fields before the config is made, so that derived fields take them into
    account.

    Args:
        config_name: a JSON file, or a model's directory; None: MinGRU's defaults.
        overrides: `"name=value,name=value"`, values in JSON; commas inside brackets do not separate:
            `"hidden_sizes=[64,128]"`.
        values: fields that take precedence over the file; overrides take precedence over both.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a JSON object, an override is malformed or not a field of the config, or the
            config rejects the values.
    """
    fields = {} if config_name is None else read_config_file(config_name)
    model_type = fields.pop("model_type", "mingru")
    changes = parse_overrides(overrides)
    if "model_type" in changes:
        raise ValueError("config_overrides cannot change the model_type: set it in the JSON file given as config_name")
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *fields, *getattr(default, "run_choices", ())}
    for name in changes:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {similar[0]!r}?" if similar else ""
            raise ValueError(f"config_overrides: {model_type} has no field {name!r}{hint}")
    try:
        return AutoConfig.for_model(model_type, **{**fields, **values, **changes})
    except (StrictDataclassError, TypeError, AttributeError) as error:  # last two: not checked by transformers
        raise ValueError(f"config: {error}") from None


def read_config_file(config_name: str) -> dict:
    """Read the fields of a config from a JSON file, or from the `config.json` of a directory.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file does not hold a JSON object.
    """
    path = Path(config_name)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"config_name: no such file: {path}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"config_name: {path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"config_name: {path} does not contain a JSON object")
    return fields


def parse_overrides(text: str | None) -> dict:
    """Parse `"a=1,b=[2,3],c=true,d=word"`; values that are not JSON are strings.

    Raises:
        ValueError: if a piece has no `=`.
    """
    result = {}
    for piece in re.split(r",(?![^\[]*\])", text or ""):
        if not piece.strip():
            continue
        name, equals, value = piece.partition("=")
        if not equals:
            raise ValueError(f"config_overrides: expected name=value, not {piece.strip()!r}")
        try:
            result[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            result[name.strip()] = value.strip()
    return result


def load_pretrained(cls: type, name: str | Path, **kwargs: object):
    """Call `cls.from_pretrained(name, **kwargs)` without a progress bar and with a clear error.

    Args:
        cls: an Auto class, or a class of models or tokenizers.
        name: a directory, or a name on the Hub (`name` or `owner/name`).
        **kwargs: further arguments of from_pretrained.

    Raises:
        OSError: if `name` is neither, or is a directory that lacks the requested files or has damaged weights. A name
            that can only be a path is not looked up on the Hub.
        ValueError: if `cls` does not load this kind of model, or one of its files is damaged in another way, such as
            a config whose values are invalid or do not fit the weights.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name} contains no model: it has no config.json")
        is_tokenizer = cls is AutoTokenizer or issubclass(cls, PreTrainedTokenizerBase)
        # Otherwise some tokenizer classes would load without an error, with an empty vocabulary.
        if is_tokenizer and not any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES):
            raise FileNotFoundError(
                f"{name} contains a model but no tokenizer (tokenizer.json or the like): add the one that it was "
                "trained with, using tokenizer.save_pretrained"
            )
    else:
        on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name))
        if not on_hub or ("/" in str(name) and path.parent.is_dir()):
            raise FileNotFoundError(f"no such model directory: {name}")
    try:
        with no_progress_bars():
            return cls.from_pretrained(name, **kwargs)
    except SafetensorError as error:  # not an OSError, though a truncated file is the usual cause
        raise OSError(f"the weights of {name} are damaged: {error}") from None
    except OSError as error:
        if path.is_dir():
            raise
        raise OSError(f"{name} is not a local directory, and could not be loaded from the Hub: {error}") from None
    except ValueError as error:
        # The message of transformers goes on with a list of all models that it supports.
        if not re.match("Unrecognized (configuration class|video processor)", str(error)):
            raise
        kind = AutoConfig.from_pretrained(name).model_type
        raise ValueError(f"{name} is a {kind} model, which {cls.__name__} does not load") from None
    except pickle.UnpicklingError:  # torch's message advises running the code in the file
        raise OSError(
            f"the weights of {name} are damaged, or contain more than tensors and could run code when loaded"
        ) from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # out of memory, for example
            raise
        raise ValueError(
            f"the weights of {name} do not have the shapes that its config.json asks for: see the report above"
        ) from None
    except (StrictDataclassError, KeyError, TypeError, AttributeError, EOFError) as error:
        # transformers raises these where it does not check a file's format.
        raise ValueError(
            f"{name} could not be loaded; a file in it may be damaged: {type(error).__name__}: {error}"
        ) from None


def training_arguments(name: str | Path) -> dict:
    """Read the training arguments recorded in a model's directory or a checkpoint; empty if none are recorded."""
    for file in (METRICS_FILE, STATE_FILE):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return dict(json.loads((Path(name) / file).read_text(encoding="utf-8"))["arguments"])
    return {}


def check_token_ids(ids: torch.Tensor, model: PreTrainedModel) -> None:
    """Refuse token ids (any shape) that the model has no embedding for.

    Raises:
        ValueError: if there is such an id.
    """
    known = model.get_input_embeddings().weight.shape[0]
    if (largest := int(ids.max())) >= known:
        raise ValueError(
            f"the tokenizer gives the token id {largest}, but the model only has ids below {known}: it is not the "
            "tokenizer that the model was trained with"
        )


def check_block_size(block_size: int, model: PreTrainedModel) -> None:
    """Refuse blocks of more tokens than the model has positions for; a MinGRU reads blocks of any size.

    Raises:
        ValueError: if block_size exceeds the configuration's `max_position_embeddings`.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and block_size > positions:
        raise ValueError(f"block_size {block_size} is more than the model's {positions} positions: lower it")


def first_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that a text begins with: beginning-of-text, or else a newline, a space or end-of-text."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    for text in ("\n", " "):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if ids and tokenizer.unk_token_id not in ids:
            return ids[0]
    return tokenizer.eos_token_id


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Turn a prompt into token ids (1, T); a prompt without tokens becomes the `first_token_id`.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    ids = tokenizer(prompt, return_tensors="pt").input_ids.long() if prompt else torch.empty(1, 0)
    if ids.shape[1] == 0:
        first = first_token_id(tokenizer)
        if first is None:
            raise ValueError("the prompt has no tokens: give another --prompt")
        ids = torch.tensor([[first]])
    return ids


def unknown_parts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Return the parts of a text, each once, that the tokenizer maps to its unknown token."""
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:
        return []
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    parts = [text[start:end] for number, (start, end) in places if number == tokenizer.unk_token_id]
    return [part for part in dict.fromkeys(parts) if part != tokenizer.unk_token]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that pads texts which end early: padding, or else end-of-text, or else token 0."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in ids if number is not None)
