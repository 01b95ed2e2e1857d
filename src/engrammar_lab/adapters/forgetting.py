"""What is lost when a text is learned equally well: a memory with few rows trained, with all, LoRA, full tuning.

Letters: B blocks, T tokens.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from engrammar.attach import attach, keep_prefix
from engrammar.attach.attaching import require_attachment
from engrammar.tables.sealed import write_text
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.sparse import SparseRows, share_changed
from engrammar_lab.adapters.lessons import Lesson
from engrammar_lab.adapters.measures import measure, nats_per_token
from engrammar_lab.adapters.variants import How, Items, Model, batches


@dataclass(frozen=True, kw_only=True)
class Equal:
    """How equally well is reached.

    Attributes:
        nats: per token of the text that is taught, at which training stops.
        epochs: passes over the text at most; whoever has not learned it by then is marked.
        rows: that a step of the sparse memory trains in each layer.
        background: blocks of other prose that say which rows it trains.
    """

    nats: float = 2.0
    epochs: int = 12
    rows: int = 2000
    background: int = 256


@contextmanager
def _memory(model: Model, tokenizer: Any, ids_BT: Tensor, how: How) -> Iterator[tuple[Any, float]]:
    end = tokenizer.eos_token_id
    attach(model, {"fill_id": end, "end_ids": [end], "boundary": "end", **how.memory}, tokenizer)
    with TemporaryDirectory() as folder:
        yield keep_prefix(model, Items(ids_BT), Path(folder) / "prefix", batch_size=how.batch), how.memory_lr


@contextmanager
def _lora(model: Model, _: Any, ids_BT: Tensor, how: How) -> Iterator[tuple[Any, float]]:
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    rank = how.lora_rank
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    yield Items(ids_BT), how.lora_lr


@contextmanager
def _full(model: Model, _: Any, ids_BT: Tensor, how: How) -> Iterator[tuple[Any, float]]:
    model.requires_grad_(True)
    yield Items(ids_BT), how.full_lr


WAYS: Mapping[str, Any] = {"memory, sparse rows": _memory, "memory": _memory, "LoRA": _lora, "full tuning": _full}


def teach_equally(
    way: str, model: Model, tokenizer: Any, lesson: Lesson, seed: int, *, how: How, equal: Equal, background: Tensor
) -> dict[str, float]:
    """Teaches a text until it is known as well as `equal` says.

    Args:
        background: blocks [B, T] of prose that is neither taught nor measured.

    Returns:
        steps, CPU seconds, whether it was `reached`, and of the sparse memory the share of background reads `changed`.
    """
    torch.manual_seed(seed)
    settings = OptimizerSettings(memory_lr_scale=how.memory_lr_scale, matrices="adamw", max_grad_norm=1.0)
    started, found = time.process_time(), {"steps": 0.0, "reached": 0.0}
    with WAYS[way](model, tokenizer, lesson.taught, how) as (items, lr):
        optimizer = build_optimizer(model, settings, lr=lr, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
        if way == "memory, sparse rows":
            optimizer.sparse = SparseRows(model, [background], equal.rows)
        per_epoch, stream = -(-len(items) // how.batch), batches(items, how, seed)
        while found["steps"] < equal.epochs * per_epoch and not found["reached"]:
            model.train()
            for _ in range(max(1, per_epoch // 2)):
                model(**next(stream), use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found["steps"] += 1
            model.eval()
            found["reached"] = float(nats_per_token(model, lesson.taught) <= equal.nats)
        if optimizer.sparse is not None:
            optimizer.sparse.remove()
    found["seconds"] = time.process_time() - started
    if way.startswith("memory"):
        memory = require_attachment(model, None).memories()["default"].memory
        found["background_reads_changed"] = share_changed(memory, [background])
    return found


def compare_forgetting(
    load: Callable[[], tuple[Model, Any]],
    lesson: Lesson,
    background: Tensor,
    path: Path,
    *,
    ways: Sequence[str] = tuple(WAYS),
    seed: int = 0,
    how: How,
    equal: Equal = Equal(),
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """Teaches one lesson in each way to a fresh model, measures, and writes `path` after each.

    Args:
        load: gives a fresh model and its tokenizer.
        asked: `chats` and `fixed`, as `measure` takes them.
    """
    made: dict[str, Any] = {"how": asdict(how), "equal": asdict(equal), "seed": seed, "runs": {}}
    model, tokenizer = load()
    made["runs"]["as it was"] = measure(model, tokenizer, lesson, asked["chats"], asked["fixed"])
    for way in ways:
        model, tokenizer = load()
        taught = teach_equally(way, model, tokenizer, lesson, seed, how=how, equal=equal, background=background)
        made["runs"][way] = {**measure(model, tokenizer, lesson, asked["chats"], asked["fixed"]), **taught}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(made, indent=1) + "\n")
    return made
