"""Our backbone as vLLM's Transformers backend runs it: flat tokens of many requests, and no cache of transformers.

Letters: B one row, T flat tokens, C channels of the convolution.
"""

from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from engrammar.memory import Retrieved
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarModel, Masks
from engrammar.table import Tables


@final
class ServedConfig(EngrammarConfig):
    """The settings of a checkpoint, read for vLLM."""

    model_type = "engrammar"
    base_model_tp_plan: ClassVar[dict[str, str]] = {  # vLLM gives each process its share of the heads, too
        **EngrammarConfig.base_model_tp_plan,
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.layer_types = None  # type: ignore[assignment]  # they tell transformers what its cache keeps; vLLM would look for Mamba layers


@final
class ServedModel(EngrammarModel):
    """`EngrammarModel` whose rows and windows come from the operators of `reading`."""

    config_class = ServedConfig
    flat_tokens = True

    def __init__(self, config: ServedConfig, tables: Tables = "parameters") -> None:
        if tables != "external" and config.memory_config is not None:
            raise ValueError("Leave out --model-impl: engrammar's own class in vLLM reads the rows of this model.")
        super().__init__(config, tables)

    def retrieve(
        self,
        input_ids: Tensor,
        attention_mask: Masks = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Retrieved:
        """As `EngrammarModel.retrieve`, for the flat tokens [1, T] of vLLM's batch."""
        assert self.memory is not None
        memory, ops = self.memory.config, torch.ops.engrammar
        started = ops.fetch(input_ids, position_ids, state_name(memory.layers[0]))
        taps_back = [tap * memory.max_ngram_size for tap in reversed(range(memory.conv_kernel))]
        windows = {}
        for layer in memory.layers if memory.conv_kernel else ():
            windows[layer] = partial(ops.taps, positions=position_ids, name=state_name(layer), back=taps_back)
        waits = {
            layer: partial(ops.rows, started, input_ids, layer, memory.memory_dim, self.dtype)
            for layer in memory.layers
        }
        return Retrieved(input_ids=input_ids, waits=waits, windows=windows, own_history=True)


def state_name(layer: int) -> str:
    """The name of a memory layer's state in vLLM."""
    return f"engrammar.{layer}.state"
