"""What applied patches cost in decoding, and whether the number of their keys matters.

The base without a patch and the base with patches of more and more keys take the same text, token by token and in turn.
Beside it: finding the keys of a step by itself, and in a dictionary, the least that a hash map takes.
Letters: B batch, T tokens, Q keys, K the longest key, N windows.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engrammar.cells import Column
from engrammar.edit import Patch, apply_patch, base_of
from engrammar.edit.exact import NOTHING, ExactTable, distinct_rows
from engrammar.edit.patch import COLUMNS as ENTRY
from engrammar.tables.encodings import encode
from engrammar.vocabulary import compress_vocabulary
from engrammar_lab.adapters.smollm import fetch_smollm
from engrammar_lab.bench.attached import BASE, Bases, decode, load_bases, real_text
from engrammar_lab.bench.figures import line_by_line
from engrammar_lab.bench.turns import seconds_of, settle_allocator

PROBES, VALUES, LONGEST = 32, 64, 4  # of a patch; the longest key
NEVER = 2.0  # a threshold that no cosine passes: probes are read, and nothing is written, so all models say the same
DECODING = (Column("batch", "batch"), Column("keys", "variant"), Column("step ms", "milliseconds", ".2f"))
COLUMNS = (*DECODING, Column("over the base", "over", "+.1%"))
table = line_by_line(COLUMNS, lambda result: result["decode"])
FINDING = (
    Column("keys", "keys", ",d"),
    Column("windows", "windows"),
    Column("microseconds", "ours", ".1f"),
    Column("a dictionary's", "dictionary", ".1f"),
)
find_table = line_by_line(FINDING, lambda part: part["lines"])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run measures."""

    num_blocks: int = 0  # of the base, the first ones; 0 is all
    keys: tuple[int, ...] = (10, 1_000, 100_000, 1_000_000)  # numbers of keys of the patches
    from_text: int = 10  # keys that occur in the text, the same in every patch
    # Of decoding, as in `bench attach`.
    batches: tuple[int, ...] = (1, 16)
    prompt: int = 64
    steps: int = 160
    finds: int = 200  # calls that are timed of finding keys
    corpus: str = "pocket:wiki"


FULL = Plan()
QUICK = Plan(num_blocks=6, keys=(10, 10_000), batches=(1, 4), prompt=16, steps=12, finds=20)


