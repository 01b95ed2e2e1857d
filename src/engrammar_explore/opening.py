"""Opens what is to be explored: a model of ours, one with an attached memory, or any other, with patches or without."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engrammar.edit import Patch, read_patch
from engrammar.memory import Memory
from engrammar.tables.headers import Requirement, load_json
from engrammar.train.attached import load_base
from engrammar.train.recipe import BaseRecipe
from engrammar.train.sample import load, load_with_adapter
from engrammar_explore.census import CensusSettings, build_census, open_census
from engrammar_explore.looking import LookSettings
from engrammar_explore.session import Explored, Session
from engrammar_explore.watching import places_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is opened.

    Attributes:
        model: a folder, or the name of a model on the Hub.
        adapter: the folder of an attached memory.
        patches: files of patches to apply.
        memory: where the memory's tables are.
        cache_rows: rows of each table kept in RAM in front of the disk.
        census: a census file of the model's memory.
    """

    model: str
    adapter: Path | None = None
    patches: Sequence[Path] = ()
    memory: Literal["weights", "ram", "disk"] = "weights"
    cache_rows: int = 0
    census: Path | None = None


def open_session(source: Source, settings: LookSettings | None = None) -> Session:
    """Loads a model and everything that belongs to it.

    Raises:
        ValueError: something is missing, damaged, or of another model.
    """
    patches: list[Patch] = [read_patch(path) for path in source.patches]
    model, tokenizer = open_model(source)
    census = None if source.census is None else open_census(source.census, memory_in(model), tokenizer)
    title = Path(source.model).name + (f" with {source.adapter.name}" if source.adapter else "")
    explored = Explored(model=model, tokenizer=tokenizer, title=title, census=census)
    return Session(explored, settings, patches)


def open_model(source: Source) -> tuple[Any, Any]:
    """The model, in evaluation, and its tokenizer."""
    serving: dict[str, Any] = {}
    if source.memory != "weights":
        serving = {"memory": source.memory, "cache_rows": source.cache_rows}
    elif source.cache_rows:
        raise ValueError("--cache-rows is for tables off the model: add --memory disk.")
    if source.adapter is not None:
        model, tokenizer = load_with_adapter(source.model, source.adapter, **serving)
    elif _is_ours(Path(source.model)):
        model, tokenizer = load(Path(source.model), **serving)
    elif serving:
        raise ValueError(f"{source.model} has no memory whose tables could be elsewhere: leave --memory out.")
    else:
        model, tokenizer = load_base(BaseRecipe(model=source.model))
    return model.eval().requires_grad_(False), tokenizer


def _is_ours(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        return False
    content = load_json(path.read_bytes(), Requirement(path))
    return isinstance(content, dict) and content.get("model_type") == "engrammar"


def memory_in(model: Any) -> Memory:
    """The one memory of a model; raises a ValueError if it has none, or several."""
    memories = {id(place.memory): place for place in places_of(model)}
    if len(memories) != 1:
        names = ", ".join(place.name for place in memories.values()) or "none"
        raise ValueError(f"A census is of one memory, and this model has {names}: give a model or an adapter with one.")
    return next(iter(memories.values())).memory


def make_census(source: Source, corpus: str, out: Path, settings: CensusSettings) -> dict[str, Any]:
    """`build_census` of a model's memory."""
    model, tokenizer = open_model(source)
    return build_census(memory_in(model), tokenizer, corpus, out, settings)
