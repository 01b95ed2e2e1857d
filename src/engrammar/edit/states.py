"""Hidden states of a model before a block: at the ends of prompts, at what it goes on with after them, along texts.

Letters: N prompts, T tokens, J tokens that it goes on with, D hidden width.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from engrammar.attach.attaching import attachment_of
from engrammar.attach.blocks import device_of, find_decoder, hidden_of, in_branches

BATCH = 32
SHARED = 16  # tokens that all prompts begin with, such as those of a chat, from which on they are read once


class Reached(Exception):
    """Ends a pass where all that is wanted has been read."""


@torch.compiler.set_stance("force_eager")  # compiled code does not notice hooks
@torch.no_grad()
def states(model: nn.Module, ids_NT: Tensor, mask_NT: Tensor, block: int, before: DynamicCache | None = None) -> Tensor:
    """What `block` reads, [N, T, D]; of several residual streams, their mean. The pass ends there.

    Args:
        mask_NT: with a column for each token in `before`, too.
        before: what stands before the rows; the pass extends it.
    """
    decoder = find_decoder(model)
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(hidden_of(decoder.argument, args, kwargs))
        raise Reached

    with decoder.blocks[block].register_forward_pre_hook(stop, with_kwargs=True):
        try:
            cached = {"use_cache": False} if before is None else {"use_cache": True, "past_key_values": before}
            decoder.module(input_ids=ids_NT, attention_mask=mask_NT, **cached)
        except Reached:
            return in_branches(found[0], decoder.hidden_size).float().mean(2)
    raise AssertionError("the pass ended before the block")


def last_states(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], block: int) -> Tensor:
    """[N, D]: what `block` reads at the last token of each prompt, which stands at the beginning of a text.

    Shows a progress bar if it takes more than two seconds.
    """
    device = device_of(model)
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    before = _read_shared(model, rows, block)
    shared = 0 if before is None else before.get_seq_length()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # little padding
    found = []
    starts = range(0, len(order), BATCH)
    for first in tqdm(starts, desc="reading prompts", unit=f" x{BATCH}", delay=2, leave=False):
        ids = [rows[index][shared:] for index in order[first : first + BATCH]]
        longest = len(ids[-1])
        ids_NT = torch.tensor([own + [own[-1]] * (longest - len(own)) for own in ids], device=device)
        lengths = torch.tensor([len(own) for own in ids], device=device)
        mask_NT = (torch.arange(-shared, longest, device=device) < lengths[:, None]).long()
        own_before = copy.deepcopy(before)
        if own_before is not None:
            own_before.batch_repeat_interleave(len(ids))
        hidden_NTD = states(model, ids_NT, mask_NT, block, own_before)
        found.append(hidden_NTD[torch.arange(len(ids)), lengths - 1].cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]


def _read_shared(model: nn.Module, rows: Sequence[list[int]], block: int) -> DynamicCache | None:
    """Reads what all rows begin with; None if that is little, or if the model keeps more than keys and values."""
    shared = num_shared(rows)
    decoder = find_decoder(model)
    takes_cache = "past_key_values" in inspect.signature(decoder.module.forward).parameters
    if shared < SHARED or attachment_of(decoder.host) or not takes_cache:
        return None
    before = DynamicCache(config=decoder.host.config)
    if not all(type(layer) is DynamicLayer for layer in before.layers):
        return None
    ids_1T = torch.tensor([rows[0][:shared]], device=device_of(model))
    states(model, ids_1T, torch.ones_like(ids_1T), block, before)
    return before


def num_shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with, less the last one of the shortest; 0 if there is one row."""
    if len(rows) < 2:
        return 0
    pairs = list(zip(min(rows), max(rows)))  # of all rows, these two have the least in common
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return min(same, min(map(len, rows)) - 1)


def text_states(model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, block: int) -> Tensor:
    """[T-1, D]: what `block` reads along a text, without the first token, which models use as a sink."""
    ids_NT = tokenizer(text, return_tensors="pt").input_ids.to(device_of(model))
    return states(model, ids_NT, torch.ones_like(ids_NT), block)[0, 1:].cpu()


@torch.no_grad()
def worded_states(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], block: int, num: int
) -> Tensor:
    """[N, J, D]: what `block` reads at the `num` tokens that the model, greedily, goes on with after each prompt.

    Prompts of one length are read together, so there is no padding. Shows a progress bar after two seconds.
    """
    decoder = find_decoder(model)
    host: Any = decoder.host
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(rows):
        by_length.setdefault(len(ids), []).append(index)
    batches = [own[at : at + BATCH] for own in by_length.values() for at in range(0, len(own), BATCH)]
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_of(decoder.argument, args, kwargs)
        seen.append(in_branches(hidden, decoder.hidden_size)[:, -1].float().mean(1).cpu())

    found: dict[int, Tensor] = {}
    with decoder.blocks[block].register_forward_pre_hook(see, with_kwargs=True):
        for batch in tqdm(batches, desc="wording", unit=f" x{BATCH}", delay=2, leave=False):
            seen.clear()
            ids_NT = torch.tensor([rows[index] for index in batch], device=device_of(model))
            host.generate(
                ids_NT, attention_mask=torch.ones_like(ids_NT), min_new_tokens=num + 1, max_new_tokens=num + 1,
                do_sample=False, pad_token_id=int(ids_NT[0, 0]),
            )  # fmt: skip
            assert len(seen) == num + 1  # the prompt's end, and each token of `num`
            found |= zip(batch, torch.stack(seen[1:], 1))
    return torch.stack([found[index] for index in range(len(rows))])
