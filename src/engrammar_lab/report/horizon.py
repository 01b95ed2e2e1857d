"""The section on training length: where the best share of memory lies, and what memory gains, as models train longer.

Letters: L lengths of training, S seeds, X places where a fitted curve is read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np

from engrammar_lab.catalogue import study_of
from engrammar_lab.measure import merge_tasks
from engrammar_lab.report.copying import copying_parts
from engrammar_lab.report.curves import FLAT, Optimum, allocation_optimum
from engrammar_lab.report.figures import COLOURS, GREY, mark, one_axes, style, to_png
from engrammar_lab.report.parts import Figure, Section, Table, Verdict, interval, listed, machine_words, spread, told
from engrammar_lab.report.statistics import Difference, band, compare, half_width, p_value, parabola
from engrammar_lab.report.tasks import tasks_section

HORIZON_TASKS = "Do tasks move with the loss after the longest training?"
EXPERTS, BIGRAM, DENSE = "100%", "bigram", "dense"
PAPER_TOKENS, PAPER_IDLE = 262e9, 22.9e9  # tokens and idle parameters of the paper's 27B models


@dataclass(frozen=True, kw_only=True)
class Length:
    """The complete points of one length of training."""

    name: str
    tokens: int  # tokens of a run
    idle: int | None  # parameters that a token does not use: those of the plain MoE beyond those of the dense model
    points: Mapping[str, list[float]]  # bits per byte of each point, seed by seed
    hours: float  # core-hours of all runs of this length

    @property
    def shares(self) -> dict[str, list[float]]:
        """The points along the experts' share."""
        return {point: values for point, values in self.points.items() if point.endswith("%")}

    @property
    def best(self) -> str:
        """The share with memory whose mean is lowest."""
        return min(self.shares.keys() - {EXPERTS}, key=lambda point: mean(self.points[point]))

    @property
    def is_sampled(self) -> bool:
        """Whether there are enough shares to say which is best."""
        return len(self.shares) > 3

    @property
    def optimum(self) -> Optimum | None:
        """The minimum of the parabola over the points with memory, if there are enough points."""
        return allocation_optimum(self.shares) if self.is_sampled else None

    def gain(self, point: str) -> list[float]:
        """How much lower than experts alone, seed by seed."""
        return [base - own for own, base in zip(self.points[point], self.points[EXPERTS], strict=True)]


def lengths(result: Mapping[str, Any]) -> list[Length]:
    """The lengths that have experts alone and a point with memory, each with its points that have all of its seeds.

    Those are the seeds of experts alone of which the most shares have a run, so that one that has only begun waits.
    """
    runs: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for point in study_of(result).points:
        name, _, rest = point.partition(", ")
        runs.setdefault(name, {})[rest] = {run["seed"]: run for run in result["runs"] if run["point"] == point}
    dense = next((run for run in result["runs"] if run["point"].endswith(f", {DENSE}")), None)  # of any length
    found = []
    for name, points in runs.items():
        shares = [own for point, own in points.items() if point.endswith("%")]
        num_shares = {seed: sum(seed in own for own in shares) for seed in points.get(EXPERTS, {})}
        seeds = sorted(seed for seed, num in num_shares.items() if num == max(num_shares.values()))
        complete = {point: own for point, own in points.items() if seeds and set(own) >= set(seeds)}
        if not any(point.endswith("%") and point != EXPERTS for point in complete):
            continue
        plain = complete[EXPERTS][seeds[0]]
        every = [run for own in points.values() for run in own.values()]
        found.append(
            Length(
                name=name,
                tokens=plain["tokens"],
                idle=plain["total_parameters"] - dense["total_parameters"] if dense else None,
                points={point: [own[seed]["bits_per_byte"] for seed in seeds] for point, own in complete.items()},
                hours=sum(run["tokens"] / run["tokens_per_second"] for run in every if run["tokens_per_second"]) / 3600,
            )
        )
    return found


def horizon_section(result: Mapping[str, Any]) -> Section:
    """The section on horizon.json."""
    study, found = study_of(result), lengths(result)
    sampled = [each for each in found if each.is_sampled]
    num_runs = len(study.points) * len({run["seed"] for run in result["runs"]})
    body: list[Table | Figure | str] = []
    if found:
        body = [_table(found), Figure(png=_draw(found), caption=_CAPTION), *_findings(sampled)]
        if len(sampled) > 1:
            body.append(
                Figure(png=_draw_gains(sampled), caption="What each model gains over experts alone, by length.")
            )
        body += copying_parts([run for run in result["runs"] if run["point"].startswith(f"{found[-1].name}, ")])
    hours = sum(each.hours for each in found)
    num_seeds = min((len(each.points[EXPERTS]) for each in found), default=0)
    body.append(
        f"{len(result['runs'])} of {num_runs} runs of these seeds are done; those of the lengths above took "
        f"{hours:.1f} core-hours."
    )
    return Section(
        key="horizon",
        question=study.question,
        verdict=_verdict(found, study.paper),
        measured=_measured(result, num_seeds),
        body=tuple(body),
    )


