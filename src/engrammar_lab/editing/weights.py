"""What the ways that change weights share: where they write, how a weight is put back, and prompts as tokens.

Letters: N texts, T tokens, K scored places, D hidden width, F width of a key (what a down-projection reads).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engrammar.attach.blocks import find_decoder, host_of
from engrammar.edit import Fact
from engrammar.edit.optimizing import frozen
from engrammar_lab.editing.edited import Model


def down_projection(model: Model, block: int) -> nn.Linear:
    """The last linear layer of a block's MLP: its input is the key and its output the value of ROME, eq. 1.

    Raises:
        ValueError: there is no such block, or its MLP has no down-projection.
    """
    found = getattr(mlp_of(model, block), "down_proj", None)
    if not isinstance(found, nn.Linear):
        raise ValueError(f"Block {block} of {type(host_of(model)).__name__} has no linear mlp.down_proj to write into.")
    return found


def mlp_of(model: Model, block: int) -> nn.Module:
    """The MLP of a block.

    Raises:
        ValueError: there is no such block, or it has no MLP of this name.
    """
    blocks = find_decoder(model).blocks
    if not 0 <= block < len(blocks):
        raise ValueError(f"block is {block}; allowed: 0 to {len(blocks) - 1}.")
    found: Any = getattr(blocks[block], "mlp", None)
    if not isinstance(found, nn.Module):
        raise ValueError(f"Block {block} of {type(host_of(model)).__name__} has no mlp.")
    return found


def keep(weights: Sequence[Tensor]) -> Callable[[], None]:
    """What puts weights back to the bits that they have now."""
    kept = [weight.detach().clone() for weight in weights]

    def undo() -> None:
        with torch.no_grad():
            for weight, before in zip(weights, kept):
                weight.copy_(before)

    return undo


@contextmanager
def only_training(model: Model, weight: Tensor) -> Iterator[None]:
    """Nothing but this weight takes a gradient inside a `with` block."""
    with frozen(host_of(model)):
        weight.requires_grad_(True)
        try:
            yield
        finally:
            weight.requires_grad_(False)
            weight.grad = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Texts as one batch, padded on the right, and the places that are scored with what stands next there."""

    ids: Tensor  # [N, T], as the mask
    mask: Tensor
    row: Tensor  # [K], as the next two
    token: Tensor
    says: Tensor  # empty where nothing is wanted


def object_ids(tokenizer: Any, fact: Fact) -> list[int]:
    """The tokens of a fact's object after its prompt."""
    return [*tokenizer(" " + fact.object.strip(), add_special_tokens=False).input_ids]


def fact_batch(tokenizer: Any, facts: Sequence[Fact], device: torch.device) -> Batch:
    """Prompts with their objects; the objects' tokens are scored."""
    asked, said = [list(tokenizer(fact.prompt).input_ids) for fact in facts], [object_ids(tokenizer, f) for f in facts]
    ids, mask = padded([own + words[:-1] for own, words in zip(asked, said)], device)
    places = [(row, len(asked[row]) - 1 + i) for row, words in enumerate(said) for i in range(len(words))]
    row, token = torch.tensor(places, device=device).T
    says = torch.tensor([one for words in said for one in words], device=device)
    return Batch(ids=ids, mask=mask, row=row, token=token, says=says)


def prompt_batch(tokenizer: Any, prompts: Sequence[str], device: torch.device) -> Batch:
    """Prompts, of which the last token is scored."""
    asked = [list(tokenizer(prompt).input_ids) for prompt in prompts]
    ids, mask = padded(asked, device)
    token = torch.tensor([len(own) - 1 for own in asked], device=device)
    return Batch(ids=ids, mask=mask, row=torch.arange(len(asked), device=device), token=token, says=token[:0])


def padded(ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, [N, T] each, padded on the right with the last token."""
    longest = max(map(len, ids))
    ids_NT = torch.tensor([[*own, *[own[-1]] * (longest - len(own))] for own in ids], device=device)
    lengths_N = torch.tensor([len(own) for own in ids], device=device)
    return ids_NT, (torch.arange(longest, device=device) < lengths_N[:, None]).long()


def logits_at(model: Model, batch: Batch, **more: Any) -> Tensor:
    """The logits [K, V] at the scored places of a batch; the output head computes no others."""
    host = host_of(model)
    head: Any = host.get_output_embeddings()  # type: ignore[operator]

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        return (args[0][batch.row, batch.token][None],)

    with head.register_forward_pre_hook(choose):
        return host(batch.ids, attention_mask=batch.mask, use_cache=False, **more).logits[0]


def nats_of(logits_KV: Tensor, batch: Batch) -> Tensor:
    """[N]: what each text's wanted tokens cost together, -log P[o | x]."""
    nats_K = torch.nn.functional.cross_entropy(logits_KV.float(), batch.says, reduction="none")
    return nats_K.new_zeros(len(batch.ids)).index_add(0, batch.row, nats_K)
