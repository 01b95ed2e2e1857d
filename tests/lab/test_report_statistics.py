"""Tests that equal printed tables of t, Holm's correction by hand, and fits that recover what was planted."""

import math
from statistics import mean, stdev

import numpy as np
import pytest

from engrammar_lab.report.statistics import (
    Difference,
    above_chance,
    band,
    compare,
    half_width,
    holm,
    left_out_error,
    logarithm,
    p_of_questions,
    p_value,
    parabola_minimum,
    power_law,
)

ROWS = np.array([500.0, 1_600, 5_000, 16_000, 50_000])


@pytest.mark.parametrize(
    ("num", "two_sided_95"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (8, 2.365), (31, 2.042)]
)
def test_intervals_and_tests_equal_the_published_table_of_t(num, two_sided_95):
    values = [float(i * i) for i in range(num)]
    error = stdev(values) / math.sqrt(num)
    assert half_width(values) == pytest.approx(two_sided_95 * error, rel=2e-4)
    moved = [value - mean(values) + two_sided_95 * error for value in values]
    assert p_value(moved) == p_value([-value for value in moved]) == pytest.approx(0.05, abs=1e-4)


def test_the_interval_and_p_of_a_hand_made_sample():
    values = (1.0, 2.0, 3.0)  # mean 2, deviation 1, t = 2 sqrt 3
    assert half_width(values) == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    t = 2 * math.sqrt(3)
    assert p_value(values) == pytest.approx(1 - t / math.sqrt(2 + t**2))  # closed form for two degrees of freedom
    assert half_width([1.0]) == math.inf and p_value([1.0]) == 1
    assert p_value([0.0, 0.0]) == 1 and p_value([0.5, 0.5]) == 0


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_settled_needs_the_corrected_test_and_every_seed():
    firm = [-0.1, -0.11, -0.09]
    one = compare({"a": (firm, [0, 0, 0])})["a"]
    assert one.settled and one.mean == pytest.approx(-0.1) and one.p == pytest.approx(p_value(firm))
    many = compare({place: (firm, [0, 0, 0]) for place in range(20)})
    assert not many[7].settled and many[7].p == pytest.approx(20 * one.p)
    assert not Difference((-0.1, 0.1, -0.1), 0.01).settled and not Difference((-0.1,), 1.0).settled
    with pytest.raises(ValueError):
        compare({"a": ([1.0, 2.0], [1.0])})


def test_chance_is_left_behind_by_two_binomial_errors():
    error = math.sqrt(0.25 * 0.75 / 200)
    assert not above_chance(0.25 + 1.9 * error, 0.25, 200)
    assert above_chance(0.25 + 2.3 * error, 0.25, 200)
    assert not above_chance(0.005, 0.0, 200) and above_chance(0.05, 0.0, 200)


def test_each_law_recovers_its_own_curve_and_foretells_a_left_out_point_better():
    straight, curved = 2 - 0.03 * np.log10(ROWS), 1 + 0.5 * (ROWS / 500) ** -0.5
    between = np.array([1_000.0, 30_000])
    assert logarithm(ROWS, straight, between) == pytest.approx(2 - 0.03 * np.log10(between))
    assert power_law(ROWS, curved, between) == pytest.approx(1 + 0.5 * (between / 500) ** -0.5, abs=2e-3)
    assert left_out_error(logarithm, ROWS, straight) < 1e-9 < left_out_error(power_law, ROWS, straight)
    assert left_out_error(power_law, ROWS, curved) < left_out_error(logarithm, ROWS, curved) / 10


def test_the_band_is_the_interval_of_the_seeds_own_fits():
    curves = np.array([2 - slope * np.log10(ROWS) for slope in (0.02, 0.03, 0.04)])
    middle, half = band(logarithm, ROWS, curves, np.array([10.0, 100.0]))
    assert middle == pytest.approx([1.97, 1.94])
    assert half == pytest.approx([half_width([0.02, 0.03, 0.04]), half_width([0.04, 0.06, 0.08])])


def test_the_lowest_place_of_a_parabola_is_found_and_a_hill_has_none():
    x = np.array([10.0, 30, 50, 90])
    assert parabola_minimum(x, 2 + 1e-4 * (x - 62) ** 2) == pytest.approx(62)
    assert parabola_minimum(x, 2 - 1e-4 * (x - 62) ** 2) is None


def test_shares_of_few_questions_are_not_told_apart():
    assert p_of_questions(0.6, 0.4, 100) == pytest.approx(0.00389, abs=1e-4)  # z = 0.2 / sqrt(0.0048) = 2.887
    assert p_of_questions(0.6, 0.4, 10) > 0.3 and p_of_questions(0.0, 0.0, 10) == 1.0 and p_of_questions(0, 1, 5) == 0.0
