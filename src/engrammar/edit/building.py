"""Makes patches from entries, and from other patches: merge, diff, conflicts.

Letters: E exact entries, R value rows, D hidden width, P probes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from engrammar.config import Encoding
from engrammar.edit.checking import check_patch
from engrammar.edit.exact import NOTHING, distinct_rows
from engrammar.edit.files import refuse
from engrammar.edit.patch import (
    COLUMNS,
    Base,
    ExactEntry,
    Key,
    Patch,
    Probe,
    Require,
    RowDelta,
    Tables,
    joined,
    require_same_names,
)
from engrammar.edit.stack import sharing_places
from engrammar.tables.encodings import encode

Place = tuple[Key, int, str | None]  # of an exact entry: its key, its block, the name of its probe


def build_patch(
    name: str,
    base: Base,
    entries: Sequence[ExactEntry] = (),
    probes: Sequence[Probe] = (),
    rows: tuple[Tables, Mapping[int, RowDelta]] | None = None,
    **about: Any,
) -> Patch:
    """Makes a patch.

    Args:
        name: letters, digits, and _.- ; what the patch is called in a model.
        base: `patch.base_of` the model that it is for.
        entries: exact entries, in any order; equal value rows are kept once.
        probes: the probes that entries name.
        rows: row deltas, as `overlay.replace_rows` returns them.
        about: `facts`, `provenance` and `scores` of `Patch`; `encoding` of value rows (default bf16); `names_V`,
            whether each id begins a name, is kept if entries ask for it.

    Raises:
        ValueError: something is not allowed, or two entries have one key, block and probe.
    """
    encoding: Encoding = about.pop("encoding", "bf16")
    names_V = about.pop("names_V", np.empty(0, np.bool_))
    values = _Values(base.hidden_size, encoding)
    names = [probe.name for probe in probes]
    exact = _exact_arrays(entries, names, values, refuse(name))
    pairs = [torch.stack([probe.centre, probe.direction]).float().numpy() for probe in probes]
    pairs_P2D = np.array(pairs, np.float32).reshape(-1, 2, base.hidden_size)
    first, kind_P = distinct_rows(pairs_P2D[:, 0])
    patch = Patch(
        name=name,
        base=base,
        encoding=encoding,
        probe_names=names,
        tables=None if rows is None else rows[0],
        **exact,
        values=values.encoded(),
        probe_blocks=np.array([probe.block for probe in probes], np.int32),
        probe_centres=kind_P.astype(np.int32),
        centres=pairs_P2D[first, 0],
        directions=pairs_P2D[:, 1],
        thresholds=np.array([probe.threshold for probe in probes], np.float32),
        name_ids=np.packbits(names_V if any(entry.until_name for entry in entries) else names_V[:0]),
        deltas={} if rows is None else dict(rows[1]),
        **about,
    )
    check_patch(patch, refuse(name))
    return patch


def _exact_arrays(
    entries: Sequence[ExactEntry], names: Sequence[str], values: "_Values", require: Require
) -> dict[str, Any]:
    """Keys, entries, strengths and steps of `Patch`; value rows are added to `values`."""
    ordered = sorted(entries, key=lambda entry: (entry.key, entry.block, entry.probe or ""))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(entry.key for entry in ordered))}
    table: list[list[int]] = []
    strengths: list[list[float]] = []
    steps: list[list[int]] = []
    for entry in ordered:
        require(entry.probe is None or entry.probe in names, f"an entry names a probe {entry.probe!r}, which it lacks")
        require(len(entry.says) <= len(entry.values), "an entry says more tokens than it has values")
        says = [*entry.says, *[-1] * (len(entry.values) - len(entry.says))]
        row = {
            "key": numbers[entry.key],
            "block": entry.block,
            "armed": entry.armed,
            "until_name": int(entry.until_name),
            "probe": -1 if entry.probe is None else names.index(entry.probe),
            "binding": -1 if entry.binding is None else values.add(entry.binding),
            "relative": int(entry.relative),
            "fact": entry.fact,
            "first_step": len(steps),
            "num_steps": len(entry.values),
            "after": -1 if entry.after is None else entry.after,
        }
        table.append([row[column] for column in COLUMNS])
        strengths.append([entry.gate, entry.binding_threshold])
        steps += [[values.add(value), token] for value, token in zip(entry.values, says)]
    longest = max(map(len, numbers), default=1)
    padded = [[NOTHING] * (longest - len(key)) + [*key] for key in numbers]
    return {
        "keys_QK": np.array(padded, np.int32).reshape(-1, longest),
        "entries": np.array(table, np.int32).reshape(-1, len(COLUMNS)),
        "strengths": np.array(strengths, np.float32).reshape(-1, 2),
        "steps": np.array(steps, np.int32).reshape(-1, 2),
    }


class _Values:
    """Distinct value rows, in the order in which they were first added."""

    def __init__(self, width: int, encoding: Encoding) -> None:
        self.width, self.encoding = width, encoding
        self.rows: list[torch.Tensor] = []
        self.numbers: dict[bytes, int] = {}

    def add(self, value_D: torch.Tensor) -> int:
        value_D = value_D.detach().float().cpu()
        if value_D.shape != (self.width,) or not bool(value_D.isfinite().all()):
            raise ValueError(
                f"A value is {list(value_D.shape)}; allowed: [{self.width}], the hidden width, and finite."
            )
        number = self.numbers.setdefault(value_D.numpy().tobytes(), len(self.rows))
        if number == len(self.rows):
            self.rows.append(value_D)
        return number

    def encoded(self) -> np.ndarray:
        values_RD = torch.stack(self.rows) if self.rows else torch.empty(0, self.width)
        return encode(values_RD, self.encoding).numpy()


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """What two patches both change, differently: an exact key, or a row of a layer's table."""

    place: Place | tuple[int, int]

    def __str__(self) -> str:
        if len(self.place) == 2:
            return f"row {self.place[1]} of layer {self.place[0]}"
        key, block, probe = self.place
        return f"key {list(key)} at block {block}" + ("" if probe is None else f" with probe {probe!r}")


