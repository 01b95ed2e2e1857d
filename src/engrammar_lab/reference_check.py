"""Proof against independent code: our integers equal a reference file to the bit, our outputs within `TOLERANCE`.

A reference file is JSON: settings, multipliers, table sizes, hashes of a text or of seeded ids. If it has `hc_mult`, a
safetensors file of the same name is beside it, with ids, hashes, weights, hidden states and outputs.
Letters: B batch, T tokens, V ids, H columns, M residual branches, D hidden width.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from engrammar.addressing import derive_geometry, hash_ngrams, hash_ngrams_numpy, look_back
from engrammar.cells import as_text
from engrammar.config import DIALECTS, Geometry, MemoryConfig
from engrammar.fusion import Fusion
from engrammar.reference import fuse_reference, hash_ngrams_reference, lookup_reference
from engrammar.table import MemoryTable
from engrammar.tables.headers import read_json
from engrammar.vocabulary import compress_vocabulary

TOLERANCE = 1e-5  # on outputs in fp32; integers must be equal
SEEDED_IDS = re.compile(r"default_rng\((\d+)\)\.integers\(0, *(\d+), *size=\(([\d, ]+)\)\)")
# The reference's settings that are read unchanged, and our names of them.
SETTINGS = {
    "layers": "layers",
    "seed": "seed",
    "max_ngram_size": "max_ngram_size",
    "heads_per_ngram": "num_heads",
    "head_dim": "head_dim",
    "vocab_size_per_ngram": "rows_per_head",
    "pad_id": "fill_id",
    "kernel_size": "conv_kernel",
}


class Check(NamedTuple):
    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was compared with one reference file."""

    path: Path  # the reference file
    checks: tuple[Check, ...]  # the checks that ran, in order
    skipped: tuple[str, ...]  # the checks that did not run, and why
    # Largest absolute output difference of each layer and path (fast, plain), if the file has outputs.
    errors: tuple[float, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def check_reference(path: Path, tokenizer: Path | None = None) -> Report:
    """Compares this package with one reference file.

    Args:
        path: JSON in the shared reference format.
        tokenizer: folder of the `tokenizer.json` that the file was made with. Without it, the class map is not derived
            again but taken from the file, if the file has one.

    Raises:
        ValueError: a file is missing or malformed, or the tokenizer is not the one that the file names.
    """
    reference = _read(path)
    tensors = _read_tensors(path.with_suffix(".safetensors")) if "hc_mult" in reference else {}
    derived_V = None if tokenizer is None else _derive_classes(tokenizer, reference)
    try:
        return _compare(path, reference, tensors, derived_V)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a whole reference file: {type(error).__name__}, {reason}.") from error


def _read(path: Path) -> dict[str, Any]:
    reference = read_json(path)
    missing = {"multipliers", "table_sizes"} - set(reference)
    if missing:
        raise ValueError(f"{path} is not a reference file: it has no {' and no '.join(sorted(missing))}.")
    return reference


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The reference's weights {path} cannot be read: {error}.") from error


def _derive_classes(tokenizer: Path, reference: Mapping[str, Any]) -> NDArray[np.int64]:
    file = tokenizer / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"There is no {file}: --tokenizer is the folder that holds tokenizer.json.")
    try:
        loaded = PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:  # tokenizers raises plain Exception for a file it cannot parse
        raise ValueError(f"{file} is not a tokenizer: {error}.") from error
    expected = reference.get("tokenizer_size", len(loaded))
    if len(loaded) != expected:
        name = reference.get("tokenizer", "its own tokenizer")
        raise ValueError(f"{file} has {len(loaded)} ids, but the reference was made with {expected} ({name}).")
    return compress_vocabulary(loaded)


def _compare(
    path: Path, reference: Mapping[str, Any], tensors: dict[str, Tensor], derived_V: NDArray[np.int64] | None
) -> Report:
    config, absent = _config(reference)
    skipped = [f"settings absent from the file, as in the dialect demo: {', '.join(absent)}"] if absent else []
    classes_V = derived_V
    if derived_V is None:
        skipped.append("class map not derived again: no tokenizer given")
        classes_V = tensors["lookup_table"].numpy().astype(np.int64) if "lookup_table" in tensors else None
    checks = [] if derived_V is None else [*_check_classes(reference, tensors, derived_V)]
    num_classes = reference.get("compressed_size", None if classes_V is None else int(classes_V.max()) + 1)
    fill_class = reference.get("compressed_pad_id", 0 if classes_V is None else int(classes_V[config.fill_id]))
    # Table sizes do not depend on the classes. Multipliers do, and are compared only if the number of classes is known.
    geometry = derive_geometry(config, num_classes=num_classes or 1, fill_class=fill_class)
    checks += _check_geometry(reference, config, geometry, with_multipliers=num_classes is not None)
    if num_classes is None:
        skipped.append("multipliers: the number of classes is not in the file, and no tokenizer was given")
    if classes_V is None:
        skipped.append("hashes: the class map is not in the file, and no tokenizer was given")
    else:
        checks += _check_hashes(reference, tensors, config, geometry, torch.from_numpy(classes_V))
    errors: list[float] = []
    if tensors:
        for index, layer in enumerate(config.layers):
            found = _output_errors(_of_layer(tensors, layer), reference, config, geometry, index)
            errors += found.values()
            detail = "largest difference " + ", ".join(f"{name} {error:.1e}" for name, error in found.items())
            checks.append(Check(f"outputs, layer {layer}", all(e <= TOLERANCE for e in found.values()), detail))
    else:
        skipped.append("outputs: the file has no weights")
    return Report(path=path, checks=tuple(checks), skipped=tuple(skipped), errors=tuple(errors))


