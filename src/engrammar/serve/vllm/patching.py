"""What patches add at blocks, in a pass of vLLM: keys are found before it runs, and values added by an operator.

What patches keep of a token (its id, the key that ends at it, what is written there) lies in vLLM's own KV cache, so
whatever shares, drops or recomputes its blocks does the same to it.
Letters: F flat tokens of many requests, B requests, S positions of history, V ids of the tokenizer, D hidden width.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from engrammar.attach.blocks import Decoder, find_decoder, first_parameters, hidden_of
from engrammar.edit import Patch
from engrammar.edit.exact import NOTHING
from engrammar.edit.files import patch_digest
from engrammar.edit.passes import EditPass
from engrammar.edit.rows import ArrayStore, ValueRows
from engrammar.edit.sequences import FOUND, WRITTEN, FlatState, Requests
from engrammar.edit.stack import Stack, stack_patches
from engrammar.serve.vllm.patches import apply_entries
from engrammar.serve.vllm.reading import layer_of, library
from engrammar.serve.vllm.state import StateLayer, StateMetadata
from engrammar.vocabulary import compress_vocabulary

NAME = "engrammar.patches.0.state"  # of the state; vLLM finds a layer's number in it
PATCHED = "engrammar_patched"  # where a pass waits, in vLLM's forward context
NUMBERS = {"id": 0, FOUND: 1, WRITTEN: 2}


@final
class Slots(FlatState):
    """The tokens of a pass, whose state lies in vLLM's KV cache.

    Args:
        num_back: ids to look back to.
    """

    def __init__(
        self, layer: StateLayer, num_back: int, ids_F: Tensor, positions_F: Tensor, where: StateMetadata
    ) -> None:
        self.layer, self.num_back, self.positions_F, self.where = layer, num_back, positions_F, where
        self.ids_F, self.live_F = ids_F.long(), where.slot_T >= 0
        self.request_F = where.request_T
        first_F = torch.searchsorted(self.request_F, self.request_F)
        self.chunk_F = torch.arange(len(ids_F), device=ids_F.device) - first_F

    def begin(self) -> Tensor:
        self.keep("id", self.ids_F)
        return self._read("id", slice(None), self.num_back)

    def before(self, name: str, first_B: Tensor, window: int) -> Tensor:
        return self._read(name, first_B, window)

    def keep(self, name: str, new_F: Tensor) -> None:
        self.layer.write(self.layer.numbers(NUMBERS[name]), new_F, self.where)

    def end(self) -> None: ...

    def _read(self, name: str, tokens: Any, num_back: int) -> Tensor:
        where = replace(self.where, slot_T=self.where.slot_T[tokens], request_T=self.where.request_T[tokens])
        back, numbers = range(num_back, 0, -1), self.layer.numbers(NUMBERS[name])
        found, exists = self.layer.read(numbers, self.positions_F[tokens], back, where)
        return found.long().where(exists, NOTHING)


@final
class Patcher:
    """Finds the keys of a pass, and adds what patches write.

    Args:
        patches: those with exact entries; there is at least one.
        tokenizer: the model's.
    """

    def __init__(self, vllm_config: VllmConfig, decoder: Decoder, patches: Sequence[Patch], tokenizer: Any) -> None:
        self.patches, self.tokenizer = patches, tokenizer
        self.classes_V: NDArray[np.int32] = compress_vocabulary(tokenizer).astype(np.int32)
        self.places = [*decoder.blocks, *final_norms(decoder)]
        self.width = decoder.hidden_size
        self.stack = _stack(patches, len(decoder.blocks), self.width)
        if self.stack.blocks[-1] >= len(self.places):
            raise ValueError(
                f"{type(decoder.module).__name__} has no final norm that could be found, and a patch writes there: "
                "`engrammar serve` it."
            )
        self.state = StateLayer(vllm_config, NAME, 0, len(NUMBERS))
        self.state.retriever = self
        # vLLM keeps compiled code by the config, so what is compiled has to be in it.
        vllm_config.model_config.hf_config.engrammar_patched = self.stack.blocks

    def hook(self) -> None:
        """Lets each block that patches read or write at, or the final norm, call the operator."""
        for block in self.stack.blocks:
            place = self.places[block]
            before = partial(before_place, block, first_parameters(place)[0])
            # Before a memory at that block reads the hidden state.
            place.register_forward_pre_hook(before, with_kwargs=True, prepend=True)

    def start(self, input_ids: Tensor, positions: Tensor) -> None:
        """Finds the keys of a pass; not where vLLM profiles, and has no cache yet."""
        context = get_forward_context()
        _, where = layer_of(context, NAME)
        if where is None or not len(where.slot_T):
            return
        num_tokens = len(where.slot_T)
        slots = Slots(self.state, self.stack.num_back, input_ids[:num_tokens], positions[:num_tokens], where)
        context.additional_kwargs[PATCHED] = EditPass(self.classes_V, self.width, Requests(self.stack, slots))

    def put_keys(self, requests: Sequence[Tensor]) -> None:
        """Writes keys of the patches, and what their entries say, into texts: the self-test's."""
        ids_of = {int(one): index for index, one in reversed([*enumerate(self.classes_V)])}
        phrases = []
        for patch in self.patches:
            for entry in patch.exact_entries()[:: max(len(patch.entries) // 8, 1)]:
                after = [] if entry.after is None else [entry.after]
                phrases.append([*(ids_of[one] for one in entry.key), *after, *entry.says])
        for number, ids_T in enumerate(requests):
            place = 2
            for phrase in phrases[number:] + phrases[:number]:
                fits = phrase[: len(ids_T) - place]
                ids_T[place : place + len(fits)] = torch.tensor(fits, dtype=ids_T.dtype)
                place += len(fits) + 1


def patcher_of(served: Any, vllm_config: VllmConfig, patches: Sequence[Patch]) -> Patcher | None:
    """The patcher of a served model, whose blocks call it from now on; None if no patch adds to hidden states."""
    adding = [one for one in patches if len(one.entries)]
    if not adding:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(vllm_config.model_config.model)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"The patch {adding[0].name!r} needs the model's tokenizer, which could not be loaded ({reason}): save it "
            "in the model's folder."
        ) from error
    patcher = Patcher(vllm_config, find_decoder(served.model), adding, tokenizer)
    patcher.hook()
    return patcher


def patched(model: Any, patcher: Patcher | None) -> Any:
    """Transformers' model with what a patcher adds; its rows are replaced in its stores already."""
    return model if patcher is None else apply_entries(model, patcher.patches, patcher.tokenizer)


def _stack(patches: Sequence[Patch], num_blocks: int, width: int) -> Stack:
    for patch in patches:
        if (patch.base.num_blocks, patch.base.hidden_size) != (num_blocks, width):
            raise ValueError(
                f"The patch {patch.name!r} is for {patch.base.num_blocks} blocks of width {patch.base.hidden_size}; "
                f"this model has {num_blocks} of {width}: give the patch of this model."
            )
    digests = tuple(map(patch_digest, patches))
    stores = [ArrayStore(f"the values of {one.name}", digest, one.values) for one, digest in zip(patches, digests)]
    rows = [ValueRows(store=store, encoding=patch.encoding) for store, patch in zip(stores, patches)]
    return stack_patches(patches, rows, digests, width)


def final_norms(decoder: Decoder) -> list[nn.Module]:
    """The norm after a decoder's blocks, if its name says which one it is. The self-test finds a wrong one."""
    named = [(name, child) for name, child in decoder.module.named_children() if child is not decoder.blocks]
    norms = [child for name, child in named if "norm" in name or name.startswith("ln_")]
    return norms if len(norms) == 1 else []


def before_place(
    block: int, argument: str, place: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook on a block, or on the final norm: it reads hidden states [1, F, ...] to which patches have added."""
    hidden = torch.ops.engrammar.patch(hidden_of(argument, args, kwargs), block)
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, argument: hidden}


def patch(hidden: Tensor, block: int) -> Tensor:
    """Hidden states [1, F, ...] with what patches write before a block. torch.compile does not look into it."""
    patched = hidden.clone()
    begun: EditPass | None = get_forward_context().additional_kwargs.get(PATCHED)
    if begun is not None:
        num_tokens = begun.sequences.shape[1]
        patched[:, :num_tokens] = begun.at(block, patched[:, :num_tokens])
    return patched


def _patch_shape(hidden: Tensor, block: int) -> Tensor:
    return torch.empty_like(hidden)


direct_register_custom_op(op_name="patch", op_func=patch, fake_impl=_patch_shape, target_lib=library)
