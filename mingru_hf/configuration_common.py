"""What the configurations of this package share."""

from typing import ClassVar


class ConfigurationMixin:
    """For a PreTrainedConfig: how it is read and written.

    Attributes:
        run_choices: fields that hold for one run only, and are not written to config.json.
    """

    run_choices: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._auto_class = None  # a subclass's file need not stand alone: it travels if it registers itself

    @classmethod
    def _code_to_load(cls, own: dict[str, str], given: dict[str, str]) -> dict[str, str]:
        """The auto_map to save: the package's `own`, overridden by what was `given`, as by another repository's code.

        A subclass that is not registered for the Auto classes is saved without code, so that our entries are dropped.
        """
        if cls._auto_class is not None:
            return own | given
        return {name: code for name, code in given.items() if code != own.get(name)}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in PreTrainedConfig; another kind of model's is refused, and what is overridden is checked too.

        Raises:
            ValueError: if its model_type is neither that of this class nor of a base.
            huggingface_hub.errors.StrictDataclassError: if a value has the wrong type, or the sizes cannot belong to
                one model.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in {getattr(base, "model_type", "") for base in cls.__mro__}:  # a subclass takes its base's
            raise ValueError(
                f"This is the configuration of a {model_type!r} model, not of a {cls.model_type!r} one: load it with "
                "AutoConfig, and its model with an Auto class."
            )
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # with return_unused_kwargs
        config.validate()
        return loaded

    def to_dict(self):
        """As in PreTrainedConfig, less the choices that hold for one run only."""
        output = super().to_dict()
        for name in self.run_choices:
            output.pop(name, None)
        return output


__all__ = ["ConfigurationMixin"]
