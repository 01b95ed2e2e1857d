"""The section on forgetting: what each way loses when all have learned a text equally well."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from engrammar_lab.report.adapters import CHAT, RECALL, Scores
from engrammar_lab.report.parts import Section, Table, Verdict, interval, listed, machine_words, spread, told
from engrammar_lab.report.statistics import Difference, compare

FORGETTING = "What is forgotten when a thousand facts are learned equally well?"
PAPER = "no comparison: its memories are trained with their model"
BASE = "as it was"
SHOWN = (
    ("taught/nats", "taught text", 3),
    (RECALL, "recalled", 3),
    ("held/nats", "held-out text", 3),
    ("other/nats", "other prose", 3),
    (CHAT, "own chat", 3),
)


def forgetting_section(result: Mapping[str, Any]) -> Section:
    """The section on forgetting.json."""
    found, equal = scores(result), result["equal"]
    moved = compare({way: (own[CHAT], found[BASE][CHAT]) for way, own in found.items() if way != BASE})
    taught = result["amount"]["num_taught"]
    about = (
        f"{taught:,} glosses of WordNet are taught until {equal['blocks']} blocks of them have at most "
        f"{equal['nats']:g} nats per token, in {equal['epochs']} passes at most; of the sparse memory a step trains "
        f"{equal['rows']:,} rows; rare are those that at most {result['how']['most_common']:.1%} of other text reads."
    )
    return Section(
        key="forgetting",
        question=FORGETTING,
        verdict=_verdict(moved),
        measured=f"{machine_words(result)} {result['base']}.",
        body=(about, _ways(found), _questions(found)),
    )


def scores(result: Mapping[str, Any]) -> Scores:
    """The figures of each way that has a run of every seed that the base has, seed by seed."""
    seeds = sorted(run["seed"] for run in result["runs"] if run["way"] == BASE)
    ways = dict.fromkeys(run["way"] for run in result["runs"])
    by_key = {(run["way"], run["seed"]): run for run in result["runs"]}
    complete = [way for way in ways if all((way, seed) in by_key for seed in seeds)]
    return {
        way: {
            name: [float(by_key[way, seed][name]) for seed in seeds]
            for name in by_key[way, seeds[0]]
            if name not in ("way", "seed")
        }
        for way in complete
    }


def _ways(found: Scores) -> Table:
    rows = []
    for way, own in found.items():
        cells = [spread(own[name], digits) for name, _, digits in SHOWN]
        reached = f"{sum(own['reached']):.0f} of {len(own['reached'])}" if "reached" in own else ""
        steps, seconds = (f"{mean(own[name]):,.0f}" if name in own else "" for name in ("steps", "seconds"))
        reads = f"{mean(own['background_reads_changed']):.1%}" if "background_reads_changed" in own else ""
        rows.append((way, *cells, reached, steps, seconds, reads))
    return Table(
        columns=("way", *(title for _, title, _ in SHOWN), "reached", "steps", "CPU s", "reads changed"),
        rows=tuple(rows),
        caption="Texts and chat in nats per token. “Recalled”: greedy decoding from the headword writes the whole "
        "gloss. “Own chat”: the base's own answers, which should not get less likely. “Reached”: seeds that "
        "learned the text so well. “Reads changed”: the share of other text's reads that fall on rows that changed.",
    )


def _questions(found: Scores) -> Table:
    names = [name for name in found[BASE] if name.startswith("questions/")]
    pairs = {(way, name): (own[name], found[BASE][name]) for way, own in found.items() if way != BASE for name in names}
    rows = tuple(
        (way, name.partition("/")[2], spread(found[way][name], 3), *told(own, 3))
        for (way, name), own in compare(pairs).items()
    )
    return Table(
        columns=("way", "questions", "right", "change [95 %]", "p", "settled"),
        rows=rows,
        caption="Questions that the text does not answer, against the model as it was.",
    )


def _verdict(moved: Mapping[str, Difference]) -> Verdict:
    if not moved:
        return Verdict(answer="No way was run yet.", sure="no", paper=PAPER)
    answer = "; ".join(f"{way} {interval(own, 3)}" for way, own in moved.items())
    settled = listed([way for way, own in moved.items() if own.settled], "no")
    return Verdict(answer=f"Nats by which the model's own chat gets less likely: {answer}.", sure=settled, paper=PAPER)
