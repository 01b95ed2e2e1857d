"""Sections on studies say what the JSON says: paired, corrected, complete points alone, and the paper beside it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from report_results import blank_pictures, made, made_allocation, made_scaling, noisy

from engrammar_lab.catalogue import STUDIES
from engrammar_lab.report.claims import Claim, claims_words
from engrammar_lab.report.curves import allocation_optimum, scaling_words
from engrammar_lab.report.parts import Table
from engrammar_lab.report.studies import apart, bases, differences, left_out, scores, study_section


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    blank_pictures(monkeypatch)


def words(section):
    return " ".join(part for part in section.body if isinstance(part, str))


def first_table(section):
    return next(part for part in section.body if isinstance(part, Table))


def test_differences_are_paired_by_seed_whatever_the_order_of_the_runs():
    result = made("allocation", {"100%": [2.0, 3.0, 4.0], "80%": [1.9, 2.89, 3.91], "60%": [1.9, 3.1, 3.9]})
    result["runs"].reverse()
    assert differences(result)["80%"].values == pytest.approx([-0.1, -0.11, -0.09])
    section = study_section(result)
    assert section.verdict.answer.startswith("“80%” is best: 0.1000 bits per byte less than “100%”.")
    assert section.verdict.sure == "1 of 2 differences"
    assert "The lowest mean is that of “80%”; the seeds do not separate it from “60%”." in words(section)
    assert first_table(section).rows[1][1] == "2.9000 ± 1.0050" and first_table(section).strong == (1,)


def test_points_are_compared_with_the_first_and_those_smaller_by_intent_are_not_held_equal():
    result = made("rivals", {"memory": [1.0, 1.0], "experts": [2.0, 2.0], "nothing (dense)": [2.5, 2.6]})
    assert bases(result) == {"experts": "memory", "nothing (dense)": "memory"}
    assert differences(result)["nothing (dense)"].values == pytest.approx([1.5, 1.6])
    assert [row[2] for row in first_table(study_section(result)).rows] == ["", "memory", "memory"]
    for run in result["runs"]:
        run["total_parameters"] //= 1 + 2 * (run["point"] == "nothing (dense)")
    assert apart(result)["total_parameters"] == 0


def test_unclear_and_negative_results_are_said_in_so_many_words():
    unclear = study_section(made("boundary", {"end of text": [2.0, 2.1, 2.2], "start of row": [2.1, 2.0, 2.2]}))
    assert "No other point is clearly better than “end of text”." in unclear.verdict.answer
    assert (
        "The seeds do not separate “end of text” from “start of row”." in unclear.verdict.answer
        and unclear.verdict.sure == "no"
    )
    worse = study_section(made("boundary", {"end of text": [2.0, 2.1, 2.2], "start of row": [2.1, 2.201, 2.299]}))
    assert "Clearly worse, in bits per byte: “start of row” (+0.1000)." in worse.verdict.answer
    assert worse.verdict.sure == "yes"
    one = study_section(made("boundary", {"end of text": [2.0], "start of row": [1.9]}))
    assert one.verdict.sure == "no" and first_table(one).rows[1][4] == "one seed"


def test_incomplete_points_are_left_out_and_named():
    result = made("allocation", {"100%": [2.0, 2.0], "90%": [1.9, 1.95], "80%": [1.9]})
    assert list(scores(result)) == ["100%", "90%"]
    assert "80% (1 of 2)" in left_out(result) and "70% (0 of 2)" in left_out(result)
    section = study_section(result)
    assert "80% (1 of 2)" in words(section) and len(first_table(section).rows) == 2
    alone = study_section(made("allocation", {"90%": [1.9]}))
    assert alone.verdict.answer == "No two points have all their seeds yet."
    with pytest.raises(ValueError, match="a run of the point '55%'"):
        scores(made("allocation", {"55%": [2.0]}))


def test_a_budget_that_is_not_equal_shows():
    result = made("allocation", {"100%": [2.0, 2.0], "40%": [2.0, 2.1]})
    assert apart(result) == pytest.approx({"total_parameters": 0, "active_parameters": 0.01, "flops_per_token": 0})
    assert "active ones by 1.000%" in words(study_section(result))


def test_nats_appear_where_bytes_per_token_were_recorded():
    values = {"end of text": [2.0, 2.0], "start of row": [2.1, 2.1]}
    told = first_table(study_section(made("boundary", values, bytes_per_token=3.0)))
    assert told.columns[4] == "in nats per token" and told.rows[1][4] == f"{0.1 * math.log(2) * 3:+.4f}"
    assert "in nats per token" not in first_table(study_section(made("boundary", values))).columns


@pytest.mark.parametrize("planted", [70.0, 35.0])
def test_the_planted_optimum_of_the_allocation_is_found(planted):
    optimum = allocation_optimum(scores(made_allocation(planted)))
    assert len(optimum.inside) == 3 and np.mean(optimum.inside) == pytest.approx(planted, abs=0.5)
    assert f"{planted:.1f}"[:2] in optimum.short()
    assert optimum.agrees().startswith("yes" if planted == 70 else "no: the optimum here has more memory")


def test_an_optimum_at_the_end_of_the_range_is_called_that():
    falling = made("allocation", {point: noisy(2 + float(point[:-1]) / 100) for point in STUDIES["allocation"].points})
    optimum = allocation_optimum(scores(falling))
    assert "at the end of the range" in optimum.words() and optimum.agrees().startswith("no")
    hill = replace(optimum, minima=(None, 50.0, 55.0))
    assert not hill.inside and "end of the range" in hill.short()
    assert "no minimum within the range" in replace(hill, best=50.0).short()


def test_the_planted_law_of_more_rows_is_chosen_and_its_slope_found():
    answer, details, agrees = scaling_words(scores(made_scaling(lambda rows: 2.2 - 0.03 * np.log10(rows))), None)
    assert answer == "Ten times the rows change bits per byte by -0.0300. A logarithm predicts left-out points better."
    assert "-0.0300 [-0.0300, -0.0300]" in details and agrees == "yes in sign"
    curved = scaling_words(scores(made_scaling(lambda rows: 1 + (rows / 500) ** -0.5)), None)
    assert "A power law with a floor predicts left-out points better." in curved[0]
    flat = made("scaling", {point: noisy(2, i, 0.01) for i, point in enumerate(STUDIES["scaling"].points)})
    assert "do not settle the sign" in scaling_words(scores(flat), None)[0]


def test_the_slope_is_held_against_the_papers_in_nats():
    complete = scores(made_scaling(lambda rows: 2.2 - 0.03 * np.log10(rows)))
    assert "more than the paper's" in scaling_words(complete, 2.0)[2]
    assert "less than the paper's" in scaling_words(complete, 0.5)[2]


def test_the_papers_orderings_are_confirmed_contradicted_or_open():
    complete = {"a": [1.0, 1.1, 1.2], "b": [1.1, 1.2, 1.301], "c": [0.9, 1.0, 1.101], "d": [1.1, 1.0, 1.2]}
    claims = [Claim(better="a", worse="b", nats=0.01), Claim(better="a", worse="c"), Claim(better="a", worse="d")]
    said = claims_words([*claims, Claim(better="a", worse="elsewhere")], complete, 2.0)
    assert "Confirmed: “a” over “b” (+0.1003" in said and "+0.2007 nats here, +0.0100 nats in the paper" in said
    assert "Open: “a” over “d”" in said and "Contradicted: “a” over “c”" in said and "elsewhere" not in said
    assert (
        claims_words(claims, complete, None, short=True)
        == "of the paper's orderings 1 confirmed, 1 open and 1 contradicted"
    )
    assert claims_words([Claim(better="x", worse="y")], complete, None) == ""
