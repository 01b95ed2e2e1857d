"""The section on fact editing."""

from report_results import made_edit

from engrammar_lab.report.editing import edit_section


def test_the_section_says_what_was_reached_and_missed():
    words = " ".join(part for part in edit_section(made_edit(said=0.97)).body if isinstance(part, str))
    assert "the whole object in free generation: 0.97 (aim 0.95: reached)" in words and "other relations" in words
    assert "subject as they were: 0.9 (aim 0.95: missed)" in words and "taken back to the same bits" in words
    missed = " ".join(part for part in edit_section(made_edit(said=0.9)).body if isinstance(part, str))
    assert "free generation: 0.9 (aim 0.95: missed)" in missed


def test_no_verdict_without_gated_writes_and_no_aim_without_a_thousand():
    made = made_edit()
    made["runs"] = [run for run in made["runs"] if run["way"] != "gated"]
    assert edit_section(made).verdict.answer == "No gated write was measured yet."
    made = made_edit()
    made["runs"] = [run for run in made["runs"] if run["edits"] == 10]
    assert not any("aim" in part for part in edit_section(made).body if isinstance(part, str))
    assert edit_section(made).verdict.answer.startswith("Gated writes, 10 edits: ")
