"""A training run as plain settings: YAML in, dotted overrides, one function that carries it out."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import yaml

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from engrammar.configuration import EngrammarConfig
    from engrammar.modeling import EngrammarForCausalLM
    from engrammar.train.data import TokenSet
    from engrammar.train.trainer import EngrammarTrainer

Settings = dict[str, Any]
PLACES = ("out", "data.folder")  # settings that say where, not what
OWN_ARGUMENTS = {
    "output_dir": "out",
    "seed": "seed",
    "learning_rate": "optimiser.lr",
    "weight_decay": "optimiser.weight_decay",
    "optim": "optimiser.matrices",
    "report_to": "nothing: read result.json",
}  # TrainingArguments that the recipe sets elsewhere


def _require(setting: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{setting} is {value!r}; allowed: {allowed}.")


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Text and tokens. `source`: files, `pocket:NAME`, or `hf:NAME` (docs/data.md)."""

    source: str = "pocket:wiki"
    tokenizer: str | None = None
    vocab_size: int = 4096
    validation_share: float = 0.02
    limit_documents: int | None = None
    sequence_length: int = 128
    folder: str = "data"

    def __post_init__(self) -> None:
        _require("data.sequence_length", self.sequence_length, self.sequence_length >= 2, "2 or more")


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The model: a preset's name, `settings` over it (any of EngrammarConfig, those of `memory` over the preset's own),
    and how its budget is split.

    memory: `preset` keeps the preset's memory; `none` leaves it out; `budget` starts from the plain model and moves a
    share 1 - rho of its inactive parameters into memory, total and active parameters equal.
    """

    preset: str = "nano"
    memory: Literal["preset", "none", "budget"] = "preset"
    rho: float = 0.78
    settings: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        from engrammar.presets import PRESETS

        _require("model.preset", self.preset, self.preset in PRESETS, ", ".join(PRESETS))
        _require("model.rho", self.rho, 0 < self.rho <= 1, "over 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class OptimiserRecipe:
    lr: float = 2e-3
    weight_decay: float = 0.1
    memory_lr_scale: float = 5.0
    matrices: Literal["muon", "adamw"] = "muon"
    memory: Literal["adam", "row_adam", "sinkhorn"] = "adam"
    balance_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("weight_decay", "memory_lr_scale", "balance_rate"):
            _require(f"optimiser.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _require("optimiser.lr", self.lr, self.lr > 0, "over 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run. `trainer` holds any of transformers' TrainingArguments."""

    out: str = "runs/nano"
    seed: int = 0
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    optimiser: OptimiserRecipe = field(default_factory=OptimiserRecipe)
    trainer: Settings = field(default_factory=dict)


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe (a file, or one that ships with the package by name) and applies `a.b.c=value` overrides.

    Raises:
        ValueError: no such recipe, not YAML, an unknown setting, or a value of the wrong kind.
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
    return _build(Recipe, settings, "")


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
    if not holds:
        raise ValueError(f"{setting} is {value!r}; allowed: {allowed}.")
    return value


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every setting written out; `load_recipe` reads it back equal."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False)


def check_writable(directory: Path) -> None:
    """Makes `directory`, or raises a ValueError that says why it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"Cannot write to {directory} ({error.strerror}): choose another `out`.") from error


def build_config(recipe: ModelRecipe, tokenizer: Any, classes_V: Any) -> "EngrammarConfig":
    """The model's config for this tokenizer, by the recipe's way of splitting its budget."""
    from engrammar.budget import solve_budget
    from engrammar.presets import PRESETS, preset

    settings = dict(recipe.settings)
    if isinstance(settings.get("memory"), dict):
        settings["memory"] = {**(PRESETS.get(recipe.preset, {}).get("memory") or {}), **settings["memory"]}
    own = preset(recipe.preset, tokenizer=tokenizer, classes_V=classes_V, **settings)
    if recipe.memory == "preset":
        return own
    plain = preset(recipe.preset, tokenizer=tokenizer, **(recipe.settings | {"memory": None}))
    if recipe.memory == "none":
        return plain
    if own.memory_config is None:
        raise ValueError(
            f"model.memory is 'budget', but {recipe.preset} has no memory to size: set model.settings.memory."
        )
    return solve_budget(plain, own.memory_config, rho=recipe.rho, classes_V=classes_V)


def build_model(config: "EngrammarConfig", classes_V: Any, seed: int) -> "EngrammarForCausalLM":
    """A freshly initialised model with its class map set."""
    import torch
    from transformers import set_seed

    from engrammar.modeling import EngrammarForCausalLM

    set_seed(seed)
    model = EngrammarForCausalLM(config)
    memory = model.model.memory
    if memory is not None and memory.class_of_id is not None:
        memory.set_classes(torch.from_numpy(classes_V))
    return model


def prepare_tokens(recipe: DataRecipe) -> "TokenSet":
    """The recipe's text as token shards, made once and found again."""
    from engrammar.train.data import prepare

    folder = Path(recipe.folder)
    name = recipe.source.replace("/", "_").replace(":", "-").replace("*", "_")
    return prepare(
        recipe.source,
        out=folder / f"{name}-{Path(recipe.tokenizer).name if recipe.tokenizer else recipe.vocab_size}",
        tokenizer=recipe.tokenizer,
        vocab_size=recipe.vocab_size,
        cache=folder / "pocket",
        validation_share=recipe.validation_share,
        limit_documents=recipe.limit_documents,
    )


