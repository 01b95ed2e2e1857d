"""The commands that train: `engrammar train` and `engrammar attach`."""

import json
import os
from pathlib import Path
from typing import Any

from tyro.conf import Positional


def train(recipe: Positional[str], overrides: Positional[tuple[str, ...]] = (), /, dry_run: bool = False) -> None:
    """Train a model from a recipe; a run that was killed continues from its last checkpoint.

    Args:
        recipe: A YAML file, or the name of a recipe in the package: micro, nano, 100m.
        overrides: Settings to replace, as section.setting=value (trainer.max_steps=50).
        dry_run: Print the resolved settings and stop.
    """
    from engrammar.train.exchange import leave_processes
    from engrammar.train.recipe import check_trainer, load_recipe, to_yaml
    from engrammar.train.run import train as run

    resolved = load_recipe(recipe, overrides)
    check_trainer(resolved)
    if dry_run:
        print(to_yaml(resolved), end="")
        return
    result = run(resolved)
    leave_processes()
    if int(os.environ.get("RANK", 0)):
        return
    print(f"{result['steps']} steps, validation {result['validation_bits_per_byte']:.4f} bits per byte: {resolved.out}")


def attach(
    model: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    data: str = "",
    out: Path | None = None,
    recipe: str = "attach",
    dry_run: bool = False,
    probe: str = "",
    probe_steps: int = 30,
) -> None:
    """Train a memory on a model that you have, and save it as an adapter. A killed run goes on from its checkpoint.

    Args:
        model: The folder, or the name on the Hub, of a causal language model of transformers.
        overrides: Settings as section.setting=value (memory.layers=[20], trainer.num_train_epochs=3).
        data: The text: files (.txt, .jsonl, .parquet), pocket:NAME, hf:NAME.
        out: Folder for the run; the adapter is OUT/adapter.
        recipe: A YAML file, or the name of one in the package.
        dry_run: Train nothing; load the model, prepare the text, and say what would be trained and kept.
        probe: Train nothing but a fresh memory at each of these blocks (8,16,20) for a few steps, and print what it
            gained on held-out text beside the time of a step.
        probe_steps: Steps at each block.
    """
    from engrammar.train.attached import plan_attached, train_attached
    from engrammar.train.exchange import leave_processes
    from engrammar.train.recipe import AttachRecipe, read_recipe

    given = [f"base.model={json.dumps(model)}"]
    given += [f"data.source={json.dumps(data)}"] if data else []
    given += [f"out={json.dumps(str(out))}"] if out else []
    chosen = read_recipe(recipe, (*given, *overrides), AttachRecipe)
    if dry_run:
        print(plan_attached(chosen))
        return
    if probe:
        _probe(chosen, probe, probe_steps)
        return
    result = train_attached(chosen)
    leave_processes()
    if int(os.environ.get("RANK", 0)):
        return
    before, after = (result[name]["bits_per_byte"] for name in ("without_memory", "with_memory"))
    print(
        f"{result['steps']} steps. Held-out text: {before:.4f} bits per byte without the memory, {after:.4f} with it.\n"
        f"{chosen.out}/adapter: load it with engrammar.load_attached(model, folder, tokenizer), or "
        f"engrammar generate {model} PROMPT --adapter {chosen.out}/adapter"
    )


def _probe(recipe: Any, layers: str, steps: int) -> None:
    from engrammar.cells import as_text
    from engrammar.train.probing import probe_attached, table

    try:
        chosen = [int(layer) for layer in layers.split(",")]
    except ValueError as error:
        raise ValueError(f"--probe is {layers!r}; allowed: numbers of blocks, as 8,16,20.") from error
    print(as_text(*table(probe_attached(recipe, chosen, steps))))
