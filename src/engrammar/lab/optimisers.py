"""Which optimiser trains the rows best: the three row optimisers beside a dense Adam, each at its own best rate.

Everything but the tables' optimiser is equal: model, data order, seed, the backbone's optimiser. The rate of the
tables (times the backbone's) is chosen per optimiser with short runs on a seed that the comparison does not use.
Remake: python -m engrammar.lab.optimisers
"""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
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
    import torch

    from engrammar.machine import describe_machine
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
        "command": "python -m engrammar.lab.optimisers",
        "recipe": name,
        "seeds": list(SEEDS),
        "steps": STEPS,
        "tuning": {"seed": TUNING_SEED, "steps": TUNING_STEPS},
        "row_width": memory.head_dim,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {**describe_machine(), "threads": torch.get_num_threads()},
        "optimisers": optimisers,
    }


def main() -> None:
    runs = Path("runs") / "optimisers"
    result = run_optimisers(runs)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "optimisers.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(runs / "tuning", ignore_errors=True)


if __name__ == "__main__":
    main()