def _config(reference: Mapping[str, Any]) -> tuple[MemoryConfig, list[str]]:
    """The demo's settings, replaced by those of the file, and the names of those that the file leaves out."""
    given = {ours: reference[theirs] for theirs, ours in SETTINGS.items() if theirs in reference}
    if "embed_per_ngram" in reference:
        given["head_dim"] = reference["embed_per_ngram"] // reference["heads_per_ngram"]
    # Only these settings decide integers; the others belong to the fusion, and only files with weights have them.
    absent = [name for name in ("seed", "rows_per_head", "fill_id") if name not in given]
    given.setdefault("layers", sorted(int(layer) for layer in reference["multipliers"]))
    return replace(DIALECTS["demo"], **given), absent


def _check_classes(
    reference: Mapping[str, Any], tensors: dict[str, Tensor], classes_V: NDArray[np.int64]
) -> Iterator[Check]:
    count = int(classes_V.max()) + 1
    if "compressed_size" in reference:
        expected = reference["compressed_size"]
        yield Check("number of classes", count == expected, f"{len(classes_V):,} ids: {count:,} of {expected:,}")
    if "lookup_sha256_int64_le" in reference:
        yield _same_sha256("class map", classes_V, reference["lookup_sha256_int64_le"])
    if "lookup_table" in tensors:
        yield _same("class map, id by id", classes_V, tensors["lookup_table"].numpy())
    if "compressed_pad_id" in reference:
        own = classes_V[[reference["pad_id"]]]
        yield _same("class of the pad id", own, np.array([reference["compressed_pad_id"]]))


def _check_geometry(
    reference: Mapping[str, Any], config: MemoryConfig, geometry: Geometry, *, with_multipliers: bool
) -> Iterator[Check]:
    layers = [str(layer) for layer in config.layers]
    if with_multipliers:
        theirs = [reference["multipliers"][layer] for layer in layers]
        yield _same("multipliers", np.array(geometry.multipliers), np.array(theirs))
    theirs = [reference["table_sizes"][layer] for layer in layers]
    yield _same("table sizes", np.array(geometry.table_sizes), np.array(theirs))
    if "rows" in reference:
        own = [geometry.num_rows(index) for index in range(len(layers))]
        yield _same("rows of each layer", np.array(own), np.array([reference["rows"][layer] for layer in layers]))


def _check_hashes(
    reference: Mapping[str, Any],
    tensors: dict[str, Tensor],
    config: MemoryConfig,
    geometry: Geometry,
    classes_V: Tensor,
) -> Iterator[Check]:
    """Checks the hashes of the text, of seeded ids and of stored ids, as far as the file has them."""

    def rows_of(ids: Any) -> dict[int, NDArray[np.int64]]:
        return _addresses(torch.as_tensor(ids), config, geometry, classes_V)

    if "text_ids" in reference:
        for layer, rows_BTH in rows_of([reference["text_ids"]]).items():
            yield _same(f"hashes of the text, layer {layer}", rows_BTH[0], _at(reference, "text_hashes", layer))
    seeded = SEEDED_IDS.search(reference.get("note", ""))
    if seeded:
        shape = tuple(int(size) for size in seeded[3].split(","))
        ids_BT = np.random.default_rng(int(seeded[1])).integers(0, int(seeded[2]), size=shape)
        for layer, rows_BTH in rows_of(ids_BT).items():
            if "hash_sha256_int64_le" in reference:
                expected = reference["hash_sha256_int64_le"][str(layer)]
                yield _same_sha256(f"hashes of seeded ids, layer {layer}", rows_BTH, expected)
            if "first_row" in reference:
                theirs = _at(reference, "first_row", layer)
                yield _same(f"the first of them, layer {layer}", rows_BTH[0, : len(theirs)], theirs)
            if "last_position" in reference:
                yield _same(f"the last of them, layer {layer}", rows_BTH[0, -1], _at(reference, "last_position", layer))
    if "input_ids" in tensors:
        for layer, rows_BTH in rows_of(tensors["input_ids"]).items():
            own = _of_layer(tensors, layer)
            yield _same(f"hashes of stored ids, layer {layer}", rows_BTH, own["hashes"].numpy())
            offsets_H = np.array(geometry.head_offsets(config.layers.index(layer)))
            yield _same(f"offsets, layer {layer}", offsets_H, own["multi_head_embedding.offsets"].numpy())


