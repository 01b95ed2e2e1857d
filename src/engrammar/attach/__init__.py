"""Memory attached to any causal language model of transformers, as an adapter.

Public: attach, detach, disabled, set_trainable; keep_prefix, KeptPrefix.
"""

from engrammar.attach.attaching import attach, detach, disabled, set_trainable
from engrammar.attach.prefix import KeptPrefix, keep_prefix

__all__ = ["KeptPrefix", "attach", "detach", "disabled", "keep_prefix", "set_trainable"]
