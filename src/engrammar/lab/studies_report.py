"""The report on studies, made from the JSON under results/lab and nothing else.

Remake: engrammar lab run NAME; engrammar lab report
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from engrammar.lab.studies import RESULTS, STUDIES

REPORT = "report.md"


def bits(result: dict[str, Any], point: str) -> list[float]:
    """Bits per byte of a point, seed by seed."""
    runs = sorted((run for run in result["runs"] if run["point"] == point), key=lambda run: run["seed"])
    return [run["bits_per_byte"] for run in runs]


def points(result: dict[str, Any]) -> list[str]:
    """The study's points that have a run of every seed, in its order."""
    seeds = {run["seed"] for run in result["runs"]}
    return [point for point in STUDIES[result["study"]].points if len(bits(result, point)) == len(seeds)]


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean and standard deviation."""
    sign = "+" if signed else ""
    return f"{mean(values):{sign}.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def differences(result: dict[str, Any], point: str) -> list[float]:
    """How much worse (+) than the study's first point, seed by seed: the same text in the same order."""
    first = points(result)[0]
    return [own - base for own, base in zip(bits(result, point), bits(result, first))]


def agree(values: Sequence[float]) -> bool:
    """Whether all seeds say the same, and their mean is beyond two standard errors."""
    one_way = len({value > 0 for value in values}) == 1 and 0 not in values
    return len(values) > 1 and one_way and abs(mean(values)) > 2 * stdev(values) / len(values) ** 0.5


def unequal(result: dict[str, Any]) -> dict[str, float]:
    """The largest share by which total and active parameters differ between points."""
    return {
        kind: max(run[kind] for run in result["runs"]) / min(run[kind] for run in result["runs"]) - 1
        for kind in ("total_parameters", "active_parameters")
    }


def _table(result: dict[str, Any]) -> list[str]:
    lines = [
        f"| {STUDIES[result['study']].axis} | bits per byte | to the first | total | active | rows | MFLOPs/token | "
        "tokens/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in points(result):
        run = next(run for run in result["runs"] if run["point"] == point)
        rates = [run["tokens_per_second"] for run in result["runs"] if run["point"] == point]
        known = [rate for rate in rates if rate is not None]
        lines.append(
            f"| {point} | {spread(bits(result, point))} | {spread(differences(result, point), True)} | "
            f"{run['total_parameters']:,} | {run['active_parameters']:,} | {run['memory_rows']:,} | "
            f"{run['flops_per_token'] / 1e6:.3f} | {f'{mean(known):,.0f}' if known else ''} |"
        )
    return lines


def verdict(result: dict[str, Any]) -> str:
    """The answer in words, with how far seeds agree."""
    study, names = STUDIES[result["study"]], points(result)
    best = min(names, key=lambda point: mean(bits(result, point)))
    sentences = [f"Fewest bits per byte: {best} ({spread(bits(result, best))}). The paper: {study.paper}."]
    if best != names[0]:
        gain = differences(result, best)
        sure = "all seeds agree" if agree(gain) else "the seeds do not settle it"
        sentences.append(f"Against {names[0]} that is {spread(gain, True)}; {sure}.")
    if result["study"] == "scaling":
        sentences.append(scaling_fit(result))
    else:
        settled = [point for point in names[1:] if agree(differences(result, point))]
        open_ = [point for point in names[1:] if point not in settled]
        sentences.append(f"Settled against {names[0]}: {', '.join(settled) or 'nothing'}.")
        if open_:
            sentences.append(f"Not settled: {', '.join(open_)}.")
    if study.equal:
        apart = unequal(result)
        sentences.append(
            f"Total parameters differ by at most {apart['total_parameters']:.3%}, active ones by "
            f"{apart['active_parameters']:.3%}."
        )
    return " ".join(sentences)


def scaling_fit(result: dict[str, Any]) -> str:
    """Bits per tenfold rows, fitted for each seed; and whether a logarithm or a power law fits the means better."""
    names = points(result)
    rows = np.log10([float(point.replace(",", "")) for point in names])
    each = np.array([bits(result, point) for point in names])
    slopes = np.polyfit(rows, each, 1)[0].tolist()
    means = each.mean(1)
    logarithm = _residual(rows, means)
    power = min(_residual(10 ** (-exponent * rows), means) for exponent in np.linspace(0.02, 2, 100))
    better = "a power law with a floor" if power < logarithm / 2 else "neither clearly"
    return (
        f"Ten times the rows: {spread(slopes, True)} bits per byte. Squares left by a logarithm {logarithm:.1e}, by a "
        f"power law with a floor, one more number to fit, {power:.1e}: {better} fits better."
    )


def _residual(x: np.ndarray, y: np.ndarray) -> float:
    """Mean of squares that a straight line leaves."""
    return float(np.mean((np.polyval(np.polyfit(x, y, 1), x) - y) ** 2))


def draw(result: dict[str, Any], path: Path) -> None:
    """Every point with its spread, and every seed as a dot."""
    from matplotlib.figure import Figure

    names = points(result)
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for place, point in enumerate(names):
        own = bits(result, point)
        axes.plot([place] * len(own), own, "k.", markersize=4)
        axes.errorbar(place, mean(own), yerr=stdev(own) if len(own) > 1 else 0, fmt="o", capsize=4, color="tab:blue")
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
    axes.set(xlabel=STUDIES[result["study"]].axis, ylabel="validation, bits per byte")
    figure.savefig(path, dpi=120)


def load_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The committed studies, in the order of `STUDIES`."""
    return {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in STUDIES
        if (folder / f"{name}.json").exists()
    }


def render(results: dict[str, dict[str, Any]]) -> str:
    """The report as Markdown."""
    lines = ["# What memory buys", "", "Made by `engrammar lab report` from the JSON beside it.", ""]
    for name, result in results.items():
        machine, seeds = result["machine"], len({run["seed"] for run in result["runs"]})
        lines += [
            f"## {STUDIES[name].question}",
            "",
            f"`{result['command']}`: {result['tokens']:,} tokens a run, {seeds} seeds, each point the same text in the "
            f"same order. {result['date']}; {machine['cpu']}, {machine['cores']} cores, one run on each, torch "
            f"{machine['torch']}. Lower is better; ± is the deviation over seeds, differences are seed by seed.",
            "",
            *_table(result),
            "",
            verdict(result),
            "",
            f"![{STUDIES[name].axis}]({name}.png)",
            "",
        ]
    return "\n".join(lines)


def write_report(folder: Path = RESULTS, *, check: bool = False) -> None:
    """Writes the report and its pictures, or checks that the report in `folder` follows from the JSON there.

    Raises:
        ValueError: there is no result, or the committed report is not what the JSON says.
    """
    results = load_results(folder)
    if not results:
        raise ValueError(f"{folder} holds no results: run a study first (engrammar lab run allocation).")
    text = render(results)
    if check:
        if not (folder / REPORT).exists() or (folder / REPORT).read_text() != text:
            raise ValueError(f"{folder / REPORT} does not follow from the JSON beside it: engrammar lab report.")
        return
    (folder / REPORT).write_text(text)
    for name, result in results.items():
        draw(result, folder / f"{name}.png")
