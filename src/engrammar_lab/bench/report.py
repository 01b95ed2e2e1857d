"""What the benches found, on the terminal and as docs/measurements.md, made from the JSON under results/bench.

Remake: engrammar bench hash --json > results/bench/hash.json; the same for the others of `BENCHES`; the commands in
results/bench of `ALONE`; then python -m engrammar_lab.bench.report
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engrammar.cells import Lines, as_markdown, as_text, in_lines
from engrammar_lab.bench import (
    attached,
    clients,
    cold,
    decode,
    device,
    families,
    footprint,
    load,
    optimizer,
    patched,
    placement,
    remote,
    rows,
    serve,
    sharded,
    step,
    store,
    titan,
    vllm,
)
from engrammar_lab.bench import hash as hashing
from engrammar_lab.machine import describe_run


class Part(NamedTuple):
    """How the result of a bench, or of a part of one, is shown."""

    title: str
    table: Callable[[dict[str, Any]], tuple[list[str], Lines]]  # gives the header and lines of its figures
    verdict: Callable[[dict[str, Any]], str]
    num_keys: int = 1  # number of columns at the left that name what a line is about
    picture: tuple[str, str] | None = None  # the file and the caption of its picture, if it has one


class Bench(NamedTuple):
    """A bench: `measure(quick)`, `part` shows its result, and `others` show what that holds under their names."""

    measure: Callable[..., dict[str, Any]]
    part: Part
    others: dict[str, Part] = {}  # noqa: RUF012 (a NamedTuple)

    def parts(self, result: dict[str, Any]) -> Iterator[tuple[Part, dict[str, Any]]]:
        yield self.part, result
        for name, part in self.others.items():
            yield part, result[name]


ROWS = ("rows.png", "step time against rows per head")
CURVES = ("titan.png", "losses of both, and how far they are apart")
ALONE = {  # benches with a command of their own
    "load": Part("Half an hour of use, with faults", load.table, load.verdict, 2),
    "titan": Part("The same training in torchtitan", titan.table, titan.verdict, 2, CURVES),
    "vllm": Part("Many requests at once in vLLM", serve.table, vllm.verdict, 2),
    "clients": Part("Both servers, asked by vLLM's own client", clients.table, clients.verdict, 2),
    "families": Part("Which models take a memory and patches", families.table, families.verdict),
}
DEVICE = Part("On an accelerator", device.table, device.verdict, 2)  # where there was one
NOT_RUN = "Not run: no accelerator was at hand. Nothing is claimed about one."
OF_STEP = {"rows": Part("A step against rows per head", rows.table, rows.verdict, 2, ROWS)}
OF_STORE = {
    "cold": Part("Cold rows", cold.table, cold.verdict),
    "footprint": Part("Memory that stores take", footprint.table, footprint.verdict, 2),
    "remote": Part("Rows from another machine", remote.table, remote.verdict),
}
ATTACH = Part("An attached memory", attached.table, attached.verdict, 2)
OF_ATTACH = {"train": Part("Training an attached memory", attached.train_table, attached.train_verdict)}
OF_EDIT = {"find": Part("Finding keys", patched.find_table, patched.find_verdict, 2)}
STORE = Part("Rows from RAM, disk, cache and other machines", store.table, store.verdict, 2)
BENCHES = {
    "hash": Bench(hashing.bench_hash, Part("Token ids to rows", hashing.table, hashing.verdict)),
    "step": Bench(step.bench_step, Part("A training step", step.table, step.verdict), OF_STEP),
    "optimizer": Bench(optimizer.bench_optimizer, Part("Updating touched rows", optimizer.table, optimizer.verdict)),
    "sharded": Bench(sharded.bench_sharded, Part("Tables over ranks", sharded.table, sharded.verdict)),
    "placement": Bench(placement.bench_placement, Part("Tables off the device", placement.table, placement.verdict)),
    "store": Bench(store.bench_store, STORE, OF_STORE),
    "decode": Bench(decode.bench_decode, Part("Decoding with tables on disk", decode.table, decode.verdict, 2)),
    "attach": Bench(attached.bench_attached, ATTACH, OF_ATTACH),
    "edit": Bench(patched.bench_patched, Part("Patches on a model", patched.table, patched.verdict, 2), OF_EDIT),
    "serve": Bench(serve.bench_serve, Part("Many requests at once", serve.table, serve.verdict, 2)),
}


def _conditions(result: dict[str, Any], part: dict[str, Any]) -> str:
    machine = result["machine"]
    accelerator = f"{machine['accelerator']}, " if machine["accelerator"] else ""
    return (
        f"{part['shapes']}. {result['date']}; {accelerator}{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads; torch {machine['torch']}, numpy {machine['numpy']}."
    )


def run(name: str, quick: bool, *given: Any) -> dict[str, Any]:
    """What a bench measures, and before it the command, the day and the machine. `given` is for the bench."""
    head = describe_run(f"engrammar bench {name}{' --quick' * quick}")
    return {**head, "quick": quick, **BENCHES[name].measure(quick, *given)}


def show(name: str, result: dict[str, Any]) -> None:
    """Prints what a bench returned."""
    for part, figures in BENCHES[name].parts(result):
        table = as_text(*part.table(figures), num_keys=part.num_keys)
        print(part.title, in_lines(_conditions(result, figures)), table, sep="\n\n", end="\n\n")
        print(in_lines(part.verdict(figures)), end="\n\n\n")


def load_result(results: Path, name: str) -> dict[str, Any]:
    """The result of a bench in a folder."""
    return dict(json.loads((results / f"{name}.json").read_text()))


def render(results: Path, document: Path) -> str:
    """The whole page; its links are relative to `document`."""
    page = ["# Measurements", "", "Made by `python -m engrammar_lab.bench.report` from `results/bench`.", ""]
    shown = []
    for name, bench in BENCHES.items():
        result = load_result(results, name)
        shown += [(result, part, figures) for part, figures in bench.parts(result)]
    has_device = (results / "device.json").exists()
    for name, part in (ALONE | {"device": DEVICE} if has_device else ALONE).items():
        result = load_result(results, name)
        shown.append((result, part, result))
    for result, part, figures in shown:
        page += [f"## {part.title}: `{result['command']}`", "", _conditions(result, figures), ""]
        page += [*as_markdown(*part.table(figures)), "", part.verdict(figures), ""]
        if part.picture:
            file, caption = part.picture
            page += [f"![{caption}]({os.path.relpath(results / file, document.parent)})", ""]
    return "\n".join(page if has_device else [*page, f"## {DEVICE.title}: `make gpu`", "", NOT_RUN, ""])


def write_page(results: Path = Path("results/bench"), document: Path = Path("docs/measurements.md")) -> None:
    """Write the page of measurements, and the pictures beside the results.

    Args:
        results: The folder with the JSON of every bench.
        document: The page to write.
    """
    document.write_text(render(results, document))
    rows.draw(load_result(results, "step")["rows"], results / ROWS[0])
    titan.draw(load_result(results, "titan"), results / CURVES[0])


if __name__ == "__main__":
    import tyro

    tyro.cli(write_page)
