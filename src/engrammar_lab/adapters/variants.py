"""The ways to teach a model a text that the study compares, and the training loop that they share."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from engrammar.attach import attach, detach, fill_rows, keep_prefix, set_trainable
from engrammar.attach.attached import AttachedMemory
from engrammar.attach.attaching import require_attachment
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.sparse import SparseRows
from engrammar_lab.adapters.lessons import Lesson

Model = Any
Ends = Callable[[int, float], bool]  # whether training ends after so many steps and CPU seconds


@dataclass(frozen=True, kw_only=True)
class How:
    """How models are trained. The rates were tried on entries of no lesson (docs/log.md)."""

    epochs: int = 3  # passes over the text, for all but what is trained for equal seconds
    batch: int = 8  # blocks of a step
    memory: Mapping[str, Any]  # the memory's settings; its block is at two thirds of the depth
    memory_lr: float = 1e-3  # of the fusion
    memory_lr_scale: float = 60.0  # the rate of rows over that of the fusion
    lora_rank: int = 8  # of the LoRA that is trained beside a memory, or for equal seconds
    lora_lr: float = 2e-3
    full_lr: float = 5e-5
    most_common: float = 0.005  # the share of background blocks that may read a row, where only rare rows are trained


HOW = How(memory={"layers": [20], "rows_per_head": [50_000, 50_000], "num_heads": 4, "head_dim": 96, "conv_kernel": 0})


@dataclass(frozen=True, kw_only=True)
class Taught:
    """A model that was taught."""

    model: Model
    trained: int = 0  # parameters that were trained; of a memory's rows those that the text reads
    stored: int = 0  # numbers that the adapter keeps
    seconds: float = 0.0  # CPU seconds of training on one thread, and of what had to be computed before


# A fresh model, its tokenizer, the lesson, the seed, how, and what ends the training if it is not `How.epochs`.
Teach = Callable[[Model, Any, Lesson, int, How, Ends | None], Taught]


def items_of(ids_BT: Tensor) -> list[dict[str, Tensor]]:
    """Blocks as a dataset."""
    return [{"input_ids": ids_T, "labels": ids_T} for ids_T in ids_BT]


def batches(items: Any, how: How, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of one epoch after another, each in an order of its own, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(items), generator=generator).split(how.batch):
            yield default_collate([items[int(index)] for index in chosen])


def fit(
    model: Model, items: Any, *, how: How, lr: float, seed: int, ends: Ends | None, sparse: SparseRows | None = None
) -> float:
    """Trains what is trainable for `how.epochs`, or until it `ends`; returns the CPU seconds spent.

    It makes one step at least; `sparse` says which rows it trains.
    """
    settings = OptimizerSettings(memory_lr_scale=how.memory_lr_scale, matrices="adamw", max_grad_norm=1.0)
    optimizer = build_optimizer(model, settings, lr=lr, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    optimizer.sparse = sparse
    num_steps = how.epochs * math.ceil(len(items) / how.batch)
    started = time.process_time()
    model.train()
    for step, batch in enumerate(batches(items, how, seed), 1):
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent = time.process_time() - started
        if step == num_steps if ends is None else ends(step, spent):
            break
    model.eval()
    if sparse is not None:
        sparse.remove()
    return spent


def teach_memory(
    model: Model,
    tokenizer: Any,
    lesson: Lesson,
    seed: int,
    how: How,
    ends: Ends | None = None,
    *,
    filled: bool = False,
    sparse: Callable[[Model, Lesson, How], SparseRows] | None = None,
) -> Taught:
    """A memory on the frozen model; what lies below it is computed once.

    Args:
        filled: rows come from the token embeddings of what follows before they are trained (`teach_filled`).
        sparse: makes what says which rows a step trains; None for all that the text reads.
    """
    torch.manual_seed(seed)
    attach(model, _settings(how, tokenizer), tokenizer)
    started = time.process_time()
    items = items_of(lesson.taught)
    if filled:
        fill_rows(model, items)
    with TemporaryDirectory() as folder:
        kept = keep_prefix(model, items, Path(folder) / "prefix", batch_size=how.batch)
        rows = None if sparse is None else sparse(model, lesson, how)
        before = time.process_time() - started
        seconds = fit(model, kept, how=how, lr=how.memory_lr, seed=seed, ends=ends, sparse=rows)
    return Taught(model=model, trained=_read(model, lesson.taught), stored=_stored(model), seconds=before + seconds)


def rare_rows(model: Model, lesson: Lesson, how: How) -> SparseRows:
    """Trains the rows that at most `how.most_common` of background text reads; the others stay zero."""
    return SparseRows(model, [lesson.background], None, most_common=how.most_common)


def teach_filled(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, _: Ends | None) -> Taught:
    """A memory whose rows come from the token embeddings of what follows; nothing is trained."""
    torch.manual_seed(seed)
    attach(model, _settings(how, tokenizer), tokenizer)
    started = time.process_time()
    fill_rows(model, items_of(lesson.taught))
    return Taught(model=model, stored=_stored(model), seconds=time.process_time() - started)


def teach_one_row(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, ends: Ends | None) -> Taught:
    """The control for what is stored: all n-grams share the one row of their head, as far as primes allow."""
    few = replace(how, memory={**how.memory, "rows_per_head": [2, 2]})
    return teach_memory(model, tokenizer, lesson, seed, few, ends)


def teach_shuffled(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, ends: Ends | None) -> Taught:
    """The control for what is read: the memory as trained, its rows in another order."""
    taught = teach_memory(model, tokenizer, lesson, seed, how, ends)
    memory = _attached(model).memory
    with torch.no_grad():
        for layer in memory.config.layers:
            weight_RC = memory.table(layer).weight
            assert weight_RC is not None
            weight_RC.copy_(weight_RC[torch.randperm(len(weight_RC), generator=torch.Generator().manual_seed(seed))])
    return taught


def teach_equal_lora(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, ends: Ends | None) -> Taught:
    """LoRA on all linear layers with at least the parameters that the memory trains."""
    attach(model, _settings(how, tokenizer), tokenizer)
    trained = _read(model, lesson.taught)
    detach(model)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    per_rank = sum(module.in_features + module.out_features for module in linear)
    return teach_lora(model, tokenizer, lesson, seed, replace(how, lora_rank=math.ceil(trained / per_rank)), ends)


def teach_lora(model: Model, _: Any, lesson: Lesson, seed: int, how: How, ends: Ends | None) -> Taught:
    """LoRA on all linear layers, and on a memory that is attached, which is trained beside it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=how.lora_rank, lora_alpha=2 * how.lora_rank, target_modules="all-linear")
    wrapped = get_peft_model(model, config)
    if hasattr(wrapped.get_base_model(), "engrammar"):
        set_trainable(wrapped, "memory")
    size = sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)
    spent = fit(wrapped, items_of(lesson.taught), how=how, lr=how.lora_lr, seed=seed, ends=ends)
    return Taught(model=wrapped, trained=size, stored=size, seconds=spent)


