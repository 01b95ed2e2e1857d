"""What serving costs in quality: rows stored in fewer bits, and rows that cannot be read.

The models are the demo's with memory, one per seed. `engrammar table quantize` quantizes their tables, which are then
read from disk as by a server. Nothing is trained here.
Remake: engrammar demo --seeds 3; python -m engrammar_lab.serving
"""

import json
import math
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any, final, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from engrammar.cells import as_markdown
from engrammar.config import Encoding, row_bytes
from engrammar.model.configuration import load_config
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.stores.base import Arrived, Fetch, RowsMissing, RowStore
from engrammar.stores.ram import RamStore
from engrammar.stores.serving import look_ahead, stored_tables_of
from engrammar.tables.convert import quantize
from engrammar.train.data import TokenSet
from engrammar.train.scoring import IGNORED
from engrammar_lab.machine import describe_run

SHARES = (0.0, 0.01, 0.05, 0.2, 1.0)
CHOICES, QUESTIONS, PART = 4, 200, 24  # PART: tokens of a beginning, and of a continuation
LENGTH, BATCH = 128, 16
MEASURES = ("bits_per_byte", "next_token", "continuations")


@final
class LossyStore(RowStore):
    """A store that lacks a fixed random share of its rows.

    The row's number and the seed decide whether it is missing, so a missing row is missing in every call.
    """

    def __init__(self, store: RowStore, share: float, seed: int = 0) -> None:
        self.store, self.share, self.seed = store, share, seed
        self.name, self.identity = store.name, f"{store.identity} less {share:g}"
        self.num_rows, self.row_bytes = store.num_rows, store.row_bytes

    def _fetch(self, rows_U: NDArray[np.int64]) -> Fetch:
        rows_US = self.store.fetch(rows_U).wait()
        mixed = (rows_U.astype(np.uint64) + np.uint64(self.seed)) * np.uint64(0x9E3779B97F4A7C15)
        missing_U = (mixed >> np.uint64(40)) < self.share * 2**24
        return _Lost(self.name, rows_US, missing_U) if missing_U.any() else Arrived(rows_US)

    def close(self) -> None:
        self.store.close()


@final
class _Lost(Fetch):
    def __init__(self, name: str, rows_US: NDArray[np.uint8], missing_U: NDArray[np.bool_]) -> None:
        self.name, self.rows_US, self.missing_U = name, rows_US, missing_U

    def wait(self, seconds: float | None = None) -> NDArray[np.uint8]:
        raise RowsMissing(f"{self.name} was told to lose rows", self.missing_U, self.rows_US)


def make_questions(tokens: TokenSet, end_id: int, seed: int = 0) -> Tensor:
    """Questions: which continuation belongs to this beginning of an entry? The wrong ones are from three other entries.

    No model was trained on the entries.

    Returns:
        ids [questions, CHOICES, 2 * PART]: the beginning with each continuation, its own first.
    """
    ids = tokens.read("validation", 0, tokens.num_tokens("validation"))
    entries = [part[: 2 * PART] for part in np.split(ids, np.flatnonzero(ids == end_id) + 1) if len(part) > 2 * PART]
    chance = random.Random(seed)
    chance.shuffle(entries)
    questions = []
    for index in range(min(QUESTIONS, len(entries))):
        others = chance.sample([other for other in range(len(entries)) if other != index], CHOICES - 1)
        endings = [entries[other][PART:] for other in (index, *others)]
        questions.append([np.concatenate([entries[index][:PART], ending]) for ending in endings])
    return torch.from_numpy(np.array(questions))


