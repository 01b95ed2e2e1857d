"""The model classes that vLLM serves attached memories with: its Transformers backend runs the base.

The base is any that this backend runs. Its weights are vLLM's; the memory is none of its modules.
"""

from collections.abc import Callable
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
from engrammar.attach.blocks import find_decoder
from engrammar.attach.folder import load_memory, read_adapter
from engrammar.model.saving import local_folder
from engrammar.serve.folder import adapter_of
from engrammar.serve.vllm.adding import Adder
from engrammar.serve.vllm.backbone import state_name
from engrammar.serve.vllm.patches import replace_patched_rows
from engrammar.serve.vllm.self_test import SelfTest
from engrammar.serve.vllm.settings import check_engine, memory_settings
from engrammar.serve.vllm.state import StateLayer
from engrammar.stores.base import RowStore
from engrammar.tables.folder import TableFile


class Attached(Base):
    """A base in vLLM with the memory of an adapter (abstract)."""

    _pre_trained_model_classes: Any  # cached properties of vLLM's
    _from_config_kwargs: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_engine(vllm_config)
        config = vllm_config.model_config.hf_config
        folder = local_folder(vllm_config.model_config.model, {})
        adapter = adapter_of(folder, config)
        settings, saved = memory_settings(vllm_config, adapter), read_adapter(adapter)
        with set_default_torch_dtype(torch.float32):  # the memory has its own precision, as in transformers
            attached = load_memory(adapter, saved.place, settings.serving, verify=False)
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            _check_windows(vllm_config)
        except Exception as error:  # vLLM raises many kinds
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"vLLM's Transformers backend does not run a base of type {config.model_type!r} ({reason}): serve it "
                "with `engrammar serve --adapter`."
            ) from error
        replace_patched_rows(attached.memory, settings.patches)
        memory, place = attached.config, attached.place
        channels = place.num_branches * place.hidden_size if memory.conv_kernel else 0
        layers = memory.layers if memory.conv_kernel else memory.layers[:1]  # ids are kept once
        states = {layer: StateLayer(vllm_config, state_name(layer), channels) for layer in layers}
        self.folder, self.adapter, self.source = folder, adapter, attached.memory.source
        self.adder = Adder(attached.eval(), states)
        self.adder.hook(find_decoder(self.model))
        if settings.self_test:
            next(iter(states.values())).on_bound = SelfTest(self)

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
        self.adder.start(input_ids, positions)
        return super().forward(input_ids, positions, *args, **kwargs)

    def plain_model(self, open_store: Callable[[TableFile], RowStore]) -> Any:
        """The same base and memory in transformers, with rows from these stores."""
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.model_config.dtype, trust_remote_code=self.model_config.trust_remote_code
        )
        return load_attached(model, self.adapter, memory=open_store)


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
