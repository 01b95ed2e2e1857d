"""What a model itself goes on with after prompts: its hidden states there.

Letters: N prompts, J tokens that it goes on with, D hidden width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from engrammar.attach.blocks import device_of, find_decoder, hidden_of, in_branches
from engrammar.edit.states import BATCH


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
