"""Conditional memory for language models: train it, attach it, place it, edit it, measure it.

`import engrammar` registers the model with transformers' Auto classes.
"""

from engrammar.config import Geometry, MemoryConfig
from engrammar.configuration import EngrammarConfig
from engrammar.modeling import EngrammarForCausalLM, EngrammarModel
from engrammar.presets import preset

__all__ = ["EngrammarConfig", "EngrammarForCausalLM", "EngrammarModel", "Geometry", "MemoryConfig", "preset"]
__version__ = "0.1.0"
