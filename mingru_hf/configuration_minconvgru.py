"""MinConvGRU video model configuration."""

from typing import TYPE_CHECKING, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .configuration_common import ConfigurationMixin

if TYPE_CHECKING:
    # Never run. transformers copies beside a saved object the files that its file names, so this line makes even a
    # configuration saved alone carry the code of the models that its auto_map promises.
    from .modeling_minconvgru import MinConvGRUModel  # noqa: F401

# What loads a saved directory where this package is not installed, with trust_remote_code=True.
AUTO_MAP = {
    "AutoConfig": "configuration_minconvgru.MinConvGRUConfig",
    "AutoModel": "modeling_minconvgru.MinConvGRUModel",
    "AutoModelForVideoClassification": "modeling_minconvgru.MinConvGRUForVideoClassification",
}


@strict
class MinConvGRUConfig(ConfigurationMixin, PreTrainedConfig):
    """Backbone, sizes and switches of the MinConvGRU video model.

    An image backbone turns every frame into feature maps at several stages; at each stage a stack of convolutional
    MinGRU layers runs over time, and its last output, pooled to a few cells, is classified. The logits of the stages
    are averaged. The defaults of the stacks are those of torch-mingru's UCF101 classifier, but for its dropout of
    0.15; its backbone is `TimmBackboneConfig(backbone="vgg16", out_indices=[0, 1, 2, 3, 4])` with
    `feature_pooling=True`.

    Args:
        backbone_config: configuration of any backbone that AutoBackbone knows, or its dict with a `model_type`. Its
            `out_features` or `out_indices` choose the stages. None: a ResNet-50 with its four stages.
        feature_pooling: halve the feature maps by 2 x 2 max pooling, at all stages or at those marked in a list.
        hidden_sizes: channels of the recurrent states at each stage. None: as many as the feature map has.
        num_hidden_layers: recurrent layers at each stage; at least 1.
        kernel_size: of the recurrent layers' convolutions, in cells of the feature map; at least 1.
        stride: of the same convolutions; at least 1.
        padding: of the same convolutions; at least 0.
        norm: normalise each recurrent layer's input with a GroupNorm.
        residual: add each recurrent layer's input to its output, through a convolution where their shapes differ.
        dropout: probability of zeroing an output of each recurrent layer but the last, in training.
        classifier_dropout: the same for the pooled features in front of the classifiers.
        pooled_size: cells along each side that the outputs are averaged to before they are classified.
        bidirectional: run a second set of stacks from the last frame to the first. Such a model cannot stream.
        freeze_backbone: keep the backbone as it is: in evaluation mode, without gradients.
        backbone_chunk_size: frames that the backbone sees at once, which bounds its memory (in training together with
            activation checkpointing); 0 or None for all. Batch norms in training look at each piece by itself.
        num_frames: frames of a clip in training; what the video-classification pipeline samples.
        initializer_range: standard deviation of newly drawn classifier weights. Convolutions take PyTorch's own
            initialisation, which looks at their size, and the backbone that of its class.
        scan_backend: which implementation runs the recurrence: a backend of `mingru_scan`, "auto" for the fastest. A
            choice for this run: it is not written to config.json.

    Raises:
        ValueError: if backbone_config is a dict of no known kind, or its backbone has no such stage.
        huggingface_hub.errors.StrictDataclassFieldValidationError: if a value has the wrong type or is no choice.
        huggingface_hub.errors.StrictDataclassClassValidationError: if the sizes cannot belong to one model.

    Example:
        >>> from transformers import ResNetConfig
        >>> backbone = ResNetConfig(hidden_sizes=[16, 32, 64], depths=[1, 1, 1], out_features=["stage2", "stage3"])
        >>> config = MinConvGRUConfig(backbone_config=backbone, num_labels=8)
    """

    model_type = "minconvgru"
    run_choices = ("scan_backend",)
    keys_to_ignore_at_inference = ["cache"]
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="resnet",
            init_kwargs={"out_features": ["stage1", "stage2", "stage3", "stage4"]},
        )
    }

    backbone_config: dict | PreTrainedConfig | None = None
    feature_pooling: bool | list[bool] | tuple[bool, ...] = False
    hidden_sizes: list[int] | tuple[int, ...] | None = None
    num_hidden_layers: int = 2
    kernel_size: int = 3
    stride: int = 2
    padding: int = 1
    norm: bool = True
    residual: bool = True
    dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    pooled_size: int = 2
    bidirectional: bool = False
    freeze_backbone: bool = False
    backbone_chunk_size: int | None = None
    num_frames: int = 10
    initializer_range: float = 0.02
    scan_backend: Literal["auto", "reference", "log", "torch", "numba", "triton"] = "auto"

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict) and self.backbone_config.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                "backbone_config as a dict needs a model_type that transformers knows, such as 'resnet', 'convnext' "
                f"or 'timm_backbone'; got {self.backbone_config.get('model_type')!r}."
            )
        kwargs["auto_map"] = self._code_to_load(AUTO_MAP, kwargs.get("auto_map") or {})
        super().__post_init__(**kwargs)

    @property
    def num_stages(self) -> int:
        """Feature maps that the backbone hands over for each frame."""
        return len(self.backbone_config.out_indices or self.backbone_config.out_features)

    def validate_architecture(self):
        """Check that the sizes and switches can belong to one model (called by the `strict` decorator)."""
        backbone = type(self.backbone_config).__name__
        if not hasattr(self.backbone_config, "out_indices"):
            raise ValueError(
                f"backbone_config must belong to a backbone that AutoBackbone knows, got a {backbone}: it has no "
                "out_indices."
            )
        stages = getattr(self.backbone_config, "stage_names", None)
        indices = self.backbone_config.out_indices or []
        if stages is not None and not all(-len(stages) <= index < len(stages) for index in indices):
            raise ValueError(f"The backbone has {len(stages)} stages, {', '.join(stages)}; out_indices is {indices}.")
        for name in ("feature_pooling", "hidden_sizes"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)) and len(value) != self.num_stages:
                raise ValueError(
                    f"{name} must have one entry for each of the backbone's {self.num_stages} stages, got {value}."
                )
        sizes = ("num_hidden_layers", "kernel_size", "stride", "pooled_size", "num_frames")
        for name, least in (*((size, 1) for size in sizes), ("padding", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.hidden_sizes is not None and min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes must be at least 1, got {self.hidden_sizes}.")
        if self.backbone_chunk_size is not None and self.backbone_chunk_size < 0:
            raise ValueError(
                f"backbone_chunk_size is a number of frames, or 0 for all of them, got {self.backbone_chunk_size}."
            )
        if not 0 <= self.initializer_range < float("inf"):
            raise ValueError(f"initializer_range must be 0 or above and finite, got {self.initializer_range}.")
        for name in ("dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability between 0 and 1, got {getattr(self, name)}.")


MinConvGRUConfig.register_for_auto_class()

__all__ = ["MinConvGRUConfig"]
