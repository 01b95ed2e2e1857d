"""What patches add at blocks, in a pass of vLLM: keys are found before it runs, and values added by an operator.

What patches keep of a token (its id, the key that ends at it, what is written there) lies in vLLM's own KV cache, so
whatever shares, drops or recomputes its blocks does the same to it.
Letters: F flat tokens of many requests, B requests, S positions of history, V ids of the tokenizer, D hidden width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from engrammar.attach.blocks import Decoder, find_decoder, first_parameters, hidden_of, with_hidden
from engrammar.edit import Patch, undo_patch
from engrammar.edit.exact import NOTHING
from engrammar.edit.passes import EditPass
from engrammar.edit.sequences import FOUND, WRITTEN, FlatState, Requests
from engrammar.edit.stack import Stack
from engrammar.serve.vllm.choosing import Names, names_in
from engrammar.serve.vllm.patches import Offer, apply_entries
from engrammar.serve.vllm.reading import layer_of, library
from engrammar.serve.vllm.settings import check_can_choose
from engrammar.serve.vllm.state import StateLayer, StateMetadata
from engrammar.vocabulary import compress_vocabulary, load_tokenizer

NAME = "engrammar.patches.0.state"  # of the state; vLLM finds a layer's number in it
PATCHED = "engrammar_patched"  # where a pass waits, in vLLM's forward context
NUMBERS = {"id": 0, FOUND: 1, WRITTEN: 2}


@final
class Slots(FlatState):
    """The tokens of a pass, whose state lies in vLLM's KV cache; `num_back` ids are looked back to."""

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
    """Finds the keys of a pass, and adds what patches write; one at least of the offer adds to hidden states."""

    def __init__(self, vllm_config: VllmConfig, decoder: Decoder, offer: Offer, tokenizer: Any) -> None:
        self.offer, self.tokenizer = offer, tokenizer
        self.classes_V: NDArray[np.int32] = compress_vocabulary(tokenizer).astype(np.int32)
        self.places = [*decoder.blocks, *final_norms(decoder)]
        self.width = decoder.hidden_size
        _check_sizes(offer.adding, len(decoder.blocks), self.width)
        stacks = [offer.stack(()), *[offer.stack([one.name]) for one in offer.on_request]]
        self.blocks = sorted({block for stack in stacks if stack is not None for block in stack.blocks})
        if self.blocks[-1] >= len(self.places):
            raise ValueError(
                f"{type(decoder.module).__name__} has no final norm that could be found, and a patch writes there: "
                "`engrammar serve` it."
            )
        self.state = StateLayer(vllm_config, NAME, 0, len(NUMBERS))
        self.state.retriever = self
        # vLLM keeps compiled code by the config, so what is compiled has to be in it.
        vllm_config.model_config.hf_config.engrammar_patched = self.blocks

    def hook(self) -> None:
        """Lets each block that patches read or write at, or the final norm, call the operator."""
        for block in self.blocks:
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
        ids_F, positions_F = input_ids[:num_tokens], positions[:num_tokens]
        parts = []
        for stack, own in self._by_choice(where, names_in(context)):
            slots = Slots(self.state, stack.num_back, ids_F, positions_F, own)
            parts.append(EditPass(self.classes_V, self.width, Requests(stack, slots)))
        context.additional_kwargs[PATCHED] = parts

    def _by_choice(self, where: StateMetadata, names: Mapping[int, Names]) -> list[tuple[Stack, StateMetadata]]:
        """Where the tokens of each stack lie; those of other requests lie nowhere there. `names`: see `names_in`."""
        for_all = self.offer.stack(())
        if not names:
            return [] if for_all is None else [(for_all, where)]
        stacks = [self.offer.stack(names.get(row, ())) for row in range(len(where.block_table))]
        numbers = torch.tensor([0 if stack is None else stack.number for stack in stacks])
        number_T = numbers.to(where.request_T.device)[where.request_T]
        return [
            (stack, replace(where, slot_T=where.slot_T.where(number_T == number, -1)))
            for number, stack in {stack.number: stack for stack in stacks if stack is not None}.items()
            if bool((number_T == number).any())
        ]

    def put_keys(self, requests: Sequence[Tensor]) -> None:
        """Writes keys of the patches, and what their entries say, into texts: the self-test's."""
        ids_of = {int(one): index for index, one in reversed([*enumerate(self.classes_V)])}
        phrases = []
        for patch in self.offer.for_all:
            for entry in patch.exact_entries()[:: max(len(patch.entries) // 8, 1)]:
                after = [] if entry.after is None else [entry.after]
                phrases.append([*(ids_of[one] for one in entry.key), *after, *entry.says])
        for number, ids_T in enumerate(requests):
            place = 2
            for phrase in phrases[number:] + phrases[:number]:
                fits = phrase[: len(ids_T) - place]
                ids_T[place : place + len(fits)] = torch.tensor(fits, dtype=ids_T.dtype)
                place += len(fits) + 1


def patcher_of(served: Any, vllm_config: VllmConfig, offer: Offer) -> Patcher | None:
    """The patcher of a served model, whose blocks call it from now on; None if no patch adds to hidden states."""
    if offer.on_request:
        check_can_choose(vllm_config)
    if not offer.adding:
        return None
    try:
        tokenizer = load_tokenizer(vllm_config.model_config.model)
    except ValueError as error:
        raise ValueError(f"The patch {offer.adding[0].name!r} needs the model's tokenizer: {error}") from error
    patcher = Patcher(vllm_config, find_decoder(served.model), offer, tokenizer)
    patcher.hook()
    return patcher


def patched(model: Any, patcher: Patcher | None) -> Any:
    """Transformers' model with what a patcher adds for all; its rows are replaced in its stores already.

    Raises:
        ValueError: a patch is for another model or tokenizer, also one that requests may name.
    """
    if patcher is None:
        return model
    for patch in patcher.offer.on_request:
        undo_patch(apply_entries(model, [patch], patcher.tokenizer))
    return apply_entries(model, patcher.offer.for_all, patcher.tokenizer)


def _check_sizes(patches: Sequence[Patch], num_blocks: int, width: int) -> None:
    for patch in patches:
        if (patch.base.num_blocks, patch.base.hidden_size) != (num_blocks, width):
            raise ValueError(
                f"The patch {patch.name!r} is for {patch.base.num_blocks} blocks of width {patch.base.hidden_size}; "
                f"this model has {num_blocks} of {width}: give the patch of this model."
            )


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
    return with_hidden(hidden, argument, args, kwargs)


def patch(hidden: Tensor, block: int) -> Tensor:
    """Hidden states [1, F, ...] with what patches write before a block. torch.compile does not look into it."""
    patched = hidden.clone()
    begun: list[EditPass] = get_forward_context().additional_kwargs.get(PATCHED, [])
    for part in begun:
        if block in part.stack.blocks:
            num_tokens = part.sequences.shape[1]
            patched[:, :num_tokens] = part.at(block, patched[:, :num_tokens])
    return patched


direct_register_custom_op(
    op_name="patch", op_func=patch, fake_impl=lambda hidden, block: torch.empty_like(hidden), target_lib=library
)