def places(patch: Patch) -> dict[Place, int]:
    """The place of each exact entry, and the entry's number."""
    columns = zip(patch.column("block").tolist(), patch.column("probe").tolist())
    names = patch.probe_names
    return {
        (patch.key_of(index), block, None if probe < 0 else names[probe]): index
        for index, (block, probe) in enumerate(columns)
    }


def conflicts(one: Patch, other: Patch) -> list[Conflict]:
    """What both patches change, differently: the keys and rows that cannot be applied together, one by one."""
    first, second = places(one), places(other)
    shared = [place for place in first if place in second]
    actions = (_actions(one, first, shared), _actions(other, second, shared))
    found = [Conflict(place=place) for place in shared if actions[0][place] != actions[1][place]]
    for layer, delta in one.deltas.items():
        theirs = other.deltas.get(layer)
        if theirs is None:
            continue
        rows, mine, yours = np.intersect1d(delta.rows_U, theirs.rows_U, assume_unique=True, return_indices=True)
        differs = (delta.stored_US[mine] != theirs.stored_US[yours]).any(1)
        found += [Conflict(place=(layer, int(row))) for row in rows[differs]]
    return found


def _actions(patch: Patch, entries: Mapping[Place, int], wanted: Sequence[Place]) -> dict[Place, tuple[Any, ...]]:
    """What the entries at some places do, comparable between patches."""
    decoded, pairs_P2D = patch.decoded().numpy() if wanted else np.empty((0, 0)), patch.probe_pairs()
    found = {}
    for place in wanted:
        index = entries[place]
        of = dict(zip(COLUMNS, patch.entries[index].tolist()))
        steps = patch.steps[of["first_step"] : of["first_step"] + of["num_steps"]]
        written = tuple((decoded[row].tobytes(), int(says)) for row, says in steps)
        binding = b"" if of["binding"] < 0 else decoded[of["binding"]].tobytes()
        probe = b"" if of["probe"] < 0 else pairs_P2D[of["probe"]].tobytes()
        test = (probe, None if of["probe"] < 0 else float(patch.thresholds[of["probe"]]))
        numbers = [of[name] for name in ("relative", "armed", "until_name", "after")]
        found[place] = (written, binding, test, *numbers, *patch.strengths[index].tolist())
    return found


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How one patch differs from another: places (or layer and row) that only one has, and those that both change."""

    only_first: list[Place | tuple[int, int]]
    only_second: list[Place | tuple[int, int]]
    changed: list[Conflict]


def diff(one: Patch, other: Patch) -> Difference:
    """Compares two patches by what they change."""
    first, second = _changed(one), _changed(other)
    return Difference(
        only_first=[place for place in first if place not in second],
        only_second=[place for place in second if place not in first],
        changed=conflicts(one, other),
    )


def _changed(patch: Patch) -> dict[Place | tuple[int, int], None]:
    """All that a patch changes, in its order."""
    rows = [(layer, int(row)) for layer, delta in patch.deltas.items() for row in delta.rows_U]
    return dict.fromkeys([*places(patch), *rows])


def merge(name: str, patches: Sequence[Patch]) -> Patch:
    """One patch that does what several do; scores are not kept, since they were measured of the parts.

    Raises:
        ValueError: two patches are for different bases, or change one thing differently; conflicts are named.
    """
    if not patches:
        raise ValueError("merge was given no patch.")
    first = patches[0]
    for one in patches:
        if one.base != first.base or (one.tables and first.tables and one.tables != first.tables):
            raise ValueError(f"{one.name!r} and {first.name!r} are for different models: merge patches of one model.")
    require_same_names(patches)
    for early, late in sharing_places(patches):
        refuse_conflicts(patches[early], patches[late])
    entries: dict[Place, ExactEntry] = {}
    facts: list[Mapping[str, str]] = []
    for patch in patches:
        shift = len(facts)
        facts += patch.facts
        for entry in patch.exact_entries():
            moved = replace(entry, fact=entry.fact + shift if entry.fact >= 0 else -1)
            entries.setdefault((entry.key, entry.block, entry.probe), moved)
    probes = {probe.name: probe for patch in patches for probe in patch.all_probes()}
    for patch in patches:
        for probe in patch.all_probes():
            kept = probes[probe.name]
            same = torch.equal(kept.centre, probe.centre) and torch.equal(kept.direction, probe.direction)
            if not same or (kept.block, kept.threshold) != (probe.block, probe.threshold):
                raise ValueError(f"{patch.name!r} and another patch have different probes {probe.name!r}: rename one.")
    tables = next((patch.tables for patch in patches if patch.tables), None)
    layers = sorted({layer for patch in patches for layer in patch.deltas})
    late_first = patches[::-1]  # so that of equal rows the first patch's counts
    deltas = {layer: joined([one.deltas[layer] for one in late_first if layer in one.deltas]) for layer in layers}
    rows = None if tables is None else (tables, deltas)
    names = [patch.names_V() for patch in patches if len(patch.name_ids)]
    provenance = {"merged from": ", ".join(patch.name for patch in patches)}
    kept_as = first.encoding if len({patch.encoding for patch in patches}) == 1 else "fp32"
    about: dict[str, Any] = {"facts": facts, "provenance": provenance, "encoding": kept_as}
    about |= {"names_V": names[0]} if names else {}
    return build_patch(name, first.base, [*entries.values()], [*probes.values()], rows, **about)


def refuse_conflicts(one: Patch, other: Patch) -> None:
    """Raises a ValueError that names the conflicts of two patches, the first few by their keys, if there are any."""
    if found := conflicts(one, other):
        named = "; ".join(map(str, found[:5])) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
        raise ValueError(
            f"The patches {one.name!r} and {other.name!r} change the same differently ({named}): undo one, or leave "
            "those out."
        )