@torch.no_grad()
def score(model: Any, tokens: TokenSet, questions: Tensor) -> dict[str, float]:
    """Bits per byte and next-token accuracy on the validation text, and the share of right answers to the questions."""
    nats, right, scored = 0.0, 0, 0
    for batch in look_ahead(model, DataLoader(tokens.blocks("validation", LENGTH), BATCH)):  # type: ignore[arg-type]
        masked = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logits, targets = model(**masked, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
        nats += F.cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
        scored += int((targets != IGNORED).sum())
    bytes_per_token = tokens.num_bytes("validation") / tokens.num_tokens("validation")
    return {
        "bits_per_byte": nats / scored / math.log(2) / bytes_per_token,
        "next_token": right / scored,
        "continuations": _answered(model, questions),
    }


def _answered(model: Any, questions: Tensor) -> float:
    """The share of questions in which the beginning's own continuation is the likeliest."""
    right = 0
    for few in questions.split(4):
        logits = model(input_ids=few.flatten(0, 1), use_cache=False).logits[:, PART - 1 : -1]
        losses = F.cross_entropy(logits.mT, few.flatten(0, 1)[:, PART:], reduction="none").sum(1)
        right += int((losses.view(len(few), CHOICES).argmin(1) == 0).sum())
    return right / len(questions)


def run_serving(models: Sequence[Path], tokens: TokenSet) -> dict[str, Any]:
    """Scores every model with every encoding and with every share of missing rows.

    Returns:
        `encodings` and `missing`: per kind, the `scores` of each model, bytes per row, and how many gates were closed.
    """
    questions = make_questions(tokens, load_config(models[0]).eos_token_id)
    encodings: dict[str, Any] = {name: {"scores": []} for name in get_args(Encoding)}
    missing: dict[str, Any] = {
        f"{how} {share:.0%}": {"how": how, "share": share, "scores": [], "closed": []}
        for how in ("gate closed", "zeros")
        for share in SHARES
        if share or how == "gate closed"
    }
    for folder in models:
        for name, found in encodings.items():
            with TemporaryDirectory() as scratch:
                quantize(folder, Path(scratch) / "model", encoding=name)  # type: ignore[arg-type]
                model = EngrammarForCausalLM.from_pretrained(Path(scratch) / "model", memory="disk").eval()
                found["scores"].append(score(model, tokens, questions))
                found["bytes_per_row"] = row_bytes(name, model.config.memory_config.head_dim)  # type: ignore[arg-type]
                stored_tables_of(model).close()  # type: ignore[union-attr]
        for found in missing.values():
            how = "zeros" if found["how"] == "zeros" else "skip"
            lossy = partial(lambda share, table: LossyStore(RamStore(table), share), found["share"])
            model = EngrammarForCausalLM.from_pretrained(folder, memory=lossy, on_missing=how, deadline=60.0).eval()
            found["scores"].append(score(model, tokens, questions))
            source = stored_tables_of(model)
            assert source is not None
            found["closed"].append(source.counts.closed / (source.counts.rows / model.config.memory_config.num_columns))
            source.close()
    return {
        **describe_run(" ".join(["python -m engrammar_lab.serving", *sys.argv[1:]])),
        "models": [folder.name for folder in models],
        "validation_tokens": tokens.num_tokens("validation"),
        "questions": len(questions),
        "choices": CHOICES,
        "row_width": row_bytes("fp8", model.config.memory_config.head_dim),
        "encodings": encodings,
        "missing": missing,
    }


def differences(found: dict[str, Any], base: dict[str, Any], measure: str) -> list[float]:
    """Seed by seed, a measure minus that of the base."""
    return [one[measure] - other[measure] for one, other in zip(found["scores"], base["scores"])]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, signed."""
    return f"{mean(values):+.{digits}f} ± {stdev(values):.{digits}f}"


def _line(name: str, extra: str, found: dict[str, Any], base: dict[str, Any]) -> list[str]:
    if found is base:
        bits, *shares = (mean(scores[name] for scores in found["scores"]) for name in MEASURES)
        return [name, extra, f"{bits:.4f}", *(f"{share:.2%}" for share in shares)]
    bits = differences(found, base, "bits_per_byte")
    points = ([100 * value for value in differences(found, base, name)] for name in MEASURES[1:])
    return [name, extra, spread(bits, 5), *(spread(values, 2) for values in points)]


def render(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    machine, encodings, missing = result["machine"], result["encodings"], result["missing"]
    whole, none_missing = encodings["fp32"], missing["gate closed 0%"]
    measures = ["bits per byte", "next token, points", "right continuation, points"]
    stored = [_line(name, str(found["bytes_per_row"]), found, whole) for name, found in encodings.items()]
    lost = [_line(name, f"{mean(found['closed']):.1%}", found, none_missing) for name, found in missing.items()]
    lines = [
        "# What serving costs in quality",
        "",
        f"`{result['command']}`: {len(result['models'])} models of the demo (three seeds, experts and memory), rows of "
        f"{result['row_width']} values, trained in fp32; {result['validation_tokens']:,} tokens of validation text; "
        f"{result['questions']} questions, which of {result['choices']} continuations belongs to the beginning of an "
        f"entry that was not trained on. {result['date']}; {machine['cpu']}, torch {machine['torch']}. Differences are "
        "to the first line, seed by seed, mean and standard deviation; fewer bits are better, more points are.",
        "",
        "## Row encodings",
        "",
        *as_markdown(["encoding", "bytes a row", *measures], stored),
        "",
        "## Rows that cannot be had",
        "",
        'A row is missing wherever it is asked for. "Gate closed" is `on_missing="skip"`: a token that lacks one of '
        'its rows takes nothing from the memory. "Zeros" is `on_missing="zeros"`: the missing row alone is zero.',
        "",
        *as_markdown(["rows missing", "gates closed", *measures], lost),
        "",
        verdict(result),
        "",
    ]
    return "\n".join(lines)


def verdict(result: dict[str, Any]) -> str:
    """What the figures say, in words."""
    base = result["encodings"]["fp32"]
    small = [
        name
        for name, found in result["encodings"].items()
        if found is not base and abs(mean(differences(found, base, "bits_per_byte"))) < 0.001
    ]
    smallest = min(small or ["fp32"], key=lambda name: result["encodings"][name]["bytes_per_row"])
    closed, zeros = (result["missing"][f"{how} 1%"] for how in ("gate closed", "zeros"))
    none_missing = result["missing"]["gate closed 0%"]
    costs = [mean(differences(found, none_missing, "bits_per_byte")) for found in (closed, zeros)]
    all_missing = result["missing"]["gate closed 100%"]
    off = mean(differences(all_missing, none_missing, "bits_per_byte"))
    points = [100 * value for value in differences(all_missing, none_missing, "continuations")]
    return (
        f"The smallest encoding that moves bits per byte by less than 0.001 is {smallest}. Where 1 % of rows are "
        f"missing, closing gates costs {costs[0]:.4f} bits per byte and zeros {costs[1]:.4f}: "
        f"{'zeros are' if costs[1] < costs[0] else 'closing is'} cheaper here. With every row missing the memory is "
        f"off: bits per byte rise by {off:.4f}, and {spread(points, 1)} points more continuations are chosen rightly"
        f"{', so that the memory does not help this task' if mean(points) > 0 else ''}."
    )


def write_serving(
    runs: Path = Path("runs/demo"),
    tokens: Path = Path("data/pocket-wiki-4096"),
    results: Path = Path("results/serving"),
) -> None:
    """Score the demo's models with memory, and write serving.json and serving.md.

    Args:
        runs: The folder of the demo.
        tokens: The folder of token shards that the demo trained on.
        results: The folder to write to.

    Raises:
        ValueError: `runs` holds no model with memory, or `tokens` no token shards.
    """
    models = sorted(runs.glob("moe-memory-*"))
    if not models:
        raise ValueError(f"{runs} holds no moe-memory-*: engrammar demo --seeds 3, or name the demo's folder.")
    result = run_serving(models, TokenSet.open(tokens))
    results.mkdir(parents=True, exist_ok=True)
    (results / "serving.json").write_text(json.dumps(result, indent=1) + "\n")
    (results / "serving.md").write_text(render(result))


if __name__ == "__main__":
    import tyro

    tyro.cli(write_serving)