def _at(reference: Mapping[str, Any], key: str, layer: int) -> NDArray[np.int64]:
    return np.array(reference[key][str(layer)], dtype=np.int64)


def _addresses(
    ids_BT: Tensor, config: MemoryConfig, geometry: Geometry, classes_V: Tensor
) -> dict[int, NDArray[np.int64]]:
    """Rows of every layer, from torch; NumPy and plain Python must give the same integers."""
    looked_back = look_back(ids_BT, config=config, geometry=geometry, classes_V=classes_V)
    rows = {}
    for index, layer in enumerate(config.layers):
        rows_BTH = hash_ngrams(looked_back, config=config, geometry=geometry, layer_index=index).numpy()
        arrays = [seen_BT.numpy() for seen_BT in looked_back]
        vectorised = hash_ngrams_numpy(arrays, config=config, geometry=geometry, layer_index=index)
        plain = [
            hash_ngrams_reference(ids_T, config=config, geometry=geometry, layer_index=index)
            for ids_T in classes_V[ids_BT].tolist()
        ]
        assert np.array_equal(rows_BTH, vectorised) and np.array_equal(rows_BTH, plain)
        rows[layer] = rows_BTH - np.array(geometry.head_offsets(index))  # the reference counts within each head
    return rows


def _of_layer(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"layer{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def _output_errors(
    weights: dict[str, Tensor], reference: Mapping[str, Any], config: MemoryConfig, geometry: Geometry, index: int
) -> dict[str, float]:
    """Largest absolute difference from the file's output, of the fast path and of the plain twin."""
    table = MemoryTable(config, geometry, index)
    table.load_state_dict({"weight": weights["multi_head_embedding.embedding.weight"]})
    fusion = Fusion(config, hidden_size=reference["hidden_size"], num_branches=reference["hc_mult"])
    fusion.load_state_dict(fusion_state_from_demo(weights, reference["hc_mult"]))
    rows_BTH = weights["hashes"] + torch.tensor(geometry.head_offsets(index))
    hidden_BTMD = weights["hidden_states"]
    assert table.weight is not None
    outputs = {
        "fast": fusion(hidden_BTMD, table(rows_BTH)),
        "plain": fuse_reference(fusion, hidden_BTMD, lookup_reference(table.weight, rows_BTH)),
    }
    return {name: float((output - weights["output"]).abs().max()) for name, output in outputs.items()}


def fusion_state_from_demo(weights: Mapping[str, Tensor], num_branches: int) -> dict[str, Tensor]:
    """`Fusion`'s state dict, from the weights of one layer under the names of the authors' demo."""
    linears = ["value_proj", *(f"key_projs.{m}" for m in range(num_branches))]

    def stacked(name: str) -> Tensor:
        return torch.stack([weights[f"{name}.{m}.weight"] for m in range(num_branches)])

    return {
        "projection.weight": torch.cat([weights[f"{linear}.weight"] for linear in linears]),
        "projection.bias": torch.cat([weights[f"{linear}.bias"] for linear in linears]),
        "key_norm": stacked("norm1"),
        "query_norm": stacked("norm2"),
        "conv_norm": stacked("short_conv.norms"),
        "conv_weight": weights["short_conv.conv.weight"],
    }


def _same(name: str, ours: NDArray[Any], theirs: NDArray[Any]) -> Check:
    if ours.shape != theirs.shape:
        return Check(name, False, f"shape {ours.shape}, reference {theirs.shape}")
    different = int((ours != theirs).sum())
    detail = f"{different:,} of {ours.size:,} numbers differ" if different else f"{ours.size:,} numbers"
    return Check(name, different == 0, detail)


def _same_sha256(name: str, ours: NDArray[np.int64], expected: str) -> Check:
    own = hashlib.sha256(ours.astype("<i8").tobytes()).hexdigest()
    return Check(name, own == expected, f"sha256 {own[:12]}" + ("" if own == expected else f", not {expected[:12]}"))


def print_report(report: Report) -> None:
    lines = [[check.name, "equal" if check.ok else "DIFFERS", check.detail] for check in report.checks]
    lines += [["not run", "", reason] for reason in report.skipped]
    print(report.path.name, as_text(["check", "", "detail"], lines, num_keys=2), sep="\n\n", end="\n\n")
