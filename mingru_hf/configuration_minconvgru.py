"""MinConvGRU video model configuration."""

from typing import TYPE_CHECKING, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .configuration_common import ConfigurationMixin

if TYPE_CHECKING:
    # This import never runs. When transformers saves an object with custom code, it copies the object's source file
    # and the files imported there. Because of this line, a configuration saved without a model still comes with the
    # modelling code that its auto_map refers to.
    from .modeling_minconvgru import MinConvGRUModel  # noqa: F401

# The classes that load a saved directory with trust_remote_code=True where this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_minconvgru.MinConvGRUConfig",
    "AutoModel": "modeling_minconvgru.MinConvGRUModel",
    "AutoModelForVideoClassification": "modeling_minconvgru.MinConvGRUForVideoClassification",
}


@strict
class MinConvGRUConfig(ConfigurationMixin, PreTrainedConfig):
    """Configuration of the MinConvGRU video model.

    An image backbone turns every frame into feature maps at several stages; at each stage a stack of convolutional
    MinGRU layers runs over time, and its last output, pooled to a few cells, is classified. The logits of the stages
    are averaged. The defaults of the stacks are those of torch-mingru's UCF101 classifier, except for dropout, which
    is 0.15 there. The backbone of that classifier is
    `TimmBackboneConfig(backbone="vgg16", out_indices=[0, 1, 2, 3, 4])` with `feature_pooling=True`.

    Args:
        backbone_config: configuration of any backbone that AutoBackbone knows, or its dict with a `model_type`. Its
            `out_features` or `out_indices` choose the stages. None: a ResNet-50 with its four stages.
        feature_pooling: halve the feature maps by 2 x 2 max pooling, at all stages or at those marked True in a list.
        hidden_sizes: channels of the recurrent states at each stage. None: as many as the feature map has.
        num_hidden_layers: recurrent layers at each stage; at least 1.
        kernel_size: kernel size of the recurrent layers' convolutions, in cells of the feature map; at least 1.
        stride: stride of the same convolutions; at least 1.
        padding: padding of the same convolutions; at least 0.
        norm: normalise each recurrent layer's input with a GroupNorm.
        residual: add each recurrent layer's input to its output, through a convolution where their shapes differ.
        dropout: probability of zeroing an output of each recurrent layer except the last, in training.
        classifier_dropout: dropout probability of the pooled features before the classifiers.
        pooled_size: number of cells along each side to which the outputs are averaged before the classifiers.
        bidirectional: run a second set of stacks from the last frame to the first. Such a model cannot stream.
        freeze_backbone: keep the backbone in evaluation mode and without gradients.
        backbone_chunk_size: number of frames that the backbone processes at once, which bounds its memory (in training
            only together with activation checkpointing); 0 or None for all frames. In training, batch norms compute
            their statistics for each chunk separately.
        num_frames: frames per clip in training, and the number that the video-classification pipeline samples.
        initializer_range: standard deviation of newly initialised classifier weights. Convolutions use PyTorch's
            default initialisation, which depends on their fan-in, and the backbone that of its own class.
        scan_backend: implementation that runs the recurrence: a backend of `mingru_scan`, or "auto" for the fastest.
            It holds for the current run only and is not written to config.json.

    Raises:
        ValueError: if backbone_config is a dict without a known model_type, or selects a stage that its backbone does
            not have.
        huggingface_hub.errors.StrictDataclassFieldValidationError: if a value has the wrong type or is not one of the
            allowed choices.
        huggingface_hub.errors.StrictDataclassClassValidationError: if the sizes are inconsistent or out of range.

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
        """Number of feature maps that the backbone returns for each frame."""
        return len(self.backbone_config.out_indices or self.backbone_config.out_features)

    def validate_architecture(self):
        """Check that the values are consistent and in range (called by the `strict` decorator)."""
        backbone = type(self.backbone_config).__name__
        if not hasattr(self.backbone_config, "out_indices"):
            raise ValueError(
                f"backbone_config must belong to a backbone that AutoBackbone knows, got a {backbone}: it has no "
                "out_indices."
            )
        stages = getattr(self.backbone_config, "stage_names", None)
        indices = self.backbone_config.out_indices or []
        if stages is not None and not all(-len(stages) <= index < len(stages) for index in indices):
            raise ValueError(
                f"out_indices must refer to the backbone's {len(stages)} stages ({', '.join(stages)}), got {indices}."
            )
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
                f"backbone_chunk_size must be a number of frames, or 0 for all, got {self.backbone_chunk_size}."
            )
        if not 0 <= self.initializer_range < float("inf"):
            raise ValueError(f"initializer_range must be 0 or above and finite, got {self.initializer_range}.")
        for name in ("dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability between 0 and 1, got {getattr(self, name)}.")


MinConvGRUConfig.register_for_auto_class()

__all__ = ["MinConvGRUConfig"]
