"""What a few paired seeds can tell: paired differences, Holm's correction, and fits seed by seed.

Letters: S seeds, P points of a study, X places where a fitted curve is read.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import TypeVar

import numpy as np
from scipy.stats import ttest_1samp

LEVEL = 0.95
Key = TypeVar("Key", bound=Hashable)
EXPONENTS = np.geomspace(0.02, 3, 120)  # of a power law; one with a smaller exponent is a logarithm to four digits


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % t-interval of the mean; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    low, high = ttest_1samp(values, 0).confidence_interval(LEVEL)
    return float(high - low) / 2


def p_value(values: Sequence[float]) -> float:
    """Two-sided p-value of the mean being 0 (for differences: the paired t-test); 1 for a single value."""
    if len(values) < 2 or not any(values):
        return 1.0
    return float(ttest_1samp(values, 0).pvalue) if len(set(values)) > 1 else 0.0


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for all comparisons together."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True)
class Difference:
    """A paired difference: its value for each seed, and its p after Holm's correction."""

    values: tuple[float, ...]
    p: float

    @cached_property
    def mean(self) -> float:
        return mean(self.values)

    @cached_property
    def half(self) -> float:
        return half_width(self.values)

    @property
    def settled(self) -> bool:
        """Whether the corrected test rejects 0 and all seeds have the same sign."""
        one_way = all(value > 0 for value in self.values) or all(value < 0 for value in self.values)
        return one_way and self.p < 1 - LEVEL


def compare(pairs: Mapping[Key, tuple[Sequence[float], Sequence[float]]]) -> dict[Key, Difference]:
    """Paired differences, first minus second, tested together."""
    values = {
        key: tuple(own - base for own, base in zip(first, second, strict=True))
        for key, (first, second) in pairs.items()
    }
    corrected = holm([p_value(each) for each in values.values()])
    return {key: Difference(each, p) for (key, each), p in zip(values.items(), corrected)}


def above_chance(score: float, chance: float, questions: int) -> bool:
    """Whether a share of right answers exceeds chance by 1.96 binomial standard errors, the larger of the two."""
    variance = max(score * (1 - score), chance * (1 - chance)) / questions
    return score > chance + 1.96 * math.sqrt(variance)


def p_of_questions(score: float, other: float, questions: int) -> float:
    """Two-sided p-value of two shares of right answers being equal (normal approximation, questions not paired)."""
    error = math.sqrt((score * (1 - score) + other * (1 - other)) / questions)
    return math.erfc(abs(score - other) / error / math.sqrt(2)) if error else float(score == other)


# ---- fits; a law maps (x_P, y_P, read_X) to its values at read_X ----
Law = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def logarithm(rows_P: np.ndarray, loss_P: np.ndarray, read_X: np.ndarray) -> np.ndarray:
    """Least squares of loss = a + b log10 rows."""
    return np.polyval(np.polyfit(np.log10(rows_P), loss_P, 1), np.log10(read_X))


def parabola(x_P: np.ndarray, y_P: np.ndarray, read_X: np.ndarray) -> np.ndarray:
    """Least squares of y = a + b x + c x^2."""
    return np.polyval(np.polyfit(x_P, y_P, 2), read_X)


def power_law(rows_P: np.ndarray, loss_P: np.ndarray, read_X: np.ndarray) -> np.ndarray:
    """Least squares of loss = floor + a rows^-exponent, with an exponent out of `EXPONENTS`."""
    scale = float(np.exp(np.log(rows_P).mean()))  # keeps the powers near 1

    def line(exponent: float) -> tuple[np.ndarray, float]:
        x_P = (rows_P / scale) ** -exponent
        fit = np.polyfit(x_P, loss_P, 1)
        return fit, float(np.sum((np.polyval(fit, x_P) - loss_P) ** 2))

    best = min(EXPONENTS, key=lambda exponent: line(exponent)[1])
    return np.polyval(line(best)[0], (read_X / scale) ** -best)


def left_out_error(law: Law, x_P: np.ndarray, y_P: np.ndarray) -> float:
    """Root mean square, over all points, of the error at a point of the law fitted to the others."""
    errors = []
    for index in range(len(x_P)):
        kept = np.arange(len(x_P)) != index
        errors.append(law(x_P[kept], y_P[kept], x_P[index : index + 1])[0] - y_P[index])
    return float(np.sqrt(np.mean(np.square(errors))))


def band(law: Law, x_P: np.ndarray, y_SP: np.ndarray, read_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The law fitted for each seed: the mean over seeds at `read_X`, and half of its 95 % t-interval."""
    curves_SX = np.array([law(x_P, y_P, read_X) for y_P in y_SP])
    return curves_SX.mean(0), np.array([half_width(list(column)) for column in curves_SX.T])


def parabola_minimum(x_P: np.ndarray, y_P: np.ndarray) -> float | None:
    """The x at which the least-squares parabola is lowest; None if it has no minimum."""
    bend, slope, _ = np.polyfit(x_P, y_P, 2)
    return float(-slope / (2 * bend)) if bend > 0 else None
