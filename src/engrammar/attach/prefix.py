"""What a frozen base computes below its first memory, computed once and kept on disk: a training step then costs only
the blocks above.

Letters: N items of a dataset, B batch, T tokens.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from engrammar.attach.attaching import disabled, require_attachment
from engrammar.attach.blocks import PATCHES, Decoder, device_of, evaluating, find_decoder, hidden_of
from engrammar.attach.skipping import KEPT, KEPT_BLOCK, check_frozen, parts_below
from engrammar.tables.sealed import check_writable, written_beside

HIDDEN, ABOUT = "hidden.bin", "prefix.json"
NAMES = ("input_ids", "attention_mask", "position_ids")  # of an item, what decides the hidden states


class Items(Protocol):
    """A map-style dataset of {"input_ids": [T], ...}, all of one length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class _Reached(Exception):
    """Ends a pass at the block where the prefix ends."""


@final
class KeptPrefix:
    """A dataset whose items also hold what the first block with memory reads: `kept_hidden`, [T, ...], and that block's
    index, `kept_block`.

    `model(**batch)` takes it and runs the blocks from there on; the others hand it through. With transformers' Trainer,
    set `remove_unused_columns=False`, or it is dropped and every block runs. It can be pickled.
    """

    def __init__(self, items: Items, folder: Path) -> None:
        self.items, self.folder = items, folder
        about = json.loads((folder / ABOUT).read_text())
        self.dtype: torch.dtype = getattr(torch, about["dtype"])
        self.shape: list[int] = about["shape"]
        self.block = torch.tensor(about["layer"])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        kept = np.fromfile(self.folder / HIDDEN, np.uint8, size, offset=index * size)
        hidden = torch.from_numpy(kept).view(self.dtype).view(self.shape)
        return {**self.items[index], KEPT: hidden, KEPT_BLOCK: self.block}


def keep_prefix(model: nn.Module, items: Items, folder: Path, *, batch_size: int = 8) -> KeptPrefix:
    """Runs the frozen base below its first memory over a dataset, once, and keeps what comes out.

    The numbers are kept in the base's own precision, so a pass over them differs from a whole one only by the rounding
    of other batch shapes. A folder that was made with the same weights and text is used again.

    Args:
        model: a model with a memory attached (all memories at block 1 or later); it is put into evaluation to compute.
        items: what to train on; blocks of one length, as `TokenSet.blocks` makes them.
        folder: a new folder, or one that an earlier call made: T times the hidden size times 2 or 4 bytes an item.
        batch_size: items computed at a time.

    Raises:
        ValueError: something below the memory is trained or drops numbers at random; the items have several lengths;
            the folder holds another prefix; a patch is applied; or the base hands more than hidden states from block
            to block.
    """
    memories = require_attachment(model, None).memories().values()
    first = min(min(memory.config.layers) for memory in memories)
    below = Below(model=model, decoder=find_decoder(model), layer=first)
    if below.layer == 0:
        raise ValueError("A memory reads at block 0, so nothing lies below it: keep no prefix.")
    if hasattr(below.decoder.host, PATCHES):
        raise ValueError(
            "A patch is applied, and what it writes would be kept: undo it, keep the prefix, apply it again."
        )
    check_frozen(below.decoder, below.layer)
    about = _about(below, items)
    if folder.exists():
        _check_same(folder, about)
    else:
        _compute(below, items, folder, about, batch_size)
    kept = KeptPrefix(items, folder)
    _check_equal(model, below.decoder, kept)
    return kept


