"""What older versions of transformers lack: vLLM asks for one, so the core works from 5.19 on.

Letters: B batch, T tokens, D hidden width.
"""

from typing import Any

import transformers
from torch import Tensor
from transformers import cache_utils, modeling_utils

NEWEST = (5, 23)  # what everything is tested with


class _DummyLayer:
    """A cache layer without keys and values, as transformers' own `DummyLayer`."""

    supports_early_init = False
    is_compileable = True
    is_croppable = True
    is_initialized = True
    keys = None
    values = None

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def get_max_length(self) -> int:
        return -1


def _slice_logits_to_keep(hidden_BTD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions of which logits are wanted: the last `logits_to_keep` (0: all), or those that a tensor names.

    Raises:
        ValueError: the tensor names other positions for each row, which transformers 5.19 does not know.
    """
    if isinstance(logits_to_keep, int):
        return hidden_BTD[:, slice(-logits_to_keep, None)]
    if logits_to_keep.ndim != 1:
        raise ValueError(
            f"logits_to_keep has {logits_to_keep.ndim} dimensions; transformers {transformers.__version__} takes one: "
            "give the positions of all rows, or install transformers 5.23."
        )
    return hidden_BTD[:, logits_to_keep]


DummyLayer: Any = getattr(cache_utils, "DummyLayer", _DummyLayer)
slice_logits_to_keep: Any = getattr(modeling_utils, "slice_logits_to_keep", _slice_logits_to_keep)


def check_can_train(installed: str = transformers.__version__) -> None:
    """Raises a ValueError if our Trainer was not tested with it: it overrides private methods of transformers' own."""
    _require_newest("Training", "train", installed)


def check_can_serve(installed: str = transformers.__version__) -> None:
    """Raises a ValueError if our server was not tested with it: continuous batching changes from version to version."""
    _require_newest("Serving", "serve", installed)


def _require_newest(what: str, do: str, installed: str) -> None:
    if tuple(map(int, installed.split(".")[:2])) < NEWEST:
        raise ValueError(
            f"{what} was tested with transformers {'.'.join(map(str, NEWEST))}, and {installed} is installed: {do} in "
            "an environment with the newer one."
        )
