"""Training: text to tokens, optimizers, placement of the tables, transformers' Trainer, and recipes.

Public: what `__all__` names. transformers' Trainer is slow to import, so `EngrammarTrainer` is imported on first use.
"""

from typing import TYPE_CHECKING, Any

from engrammar.train.data import TokenSet, prepare
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.placement import place_tables
from engrammar.train.recipe import DataRecipe, Recipe, load_recipe

if TYPE_CHECKING:
    from engrammar.train.trainer import EngrammarTrainer

__all__ = [
    "DataRecipe",
    "EngrammarTrainer",
    "OptimizerSettings",
    "Recipe",
    "TokenSet",
    "build_optimizer",
    "load_recipe",
    "place_tables",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name == "EngrammarTrainer":
        from engrammar.train.trainer import EngrammarTrainer

        return EngrammarTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
