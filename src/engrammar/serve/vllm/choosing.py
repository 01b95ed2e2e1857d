"""Requests that name patches: vLLM asks each processor of logits whether a request is right, and this one says no.

vLLM takes fields that it does not know itself in `vllm_xargs`, and leaves them out in silence otherwise.
"""

from typing import final

from torch import Tensor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


@final
class RefuseChoices(LogitsProcessor):
    """Refuses requests that name patches; it changes no logits."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises an error that vLLM answers with status 400."""
        if (sampling_params.extra_args or {}).get("patches"):
            raise VLLMValidationError(
                "In vLLM patches are for all requests, from the start on: leave out `patches`, or use `engrammar "
                "serve`, where each request names its own."
            )

    def __init__(self, *given: object) -> None: ...

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None: ...
