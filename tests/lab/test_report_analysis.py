"""Sections on tasks, depth, gates and traffic: verdicts for clear, unclear and negative results."""

import numpy as np
import pytest
from report_results import blank_pictures, made_depth, made_gates, made_tasks, made_traffic

from engrammar_lab.report.analysis import depth_section, gates_section, shared_bins
from engrammar_lab.report.parts import Figure, Table
from engrammar_lab.report.tasks import kept, task_differences, tasks_section
from engrammar_lab.report.traffic import traffic_section


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    blank_pictures(monkeypatch)


def words(section):
    return " ".join(part for part in section.body if isinstance(part, str))


def tables(section):
    return [part for part in section.body if isinstance(part, Table)]


def test_tasks_that_move_are_named_and_those_that_do_not_are_said_to_stay():
    moved = tasks_section(made_tasks(0.2))
    assert moved.verdict.answer.startswith("Of 3 tasks memory raises 1 (facts/choice/seen +0.201)")
    assert moved.verdict.agrees == "in part" and moved.verdict.sure == "1 of 3 differences"
    still = tasks_section(made_tasks(0.0))
    assert "The seeds settle a change in none of 3 tasks." in still.verdict.answer and still.verdict.agrees == "no"
    lowered = tasks_section(made_tasks(-0.2))
    assert "raises 0 (none) and lowers 1 (facts/choice/seen -0.199)" in lowered.verdict.answer


def test_a_gain_that_seeds_share_still_needs_enough_questions():
    result = made_tasks(0.05)
    assert not task_differences(result)["facts/choice/seen"].settled  # 200 questions: a standard error of 0.05
    result["tasks"]["facts/choice/seen"]["questions"] = 5_000
    assert task_differences(result)["facts/choice/seen"].settled


def test_gains_are_paired_and_scores_at_chance_carry_a_dot():
    result = made_tasks(0.05)
    scores = result["tasks"]["facts/choice/seen"]["scores"]
    expected = np.subtract(scores["MoE + memory"], scores["MoE"])
    assert task_differences(result)["facts/choice/seen"].values == pytest.approx(expected.tolist())
    facts = tables(tasks_section(result))[0]
    assert facts.columns[0] == "facts" and [row[0] for row in facts.rows] == ["choice/seen", "cloze/seen"]
    assert "·" not in facts.rows[0][4] and facts.rows[1][4].endswith("·")


def test_what_is_kept_with_memory_off_counts_tasks_above_chance_alone():
    result = made_tasks(0.05)
    scores = result["tasks"]["facts/choice/seen"]["scores"]
    off, on = np.subtract(scores["MoE + memory, memory off"], 0.25), np.subtract(scores["MoE + memory"], 0.25)
    assert kept(result, ["facts/choice/seen", "facts/cloze/seen"]) == pytest.approx((off / on).tolist())
    assert kept(result, ["facts/cloze/seen"]) == []
    assert "With memory off, more of the score is lost on facts than on reading" in words(tasks_section(result))
    result["tasks"]["context/with"]["questions"] = 3  # now nobody can tell 0.65 from chance
    assert "cannot be said" in words(tasks_section(result))


def test_one_seed_leaves_everything_open():
    depth, tasks = made_depth(), made_tasks(0.05)
    del depth["runs"][1:], tasks["seeds"][1:]
    for task in tasks["tasks"].values():
        task["scores"] = {point: each[:1] for point, each in task["scores"].items()}
    assert depth_section(depth).verdict.agrees == "open: one seed"
    assert tasks_section(tasks).verdict.answer.startswith("One seed settles nothing.")


def test_tasks_need_three_points():
    with pytest.raises(ValueError, match="with it, with it off"):
        tasks_section(made_tasks() | {"points": ["MoE"]})


def test_depth_says_where_kl_is_lower_and_which_layers_look_deeper():
    clear = depth_section(made_depth(0.5)).verdict
    assert "KL is lower after layer 1 (-0.491 nats)" in clear.answer and clear.agrees == "yes"
    assert "By CKA, layers 0, 1 and 2 resemble a deeper layer of the plain model." in clear.answer
    flat = made_depth(0.0)
    for run in flat["runs"]:
        run["alignment"]["nearest"] = [0, 1, 2, 3]
    none = depth_section(flat).verdict
    assert "lower after no layer" in none.answer and "no layer resembles" in none.answer and none.agrees == "no"
    assert "higher after layer 1" in depth_section(made_depth(-0.5)).verdict.answer


def test_gates_trends_are_told_with_their_direction():
    rising, falling = gates_section(made_gates(0.05)).verdict, gates_section(made_gates(-0.03)).verdict
    assert "The more often a 3-gram was seen, the more gates open." in rising.answer
    assert (
        "the more memory helps." in rising.answer
        and "most at 8 to 15 occurrences (0.500 nats less than the plain MoE)" in rising.answer
    )
    assert "the less gates open" in falling.answer and rising.sure == "2 of 2 trends"
    assert "How much gates open shows no settled trend" in gates_section(made_gates(0.0)).verdict.answer


def test_a_bin_that_a_seed_lacks_is_left_out():
    result = made_gates()
    del result["runs"][1]["orders"]["3"][2]
    assert [each[0]["count_from"] for each in shared_bins(result["runs"], "3")] == [0, 1, 4, 8]
    section = gates_section(result)
    assert len(tables(section)[0].rows) == 5 and len(tables(section)[1].rows) == 4
    assert sum(isinstance(part, Figure) for part in section.body) == 3


def test_traffic_stands_beside_a_random_hash():
    section = traffic_section(made_traffic())
    assert "97.0% of distinct 3-grams share a row" in section.verdict.answer and "99.8%" in section.verdict.answer
    assert section.verdict.agrees == "weakly: the hottest 10 % serve 41%"
    collisions, rows = tables(section)
    assert collisions.rows[0][2] == "12,345" and collisions.rows[0][-1] == "0.91 ± 0.00"
    assert collisions.rows[1][-1] == "too few" and rows.rows[0][1] == "4,112"
