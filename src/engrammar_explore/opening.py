"""Opens what is to be explored: a model of ours, one with an attached memory, or any other, with patches or without."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engrammar.edit import Patch, read_patch
from engrammar.memory import Memory
from engrammar.serve.openai.loading import is_ours, load_served, with_kept
from engrammar_explore.census import Census
from engrammar_explore.looking import LookSettings
from engrammar_explore.session import Explored, Session
from engrammar_explore.watching import places_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is opened."""

    model: str  # a folder, or the name of a model on the Hub
    adapter: Path | None = None  # the folder of an attached memory
    patches: Sequence[Path] = ()  # files of patches to apply
    memory: Literal["weights", "ram", "disk"] = "weights"  # where the memory's tables are
    cache_rows: int = 0  # rows of each table kept in RAM in front of the disk
    census: Path | None = None  # a census file of the model's memory
    kept: Path | None = None  # as of `Explored`


def open_session(source: Source, settings: LookSettings | None = None) -> Session:
    """Loads a model and everything that belongs to it.

    Raises:
        ValueError: something is missing, damaged, or of another model.
    """
    patches: list[Patch] = [read_patch(path) for path in with_kept(source.model, source.patches)]
    model, tokenizer = open_model(source)
    census = None if source.census is None else Census(source.census, memory_in(model), tokenizer)
    title = Path(source.model).name + (f" with {source.adapter.name}" if source.adapter else "")
    explored = Explored(model=model, tokenizer=tokenizer, title=title, census=census, kept=source.kept)
    return Session(explored, settings, patches)


def open_model(source: Source) -> tuple[Any, Any]:
    """The model, in evaluation, and its tokenizer."""
    serving: dict[str, Any] = {}
    if source.memory != "weights":
        serving = {"memory": source.memory, "cache_rows": source.cache_rows}
    elif source.cache_rows:
        raise ValueError("--cache-rows is for tables off the model: add --memory disk.")
    if serving and source.adapter is None and not is_ours(source.model):
        raise ValueError(f"{source.model} has no memory whose tables could be elsewhere: leave --memory out.")
    model, tokenizer = load_served(source.model, adapter=source.adapter, **serving)
    return model.requires_grad_(False), tokenizer


def memory_in(model: Any) -> Memory:
    """The one memory of a model; raises a ValueError if it has none, or several."""
    memories = {id(place.memory): place for place in places_of(model)}
    if len(memories) != 1:
        names = ", ".join(place.name for place in memories.values()) or "none"
        raise ValueError(f"A census is of one memory, and this model has {names}: give a model or an adapter with one.")
    return next(iter(memories.values())).memory
