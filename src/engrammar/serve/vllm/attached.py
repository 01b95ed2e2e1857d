"""The model classes that vLLM serves attached memories and patched bases with: its Transformers backend runs the base.

The base is any that this backend runs. Its weights are vLLM's; the memory is none of its modules.
"""

from copy import copy
from typing import Any, final

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.base import Base
from vllm.utils.torch_utils import set_default_torch_dtype

from engrammar.attach import load_attached
from engrammar.attach.attached import AttachedMemory
from engrammar.attach.blocks import find_decoder
from engrammar.attach.folder import load_memory, read_adapter
from engrammar.model.saving import local_folder
from engrammar.serve.folder import adapter_of, patches_of
from engrammar.serve.vllm.adding import Adder
from engrammar.serve.vllm.backbone import state_name
from engrammar.serve.vllm.patches import read_offer, replace_patched_rows
from engrammar.serve.vllm.patching import Patcher, patched, patcher_of
from engrammar.serve.vllm.self_test import SelfTest
from engrammar.serve.vllm.settings import check_engine, memory_settings
from engrammar.serve.vllm.state import StateLayer


class Attached(Base):
    """A base in vLLM with the memory of an adapter, patches, or both (abstract)."""

    adder: Adder | None
    patcher: Patcher | None
    _pre_trained_model_classes: Any  # cached properties of vLLM's
    _from_config_kwargs: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_engine(vllm_config)
        config = vllm_config.model_config.hf_config
        folder = local_folder(vllm_config.model_config.model, {})
        adapter = adapter_of(folder, config)
        settings = memory_settings(vllm_config, adapter)
        files = [*patches_of(folder, config), *settings.patches]
        offer = read_offer(files, settings.offered, self_test=settings.self_test)
        with set_default_torch_dtype(torch.float32):  # the memory has its own precision, as in transformers
            attached = None
            if adapter is not None:
                attached = load_memory(adapter, read_adapter(adapter).place, settings.serving, verify=False).eval()
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            _check_windows(vllm_config)
        except Exception as error:  # vLLM raises many kinds
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"vLLM's Transformers backend does not run a base of type {config.model_type!r} ({reason}): serve it "
                "with `engrammar serve`."
            ) from error
        replace_patched_rows(None if attached is None else attached.memory, offer.for_all)
        self.folder, self.adder = folder, None
        self.adapter: Any = adapter
        self.source: Any = None if attached is None else attached.memory.source  # no module: its weights are not vLLM's
        states = [] if attached is None else self._add(attached, vllm_config)
        self.patcher = patcher_of(self, vllm_config, offer)  # its hooks go before the memory's
        states += [] if self.patcher is None else [self.patcher.state]
        if states and settings.self_test:
            states[0].on_bound = SelfTest(self)

    def _add(self, attached: AttachedMemory, vllm_config: VllmConfig) -> list[StateLayer]:
        """Adds the memory at its blocks; returns what it keeps."""
        memory, place = attached.config, attached.place
        channels = place.num_branches * place.hidden_size if memory.conv_kernel else 0
        layers = memory.layers if memory.conv_kernel else memory.layers[:1]  # ids are kept once
        states = {layer: StateLayer(vllm_config, state_name(layer), channels) for layer in layers}
        self.adder = Adder(attached, states)
        self.adder.hook(find_decoder(self.model))
        return [*states.values()]

    def _decorate_for_torch_compile(self) -> None:
        """Compiles a subclass: vLLM changes a class in place, and the plain model of the self-test is of the base's.

        A base inside a model of several kinds of input is not compiled.
        """
        if self.config is not self.text_config:
            return
        classes, given = self._pre_trained_model_classes, self._from_config_kwargs
        theirs, config = classes.decoder, copy(given["config"])
        config_class = type(type(config).__name__, (type(config),), {})
        own = type(theirs.__name__, (theirs,), {"config_class": config_class})
        config.__class__ = config_class  # by which transformers finds the class of a model
        AutoModel.register(config_class, own, exist_ok=True)
        self._pre_trained_model_classes = classes._replace(decoder=own)
        self._from_config_kwargs = {**given, "config": config}
        super()._decorate_for_torch_compile()

    def forward(self, input_ids: Tensor, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        for part in (self.adder, self.patcher):
            if part is not None:
                part.start(input_ids, positions)
        return super().forward(input_ids, positions, *args, **kwargs)

    def plain_model(self) -> Any:
        """The same base and memory in transformers, with rows from the same stores, and patched."""
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.model_config.dtype, trust_remote_code=self.model_config.trust_remote_code
        )
        if self.adapter is not None:
            load_attached(model, self.adapter, memory=lambda table: self.source.stores[table.name])
        return patched(model, self.patcher)


def _check_windows(vllm_config: VllmConfig) -> None:
    """Raises a ValueError if a layer of the base attends to a window: vLLM then keeps the state of none before it."""
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if getattr(layer, "sliding_window", None) is not None:
            raise ValueError(f"{name} attends to a window of {layer.sliding_window} tokens, which was not tested")


@final
class AttachedForCausalLM(Attached, TransformersForCausalLM):
    """A base without experts."""


@final
class AttachedMoEForCausalLM(Attached, TransformersMoEForCausalLM):
    """A base with experts."""
