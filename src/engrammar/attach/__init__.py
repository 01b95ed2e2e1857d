"""Memory attached to any causal language model of transformers, as an adapter.

Public: attach, detach, disabled, set_trainable; save_attached, load_attached; keep_prefix, KeptPrefix; fill_rows,
Filled.
"""

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
