"""What the lab compares memory with: other ways to spend parameters on look-ups, as settings of the same model.

Each module names its source. Rivals are for measuring: their tables are trained in the model, and are neither placed
nor served elsewhere.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from engrammar_lab.rivals.base import Backbone, Rival, RivalConfig
from engrammar_lab.rivals.bigram import BigramConfig
from engrammar_lab.rivals.over_encoding import OverEncodingConfig
from engrammar_lab.rivals.per_layer import PerLayerConfig
from engrammar_lab.rivals.product_keys import ProductKeysConfig

__all__ = ["RIVALS", "Backbone", "Rival", "RivalConfig", "rival_from_json"]

RIVALS: dict[str, type[RivalConfig]] = {
    config.kind: config for config in (OverEncodingConfig, PerLayerConfig, BigramConfig, ProductKeysConfig)
}


def rival_from_json(data: Mapping[str, Any]) -> RivalConfig:
    """Builds a config from `RivalConfig.to_json`'s dict; sizes that are left out get their defaults.

    Raises:
        ValueError: no such kind, an unknown setting, or a size that is not allowed.
    """
    kind = data.get("kind")
    if kind not in RIVALS:
        raise ValueError(f"rival.kind is {kind!r}; allowed: {', '.join(RIVALS)}.")
    known = [field.name for field in fields(RIVALS[kind])]
    unknown = sorted(set(data) - {"kind", *known})
    if unknown:
        raise ValueError(f"rival has unknown settings {', '.join(unknown)}; {kind} knows {', '.join(known)}.")
    return RIVALS[kind](**{name: value for name, value in data.items() if name != "kind"})
