"""The section on fact editing: what each way of changing facts reaches, and what it changes besides."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from engrammar_lab.report.figures import draw_over_counts
from engrammar_lab.report.parts import Figure, Section, Table, Verdict, machine_words, spread

EDIT = "Can facts be changed, many at once, and nothing else?"
PAPER = "no comparison: it does not edit"
GATED = "gated"
# Of each table: measures, their titles, and digits.
SHOWN = (
    ("free/prompt", "whole object said", 3),
    ("free/direct", "asked in other words", 3),
    ("free/follows", "only follows", 3),
    ("free/reverse", "reverse", 3),
    ("kept/neighbor", "neighbors kept", 3),
    ("kept/beside", "second subject kept", 3),
    ("kept/subject", "subject's other relations kept", 3),
)
ASKED = (
    ("free/question", "as a question", 3),
    ("free/chat", "in a chat", 3),
    ("kept/other question", "other questions kept", 3),
    ("kept/other chat", "in a chat, kept", 3),
)
BESIDES = (
    ("probability/prompt", "efficacy", 3),
    ("probability/direct", "paraphrases", 3),
    ("probability/neighbor", "neighbors", 3),
    ("neutral/other token", "neutral text: other token", 5),
    ("neutral/same bits", "same bits", 4),
    ("neutral/divergence", "divergence", 5),
    ("fluency/entropy", "entropy", 2),
    ("fluency/repeats", "object again", 2),
)
COSTS = tuple(
    (name, name, digits)
    for name, digits in (("seconds a fact", 2), ("bytes a fact", 0), ("undo seconds", 3), ("refused", 0))
)
TABLES = (
    (
        SHOWN,
        "Free generation: greedy decoding, nothing forced. The first four: shares of prompts answered with the whole "
        "object (reverse: with the subject). The last three: shares of prompts that go on with the same six tokens as "
        "before. “Second subject”: a neighbor's prompt after words that name the edited subject.",
    ),
    (
        ASKED,
        "Asked as a question, and as a user asks it in a chat (the model's own template): shares answered with the "
        "whole object; and of the same subject's other questions those that go on with the same six tokens as before. "
        "Runs without a row were made before these questions were asked.",
    ),
    (
        BESIDES,
        "Efficacy, paraphrases and neighbors as CounterFact's authors define them: the new object is likelier than the "
        "true one, for neighbors less likely. Neutral text is half chat, half prose: the share of positions whose "
        "likeliest token is another, whose logits are the same bits, and the divergence in nats. Entropy of 2- and "
        "3-grams, and how often the object is said again, in fifty tokens.",
    ),
    (COSTS, "CPU seconds on one thread, and bytes that have to be kept."),
)
# At a thousand edits: measure, what was aimed at, whether more is better, and its name.
AIMS = (
    ("free/prompt", 0.95, True, "the whole object in free generation"),
    ("free/direct", 0.90, True, "direct paraphrases"),
    ("kept/subject", 0.95, True, "other relations of the subject as they were"),
    ("kept/neighbor", 0.985, True, "neighbors as they were"),
    ("kept/beside", 0.985, True, "a second subject as it was"),
    ("neutral/other token", 0.001, False, "changed tokens of neutral text"),
    ("bytes a fact", 2048, False, "bytes a fact"),
    ("seconds a fact", 1.0, False, "CPU seconds a fact"),
)
AIMED_AT = 1000  # edits

Runs = Sequence[Mapping[str, Any]]
Point = tuple[str, int]  # way, edits


def edit_section(result: Mapping[str, Any]) -> Section:
    """The section on edit.json."""
    body: list[Table | Figure | str] = []
    for cases in dict.fromkeys(run["cases"] for run in result["runs"]):
        runs = [with_shares(run) for run in result["runs"] if run["cases"] == cases]
        points = by_point(runs)
        tables = [_table(cases, points, shown, caption) for shown, caption in TABLES]
        body += [table for table in tables if table.rows]
        for name, title in (("free/prompt", "whole object said"), ("kept/subject", "subject's other relations kept")):
            lines = _lines(points, name)
            if any(len(line) > 1 for line in lines.values()):
                png = draw_over_counts(lines, ("edits", f"{cases}: {title}"))
                body.append(Figure(png=png, caption=f"{title}, by the number of edits; means over orders of facts."))
        body += _aims(cases, points)
    undone = [run["undone to the bit"] for run in result["runs"]]
    body.append(f"After {sum(undone)} of {len(undone)} runs the edits were taken back to the same bits.")
    return Section(
        key="edit",
        question=EDIT,
        verdict=_verdict(result["runs"]),
        measured=f"{machine_words(result)} {result['base']}; at most {result['ask']['questions']} "
        "questions of a kind. Settings were chosen on facts that are not asked; the first 20 cases of order 0 were "
        "seen before, when the rule for second subjects was made.",
        body=tuple(body),
    )


def with_shares(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run, with what it costs a fact."""
    return dict(run) | {"bytes a fact": run["bytes"] / run["edits"], "seconds a fact": run["seconds"] / run["edits"]}


