"""The file of a patch: safetensors, with JSON in its metadata (docs/edit.md). Nothing in it is executed or trusted.

Letters: R value rows.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engrammar.edit.checking import check_patch
from engrammar.edit.patch import ARRAYS, Base, Patch, RowDelta, Tables
from engrammar.tables.folder import Shard, TableFile
from engrammar.tables.headers import Part, Requirement, header_bytes, is_count, load_json, parse_header
from engrammar.tables.sealed import reason_of, written_beside

VERSION = 1
METADATA = "engrammar_patch"
DTYPES = {"I32": "<i4", "I64": "<i8", "U64": "<u8", "F32": "<f4", "U8": "|u1"}
DTYPE_OF = {np.dtype(code): name for name, code in DTYPES.items()}
DELTA = re.compile(r"(rows|stored|replaced)\.(0|[1-9][0-9]{0,4})")
KEYS = {"version", "name", "base", "facts", "provenance", "scores", "encoding", "probes", "tables", "sha256"}
BASE = {"tokenizer_sha256", "classes_sha256", "num_ids", "num_classes", "model"}
MODEL = {"class", "blocks", "hidden_size", "vocab_size", "weights"}
MOST_SIZE = 2**24  # of a hidden width and of a vocabulary: their products stay far below what an integer holds


def write_patch(patch: Patch, path: str | Path) -> None:
    """Writes a patch as one file, which is whole or absent at any moment; a file that is there is replaced.

    Raises:
        ValueError: the patch holds a number that is not allowed.
        OSError: the disk is full or fails; what was there is still there.
    """
    path = Path(path)
    check_patch(patch, refuse(patch.name))
    try:
        with written_beside(path) as partial, partial.open("wb") as file:
            for part in _parts(patch):
                file.write(part)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({reason_of(error, path.parent)}); what was there is still there. Free space "
            "there, or put that right, and run the same command again."
        ) from error


def refuse(name: str) -> Any:
    """What `check_patch` calls for a patch that is in memory."""

    def require(holds: object, wrong: str) -> None:
        if not holds:
            raise ValueError(f"The patch {name!r} is not right: {wrong}.")

    return require


def patch_bytes(patch: Patch) -> bytes:
    """The content of a patch's file."""
    return b"".join(_parts(patch))


def patch_digest(patch: Patch) -> str:
    """The SHA-256 of all that a patch says, which its file holds too."""
    return str(_content(patch)[0]["sha256"])


def _parts(patch: Patch) -> Iterator[bytes]:
    """The content of a patch's file, piece by piece."""
    content, layout, arrays = _content(patch)
    about = {"format": "pt", METADATA: json.dumps(content)}
    head = json.dumps({"__metadata__": about, **layout}).encode()
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for array in arrays.values():
        yield array.tobytes()


def _content(patch: Patch) -> tuple[dict[str, Any], dict[str, Any], dict[str, NDArray[Any]]]:
    """The JSON of a patch, the tensors of its header, and its arrays in their order in the file."""
    given = patch.arrays()
    order = sorted(given, key=lambda name: (-given[name].dtype.itemsize, name))
    arrays = {name: np.ascontiguousarray(given[name], dtype=given[name].dtype.newbyteorder("<")) for name in order}
    layout, end = {}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        layout[name] = {"dtype": DTYPE_OF[array.dtype], "shape": [*array.shape], "data_offsets": [start, end]}
    tables = None if patch.tables is None else asdict(patch.tables)
    if tables is not None:
        tables["num_rows"] = {str(layer): rows for layer, rows in tables["num_rows"].items()}
    content: dict[str, Any] = {
        "version": VERSION,
        "name": patch.name,
        "base": asdict(patch.base),
        "facts": [dict(fact) for fact in patch.facts],
        "provenance": dict(patch.provenance),
        "scores": dict(patch.scores),
        "encoding": patch.encoding,
        "probes": list(patch.probe_names),
        "tables": tables,
    }
    sha256 = hashlib.sha256(json.dumps([content, layout], sort_keys=True).encode())
    for array in arrays.values():
        sha256.update(array.tobytes())
    return content | {"sha256": sha256.hexdigest()}, layout, arrays


def read_patch(path: str | Path) -> Patch:
    """Reads the file of a patch. Everything in it is checked.

    Raises:
        ValueError: the file is missing or damaged, or holds something that is not allowed; names the file and what.
    """
    path = Path(path)
    require = Requirement(path)
    require(path.is_file(), "it is missing, or no file")
    try:
        return parse_patch(path.read_bytes(), path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): copy it again from where it came from.") from error


def parse_patch(data: bytes, path: Path) -> Patch:
    """As `read_patch`, for the bytes of a file.

    Args:
        path: what errors call the file.
    """
    require = Requirement(path)
    length = header_bytes(data[:8], len(data), require)
    parts, about = parse_header(data[8 : 8 + length], len(data), require)
    require(METADATA in about, f"its metadata have no {METADATA}")
    content = load_json(about[METADATA].encode("utf-8", "surrogatepass"), require)
    _check_content(content, require)
    patch = _patch(content, {name: _array(data, part, require) for name, part in parts.items()}, require)
    require(content["sha256"] == patch_digest(patch), "its sha256 is not that of its contents")
    check_patch(patch, require)
    return patch


