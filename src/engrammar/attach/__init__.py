"""Memory attached to any causal language model of transformers, as an adapter. Public: what `__all__` names."""

from engrammar.attach.attaching import attach, detach, disabled, set_trainable
from engrammar.attach.filling import Filled, fill_rows
from engrammar.attach.prefix import KeptPrefix, keep_prefix
from engrammar.attach.saving import load_attached, save_attached

__all__ = [
    "Filled",
    "KeptPrefix",
    "attach",
    "detach",
    "disabled",
    "fill_rows",
    "keep_prefix",
    "load_attached",
    "save_attached",
    "set_trainable",
]
