"""An attached memory's part in a pass of vLLM: rows are asked for before the base runs, and added at its blocks.

Letters: B one row, T flat tokens of many requests, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from engrammar.attach.attached import AttachedMemory
from engrammar.attach.blocks import Decoder, hidden_of, with_hidden
from engrammar.attach.paged import FlatPass
from engrammar.config import MemoryConfig
from engrammar.memory import Retrieved
from engrammar.serve.vllm.backbone import state_name
from engrammar.serve.vllm.reading import RETRIEVED, Retriever, layer_of, library, taps
from engrammar.serve.vllm.state import StateLayer


@final
@dataclass(frozen=True, kw_only=True)
class ServedPass(FlatPass):
    """A pass of vLLM's flat tokens, without those that only fill it up."""

    retrieved: Retrieved  # their rows, on their way
    positions_T: Tensor  # each token's position in its request

    def taps(self, config: MemoryConfig, layer: int, normed_BCT: Tensor) -> Tensor:
        back = [tap * config.max_ngram_size for tap in reversed(range(config.conv_kernel))]
        return taps(normed_BCT, self.positions_T[None], state_name(layer), back)


@final
class Adder:
    """Starts the reads of a pass, and adds the rows of an attached memory."""

    def __init__(self, attached: AttachedMemory, states: Mapping[int, StateLayer]) -> None:
        first = next(iter(states))  # of the memory layers that keep something, the one that keeps the ids
        self.attached, self.name = attached, state_name(first)
        self.retriever = Retriever(attached.memory, states[first])
        states[first].retriever = self

    def hook(self, decoder: Decoder) -> None:
        """Lets each block that the memory reads at have its rows added."""
        for layer in self.attached.config.layers:
            before = partial(before_block, layer, decoder.argument, self.name)
            decoder.blocks[layer].register_forward_pre_hook(before, with_kwargs=True)

    def start(self, input_ids: Tensor, positions: Tensor) -> None:
        """Keeps the ids of a pass, and starts reading its rows; not where vLLM profiles, and has no cache yet."""
        context = get_forward_context()
        _, where = layer_of(context, self.name)
        if where is None:
            return
        num_tokens = len(where.slot_T)
        ids_T, positions_T = input_ids[:num_tokens], positions[:num_tokens]
        history = self.retriever.history(ids_T, positions_T, where)
        retrieved = self.attached.memory.retrieve(ids_T.long()[None], history=history)
        first_BT = history[..., -1] < 0  # nothing stands before such a token
        dead_BT = first_BT if retrieved.dead_BT is None else retrieved.dead_BT | first_BT
        begun = ServedPass(retrieved=replace(retrieved, dead_BT=dead_BT), positions_T=positions_T)
        context.additional_kwargs[RETRIEVED] = begun


def before_block(
    layer: int, argument: str, name: str, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook on block `layer`: it reads hidden states [1, T, ...] to which the memory was added."""
    hidden = torch.ops.engrammar.add(hidden_of(argument, args, kwargs), layer, name)
    return with_hidden(hidden, argument, args, kwargs)


def add(hidden: Tensor, layer: int, name: str) -> Tensor:
    """Hidden states [1, T, ...] with the memory of `layer` added; `name` is that of the state that holds the ids.

    An operator that torch.compile does not look into, like those of `reading`.
    """
    context, added = get_forward_context(), hidden.clone()
    begun = context.additional_kwargs.get(RETRIEVED)
    if begun is not None:
        num_tokens = len(begun.positions_T)
        attached = context.no_compile_layers[name].retriever.attached
        added[:, :num_tokens] = attached.add(layer, added[:, :num_tokens], begun.retrieved, begun, False)
    return added


direct_register_custom_op(
    op_name="add", op_func=add, fake_impl=lambda hidden, layer, name: torch.empty_like(hidden), target_lib=library
)
