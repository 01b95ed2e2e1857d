"""Conditional memory for language models (Engram, arXiv 2601.07372): build it, attach it, train it,
place it, serve it.

`import engrammar` registers the model with transformers' Auto classes. `__all__` is what most programs need; each
package says in its docstring what else is public.
"""

from typing import TYPE_CHECKING, Any

from engrammar import edit, train
from engrammar.attach import attach, detach, disabled, load_attached, save_attached, set_trainable
from engrammar.config import Geometry, MemoryConfig
from engrammar.model import EngrammarConfig, EngrammarForCausalLM, EngrammarModel, count_parameters, preset
from engrammar.stores import CachedStore, DiskStore, RamStore, RowStore
from engrammar.stores.serving import ServingSettings, look_ahead, serve_tables
from engrammar.tables import open_tables
from engrammar.train import OptimizerSettings, build_optimizer, place_tables
from engrammar.vocabulary import cached_classes, compress_vocabulary

if TYPE_CHECKING:
    from engrammar.train import EngrammarTrainer

__all__ = [
    "CachedStore",
    "DiskStore",
    "EngrammarConfig",
    "EngrammarForCausalLM",
    "EngrammarModel",
    "EngrammarTrainer",
    "Geometry",
    "MemoryConfig",
    "OptimizerSettings",
    "RamStore",
    "RowStore",
    "ServingSettings",
    "attach",
    "build_optimizer",
    "cached_classes",
    "compress_vocabulary",
    "count_parameters",
    "detach",
    "disabled",
    "edit",
    "load_attached",
    "look_ahead",
    "open_tables",
    "place_tables",
    "preset",
    "save_attached",
    "serve_tables",
    "set_trainable",
]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "EngrammarTrainer":  # as in `engrammar.train`: transformers' Trainer is slow to import
        return train.EngrammarTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
