"""Carries out a recipe: data, model, training, evaluation, saving; in one process or, under torchrun, in several.

Letters: V ids of the vocabulary.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerState, TrainingArguments, set_seed

from engrammar.model.budget import MemoryShare, count_parameters, solve_budget
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM, model_class
from engrammar.model.presets import preset
from engrammar.table import Tables
from engrammar.tables.sealed import check_writable, clear_partials, last_good, verify, write_text, writing
from engrammar.train.data import TokenSet, prepare
from engrammar.train.exchange import rejoin_processes
from engrammar.train.optimizer import OptimizerSettings
from engrammar.train.recipe import (
    PLACES,
    AttachRecipe,
    DataRecipe,
    ModelRecipe,
    Recipe,
    check_trainer,
    flat,
    read_recipe,
    to_yaml,
)
from engrammar.train.trainer import EngrammarTrainer
from engrammar.vocabulary import cached_classes

BuildConfig = Callable[[ModelRecipe, Any, Any], EngrammarConfig]


def build_config(recipe: ModelRecipe, tokenizer: Any, classes_V: Any) -> EngrammarConfig:
    """The model's config for this tokenizer, with its budget split as the recipe says."""
    own = preset(recipe.preset, tokenizer=tokenizer, classes_V=classes_V, **recipe.settings)
    if recipe.memory == "preset":
        return own
    plain = preset(recipe.preset, tokenizer=tokenizer, **(recipe.settings | {"memory": None}))
    if recipe.memory == "none":
        return plain
    if own.memory_config is None:
        raise ValueError(
            f"model.memory is 'budget', but {recipe.preset} has no memory to size: set model.settings.memory."
        )
    return solve_budget(plain, MemoryShare(memory=own.memory_config, classes_V=classes_V), rho=recipe.rho)


def build_model(config: EngrammarConfig, classes_V: Any, seed: int, tables: Tables) -> EngrammarForCausalLM:
    """A freshly initialized model with its class map set; with tables="external" its rows are still to be placed."""
    set_seed(seed)
    model = model_class(config)(config, tables)
    memory = model.model.memory
    if memory is not None and memory.class_of_id is not None:
        memory.set_classes(torch.from_numpy(classes_V))
    return model


def prepare_tokens(recipe: DataRecipe) -> TokenSet:
    """The recipe's text as token shards; the first call makes them."""
    folder = Path(recipe.folder)
    name = recipe.source.replace("/", "_").replace(":", "-").replace("*", "_")
    kept = "" if recipe.keep_share == 1 else f"-{recipe.keep_share:g}"
    kept += "" if recipe.similarity is None else f"-unlike-{recipe.similarity:g}"
    tokens = f"{name}-{Path(recipe.tokenizer).name if recipe.tokenizer else recipe.vocab_size}{kept}"
    return prepare(recipe, out=folder / tokens, cache=folder / "pocket")


def training_arguments(recipe: Recipe | AttachRecipe) -> TrainingArguments:
    """transformers' settings; making them also joins the other processes, if there are any."""
    settings = check_trainer(recipe)
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    shares = num_processes * settings.get("gradient_accumulation_steps", 1)
    if num_processes > 1 and not torch.accelerator.is_available():
        settings = {"use_cpu": True, "ddp_backend": "gloo", **settings}
    if recipe.data.batch_size % shares:
        raise ValueError(
            f"data.batch_size is {recipe.data.batch_size}; allowed: multiples of {shares}, processes times "
            "trainer.gradient_accumulation_steps."
        )
    device = "cpu" if settings.get("use_cpu") else torch.accelerator.current_accelerator() or "cpu"
    rejoin_processes(settings.get("ddp_backend") or torch.distributed.get_default_backend_for_device(device))
    arguments = TrainingArguments(
        output_dir=recipe.out,
        seed=recipe.seed,
        learning_rate=recipe.optimizer.lr,
        weight_decay=recipe.optimizer.weight_decay,
        per_device_train_batch_size=recipe.data.batch_size // shares,
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        **settings,
    )
    assert arguments.world_size == num_processes, "the processes did not find each other"
    return arguments


def train(recipe: Recipe, build: BuildConfig | None = None) -> dict[str, Any]:
    """Carries out a recipe: data, model, training, evaluation, saving.

    A killed run continues from the last checkpoint in `out` and gives the same bits; a finished one is not repeated.
    Under torchrun or `accelerate launch` every process calls this, on one file system; there may be another number of
    processes than when the checkpoint was written.

    Args:
        build: makes the model's config from the recipe's model, the tokenizer and the class map, for kinds of models
            that `build_config` does not make. Their classes must be registered with transformers.

    Returns:
        What `out/result.json` holds: parameter counts, validation loss and bits per byte, the curve, and tokens per
        second of the steps that this call made, evaluation and saving included (None if it made none).

    Raises:
        ValueError: a setting is wrong, `out` is not writable or holds another recipe's run, or a checkpoint is damaged.
        OSError: the disk is full or failed; the same call continues from the last good checkpoint.
    """
    out = Path(recipe.out)
    check_writable(out)
    arguments = training_arguments(recipe)
    checkpoint = last_checkpoint(recipe)
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text())
    state, trained = progress(checkpoint)
    finished = final_checkpoint(arguments, checkpoint, state) if checkpoint and trained else None
    trainer, config = _trainer(recipe, arguments, finished, build or build_config)
    if arguments.should_save:
        with writing("recipe.yaml", out):
            write_text(out / "recipe.yaml", to_yaml(recipe))
    tokens_per_second = finish_steps(trainer, recipe, checkpoint, state, trained)
    metrics = trainer.evaluate()
    result = {
        **count_parameters(config).to_json(),
        "validation_loss": metrics["eval_loss"],
        "validation_bits_per_byte": metrics["eval_bits_per_byte"],
        "tokens_per_second": tokens_per_second,
        "steps": trainer.state.global_step,
        "curve": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
    }
    with writing("the trained model", out):
        trainer.save_model(str(out))  # a kill here leaves no result.json, so the run is evaluated and saved again
        if arguments.should_save:
            write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()
    return result


