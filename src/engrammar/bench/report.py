"""docs/measurements.md, made from the JSON under results/bench and nothing else.

Remake: engrammar bench hash --json > results/bench/hash.json; the same for step; then
python -m engrammar.bench.report
"""

import json
from pathlib import Path
from typing import Any

from engrammar.bench.hash import verdict

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "measurements.md"
RESULTS = ROOT / "results" / "bench"


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{result['date']}; {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; "
        f"torch {machine['torch']}, numpy {machine['numpy']}."
    )


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _step_section(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{row['total_parameters']:,}",
            f"{row['active_parameters']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['best_tokens_per_second']:,.0f}",
            *(f"{milliseconds:.1f}" for milliseconds in row["milliseconds"].values()),
            f"{row['flops_per_token'] / 1e6:.2f}",
            f"{row['share_of_peak']:.0%}",
        ]
        for name, row in result["models"].items()
    ]
    phases = [f"{phase}, ms" for phase in next(iter(result["models"].values()))["milliseconds"]]
    header = ["", "total", "active", "tokens/s", "best", *phases, "MFLOPs/token", "share of peak"]
    return [
        "## A training step: `engrammar bench step`",
        "",
        f"{result['shapes']}. {_machine(result)}",
        "",
        *_table(header, rows),
        "",
        f"Memory costs {result['memory_tax']:.1%} of throughput (median over steps). The machine's limit, the best "
        f"fp32 matrix product of this run, is {result['peak_gflops']:.0f} GFLOP/s. Retrieval (hash and gather) is "
        "timed on its own, beside the one inside forward.",
        "",
    ]


def _hash_section(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{row['tokens_per_second'] / 1e6:.1f}",
            f"{row['best_tokens_per_second'] / 1e6:.1f}",
            f"{row['milliseconds']:.3f}",
            f"{row['share_of_limit']:.0%}",
        ]
        for name, row in result["rates"].items()
    ]
    return [
        "## Token ids to rows: `engrammar bench hash`",
        "",
        f"{result['shapes']}. {_machine(result)}",
        "",
        *_table(["", "million tokens/s", "best", "ms", "share of limit"], rows),
        "",
        verdict(result),
        "",
    ]


def render() -> str:
    """The whole page."""
    hashing, step = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("hash", "step"))
    lines = ["# Measurements", "", "Made by `python -m engrammar.bench.report` from `results/bench`.", ""]
    return "\n".join([*lines, *_hash_section(hashing), *_step_section(step)])


if __name__ == "__main__":
    DOCUMENT.write_text(render())
