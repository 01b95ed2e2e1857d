"""What a report is made of; `page` and `pdf` turn it into files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from engrammar_lab.report.statistics import Difference


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells as text; `strong` are the numbers of the rows to emphasize."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    strong: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A PNG and what it shows."""

    png: bytes
    caption: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A row of the summary: the answer, how sure it is, what the paper found, and whether that agrees."""

    answer: str
    sure: str
    paper: str
    agrees: str = "no comparison"

    def rows(self) -> tuple[tuple[str, str], ...]:
        """The lines at the top of a section."""
        return ("Answer", self.answer), ("Settled", self.sure), ("The paper", self.paper), ("Agrees", self.agrees)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question: its verdict, how it was measured, then tables, figures and paragraphs (plain strings)."""

    key: str
    question: str
    verdict: Verdict
    measured: str
    body: tuple[Table | Figure | str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The sections in their order, and the questions that were not run."""

    sections: tuple[Section, ...]
    missing: tuple[str, ...]
    date: str  # date of the newest result
    digest: str  # SHA-256 of all results
    versions: str  # versions of the libraries that may change figures and the PDF

    @property
    def figures(self) -> list[Figure]:
        return [part for section in self.sections for part in section.body if isinstance(part, Figure)]

    def with_figures(self, pngs: Iterable[bytes]) -> "Report":
        """The same report, with its figures replaced in order by as many PNGs."""
        left = iter(pngs)
        sections = (
            tuple(replace(part, png=next(left)) if isinstance(part, Figure) else part for part in section.body)
            for section in self.sections
        )
        return replace(self, sections=tuple(replace(old, body=body) for old, body in zip(self.sections, sections)))


TITLE = "What memory buys"
ABOUT = (
    "Made by `engrammar lab report` from the JSON beside it; no number and no sentence about results is typed by hand. "
    "± is the sample deviation over seeds. Differences are paired by seed (the same text in the same order) and "
    "given with their 95 % t-interval; p is that of a paired t-test, Holm-corrected over the comparisons of a table. "
    "A difference is “settled” where the corrected p is below 0.05 and all seeds have one sign."
)
SUMMARY = ("question", "answer here", "settled?", "the paper", "agrees?")


def summary(report: Report) -> Table:
    """All verdicts in a table, for the first page."""
    rows = ((section.question, *(words for _, words in section.verdict.rows())) for section in report.sections)
    return Table(columns=SUMMARY, rows=tuple(rows))


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± sample deviation; a single value stays alone."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def interval(difference: Difference, digits: int = 4) -> str:
    """The signed mean and its 95 % interval."""
    if len(difference.values) == 1:
        return f"{difference.mean:+.{digits}f}"
    low, high = difference.mean - difference.half, difference.mean + difference.half
    return f"{difference.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def p_words(difference: Difference) -> str:
    if len(difference.values) == 1:
        return "one seed"
    return "<0.001" if difference.p < 0.001 else f"{difference.p:.3f}"


def told(difference: Difference, digits: int = 4) -> tuple[str, str, str]:
    """The cells of a difference: its interval, its p, and whether it is settled."""
    return interval(difference, digits), p_words(difference), "yes" if difference.settled else "no"


def listed(names: Sequence[str], empty: str = "none") -> str:
    """The values as "a, b and c", or `empty` if there are none."""
    *others, last = names or [empty]
    return f"{', '.join(others)} and {last}" if others else last


def quoted(points: Sequence[str]) -> str:
    """Points of a study, as listed in a sentence."""
    return listed([f"“{point}”" for point in points])


def machine_words(result: Mapping[str, Any], num_seeds: int | None = None) -> str:
    """How a result was measured: the command, tokens per run if recorded, seeds, day and machine.

    Args:
        num_seeds: None for the number of seeds that its runs have.
    """
    num_seeds = len({run["seed"] for run in result["runs"]}) if num_seeds is None else num_seeds
    machine, tokens = result["machine"], f": {result['tokens']:,} tokens a run" if "tokens" in result else ""
    instructions = f" ({machine['instructions']})" if "instructions" in machine else ""
    return (
        f"`{result['command']}`{tokens}, {num_seeds} seeds. {result['date']}; {machine['cpu']}{instructions}, "
        f"{machine['cores']} cores, torch {machine['torch']}."
    )
