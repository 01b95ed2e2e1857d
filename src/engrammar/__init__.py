"""Conditional memory for language models: train it, attach it, place it, edit it, measure it.

`import engrammar` registers the model with transformers' Auto classes.
"""

from engrammar.config import Geometry, MemoryConfig
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM, EngrammarModel
from engrammar.model.presets import preset

__all__ = ["EngrammarConfig", "EngrammarForCausalLM", "EngrammarModel", "Geometry", "MemoryConfig", "preset"]
__version__ = "0.1.0"
