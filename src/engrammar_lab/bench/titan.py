"""One start trained by torchtitan and by our Trainer: where the two part, beside where torchtitan parts from itself.

`tests/titan/side_by_side.py` trains them, in the environment with torchtitan.
"""

from pathlib import Path
from typing import Any

from engrammar.cells import Column, Lines, cells, titles

FIRST = "torchtitan"
APART = (
    Column("apart in 10 steps", "first_10_steps", ".1e"),
    Column("apart at most", "all_steps", ".3f"),
    Column("over 1e-3 at step", "first_step_over_1e-3"),
)


def table(result: dict[str, Any]) -> tuple[list[str], Lines]:
    """Losses at the end, and how far each run is from torchtitan's on one rank."""
    own = [Column("Adam's eps", "eps", "g"), Column("trained by", "name"), Column("loss, last 20 steps", "loss", ".3f")]
    lines = []
    for run in result["runs"]:
        for name, loss in run["mean_of_last_20_steps"].items():
            apart = run["largest_difference_to_torchtitan"].get(name)
            far = ["–"] * len(APART) if apart is None else cells(APART, apart)
            lines.append([*cells(own, {"eps": run["eps"], "name": name, "loss": loss}), *far])
    return titles([*own, *APART]), lines


def verdict(result: dict[str, Any]) -> str:
    """Whether our Trainer parts from torchtitan further than torchtitan on two ranks does."""
    words = []
    for run in result["runs"]:
        apart = run["largest_difference_to_torchtitan"]
        own, itself = (apart[name]["all_steps"] for name in ("trainer", "torchtitan, two ranks"))
        words.append(
            f"with Adam's eps {run['eps']:g} our Trainer is at most {own:.3f} nats from it, itself {itself:.3f}"
        )
    return f"torchtitan on one rank is compared with our Trainer and with itself on two ranks: {'; '.join(words)}."


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the losses of each run, and how far they are from torchtitan's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, len(result["runs"]), sharex=True)
    for (losses, apart), run in zip(axes.T, result["runs"]):
        first = run["losses"][FIRST]
        for name, values in run["losses"].items():
            steps = range(1, len(values) + 1)
            losses.plot(steps, values, label=name, linewidth=1)
            if name != FIRST:
                differences = [max(abs(one - two), 1e-8) for one, two in zip(values, first)]
                apart.plot(steps, differences, label=name, color=losses.lines[-1].get_color(), linewidth=1)
        losses.set(title=f"Adam's eps {run['eps']:g}", ylabel="loss, nats")
        apart.set(xlabel="step", ylabel="apart from torchtitan, nats", yscale="log")
        for one in (losses, apart):
            one.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)
