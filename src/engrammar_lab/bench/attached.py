"""What a memory attached to SmolLM2-135M costs in decoding, and what it saves in training.

Decoding: the base by itself and the base with a memory take the same text, token by token and in turn. Training: LoRA,
a memory with the whole pass, and memories whose prefix is kept (`keep_prefix`) make the same steps, in turn.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import DynamicCache

from engrammar.attach import attach, keep_prefix, load_attached, save_attached
from engrammar.attach.attaching import require_attachment
from engrammar.cells import Column
from engrammar.serve.openai.metrics import sources_of
from engrammar.train.attached import load_base
from engrammar.train.documents import read_documents
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.recipe import BaseRecipe
from engrammar_lab.adapters.smollm import fetch_smollm
from engrammar_lab.bench.figures import line_by_line
from engrammar_lab.bench.turns import measured_in_turn, ratio, seconds_of, settle_allocator

BASE, PARAMETERS, RAM, DISK = "base", "memory, parameters", "memory, RAM", "memory, disk and cache"
LORA, WHOLE = "LoRA", "memory, whole pass"
DECODING = (Column("batch", "batch"), Column("variant", "variant"), Column("step ms", "milliseconds", ".2f"))
COLUMNS = (*DECODING, Column("over the base", "over", "+.1%"), Column("cache misses", "misses"))
table = line_by_line(COLUMNS, lambda result: result["decode"])
TRAINING = (Column("variant", "variant"), Column("tokens/s", "rate", ",.0f"), Column("of LoRA", "times", ".2f"))
train_table = line_by_line(TRAINING, lambda part: part["lines"])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run measures."""

    num_blocks: int = 0  # of the base, the first ones; 0 is all
    # The memory's settings over its layers.
    memory: dict[str, Any] = field(
        default_factory=lambda: {"rows_per_head": [50_000, 50_000], "num_heads": 4, "head_dim": 96, "conv_kernel": 4}
    )
    batches: tuple[int, ...] = (1, 16)  # batch sizes of decoding
    prompt: int = 64  # tokens before the first step
    steps: int = 160  # steps that are measured, of each variant
    # Tokens of a block in training, `train_batch` blocks a step, `train_steps` steps that are measured.
    length: int = 128
    train_batch: int = 8
    train_steps: int = 12
    corpus: str = "pocket:wiki"
    warm_tokens: int = 4096  # tokens that the cache has served before decoding begins
    # Rows that the cache in front of the disk holds.
    cache_rows: int = 40_000  # a tenth of the table


FULL = Plan()
QUICK = Plan(
    num_blocks=6, batches=(1, 4), prompt=16, steps=12, length=32, train_batch=2, train_steps=3, warm_tokens=256
)


@dataclass(frozen=True, kw_only=True)
class Bases:
    """A base model that is loaded once; `new` gives models that share its weights."""

    model: Any
    tokenizer: Any

    def new(self) -> Any:
        """Another model with the same weights, the very same tensors."""
        weights = {id(parameter): parameter for parameter in self.model.parameters()}
        return copy.deepcopy(self.model, weights)

    @property
    def num_blocks(self) -> int:
        return int(self.model.config.num_hidden_layers)

    def settings(self, plan: Plan, layer: int) -> dict[str, Any]:
        end = self.tokenizer.eos_token_id
        return {**plan.memory, "layers": [layer], "fill_id": end, "end_ids": [end], "boundary": "end"}


def load_bases(folder: Path, num_blocks: int) -> Bases:
    """The model of a folder; its first blocks, or all (0)."""
    model, tokenizer = load_base(BaseRecipe(model=str(folder), dtype="float32"))
    if num_blocks:
        del model.model.layers[num_blocks:]
        model.config.num_hidden_layers = num_blocks
    return Bases(model=model.eval(), tokenizer=tokenizer)


def real_text(bases: Bases, corpus: str, count: int) -> Tensor:
    """Ids of real text."""
    ids: list[int] = []
    for text in read_documents(corpus, cache=Path("data/pocket")):
        ids += bases.tokenizer(text).input_ids
        if len(ids) >= count:
            return torch.tensor(ids[:count])
    raise ValueError(f"{corpus} has {len(ids)} tokens; this run needs {count}: name a longer one.")


