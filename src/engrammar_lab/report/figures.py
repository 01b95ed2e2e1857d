"""Figures of the report, as PNG: quiet axes, colours that colour-blind readers can distinguish, no version inside.

Letters: P points of a study, S seeds, L and K layers of two models, X places where a fitted curve is read.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean, stdev
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from engrammar_lab.report.curves import FLAT, Optimum, allocation_axis, scaling_axis
from engrammar_lab.report.statistics import Difference, band, logarithm, parabola, power_law

BLUE, ORANGE, GREEN, GREY = "#2a6fb0", "#d9772b", "#3a8f6a", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, "#8b5ba8", "#c2457a", GREY)
WIDTH = 7.2  # inches
SAME = 0.005  # by how many of 255 grey levels two drawings of one figure may differ on average; seen: 0.0004
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.axisbelow": True,
    "axes.edgecolor": "#5f6670",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's defaults plus `STYLE`, whatever the user's settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def to_png(figure: Figure) -> bytes:
    """The figure as the PNG that the report keeps."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=144)
    return few_colours(drawn.getvalue())


def alike(png: bytes, other: bytes) -> bool:
    """Whether two pictures show the same, except for differently rounded edges; False if one is broken."""
    try:
        shown = [np.asarray(Image.open(io.BytesIO(each)).convert("RGB"), np.int16) for each in (png, other)]
    except (OSError, SyntaxError):  # from Pillow: not a picture, or truncated
        return False
    return shown[0].shape == shown[1].shape and float(np.abs(shown[0] - shown[1]).mean()) < SAME


def few_colours(png: bytes) -> bytes:
    """The picture in at most 128 colours, which halves the file without a visible change."""
    small = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def one_axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def mark(axes: Axes, x: float, values: Sequence[float], colour: str, *, across: bool = False) -> None:
    """Draws a point: seeds as dots, mean ± deviation as a bar; `across` if values run along x."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    at = [x] * len(values)
    bar: dict[str, Any] = {"fmt": "o", "color": colour, "capsize": 3, "markersize": 5, "zorder": 3}
    if across:
        axes.errorbar(mean(values), x, xerr=deviation, **bar)
        axes.plot(values, at, ".", color="#30343a", markersize=3, zorder=4)
    else:
        axes.errorbar(x, mean(values), yerr=deviation, **bar)
        axes.plot(at, values, ".", color="#30343a", markersize=3, zorder=4)


def _mark_rows(axes: Axes, named: Mapping[str, Sequence[float]], colours: Sequence[str]) -> None:
    """Draws a row for each name, the first on top."""
    for place, (values, colour) in enumerate(zip(named.values(), colours)):
        mark(axes, place, values, colour, across=True)
    axes.set_yticks(range(len(named)), list(named))
    axes.invert_yaxis()


def draw_points(complete: Mapping[str, Sequence[float]], found: Mapping[str, Difference], axis: str) -> bytes:
    """Draws points as rows, coloured by what their difference says."""
    colours = [
        "#30343a" if own is None else GREY if not own.settled else BLUE if own.mean < 0 else ORANGE
        for own in map(found.get, complete)
    ]
    with style():
        figure, axes = one_axes(0.9 + 0.3 * len(complete))
        _mark_rows(axes, complete, colours)
        axes.set(xlabel="validation, bits per byte", ylabel="")
        axes.set_title(axis, loc="left", fontsize=9, color="#5f6670")
        return to_png(figure)


def draw_allocation(complete: Mapping[str, Sequence[float]], optimum: Optimum) -> bytes:
    """Draws loss along the experts' share, the paper's flat band, the seeds' mean parabola and its minimum."""
    x_P, y_PS = allocation_axis(complete)
    with style():
        figure, axes = one_axes(3.6)
        axes.axvspan(*FLAT, color="#f0e6c8", label="the paper's flat range", zorder=0)
        for x, values in zip(x_P, y_PS):
            mark(axes, x, list(values), BLUE)
        with_memory = x_P < 100
        read_X = np.linspace(x_P[with_memory].min(), x_P[with_memory].max(), 200)
        mean_X, _ = band(parabola, x_P[with_memory], y_PS[with_memory].T, read_X)
        axes.plot(read_X, mean_X, color=BLUE, label="parabola, mean over seeds")
        if optimum.inside:
            axes.axvline(mean(optimum.inside), color=ORANGE, linestyle="--", label="its minimum, seed by seed")
            axes.plot(optimum.inside, [y_PS.min()] * len(optimum.inside), "|", color=ORANGE, markersize=9)
        axes.set(xlabel="experts' share of the idle parameters, %", ylabel="validation, bits per byte")
        axes.legend()
        return to_png(figure)


