"""Results of the two studies along an axis: which share is best, and which law the loss follows with more rows.

Letters: S seeds, P points of a study, X places where a fitted curve is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from engrammar_lab.report.parts import interval, spread
from engrammar_lab.report.statistics import (
    Difference,
    compare,
    half_width,
    left_out_error,
    logarithm,
    p_value,
    parabola_minimum,
    power_law,
)

FLAT = (60.0, 95.0)  # percent of experts; the paper is flat here
PAPER_SLOPE = -0.028  # nats per token for ten times the rows, in the paper


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Where loss is lowest along the experts' share, in percent."""

    best: float  # the best point measured
    # The ends of the range with memory.
    low: float
    high: float
    minima: tuple[float | None, ...]  # the minimum of each seed's parabola; None if the parabola has none

    @property
    def inside(self) -> list[float]:
        """The minima if every seed has one within the range, else an empty list."""
        found = [value for value in self.minima if value is not None and self.low < value < self.high]
        return found if len(found) == len(self.minima) else []

    def words(self) -> str:
        """The optimum, its uncertainty, and whether the range ends before it."""
        if self.inside:
            half = half_width(self.inside)
            sure = f" ± {half:.1f} (95 %)" if len(self.inside) > 1 else ""
            words = f"Parabolas through the points with memory are lowest at {mean(self.inside):.1f}{sure} % experts"
        else:
            words = "For some seed the parabola through the points with memory has no minimum within the range"
        end = ", at the end of the range" if self.best in (self.low, self.high) else ""
        return f"{words}; the best point measured is {self.best:.0f} %{end}."

    def short(self) -> str:
        if self.inside:
            return f"The fitted optimum is {mean(self.inside):.0f} % experts, {100 - mean(self.inside):.0f} % memory."
        if self.best in (self.low, self.high):
            return "The optimum is at the end of the range."
        return "The parabolas have no minimum within the range."

    def agrees(self) -> str:
        """Whether the optimum, with its uncertainty, overlaps the range where the paper is flat."""
        low = high = self.best
        if self.inside:
            half = half_width(self.inside) if len(self.inside) > 1 else 0.0
            low, high = mean(self.inside) - half, mean(self.inside) + half
        if low <= FLAT[1] and high >= FLAT[0]:
            return "yes: within the band where the paper is flat"
        return f"no: the optimum here has {'more' if high < FLAT[0] else 'less'} memory than the paper's"


def allocation_axis(complete: Mapping[str, Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Experts' share in percent and bits per byte [P, S]."""
    x_P = np.array([float(point.rstrip("%")) for point in complete])
    return x_P, np.array([list(values) for values in complete.values()])


def allocation_optimum(complete: Mapping[str, Sequence[float]]) -> Optimum:
    """The optimum over the points that have memory; the plain MoE is another model and not on the curve."""
    x_P, y_PS = allocation_axis(complete)
    with_memory = x_P < 100
    minima = tuple(parabola_minimum(x_P[with_memory], y_P) for y_P in y_PS[with_memory].T)
    return Optimum(
        best=float(x_P[np.argmin(y_PS.mean(1))]),
        low=float(x_P[with_memory].min()),
        high=float(x_P[with_memory].max()),
        minima=minima,
    )


def scaling_axis(complete: Mapping[str, Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows per head and bits per byte [P, S], of the points named by a number."""
    numbered = {point: values for point, values in complete.items() if point.replace(",", "").isdigit()}
    rows_P = np.array([float(point.replace(",", "")) for point in numbered])
    return rows_P, np.array([list(values) for values in numbered.values()])


def better_law(rows_P: np.ndarray, loss_PS: np.ndarray) -> tuple[str, float, float]:
    """Whether one law predicts left-out points better in every seed, in words, and both laws' errors on the means."""
    sides = {left_out_error(power_law, rows_P, y_P) < left_out_error(logarithm, rows_P, y_P) for y_P in loss_PS.T}
    means_P = loss_PS.mean(1)
    errors = left_out_error(logarithm, rows_P, means_P), left_out_error(power_law, rows_P, means_P)
    if len(sides) > 1 or (errors[1] < errors[0]) not in sides:
        return "the seeds do not choose between a logarithm and a power law with a floor", *errors
    law = "a power law with a floor" if sides == {True} else "a logarithm"
    return f"{law} predicts left-out points better", *errors


def scaling_words(complete: Mapping[str, Sequence[float]], factor: float | None) -> tuple[str, str, str]:
    """The answer, the details, and whether the paper's slope is met.

    Args:
        factor: nats per token of one bit per byte, if known.
    """
    rows_P, loss_PS = scaling_axis(complete)
    slopes = [float(slope) for slope in np.polyfit(np.log10(rows_P), loss_PS, 1)[0]]
    found = Difference(tuple(slopes), p_value(slopes))
    law, by_logarithm, by_power = better_law(rows_P, loss_PS)
    steps = np.diff(loss_PS, axis=0) / np.diff(np.log10(rows_P))[:, None]
    last = f"and by {spread(list(steps[-1]))} between the two largest sizes"
    answer = f"Ten times the rows change bits per byte by {found.mean:+.4f}. "
    answer += f"{law[0].upper()}{law[1:]}." if found.settled else "The seeds do not settle the sign."
    details = (
        f"Ten times the rows change bits per byte by {interval(found)}, {last}. The error at a left-out point is "
        f"{by_logarithm:.1e} with a logarithm and {by_power:.1e} with a power law with a floor."
    )
    agrees = "yes in sign" if found.settled and found.mean < 0 else "no" if found.settled else "open"
    if factor is not None:
        nats = compare({0: ([factor * slope for slope in slopes], [PAPER_SLOPE] * len(slopes))})[0]
        side = "not distinguishable from" if not nats.settled else "less than" if nats.mean > 0 else "more than"
        details += f" That is {factor * found.mean:+.4f} nats per token, {side} the paper's."
        agrees += f"; {side} the paper's"
    return answer, details, agrees
