"""Rotary scaling of classes that scale by themselves where a `config.json` says nothing of it.

`null` is no scaling to transformers 4 and the class's own to version 5, so that both are told in
words alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanotron_fast.errors import ConfigError
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.rope import read_rope
from nanotron_fast.model.spec import ModelSpec

_KEYS = ("rope_parameters", "rope_scaling")


@dataclass(frozen=True, slots=True)
class OwnScaling(Quirk):
    """A class's own scaling: how it is read, and a Quirk that writes that there is none.

    Args:
        words: what it is, for an error.
        unsaid: what every version of transformers makes of a config that says nothing; None: the
            versions make different things of it, and it is refused.
    """

    words: str
    unsaid: Mapping[str, Any] | None = None

    def rope(self, fields: Fields) -> tuple[float, Mapping[str, Any] | None]:
        """See `read_rope`. Raises ConfigError where nothing says which scaling there is."""
        said = [key for key in _KEYS if key in fields.config]
        if not said and self.unsaid is not None:
            scaled = {**fields.config, "rope_scaling": self.unsaid}
            return read_rope(Fields(fields.file, scaled, fields.defaults))
        if any(fields.config[key] is not None for key in said):
            return read_rope(fields)
        if not said:
            raise ConfigError(
                f"{fields.file}: neither {' nor '.join(_KEYS)}: transformers takes {self.words} "
                "then; say rope_scaling, with rope_type default where there is none"
            )
        raise ConfigError(
            f"{fields.file}: {' and '.join(said)} is null, which transformers 4 takes for no "
            f"scaling and version 5 for {self.words}: say rope_scaling, with rope_type default "
            "where there is none"
        )

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Says that there is no scaling, which null does not in every version."""
        if spec.rope_scaling is None:
            config["rope_scaling"] = {"rope_type": "default"}
