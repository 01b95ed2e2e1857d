"""A plan of `plan.py` in words, and as a picture."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

from engrammar.planning.plan import Study
from engrammar.planning.touches import save_hot_rows
from engrammar.tables.shards import HOT_ROWS

logger = logging.getLogger(__name__)


def write_plan(plan: dict[str, Any], studied: Study, out: Path, beside: Path) -> list[Path]:
    """Writes the figures, a picture of them if matplotlib is installed, and into `beside` the rows to pin.

    Returns:
        the files that were written.
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
    """The plan as lines of text of at most 80 characters."""
    sample, rows = plan["sample"], plan["sample"]["rows"]
    facts = (
        f"{sample['tokens']:,} tokens in {sample['prompts']:,} prompts touch {sum(sample['rows_touched']):,} of "
        f"{sum(rows):,} rows in {len(rows)} tables. {sample['repeated_in_prompt']:.1%} of a prompt's rows repeat. "
        f"{sample['seen_before']:.1%} of the second half's rows were read before: no cache hits more."
    )
    lines = [*wrap(facts, 80), ""]
    lines.append(f"{'cache rows':>14} {'of table':>9} {'pinned':>8} {'dynamic':>8} {'afterwards':>11}")
    lines += [
        f"{cache['cache_rows']:>14,} {cache['share_of_rows']:>9.1%} {cache['pinned']:>8.1%} {cache['dynamic']:>8.1%} "
        f"{cache['pinned_afterwards']:>11.1%}"
        for cache in plan["caches"]
    ]
    lines += ["", f"{'encoding':>14} {'B/row':>9} {'B/token':>8} {'pages/token':>12} {'in a prompt':>12}"]
    lines += [
        f"{name:>14} {e['row_bytes']:>9} {e['bytes_per_token']:>8,} {e['pages_per_token']:>12.2f} "
        f"{e['pages_per_token_of_a_prompt']:>12.2f}"
        for name, e in plan["encodings"].items()
    ]
    lines += ["", *_describe_speeds(plan["tiers"])]
    for wanted in plan["wanted"]:
        if wanted["cache_rows"] is None:
            needed = (
                "no cache gives that" if wanted["hit_rate"] > 1 else f"needs a hit rate of {wanted['hit_rate']:.1%}"
            )
            lines += wrap(f"{wanted['wish']}: {needed}; no pinned set of this sample's rows does.", 80)
        else:
            lines.append(f"{wanted['wish']}: {wanted['cache_rows']:,} pinned rows a table.")
    return "\n".join(lines)


def _describe_speeds(tiers: list[dict[str, Any]]) -> list[str]:
    """A table of tokens/s; "?" is a speed that is not known."""
    lines = [
        f"{'cache rows':>14} {'hit rate':>9} {'tokens/s':>9} {'rows alone':>14} {'prefetched':>14} {'waiting':>14}"
    ]
    for tier in tiers:
        cache = f"{tier['cache_rows']:>14,} {tier['hit_rate']:>9.1%}"
        for name in ("ram", "disk", "remote"):
            speeds = tier[name] or {}
            cells = (speeds.get(kind) for kind in ("rows_alone", "prefetched", "waiting"))
            lines.append(
                f"{cache} {name:>9} " + " ".join("?".rjust(14) if c is None else f"{c:>14,.0f}" for c in cells)
            )
            cache = " " * len(cache)
    return lines


def draw(plan: dict[str, Any], path: Path) -> None:
    """Hit rate against cache size as a picture."""
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