def teach_both(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, ends: Ends | None) -> Taught:
    """A memory first, then LoRA beside it, both trained."""
    first = teach_memory(model, tokenizer, lesson, seed, how, ends)
    second = teach_lora(model, tokenizer, lesson, seed, how, ends)
    return Taught(
        model=second.model,
        trained=first.trained + second.trained,
        stored=first.stored + second.stored,
        seconds=first.seconds + second.seconds,
    )


def teach_full(model: Model, _: Any, lesson: Lesson, seed: int, how: How, ends: Ends | None) -> Taught:
    """Every weight of the model."""
    model.requires_grad_(True)
    size = sum(parameter.numel() for parameter in model.parameters())
    seconds = fit(model, items_of(lesson.taught), how=how, lr=how.full_lr, seed=seed, ends=ends)
    return Taught(model=model, trained=size, stored=size, seconds=seconds)


VARIANTS: dict[str, Teach] = {
    "as it was": lambda model, *_: Taught(model=model),
    "memory": teach_memory,
    "memory, rare rows": partial(teach_memory, sparse=rare_rows),
    "LoRA, equal parameters": teach_equal_lora,
    "LoRA, equal seconds": teach_lora,
    "memory and LoRA": teach_both,
    "full tuning": teach_full,
    "memory, rows shuffled": teach_shuffled,
    "memory of one row": teach_one_row,
    "training-free": teach_filled,
    "training-free, then memory": partial(teach_memory, filled=True),
}


def _settings(how: How, tokenizer: Any) -> dict[str, Any]:
    end = tokenizer.eos_token_id
    return {"fill_id": end, "end_ids": [end], "boundary": "end", **how.memory}


def _attached(model: Model) -> AttachedMemory:
    return require_attachment(model, None).memories()["default"]


def _read(model: Model, ids_BT: Tensor) -> int:
    """Numbers of a memory that training on a text changes: its fusions, and the rows that the text reads."""
    attached = _attached(model)
    rows = attached.memory.addresses(ids_BT)
    read = sum(len(own.unique()) for own in rows.values()) * attached.config.head_dim
    return read + sum(p.numel() for p in attached.fusions.parameters())


def _stored(model: Model) -> int:
    return sum(parameter.numel() for parameter in _attached(model).parameters())
