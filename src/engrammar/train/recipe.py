"""A training run as plain settings, read from YAML with dotted overrides. `train.run` carries it out."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml

from engrammar.config import check_setting

Settings = dict[str, Any]
PLACES = ("out", "data.folder", "placement.where", "placement.folder")  # settings that do not change what is trained
OWN_ARGUMENTS = {
    "output_dir": "out",
    "seed": "seed",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "optim": "optimizer.matrices",
    "per_device_train_batch_size": "data.batch_size, sequences a step over all processes",
    "report_to": "nothing: read result.json",
}  # TrainingArguments that the recipe sets elsewhere


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Text and tokens (docs/data.md).

    Attributes:
        source: files, `pocket:NAME`, or `hf:NAME`.
        text_field: the field of a row of .jsonl, .parquet or a Hugging Face dataset that holds the text.
        tokenizer: a folder or name; None trains one of `vocab_size` tokens.
        validation_share: the share of the text that is for validation.
        limit_documents: how many documents are read, from the first on; None reads all.
        keep_share: the share of the source's documents that is used.
        similarity: a document is left out if it shares this much of its word 5-grams with an earlier one (Jaccard);
            null keeps all.
        sequence_length: tokens of a block.
        batch_size: sequences per optimizer step, over all processes and accumulated passes together.
        folder: the folder in which tokens and pocket corpora are kept.
    """

    source: str = "pocket:wiki"
    text_field: str = "text"
    tokenizer: str | None = None
    vocab_size: int = 4096
    validation_share: float = 0.02
    limit_documents: int | None = None
    keep_share: float = 1.0
    similarity: float | None = None
    sequence_length: int = 128
    batch_size: int = 16
    folder: str = "data"

    def __post_init__(self) -> None:
        check_setting("data.batch_size", self.batch_size, self.batch_size >= 1, "1 or more")
        check_setting("data.sequence_length", self.sequence_length, self.sequence_length >= 2, "2 or more")
        check_setting("data.keep_share", self.keep_share, 0 < self.keep_share <= 1, "over 0, up to 1")
        share = self.validation_share
        check_setting("data.validation_share", share, 0 <= share < 1, "0 up to, not including, 1")
        like = self.similarity
        check_setting("data.similarity", like, like is None or 0 < like <= 1, "over 0, up to 1, or null to keep all")
        limit = self.limit_documents
        check_setting("data.limit_documents", limit, limit is None or limit >= 1, "1 or more, or null for all")


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The model to train."""

    preset: str = "nano"  # the name of a preset
    # `preset` keeps the preset's memory; `none` leaves it out; `budget` starts from the plain model and moves a share
    # 1 - rho of its inactive parameters into memory, at equal total and active parameters.
    memory: Literal["preset", "none", "budget"] = "preset"
    rho: float = 0.78  # the experts' share of the inactive parameters, for `budget`
    # Settings of EngrammarConfig that replace the preset's; those in `memory` replace the preset's memory settings one
    # by one.
    settings: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        from engrammar.model.presets import PRESETS

        check_setting("model.preset", self.preset, self.preset in PRESETS, ", ".join(PRESETS))
        check_setting("model.rho", self.rho, 0 < self.rho <= 1, "over 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """The optimizer; see `OptimizerSettings`. `lr` is that of the backbone, `balance_rate` that of `LoadBalancing`."""

    lr: float = 2e-3
    weight_decay: float = 0.1
    memory_lr_scale: float = 5.0
    matrices: Literal["muon", "adamw"] = "muon"
    memory: Literal["row_adam", "adam", "sinkhorn", "dense_adam"] = "row_adam"
    balance_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("weight_decay", "memory_lr_scale", "balance_rate"):
            check_setting(f"optimizer.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check_setting("optimizer.lr", self.lr, self.lr > 0, "over 0")


@dataclass(frozen=True, kw_only=True)
class PlacementRecipe:
    """Where the tables are in training (docs/placement.md). `folder` is the folder of the file; null is `out`."""

    where: Literal["device", "ram", "file"] = "device"
    folder: str | None = None
    overlap: Literal["auto", "none", "exact", "stale"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run. `trainer` holds any of transformers' TrainingArguments.

    `chunked_loss` is that of `EngrammarForCausalLM`.
    """

    out: str = "runs/nano"
    seed: int = 0
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    placement: PlacementRecipe = field(default_factory=PlacementRecipe)
    chunked_loss: bool = False
    trainer: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_measured(self.data)


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """The model that a memory is attached to."""

    model: str = ""  # a folder, or a name on the Hub, of a causal language model of transformers
    # The file in it that holds the weights, if it is of that kind (needs the package gguf).
    gguf_file: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # the precision of its weights; `auto` is that of the file


