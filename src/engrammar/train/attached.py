"""Trains a memory on a model that exists, as a recipe says, and saves it as an adapter.

Letters: V ids of the vocabulary.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from engrammar.attach import attach, disabled, keep_prefix, save_attached, set_trainable
from engrammar.attach.attached import AttachedMemory
from engrammar.attach.attaching import only_memory, save_base
from engrammar.attach.blocks import find_decoder
from engrammar.config import MemoryConfig
from engrammar.tables.sealed import check_writable, write_text, writing
from engrammar.tables.shards import is_table
from engrammar.train.data import TokenSet, prepare
from engrammar.train.recipe import AttachRecipe, BaseRecipe, DataRecipe, to_yaml
from engrammar.train.run import (
    final_checkpoint,
    finish_steps,
    last_checkpoint,
    progress,
    trainer_settings,
    training_arguments,
)
from engrammar.train.sparse import SparseRows, share_changed
from engrammar.train.trainer import EngrammarTrainer

ADAPTER, MODEL, PREFIX = "adapter", "model", "prefix"


def load_base(base: BaseRecipe) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and its tokenizer; raises a ValueError if either cannot be loaded."""
    given: dict[str, Any] = {} if base.gguf_file is None else {"gguf_file": base.gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.model, **given)
        auto = auto_class(AutoConfig.from_pretrained(base.model, **given))
        model = auto.from_pretrained(base.model, dtype=base.dtype, **given)
    except Exception as error:  # transformers raises many kinds, with messages of many lines
        reason = str(error).split("\n")[0]
        raise ValueError(f"cannot load a causal language model from {base.model}: {reason}") from error
    return model, tokenizer


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that loads a model which continues text: some that read images are known by another one."""
    kind = type(config)
    images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def memory_settings(recipe: AttachRecipe, num_blocks: int, tokenizer: PreTrainedTokenizerBase) -> MemoryConfig:
    """The recipe's memory, with what it leaves out: the block at two thirds of the depth, and the end of text."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    chosen: dict[str, Any] = {"layers": [2 * num_blocks // 3]}
    if end is not None:
        chosen |= {"fill_id": end if pad is None else pad, "boundary": "end", "end_ids": [end]}
    return MemoryConfig.from_json(chosen | recipe.memory)


class AttachedTrainer(EngrammarTrainer):
    """As `EngrammarTrainer`, for a memory of which a step may train some rows only."""

    sparse: SparseRows | None = None  # chooses the rows that a step trains; None: all that it reads

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        self.mixed_optimizer.sparse = self.sparse
        return optimizer


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model, its tokenizer, and the text that a memory of it is trained on."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    tokens: TokenSet


def read_text(recipe: AttachRecipe) -> Prepared:
    """Loads the base, and turns the text into tokens of its own tokenizer."""
    model, tokenizer = load_base(recipe.base)
    tokenizer.save_pretrained(Path(recipe.out, "tokenizer"))
    return Prepared(model=model, tokenizer=tokenizer, tokens=_prepare(recipe, "tokens", recipe.data))


def _prepare(recipe: AttachRecipe, name: str, text: DataRecipe) -> TokenSet:
    """A text in tokens of the base's own tokenizer, in the folder `name` of the run."""
    out, cache = Path(recipe.out), Path(recipe.data.folder) / "pocket"
    return prepare(replace(text, tokenizer=str(out / "tokenizer")), out=out / name, cache=cache)


def prepare_attached(recipe: AttachRecipe) -> Prepared:
    """Loads the base and the text, and attaches the memory."""
    ready = read_text(recipe)
    set_seed(recipe.seed)
    config = memory_settings(recipe, len(find_decoder(ready.model).blocks), ready.tokenizer)
    attach(ready.model, config, ready.tokenizer)
    set_trainable(ready.model, recipe.train)
    return ready


