"""The demo's report and curves, made from demo.json alone."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from matplotlib.figure import Figure

from engrammar.cells import Column, as_markdown, cells, titles
from engrammar_lab.report.parts import spread

COLUMNS = (
    Column("total", "total_parameters", ","),
    Column("active", "active_parameters", ","),
    Column("memory", "memory_parameters", ","),
    Column("rho", "rho", ".3f"),
)


def _by_variant(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        grouped.setdefault(run["variant"], []).append(run)
    return grouped


def verdict(result: dict[str, Any]) -> str:
    """One sentence: which was better on validation text, and by how much compared with the spread of the seeds."""
    bits = {name: [r["validation_bits_per_byte"] for r in runs] for name, runs in _by_variant(result).items()}
    plain, memory = bits["moe"], bits["moe + memory"]
    gains = [p - m for p, m in zip(plain, memory)]
    gain = mean(gains)
    winner = "MoE with memory" if gain > 0 else "the plain MoE"
    sentence = f"At equal total and active parameters {winner} was better by {abs(gain):.4f} bits per byte"
    sentence += f" ({abs(gain) / mean(plain):.1%})"
    if len(gains) == 1:
        return sentence + "; this is one seed, so the difference may be noise: run with --seeds 3 for the spread."
    told = "all seeds agree" if min(gains) > 0 or max(gains) < 0 else "the seeds disagree, so take it as no difference"
    return f"{sentence}, ± {stdev(gains):.4f} over {len(gains)} seeds; {told}."


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines, one for each variant."""
    lines = []
    for name, runs in _by_variant(result).items():
        bits = spread([run["validation_bits_per_byte"] for run in runs])
        speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"] is not None]
        lines.append([name, *cells(COLUMNS, runs[0]), bits, spread(speeds, 0) if speeds else "not measured"])
    return ["", *titles(COLUMNS), "validation bits/byte", "training tokens/s"], lines


def render(result: dict[str, Any]) -> str:
    """The report as Markdown, a function of demo.json alone."""
    machine = result["machine"]
    lines = [
        "# Plain experts against experts with memory",
        "",
        verdict(result),
        "",
        *as_markdown(*table(result)),
        "",
        f"Seeds: {', '.join(str(run['seed']) for run in _by_variant(result)['moe'])}; ± is the standard deviation.",
        _length(result),
        f"Made by `{result['command']}` on {result['date']}: {machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}, transformers {machine['transformers']}.",
        "",
        "![loss curves](curves.png)",
        "",
        "![gates over text](gates.png)",
        "",
        "Samples of the model with memory (nucleus 0.9, temperature 0.7, first seed):",
        "",
        *("- " + " ".join(sample.split()) for sample in result["samples"]),
        "",
    ]
    return "\n".join(lines)


def _length(result: dict[str, Any]) -> str:
    """At which length of training the figures hold."""
    data = yaml.safe_load(result["recipe"])["data"]
    first = _by_variant(result)["moe"][0]
    num_tokens = first["steps"] * data["batch_size"] * data["sequence_length"]
    return (
        f"Each run read {num_tokens:,} tokens, {num_tokens / first['inactive_parameters']:.1f} for each parameter that "
        "a token does not use: a short training. The study `horizon` asks what is left of the gain in longer ones."
    )


def plot_curves(result: dict[str, Any], path: Path) -> None:
    """Draws training loss and validation loss of every run against steps."""
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2, sharex=True)
    for colour, (name, runs) in zip(("#4c72b0", "#dd8452"), _by_variant(result).items()):
        for index, run in enumerate(runs):
            label = name if index == 0 else None
            for axes, key in ((left, "loss"), (right, "eval_loss")):
                points = [(entry["step"], entry[key]) for entry in run["curve"] if key in entry]
                axes.plot(*zip(*points), color=colour, alpha=0.8, label=label, marker="." if axes is right else None)
    left.set(title="training loss", xlabel="step", ylabel="nats per token")
    right.set(title="validation loss", xlabel="step")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
