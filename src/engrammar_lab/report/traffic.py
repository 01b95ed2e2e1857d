"""The section on row traffic, made from what `traffic` returns."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from engrammar_lab.report.parts import Section, Table, Verdict, machine_words, spread

QUESTION = "How do n-grams fall on rows?"
COLLIDING = ("in_a_head", "in_a_head_expected", "in_all_heads", "in_all_heads_expected", "same_rows", "own_lookups")
TOUCHED = ("untouched", "untouched_expected", "hottest_1_percent", "hottest_10_percent")


def traffic_section(result: Mapping[str, Any]) -> Section:
    """The section on traffic.json, which holds what `traffic.memory_traffic` returned for each seed."""
    runs = result["runs"]
    layers = list(runs[0]["layers"])
    return Section(
        key="traffic",
        question=QUESTION,
        verdict=_verdict(runs, layers[0]),
        measured=f"{machine_words(result)} {runs[0]['tokens']:,} tokens of training text.",
        body=(_collision_table(runs, layers), _row_table(runs, layers)),
    )


def _exponent(zipfs: Sequence[Mapping[str, Any] | None]) -> str:
    known = [zipf["exponent"] for zipf in zipfs if zipf is not None]
    return spread(known, 2) if known else "too few"


def _collision_table(runs: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> Table:
    rows = []
    for layer in layers:
        for order in runs[0]["layers"][layer]["orders"]:
            each = [run["layers"][layer]["orders"][order] for run in runs]
            per_row = spread([own["ngrams_per_row"] for own in each], 1)
            percent = [spread([100 * own[share] for own in each], 1) for share in COLLIDING]
            zipf = _exponent([own["zipf"] for own in each])
            rows.append((layer, order, f"{each[0]['distinct']:,}", per_row, *percent, zipf))
    return Table(
        columns=(
            "layer", "order", "distinct n-grams", "per row", "share a row, %", "expected", "in every head, %",
            "expected", "all rows alike, %", "own lookups, %", "Zipf exponent",
        ),
        rows=tuple(rows),
        caption="Collisions of distinct n-grams, beside a random hash; own lookups: the share of reads of a token's "
        "rows that come from its own n-gram.",
    )  # fmt: skip


def _row_table(runs: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> Table:
    rows = []
    for layer in layers:
        each = [run["layers"][layer] for run in runs]
        percent = [spread([100 * own[share] for own in each], 1) for share in TOUCHED]
        read = spread([own["distinct_rows_per_1000_tokens"] for own in each], 0)
        lookups, zipf = f"{each[0]['lookups_per_1000_tokens']:,.0f}", _exponent([own["zipf"] for own in each])
        rows.append((layer, f"{each[0]['rows']:,}", *percent, read, lookups, zipf))
    return Table(
        columns=(
            "layer", "rows", "never read, %", "expected", "lookups to the hottest 1 %, %", "to the hottest 10 %, %",
            "distinct rows per 1,000 tokens", "of lookups", "Zipf exponent",
        ),
        rows=tuple(rows),
        caption="Rows by how often training text reads them.",
    )  # fmt: skip


def _verdict(runs: Sequence[Mapping[str, Any]], layer: str) -> Verdict:
    each = [run["layers"][layer] for run in runs]
    order = max(each[0]["orders"], key=int)
    highest = [own["orders"][order] for own in each]
    shared, expected = (mean(own[key] for own in highest) for key in ("in_a_head", "in_a_head_expected"))
    hot, tenth = (mean(own[key] for own in each) for key in ("hottest_1_percent", "hottest_10_percent"))
    return Verdict(
        answer=f"In layer {layer}, {shared:.1%} of distinct {order}-grams share a row in a head; with a random hash it "
        f"would be {expected:.1%}. The hottest 1 % of rows serve {hot:.1%} of lookups, the hottest 10 % {tenth:.1%}.",
        sure="counted, not estimated",
        paper="n-grams follow Zipf's law, so that few rows serve most lookups",
        agrees="yes" if tenth > 0.5 else f"weakly: the hottest 10 % serve {tenth:.0%}",
    )
