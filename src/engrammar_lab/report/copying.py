"""What the report says of copying: when the loss of a run falls, and how well models copy from their context.

Letters: C points of a loss curve.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engrammar_lab.report.figures import COLOURS, GREY, one_axes, style, to_png
from engrammar_lab.report.parts import Figure, Table


def copying_parts(runs: Sequence[Mapping[str, Any]]) -> list[Table | Figure | str]:
    """When the loss of each run of a length fell, and by how much those copy of which it is known."""
    rows = [
        (
            run["point"].partition(", ")[2],
            str(run["seed"]),
            f"{run['bits_per_byte']:.4f}",
            f"{run['repeat_gain']:.3f}" if "repeat_gain" in run else "",
        )
        for run in sorted(runs, key=lambda run: run["bits_per_byte"])
    ]
    columns = ("point", "seed", "bits per byte", "copying, nats")
    table = Table(columns=columns, rows=tuple(rows), caption=_COPYING)
    return [Figure(png=_draw_falls(runs), caption=_FALLS), table, *_chance(runs)]


def _chance(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far runs of one share are apart, beside how far shares are with one seed; nothing if each has one run."""
    shares: dict[str, list[float]] = {}
    for run in runs:
        if run["point"].endswith("%"):
            shares.setdefault(run["point"].partition(", ")[2], []).append(run["bits_per_byte"])
    firsts = [own[0] for own in shares.values()]
    apart, point = max((max(own) - min(own), point) for point, own in shares.items())
    if not apart:
        return []
    return [
        f"Seeds of one share are up to {apart:.4f} bits per byte apart ({point} experts), shares with one seed up to "
        f"{max(firsts) - min(firsts):.4f}."
    ]


_FALLS = (
    "Training loss of every run of the longest length, above the mean of them all; nats per token, a line for each "
    "seed. Whether a model whose line falls at once has learned to copy, the table says."
)


_COPYING = (
    "Every run of the longest length, the best first. Copying: by how much a text is easier right after itself, per "
    "token (measured since 1 December 2026)."
)


def _draw_falls(runs: Sequence[Mapping[str, Any]]) -> bytes:
    points = list(dict.fromkeys(run["point"] for run in runs))
    steps_C = np.array([step for step, _ in runs[0]["curve"]])
    losses = np.array([[loss for _, loss in run["curve"]] for run in runs])
    with style():
        figure, axes = one_axes(3.8)
        axes.axhline(0, color=GREY, linewidth=1)
        for run, above_C in zip(runs, losses - losses.mean(axis=0)):
            number, label = points.index(run["point"]), run["point"].partition(", ")[2] if run["seed"] == 0 else None
            dashes = "-" if number < len(COLOURS) else "--"
            axes.plot(steps_C, above_C, dashes, color=COLOURS[number % len(COLOURS)], label=label, linewidth=1)
        axes.set(xlabel="steps", ylabel="training loss above the mean run, nats")
        axes.legend(ncols=2)
        return to_png(figure)
