"""Describes a plan of `plan.py` in words, and draws it."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engrammar.cells import Column, as_text, cells, in_lines, titles
from engrammar.planning.plan import Study
from engrammar.planning.speeds import TIERS
from engrammar.planning.touches import save_hot_rows
from engrammar.tables.shards import HOT_ROWS

logger = logging.getLogger(__name__)
CACHES = (
    Column("cache rows", "cache_rows", ","),
    Column("of table", "share_of_rows", ".1%"),
    Column("pinned", "pinned", ".1%"),
    Column("dynamic", "dynamic", ".1%"),
    Column("afterwards", "pinned_afterwards", ".1%"),
)
ENCODINGS = (
    Column("B/row", "row_bytes"),
    Column("B/token", "bytes_per_token", ","),
    Column("pages/token", "pages_per_token", ".2f"),
    Column("in a prompt", "pages_per_token_of_a_prompt", ".2f"),
)
TIER = (Column("cache rows", "cache_rows", ","), Column("hit rate", "hit_rate", ".1%"))
KINDS = {"rows_alone": "tokens/s, rows alone", "prefetched": "prefetched", "waiting": "waiting"}


def write_plan(plan: dict[str, Any], studied: Study, out: Path, beside: Path) -> list[Path]:
    """Writes the figures, a picture of them if matplotlib is installed, and into `beside` the rows to pin.

    Returns:
        The files that were written.
    """
    paths = [out / "plan.json", beside / HOT_ROWS]
    out.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(json.dumps(plan, indent=1) + "\n")
    save_hot_rows(studied.hot, paths[1])
    if find_spec("matplotlib") is None:
        logger.warning("plan.png is not drawn, because that needs matplotlib: pip install 'engrammar[lab]'.")
        return paths
    draw(plan, out / "plan.png")
    return [*paths, out / "plan.png"]


def describe(plan: dict[str, Any]) -> str:
    """The plan as text, wrapped to the width of the terminal."""
    sample, rows = plan["sample"], plan["sample"]["rows"]
    facts = (
        f"{sample['tokens']:,} tokens in {sample['prompts']:,} prompts touch {sum(sample['rows_touched']):,} of "
        f"{sum(rows):,} rows in {len(rows)} tables. {sample['repeated_in_prompt']:.1%} of a prompt's rows repeat. "
        f"{sample['seen_before']:.1%} of the second half's rows were read before: no cache hits more."
    )
    encodings = [[name, *cells(ENCODINGS, own)] for name, own in plan["encodings"].items()]
    parts = [
        in_lines(facts),
        as_text(titles(CACHES), [cells(CACHES, cache) for cache in plan["caches"]]),
        as_text(["encoding", *titles(ENCODINGS)], encodings),
        as_text([*titles(TIER), "from", *KINDS.values()], _speeds(plan["tiers"])),
    ]
    wishes = []
    for wanted in plan["wanted"]:
        if wanted["cache_rows"] is None:
            needed = (
                "no cache gives that" if wanted["hit_rate"] > 1 else f"needs a hit rate of {wanted['hit_rate']:.1%}"
            )
            wishes.append(in_lines(f"{wanted['wish']}: {needed}; no pinned set of this sample's rows does."))
        else:
            wishes.append(f"{wanted['wish']}: {wanted['cache_rows']:,} pinned rows a table.")
    return "\n\n".join([*parts, *(["\n".join(wishes)] if wishes else [])])


def _speeds(tiers: list[dict[str, Any]]) -> list[list[str]]:
    """Tokens/s by tier; "?" marks a speed that is not known."""
    return [
        [
            *cells(TIER, tier),
            name,
            *(f"{rate:,.0f}" if (rate := (tier[name] or {}).get(kind)) else "?" for kind in KINDS),
        ]
        for tier in tiers
        for name in TIERS
    ]


def draw(plan: dict[str, Any], path: Path) -> None:
    """Draws the hit rate against the cache size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
    sizes = [cache["cache_rows"] for cache in plan["caches"]]
    for name, label, style in (
        ("pinned", "pinned, by the first half's counts", "o-"),
        ("dynamic", "dynamic cache, first memory layer", "s-"),
        ("pinned_afterwards", "best pinned set in hindsight", "k--"),
    ):
        axes.plot(sizes, [cache[name] for cache in plan["caches"]], style, label=label)
    axes.axhline(plan["sample"]["seen_before"], color="grey", linestyle=":", label="rows that came before")
    tokens = plan["sample"]["tokens"]
    axes.set(
        title=f"Second half of {tokens:,} tokens", xlabel="rows cached of each table", ylabel="hit rate", xscale="log"
    )
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