def check_trainer(recipe: Recipe) -> Settings:
    """The recipe's TrainingArguments as transformers takes them, or a ValueError that names the wrong one."""
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
    return settings


def _training_arguments(recipe: Recipe) -> "TrainingArguments":
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=recipe.out,
        seed=recipe.seed,
        learning_rate=recipe.optimiser.lr,
        weight_decay=recipe.optimiser.weight_decay,
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        **check_trainer(recipe),
    )


def train(recipe: Recipe) -> dict[str, Any]:
    """Carries out a recipe: data, model, training, evaluation, saving.

    A killed run goes on from the last checkpoint in `out` to the same bits; a finished one is not repeated.

    Returns:
        What `out/result.json` holds: parameter counts, validation loss and bits per byte, the curve, and tokens per
        second of the steps this call made, evaluation and saving included (None where it made none).

    Raises:
        ValueError: a wrong setting, an `out` that cannot be written or that holds a run of another recipe.
    """
    from transformers import AutoTokenizer
    from transformers.trainer_callback import TrainerState

    from engrammar.budget import count_parameters
    from engrammar.modeling import EngrammarForCausalLM
    from engrammar.vocabulary import cached_classes

    out = Path(recipe.out)
    check_writable(out)
    check_trainer(recipe)
    checkpoint = _last_checkpoint(recipe)
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text())
    tokens = prepare_tokens(recipe.data)
    tokenizer = AutoTokenizer.from_pretrained(tokens.tokenizer_path)
    classes_V = cached_classes(tokenizer, Path(tokens.tokenizer_path))
    config = build_config(recipe.model, tokenizer, classes_V)
    length = recipe.data.sequence_length
    if length > config.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length is {length}; this model allows up to {config.max_position_embeddings} "
            "(model.settings.max_position_embeddings)."
        )
    (out / "recipe.yaml").write_text(to_yaml(recipe))
    state = TrainerState()
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    trained = checkpoint is not None and state.global_step >= state.max_steps
    model = EngrammarForCausalLM.from_pretrained(checkpoint) if trained else build_model(config, classes_V, recipe.seed)
    trainer = _trainer(recipe, model, tokens, tokenizer)
    tokens_per_second = None
    if trained:  # killed after its last step; Trainer would make one more
        trainer.state = state
    else:
        runtime = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
        steps = trainer.state.global_step - state.global_step
        arguments = trainer.args
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        tokens_per_second = steps * batch * length / runtime
    metrics = trainer.evaluate()
    trainer.save_model(str(out))
    result = {
        **count_parameters(config).to_json(),
        "validation_loss": metrics["eval_loss"],
        "validation_bits_per_byte": metrics["eval_bits_per_byte"],
        "tokens_per_second": tokens_per_second,
        "steps": trainer.state.global_step,
        "curve": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _trainer(recipe: Recipe, model: "EngrammarForCausalLM", tokens: "TokenSet", tokenizer: Any) -> "EngrammarTrainer":
    from engrammar.train.trainer import EngrammarTrainer

    length = recipe.data.sequence_length
    return EngrammarTrainer(
        model,
        _training_arguments(recipe),
        optimiser={
            "memory_lr_scale": recipe.optimiser.memory_lr_scale,
            "matrices": recipe.optimiser.matrices,
            "memory": recipe.optimiser.memory,
        },
        balance_rate=recipe.optimiser.balance_rate,
        bytes_per_eval_token=tokens.num_bytes("validation") / tokens.num_tokens("validation"),
        train_dataset=tokens.blocks("train", length),
        eval_dataset=tokens.blocks("validation", length),
        processing_class=tokenizer,
    )


def _last_checkpoint(recipe: Recipe) -> str | None:
    """The checkpoint to go on from, if the folder holds one, after checking that it is a run of this recipe."""
    from transformers.trainer_utils import get_last_checkpoint

    out = Path(recipe.out)
    checkpoint = get_last_checkpoint(str(out))
    if checkpoint is None and not (out / "result.json").exists():
        return None
    advice = "choose another `out`, or delete that folder"
    if not (out / "recipe.yaml").exists():
        raise ValueError(f"{out} holds a run without its recipe.yaml: {advice}.")
    there = _flat(yaml.safe_load((out / "recipe.yaml").read_text()))
    here = _flat(asdict(recipe))
    for name in sorted(there.keys() | here.keys()):
        if name not in PLACES and there.get(name) != here.get(name):
            raise ValueError(
                f"{out} holds a run of another recipe ({name} is {there.get(name)!r} there, {here.get(name)!r} here): "
                f"{advice}."
            )
    return checkpoint


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Settings:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: Settings = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
