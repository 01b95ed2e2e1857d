"""Memory attached to any causal language model of transformers, as an adapter.

Public: attach, detach, disabled, set_trainable.
"""

from engrammar.attach.attaching import attach, detach, disabled, set_trainable

__all__ = ["attach", "detach", "disabled", "set_trainable"]