def by_point(runs: Runs) -> dict[Point, list[Mapping[str, Any]]]:
    """The runs of each way and number of edits, in the order in which they stand."""
    found: dict[Point, list[Mapping[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: int(run["edits"])):
        found.setdefault((run["way"], run["edits"]), []).append(run)
    return found


def _values(runs: Runs, name: str) -> list[float]:
    return [float(run[name]) for run in runs if name in run]


def _cell(runs: Runs, name: str, digits: int) -> str:
    values = _values(runs, name)
    return spread(values, digits) if values else "–"


def _table(cases: str, points: Mapping[Point, Runs], shown: Sequence[tuple[str, str, int]], caption: str) -> Table:
    """The points of which anything was measured that is shown."""
    rows = [
        (way, f"{edits:,}", *(_cell(runs, name, digits) for name, _, digits in shown))
        for (way, edits), runs in points.items()
        if any(_values(runs, name) for name, *_ in shown)
    ]
    columns = (cases, "edits", *(title for _, title, _ in shown))
    return Table(columns=columns, rows=tuple(rows), caption=caption)


def _lines(points: Mapping[Point, Runs], name: str) -> dict[str, list[tuple[float, float]]]:
    """By way: number of edits and mean."""
    found: dict[str, list[tuple[float, float]]] = {}
    for (way, edits), runs in points.items():
        if values := _values(runs, name):
            found.setdefault(way, []).append((float(edits), mean(values)))
    return found


def _aims(cases: str, points: Mapping[Point, Runs]) -> list[str]:
    """What was aimed at, and whether it was reached."""
    runs = points.get((GATED, AIMED_AT))
    if runs is None:
        return []
    words = []
    for name, aim, more, title in AIMS:
        if values := _values(runs, name):
            found = mean(values)
            reached = "reached" if (found >= aim if more else found <= aim) else "missed"
            words.append(f"{title}: {found:.4g} (aim {aim:g}: {reached})")
    return [f"{cases}, {AIMED_AT:,} edits by gated writes. " + "; ".join(words) + "."]


def _verdict(runs: Runs) -> Verdict:
    own = [run for run in runs if run["way"] == GATED]
    if not own:
        return Verdict(answer="No gated write was measured yet.", sure="no", paper=PAPER)
    most = max(int(run["edits"]) for run in own)
    last = [run for run in own if run["edits"] == most]
    told = [f"{title} {_cell(last, name, digits)}" for name, title, digits in SHOWN if _values(last, name)]
    seeds = len({run["seed"] for run in last})
    return Verdict(
        answer=f"Gated writes, {most:,} edits: {'; '.join(told)}.",
        sure="yes" if seeds >= 3 else f"no: {seeds} of 3 orders",
        paper=PAPER,
    )