@dataclass(frozen=True, kw_only=True)
class SparseRecipe:
    """Which rows a step trains (`train.sparse.SparseRows`)."""

    # Of each layer the most rows that a step trains: those that its text reads often and the background seldom; 0 for
    # no limit.
    rows: int = 0
    most_common: float = 1.0  # the share of background blocks that may read a row which is trained; 1 for no limit
    background: str = "pocket:wiki"  # text that should stay as it is, as of `data.source`
    blocks: int = 4096  # blocks of it

    def __post_init__(self) -> None:
        check_setting("sparse.rows", self.rows, self.rows >= 0, "1 or more, or 0 for all")
        check_setting("sparse.most_common", self.most_common, 0 <= self.most_common <= 1, "0 to 1")
        check_setting("sparse.blocks", self.blocks, self.blocks >= 1, "1 or more")


@dataclass(frozen=True, kw_only=True)
class AttachRecipe:
    """Everything that decides a run of `engrammar attach`: training a memory on a model that exists."""

    out: str = "runs/attached"
    seed: int = 0
    base: BaseRecipe = field(default_factory=BaseRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)  # the text; its tokenizer is the model's own
    # Settings of MemoryConfig. `layers` may be left out (two thirds of the depth), as may `fill_id`, `end_ids` and
    # `boundary` (look-back ends at the tokenizer's end of text).
    memory: Settings = field(default_factory=dict)
    train: Literal["memory", "joint"] = "memory"  # the memory alone, or the model with it
    keep_prefix: bool = True  # whether what lies below the memory is computed once and kept in `out` (docs/attach.md)
    # `lr` is that of the fusion (and of the model, if it is trained).
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    sparse: SparseRecipe = field(default_factory=SparseRecipe)  # which rows a step trains
    placement: PlacementRecipe = field(default_factory=PlacementRecipe)
    trainer: Settings = field(default_factory=dict)  # any of transformers' TrainingArguments

    def __post_init__(self) -> None:
        check_setting("base.model", self.base.model, bool(self.base.model), "a folder or a name on the Hub")
        given = self.data.tokenizer
        check_setting("data.tokenizer", given, given is None, "null; the model's own is used")
        holds = self.train == "memory" or not self.keep_prefix
        check_setting("keep_prefix", self.keep_prefix, holds, "false if the model is trained too")
        check_measured(self.data)


def check_measured(data: DataRecipe) -> None:
    """Raises a ValueError if a run on `data` would have no text to be measured on."""
    share = data.validation_share
    check_setting("data.validation_share", share, share > 0, "over 0, since a run is measured on its validation text")


Kind = TypeVar("Kind", bound=Recipe | AttachRecipe)
Built = TypeVar("Built")


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """As `read_recipe`, a recipe that trains a model from the beginning."""
    return read_recipe(name, overrides, Recipe)


