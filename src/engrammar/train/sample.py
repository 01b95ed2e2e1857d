"""Continues a prompt with a trained model and the tokenizer that its addresses belong to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import StoppingCriteria, StoppingCriteriaList, set_seed

from engrammar.attach import load_attached
from engrammar.config import check_setting
from engrammar.edit.applying import apply_patch
from engrammar.edit.forms import in_chat
from engrammar.edit.written import kept_files
from engrammar.model.configuration import EngrammarConfig, load_config
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.stores.base import RowStore
from engrammar.stores.mooncake.pool import PoolServer
from engrammar.stores.mooncake.store import RemoteStore
from engrammar.tables.folder import TableFile, open_tables
from engrammar.tables.headers import read_json
from engrammar.train.attached import load_base
from engrammar.train.recipe import BaseRecipe
from engrammar.vocabulary import load_tokenizer


def load(
    directory: str | Path, *, device: str | None = None, tables: Path | None = None, **serving: Any
) -> tuple[Any, Any]:
    """Loads the model and tokenizer of a folder that training wrote, or of a released Qwen4-Exp model.

    Args:
        device: the model's device; by default the accelerator if there is one, else the CPU.
        tables: for a released model, the folder that `engrammar table import` made of its tables.
        serving: `memory`, `cache_rows`, `on_missing` and `deadline` of `EngrammarForCausalLM.from_pretrained`.

    Raises:
        ValueError: the folder is not a checkpoint, a shard is damaged, or the tokenizer is not the model's.
    """
    model: Any
    directory = Path(directory)
    if tables is None:
        load_config(directory)
        model = EngrammarForCausalLM.from_pretrained(directory, **serving)
    else:
        from engrammar.released import Qwen4ExpForCausalLM  # loads transformers' module of these models

        model = Qwen4ExpForCausalLM.from_pretrained(directory, tables=tables, **serving)
    if not (directory / "tokenizer.json").exists():
        raise ValueError(
            f"{directory} has no tokenizer.json: copy the tokenizer that the model was trained with there."
        )
    tokenizer = load_tokenizer(directory)
    if tables is None:
        model.config.check_tokenizer(tokenizer)
    return model.eval().to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def load_changed(
    model: str, *, adapter: Path | None, patch: Path | None, tables: Path | None, **serving: Any
) -> tuple[Any, Any]:
    """Loads a model with what is to be added to it: an attached memory, a patch; and the patches kept in its folder.

    Args:
        model: as for `load`, or the folder of any other causal language model of transformers; with an adapter or a
            patch, also its name on the Hub.
        adapter, patch: what `save_attached` and `edit.write_patch` wrote.

    Raises:
        ValueError: as `load`, `load_attached` and `apply_patch`; or an adapter is given beside tables.
    """
    if adapter and tables:
        raise ValueError("--tables and --adapter do not go together: an adapter has its own tables.")
    if adapter:
        loaded = load_with_adapter(model, adapter, **serving)
    elif (patch or kept_files(model) or _is_another(Path(model))) and not tables and not serving:
        loaded = load_base(BaseRecipe(model=model))
        loaded[0].eval()
    else:
        loaded = load(Path(model), tables=tables, **serving)
    for path in [*kept_files(model), *([patch] if patch else [])]:
        apply_patch(loaded[0], path, loaded[1])
    return loaded


def _is_another(folder: Path) -> bool:
    """Whether a folder holds a model of transformers that is not ours."""
    try:
        kind = read_json(folder / "config.json").get("model_type")
    except ValueError:
        return False  # `load` says what is wrong
    return kind not in (None, EngrammarConfig.model_type)


def load_with_adapter(model: str, adapter: Path, *, device: str | None = None, **serving: Any) -> tuple[Any, Any]:
    """Loads a base and its tokenizer, and attaches a saved memory to it.

    Args:
        model: the base, a folder or a name on the Hub.
        adapter: the folder that `save_attached` or `engrammar attach` wrote.
        serving: as for `load`.

    Raises:
        ValueError: the base cannot be loaded, or is not the one that the memory was attached to.
    """
    base, tokenizer = load_base(BaseRecipe(model=model))
    load_attached(base, adapter, tokenizer, **serving)
    return base.eval().to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def pool_store(directory: Path, name: str, address: str) -> Callable[[TableFile], RowStore]:
    """Returns the function that opens each table's store in a Mooncake pool, for `from_pretrained(memory=...)`.

    Args:
        directory: the model's folder, whose geometry the pool's tables must have.
        name: the name that the tables were uploaded under; the table of layer L is `name`/L.
        address: the address of `mooncake_master`, as HOST:PORT.
    """
    server, geometry = PoolServer(address=address), open_tables(directory).geometry

    def open_store(table: TableFile) -> RowStore:
        shape = {"num_rows": table.num_rows, "row_bytes": table.row_bytes}
        return RemoteStore(f"{name}/{table.layer}", server, encoding=table.encoding, geometry=geometry, **shape)

    return open_store


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt; `temperature` 0 is greedy, `chat` asks it in the chat template of the model."""

    max_new_tokens: int = 60
    temperature: float = 0.8
    top_p: float = 0.95
    num_beams: int = 1
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        check_setting("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more")
        check_setting("temperature", self.temperature, self.temperature >= 0, "0 or more")
        check_setting("top_p", self.top_p, 0 < self.top_p <= 1, "over 0, up to 1")
        check_setting("num_beams", self.num_beams, self.num_beams >= 1, "1 or more")


def complete(model: Any, tokenizer: Any, prompt: str, sampling: Sampling) -> str:
    """Returns the prompt and its continuation; in a chat, the answer alone."""
    text = in_chat(tokenizer, prompt) if sampling.chat else prompt
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    if inputs.input_ids.numel() == 0:
        raise ValueError("The prompt is empty: give at least one token to continue.")
    set_seed(sampling.seed)
    how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    with tqdm(desc="generating", total=sampling.max_new_tokens, unit="token", delay=2, leave=False) as bar:
        ids = model.generate(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=sampling.max_new_tokens,
            num_beams=sampling.num_beams,
            stopping_criteria=StoppingCriteriaList([_Advance(bar)]),
            **(how if sampling.temperature > 0 else {"do_sample": False}),
        )
    first = inputs.input_ids.shape[1] if sampling.chat else 0
    return tokenizer.decode(ids[0, first:], skip_special_tokens=True)


@final
class _Advance(StoppingCriteria):
    """A stopping criterion that never stops: it moves a progress bar, since transformers asks it at each step."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
