"""The memory's step as operators that torch.compile does not look into: they read vLLM's cache and our stores.

Each finds its layer by name in vLLM's forward context, as vLLM's own attention does. Where vLLM profiles, it has no
cache yet: then they return zeros.
Letters: B one row, T flat tokens of many requests, E width of a token's rows, C channels, K taps, S positions of
history.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from engrammar.memory import Memory, Retrieved
from engrammar.serve.vllm.state import StateLayer, StateMetadata

RETRIEVED = "engrammar_retrieved"  # where the rows of a pass wait, in vLLM's forward context
library = Library("engrammar", "FRAGMENT")


class Retriever:
    """Starts a pass's reads: the memory, and the layer whose state holds the ids."""

    def __init__(self, memory: Memory, ids: StateLayer) -> None:
        self.memory, self.ids = memory, ids

    def history(self, ids_T: Tensor, positions_T: Tensor, where: StateMetadata) -> Tensor:
        """Keeps the ids; returns those before each, [1, T, S], -1 where there are none."""
        back = range(self.memory.config.max_ngram_size - 1, 0, -1)
        self.ids.write(self.ids.numbers(), ids_T, where)
        before_TS, exists_TS = self.ids.read(self.ids.numbers(), positions_T, back, where)
        return before_TS.long().where(exists_TS, -1)[None]

    def start(self, ids_T: Tensor, positions_T: Tensor, where: StateMetadata) -> Retrieved:
        """Keeps the ids, and starts reading the rows of every layer for them."""
        return self.memory.retrieve(ids_T.long()[None], history=self.history(ids_T, positions_T, where))


def layer_of(context: ForwardContext, name: str) -> tuple[Any, StateMetadata | None]:
    """A layer by its name, and the metadata of this pass; None where vLLM only profiles."""
    known = context.attn_metadata
    return context.no_compile_layers[name], known.get(name) if isinstance(known, dict) else None


def fetch(input_ids: Tensor, positions: Tensor, name: str) -> Tensor:
    """Starts reading the rows of a pass [B, T]. Returns an empty tensor that `rows` takes, so that it comes later."""
    context = get_forward_context()
    layer, where = layer_of(context, name)
    if where is not None:
        num_tokens = len(where.slot_T)
        started = layer.retriever.start(input_ids[0, :num_tokens], positions[0, :num_tokens], where)
        context.additional_kwargs[RETRIEVED] = started
    return input_ids.new_empty(0)


def rows(started: Tensor, input_ids: Tensor, layer: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Waits for a layer's rows: embedding_BTE, and dead_BT, True where nothing is added."""
    shape = input_ids.shape
    embedding = torch.zeros((*shape, width), dtype=dtype, device=input_ids.device)
    dead = torch.ones(shape, dtype=torch.bool, device=input_ids.device)
    retrieved = get_forward_context().additional_kwargs.get(RETRIEVED)
    if retrieved is not None:
        found_BTE, dead_BT = retrieved.wait(layer)
        num_tokens = found_BTE.shape[1]
        embedding[:, :num_tokens] = found_BTE
        dead[:, :num_tokens] = False if dead_BT is None else dead_BT
    return embedding, dead


def taps(normed: Tensor, positions: Tensor, name: str, back: list[int]) -> Tensor:
    """Keeps the convolution's inputs [B, C, T]; returns what each tap reads, [B, T, K, C], zero before the start."""
    layer, where = layer_of(get_forward_context(), name)
    if where is None:
        return normed.new_zeros((1, normed.shape[2], len(back), normed.shape[1]))
    num_tokens = len(where.slot_T)
    layer.write(layer.inputs, normed[0].T[:num_tokens].contiguous(), where)
    read_TKC, exists_TK = layer.read(layer.inputs, positions[0, :num_tokens], back, where)
    read_TKC = read_TKC.to(normed.dtype)
    if not exists_TK.all():
        read_TKC.masked_fill_(~exists_TK[..., None], 0)
    if filling := normed.shape[2] - num_tokens:
        read_TKC = F.pad(read_TKC, (0, 0, 0, 0, 0, filling))
    return read_TKC[None]


def _fetch_shape(input_ids: Tensor, positions: Tensor, name: str) -> Tensor:
    return input_ids.new_empty(0)


def _rows_shape(
    started: Tensor, input_ids: Tensor, layer: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return input_ids.new_empty((*input_ids.shape, width), dtype=dtype), input_ids.new_empty(
        input_ids.shape, dtype=torch.bool
    )


def _taps_shape(normed: Tensor, positions: Tensor, name: str, back: list[int]) -> Tensor:
    return normed.new_empty((1, normed.shape[2], len(back), normed.shape[1]))


for _op, _shape in ((fetch, _fetch_shape), (rows, _rows_shape), (taps, _taps_shape)):
    direct_register_custom_op(op_name=_op.__name__, op_func=_op, fake_impl=_shape, target_lib=library)
