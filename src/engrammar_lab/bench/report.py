"""What the benches found, on the terminal and as docs/measurements.md, made from the JSON under results/bench.

Remake: engrammar bench hash --json > results/bench/hash.json; the same for the others of `BENCHES`; then
python -m engrammar_lab.bench.report
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from engrammar_lab.bench import decode, optimizer, placement, rows, sharded, step, store
from engrammar_lab.bench import hash as hashing

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "measurements.md"
RESULTS = ROOT / "results" / "bench"
PICTURE = "rows.png"


class Bench(NamedTuple):
    """A bench: `run(quick)` measures; its module's `table` and `verdict` tell what it found."""

    title: str
    module: ModuleType
    run: Callable[[bool], dict[str, Any]]


BENCHES = {
    "hash": Bench("Token ids to rows", hashing, hashing.bench_hash),
    "step": Bench("A training step", step, step.bench_step),
    "optimizer": Bench("Updating touched rows", optimizer, optimizer.bench_optimizer),
    "sharded": Bench("Tables over ranks", sharded, sharded.bench_sharded),
    "placement": Bench("Tables off the device", placement, placement.bench_placement),
    "store": Bench("Rows from RAM, disk, cache and other machines", store, store.bench_store),
    "decode": Bench("Decoding with tables on disk", decode, decode.bench_decode),
}

TITLES = {
    "rows": "A step against rows per head",
    "cold": "Cold rows",
    "footprint": "Memory that stores take",
    "remote": "Rows from another machine",
}  # of a bench's parts


def _parts(result: dict[str, Any]) -> list[tuple[str, ModuleType, dict[str, Any]]]:
    """The title of each part of a result, the module with its `table` and `verdict`, and its figures."""
    title, module, _ = BENCHES[result["command"].removeprefix("engrammar bench ")]
    parts = getattr(module, "PARTS", {"rows": rows} if module is step else {})
    return [(title, module, result), *((TITLES[name], part, result[name]) for name, part in parts.items())]


def _conditions(result: dict[str, Any], part: dict[str, Any]) -> str:
    machine = result["machine"]
    accelerator = f"{machine['accelerator']}, " if machine["accelerator"] else ""
    return (
        f"{part['shapes']}. {result['date']}; {accelerator}{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads; torch {machine['torch']}, numpy {machine['numpy']}."
    )


def show(result: dict[str, Any]) -> None:
    """Prints what a bench returned."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for _, module, part in _parts(result):
        header, lines = module.table(part)
        table = Table(title=_conditions(result, part))
        for column in header:
            table.add_column(column, justify="right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        console.print(table)
        console.print(module.verdict(part))


def _markdown(result: dict[str, Any]) -> list[str]:
    page = []
    for title, module, part in _parts(result):
        header, lines = module.table(part)
        page += [f"## {title}: `{result['command']}`", "", _conditions(result, part), ""]
        page += [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)]
        page += ["", module.verdict(part), ""]
        page += [f"![step time against rows per head](../results/bench/{PICTURE})", ""] if module is rows else []
    return page


def load_results() -> dict[str, dict[str, Any]]:
    """The committed runs by bench."""
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in BENCHES}


def render() -> str:
    """The whole page."""
    lines = ["# Measurements", "", "Made by `python -m engrammar_lab.bench.report` from `results/bench`.", ""]
    for result in load_results().values():
        lines += _markdown(result)
    return "\n".join(lines)


if __name__ == "__main__":
    DOCUMENT.write_text(render())
    rows.draw(load_results()["step"]["rows"], RESULTS / PICTURE)