def finish_steps(
    trainer: EngrammarTrainer,
    recipe: Recipe | AttachRecipe,
    checkpoint: Path | None,
    state: TrainerState,
    trained: bool,
) -> float | None:
    """Makes the steps that are left, from a checkpoint with `state` on; returns their tokens per second, or None."""
    if trained:  # killed after its last step; the Trainer would make one more
        trainer.state = state
        if trainer.args.should_save:
            clear_partials(Path(recipe.out))  # if steps are left, the Trainer does this
        return None
    runtime = trainer.train(str(checkpoint) if checkpoint else None).metrics["train_runtime"]
    num_steps = trainer.state.global_step - state.global_step
    return num_steps * recipe.data.batch_size * recipe.data.sequence_length / runtime


def _trainer(
    recipe: Recipe, arguments: TrainingArguments, finished: Path | None, build: BuildConfig
) -> tuple[EngrammarTrainer, EngrammarConfig]:
    """The recipe's trainer and its model's config. The model is read from the checkpoint `finished`, or else new."""
    with arguments.main_process_first(desc="data"):
        tokens = prepare_tokens(recipe.data)
        tokenizer = AutoTokenizer.from_pretrained(tokens.tokenizer_path)
        classes_V = cached_classes(tokenizer, Path(tokens.tokenizer_path))
    config = build(recipe.model, tokenizer, classes_V)
    length = recipe.data.sequence_length
    if length > config.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length is {length}; this model allows up to {config.max_position_embeddings} "
            "(model.settings.max_position_embeddings)."
        )
    tables: Tables = "parameters" if recipe.optimizer.memory == "dense_adam" else "external"
    if finished is not None:
        model = model_class(config).from_pretrained(finished, tables=tables)
    else:
        model = build_model(config, classes_V, recipe.seed, tables)
    model.chunked_loss = recipe.chunked_loss
    trainer = EngrammarTrainer(
        model,
        arguments,
        **trainer_settings(recipe, tokens),
        train_dataset=tokens.blocks("train", length),
        eval_dataset=tokens.blocks("validation", length),
        processing_class=tokenizer,
    )
    if finished is not None:
        trainer.place(finished)
    return trainer, config


def trainer_settings(recipe: Recipe | AttachRecipe, tokens: TokenSet) -> dict[str, Any]:
    """What a recipe and its text say of `EngrammarTrainer`'s own settings."""
    optimizer, placement = recipe.optimizer, recipe.placement
    return {
        "optimizer_settings": OptimizerSettings(
            memory=optimizer.memory, memory_lr_scale=optimizer.memory_lr_scale, matrices=optimizer.matrices
        ),
        "balance_rate": optimizer.balance_rate,
        "bytes_per_eval_token": tokens.num_bytes("validation") / tokens.num_tokens("validation"),
        "placement": asdict(placement) | {"folder": placement.folder or Path(recipe.out) / "tables"},
    }


def check_same_recipe(recipe: Recipe | AttachRecipe) -> None:
    """Raises a ValueError unless the run in `out` is of this recipe; names the setting that differs."""
    out, advice = Path(recipe.out), "choose another `out`, or delete that folder"
    if not (out / "recipe.yaml").exists():
        raise ValueError(f"{out} holds a run without its recipe.yaml: {advice}.")
    there = flat(asdict(read_recipe(out / "recipe.yaml", (), type(recipe))))
    here = flat(asdict(recipe))
    for name in sorted(there.keys() | here.keys()):
        if name not in PLACES and there.get(name) != here.get(name):
            raise ValueError(
                f"{out} holds a run of another recipe ({name} is {there.get(name)!r} there, {here.get(name)!r} here): "
                f"{advice}."
            )


def last_checkpoint(recipe: Recipe | AttachRecipe) -> Path | None:
    """The checkpoint to continue from, or None. Checks that the run in `out` is one of this recipe."""
    out = Path(recipe.out)
    if not any(out.glob("*checkpoint-[0-9]*")) and not (out / "result.json").exists():
        return None
    check_same_recipe(recipe)
    return last_good(out)


def final_checkpoint(arguments: TrainingArguments, checkpoint: Path, state: TrainerState) -> Path:
    """The checkpoint with the model that a run ends with, which is verified: its last, or the best if that is asked."""
    best = state.best_model_checkpoint if arguments.load_best_model_at_end else None
    final = checkpoint if best is None else checkpoint.with_name(Path(best).name)
    verify(final)
    return final


def progress(checkpoint: Path | None) -> tuple[TrainerState, bool]:
    """The training state in a checkpoint, which is verified before it is read, and whether all steps are done."""
    if checkpoint is None:
        return TrainerState(), False
    verify(checkpoint, only=("trainer_state.json",))
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state, state.global_step >= state.max_steps
