"""Checks every number of a patch, so that what runs it can trust them.

Letters: Q keys, K the longest key, E exact entries, S steps, R value rows, D hidden width, P probes, U replaced rows.
"""

import re
from typing import get_args

import numpy as np
import torch

from engrammar.config import Encoding, row_bytes
from engrammar.edit.exact import NOTHING, distinct_rows
from engrammar.edit.patch import COLUMNS, MOST_ARMED, MOST_CLASSES, MOST_STEPS, Patch, Require
from engrammar.tables.encodings import decode

VALUE_ENCODINGS = tuple(encoding for encoding in get_args(Encoding) if encoding != "fp8")  # no scale for a whole table
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def check_patch(patch: Patch, require: Require) -> None:
    """Calls `require(False, what is wrong)` if a number of a patch is not allowed."""
    require(NAME.fullmatch(patch.name), f"its name is {patch.name!r}, not letters, digits and _.-")
    require(patch.encoding in VALUE_ENCODINGS, f"values are stored as {patch.encoding!r}")
    _check_shapes(patch, require)
    _check_keys(patch, require)
    _check_entries(patch, require)
    _check_probes(patch, require)
    if len(patch.values):
        finite = _is_finite(patch.values, patch.base.hidden_size, patch.encoding)
        require(finite.all(), f"value row {int((~finite).argmax())} is not finite")
    _check_deltas(patch, require)
    require(len(patch.entries) or patch.deltas, "it changes nothing")


