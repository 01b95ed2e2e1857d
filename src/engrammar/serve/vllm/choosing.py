"""Requests that name patches, in `vllm_xargs` or `SamplingParams.extra_args`: `{"patches": ["facts"]}`.

vLLM tells each processor of logits which requests are in which row of its batch, before each pass, and asks it whether
a new request is right, in the process that takes requests. There the patches are read once more. The scheduler salts
what vLLM finds prefixes by with the names, so that no request goes on from a prefix of other patches.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import ForwardContext
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from engrammar.model.saving import local_folder
from engrammar.serve.folder import patches_of
from engrammar.serve.openai.asked import read_names
from engrammar.serve.vllm.patches import Offer, read_offer
from engrammar.serve.vllm.settings import SALTED, patch_files

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


class SaltedScheduler(Scheduler):
    """Shares prefixes among requests that have named the same patches, and among no others."""

    def add_request(self, request: Request) -> None:
        names = () if request.sampling_params is None else names_of(request.sampling_params)
        request.cache_salt = json.dumps([request.cache_salt, sorted(set(names))])
        request.block_hashes.clear()  # they were made without the names
        request.update_block_hashes()
        super().add_request(request)


@final
class SaltedAsyncScheduler(SaltedScheduler, AsyncScheduler):
    """The same, where vLLM schedules a pass before it knows the tokens of the last one."""


def salted_scheduler(*, vllm_config: VllmConfig, **given: Any) -> SaltedScheduler:
    """What vLLM takes for the class of its scheduler; only here it is known whether that one is asynchronous."""
    kind = SaltedAsyncScheduler if vllm_config.scheduler_config.async_scheduling else SaltedScheduler
    return kind(vllm_config=vllm_config, **given)


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
        scheduler = vllm_config.scheduler_config
        if on_request and scheduler.scheduler_cls is None:
            scheduler.scheduler_cls = SALTED
