"""The section on forgetting: what each way loses when all have learned a text equally well."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from engrammar_lab.report.adapters import BASE, CHAT, PAPER, RECALL, Scores, questions_table, scores
from engrammar_lab.report.parts import Section, Table, Verdict, interval, listed, machine_words, spread
from engrammar_lab.report.statistics import Difference, compare

FORGETTING = "What is forgotten when a thousand facts are learned equally well?"
SHOWN = (
    ("taught/nats", "taught text", 3),
    (RECALL, "recalled", 3),
    ("held/nats", "held-out text", 3),
    ("other/nats", "other prose", 3),
    (CHAT, "own chat", 3),
)


def forgetting_section(result: Mapping[str, Any]) -> Section:
    """The section on forgetting.json."""
    found, equal = scores(result["runs"], "way"), result["equal"]
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
        body=(about, _ways(found), questions_table("way", found)),
    )


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


def _verdict(moved: Mapping[str, Difference]) -> Verdict:
    if not moved:
        return Verdict(answer="No way was run yet.", sure="no", paper=PAPER)
    answer = "; ".join(f"{way} {interval(own, 3)}" for way, own in moved.items())
    settled = listed([way for way, own in moved.items() if own.settled], "no")
    return Verdict(answer=f"Nats by which the model's own chat gets less likely: {answer}.", sure=settled, paper=PAPER)