_CAPTION = (
    "Bits per byte above those of experts alone at the same length; negative is a gain. Dots are seeds, bars the mean "
    "± deviation, curves the parabolas over the points with memory. The band is where the paper is flat."
)


def _measured(result: Mapping[str, Any], num_seeds: int) -> str:
    words = machine_words({name: value for name, value in result.items() if name != "tokens"}, num_seeds)
    return f"{words} Bits per byte of validation text; lower is better."


def _compared(found: Sequence[Length]) -> dict[tuple[str, str], Difference]:
    """Every point against experts alone at its length, all tested together."""
    return compare(
        {
            (each.name, point): (values, each.points[EXPERTS])
            for each in found
            for point, values in each.points.items()
            if point != EXPERTS
        }
    )


def _table(found: Sequence[Length]) -> Table:
    compared = _compared(found)
    rows: list[tuple[str, ...]] = []
    strong: list[int] = []
    for each in found:
        for point, values in each.points.items():
            if point == each.best:
                strong.append(len(rows))
            own = compared.get((each.name, point))
            cells = ("", "", "") if own is None else told(own)
            rows.append((each.name, point if point in (BIGRAM, DENSE) else f"{point} experts", spread(values), *cells))
    return Table(
        columns=("tokens", "idle parameters", "bits per byte", "against experts alone [95 %]", "p", "settled"),
        rows=tuple(rows),
        caption="In bold the best share with memory. The bigram table has a quarter of the idle parameters; the dense "
        "model has none, and the active parameters of the others.",
        strong=tuple(strong),
    )


def _draw(found: Sequence[Length]) -> bytes:
    with style():
        figure, axes = one_axes(3.8)
        axes.axvspan(*FLAT, color="#f0e6c8", zorder=0)
        axes.axhline(0, color=GREY, linewidth=1)
        for each, colour in zip(found, COLOURS):
            with_memory = [point for point in each.shares if point != EXPERTS]
            above = {float(point.rstrip("%")): [-gain for gain in each.gain(point)] for point in with_memory}
            for x, values in above.items():
                mark(axes, x, values, colour)
            if len(above) > 2:
                x_P, read_X = np.array(list(above)), np.linspace(min(above), max(above), 120)
                mean_X, _ = band(parabola, x_P, np.array(list(above.values())).T, read_X)
                axes.plot(read_X, mean_X, color=colour, label=f"{each.name} tokens")
        axes.set(xlabel="experts' share of the idle parameters, %", ylabel="bits per byte above experts alone")
        axes.legend()
        return to_png(figure)


def _draw_gains(found: Sequence[Length]) -> bytes:
    with style():
        figure, axes = one_axes(3.2)
        axes.axhline(0, color=GREY, linewidth=1)
        for (name, of), colour in zip((("memory, best share", None), (BIGRAM, BIGRAM), (DENSE, DENSE)), COLOURS):
            there = [each for each in found if (of or each.best) in each.points]
            gains = [each.gain(of or each.best) for each in there]
            for each, own in zip(there, gains):
                mark(axes, each.tokens, own, colour)
            axes.plot([each.tokens for each in there], [mean(own) for own in gains], color=colour, label=name)
        axes.set(xscale="log", xlabel="tokens of training", ylabel="gain over experts alone, bits per byte")
        axes.legend()
        return to_png(figure)


def _findings(sampled: Sequence[Length]) -> list[str]:
    """The optimum of each length, the fit over lengths, and how the gains move."""
    words = []
    for each in sampled:
        if each.optimum is not None:
            per = "" if each.idle is None else f" ({each.tokens / each.idle:.1f} per idle parameter)"
            words.append(f"{each.name} tokens{per}: {each.optimum.words()}")
    if len(sampled) > 1:
        words += [_fit_words(sampled), _gain_words(sampled)]
    return words


def _fit_words(found: Sequence[Length]) -> str:
    """How the fitted optimum moves with tokens, and what that says of the paper's model."""
    minima = [each.optimum.inside if each.optimum else [] for each in found]
    outside = [each.name for each, own in zip(found, minima) if not own]
    if outside:
        have = "has" if len(outside) == 1 else "have"
        return f"No line is fitted through the optima: {listed(outside)} {have} none within the range for every seed."
    if len({len(own) for own in minima}) > 1:
        return "No line is fitted through the optima, since the lengths have different seeds."
    decades_L = np.log10([each.tokens for each in found])
    lines = [np.polyfit(decades_L, own_L, 1) for own_L in zip(*minima)]
    slope = Difference(tuple(float(line[0]) for line in lines), p_value([float(line[0]) for line in lines]))
    words = f"Ten times the tokens move the optimum by {interval(slope, 1)} points of experts' share"
    words += "." if slope.settled else ", which the seeds do not settle."
    if all(each.idle for each in found):
        ratio = PAPER_TOKENS / PAPER_IDLE
        per_idle = found[-1].tokens / (found[-1].idle or 1)
        at = decades_L[-1] + math.log10(ratio / per_idle)
        here = [float(np.polyval(line, at)) for line in lines]
        words += (
            f" At the paper's {ratio:.0f} tokens per idle parameter the line gives {mean(here):.0f} ± "
            f"{half_width(here):.0f} % experts; the paper has 75 to 80 %."
        )
    there = [float(np.polyval(line, math.log10(PAPER_TOKENS))) for line in lines]
    beyond = math.log10(PAPER_TOKENS) - decades_L[-1]
    return words + (
        f" Read at the paper's 262B tokens it gives {mean(there):.0f} ± {half_width(there):.0f} %, {beyond:.1f} powers "
        "of ten beyond anything measured here, on a model 18,000 times smaller: that is no forecast."
    )


