"""The section on training length says what its JSON says: optima, gains, and what is not fitted."""

import pytest
from report_results import OPTIMA, blank_pictures, made, made_horizon, made_horizon_tasks, made_tasks

from engrammar_lab.report.horizon import advice, horizon_section, horizon_tasks_section, lengths, rates_section
from engrammar_lab.report.parts import Table
from engrammar_lab.report.tasks import tasks_section


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    blank_pictures(monkeypatch)


def words(section):
    return " ".join(part for part in section.body if isinstance(part, str))


def test_optima_are_found_for_each_length_and_a_line_is_fitted_through_them():
    section = horizon_section(made_horizon())
    told = words(section)
    for tokens, optimum in OPTIMA.items():
        assert f"{tokens} tokens" in told and f"lowest at {optimum + 1 / 3:.1f} ± 1.4 (95 %) % experts" in told
    assert "(2.6 per idle parameter)" in told and "(41.0 per idle parameter)" in told
    # 20 points of share for four times the tokens: 20 / log10(4) = 33.2 for ten times
    assert "Ten times the tokens move the optimum by +33.2 [+33.2, +33.2] points" in told
    # 11.4 tokens per idle parameter are 0.55 decades before 32M: 70.3 - 33.2 x 0.553
    assert "At the paper's 11 tokens per idle parameter the line gives 52 ±" in told
    assert "that is no forecast" in told
    assert "memory at its best share from +0.1996 to +0.0496" in told
    assert "the bigram table from +0.1000 to +0.0250" in told and "the dense model from -0.2000 to -0.0500" in told
    assert "72 of 72 runs" in told
    assert section.verdict.agrees == "at 32M: yes: within the band where the paper is flat"


def test_the_best_share_of_each_length_stands_in_bold_beside_what_it_gains():
    table = next(part for part in horizon_section(made_horizon()).body if isinstance(part, Table))
    assert [table.rows[row][:2] for row in table.strong] == [
        ("2M", "35% experts"), ("8M", "55% experts"), ("32M", "75% experts")
    ]  # fmt: skip
    assert table.rows[table.strong[2]][3].startswith("-0.04") and len(table.rows) == 24
    assert [row[3:] for row in table.rows if row[1] == "100% experts"] == [("", "", "")] * 3


def test_every_run_of_the_longest_length_is_listed_with_how_well_it_copies():
    result = made_horizon()
    result["runs"][-1] |= {"repeat_gain": 0.4321, "bits_per_byte": 0.5}
    *_, table = (part for part in horizon_section(result).body if isinstance(part, Table))
    point = result["runs"][-1]["point"].partition(", ")[2]
    assert table.rows[0] == (point, str(result["runs"][-1]["seed"]), "0.5000", "0.432")
    assert len(table.rows) == 24 and [row[3] for row in table.rows[1:]] == [""] * 23
    assert [row[2] for row in table.rows] == sorted(row[2] for row in table.rows)


def test_how_far_seeds_of_a_share_are_apart_is_said_beside_how_far_shares_are():
    result = made_horizon()
    longest = [run for run in result["runs"] if run["point"].startswith("32M, ") and run["point"].endswith("%")]
    firsts = [run["bits_per_byte"] for run in longest if run["seed"] == 0]
    own = [run for run in longest if run["point"] == "32M, 55%"]
    own[1]["bits_per_byte"] = own[0]["bits_per_byte"] + 0.25
    said = f"up to 0.2500 bits per byte apart (55% experts), shares with one seed up to {max(firsts) - min(firsts):.4f}"
    assert said in words(horizon_section(result))


def test_no_line_is_fitted_where_an_optimum_is_at_the_end_of_the_range():
    told = words(horizon_section(made_horizon(optima={"2M": -20.0, "8M": 50.0, "32M": 70.0})))
    assert "No line is fitted through the optima: 2M has none within the range for every seed." in told
    assert "Ten times the tokens" not in told


def test_a_seed_that_has_only_begun_changes_nothing():
    result = made_horizon(seeds=(2, 2, 2))
    result["runs"] = [run for run in result["runs"] if run["point"] != "8M, bigram"]
    begun = next(run for run in result["runs"] if run["point"] == "8M, 100%")
    more = {**result, "runs": [*result["runs"], {**begun, "seed": 2}]}
    assert [each.points for each in lengths(more)] == [each.points for each in lengths(result)]


def test_lengths_with_fewer_seeds_are_told_with_those_they_have():
    section = horizon_section(made_horizon(seeds=(3, 3, 1)))
    assert "No line is fitted through the optima, since the lengths have different seeds." in words(section)
    assert section.verdict.sure == "the gain at 2M and 8M"
    result = made_horizon()
    result["runs"] = [run for run in result["runs"] if (run["point"], run["seed"]) != ("8M, 55%", 1)]
    assert [len(each.points["55%"]) for each in lengths(result)] == [3, 2, 3]  # seed 1 is left out at 8M
    result["runs"] = [run for run in result["runs"] if run["point"] != "8M, bigram"]
    assert len(lengths(result)[1].points["55%"]) == 2 and "bigram" not in lengths(result)[1].points
    rivals = ("8M, bigram", "8M, dense")  # which one seed alone has: its shares are told with those of the others
    result["runs"] = [run for run in made_horizon()["runs"] if run["point"] not in rivals or run["seed"] == 0]
    assert len(lengths(result)[1].points["55%"]) == 3 and "dense" not in lengths(result)[1].points
    result["runs"] = [run for run in result["runs"] if run["point"] == "2M, dense"]
    assert horizon_section(result).verdict.answer == "No length has experts alone and memory yet."


def test_a_length_of_which_the_ends_alone_are_measured_has_no_best_share():
    result = made_horizon()
    ends = ("32M, 100%", "32M, 10%", "32M, dense")
    result["runs"] = [run for run in result["runs"] if not run["point"].startswith("32M") or run["point"] in ends]
    section = horizon_section(result)
    assert "32M: 10% experts of the few shares measured so far, " in section.verdict.answer
    assert "8M: 55% experts best" in section.verdict.answer and "From 2M to 8M tokens the gain" in words(section)
    assert "Ten times the tokens move the optimum by +33.2" in words(section)  # through two optima
    assert len(advice(result)["lengths"]) == 2


def test_the_best_rate_of_each_end_is_told():
    values = {"2M, 100%, 0.004": [2.0], "2M, 100%, 0.008": [1.9], "2M, 10%, 0.004": [1.7], "2M, 10%, 0.008": [1.8]}
    section = rates_section(made("rates", values))
    assert section.verdict.answer == "2M, 100% experts: 0.008; 2M, 10% experts: 0.004."
    (table,) = section.body
    assert table.columns == ("tokens", "idle parameters", "0.004", "0.008", "best rate")
    assert table.rows[0] == ("2M", "100% experts", "2.0000", "1.9000", "0.008")


def test_tasks_of_the_longest_training_are_told_as_those_of_the_pair_are():
    own, pair = horizon_tasks_section(made_horizon_tasks()), tasks_section(made_tasks(0.05))
    assert own.verdict == pair.verdict and own.key == "horizon-tasks"
    assert own.body[0].startswith("“MoE” is the point 32M, 100% of the horizon") and len(own.body) == len(pair.body) + 1
