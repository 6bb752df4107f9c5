"""Shared behaviour of this package's configurations."""

from typing import ClassVar


class ConfigurationMixin:
    """Mixin for a PreTrainedConfig that controls how it is read and written.

    Attributes:
        run_choices: names of the fields that apply to the current run only and are not written to config.json.
    """

    run_choices: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._auto_class = None  # a subclass's file may not be self-contained: saved only if the class is registered

    @classmethod
    def _code_to_load(cls, own: dict[str, str], given: dict[str, str]) -> dict[str, str]:
        """Return the auto_map to save: the package's `own` entries, overridden by `given` ones.

        Given entries may refer to the code of another repository. A subclass that is not registered for the Auto
        classes is saved without code, so the package's own entries are dropped.
        """
        if cls._auto_class is not None:
            return own | given
        return {name: code for name, code in given.items() if code != own.get(name)}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in PreTrainedConfig, but refuse configurations of other models, and validate overridden values too.

        Raises:
            ValueError: if model_type is neither that of this class nor that of a base class.
            huggingface_hub.errors.StrictDataclassError: if a value has the wrong type or is out of range, or values
                contradict each other.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in {getattr(base, "model_type", "") for base in cls.__mro__}:  # a base class's is accepted
            raise ValueError(
                f"This is the configuration of a {model_type!r} model, not of a {cls.model_type!r} one: load it with "
                "AutoConfig, and its model with an Auto class."
            )
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with return_unused_kwargs
        config.validate()
        return loaded

    def to_dict(self):
        """As in PreTrainedConfig, without the fields that apply to one run only."""
        output = super().to_dict()
        for name in self.run_choices:
            output.pop(name, None)
        return output


__all__ = ["ConfigurationMixin"]
