"""Tries a memory at several blocks of a model for a few steps each: what it gains there, and what a step costs."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from engrammar.attach import attach, detach, keep_prefix
from engrammar.attach.attaching import attachment_of
from engrammar.attach.blocks import evaluating, find_decoder
from engrammar.attach.prefix import Items
from engrammar.cells import Column, Lines, cells, titles
from engrammar.config import check_setting
from engrammar.train.attached import Prepared, memory_settings, read_text
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.recipe import AttachRecipe

COLUMNS = (
    Column("block", "layer"),
    Column("nats", "loss", ".4f"),
    Column("gain", "gain", "+.4f"),
    Column("ms/step", "step_seconds", ",.0f", 1e-3),
    Column("gain/min", "gain_per_minute", "+.4f"),
    Column("s before", "prefix_seconds", ",.1f"),
)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a memory at one block came to."""

    layer: int
    steps: int  # that were made
    loss: float  # nats per token of the held-out items after the steps; `gain` is how much that is below the base's
    gain: float
    step_seconds: float  # CPU seconds of a training step
    prefix_seconds: float  # CPU seconds of computing, once, what lies below the block

    @property
    def gain_per_minute(self) -> float:
        """The gain over the CPU minutes of the steps, without the prefix, which is computed once."""
        return 60 * self.gain / (self.step_seconds * self.steps)


def probe_layers(
    recipe: AttachRecipe, ready: Prepared, blocks: tuple[Items, Items], layers: Sequence[int], steps: int
) -> list[Probe]:
    """Trains a fresh memory at one block after another, from the same start, on the same batches.

    What lies below a block is computed once and kept on disk for the time (not at block 0). The model is as it was
    afterwards, to the bit.

    Args:
        recipe: gives the memory's settings except its `layers`, the rates, the items of a step and the seed.
        blocks: what is trained on and what is held out, items of one length with labels, as for `keep_prefix`.
        steps: training steps at each.

    Raises:
        ValueError: the model has a memory already, a setting is not allowed, or `attach` or `keep_prefix` refuses.
    """
    model, num_blocks = ready.model, len(find_decoder(ready.model).blocks)
    if attachment_of(model) is not None:
        raise ValueError("The model has a memory already: detach it, and try the blocks of the base.")
    some = bool(layers) and all(0 <= layer < num_blocks for layer in layers)
    check_setting("layers", list(layers), some, f"blocks from 0 to {num_blocks - 1}")
    check_setting("steps", steps, steps >= 1, "1 or more")
    config = memory_settings(recipe, num_blocks, ready.tokenizer)
    probes = []
    for layer in layers:
        torch.manual_seed(recipe.seed)
        attach(model, replace(config, layers=(layer,)), ready.tokenizer)
        try:
            with evaluating(model):
                probes.append(_probe(recipe, model, blocks, layer, steps))
        finally:
            detach(model)
    return probes


def _probe(recipe: AttachRecipe, model: Any, blocks: tuple[Items, Items], layer: int, steps: int) -> Probe:
    batch_size, started = recipe.data.batch_size, time.process_time()
    with TemporaryDirectory() as folder:
        train, held = blocks
        if layer:
            train, held = (keep_prefix(model, own, Path(folder, str(i)), batch_size=8) for i, own in enumerate(blocks))
        prefix_seconds, before = time.process_time() - started, mean_loss(model, held, batch_size)
        scale = recipe.optimizer.memory_lr_scale
        given = OptimizerSettings(memory_lr_scale=scale, matrices="adamw", max_grad_norm=1.0)
        optimizer = build_optimizer(model, given, lr=recipe.optimizer.lr, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
        model.train()
        started = time.process_time()
        for batch, _ in zip(_batches(model, train, batch_size, recipe.seed), range(steps)):
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        step_seconds = (time.process_time() - started) / steps
        model.eval()
        loss = mean_loss(model, held, batch_size)
    spent = {"step_seconds": step_seconds, "prefix_seconds": prefix_seconds}
    return Probe(layer=layer, steps=steps, loss=loss, gain=before - loss, **spent)


def _batches(model: Any, items: Items, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of one epoch after another, each in an order of its own, for ever."""
    loader = _loader(items, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    while True:
        yield from (_on_device(model, batch) for batch in loader)


@torch.no_grad()
def mean_loss(model: Any, items: Items, batch_size: int) -> float:
    """Nats per token of items of one length."""
    total = sum(
        float(model(**_on_device(model, batch), use_cache=False).loss) * len(batch["input_ids"])
        for batch in _loader(items, batch_size)
    )
    return total / len(items)


def _loader(items: Items, batch_size: int, **how: Any) -> DataLoader[Any]:
    return DataLoader(items, batch_size=batch_size, **how)  # type: ignore[arg-type]


def _on_device(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = model.get_input_embeddings().weight.device
    return {name: torch.as_tensor(value).to(device) for name, value in batch.items()}


def probe_attached(recipe: AttachRecipe, layers: Sequence[int], steps: int) -> list[Probe]:
    """Tries a recipe's memory at several blocks of its model, on its text; writes nothing that stays.

    Raises:
        ValueError: as `probe_layers`; or the text is too short for a block of training and one of validation.
    """
    with TemporaryDirectory() as folder:
        ready = read_text(replace(recipe, out=folder))
        train, held = (ready.tokens.blocks(split, recipe.data.sequence_length) for split in ("train", "validation"))
        return probe_layers(recipe, ready, (train, held), layers, steps)


def table(probes: Sequence[Probe]) -> tuple[list[str], Lines]:
    """Header and lines, one for each block."""
    lines = [cells(COLUMNS, {key: getattr(probe, key) for _, key, *_ in COLUMNS}) for probe in probes]
    return titles(COLUMNS), lines