def read_recipe(name: str | Path, overrides: Sequence[str], kind: type[Kind]) -> Kind:
    """Reads a YAML recipe (a file, or one that ships with the package by name) and applies `a.b.c=value` overrides.

    Raises:
        ValueError: there is no such recipe, it is not YAML, a setting is unknown, or a value has the wrong kind.
    """
    path = Path(name)
    if not path.is_file():
        shipped = resources.files("engrammar") / "recipes"
        if not (shipped / f"{name}.yaml").is_file():
            known = ", ".join(sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir()))
            raise ValueError(f"There is no recipe file {name}, and none of that name ships; shipped are: {known}.")
        text = (shipped / f"{name}.yaml").read_text()
    else:
        text = path.read_text(errors="replace")
    settings = _parse_yaml(text, str(name))
    if not isinstance(settings, dict):
        raise ValueError(f"{name} holds no settings: write section: or section.setting lines.")
    return read_settings(kind, overrides, settings)


def read_settings(kind: type[Built], overrides: Sequence[str], settings: Settings | None = None) -> Built:
    """Builds a (nested) dataclass of settings, its defaults replaced by `settings` and then by `a.b.c=value` overrides.

    Raises:
        ValueError: a setting is unknown, or a value has the wrong kind; names those that are known or allowed.
    """
    settings = {} if settings is None else settings
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"The override {override!r} has no '=': write section.setting=value.")
        *sections, last = key.split(".")
        target = settings
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ValueError(f"The override {override!r} goes into {section!r}, which is not a section.")
        target[last] = _parse_yaml(value, f"The override {override!r}")
    built: Built = _build(kind, settings, "")
    return built


def _parse_yaml(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}.") from error


def _build(kind: Any, settings: Any, where: str) -> Any:
    """Builds a (nested) recipe dataclass from plain settings, checking names and kinds."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where or 'The recipe'} is {settings!r}; a section of settings is expected.")
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    values = {}
    for name, value in settings.items():
        setting = f"{where}.{name}" if where else name
        if name not in known:
            raise ValueError(f"There is no setting {setting!r}; known here: {', '.join(known)}.")
        hint = hints[name]
        values[name] = _build(hint, value, setting) if is_dataclass(hint) else _check(hint, value, setting)
    return kind(**values)


def _check(hint: Any, value: Any, setting: str) -> Any:
    choices = getattr(hint, "__args__", (hint,))
    if getattr(hint, "__origin__", None) is Literal:
        allowed, holds = ", ".join(map(str, choices)), value in choices
    elif hint == Settings:
        allowed, holds = "a section of settings", isinstance(value, dict)
    else:
        if float in choices and isinstance(value, str | int) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML reads 1e-3 as text
        allowed = " or ".join("null" if c is type(None) else c.__name__ for c in choices)
        holds = isinstance(value, choices) and not (isinstance(value, bool) and bool not in choices)
    check_setting(setting, value, holds, allowed)
    return value


def flat(settings: Mapping[str, Any], prefix: str = "") -> Settings:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: Settings = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def to_yaml(recipe: Recipe | AttachRecipe) -> str:
    """The resolved recipe as YAML, with every setting written out; `load_recipe` reads back an equal one."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False)


def check_trainer(recipe: Recipe | AttachRecipe) -> Settings:
    """The recipe's TrainingArguments as transformers takes them; raises a ValueError that names a wrong one."""
    from transformers import TrainingArguments

    # YAML reads a bare `no` as false, and "no" is what transformers calls an absent strategy.
    settings = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in recipe.trainer.items()}
    unknown = sorted(set(settings) - {field.name for field in fields(TrainingArguments)})
    if unknown:
        raise ValueError(f"trainer.{unknown[0]} is not one of transformers' TrainingArguments.")
    for name in settings:
        if name in OWN_ARGUMENTS:
            raise ValueError(f"trainer.{name} is not read from a recipe; its setting is {OWN_ARGUMENTS[name]}.")
    for name in ("max_grad_norm", "max_steps"):
        if not isinstance(settings.get(name, 1), int | float) or (settings.get(name) == 0 and name == "max_steps"):
            raise ValueError(f"trainer.{name} is {settings[name]!r}; allowed: a number (of steps: 1 or more, or -1).")
    if settings.get("save_only_model"):
        raise ValueError("trainer.save_only_model is True; allowed: false, since a killed run resumes its optimizer.")
    return settings
