"""Convert torch-mingru checkpoints into models of this package; every tensor is used, or named in an error.

Supported are the state dicts and TorchScript archives of torch-mingru's examples (github.com/cheind/mingru). No code
in a file is executed: state dicts go through `torch.load(weights_only=True)`, and only the tensors of an archive are
read.
"""

import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from transformers import PreTrainedConfig, PreTrainedModel, TimmBackboneConfig

from .configuration_minconvgru import MinConvGRUConfig
from .configuration_mingru import MinGRUConfig
from .modeling_minconvgru import MinConvGRUForVideoClassification
from .modeling_mingru import MinGRUForCausalLM


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a state dict or of a TorchScript archive, without running code from the file.

    Args:
        path: a file written by `torch.save(model.state_dict(), ...)`, `torch.jit.save` or safetensors.

    Returns:
        Parameters and buffers under their names in the model, on the CPU. Prefixes added by DistributedDataParallel
        and torch.compile are removed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another kind, is damaged, or contains more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if zipfile.is_zipfile(path):
        state = _read_torchscript(path)
        if state is not None:
            return state
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a checkpoint, or contains more than tensors and could run code when loaded: save "
            f"`model.state_dict()` instead of the model. torch says: {str(error).splitlines()[0]}"
        ) from None
    except Exception as error:  # invalid pickles raise many types: KeyError, IndexError, EOFError, ...
        raise ValueError(f"{path} is damaged or not a PyTorch checkpoint: {type(error).__name__}: {error}") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        kinds = _some(map(repr, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"{path} contains {kinds} instead of a state dict (names and tensors): save only `model.state_dict()`."
        )
    partial = [name for name, tensor in state.items() if not _is_whole(tensor)]
    if partial:
        raise ValueError(
            f"{path} contains tensors that do not store all elements (sparse, meta or expanded), expected dense ones: "
            f"{_some(partial)}."
        )
    for wrapper in ("_orig_mod.", "module.", "_orig_mod."):  # the two can be in either order
        if all(name.startswith(wrapper) for name in state):
            consume_prefix_in_state_dict_if_present(state, wrapper)
    return dict(state)


class _Scripted:
    """Stand-in for every module of a TorchScript archive; it has the module's attributes but none of its code."""


# Names that an archive's pickle may use, besides those in `find_class`. Lists are pickled as function calls with the
# list as first argument.
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


class _Unpickler(pickle.Unpickler):
    """Unpickle the tensors of an archive; only the callables returned by `find_class` can be called."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return _Scripted
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle" and name in _LISTS:
            return lambda values, *types: values
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        raise pickle.UnpicklingError(f"unexpected {module}.{name}")

    def persistent_load(self, reference: tuple) -> Tensor:
        _, dtype, name, _, _ = reference
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}/data/{name}")), dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    tensor = storage.as_strided(size, stride, offset)
    if not _is_whole(tensor):
        raise pickle.UnpicklingError(f"a tensor of size {size} has only {storage.numel()} stored numbers")
    return tensor.clone()


def _is_whole(tensor: Tensor) -> bool:
    """Return whether each element has its own place in memory; else a small file could claim any amount of memory."""
    is_strided = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
    return is_strided and tensor.nbytes <= tensor.untyped_storage().nbytes()


def _read_torchscript(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a TorchScript archive; None if it is an archive of another kind."""
    end = "/constants.pkl"
    try:
        with zipfile.ZipFile(path) as archive:
            root = next((name.removesuffix(end) for name in archive.namelist() if name.endswith(end)), None)
            if root is None:
                return None
            state = dict(_named_tensors(_Unpickler(archive, root).load(), ""))
    except Exception as error:  # damaged files raise many types, as for state dicts
        raise ValueError(
            f"{path} is a damaged TorchScript archive, or contains more than a model: {type(error).__name__}: {error}"
        ) from None
    if not state:
        raise ValueError(
            f"{path} is a TorchScript archive without parameters: torch.jit.freeze turns them into "
            "constants. Save the model before freezing it."
        )
    return state


def _named_tensors(module: _Scripted, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Scripted):
            yield from _named_tensors(value, f"{prefix}{name}.")


# torch-mingru's names in its text and selective-copying examples, and ours.
_TEXT_NAMES = (
    (r"emb\.weight", r"model.embed_tokens.weight"),
    (r"rnn\.layers\.(\d+)\.gate_hidden\.(weight|bias)", r"model.layers.\1.mixer.gate_hidden.\2"),
    (r"rnn\.layers\.(\d+)\.norm\.(weight|bias)", r"model.layers.\1.norm.\2"),
    (r"rnn\.layers\.(\d+)\.res_align\.weight", r"model.layers.\1.res_align.weight"),
    (r"ln\.(weight|bias)", r"model.norm.\1"),
    (r"fc\.(weight|bias)", r"lm_head.\1"),
)


def convert_text(state: dict[str, Tensor], residual: bool = True) -> MinGRUForCausalLM:
    """Build a language model from the tensors of torch-mingru's text or selective-copying example.

    Args:
        state: the tensors under torch-mingru's names: `emb`, `rnn.layers.*`, `ln` (text example only), `fc`.
        residual: whether the layers have residual connections, as in both examples. Used only if all widths are
            equal; otherwise the tensors' names show it.

    Returns:
        The model, in evaluation mode, in the tensors' dtype. Settings that a state dict does not contain keep their
        defaults: dropout, the norms' epsilon, special tokens.

    Raises:
        ValueError: if a tensor is missing, is left over, or has a shape that does not fit; its name is given.
    """
    names = _rename(state, _TEXT_NAMES)
    layers = sorted({int(match[1]) for name in state if (match := re.match(r"rnn\.layers\.(\d+)\.", name))})
    needed = ["emb.weight", "fc.weight", *(f"rnn.layers.{i}.gate_hidden.weight" for i in layers or [0])]
    _refuse_without(needed, state)

    vocab_size, hidden_size = state["emb.weight"].shape
    hidden_sizes = [state[f"rnn.layers.{i}.gate_hidden.weight"].shape[0] // 2 for i in layers]
    if len({hidden_size, *hidden_sizes}) > 1:
        residual = any(".res_align." in name for name in state)
    config = MinGRUConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        hidden_sizes=hidden_sizes,
        expand=1,
        conv_kernel=0,
        use_mlp=False,
        residual=residual,
        use_bias="rnn.layers.0.gate_hidden.bias" in state,
        norm_type="layer_norm" if {"rnn.layers.0.norm.weight", "ln.weight"} & state.keys() else "none",
        norm_bias="rnn.layers.0.norm.bias" in state,
        use_final_norm="ln.weight" in state,
        final_norm_bias="ln.bias" in state,
        lm_head_bias="fc.bias" in state,
    )
    return _fill(MinGRUForCausalLM, config, state, names)


# torch-mingru's video example cuts VGG16 after each pooling and numbers the layers of each part from 0; timm numbers
# all layers consecutively, as torchvision does.
_VGG16_STARTS = (0, 5, 10, 17, 24)
_VIDEO_NAMES = (
    *(
        (
            rf"feature_parts\.{stage}\.{i}\.(weight|bias)",
            rf"model.backbone._backbone.features_{start + i}.\1",
        )
        for stage, start in enumerate(_VGG16_STARTS)
        for i in range(0, 7, 2)
    ),
    (
        r"heads\.(\d)\.rnn\.layers\.(\d+)\.(gate_hidden|norm|res_align)\.(weight|bias)",
        r"model.stacks.\1.layers.\2.\3.\4",
    ),
    (r"heads\.(\d)\.fc\.(weight|bias)", r"classifiers.\1.\2"),
)


def convert_video(state: dict[str, Tensor]) -> MinConvGRUForVideoClassification:
    """Build a video classifier from the tensors of torch-mingru's video example; needs timm for its VGG16.

    Args:
        state: the tensors under torch-mingru's names: `feature_parts` (VGG16 cut after its poolings) and `heads`.

    Returns:
        The model, in evaluation mode, in the tensors' dtype. Settings that a state dict does not contain are those of
        the example: stride 2 and padding 1. There is no dropout, and the labels have no names.

    Raises:
        ValueError: if a tensor is missing, is left over, or has a shape that does not fit; its name is given.
        ImportError: if timm is not installed.
    """
    names = _rename(state, _VIDEO_NAMES)
    last = max((int(name.split(".")[1]) for name in state if name.startswith("heads.")), default=0)
    stages = list(range(last + 1))
    first = [f"heads.{stage}.rnn.layers.0.gate_hidden.weight" for stage in stages]
    needed = [*first, *(f"heads.{stage}.fc.weight" for stage in stages)]
    _refuse_without(needed, state)

    hidden_sizes = [state[name].shape[0] // 2 for name in first]
    num_labels, features = state["heads.0.fc.weight"].shape
    config = MinConvGRUConfig(
        backbone_config=TimmBackboneConfig(backbone="vgg16", out_indices=stages),
        feature_pooling=True,
        hidden_sizes=hidden_sizes,
        num_hidden_layers=len({name.split(".")[4] for name in state if name.startswith("heads.0.rnn.layers.")}),
        kernel_size=state[first[0]].shape[-1],
        norm="heads.0.rnn.layers.0.norm.weight" in state,
        residual="heads.0.rnn.layers.0.res_align.weight" in state,
        pooled_size=max(1, math.isqrt(features // hidden_sizes[0])),
        num_labels=num_labels,
    )
    return _fill(MinConvGRUForVideoClassification, config, state, names)


def convert(state: dict[str, Tensor], residual: bool = True) -> PreTrainedModel:
    """Build the model that the tensors' names indicate, with `convert_text` or `convert_video`.

    Args:
        state: the tensors under torch-mingru's names, as `read_checkpoint` returns them.
        residual: as in `convert_text`; ignored for a video model, whose tensors' names show it.

    Raises:
        ValueError: if the names belong to none of torch-mingru's examples, or as in the function used.
    """
    if "emb.weight" in state:
        return convert_text(state, residual)
    if any(name.startswith("feature_parts.") for name in state):
        return convert_video(state)
    raise ValueError(
        "These tensors are not from one of torch-mingru's examples, expected names that begin with emb, rnn, ln and "
        f"fc (text), or feature_parts and heads (video): {_some(state)}."
    )


def _refuse_without(needed: list[str], state: dict[str, Tensor]) -> None:
    """Raise ValueError unless the tensors that give the model's sizes exist, are not empty and have 2 axes or more."""
    _refuse(
        {
            "are missing": [name for name in needed if name not in state],
            "are not matrices": [n for n in needed if n in state and (state[n].ndim < 2 or state[n].numel() == 0)],
        }
    )


def _rename(state: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Return {their name: our name}; raise ValueError for names that match no pattern or tensors not of floats."""
    renamed = {}
    for name in state:
        for pattern, ours in names:
            if match := re.fullmatch(pattern, name):
                renamed[name] = match.expand(ours)
    _refuse(
        {
            "do not belong to this kind of model": [name for name in state if name not in renamed],
            "are not floating-point": [
                f"{name} ({tensor.dtype})" for name, tensor in state.items() if not tensor.is_floating_point()
            ],
        }
    )
    return renamed


def _fill(cls: type, config: PreTrainedConfig, state: dict[str, Tensor], names: dict[str, str]) -> PreTrainedModel:
    """Build the model; every parameter must come from the state, and all of the state must be used."""
    model = cls(config).to(next(iter(state.values())).dtype).eval()
    expected = model.state_dict()
    theirs = {ours: name for name, ours in names.items()}
    fits = {
        ours: name for ours, name in theirs.items() if ours in expected and state[name].shape == expected[ours].shape
    }
    _refuse(
        {
            "do not belong to this model": [name for ours, name in theirs.items() if ours not in expected],
            "have a shape that does not fit": [
                f"{name} {list(state[name].shape)}, expected {list(expected[ours].shape)}"
                for ours, name in theirs.items()
                if ours in expected and ours not in fits
            ],
            "are missing (under our names)": [ours for ours in expected if ours not in theirs],
        }
    )
    model.load_state_dict({ours: state[name] for ours, name in fits.items()})
    return model


def _refuse(problems: dict[str, list[str]]) -> None:
    told = [f"these tensors {problem}: {_some(names)}" for problem, names in problems.items() if names]
    if told:
        raise ValueError(f"This is not a torch-mingru checkpoint that this package supports: {'; '.join(told)}.")


def _some(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


__all__ = ["convert", "convert_text", "convert_video", "read_checkpoint"]
