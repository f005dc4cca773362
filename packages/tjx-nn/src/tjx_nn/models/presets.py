"""Presets: named configurations of a model family."""

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar


class Presets:
    """Base class of configurations with presets.

    Attributes
    ----------
    PRESETS
        Fields of each preset by its name; the others have their defaults.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset[C: "Presets"](cls: type[C], name: str, **overrides: Any) -> C:
        """Make the configuration of a preset, with fields replaced by `overrides`.

        Parameters
        ----------
        name
            One of `PRESETS`.
        **overrides
            Fields of the configuration.

        Returns
        -------
        configuration
            Of this class.

        Raises
        ------
        ValueError
            If the preset is unknown; the message suggests the nearest name.

        Examples
        --------
        >>> from tjx_nn import GPTConfig
        >>> GPTConfig.preset("gpt2_small", n_layer=6).d_model
        768
        """
        if name not in cls.PRESETS:
            near = difflib.get_close_matches(name, cls.PRESETS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"preset: got {name!r}; expected one of {list(cls.PRESETS)}{hint}")
        return cls(**{**cls.PRESETS[name], **overrides})
