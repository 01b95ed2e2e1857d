"""Requests that name patches, in `vllm_xargs` or `SamplingParams.extra_args`: `{"patches": ["facts"]}`.

vLLM tells each processor of logits which requests are in which row of its batch, before each pass, and asks it whether
a new request is right, in the process that takes requests. There the patches are read once more.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import ForwardContext
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from engrammar.model.saving import local_folder
from engrammar.serve.folder import patches_of
from engrammar.serve.openai.asked import read_names
from engrammar.serve.vllm.patches import Offer, read_offer
from engrammar.serve.vllm.settings import patch_files

CHOICES = "engrammar.choices"  # among what vLLM's forward context finds by name
Names = tuple[str, ...]


def names_of(sampling_params: SamplingParams) -> Names:
    """The patches that a request names.

    Raises:
        ValueError: they are no names.
    """
    return read_names((sampling_params.extra_args or {}).get("patches") or [])


@final
class Choices(LogitsProcessor):
    """Knows the patches that each request of the batch has named; it changes no logits."""

    # The patches of the engine that this process has made last; other engines refuse what they do not know.
    offer: ClassVar[Offer] = Offer([], [])

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises an error that vLLM answers with status 400."""
        try:
            if names := names_of(sampling_params):
                cls.offer.stack(names)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.names: dict[int, Names] = {}
        vllm_config.compilation_config.static_forward_context[CHOICES] = self

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.names, batch_update, lambda params, *_: names_of(params) or None)


def names_in(context: ForwardContext) -> Mapping[int, Names]:
    """The patches that requests have named, by their row in the batch."""
    choices: Any = context.no_compile_layers.get(CHOICES)
    return {} if choices is None else choices.names


@final
class ReadOffer(VerifyAndUpdateConfig):
    """Reads the patches of an engine where its requests are taken; vLLM calls it with the engine's config."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        config = vllm_config.model_config
        for_all, on_request = patch_files(vllm_config)
        Choices.offer = read_offer(
            [*patches_of(local_folder(config.model, {}), config.hf_config), *for_all], on_request
        )
