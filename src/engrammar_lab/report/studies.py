"""Sections on studies: the score of each point, its difference from another one, and what was held equal.

Letters: S seeds, P points of a study, X places where a fitted curve is read.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from engrammar.cells import Column, cells, titles
from engrammar_lab.catalogue import study_of
from engrammar_lab.report.claims import CLAIMS, claims_words
from engrammar_lab.report.curves import allocation_optimum, scaling_words
from engrammar_lab.report.figures import draw_allocation, draw_curves, draw_points, draw_scaling
from engrammar_lab.report.parts import Figure, Section, Table, Verdict, listed, machine_words, quoted, spread, told
from engrammar_lab.report.statistics import Difference, compare

COUNTS = ("total_parameters", "active_parameters", "flops_per_token")
SIZES = (
    Column("", "point"),
    Column("total parameters", "total_parameters", ","),
    Column("active", "active_parameters", ","),
    Column("rows of memory", "memory_rows", ","),
    Column("MFLOPs/token", "flops_per_token", ".3f", 1e6),
)


def scores(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """Bits per byte, seed by seed, of the study's points that have a run of every seed.

    Raises:
        ValueError: a run's point is not one of the study's.
    """
    known = study_of(result).points
    found: dict[str, dict[int, float]] = {point: {} for point in known}
    for run in result["runs"]:
        if run["point"] not in known:
            raise ValueError(
                f"{result['study']}.json has a run of the point {run['point']!r}, which the study has not: "
                f"engrammar lab run {result['study']}."
            )
        found[run["point"]][run["seed"]] = run["bits_per_byte"]
    seeds = sorted({run["seed"] for run in result["runs"]})
    return {point: [each[seed] for seed in seeds] for point, each in found.items() if len(each) == len(seeds)}


def left_out(result: Mapping[str, Any]) -> list[str]:
    """The study's points that lack runs, with the number of runs they have."""
    seeds = {run["seed"] for run in result["runs"]}
    complete = scores(result)
    counts = {point: sum(run["point"] == point for run in result["runs"]) for point in study_of(result).points}
    return [f"{point} ({counts[point]} of {len(seeds)})" for point in counts if point not in complete]


def bases(result: Mapping[str, Any]) -> dict[str, str]:
    """For each complete point, the point that it is compared with: the study's first, if that one is complete."""
    complete = scores(result)
    first = next(iter(study_of(result).points))
    return {point: first for point in complete if first in complete and first != point}


def differences(result: Mapping[str, Any]) -> dict[str, Difference]:
    """How much worse (+) each point is than the one it is compared with, in bits per byte, tested together."""
    own = scores(result)
    return compare({point: (own[point], own[base]) for point, base in bases(result).items()})


def nats_per_bit(result: Mapping[str, Any]) -> float | None:
    """Turns bits per byte into the paper's nats per token: ln 2 times bytes per token; None if not recorded."""
    known = result.get("bytes_per_token", result["runs"][0].get("bytes_per_token"))
    return None if known is None else math.log(2) * known


def apart(result: Mapping[str, Any]) -> dict[str, float]:
    """The largest share by which total and active parameters, and FLOPs, differ between points that are held equal."""
    held = scores(result).keys() - set(study_of(result).exempt)
    runs = [run for run in result["runs"] if run["point"] in held]
    return {kind: max(run[kind] for run in runs) / min(run[kind] for run in runs) - 1 for kind in COUNTS}


def study_section(result: Mapping[str, Any]) -> Section:
    """The section on one study."""
    study, complete = study_of(result), scores(result)
    missing = left_out(result)
    body: list[Table | Figure | str] = []
    if missing:
        body.append(f"Left out, because some of their seeds are missing: {listed(missing)}.")
    if complete:
        body += [_score_table(result), _pictures(result), *_findings(result), _equal_table(result), _proof(result)]
        if any(run.get("curve") for run in result["runs"]):
            png = draw_curves(result["runs"], list(complete))
            body.append(Figure(png=png, caption="Training loss, nats per token; grey: the first point."))
    return Section(
        key=result["study"],
        question=study.question,
        verdict=_verdict(result),
        measured=f"{machine_words(result)} Validation text, bits per byte; lower is better.",
        body=tuple(body),
    )


def _score_table(result: Mapping[str, Any]) -> Table:
    study, complete, against, found = study_of(result), scores(result), bases(result), differences(result)
    factor = nats_per_bit(result)
    rows = []
    for point, values in complete.items():
        row = [point, spread(values)]
        if point in found:
            own = found[point]
            nats = [] if factor is None else [f"{own.mean * factor:+.4f}"]
            words, *sure = told(own)
            row += [against[point], words, *nats, *sure]
        else:
            row += [""] * (4 + (factor is not None))
        rows.append(tuple(row))
    nats_column = () if factor is None else ("in nats per token",)
    return Table(
        columns=(
            study.axis, "bits per byte", "against", "difference [95 %]", *nats_column, "p", "settled",
        ),
        rows=tuple(rows),
        caption="Negative differences are gains. The best point is in bold.",
        strong=(list(complete).index(best_of(complete)[0]),),
    )  # fmt: skip


