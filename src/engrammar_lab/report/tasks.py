"""The section on tasks: what memory changes beyond the loss, and what is left when it is switched off."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from engrammar_lab.report.figures import draw_differences
from engrammar_lab.report.parts import Figure, Section, Table, Verdict, interval, listed, machine_words, spread, told
from engrammar_lab.report.statistics import Difference, above_chance, compare, holm, p_of_questions, p_value

QUESTION = "Do tasks move with the loss?"
PAPER = "facts keep 29 to 44 % of the score with memory off, reading 81 to 93 %; with memory on most tasks rise"
KEPT = {"facts": (0.29, 0.44), "context": (0.81, 0.93)}  # share of the score with memory off, in the paper
Tasks = Mapping[str, Mapping[str, Any]]


def groups(tasks: Tasks) -> dict[str, list[str]]:
    """Names of tasks, by their first part."""
    found: dict[str, list[str]] = {}
    for name in tasks:
        found.setdefault(name.split("/")[0], []).append(name)
    return found


def is_above_chance(task: Mapping[str, Any], point: str) -> bool:
    return above_chance(mean(task["scores"][point]), task["chance"], task["questions"])


def kept(result: Mapping[str, Any], names: list[str]) -> list[float]:
    """Per seed, the share of the score above chance that is left with memory off, over tasks that are above chance.

    Empty if the model with memory is above chance in none of them.
    """
    _, on, off = result["points"]
    able = [result["tasks"][name] for name in names if is_above_chance(result["tasks"][name], on)]
    shares = []
    for seed in range(len(result["seeds"])):
        left, whole = (sum(task["scores"][point][seed] - task["chance"] for task in able) for point in (off, on))
        if whole > 0:
            shares.append(left / whole)
    return shares if len(shares) == len(result["seeds"]) else []


def task_differences(result: Mapping[str, Any]) -> dict[str, Difference]:
    """The model with memory minus the plain one, paired by seed, with all tasks tested together.

    Seeds share the questions, so each p-value is the larger of two: over seeds, and over questions (binomial).
    """
    plain, memory, _ = result["points"]
    values, p = {}, []
    for name, task in result["tasks"].items():
        own, other = task["scores"][memory], task["scores"][plain]
        values[name] = tuple(one - another for one, another in zip(own, other, strict=True))
        p.append(max(p_value(values[name]), p_of_questions(mean(own), mean(other), task["questions"])))
    return {name: Difference(values[name], corrected) for name, corrected in zip(values, holm(p))}


def tasks_section(result: Mapping[str, Any]) -> Section:
    """The section on tasks.json.

    Raises:
        ValueError: the result does not have three points: without memory, with it, and with it switched off.
    """
    if len(result["points"]) != 3:
        raise ValueError(f"tasks.json has the points {result['points']}; needed: without memory, with it, with it off.")
    found = task_differences(result)
    body: list[Table | Figure | str] = [
        _table(result, group, names, found) for group, names in groups(result["tasks"]).items()
    ]
    body.append(
        Figure(
            png=draw_differences(
                {name: own.values for name, own in found.items()},
                [name for name, own in found.items() if own.settled],
                f"{result['points'][1]} less {result['points'][0]}, share of questions right",
            ),
            caption="Each task's gain: seeds as dots, bars the mean ± deviation; grey: not settled.",
        )
    )
    body += [_sensitivity_table(result), _sensitivity_words(result)]
    return Section(
        key="tasks",
        question=QUESTION,
        verdict=_verdict(result, found),
        measured=machine_words(result, len(result["seeds"])),
        body=tuple(body),
    )


def _table(result: Mapping[str, Any], group: str, names: list[str], found: Mapping[str, Difference]) -> Table:
    rows = []
    for name in names:
        task, own = result["tasks"][name], found[name]
        cells = [f"{spread(task['scores'][p], 3)}{'' if is_above_chance(task, p) else ' ·'}" for p in result["points"]]
        head = (name.removeprefix(f"{group}/"), str(task["questions"]), f"{task['chance']:.2f}")
        rows.append((*head, *cells, *told(own, 3)))
    return Table(
        columns=(group, "questions", "chance", *result["points"], "gain [95 %]", "p", "settled"),
        rows=tuple(rows),
        caption="Shares of questions right. A dot: not above chance by 1.96 binomial standard errors.",
        strong=tuple(place for place, name in enumerate(names) if found[name].settled),
    )


def _sensitivity_table(result: Mapping[str, Any]) -> Table:
    rows = []
    for group, names in groups(result["tasks"]).items():
        shares, band = kept(result, names), KEPT.get(group)
        words = spread(shares, 2) if shares else "nothing above chance to keep"
        rows.append((group, words, f"{band[0]:.2f} to {band[1]:.2f}" if band else ""))
    return Table(
        columns=("group", "kept with memory off", "in the paper"),
        rows=tuple(rows),
        caption="Share of the score above chance that is left when memory adds nothing; 1 is all of it.",
    )


def _sensitivity_words(result: Mapping[str, Any]) -> str:
    by_group = {group: kept(result, names) for group, names in groups(result["tasks"]).items()}
    facts, reading = by_group.get("facts", []), by_group.get("context", [])
    if not facts or not reading:
        return "Whether facts need memory more than reading does cannot be said: one of the two is not above chance."
    own = compare({0: (reading, facts)})[0]
    if not own.settled:
        return f"With memory off, reading keeps {interval(own, 2)} more of its score than facts do: not settled."
    side = "as in the paper" if own.mean > 0 else "unlike in the paper"
    more, less = ("on facts", "on reading") if own.mean > 0 else ("on reading", "on facts")
    return f"With memory off, more of the score is lost {more} than {less} ({interval(own, 2)}), {side}."


def _verdict(result: Mapping[str, Any], found: Mapping[str, Difference]) -> Verdict:
    up = [name for name, own in found.items() if own.settled and own.mean > 0]
    down = [name for name, own in found.items() if own.settled and own.mean < 0]
    memory = result["points"][1]
    able = sum(is_above_chance(task, memory) for task in result["tasks"].values())
    if up or down:
        answer = f"Of {len(found)} tasks memory raises {len(up)} ({_named_gains(up, found)})"
        answer += f" and lowers {len(down)} ({_named_gains(down, found)})." if down else "."
    else:
        answer = f"The seeds settle a change in none of {len(found)} tasks."
    answer += f" {memory} is above chance in {able} of {len(found)}."
    sure = f"{len(up) + len(down)} of {len(found)} differences"
    if len(result["seeds"]) == 1:
        return Verdict(answer=f"One seed settles nothing. {answer}", sure="no", paper=PAPER, agrees="open")
    agrees = "in part" if up and len(up) < len(found) else "yes" if up else "no"
    return Verdict(answer=answer, sure=sure if up or down else "no", paper=PAPER, agrees=agrees)


def _named_gains(names: list[str], found: Mapping[str, Difference]) -> str:
    return listed([f"{name} {found[name].mean:+.3f}" for name in names])
