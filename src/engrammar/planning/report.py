"""A plan of `plan.py` in words, and as a picture."""

import json
from pathlib import Path
from typing import Any

from engrammar.planning.plan import Study
from engrammar.planning.touches import save_hot_rows
from engrammar.tables.shards import HOT_ROWS


def write_plan(plan: dict[str, Any], studied: Study, out: Path, beside: Path) -> list[Path]:
    """Writes figures, picture, and into `beside` the rows to pin; the three files."""
    paths = [out / "plan.json", out / "plan.png", beside / HOT_ROWS]
    out.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(json.dumps(plan, indent=1) + "\n")
    draw(plan, paths[1])
    save_hot_rows(studied.hot, paths[2])
    return paths


def describe(plan: dict[str, Any]) -> str:
    """The plan as lines of text."""
    sample, rows = plan["sample"], plan["sample"]["rows"]
    lines = [
        f"{sample['tokens']:,} tokens in {sample['prompts']:,} prompts touch {sum(sample['rows_touched']):,} of "
        f"{sum(rows):,} rows in {len(rows)} tables; {sample['repeated_in_prompt']:.1%} of a prompt's rows repeat; "
        f"{sample['seen_before']:.1%} of the second half's rows came before (no cache hits more).",
        "",
        f"{'cache rows':>12} {'of table':>9} {'pinned':>8} {'dynamic':>8} {'afterwards':>11}",
    ]
    lines += [
        f"{cache['cache_rows']:>12,} {cache['share_of_rows']:>9.1%} {cache['pinned']:>8.1%} {cache['dynamic']:>8.1%} "
        f"{cache['pinned_afterwards']:>11.1%}"
        for cache in plan["caches"]
    ]
    lines += ["", f"{'encoding':>12} {'B/row':>9} {'B/token':>8} {'pages/token':>12} {'in a prompt':>12}"]
    lines += [
        f"{name:>12} {e['row_bytes']:>9} {e['bytes_per_token']:>8,} {e['pages_per_token']:>12.2f} "
        f"{e['pages_per_token_of_a_prompt']:>12.2f}"
        for name, e in plan["encodings"].items()
    ]
    lines += ["", f"{'cache rows':>12} {'hit rate':>9}   tokens/s of the rows alone: ram, disk, remote"]
    lines += [
        f"{tier['cache_rows']:>12,} {tier['hit_rate']:>9.1%}   "
        + ", ".join("?" if tier[name] is None else _speeds(tier[name]) for name in ("ram", "disk", "remote"))
        for tier in plan["tiers"]
    ]
    for wanted in plan["wanted"]:
        if wanted["cache_rows"] is None:
            needed = (
                "no cache gives that" if wanted["hit_rate"] > 1 else f"needs a hit rate of {wanted['hit_rate']:.1%}"
            )
            lines.append(f"{wanted['wish']}: {needed}; no pinned set of this sample's rows does.")
        else:
            lines.append(f"{wanted['wish']}: {wanted['cache_rows']:,} pinned rows a table.")
    return "\n".join(lines)


def _speeds(speeds: dict[str, float]) -> str:
    extra = [f"{speeds[name]:,.0f} {name}" for name in ("prefetched", "waiting") if name in speeds]
    return f"{speeds['rows_alone']:,.0f}" + (f" ({', '.join(extra)})" if extra else "")


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