def _equal_table(result: Mapping[str, Any]) -> Table:
    runs = {run["point"]: run for run in reversed(result["runs"])}  # of each point its first
    return Table(
        columns=tuple(titles(SIZES)),
        rows=tuple(tuple(cells(SIZES, runs[point])) for point in scores(result)),
        caption="Sizes of the models. FLOPs are of a forward pass, by torch's counter.",
    )


def _proof(result: Mapping[str, Any]) -> str:
    most = apart(result)
    words = (
        f"Between points, total parameters differ by at most {most['total_parameters']:.3%}, active ones by "
        f"{most['active_parameters']:.3%}, FLOPs per token by {most['flops_per_token']:.3%}."
    )
    return words if study_of(result).equal else f"{words} This study does not hold them equal."


def _pictures(result: Mapping[str, Any]) -> Figure:
    complete, axis = scores(result), study_of(result).axis
    dots = "Dots are seeds, bars the mean ± deviation"
    if result["study"] == "allocation" and len(complete) > 3:
        shaded = f"{dots}; the curve is the parabola over the points with memory, the band where the paper is flat."
        return Figure(png=draw_allocation(complete, allocation_optimum(complete)), caption=shaded)
    if result["study"] == "scaling" and len(complete) > 3:
        return Figure(png=draw_scaling(complete, axis), caption=f"{dots}; fits with their 95 % band over seeds.")
    return Figure(
        png=draw_points(complete, differences(result), axis),
        caption=f"{dots}. Blue: settled better than what it is compared with; orange: worse; grey: not settled.",
    )


def _findings(result: Mapping[str, Any]) -> list[str]:
    """The results of the means, the fits and the paper's own orderings, in sentences."""
    complete, factor, sentences = scores(result), nats_per_bit(result), []
    if len(complete) > 2:
        best, ties = best_of(complete)
        tied = f"do not separate it from {quoted(ties)}" if ties else "separate it from all others"
        sentences.append(f"The lowest mean is that of “{best}”; the seeds {tied}.")
    if result["study"] == "scaling" and len(complete) > 3:
        sentences.append(scaling_words(complete, factor)[1])
    if result["study"] == "allocation" and len(complete) > 3:
        sentences.append(allocation_optimum(complete).words())
    claims = claims_words(CLAIMS.get(result["study"], ()), complete, factor)
    return [words for words in (" ".join(sentences), claims) if words]


def best_of(complete: Mapping[str, Sequence[float]]) -> tuple[str, list[str]]:
    """The point whose mean is lowest, and the points whose difference from it is not settled."""
    best = min(complete, key=lambda point: mean(complete[point]))
    found = compare({point: (own, complete[best]) for point, own in complete.items() if point != best})
    return best, [point for point, own in found.items() if not own.settled]


def _verdict(result: Mapping[str, Any]) -> Verdict:
    study, complete, found = study_of(result), scores(result), differences(result)
    if not complete or not found:
        return Verdict(answer="No two points have all their seeds yet.", sure="no", paper=study.paper, agrees="open")
    answer = _answer(complete, found)
    settled = sum(own.settled for own in found.values())
    sure = "yes" if settled == len(found) else f"{settled} of {len(found)} differences" if settled else "no"
    agrees = claims_words(CLAIMS.get(result["study"], ()), complete, None, short=True)
    if result["study"] == "allocation" and len(complete) > 3:
        optimum = allocation_optimum(complete)
        answer, agrees = f"{answer} {optimum.short()}", optimum.agrees()
    if result["study"] == "scaling" and len(complete) > 3:
        answer, _, agrees = scaling_words(complete, nats_per_bit(result))
    return Verdict(answer=answer, sure=sure, paper=study.paper, agrees=agrees or "no comparison")


def _answer(complete: Mapping[str, Sequence[float]], found: Mapping[str, Difference]) -> str:
    """Which point is best and by how much; if the lowest is not settled, which points are settled better and worse."""
    best, ties = best_of(complete)
    base = f"“{next(iter(complete))}”"  # what all are compared with
    if best in found and found[best].settled:
        words = f"“{best}” is best: {-found[best].mean:.4f} bits per byte less than {base}."
        return f"{words} The seeds do not separate it from {quoted(ties)}." if ties else words
    better, worse = (
        [f"“{point}” ({own.mean:+.4f})" for point, own in found.items() if own.settled and sign * own.mean > 0]
        for sign in (-1, 1)
    )
    sentences = [
        f"Better than {base}: {listed(better)}." if better else f"No other point is clearly better than {base}."
    ]
    sentences += [f"Clearly worse, in bits per byte: {listed(worse)}."] if worse else []
    open_ = [point for point, own in found.items() if not own.settled]
    sentences += [f"The seeds do not separate {base} from {quoted(open_)}."] if open_ else []
    return " ".join(sentences)