def _filled(model: Any) -> None:
    """Gives the rows and the convolution numbers, so that the memory's arithmetic is a trained one's."""
    generator = torch.Generator().manual_seed(0)
    for memory in require_attachment(model, None).memories().values():
        for parameter in memory.parameters():
            if not bool(parameter.detach().any()):
                nn.init.normal_(parameter, std=0.1, generator=generator)


def _decoders(bases: Bases, plan: Plan, folder: Path) -> dict[str, Any]:
    layer = 2 * bases.num_blocks // 3
    own = bases.new()
    attach(own, bases.settings(plan, layer), bases.tokenizer)
    _filled(own)
    save_attached(own, folder)
    stored: dict[str, dict[str, Any]] = {
        RAM: {"memory": "ram"},
        DISK: {"memory": "disk", "cache_rows": plan.cache_rows},
    }
    opened = {name: load_attached(bases.new(), folder, **settings).eval() for name, settings in stored.items()}
    return {BASE: bases.new().eval(), PARAMETERS: own.eval(), **opened}


def _misses(model: Any) -> int | None:
    """Rows that a model's caches did not hold so far."""
    caches = [cache for source in sources_of(model) for cache in source.caches().values()]
    return sum(cache.misses for cache in caches) if caches else None


@torch.no_grad()
def decode(models: dict[str, Any], ids_BT: Tensor, prompt: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Times the models in turn, token by token after a prompt, all on the same tokens.

    Returns:
        a line for each model, with what its step takes beyond the base's (by pairs: both saw the same load of the
        machine); and the last logits of each.
    """
    caches = {name: DynamicCache(config=model.config) for name, model in models.items()}
    said: dict[str, Tensor] = {}

    def step(name: str, token_BT: Tensor) -> None:
        said[name] = models[name](token_BT, past_key_values=caches[name], use_cache=True, logits_to_keep=1).logits

    for name in models:
        step(name, ids_BT[:, :prompt])
    before = {name: _misses(model) for name, model in models.items()}
    tokens = ids_BT[:, prompt:].split(1, dim=1)
    times = measured_in_turn(lambda turn, _place, name: seconds_of(step, name, tokens[turn]), models, len(tokens))
    lines = []
    for name, model in models.items():
        missed, over = _misses(model), ratio(times[name], times[BASE]) - 1
        figures = {"milliseconds": 1e3 * median(times[name]), "over": over}
        misses = None if missed is None else missed - (before[name] or 0)
        lines.append({"batch": len(ids_BT), "variant": name, **figures, "misses": misses})
    return lines, said


def _trainers(bases: Bases, plan: Plan, blocks: list[dict[str, Tensor]], folder: Path) -> dict[str, Callable[[], None]]:
    """A step of each way to train, by its name."""
    from peft import LoraConfig, get_peft_model

    def stepper(model: Any, items: Any) -> Callable[[], None]:
        settings = OptimizerSettings(memory_lr_scale=60.0, matrices="adamw", max_grad_norm=1.0)
        optimizer = build_optimizer(model, settings, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
        batch = default_collate([items[index] for index in range(plan.train_batch)])
        model.train()

        def step() -> None:
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    steps = {LORA: stepper(get_peft_model(copy.deepcopy(bases.model), lora), blocks)}
    two_thirds = 2 * bases.num_blocks // 3
    for layer in (two_thirds, bases.num_blocks - 1):
        model = attach(bases.new(), bases.settings(plan, layer), bases.tokenizer)
        if layer == two_thirds:
            steps[WHOLE] = stepper(model, blocks)
            model = attach(bases.new(), bases.settings(plan, layer), bases.tokenizer)
        kept = keep_prefix(model, blocks, folder / str(layer), batch_size=plan.train_batch)
        steps[f"memory, prefix kept, block {layer} of {bases.num_blocks}"] = stepper(model, kept)
    return steps


def _train(bases: Bases, plan: Plan, blocks: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        steps = _trainers(bases, plan, blocks, Path(folder))
        times = measured_in_turn(lambda *turn: seconds_of(steps[turn[-1]]), steps, plan.train_steps, warm_up=1)
    tokens, lora = plan.train_batch * plan.length, median(times[LORA])
    return [{"variant": name, "rate": tokens / median(own), "times": lora / median(own)} for name, own in times.items()]


def bench_attached(quick: bool, plan: Plan | None = None, base: Path | None = None) -> dict[str, Any]:
    """Times decoding steps of the base and of the base with memory, and training steps of LoRA and of a memory.

    Args:
        plan: what to measure instead of what `quick` says.
        base: the folder of another base than SmolLM2-135M-Instruct.

    Returns:
        `decode`: per batch size and variant the median milliseconds of a step, `over` the base's (median over pairs),
        and misses of the cache. `train`: per variant tokens/s, and times LoRA's. What `keep_prefix` computes once
        is not in the training figures; a pass of the base's blocks below costs it.
    """
    plan = plan or (QUICK if quick else FULL)
    bases = load_bases(base or fetch_smollm(Path("data/pocket")), plan.num_blocks)
    longest = max(plan.batches) * (plan.prompt + plan.steps)
    trained = plan.train_batch * plan.length
    ids = real_text(bases, plan.corpus, plan.warm_tokens + longest + trained)
    settle_allocator()
    decoded: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        models = _decoders(bases, plan, Path(folder) / "adapter")
        with torch.no_grad():
            models[DISK](ids[: plan.warm_tokens].view(-1, 64))
        for batch in plan.batches:
            own = ids[plan.warm_tokens :][: batch * (plan.prompt + plan.steps)]
            decoded += decode(models, own.view(batch, -1), plan.prompt)[0]
    blocks = [{"input_ids": block, "labels": block} for block in ids[-trained:].view(-1, plan.length)]
    memory = f"{plan.memory['num_heads']} heads of {plan.memory['head_dim']} for 2- and 3-grams"
    return {
        "shapes": f"SmolLM2-135M in fp32, {bases.num_blocks} blocks; one memory at two thirds of the depth, {memory}, "
        f"{plan.memory['rows_per_head'][0]:,} rows a head, convolution of {plan.memory['conv_kernel']}; "
        f"{plan.steps} steps of decoding after {plan.prompt} tokens; training on {plan.train_batch} blocks of "
        f"{plan.length} tokens a step",
        "decode": decoded,
        "train": {
            "shapes": "LoRA of rank 8 on all linear layers",
            "head_share": _head_share(bases.model),
            "lines": _train(bases, plan, blocks),
        },
    }


def _head_share(model: Any) -> float:
    """Of the multiplications of a pass, the share of the output head, which no kept prefix spares."""
    head = model.get_output_embeddings().weight.numel()
    return head / (head + sum(parameter.numel() for parameter in model.model.layers.parameters()))


def verdict(result: dict[str, Any]) -> str:
    """What attaching costs at each batch size."""
    costs = {(line["batch"], line["variant"]): line["over"] for line in result["decode"]}
    said = (f"at batch {batch} {over:+.1%} ({name})" for (batch, name), over in costs.items() if name in (RAM, DISK))
    adds = f"Attaching adds to a decoding step, by the median over pairs of steps: {', '.join(said)}."
    return f"{adds} The aims: 3 % in RAM, 5 % on disk."


def train_verdict(part: dict[str, Any]) -> str:
    """How much faster training goes where the prefix is kept, and what multiplications would allow."""
    head, said, allowed = part["head_share"], [], []
    for line in part["lines"]:
        if found := re.search(r"block (\d+) of (\d+)", line["variant"]):
            block, num_blocks = map(int, found.groups())
            said.append(f"{line['times']:.1f} times at {found[0]}")
            allowed.append(f"{1 / (head + (1 - head) * (num_blocks - block) / num_blocks):.1f}")
    return (
        f"With its prefix kept, a memory trains on more tokens a second than LoRA: {' and '.join(said)}. "
        f"The aims: 3 and 5 times. Counted in the base's multiplications it would be {' and '.join(allowed)}, since "
        f"every step computes the output head, {head:.0%} of them; LoRA multiplies more, by its own matrices."
    )