def random_keys(classes_T: Tensor, num_keys: int, from_text: int, num_classes: int) -> np.ndarray:
    """Distinct keys [Q, K] of 2 to 4 classes: the text's commonest pairs, then random ones."""
    pairs, counts = torch.stack([classes_T[:-1], classes_T[1:]], 1).unique(dim=0, return_counts=True)
    common = pairs[counts.argsort(descending=True, stable=True)[:from_text]].numpy()
    rng = np.random.default_rng(0)
    keys = rng.integers(0, num_classes, (num_keys + num_keys // 8 + 8, LONGEST)).astype(np.int32)
    lengths = rng.integers(2, LONGEST + 1, len(keys))
    keys[np.arange(LONGEST) < LONGEST - lengths[:, None]] = NOTHING
    keys[: len(common), :-2], keys[: len(common), -2:] = NOTHING, common
    first, _ = distinct_rows(keys)
    return keys[np.sort(first)[:num_keys]]


def patch_of(keys_QK: np.ndarray, name: str, bases: Bases) -> Patch:
    """A patch with a gated entry of one step for each key."""
    base = base_of(bases.model, bases.tokenizer)
    rng, count, blocks = np.random.default_rng(1), len(keys_QK), base.num_blocks
    columns = {
        "key": np.arange(count),
        "block": np.full(count, blocks),
        "armed": np.full(count, 16),
        "until_name": np.zeros(count),
        "after": np.full(count, -1),
        "probe": rng.integers(0, PROBES, count),
        "binding": np.full(count, -1),
        "relative": np.ones(count),
        "fact": np.full(count, -1),
        "first_step": np.arange(count),
        "num_steps": np.ones(count),
    }
    directions = rng.standard_normal((PROBES, base.hidden_size)).astype(np.float32)
    return Patch(
        name=name,
        base=base,
        encoding="int8",
        probe_names=[f"relation {index}" for index in range(PROBES)],
        keys_QK=keys_QK,
        entries=np.stack([columns[name] for name in ENTRY], axis=1).astype(np.int32),
        strengths=np.ones((count, 2), np.float32),
        steps=np.stack([rng.integers(0, VALUES, count), np.full(count, -1)], axis=1).astype(np.int32),
        values=encode(torch.randn(VALUES, base.hidden_size), "int8").numpy(),
        probe_blocks=np.full(PROBES, blocks - blocks // 10 - 1, np.int32),
        probe_centres=np.zeros(PROBES, np.int32),
        centres=rng.standard_normal((1, base.hidden_size)).astype(np.float32),
        directions=directions / np.linalg.norm(directions, axis=-1, keepdims=True),
        thresholds=np.full(PROBES, NEVER, np.float32),
        name_ids=np.empty(0, np.uint8),
    )


def _find(keys_QK: np.ndarray, classes_T: Tensor, num_windows: int, plan: Plan) -> dict[str, Any]:
    """Microseconds to find the longest keys that end some windows; a dictionary is asked for each length."""
    table = ExactTable(keys_QK)
    known = {tuple(key[key != NOTHING].tolist()): number for number, key in enumerate(keys_QK)}
    windows = classes_T.unfold(0, LONGEST, 1).numpy().astype(np.int32)
    ours, dictionary = [], []
    for turn in range(plan.finds):
        at = turn * num_windows % (len(windows) - num_windows)
        own = windows[at : at + num_windows]
        asked = [tuple(window) for window in own.tolist()]  # a step has its keys as tuples already
        ours.append(seconds_of(table.find, own))
        dictionary.append(seconds_of(_longest, known, asked))
        assert table.find(own).tolist() == _longest(known, asked)
    return {
        "keys": len(keys_QK),
        "windows": num_windows,
        "ours": 1e6 * median(ours),
        "dictionary": 1e6 * median(dictionary),
        "bytes": table.nbytes,
    }


def _longest(known: dict[tuple[int, ...], int], windows: list[tuple[int, ...]]) -> list[int]:
    """The number of the longest key that ends each window, -1 where none does."""
    ends = range(LONGEST)
    return [next((known[own[start:]] for start in ends if own[start:] in known), -1) for own in windows]


def bench_patched(quick: bool, plan: Plan | None = None, base: Path | None = None) -> dict[str, Any]:
    """Times decoding steps of SmolLM2-135M without a patch and with patches of 10 to a million keys.

    Args:
        plan: what to measure instead of what `quick` says.
        base: the folder of another base than SmolLM2-135M-Instruct.

    Returns:
        `decode`: per batch size and number of keys the median milliseconds of a step, and `over` the base's (median
        over pairs). `find`: microseconds to find the keys of a step, beside a dictionary's. Probes never open, so
        that all models write nothing and say the same, which is checked at the end of each batch.
    """
    plan = plan or (QUICK if quick else FULL)
    bases = load_bases(base or fetch_smollm(Path("data/pocket")), plan.num_blocks)
    ids = real_text(bases, plan.corpus, max(plan.batches) * (plan.prompt + plan.steps) + 1024)
    classes_V = compress_vocabulary(bases.tokenizer)
    classes_T, num_classes = torch.from_numpy(classes_V)[ids], int(classes_V.max()) + 1
    settle_allocator()
    models: dict[str, Any] = {BASE: bases.new().eval()}
    found = []
    for count in plan.keys:
        keys_QK = random_keys(classes_T, count, plan.from_text, num_classes)
        model = bases.new().eval()
        models[f"{count:,}"] = apply_patch(model, patch_of(keys_QK, f"keys-{count}", bases), bases.tokenizer)
        found += [_find(keys_QK, classes_T, windows, plan) for windows in plan.batches]
    decoded: list[dict[str, Any]] = []
    for batch in plan.batches:
        lines, said = decode(models, ids[: batch * (plan.prompt + plan.steps)].view(batch, -1), plan.prompt)
        assert all(torch.equal(logits, said[BASE]) for logits in said.values())
        decoded += lines
    return {
        "shapes": f"SmolLM2-135M in fp32, {bases.num_blocks} blocks; gated entries of keys of 2 to {LONGEST} classes, "
        f"{plan.from_text} of which occur in the text, {PROBES} probes; {plan.steps} steps after {plan.prompt} tokens",
        "decode": decoded,
        "find": {"shapes": f"keys of 2 to {LONGEST} classes; medians of {plan.finds} calls", "lines": found},
    }


def verdict(result: dict[str, Any]) -> str:
    """What patches cost at each batch size, from the fewest keys to the most."""
    said = []
    for batch in dict.fromkeys(line["batch"] for line in result["decode"]):
        own = [line for line in result["decode"] if line["batch"] == batch and line["variant"] != BASE]
        said.append(
            f"at batch {batch} {own[0]['over']:+.1%} with {own[0]['variant']} keys, {own[-1]['over']:+.1%} with "
            f"{own[-1]['variant']}"
        )
    return f"A patch adds to a decoding step, by the median over pairs of steps: {'; '.join(said)}. The aim: 3 %, flat."


def find_verdict(part: dict[str, Any]) -> str:
    """How long finding takes with the most keys, beside a dictionary, and how much memory the table takes."""
    last = part["lines"][-1]
    return (
        f"{last['windows']} windows among {last['keys']:,} keys are found in {last['ours']:.0f} µs; a dictionary takes "
        f"{last['dictionary']:.0f} µs. The keys take {last['bytes'] / last['keys']:.0f} bytes each."
    )
