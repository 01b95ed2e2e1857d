"""Second moments of keys, E[k k^T]: of what a down-projection reads along real text (ROME, section 3.1, C in eq. 2;
MEMIT, section 4.2, eq. 15). They are computed once for a model, a text, a number of tokens and a block.

Letters: N texts, T tokens, F width of a key.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engrammar.attach.blocks import evaluating, find_decoder
from engrammar.attach.fingerprints import fingerprint_of
from engrammar.edit.states import states
from engrammar.tables.sealed import written_beside
from engrammar.train import corpora
from engrammar_lab.editing.edited import Model
from engrammar_lab.editing.weights import down_projection

LENGTH, ROWS = 256, 8  # tokens of a text, texts of a pass


@dataclass(frozen=True, kw_only=True)
class KeyText:
    """The text along which keys are read."""

    cache: Path  # a folder of corpora; second moments are kept there too
    corpus: str = "wiki"  # of `engrammar.train.corpora`
    num_tokens: int = 1_000_000  # how much of it is read, from its beginning on


def moments(model: Model, tokenizer: Any, blocks: Sequence[int], text: KeyText) -> dict[int, Tensor]:
    """E[k k^T] of blocks, [F, F] each, from the cache, or computed and kept there.

    Raises:
        ValueError: the corpus is shorter than the tokens that are asked for.
    """
    digest = hashlib.sha256(json.dumps(fingerprint_of(find_decoder(model)), sort_keys=True).encode()).hexdigest()
    name = f"keys-{digest[:12]}-{text.corpus}-{text.num_tokens}-" + "{}.safetensors"
    paths = {block: text.cache / "moments" / name.format(block) for block in blocks}
    missing = [block for block, path in paths.items() if not path.exists()]
    if missing:
        documents = (entry.text for entry in corpora.entries(text.corpus, cache=text.cache))
        found = moments_of(model, cut(tokenizer, documents, text.num_tokens), missing)
        about = {"model": digest, "corpus": text.corpus, "tokens": str(text.num_tokens)}
        for block, moment_FF in found.items():
            paths[block].parent.mkdir(parents=True, exist_ok=True)
            with written_beside(paths[block]) as partial:
                save_file({"moment": moment_FF}, partial, about | {"block": str(block)})
    return {block: load_file(path)["moment"] for block, path in paths.items()}


def cut(tokenizer: Any, documents: Iterable[str], num_tokens: int) -> Iterator[Tensor]:
    """Documents one after another, each after an end of text, as batches of ids [N, T]: `num_tokens` in all.

    Raises:
        ValueError: they are too short for that.
    """
    held: list[int] = []
    left = num_tokens
    for document in documents:
        held += [tokenizer.eos_token_id, *tokenizer(document, add_special_tokens=False).input_ids]
        while left and len(held) >= min(left, LENGTH * ROWS):
            now = min(left, LENGTH * ROWS)
            taken, held, left = held[:now], held[now:], left - now
            whole = now // LENGTH * LENGTH
            if whole:
                yield torch.tensor(taken[:whole]).view(-1, LENGTH)
            if whole < now:
                yield torch.tensor(taken[whole:])[None]
        if not left:
            return
    raise ValueError(f"num_tokens is {num_tokens}: the corpus has {num_tokens - left + len(held)} tokens only.")


@torch.no_grad()
def moments_of(model: Model, batches: Iterable[Tensor], blocks: Sequence[int]) -> dict[int, Tensor]:
    """E[k k^T] of some blocks along texts, in fp32, summed in fp64. Passes end after the last of these blocks."""
    decoder = find_decoder(model)
    device = next(decoder.host.parameters()).device
    sums = {block: torch.zeros(down_projection(model, block).in_features, device=device).double() for block in blocks}
    sums = {block: torch.zeros(len(one), len(one), device=device).double() for block, one in sums.items()}
    num = 0
    with ExitStack() as hooks:
        hooks.enter_context(evaluating(decoder.host))
        for block in blocks:

            def read(_: nn.Module, args: tuple[Any, ...], block: int = block) -> None:
                key_KF = args[0].flatten(0, -2).float()
                sums[block] += key_KF.T @ key_KF

            hooks.enter_context(down_projection(model, block).register_forward_pre_hook(read))
        for ids_NT in batches:
            num += ids_NT.numel()
            run_to(model, ids_NT.to(device), max(blocks))
    return {block: (total / num).float() for block, total in sums.items()}


def run_to(model: Model, ids_NT: Tensor, block: int) -> None:
    """A pass that ends after a block."""
    decoder = find_decoder(model)
    if block + 1 < len(decoder.blocks):
        states(model, ids_NT, torch.ones_like(ids_NT), block + 1)
    else:
        decoder.module(input_ids=ids_NT, use_cache=False)
