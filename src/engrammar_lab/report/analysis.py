"""Sections on depth and gates, made from what `depth`, `gates` and `frequency` return.

Letters: S seeds, L layers of the model with memory, K layers of the plain one.
"""

import io
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from engrammar_lab.gates import plot_gates
from engrammar_lab.report.figures import draw_lines, draw_similarity, few_colours, style
from engrammar_lab.report.parts import Figure, Section, Table, Verdict, listed, machine_words, spread, told
from engrammar_lab.report.statistics import Difference, compare, p_value

DEPTH = "Does memory make a model deeper?"
GATES = "Where does the memory open, and where does it help?"


# ---- depth: {"runs": [{"seed", "logit_lens": {"memory", "plain"}, "cka", "alignment"}]} ----
def depth_section(result: Mapping[str, Any]) -> Section:
    """The section on depth.json, which holds what `depth.compare_depth` returned for each seed."""
    runs = result["runs"]
    memory, plain = ([run["logit_lens"][kind] for run in runs] for kind in ("memory", "plain"))
    layers = range(len(memory[0]) - 1)  # the last layer is the prediction itself
    found = compare({layer: ([own[layer] for own in memory], [own[layer] for own in plain]) for layer in layers})
    index, nearest = ([run["alignment"][kind] for run in runs] for kind in ("index", "nearest"))
    lens = Table(
        columns=("layer", "MoE + memory", "MoE", "difference [95 %]", "p", "settled"),
        rows=tuple(
            (str(layer), *(spread([own[layer] for own in each]) for each in (memory, plain)), *told(difference))
            for layer, difference in found.items()
        ),
        caption="LogitLens: KL of the final prediction from that read off a layer, nats per token; 0 is the embedding.",
    )  # fmt: skip
    alike = Table(
        columns=("layer with memory", "soft alignment index", "most similar layer, seed by seed"),
        rows=tuple(
            (str(layer), spread([own[layer] for own in index], 2), ", ".join(str(own[layer]) for own in nearest))
            for layer in range(len(index[0]))
        ),
        caption=f"Layers of the plain model by CKA; the index is over the {runs[0]['alignment']['k']} most similar.",
    )
    curve = draw_lines(
        {"MoE + memory": memory, "MoE": plain}, range(len(memory[0])), labels=("layer", "KL to the final, nats")
    )
    heat = draw_similarity(
        np.mean([run["cka"] for run in runs], axis=0),
        np.mean(index, axis=0).tolist(),
        ("layer with memory", "layer of the plain model"),
    )
    return Section(
        key="depth",
        question=DEPTH,
        verdict=_depth_verdict(found, nearest),
        measured=machine_words(result),
        body=(
            Figure(png=curve, caption="LogitLens, seeds thin and their mean thick. Lower: decided earlier."),
            lens,
            Figure(
                png=heat, caption="CKA, mean over seeds. Right of the dashed line: a deeper layer of the plain model."
            ),
            alike,
        ),
    )


