"""What `info --advise` says follows from the study, and says how far away it is."""

import json
from pathlib import Path

import pytest
from report_results import made_horizon

from engrammar.planning.advice import advise, measured_of, number, read_measured
from engrammar_lab.report.horizon import advice

RESULTS = Path(__file__).parents[2] / "results" / "lab"


@pytest.mark.parametrize(
    ("text", "value"), [("10B", 1e10), ("262e9", 2.62e11), ("1.5M", 1.5e6), ("2,000", 2000), ("3t", 3e12)]
)
def test_numbers_are_read_with_their_units(text, value):
    assert number(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["many", "-1B", "0", "1Q", "", "1.2.3", "nan"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match="write 10B, 262e9 or 500M"):
        number(text)


def test_the_packages_file_is_what_the_committed_study_says():
    made = json.loads((RESULTS / "horizon.json").read_text())
    assert measured_of(advice(made)) == read_measured()


def test_advice_names_what_is_nearest_and_what_makes_it_weak():
    measured = measured_of(advice(made_horizon()))  # 800,000 idle parameters; best at 35, 55 and 75 % experts
    assert [own.memory for own in measured.lengths] == [65, 45, 25]
    near = advise(8e6, 8e5, measured)
    assert "10 tokens per idle parameter." in near and "It is of a model of about this size and length." in near
    assert "The nearest measurement supports 45" in near
    far = advise(1e14, 2e10, measured)
    assert "25,000 times the idle parameters" in far and "122.1 times longer" in far
    assert "It is weak evidence" in far and "20 to 25 % memory" in far
    few = measured_of(advice(made_horizon(seeds=(1, 1, 1))))
    assert "it has 1 seed" in advise(8e6, 8e5, few)


def test_nothing_is_advised_from_a_study_without_a_whole_length():
    made = made_horizon()
    made["runs"] = [run for run in made["runs"] if not run["point"].endswith("dense")]
    with pytest.raises(ValueError, match="no whole length yet"):
        advice(made)
