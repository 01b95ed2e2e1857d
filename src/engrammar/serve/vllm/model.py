"""The model class that vLLM serves our checkpoints with: its Transformers backend, with rows from our stores."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, final

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersMoEForCausalLM

from engrammar.edit import kept_files
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.model.saving import local_folder
from engrammar.serve.vllm.backbone import state_name
from engrammar.serve.vllm.heads import pad_heads, wide_heads, width_of
from engrammar.serve.vllm.patches import read_offer, replace_patched_rows
from engrammar.serve.vllm.patching import patched, patcher_of
from engrammar.serve.vllm.reading import Retriever
from engrammar.serve.vllm.self_test import SelfTest
from engrammar.serve.vllm.settings import check_engine, memory_settings
from engrammar.serve.vllm.state import StateLayer
from engrammar.stores.serving import serve_tables
from engrammar.tables.shards import is_table


@final
class ServedForCausalLM(TransformersMoEForCausalLM):
    """`EngrammarForCausalLM` in vLLM. Its tables are never weights: vLLM neither allocates nor loads them."""

    is_unused_checkpoint_weight = staticmethod(is_table)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        memory = self.config.memory_config
        self.folder = local_folder(self.model_config.model, {"revision": self.model_config.revision})
        self.settings = memory_settings(vllm_config, None if memory is None else self.folder)
        for_all = (*kept_files(self.folder), *self.settings.patches)
        offer = read_offer(for_all, self.settings.offered, self_test=self.settings.self_test)
        self.patches = offer.for_all
        self.patcher = patcher_of(self, vllm_config, offer)
        states = [] if self.patcher is None else [self.patcher.state]
        if memory is not None:
            self.ignore_unexpected_prefixes.append("model.memory.tables.")
            channels = self.config.num_branches * self.config.hidden_size if memory.conv_kernel else 0
            layers = memory.layers if memory.conv_kernel else memory.layers[:1]  # ids are kept once
            states[:0] = [StateLayer(vllm_config, state_name(layer), channels) for layer in layers]
            states[0].retriever = Retriever(self.model.memory, states[0])
        if states and self.settings.self_test:
            states[0].on_bound = SelfTest(self)

    def forward(self, input_ids: Tensor, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.patcher is not None:
            self.patcher.start(input_ids, positions)
        return super().forward(input_ids, positions, *args, **kwargs)

    def _create_attention_instances(self, prefix: str = "") -> None:
        with wide_heads(self.config):
            super()._create_attention_instances(prefix)
        pad_heads(self.model, width_of(self.config))

    @cached_property
    def _from_config_kwargs(self) -> dict[str, Any]:
        return {**super()._from_config_kwargs, "tables": "external"}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)
        memory = self.model.memory
        if memory is not None:
            self.source = serve_tables(self.model, self.folder, self.settings.serving)
        replace_patched_rows(memory, self.patches)
        return loaded

    def plain_model(self) -> Any:
        """The same checkpoint in transformers, with rows from the same stores, and patched."""
        given: dict[str, Any] = {"dtype": self.model_config.dtype}
        if self.model.memory is not None:
            stores = self.source.stores
            given["memory"] = lambda table: stores[table.name]
        model = EngrammarForCausalLM.from_pretrained(self.folder, **given)
        return patched(model, self.patcher)
