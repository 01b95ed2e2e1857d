"""The ways to teach a model a text that the study compares, and the training loop that they share."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, kw_only=True)
class How:
    """How models are trained. The rates were tried on entries of no lesson (docs/log.md).

    Attributes:
        epochs: passes over the text, for all but what is trained for equal seconds.
        batch: blocks of a step.
        memory: the memory's settings; its block is at two thirds of the depth.
        memory_lr: rate of the fusion; rows get `memory_lr_scale` times it.
        most_common: the share of background blocks that may read a row, where only rare rows are trained.
        lora_rank: of the LoRA that is trained beside a memory, or for equal seconds.
    """

    epochs: int = 3
    batch: int = 8
    memory: Mapping[str, Any]
    memory_lr: float = 1e-3
    memory_lr_scale: float = 60.0
    lora_rank: int = 8
    lora_lr: float = 2e-3
    full_lr: float = 5e-5
    most_common: float = 0.005


HOW = How(memory={"layers": [20], "rows_per_head": [50_000, 50_000], "num_heads": 4, "head_dim": 96, "conv_kernel": 0})


@dataclass(frozen=True, kw_only=True)
class Taught:
    """A model that was taught.

    Attributes:
        trained: parameters that were trained; of a memory's rows those that the text reads.
        stored: numbers that the adapter keeps.
        seconds: CPU seconds of training on one thread, and of what had to be computed before.
    """

    model: Model
    trained: int
    stored: int
    seconds: float


Teach = Callable[[Model, Any, Lesson, int, How, float], Taught]


class Items:
    """Blocks [B, T] as a dataset."""

    def __init__(self, ids_BT: Tensor) -> None:
        self.ids_BT = ids_BT

    def __len__(self) -> int:
        return len(self.ids_BT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids_BT[index], "labels": self.ids_BT[index]}


def batches(items: Any, how: How, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of one epoch after another, each in an order of its own, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(items), generator=generator).split(how.batch):
            yield default_collate([items[int(index)] for index in chosen])


def fit(
    model: Model,
    items: Any,
    *,
    how: How,
    lr: float,
    seed: int,
    seconds: float = math.inf,
    sparse: SparseRows | None = None,
) -> float:
    """Trains what is trainable for `how.epochs`, or until `seconds` of CPU are spent; returns the seconds spent.

    It makes one step at least; `sparse` says which rows it trains.
    """
    settings = OptimizerSettings(memory_lr_scale=how.memory_lr_scale, matrices="adamw", max_grad_norm=1.0)
    optimizer = build_optimizer(model, settings, lr=lr, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    optimizer.sparse = sparse
    num_steps = how.epochs * math.ceil(len(items) / how.batch) if math.isinf(seconds) else None
    started, stream = time.process_time(), batches(items, how, seed)
    model.train()
    step = 0
    while step != num_steps and (step == 0 or time.process_time() - started < seconds):
        model(**next(stream), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    model.eval()
    if sparse is not None:
        sparse.remove()
    return time.process_time() - started


def teach_memory(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, _: float) -> Taught:
    """A memory on the frozen model; what lies below it is computed once."""
    return _memory(model, tokenizer, lesson, seed, how)


def teach_filled(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, _: float) -> Taught:
    """A memory whose rows come from the token embeddings of what follows; nothing is trained."""
    torch.manual_seed(seed)
    attach(model, _settings(how, tokenizer), tokenizer)
    started = time.process_time()
    fill_rows(model, Items(lesson.taught))
    return Taught(model=model, trained=0, stored=_stored(model), seconds=time.process_time() - started)


def teach_filled_first(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, _: float) -> Taught:
    """As `teach_filled`, then trained as `teach_memory` trains."""
    return _memory(model, tokenizer, lesson, seed, how, filled=True)


def teach_rare(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, _: float) -> Taught:
    """As `teach_memory`, but rows that more than `how.most_common` of background text reads stay zero."""
    return _memory(model, tokenizer, lesson, seed, how, most_common=how.most_common)


def _memory(
    model: Model,
    tokenizer: Any,
    lesson: Lesson,
    seed: int,
    how: How,
    *,
    filled: bool = False,
    most_common: float = 1.0,
) -> Taught:
    torch.manual_seed(seed)
    attach(model, _settings(how, tokenizer), tokenizer)
    started = time.process_time()
    if filled:
        fill_rows(model, Items(lesson.taught))
    with TemporaryDirectory() as folder:
        items = keep_prefix(model, Items(lesson.taught), Path(folder) / "prefix", batch_size=how.batch)
        sparse = SparseRows(model, [lesson.background], None, most_common=most_common) if most_common < 1 else None
        before = time.process_time() - started
        seconds = fit(model, items, how=how, lr=how.memory_lr, seed=seed, sparse=sparse)
    return Taught(model=model, trained=_read(model, lesson.taught), stored=_stored(model), seconds=before + seconds)


def teach_one_row(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, seconds: float) -> Taught:
    """The control for what is stored: all n-grams share the one row of their head, as far as primes allow."""
    few = replace(how, memory={**how.memory, "rows_per_head": [2, 2]})
    return teach_memory(model, tokenizer, lesson, seed, few, seconds)


def teach_shuffled(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, seconds: float) -> Taught:
    """The control for what is read: the memory as trained, its rows in another order."""
    taught = teach_memory(model, tokenizer, lesson, seed, how, seconds)
    memory = _attached(model).memory
    with torch.no_grad():
        for layer in memory.config.layers:
            weight_RC = memory.table(layer).weight
            assert weight_RC is not None
            weight_RC.copy_(weight_RC[torch.randperm(len(weight_RC), generator=torch.Generator().manual_seed(seed))])
    return taught


def teach_lora(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, _: float) -> Taught:
    """LoRA on all linear layers with at least the parameters that the memory trains."""
    attach(model, _settings(how, tokenizer), tokenizer)
    trained = _read(model, lesson.taught)
    detach(model)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    per_rank = sum(module.in_features + module.out_features for module in linear)
    return _lora(model, lesson.taught, seed, how, rank=math.ceil(trained / per_rank))


def teach_lora_for_seconds(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, seconds: float) -> Taught:
    """LoRA for as many CPU seconds as the memory took."""
    return _lora(model, lesson.taught, seed, how, rank=how.lora_rank, seconds=seconds)


def teach_both(model: Model, tokenizer: Any, lesson: Lesson, seed: int, how: How, seconds: float) -> Taught:
    """A memory first, then LoRA beside it, both trained."""
    first = teach_memory(model, tokenizer, lesson, seed, how, seconds)
    second = _lora(model, lesson.taught, seed, how, rank=how.lora_rank)
    return Taught(
        model=second.model,
        trained=first.trained + second.trained,
        stored=first.stored + second.stored,
        seconds=first.seconds + second.seconds,
    )


def teach_full(model: Model, _: Any, lesson: Lesson, seed: int, how: How, __: float) -> Taught:
    """Every weight of the model."""
    model.requires_grad_(True)
    size = sum(parameter.numel() for parameter in model.parameters())
    seconds = fit(model, Items(lesson.taught), how=how, lr=how.full_lr, seed=seed)
    return Taught(model=model, trained=size, stored=size, seconds=seconds)


def teach_nothing(model: Model, *_: Any) -> Taught:
    return Taught(model=model, trained=0, stored=0, seconds=0.0)


VARIANTS: dict[str, Teach] = {
    "as it was": teach_nothing,
    "memory": teach_memory,
    "memory, rare rows": teach_rare,
    "LoRA, equal parameters": teach_lora,
    "LoRA, equal seconds": teach_lora_for_seconds,
    "memory and LoRA": teach_both,
    "full tuning": teach_full,
    "memory, rows shuffled": teach_shuffled,
    "memory of one row": teach_one_row,
    "training-free": teach_filled,
    "training-free, then memory": teach_filled_first,
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


def _lora(model: Model, ids_BT: Tensor, seed: int, how: How, *, rank: int, seconds: float = math.inf) -> Taught:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    if hasattr(wrapped.get_base_model(), "engrammar"):
        set_trainable(wrapped, "memory")
    size = sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)
    spent = fit(wrapped, Items(ids_BT), how=how, lr=how.lora_lr, seed=seed, seconds=seconds)
    return Taught(model=wrapped, trained=size, stored=size, seconds=spent)
