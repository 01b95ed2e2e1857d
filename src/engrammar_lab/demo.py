"""The demo: one budget trained twice, all experts and experts with memory, on real fact prose."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from engrammar.cells import as_text, in_lines
from engrammar.config import check_setting
from engrammar.tables.sealed import check_writable
from engrammar.train.recipe import Recipe, to_yaml
from engrammar.train.run import prepare_tokens, train
from engrammar.train.sample import Sampling, complete, load
from engrammar_lab.demo_report import plot_curves, render, table, verdict
from engrammar_lab.gates import gates_over_text, plot_gates
from engrammar_lab.machine import describe_run

VARIANTS: dict[str, Literal["none", "budget"]] = {
    "moe": "none",
    "moe + memory": "budget",
}  # name -> how the recipe's budget is split
SENTENCES = (
    "The capital of France is Paris, and the Eiffel Tower was built there in 1889.",
    "Alexander the Great was a king of Macedonia who was taught by Aristotle.",
    "In computer science, a hash table is a data structure that maps keys to values.",
    "The Second World War ended in 1945, and the United Nations was founded in San Francisco.",
)
PROMPTS = ("The United States is", "Paris is the capital", "A computer is", "The Second World War")


def run_demo(recipe: Recipe, out: Path, seeds: int) -> dict[str, Any]:
    """Trains the models, compares them and draws pictures. A run that was killed continues where it stopped.

    Writes into `out`: demo.json (everything measured), demo.md (made from it), curves.png, gates.png.

    Returns:
        The content of demo.json.
    """
    check_setting("--seeds", seeds, seeds >= 1, "1 or more")
    check_writable(out)
    prepare_tokens(recipe.data)
    runs = [
        {"variant": name, "seed": recipe.seed + index, **_run(recipe, out, name, recipe.seed + index)}
        for index in range(seeds)
        for name in VARIANTS
    ]
    model, tokenizer = load(_folder(out, "moe + memory", recipe.seed))
    sampling = Sampling(max_new_tokens=40, temperature=0.7, top_p=0.9, seed=recipe.seed)
    gated = gates_over_text(model, tokenizer, list(SENTENCES))
    result = {
        **describe_run(" ".join(["engrammar", *sys.argv[1:]])),
        "recipe": to_yaml(recipe),
        "runs": runs,
        "gates": gated,
        "samples": [complete(model, tokenizer, prompt, sampling) for prompt in PROMPTS],
    }
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_curves(result, out / "curves.png")
    plot_gates(gated, out / "gates.png")
    (out / "demo.md").write_text(render(result))
    _show(result, out)
    return result


def _folder(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant.replace(' + ', '-')}-{seed}"


def _run(recipe: Recipe, out: Path, variant: str, seed: int) -> dict[str, Any]:
    """Trains one variant with one seed, unless that is done already."""
    model = replace(recipe.model, memory=VARIANTS[variant])
    return train(replace(recipe, out=str(_folder(out, variant, seed)), seed=seed, model=model))


def _show(result: dict[str, Any], out: Path) -> None:
    samples = [in_lines(" ".join(sample.split())) for sample in result["samples"]]
    print(as_text(*table(result)), "Samples of the model with memory:", *samples, sep="\n\n", end="\n\n")
    print(f"Report and pictures: {out / 'demo.md'}, {out / 'curves.png'}, {out / 'gates.png'}\n")
    print(in_lines(verdict(result)))
