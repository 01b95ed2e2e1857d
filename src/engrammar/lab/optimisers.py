"""Which optimiser trains the rows best: the three row optimisers beside a dense Adam, each at its own best rate.

Everything but the tables' optimiser is equal: model, data order, seed, the backbone's optimiser. The rate of the
tables (times the backbone's) is chosen per optimiser with short runs on a seed that the comparison does not use.
Remake: python -m engrammar.lab.optimisers
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from engrammar.train.recipe import Recipe, load_recipe
from engrammar.train.run import train

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "results" / "optimisers"
KINDS = ("dense_adam", "adam", "row_adam", "sinkhorn")
SCALES = (5.0, 10.0, 20.0, 40.0)
TUNING_SEED, TUNING_STEPS = 100, 150
SEEDS, STEPS = (0, 1, 2), 300


def _recipe(base: Recipe, runs: Path, kind: str, scale: float, seed: int, **trainer: Any) -> Recipe:
    return replace(
        base,
        out=str(runs / f"{kind}-{scale:g}-{seed}"),
        seed=seed,
        optimiser=replace(base.optimiser, memory=kind, memory_lr_scale=scale),  # type: ignore[arg-type]
        trainer={**base.trainer, "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True, **trainer},
    )


def _loss(recipe: Recipe) -> float:
    """Validation loss of the run in bits per byte; a run that was made before is not repeated."""
    result = train(recipe)
    for weights in Path(recipe.out).glob("*.safetensors"):
        weights.unlink()
    return result["validation_bits_per_byte"]


def run_optimisers(runs: Path, name: str = "nano") -> dict[str, Any]:
    """Trains them all; resumable, since finished runs are found again in `runs`.

    Returns:
        per optimiser: bits per byte of every rate tried, the rate chosen, bits per byte of each seed, mean and standard
        deviation; `bytes_per_row` of optimiser state.
    """

    from engrammar.machine import describe_run
    from engrammar.presets import preset
    from engrammar.train.row_optimisers import state_bytes_per_row

    base = load_recipe(name)
    memory = preset(base.model.preset).memory_config
    assert memory is not None
    optimisers: dict[str, Any] = {}
    for kind in KINDS:
        tuning = {
            scale: _loss(_recipe(base, runs / "tuning", kind, scale, TUNING_SEED, max_steps=TUNING_STEPS))
            for scale in SCALES
        }
        best = min(tuning, key=lambda scale: tuning[scale])
        losses = [_loss(_recipe(base, runs, kind, best, seed, max_steps=STEPS)) for seed in SEEDS]
        bytes_per_row = (
            8 * memory.head_dim if kind == "dense_adam" else state_bytes_per_row(kind, memory.head_dim)  # type: ignore[arg-type]
        )
        optimisers[kind] = {
            "tuning_bits_per_byte": {f"{scale:g}": loss for scale, loss in tuning.items()},
            "memory_lr_scale": best,
            "bits_per_byte": losses,
            "mean": mean(losses),
            "stdev": stdev(losses),
            "bytes_per_row": bytes_per_row,
        }
        print(kind, optimisers[kind], flush=True)
    return {
        **describe_run("python -m engrammar.lab.optimisers"),
        "recipe": name,
        "seeds": list(SEEDS),
        "steps": STEPS,
        "tuning": {"seed": TUNING_SEED, "steps": TUNING_STEPS},
        "row_width": memory.head_dim,
        "optimisers": optimisers,
    }


def render(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    machine, tuning, optimisers = result["machine"], result["tuning"], result["optimisers"]
    best = min(optimisers, key=lambda kind: optimisers[kind]["mean"])
    factors = list(optimisers[best]["tuning_bits_per_byte"])
    lines = [
        "# Which optimiser trains the rows best",
        "",
        f"`{result['command']}`: recipe `{result['recipe']}`, {result['steps']} steps, rows of {result['row_width']} "
        f"fp32, {len(result['seeds'])} seeds. {result['date']}; {machine['cpu']}, {machine['threads']} thread, torch "
        f"{machine['torch']}. The tables' rate is the backbone's times a factor, chosen for each optimiser by "
        f"{tuning['steps']} steps on seed {tuning['seed']}. Bits per byte of the validation text, lower is better.",
        "",
        "| optimiser | state, bytes a row | factor | bits per byte, mean and standard deviation | each seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, found in optimisers.items():
        seeds = ", ".join(f"{loss:.4f}" for loss in found["bits_per_byte"])
        lines.append(
            f"| {kind} | {found['bytes_per_row']} | {found['memory_lr_scale']:g} | "
            f"{found['mean']:.4f} ± {found['stdev']:.4f} | {seeds} |"
        )
    lines += [
        "",
        f"Best: {best}. Against it, seed by seed: "
        + "; ".join(f"{kind} {difference(result, kind, best)}" for kind in optimisers if kind != best)
        + ".",
        "",
        "Bits per byte of the short runs, by factor:",
        "",
        f"| optimiser | {' | '.join(factors)} |",
        f"| --- |{' --- |' * len(factors)}",
    ]
    for kind, found in optimisers.items():
        lines.append(
            f"| {kind} | " + " | ".join(f"{loss:.4f}" for loss in found["tuning_bits_per_byte"].values()) + " |"
        )
    return "\n".join([*lines, "", "![loss against bytes of state](optimisers.png)", ""])


def difference(result: dict[str, Any], kind: str, other: str) -> str:
    """Mean and standard deviation, over seeds, of how much worse (+) `kind` is than `other`."""
    pairs = zip(*(result["optimisers"][name]["bits_per_byte"] for name in (kind, other)))
    differences = [one - another for one, another in pairs]
    return f"{mean(differences):+.4f} ± {stdev(differences):.4f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss against bytes of state, every seed a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for kind, found in result["optimisers"].items():
        size = found["bytes_per_row"]
        axes.errorbar(size, found["mean"], yerr=found["stdev"], fmt="o", capsize=4, label=kind)
        axes.plot([size] * len(found["bits_per_byte"]), found["bits_per_byte"], "k.", markersize=3)
    axes.set(xscale="log", xlabel="optimiser state, bytes a row", ylabel="validation, bits per byte")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    result = run_optimisers(Path("runs") / "optimisers")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "optimisers.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "optimisers.md").write_text(render(result))
    draw(result, RESULTS / "optimisers.png")


if __name__ == "__main__":
    main()