def _check_shapes(patch: Patch, require: Require) -> None:
    width, num_probes = patch.base.hidden_size, len(patch.probe_names)
    num_entries, num_steps = len(patch.entries), len(patch.steps)
    wanted = {
        "keys": (np.int32, (len(patch.keys_QK), min(max(patch.keys_QK.shape[-1], 1), MOST_CLASSES))),
        "entries": (np.int32, (num_entries, len(COLUMNS))),
        "strengths": (np.float32, (num_entries, 2)),
        "steps": (np.int32, (num_steps, 2)),
        "values": (np.uint8, (len(patch.values), row_bytes(patch.encoding, width))),
        "probe_blocks": (np.int32, (num_probes,)),
        "probe_centres": (np.int32, (num_probes,)),
        "centres": (np.float32, (len(patch.centres), width)),
        "directions": (np.float32, (num_probes, width)),
        "thresholds": (np.float32, (num_probes,)),
        "name_ids": (np.uint8, (-(-patch.base.num_ids // 8) if len(patch.name_ids) else 0,)),
    }
    arrays = patch.arrays()
    for name, (dtype, shape) in wanted.items():
        array = arrays[name]
        fits = array.dtype == dtype and array.shape == shape
        require(fits, f"{name} is {array.dtype} {[*array.shape]}, not {np.dtype(dtype)} {[*shape]}")


def _check_keys(patch: Patch, require: Require) -> None:
    keys_QK, is_nothing = patch.keys_QK, patch.keys_QK == NOTHING
    outside = (keys_QK < NOTHING) | (keys_QK >= patch.base.num_classes)
    require(not outside.any(), f"a key has a class outside 0 to {patch.base.num_classes - 1}")
    gap = is_nothing[:, -1].any() or (is_nothing[:, 1:] & ~is_nothing[:, :-1]).any()
    require(not gap, "a key has no class at a place, and classes before it")
    require(len(distinct_rows(keys_QK)[0]) == len(keys_QK), "a key occurs twice")
    used = np.unique(patch.column("key"))
    require(np.array_equal(used, np.arange(len(keys_QK))), "its keys are not those of its entries")


def _check_entries(patch: Patch, require: Require) -> None:
    columns = {name: patch.column(name) for name in COLUMNS}
    most = {
        "block": (0, patch.base.num_blocks),
        "armed": (0, MOST_ARMED),
        "until_name": (0, 1),
        "after": (-1, patch.base.num_ids - 1),
        "probe": (-1, len(patch.probe_names) - 1),
        "binding": (-1, len(patch.values) - 1),
        "relative": (0, 1),
        "fact": (-1, len(patch.facts) - 1),
        "num_steps": (1, MOST_STEPS),
    }
    for name, (low, high) in most.items():
        outside = (columns[name] < low) | (columns[name] > high)
        require(not outside.any(), f"{name} of an entry is {columns[name][outside][:1]}; allowed: {low} to {high}")
    require((np.diff(columns["key"]) >= 0).all(), "its entries are not in the order of their keys")
    ends = np.cumsum(columns["num_steps"])
    in_order = np.array_equal(columns["first_step"], ends - columns["num_steps"])
    require(in_order and (ends[-1] if len(ends) else 0) == len(patch.steps), "its entries do not share out its steps")
    asks = columns["until_name"].any()
    require(bool(asks) == (len(patch.name_ids) > 0), "it has entries that end at names, or ids of names, alone")
    has_probe = columns["probe"] >= 0
    unguarded = ~has_probe & (
        (columns["armed"] > 0) | (columns["binding"] >= 0) | (columns["until_name"] > 0) | (columns["after"] >= 0)
    )
    require(not unguarded.any(), "an entry is armed or bound without a probe, so it would be written everywhere")
    if has_probe.any():
        in_time = patch.probe_blocks.max() <= columns["block"][has_probe].min()
        require(in_time, "an entry is written at a block before that of a probe")
    places = np.stack([columns[name] for name in ("key", "block", "probe")], axis=1)
    require(len(distinct_rows(places)[0]) == len(places), "two entries have one key, block and probe")
    rows, says = patch.steps[:, 0], patch.steps[:, 1]
    require(((rows >= 0) & (rows < len(patch.values))).all(), "a step has a value row that is not there")
    require(((says >= -1) & (says < patch.base.num_ids)).all(), "a step says an id that the tokenizer lacks")
    require(np.isfinite(patch.strengths).all(), "a gate or a threshold of an entry is not finite")


def _check_probes(patch: Patch, require: Require) -> None:
    require(len(set(patch.probe_names)) == len(patch.probe_names), "two probes have one name")
    blocks = patch.probe_blocks
    require(((blocks >= 0) & (blocks < patch.base.num_blocks)).all(), "a probe is at a block that is not there")
    used = np.unique(patch.probe_centres)
    require(np.array_equal(used, np.arange(len(patch.centres))), "its centres are not those of its probes")
    numbers = (patch.centres, patch.directions, patch.thresholds)
    require(all(np.isfinite(one).all() for one in numbers), "a probe is not finite")


def _check_deltas(patch: Patch, require: Require) -> None:
    tables = patch.tables
    require((tables is None) == (not patch.deltas), "it has row deltas without their tables, or the other way round")
    if tables is None:
        return
    require(tables.encoding in get_args(Encoding), f"rows are stored as {tables.encoding!r}")
    for layer, delta in patch.deltas.items():
        require(layer in tables.num_rows, f"it has rows of a layer {layer}, whose table it does not know")
        rows_U, stored_US, replaced_U = delta.rows_U, delta.stored_US, delta.replaced_U
        shapes = (rows_U.shape, stored_US.shape, replaced_U.shape)
        wide = row_bytes(tables.encoding, tables.width)
        fits = shapes == ((len(rows_U),), (len(rows_U), wide), (len(rows_U),)) and len(rows_U) > 0
        dtypes = (rows_U.dtype, stored_US.dtype, replaced_U.dtype)
        require(fits and dtypes == (np.int64, np.uint8, np.uint64), f"the row delta of layer {layer} has other shapes")
        ascending = (np.diff(rows_U) > 0).all()
        require(ascending, f"the rows of layer {layer} are not ascending, or one occurs twice")
        inside = rows_U[0] >= 0 and rows_U[-1] < tables.num_rows[layer]
        require(inside, f"a row of layer {layer} is outside its table of {tables.num_rows[layer]} rows")
        finite = _is_finite(stored_US, tables.width, tables.encoding)
        require(finite.all(), f"the new row {rows_U[~finite][:1]} of layer {layer} is not finite")


def _is_finite(stored_US: np.ndarray, width: int, encoding: Encoding) -> np.ndarray:
    """[U], whether all values of a stored row are numbers."""
    try:
        scale = 1.0 if encoding == "fp8" else None
        values_UC = decode(torch.from_numpy(stored_US), width, encoding, torch.float32, scale)
    except ValueError:  # an E8M0 scale that is no number
        return np.zeros(len(stored_US), dtype=bool)
    return values_UC.isfinite().all(1).numpy()
