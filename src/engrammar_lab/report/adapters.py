"""The section on attached memories: what each way of teaching a model brought, and what it cost elsewhere."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from engrammar_lab.report.figures import draw_points
from engrammar_lab.report.parts import Figure, Section, Table, Verdict, interval, listed, machine_words, spread, told
from engrammar_lab.report.statistics import compare

ATTACH = "What does a memory bring to a model that exists, beside LoRA?"
PAPER = "no comparison: its memories are trained with their model"
BASE, MEMORY, RARE, BOTH = "as it was", "memory", "memory, rare rows", "memory and LoRA"
LORA, LORA_SECONDS = "LoRA, equal parameters", "LoRA, equal seconds"
RECALL, CHAT = "facts/recall/seen", "chat/nats"
SHOWN = (
    ("taught/nats", "taught text", 3),
    (RECALL, "recalled", 3),
    ("facts/cloze/seen", "last word", 3),
    ("facts/choice/seen", "chosen of 4", 3),
    ("held/nats", "held-out text", 3),
    ("other/nats", "other prose", 3),
    (CHAT, "own chat", 4),
)
CHAT_LIMIT = 0.01  # nats by which chat may get worse

Scores = dict[str, dict[str, list[float]]]  # of each variant, each measure seed by seed


def scores(runs: Sequence[Mapping[str, Any]], key: str) -> Scores:
    """The measures of the variants, which runs name as `key`, that have a run of every seed that the base has."""
    seeds = sorted({run["seed"] for run in runs if run[key] == BASE})
    found: Scores = {}
    for variant in dict.fromkeys(run[key] for run in runs):
        own = {run["seed"]: run for run in runs if run[key] == variant}
        if set(own) >= set(seeds):
            names = [name for name, value in own[seeds[0]].items() if isinstance(value, int | float) and name != "seed"]
            found[variant] = {name: [float(own[seed][name]) for seed in seeds] for name in names}
    return found


def attach_section(result: Mapping[str, Any]) -> Section:
    """The section on attach.json."""
    taught: dict[str, list[Mapping[str, Any]]] = {}
    for run in result["runs"]:
        taught.setdefault(run["domain"], []).append(run)
    domains = {domain: scores(runs, "variant") for domain, runs in taught.items()}
    body: list[Table | Figure | str] = []
    for domain, found in domains.items():
        body += [_table(domain, found), questions_table(domain, found)]
        recalled = {variant: own[RECALL] for variant, own in found.items()}
        if LORA_SECONDS in recalled:
            against = compare({v: (recalled[LORA_SECONDS], own) for v, own in recalled.items() if v != LORA_SECONDS})
            picture = draw_points(recalled, against, f"{domain}: share of taught definitions recalled in full")
            body.append(Figure(png=picture, caption="Blue: settled above LoRA at equal seconds; orange: below it."))
    body += [words for domain, found in domains.items() for words in _aims(domain, found)]
    return Section(
        key="attach",
        question=ATTACH,
        verdict=_verdict(domains),
        measured=f"{machine_words(result)} {result['base']}.",
        body=tuple(body),
    )


def _table(domain: str, found: Scores) -> Table:
    shown = [entry for entry in SHOWN if all(entry[0] in own for own in found.values())]
    rows = []
    for variant, own in found.items():
        cells = [spread(own[name], digits) for name, _, digits in shown]
        rows.append((variant, *cells, f"{mean(own['trained']):,.0f}", f"{mean(own['seconds']):,.0f}"))
    return Table(
        columns=(domain, *(title for _, title, _ in shown), "trained numbers", "CPU s"),
        rows=tuple(rows),
        caption="Texts and chat in nats per token, facts as shares. “Recalled”: greedy decoding from the headword "
        "writes the whole definition. “Own chat”: the base's own answers, which should not get less likely.",
    )


def questions_table(title: str, found: Scores) -> Table:
    """What each variant answers rightly that it was not taught, under a title for the variants."""
    base = {name: own for name, own in found.get(BASE, {}).items() if name.startswith("questions/")}
    others = {variant: own for variant, own in found.items() if variant != BASE}
    pairs = {(variant, name): (own[name], base[name]) for variant, own in others.items() for name in base}
    rows = tuple(
        (variant, name.partition("/")[2], spread(found[variant][name], 3), *told(own, 3))
        for (variant, name), own in compare(pairs).items()
    )
    return Table(
        columns=(title, "questions", "right", "change [95 %]", "p", "settled"),
        rows=rows,
        caption="Questions that no lesson teaches, against the model as it was.",
    )


def _aims(domain: str, found: Scores) -> list[str]:
    """What was aimed at, and whether it was reached."""
    words = []
    if {MEMORY, LORA_SECONDS} <= found.keys():
        own, other = mean(found[MEMORY][RECALL]), mean(found[LORA_SECONDS][RECALL])
        reached = "reached" if own >= 2 * other else "missed"
        words.append(
            f"{domain}: at equal seconds memory recalls {own:.3f} of the taught definitions, LoRA {other:.3f}; twice "
            f"was aimed at: {reached}."
        )
    for variant in (MEMORY, RARE):
        if {variant, BASE} <= found.keys():
            rise = compare({0: (found[variant][CHAT], found[BASE][CHAT])})[0]
            reached = "reached" if rise.mean <= CHAT_LIMIT else "missed"
            words.append(
                f"{domain}: with {variant}, chat moves by {interval(rise)} nats; at most +0.01 was aimed at: {reached}."
            )
    if {MEMORY, LORA, BOTH} <= found.keys():
        best = max(mean(found[MEMORY][RECALL]), mean(found[LORA][RECALL]))
        held = min(mean(found[MEMORY]["held/nats"]), mean(found[LORA]["held/nats"]))
        both = mean(found[BOTH][RECALL]), mean(found[BOTH]["held/nats"])
        reached = "reached" if both[0] >= best and both[1] <= held else "missed"
        words.append(
            f"{domain}: together they recall {both[0]:.3f} (the better alone {best:.3f}) and leave {both[1]:.3f} nats "
            f"on held-out text (the better alone {held:.3f}); at least as good was aimed at: {reached}."
        )
    return words


def _verdict(domains: Mapping[str, Scores]) -> Verdict:
    gained = compare(
        {
            domain: (found[MEMORY][RECALL], found[LORA_SECONDS][RECALL])
            for domain, found in domains.items()
            if {MEMORY, LORA_SECONDS} <= found.keys()
        }
    )
    if not gained:
        return Verdict(answer="No lesson has memory and LoRA yet.", sure="no", paper=PAPER)
    answer = "; ".join(f"{domain}: {interval(own, 3)}" for domain, own in gained.items())
    return Verdict(
        answer=f"Share of taught definitions recalled, memory less LoRA at equal seconds: {answer}.",
        sure=listed([domain for domain, own in gained.items() if own.settled], "no"),
        paper=PAPER,
    )