@final
@dataclass(frozen=True, kw_only=True)
class Below:
    """The blocks of a model below its first memory, at block `layer`."""

    model: nn.Module
    decoder: Decoder
    layer: int

    def run(self, batch: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """What block `layer` reads; the pass ends there."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(hidden_of(self.decoder.argument, args, kwargs))
            raise _Reached

        block = self.decoder.blocks[self.layer]
        with block.register_forward_pre_hook(stop, with_kwargs=True), evaluating(self.model, training):
            try:
                self.decoder.module(**batch, use_cache=False)
            except _Reached:
                return found[0]
        raise AssertionError("the pass ended before the block")


def _about(below: Below, items: Items) -> dict[str, Any]:
    weights, text = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    host: Any = below.decoder.host
    for module in parts_below(below.decoder, below.layer):
        for name, weight in module.state_dict().items():
            weights.update(name.encode())
            weights.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    lengths = set()
    for item in (items[index] for index in range(len(items))):
        lengths.add(len(item["input_ids"]))
        for name in NAMES:
            if name in item:
                text.update(name.encode() + torch.as_tensor(item[name]).long().numpy().tobytes())
    if len(lengths) != 1:
        raise ValueError(f"The items have {len(lengths)} lengths; allowed: blocks of one length (pack the text).")
    return {
        "layer": below.layer,
        "num_items": len(items),
        "weights": weights.hexdigest(),
        "text": text.hexdigest(),
        "config": hashlib.blake2b(host.config.to_json_string().encode(), digest_size=16).hexdigest(),
        "transformers": transformers.__version__,
    }


def _check_same(folder: Path, about: dict[str, Any]) -> None:
    try:
        there = json.loads((folder / ABOUT).read_text())
        size = (folder / HIDDEN).stat().st_size
        whole = there["num_items"] * int(np.prod(there["shape"])) * getattr(torch, there["dtype"]).itemsize == size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder} holds no kept prefix ({error}): choose a new folder.") from error
    differing = [name for name, value in about.items() if there.get(name) != value]
    if differing or not whole:
        what = f"of another {', '.join(differing)}" if differing else "that is not whole"
        raise ValueError(f"{folder} holds a prefix {what}: delete it, or choose a new folder.")


@torch.no_grad()
def _compute(below: Below, items: Items, folder: Path, about: dict[str, Any], batch_size: int) -> None:
    check_writable(folder.parent)
    loader = input_batches(items, batch_size)
    device = device_of(below.decoder.module)
    with written_beside(folder) as partial_folder, disabled(below.model):
        partial_folder.mkdir()
        with (partial_folder / HIDDEN).open("wb") as file:
            for batch in tqdm(loader, desc=f"blocks below {below.layer}", unit=" batches", delay=2):
                batch = {name: value.to(device) for name, value in batch.items()}
                hidden = below.run(batch, training=False)
                if file.tell() == 0:
                    if not torch.equal(hidden, below.run(batch, training=True)):
                        raise ValueError(
                            f"In training the blocks below {below.layer} compute something else "
                            "(dropout, say): set that to 0, or keep no prefix."
                        )
                    about |= {"dtype": str(hidden.dtype).removeprefix("torch."), "shape": list(hidden.shape[1:])}
                file.write(hidden.cpu().contiguous().view(torch.uint8).numpy().data)
        (partial_folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def input_batches(items: Items, batch_size: int) -> DataLoader[Any]:
    """Batches of items without labels and other things that hidden states do not depend on."""

    def collate(batch: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        inputs = [{name: torch.as_tensor(item[name]) for name in NAMES if name in item} for item in batch]
        return default_collate(inputs)

    return DataLoader(items, batch_size, collate_fn=collate)  # type: ignore[arg-type]


@torch.no_grad()
def _check_equal(model: nn.Module, decoder: Decoder, kept: KeptPrefix) -> None:
    """Compares one item's logits with those of a whole pass."""
    device = device_of(decoder.module)
    item = {name: value.to(device) for name, value in next(iter(input_batches(kept.items, 1))).items()}
    returned: list[Any] = []
    with evaluating(model):
        with decoder.blocks[0].register_forward_hook(lambda *call: returned.append(call[-1])):
            whole = model(**item, use_cache=False).logits.float()
        require_attachment(model, None).blocks_return_tuples = isinstance(returned[0], tuple)
        below = {name: kept[0][name][None].to(device) for name in (KEPT, KEPT_BLOCK)}
        ours = model(**item, **below, use_cache=False).logits.float()
    apart = float((whole - ours).abs().max() / whole.abs().max())
    if not apart < (1e-5 if kept.dtype == torch.float32 else 1e-2):
        raise ValueError(
            f"Logits from the kept prefix differ by {apart:.1e} of the largest: {type(decoder.module).__name__} hands "
            "more than hidden states from block to block, so its prefix cannot be kept; or the folder is damaged."
        )