def draw_scaling(complete: Mapping[str, Sequence[float]], axis: str) -> bytes:
    """Draws loss against rows, with both laws and their bands over seeds."""
    rows_P, loss_PS = scaling_axis(complete)
    read_X = np.geomspace(rows_P.min(), rows_P.max(), 120)
    with style():
        figure, axes = one_axes(3.6)
        for rows, values in zip(rows_P, loss_PS):
            mark(axes, rows, list(values), "#30343a")
        for law, colour, name in ((logarithm, BLUE, "logarithm"), (power_law, ORANGE, "power law with a floor")):
            mean_X, half_X = band(law, rows_P, loss_PS.T, read_X)
            axes.plot(read_X, mean_X, color=colour, label=name)
            if np.isfinite(half_X).all():
                axes.fill_between(read_X, mean_X - half_X, mean_X + half_X, color=colour, alpha=0.15, linewidth=0)
        axes.set(xscale="log", xlabel=axis, ylabel="validation, bits per byte")
        axes.legend()
        return to_png(figure)


def draw_curves(runs: Sequence[Mapping[str, Any]], points: Sequence[str]) -> bytes:
    """Draws the training loss of every point in a small picture of its own, with the first point's behind it."""
    columns = min(4, len(points))
    lines = -(-len(points) // columns)
    with style():
        figure = Figure(figsize=(WIDTH, 0.3 + 1.5 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        curves = {point: [run["curve"] for run in runs if run["point"] == point and run["curve"]] for point in points}
        for axes, point in zip(grid.flat, points):
            for own, colour in ((points[0], GREY), (point, BLUE)):
                for curve in curves[own]:
                    axes.plot(*zip(*curve), color=colour, linewidth=0.9)
            axes.set_title(point, fontsize=8)
            axes.tick_params(labelsize=7)
        for axes in list(grid.flat)[len(points) :]:
            axes.axis("off")
        figure.supxlabel("step", fontsize=8)
        return to_png(figure)


def draw_differences(named: Mapping[str, Sequence[float]], settled: Sequence[str], axis: str) -> bytes:
    """Draws differences as rows against 0, seed by seed; the settled ones are coloured."""
    colours = [GREY if name not in settled else BLUE if mean(own) > 0 else ORANGE for name, own in named.items()]
    with style():
        figure, axes = one_axes(0.9 + 0.26 * len(named))
        axes.axvline(0, color="#5f6670", linewidth=1)
        _mark_rows(axes, named, colours)
        axes.set_xlabel(axis)
        return to_png(figure)


def draw_lines(
    lines: Mapping[str, Sequence[Sequence[float]]],
    x: Sequence[float],
    *,
    labels: tuple[str, str],
    ticks: Sequence[str] = (),
) -> bytes:
    """Draws named lines over `x`: thin ones for seeds, a thick one for their mean."""
    with style():
        figure, axes = one_axes(3.4)
        for colour, (name, seeds) in zip(COLOURS, lines.items()):
            for own in seeds:
                axes.plot(x, own, color=colour, alpha=0.35, linewidth=0.8)
            axes.plot(x, np.mean(seeds, axis=0), color=colour, marker="o", markersize=4, label=name)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if ticks:
            axes.set_xticks(x, ticks, rotation=30, ha="right", fontsize=8)
        axes.legend()
        return to_png(figure)


def draw_over_counts(lines: Mapping[str, Sequence[tuple[float, float]]], labels: tuple[str, str]) -> bytes:
    """Draws named lines of shares over counts, the counts on a logarithmic axis."""
    with style():
        figure, axes = one_axes(3.4)
        for number, (name, points) in enumerate(lines.items()):
            x, y = zip(*points)
            dashes = "-" if number < len(COLOURS) else "--"
            axes.plot(x, y, dashes, color=COLOURS[number % len(COLOURS)], marker="o", markersize=4, label=name)
        axes.set(xlabel=labels[0], ylabel=labels[1], xscale="log", ylim=(-0.03, 1.03))
        axes.legend(fontsize=8)
        return to_png(figure)


def draw_similarity(cka_LK: np.ndarray, index_L: Sequence[float], labels: tuple[str, str]) -> bytes:
    """Draws CKA of the memory model's layers (down) and the plain model's (across), and the soft alignment index."""
    with style():
        num_l, num_k = cka_LK.shape
        figure, axes = one_axes(1.2 + 0.42 * num_l)
        axes.grid(False)
        shown = axes.imshow(cka_LK, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
        for row in range(num_l):
            for column in range(num_k):
                value = cka_LK[row, column]
                colour = "white" if value < 0.6 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        own = range(num_l)
        axes.plot(own, own, "--", color="white", linewidth=1, label="same layer")
        axes.plot(index_L, own, "o-", color=ORANGE, markersize=4, label="soft alignment index")
        axes.set(ylabel=labels[0], xlabel=labels[1], xlim=(-0.5, num_k - 0.5), ylim=(-0.5, num_l - 0.5))
        axes.set_xticks(range(num_k))
        axes.set_yticks(range(num_l))
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.14), ncols=2)
        figure.colorbar(shown, ax=axes, label="CKA")
        return to_png(figure)