def _array(data: bytes, part: Part, require: Requirement) -> NDArray[Any]:
    require(part.dtype in DTYPES, f"the dtype of {part.name} is {part.dtype}")
    require(part.shape, f"{part.name} is one number")
    count = math.prod(part.shape)
    array = np.frombuffer(data, np.dtype(DTYPES[part.dtype]), count, part.start).reshape(part.shape)
    return array.astype(array.dtype.newbyteorder("="))  # a copy, so that the file's bytes need not stay


def _check_content(content: Any, require: Requirement) -> None:
    """Checks the types of a patch's JSON."""
    require(isinstance(content, dict) and content.keys() == KEYS, f"its JSON does not have {', '.join(sorted(KEYS))}")
    require(content["version"] == VERSION, f"its version is {content['version']!r}, not {VERSION}")
    texts = (content["name"], content["encoding"], content["sha256"])
    require(all(isinstance(text, str) for text in texts), "its name, encoding or sha256 is no text")
    base, tables = content["base"], content["tables"]
    require(isinstance(base, dict) and base.keys() == BASE, f"its base does not have {', '.join(sorted(BASE))}")
    digests = (base["tokenizer_sha256"], base["classes_sha256"])
    require(all(isinstance(one, str) for one in digests), "a digest of its base is no text")
    model = base["model"]
    require(isinstance(model, dict) and model.keys() == MODEL, f"its model does not have {', '.join(sorted(MODEL))}")
    sizes = [base["num_ids"], base["num_classes"], *(model[key] for key in ("blocks", "hidden_size", "vocab_size"))]
    require(all(is_count(size, MOST_SIZE) and size for size in sizes), "a size of its base is not 1 or more")
    weights = model["weights"]
    require(isinstance(model["class"], str) and isinstance(weights, dict), "its model has no class or weights")
    numbers = all(isinstance(values, list) and all(map(_is_number, values)) for values in weights.values())
    require(numbers, "a weight of its model is not numbers")
    facts, probes = content["facts"], content["probes"]
    require(isinstance(facts, list) and all(map(_is_words, facts)), "its facts are not words")
    require(_is_words(content["provenance"]), "its provenance is not words")
    scores = content["scores"]
    require(isinstance(scores, dict) and all(map(_is_number, scores.values())), "its scores are not numbers")
    require(isinstance(probes, list) and all(isinstance(name, str) for name in probes), "its probes are not names")
    if tables is not None:
        keys = {"addressing_sha256", "encoding", "width", "num_rows"}
        require(isinstance(tables, dict) and tables.keys() == keys, f"its tables do not have {', '.join(sorted(keys))}")
        named = isinstance(tables["addressing_sha256"], str) and isinstance(tables["encoding"], str)
        require(named and is_count(tables["width"], MOST_SIZE) and tables["width"], "its tables are not right")
        num_rows = tables["num_rows"]
        layers = isinstance(num_rows, dict) and all(re.fullmatch("0|[1-9][0-9]{0,4}", layer) for layer in num_rows)
        require(layers and all(map(is_count, num_rows.values())), "its tables have no rows")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_words(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(word, str) for word in value.values())


def _patch(content: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], require: Requirement) -> Patch:
    layers: dict[int, int] = {}
    for name in arrays.keys() - set(ARRAYS):
        match = DELTA.fullmatch(name)
        require(match, f"it holds a tensor {name}")
        assert match is not None
        layers[int(match[2])] = layers.get(int(match[2]), 0) + 1
    require(set(ARRAYS) <= arrays.keys(), f"it lacks the tensor {min(set(ARRAYS) - arrays.keys(), default='')}")
    require(all(count == 3 for count in layers.values()), "a row delta lacks rows, stored or replaced")
    tables = content["tables"]
    if tables is not None:
        tables = Tables(**{**tables, "num_rows": {int(layer): rows for layer, rows in tables["num_rows"].items()}})
    chosen = {name: array for name, array in arrays.items() if name in ARRAYS and name != "keys"}
    return Patch(
        name=content["name"],
        base=Base(**content["base"]),
        facts=content["facts"],
        provenance=content["provenance"],
        scores=content["scores"],
        encoding=content["encoding"],
        probe_names=content["probes"],
        tables=tables,
        keys_QK=arrays["keys"],
        **chosen,
        deltas={
            layer: RowDelta(
                rows_U=arrays[f"rows.{layer}"],
                stored_US=arrays[f"stored.{layer}"],
                replaced_U=arrays[f"replaced.{layer}"],
            )
            for layer in sorted(layers)
        },
    )


def value_table(path: Path) -> TableFile:
    """The value rows of a patch's file, for a store that reads them from there.

    Raises:
        ValueError: as `read_patch`.
    """
    patch = read_patch(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        part = parse_header(file.read(length), path.stat().st_size, Requirement(path))[0]["values"]
    shard = Shard(path=path, tensor="values", start=part.start, first_row=0, num_rows=part.shape[0], crc32=None)
    return TableFile(
        layer=0,
        name=f"the values of {patch.name}",
        num_rows=part.shape[0],
        width=patch.base.hidden_size,
        encoding=patch.encoding,
        scale=None,
        shards=(shard,),
    )
