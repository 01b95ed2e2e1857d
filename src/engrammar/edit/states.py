"""Hidden states of a model at the ends of prompts and along texts, before a block.

Letters: N prompts, T tokens, D hidden width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engrammar.attach.blocks import find_decoder, hidden_of, in_branches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 32


class _Reached(Exception):
    """Ends a pass at the block whose input is read."""


@torch.no_grad()
def states(model: nn.Module, ids_NT: Tensor, mask_NT: Tensor, block: int) -> Tensor:
    """What `block` reads, [N, T, D]; of several residual streams, their mean. The pass ends there."""
    decoder = find_decoder(model)
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(hidden_of(decoder.argument, args, kwargs))
        raise _Reached

    with decoder.blocks[block].register_forward_pre_hook(stop, with_kwargs=True):
        try:
            decoder.module(input_ids=ids_NT, attention_mask=mask_NT, use_cache=False)
        except _Reached:
            return in_branches(found[0], decoder.hidden_size).float().mean(2)
    raise AssertionError("the pass ended before the block")


def last_states(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], block: int) -> Tensor:
    """[N, D]: what `block` reads at the last token of each prompt, which stands at the beginning of a text.

    Shows a progress bar if it takes more than two seconds.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    device = next(model.parameters()).device
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # little padding
    found = []
    starts = range(0, len(order), BATCH)
    for first in tqdm(starts, desc="reading prompts", unit=f" x{BATCH}", delay=2, leave=False):
        ids = [rows[index] for index in order[first : first + BATCH]]
        longest = len(ids[-1])
        ids_NT = torch.tensor([own + [own[-1]] * (longest - len(own)) for own in ids], device=device)
        lengths = torch.tensor([len(own) for own in ids], device=device)
        mask_NT = (torch.arange(longest, device=device) < lengths[:, None]).long()
        hidden_NTD = states(model, ids_NT, mask_NT, block)
        found.append(hidden_NTD[torch.arange(len(ids)), lengths - 1].cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]


def text_states(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", text: str, block: int) -> Tensor:
    """[T-1, D]: what `block` reads along a text, without the first token, which models use as a sink."""
    ids_NT = tokenizer(text, return_tensors="pt").input_ids.to(next(model.parameters()).device)
    return states(model, ids_NT, torch.ones_like(ids_NT), block)[0, 1:].cpu()