def _gain_words(found: Sequence[Length]) -> str:
    first, last = found[0], found[-1]
    words = []
    for name, own in (("memory at its best share", None), ("the bigram table", BIGRAM), ("the dense model", DENSE)):
        if all((own or each.best) in each.points for each in (first, last)):
            gains = [f"{mean(each.gain(own or each.best)):+.4f}" for each in (first, last)]
            words.append(f"{name} from {gains[0]} to {gains[1]}")
    return f"From {first.name} to {last.name} tokens the gain over experts alone goes, for {listed(words)}."


def _verdict(found: Sequence[Length], paper: str) -> Verdict:
    if not found:
        return Verdict(answer="No length has experts alone and memory yet.", sure="no", paper=paper, agrees="open")
    compared = _compared(found)
    gains = [
        f"{each.name}: {each.best} experts {'best' if each.is_sampled else 'of the few shares measured so far'}, "
        f"{-compared[each.name, each.best].mean:+.4f} bits per byte gained"
        for each in found
    ]
    settled = [each.name for each in found if compared[each.name, each.best].settled]
    optimum = found[-1].optimum
    return Verdict(
        answer=f"{'; '.join(gains)}.",
        sure=f"the gain at {listed(settled)}" if settled else "no",
        paper=paper,
        agrees="open" if optimum is None else f"at {found[-1].name}: {optimum.agrees()}",
    )


def rates_section(result: Mapping[str, Any]) -> Section:
    """The section on rates.json: one seed of each learning rate, at both ends of the allocation."""
    study = study_of(result)
    ends: dict[tuple[str, str], dict[str, float]] = {}
    for run in result["runs"]:
        if run["seed"] == 0:
            tokens, share, rate = run["point"].split(", ")
            ends.setdefault((tokens, share), {})[rate] = run["bits_per_byte"]
    rates = sorted({rate for own in ends.values() for rate in own}, key=float)
    rows = []
    for (tokens, share), own in ends.items():
        best = min(own, key=lambda rate: own[rate])
        rows.append((tokens, f"{share} experts", *(f"{own[r]:.4f}" if r in own else "" for r in rates), best))
    best_rates = [f"{row[0]}, {row[1]}: {row[-1]}" for row in rows]
    return Section(
        key="rates",
        question=study.question,
        verdict=Verdict(answer=f"{'; '.join(best_rates)}.", sure="one seed each", paper=study.paper),
        measured=_measured(result, 1),
        body=(Table(columns=("tokens", "idle parameters", *rates, "best rate"), rows=tuple(rows)),),
    )


def horizon_tasks_section(result: Mapping[str, Any]) -> Section:
    """The section on horizon-tasks.json: the tasks of the pair at the longest training."""
    plain, memory = result["pair"]
    section = tasks_section({**result, **merge_tasks([run["tasks"] for run in result["runs"]])})
    models = f"“MoE” is the point {plain} of the horizon, “MoE + memory” its point {memory}."
    return replace(section, key="horizon-tasks", question=HORIZON_TASKS, body=(models, *section.body))


def advice(result: Mapping[str, Any]) -> dict[str, Any]:
    """What `engrammar info --advise` knows (`engrammar.planning.advice`), from horizon.json.

    Raises:
        ValueError: no length has experts alone, enough shares of memory and a dense model yet.
    """
    found = [each for each in lengths(result) if each.idle is not None and each.is_sampled]
    if not found:
        raise ValueError("horizon.json has no whole length yet: engrammar lab run horizon.")
    plain = next(run for run in result["runs"] if run["point"].endswith(f", {EXPERTS}"))
    return {
        "command": result["command"],
        "date": result["date"],
        "idle": found[0].idle,
        "active": plain["active_parameters"],
        "lengths": [_advised(each) for each in found],
    }


def _advised(length: Length) -> dict[str, Any]:
    best = min(length.shares, key=lambda point: mean(length.shares[point]))
    others = compare({point: (own, length.shares[best]) for point, own in length.shares.items() if point != best})
    good = [best, *(point for point, own in others.items() if not own.settled)]
    gains = length.gain(length.best)
    half = round(half_width(gains), 4) if len(gains) > 1 else None
    return {
        "tokens": length.tokens,
        "memory": None if best == EXPERTS else _memory(best),
        "as_good": sorted(map(_memory, good)),
        "gain": [round(mean(gains), 4), half],
        "seeds": len(gains),
    }


def _memory(point: str) -> float:
    return 100 - float(point.rstrip("%"))
