"""MinGRU text model configuration."""

from typing import TYPE_CHECKING, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .configuration_common import ConfigurationMixin

if TYPE_CHECKING:
    # Never executed. When transformers saves an object's code, it also copies the files that this code imports. This
    # import makes even a configuration saved alone carry the code of the models that its auto_map lists.
    from .modeling_mingru import MinGRUModel  # noqa: F401

# The classes that load a saved directory with trust_remote_code=True where this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_mingru.MinGRUConfig",
    "AutoModel": "modeling_mingru.MinGRUModel",
    "AutoModelForCausalLM": "modeling_mingru.MinGRUForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mingru.MinGRUForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mingru.MinGRUForTokenClassification",
}


@strict
class MinGRUConfig(ConfigurationMixin, PreTrainedConfig):
    """Sizes and switches of the MinGRU text model.

    A block computes `x + conv(x)`, then `x + out_proj(mingru(norm(x)))`, then `x + mlp(norm(x))`. This is the block
    of the language model of Feng et al. 2024 (arXiv:2410.01201), whose sizes and dropout are in
    scripts/configs/shakespeare_char_paper.json. The default sizes are those of GPT-2 small with half as many blocks.
    With the convolution and the MLP switched off, `expand=1` and `hidden_sizes` given, the model is torch-mingru's
    stack.

    Args:
        vocab_size: number of token ids; at least 1.
        hidden_size: width of the embedding, and of every block unless `hidden_sizes` is given.
        num_hidden_layers: number of blocks. None: the length of `hidden_sizes` if that is given, else 6.
        hidden_sizes: width of each block's output, if the widths differ. None: all blocks have `hidden_size`.
        expand: ratio of the recurrent state's width to the width of the block's output; must be above 0. The state's
            width is rounded down.
        use_out_proj: whether to map the state back to the block's width. None: only if `expand` is not 1, where the
            projection is required.
        conv_kernel: kernel size of the causal depthwise convolution before the recurrence, in tokens, including the
            current one; 0 switches the convolution off.
        use_mlp: whether each block ends with an MLP.
        intermediate_size: width of the MLP's hidden layer. None: 4 times the block's width.
        hidden_act: activation of the MLP, a name known to transformers' ACT2FN.
        use_bias: whether the recurrent projection, the convolution, the output projection and the MLP have biases.
        norm_type: "layer_norm", "rms_norm" or "none". Applied to the input of the recurrence and of the MLP, and to
            the last block's output if `use_final_norm` is set.
        norm_bias: whether the norms inside the blocks have a bias ("layer_norm" only).
        norm_eps: added to the variance in all norms.
        use_final_norm: normalise the last block's output.
        final_norm_bias: whether the final norm has a bias ("layer_norm" only).
        lm_head_bias: whether the language-model head has a bias.
        residual: add each recurrence's input to its output, through a linear map without bias where widths differ.
        embedding_dropout: probability of zeroing an element of the embeddings, in training.
        residual_dropout: the same for the outputs of the recurrent branch and of the MLP, before the residual sums.
        block_dropout: the same for the output of every block except the last, after the residual sums (torch-mingru's
            dropout).
        classifier_dropout: the same for the input of the classification heads.
        initializer_range: standard deviation of newly initialised weights. None: 1 / sqrt(fan_in) for the linear maps
            of the blocks, which makes them learn faster, and 0.02, transformers' default, for embeddings and heads.
            In either case the weights of the convolution are uniform within 1 / sqrt(conv_kernel), PyTorch's default;
            in a residual model of more than 6 blocks that bound is divided by sqrt(i) in block i, counted from 1.
        initial_memory: number of steps that the state remembers when training begins. 1: the gates start half open, as
            in torch-mingru, and the state forgets within a few steps. Above 1: each channel draws its own memory m
            log-uniformly between 1 and this number, and its gate bias is set to -log(m), so that z is near 1 / (1 + m)
            (as in the chrono initialization of Tallec and Ollivier 2018, arXiv:1804.11188, who draw m uniformly). This
            helps with long dependencies, as in selective copying. The option applies to this package's models; for a
            layer or block inside another model use `spread_memory_`.
        use_cache: whether a forward pass in evaluation mode returns its state for the next call.
        tie_word_embeddings: use the embedding matrix as the weight of the language-model head; the last block must be
            `hidden_size` wide.
        pad_token_id, bos_token_id, eos_token_id: as everywhere in transformers.
        scan_backend: implementation of the recurrence, one of the backends of `mingru_scan`; "auto" takes the fastest.
            It applies to the current run only and is not written to config.json.
        skip_logits: when training with labels, return the loss without logits and compute it in pieces that need
            little memory; useful for `Trainer` with a large vocabulary. Like `scan_backend`, it applies to the current
            run only.

    Raises:
        huggingface_hub.errors.StrictDataclassFieldValidationError: if a value has the wrong type or is not one of the
            choices.
        huggingface_hub.errors.StrictDataclassClassValidationError: if a size or switch is out of range, or they
            contradict each other.

    Example:
        >>> config = MinGRUConfig(vocab_size=96, hidden_size=256, num_hidden_layers=4)
    """

    model_type = "mingru"
    run_choices = ("scan_backend", "skip_logits")
    keys_to_ignore_at_inference = ["cache"]

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int | None = None
    hidden_sizes: list[int] | tuple[int, ...] | None = None
    expand: float | int = 2
    use_out_proj: bool | None = None
    conv_kernel: int = 4
    use_mlp: bool = True
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    use_bias: bool = True
    norm_type: Literal["layer_norm", "rms_norm", "none"] = "layer_norm"
    norm_bias: bool = True
    norm_eps: float = 1e-5
    use_final_norm: bool = True
    final_norm_bias: bool = True
    lm_head_bias: bool = False
    residual: bool = True
    embedding_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    block_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    initializer_range: float | int | None = None
    initial_memory: float | int = 1
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    scan_backend: Literal["auto", "reference", "log", "torch", "numba", "triton"] = "auto"
    skip_logits: bool = False

    def __post_init__(self, **kwargs):
        if self.num_hidden_layers is None:
            self.num_hidden_layers = 6 if self.hidden_sizes is None else len(self.hidden_sizes)
        if self.use_out_proj is None:
            self.use_out_proj = self.expand != 1
        kwargs["auto_map"] = self._code_to_load(AUTO_MAP, kwargs.get("auto_map") or {})
        if self.base_model_tp_plan is None:  # a subclass may define one
            self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Type of each block's cache layer, for `DynamicCache(config=...)`."""
        return ["mingru"] * self.num_hidden_layers

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Return the plan by which tensor parallelism splits the model's matrices over processes.

        Every process runs the scan over all channels: the gate and the candidate of a channel lie in different halves
        of `gate_hidden`, and the style for such halves in transformers 5.24 ("packed_colwise") splits biases wrongly.
        """
        plan = {"layers.*.mixer.gate_hidden": "colwise_gather_output"}
        if self.use_out_proj:
            plan["layers.*.mixer.out_proj"] = "colwise_gather_output"
        if self.use_mlp:
            plan |= {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
        return plan

    @property
    def block_sizes(self) -> list[int]:
        """Width of each block's output."""
        return self.hidden_sizes if self.hidden_sizes is not None else [self.hidden_size] * self.num_hidden_layers

    @property
    def output_size(self) -> int:
        """Width of the last block's output, which the heads read."""
        return self.block_sizes[-1]

    def validate_layer_type(self):
        """Skip transformers' check: this package's layer type is not in the list that it checks against."""

    def validate_architecture(self):
        """Check that the sizes and switches are valid and consistent (called by the `strict` decorator)."""
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "expand": self.expand,
        }
        if self.intermediate_size is not None:
            sizes["intermediate_size"] = self.intermediate_size
        if self.hidden_sizes is not None:
            if not self.hidden_sizes:
                raise ValueError("hidden_sizes is empty: give the width of each block, or None.")
            if len(self.hidden_sizes) != self.num_hidden_layers:
                raise ValueError(
                    f"hidden_sizes has {len(self.hidden_sizes)} entries, but num_hidden_layers is "
                    f"{self.num_hidden_layers}: leave one of them out."
                )
            sizes.update({f"hidden_sizes[{i}]": size for i, size in enumerate(self.hidden_sizes)})
        for name, size in sizes.items():
            if not 0 < size < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, got {size}.")
        for name in ("norm_eps", "initializer_range"):
            if not 0 <= (getattr(self, name) or 0.0) < float("inf"):
                raise ValueError(f"{name} must be 0 or above and finite, got {getattr(self, name)}.")
        if min(int(self.expand * size) for size in self.block_sizes) < 1:
            raise ValueError(f"expand={self.expand} gives a recurrent state without channels: increase it.")
        if self.conv_kernel < 0 or self.conv_kernel == 1:
            raise ValueError(f"conv_kernel must be 0 (no convolution) or at least 2 tokens, got {self.conv_kernel}.")
        if self.expand != 1 and not self.use_out_proj:
            raise ValueError(
                f"use_out_proj=False needs expand=1: a state {self.expand} times as wide has to be mapped back."
            )
        if not 1 <= self.initial_memory < float("inf"):
            raise ValueError(f"initial_memory must be at least 1 step and finite, got {self.initial_memory}.")
        if self.initial_memory > 1 and not self.use_bias:
            raise ValueError(
                f"initial_memory={self.initial_memory} is set through the gates' biases: it needs use_bias=True."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown to transformers; known: {', '.join(ACT2FN)}.")
        for name in ("embedding_dropout", "residual_dropout", "block_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability between 0 and 1, got {getattr(self, name)}.")
        if self.tie_word_embeddings and self.output_size != self.hidden_size:
            raise ValueError(
                f"tie_word_embeddings=True needs a last block as wide as the embedding, got {self.output_size} and "
                f"{self.hidden_size}; set it to False."
            )


MinGRUConfig.register_for_auto_class()

__all__ = ["MinGRUConfig"]