def plan_attached(recipe: AttachRecipe) -> str:
    """What `train_attached` would do: loads the base and the text, attaches the memory, and trains nothing."""
    with TemporaryDirectory() as folder:
        ready = prepare_attached(replace(recipe, out=folder))
        _, attached = only_memory(ready.model, None)
        blocks, config = len(ready.tokens.blocks("train", recipe.data.sequence_length)), attached.config
        num_steps = recipe.trainer.get("max_steps", -1)
        if num_steps < 0:
            num_steps = math.ceil(recipe.trainer.get("num_train_epochs", 3) * -(-blocks // recipe.data.batch_size))
        tables = _in_tables(attached)
        base = next(find_decoder(ready.model).blocks.parameters())
        kept = blocks * recipe.data.sequence_length * attached.place.hidden_size * attached.place.num_branches
        own = sum(p.numel() for p in ready.model.parameters()) - _trained(attached)
        lines = [
            f"{recipe.base.model}: {own:,} parameters, {len(find_decoder(ready.model).blocks)} blocks",
            f"memory at block {', '.join(map(str, config.layers))}: {tables:,} parameters in tables, "
            f"{_trained(attached) - tables:,} in the fusion",
            f"text: {ready.tokens.num_tokens('train'):,} tokens for training, "
            f"{ready.tokens.num_tokens('validation'):,} for validation",
            f"training: {num_steps:,} steps of {_tokens_per_step(recipe):,} tokens",
        ]
        if recipe.keep_prefix:
            lines.append(f"kept on disk: {kept * base.itemsize / 1e6:,.0f} MB of what lies below the memory")
        return "\n".join(lines)


def train_attached(recipe: AttachRecipe) -> dict[str, Any]:
    """Carries out a recipe: base, text, memory, training, evaluation, and the adapter in `out/adapter`.

    A killed run continues from its last checkpoint and gives the same bits; a finished one is not repeated. Under
    torchrun every process calls this, on one file system, and the rows are shared over them.

    Returns:
        What `out/result.json` holds: trained parameters, bits per byte of the validation text without and with the
        memory, the curve, and tokens per second of the steps that this call made (None if it made none).

    Raises:
        ValueError: a setting is wrong, the model cannot be loaded or is refused by `attach`, `out` is not writable or
            holds another recipe's run, or a checkpoint is damaged.
        OSError: the disk is full or failed; the same call continues from the last good checkpoint.
    """
    out = Path(recipe.out)
    check_writable(out)
    arguments = training_arguments(recipe)
    arguments.remove_unused_columns = False  # `kept_hidden` is no argument of the base
    checkpoint = last_checkpoint(recipe)
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text())
    state, trained = progress(checkpoint)
    with arguments.main_process_first(desc="the text and what lies below the memory"):
        with writing("recipe.yaml", out):
            write_text(out / "recipe.yaml", to_yaml(recipe))
        ready = prepare_attached(recipe)
        blocks = _blocks(recipe, ready)
    trainer = _trainer(recipe, ready, arguments, blocks)
    background = _background(recipe)
    if background:
        rows, most_common = recipe.sparse.rows or None, recipe.sparse.most_common
        trainer.sparse = SparseRows(ready.model, background, rows, most_common=most_common)
    if checkpoint and trained:
        finished = final_checkpoint(arguments, checkpoint, state)
        trainer.place(finished)
        trainer._load_from_checkpoint(str(finished))
    tokens_per_second = finish_steps(trainer, recipe, checkpoint, state, trained)
    result = _measured(ready.model, trainer) | {
        "tokens_per_second": tokens_per_second,
        "steps": trainer.state.global_step,
        "curve": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    if trainer.sparse is not None:
        trainer.sparse.remove()
        result["background_reads_changed"] = share_changed(trainer.sparse.memory, background)
    with writing("the adapter", out):
        save_attached(ready.model, out / ADAPTER)  # every process gives its rows
        if arguments.should_save:
            _finish(recipe, ready, result)
    trainer.accelerator.wait_for_everyone()
    return result


def _finish(recipe: AttachRecipe, ready: Prepared, result: dict[str, Any]) -> None:
    """Writes the base if it was trained too, the adapter's model card, and the result."""
    out, base = Path(recipe.out), recipe.base.model
    if recipe.train == "joint":
        base = str(out / MODEL)
        save_base(ready.model, base)
        ready.tokenizer.save_pretrained(base)
    write_text(out / ADAPTER / "README.md", model_card(recipe, ready, base, result))
    write_text(out / "result.json", json.dumps(result, indent=1) + "\n")


def _blocks(recipe: AttachRecipe, ready: Prepared) -> dict[str, Any]:
    """The text in blocks, for training and for validation, with what the base computes below the memory."""
    out, length = Path(recipe.out), recipe.data.sequence_length
    blocks: dict[str, Any] = {split: ready.tokens.blocks(split, length) for split in ("train", "validation")}
    if not recipe.keep_prefix:
        return blocks
    return {
        split: keep_prefix(ready.model, items, out / f"{PREFIX}-{split}", batch_size=recipe.data.batch_size)
        for split, items in blocks.items()
    }


def _background(recipe: AttachRecipe) -> list[Tensor]:
    """Blocks [B, T] of the text that should stay as it is; none if every row is trained."""
    if not recipe.sparse.rows and recipe.sparse.most_common == 1:
        return []
    source, enough = recipe.sparse.background, 4 * recipe.sparse.blocks
    text = replace(recipe.data, source=source, limit_documents=enough, validation_share=0.0)
    blocks = _prepare(recipe, "background", text).blocks("train", recipe.data.sequence_length)
    read = [blocks[index]["input_ids"] for index in range(min(recipe.sparse.blocks, len(blocks)))]
    return list(torch.stack(read).split(64))


def _trainer(recipe: AttachRecipe, ready: Prepared, arguments: Any, blocks: dict[str, Any]) -> AttachedTrainer:
    return AttachedTrainer(
        ready.model,
        arguments,
        **trainer_settings(recipe, ready.tokens),
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=ready.tokenizer,
        data_collator=default_data_collator,  # blocks have one length, so nothing is padded
    )


def _tokens_per_step(recipe: AttachRecipe) -> int:
    return recipe.data.batch_size * recipe.data.sequence_length


def _in_tables(attached: AttachedMemory) -> int:
    return sum(math.prod(attached.memory.table(layer).shape) for layer in attached.config.layers)


def _trained(attached: AttachedMemory) -> int:
    return sum(parameter.numel() for parameter in attached.parameters())


def _measured(model: nn.Module, trainer: AttachedTrainer) -> dict[str, Any]:
    """Sizes, and bits per byte of the validation text without and with the memory."""
    _, attached = only_memory(model, None)
    found: dict[str, Any] = {
        "fusion_parameters": sum(p.numel() for name, p in attached.named_parameters() if not is_table(name)),
        "table_parameters": _in_tables(attached),
        "layers": list(attached.config.layers),
    }
    for name, context in (("without_memory", disabled(model)), ("with_memory", nullcontext())):
        with context:
            metrics = trainer.evaluate()
        found[name] = {"loss": metrics["eval_loss"], "bits_per_byte": metrics["eval_bits_per_byte"]}
    return found


def model_card(recipe: AttachRecipe, ready: Prepared, base: str, result: dict[str, Any]) -> str:
    """The adapter's README, with what was measured; `base` is the model that it belongs on."""
    num_tokens = ready.tokens.num_tokens("train")
    scores = {name: result[name]["bits_per_byte"] for name in ("without_memory", "with_memory")}
    auto = auto_class(ready.model.config).__name__
    return f"""---
base_model: {base}
library_name: engrammar
---
# An n-gram memory for {base}

Attached by engrammar at block {", ".join(map(str, result["layers"]))}; the model's own weights are unchanged.

| | |
|---|---|
| text | `{recipe.data.source}`, {num_tokens:,} tokens |
| trained | {"the memory alone" if recipe.train == "memory" else "the memory and the model"}, {result["steps"]} steps of {_tokens_per_step(recipe):,} tokens, seed {recipe.seed} |
| parameters | {result["fusion_parameters"]:,} of the fusion, {result["table_parameters"]:,} in tables |
| bits per byte of held-out text | {scores["without_memory"]:.4f} without the memory, {scores["with_memory"]:.4f} with it |

```python
from transformers import {auto}, AutoTokenizer
import engrammar

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = {auto}.from_pretrained("{base}")
engrammar.load_attached(model, "this folder", tokenizer)
```
"""  # noqa: E501
