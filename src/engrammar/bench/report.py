"""docs/measurements.md, made from the JSON under results/bench and nothing else.

Remake: engrammar bench hash --json > results/bench/hash.json; the same for step; then
python -m engrammar.bench.report
"""

import json
from pathlib import Path
from typing import Any

from engrammar.bench.hash import TORCH, verdict

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
        f"{verdict(result)} Training and the model take the torch path, which costs "
        f"{1e6 / result['rates'][TORCH]['tokens_per_second']:.1f} ms a thousand tokens; the NumPy path is for reading "
        "ahead of them.",
        "",
    ]


def _optimiser_section(result: dict[str, Any]) -> list[str]:
    kinds = list(dict.fromkeys(kind for table in result["tables"] for kind in table["rates"]))

    def cell(rate: dict[str, Any] | None) -> str:
        if rate is None:
            return "not run"
        share = "" if rate["share_of_limit"] is None else f", {rate['share_of_limit']:.0%}"
        return f"{rate['rows_per_second'] / 1e6:.1f} ({rate['speedup']:.1f}{share})"

    rows = [
        [f"{table['num_rows']:,}, {table['draws']}", *(cell(table["rates"].get(kind)) for kind in kinds)]
        for table in result["tables"]
    ]
    return [
        "## Updating touched rows: `engrammar bench optimiser`",
        "",
        f"{result['shapes']}. {_machine(result)}",
        "",
        *_table(["rows, gradient", *kinds], rows),
        "",
        "Million distinct touched rows a second; in brackets times SparseAdam's rate, and the share of the machine's "
        "limit: gathering and scattering the same rows of table and state in the same run. State in bytes a row: "
        + ", ".join(f"{kind} {size}" for kind, size in result["state_bytes"].items())
        + ".",
        "",
    ]


def render() -> str:
    """The whole page."""
    names = ("hash", "step", "optimiser")
    hashing, step, optimiser = (json.loads((RESULTS / f"{name}.json").read_text()) for name in names)
    lines = ["# Measurements", "", "Made by `python -m engrammar.bench.report` from `results/bench`.", ""]
    return "\n".join([*lines, *_hash_section(hashing), *_step_section(step), *_optimiser_section(optimiser)])


if __name__ == "__main__":
    DOCUMENT.write_text(render())