def _depth_verdict(found: Mapping[int, Difference], nearest: Sequence[Sequence[int]]) -> Verdict:
    lower = [layer for layer, own in found.items() if own.settled and own.mean < 0]
    higher = [layer for layer, own in found.items() if own.settled and own.mean > 0]
    early = [layer for layer in found if 0 < layer <= len(found) // 2]
    deeper, shallower = (
        [str(layer) for layer in range(len(nearest[0])) if all(sign * (own[layer] - layer) > 0 for own in nearest)]
        for sign in (1, -1)
    )
    after = "With memory, KL is lower after {}" if lower else "With memory, KL is lower after no layer"
    words = after.format(_at(lower, found)) + (f", and higher after {_at(higher, found)}" if higher else "")
    words += f". By CKA, {_layers(deeper)} resemble{'s' if len(deeper) < 2 else ''} a deeper layer of the plain model"
    words += f", and {_layers(shallower)} a shallower one." if shallower else "."
    lens = bool(early) and set(early) <= set(lower)
    agrees = "yes" if lens and deeper else "in part" if set(early) & set(lower) or deeper else "no"
    agrees = agrees if len(nearest) > 1 else "open: one seed"
    return Verdict(
        answer=words,
        sure=f"{len(lower) + len(higher)} of {len(found)} layers",
        paper="lower KL in early layers; layer 5 resembles layer 12 of the plain MoE",
        agrees=agrees,
    )


def _at(layers: Sequence[int], found: Mapping[int, Difference]) -> str:
    return _layers([f"{layer} ({found[layer].mean:+.3f} nats)" for layer in layers])


def _layers(names: Sequence[str]) -> str:
    return f"layer{'s' if len(names) > 1 else ''} {listed(names)}" if names else "no layer"


# ---- gates: {"texts": [{"tokens", "gates"}], "runs": [{"seed", "tokens", "orders": {order: bins}}]} ----
def shared_bins(runs: Sequence[Mapping[str, Any]], order: str) -> list[list[Mapping[str, Any]]]:
    """The bins of an order that every seed has; per bin, a list over seeds."""
    by_seed = [{bin_["count_from"]: bin_ for bin_ in run["orders"][order]} for run in runs]
    common = sorted(set.intersection(*(set(bins) for bins in by_seed)))
    return [[bins[first] for bins in by_seed] for first in common]


def gains(bins: Sequence[Sequence[Mapping[str, Any]]], against: str = "loss_off") -> list[list[float]]:
    """Per bin and seed, by how many nats memory lowers the loss, compared with memory off (or with `loss_plain`)."""
    return [[own[against] - own["loss_on"] for own in each] for each in bins]


def _compared(bins: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether a plain model read the text too."""
    return all("loss_plain" in own for each in bins for own in each)


def slopes(bins: Sequence[Sequence[Mapping[str, Any]]], values: Sequence[Sequence[float]]) -> Difference:
    """Per seed, the rise of a value for each doubling of the count, by least squares weighted by tokens."""
    x = [float(np.log2(1 + each[0]["count_from"])) for each in bins]
    rises = []
    for seed in range(len(bins[0])):
        weights = [each[seed]["tokens"] ** 0.5 for each in bins]
        rises.append(float(np.polyfit(x, [own[seed] for own in values], 1, w=weights)[0]))
    return Difference(tuple(rises), p_value(rises))


def gates_section(result: Mapping[str, Any]) -> Section:
    """The section on gates.json, which holds some texts (`gates_over_text`) and `gate_by_frequency` per seed."""
    runs = result["runs"]
    body: list[Table | Figure | str] = []
    if result.get("texts"):
        gate_map = io.BytesIO()
        with style():
            plot_gates(result["texts"], gate_map)
        png = few_colours(gate_map.getvalue())
        body.append(Figure(png=png, caption="Gates over text, mean over layers with memory."))
    order = max(runs[0]["orders"], key=int)
    bins = shared_bins(runs, order)
    lines = {"gate": {"gate": [[own["gate"] for own in each] for each in bins]}}
    lines["nats less with memory"] = {"than itself with memory off": gains(bins)}
    if _compared(bins):
        lines["nats less with memory"]["than the plain MoE"] = gains(bins, "loss_plain")
    for label, named in lines.items():
        drawn = draw_lines(
            {name: np.transpose(values).tolist() for name, values in named.items()},
            list(range(len(bins))),
            labels=(f"how often the {order}-gram is in the training text", label),
            ticks=[_range(each[0]) for each in bins],
        )
        body.append(Figure(png=drawn, caption=f"{order}-grams: {label}, by frequency; thin lines are seeds."))
    body += [_frequency_table(shared_bins(runs, each), each) for each in sorted(runs[0]["orders"], key=int)]
    return Section(
        key="gates",
        question=GATES,
        verdict=_gates_verdict(shared_bins(runs, order), order),
        measured=machine_words(result),
        body=tuple(body),
    )


def _range(bin_: Mapping[str, Any]) -> str:
    first, last = bin_["count_from"], bin_["count_to"]
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _frequency_table(bins: Sequence[Sequence[Mapping[str, Any]]], order: str) -> Table:
    gained = {"nats less than with memory off": gains(bins)}
    if _compared(bins):
        gained["nats less than the plain MoE"] = gains(bins, "loss_plain")
    rows = []
    for each, *less in zip(bins, *gained.values()):
        gate = spread([own["gate"] for own in each], 3)
        rows.append((_range(each[0]), f"{each[0]['tokens']:,}", gate, *(spread(own, 3) for own in less)))
    return Table(
        columns=(f"{order}-gram in training text", "tokens", "gate", *gained),
        rows=tuple(rows),
        caption="Loss on the token after the n-gram.",
    )


def _gates_verdict(bins: Sequence[Sequence[Mapping[str, Any]]], order: str) -> Verdict:
    against, than = ("loss_plain", "than the plain MoE") if _compared(bins) else ("loss_off", "than with memory off")
    helps = gains(bins, against)
    gate, gain = slopes(bins, [[own["gate"] for own in each] for each in bins]), slopes(bins, helps)
    words = []
    for name, own in (("gates open", gate), ("memory helps", gain)):
        if own.settled:
            words.append(f"The more often a {order}-gram was seen, the {'more' if own.mean > 0 else 'less'} {name}.")
        else:
            words.append(f"How much {name} shows no settled trend with how often a {order}-gram was seen.")
    top = max(range(len(bins)), key=lambda place: mean(helps[place]))
    words.append(f"It helps most at {_range(bins[top][0])} occurrences ({mean(helps[top]):.3f} nats less {than}).")
    return Verdict(
        answer=" ".join(words),
        sure=f"{gate.settled + gain.settled} of 2 trends",
        paper="gates open where a name or a set phrase is complete (figure 7)",
    )
