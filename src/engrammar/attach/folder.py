"""The folder of an attached memory: tables as in any checkpoint, fusions and class map, and what it is attached to.

- `memory.json`, `memory.tables.*`, `manifest.json`: as in docs/table-files.md, so that `engrammar table` and
  `engrammar verify` work.
- `adapter.safetensors`: fusions and the class map, under the names of `AttachedMemory`.
- `adapter.json`: the name, the `Place`, and the base's fingerprint.
Letters: U rows of a block, R rows of a table, C row width, S bytes of a stored row.
"""

import json
import math
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engrammar.attach.attached import AttachedMemory, Place
from engrammar.config import Encoding
from engrammar.stores.serving import ServingSettings, StoredTables, serve_tables
from engrammar.table import MemoryTable
from engrammar.tables.checksums import MANIFEST, check_files, json_sum, read_manifest, require_sum
from engrammar.tables.encodings import FLOATS, PLAIN, decode
from engrammar.tables.folder import TableFolder, TableWriter, open_tables
from engrammar.tables.headers import BLOCK_BYTES, Requirement, is_count, load_json
from engrammar.tables.sealed import seal
from engrammar.tables.shards import is_table
from engrammar.tables.verify import read_table

ADAPTER, WEIGHTS = "adapter.json", "adapter.safetensors"
VERSION = 1
KEYS = {"version", "name", "place", "base", "crc32"}
BASE = {"class", "blocks", "hidden_size", "vocab_size", "weights"}


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """The content of an `adapter.json`."""

    name: str
    place: Place
    base: Mapping[str, Any]


def write_adapter(
    folder: Path,
    name: str,
    attached: AttachedMemory,
    base: Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a memory into a folder, which is whole or absent at any moment; an adapter that is there is replaced.

    Where ranks share the rows, all of them call this; the first one writes.

    Args:
        values: what to write under the names of `AttachedMemory`; None: its own values. Placed rows are read where they
            are.

    Raises:
        ValueError: the folder holds other things, or the memory's rows are read from it.
        OSError: the disk is full or fails; what was there is still there.
    """
    folder = Path(folder).absolute()
    there = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if there and not (folder / ADAPTER).is_file():
        raise ValueError(f"{folder} is there already and holds no adapter: choose another folder.")
    source = attached.memory.source
    if source is not None:
        source.check_save(folder)
    memory = attached.memory
    values = attached.state_dict() if values is None else values
    tables = {
        layer: _rows_of(memory.table(layer), values.get(f"memory.tables.{layer}.weight"))
        for layer in memory.config.layers
    }
    if source is not None and not source.is_first:
        for _, _, blocks in tables.values():
            list(blocks)  # empty: this rank's rows go to the first
        return
    target = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.new") if there else folder
    writer = TableWriter(
        target,
        memory=memory.config,
        geometry=memory.geometry,
        encoding=next(iter(tables.values()))[0],
        source="a memory attached by engrammar",
        num_ids=memory.num_ids,
        tokenizer_sha256=attached.place.tokenizer_sha256,
    )
    with writer:
        weights = {key: x.detach().cpu().contiguous() for key, x in values.items() if not is_table(key)}
        save_file(weights, writer.partial / WEIGHTS, metadata={"format": "pt"})
        content = {"version": VERSION, "name": name, "place": asdict(attached.place), "base": dict(base)}
        (writer.partial / ADAPTER).write_text(json.dumps(content | {"crc32": json_sum(content)}, indent=1) + "\n")
        for layer, (_, scale, blocks) in tables.items():
            writer.add(layer, scale, blocks)
    if there:
        try:
            seal(target, folder)
        finally:
            if folder.exists():
                shutil.rmtree(target, ignore_errors=True)


def _rows_of(table: MemoryTable, given_RC: Tensor | None) -> tuple[Encoding, float | None, Iterator[Tensor]]:
    """The rows of a table as they are to be stored: their encoding, its scale, and uint8 blocks [U, S].

    Args:
        given_RC: the rows, if they are not placed outside the model.
    """
    source = table.source
    if isinstance(source, StoredTables):
        file = source.files[table.name]
        return file.encoding, file.scale, map(torch.from_numpy, read_table(source.folder, file))
    weight_RC = given_RC if source is None else source.tables[table.name]
    assert weight_RC is not None
    encoding: Encoding = "bf16" if weight_RC.dtype == torch.bfloat16 else "fp32"
    per_block = max(1, BLOCK_BYTES // (4 * weight_RC.shape[1]))
    whole = weight_RC.detach().split(per_block) if source is None else source.whole(table.name, per_block)
    parts = (part.cpu().to(FLOATS[encoding]) for part in whole)
    return encoding, None, (part.contiguous().view(torch.uint8) for part in parts)


def read_adapter(folder: Path) -> AdapterFile:
    """Reads the `adapter.json` of a folder; raises a ValueError if it is missing or damaged."""
    path = folder / ADAPTER
    if not path.is_file():
        raise ValueError(f"{folder} has no {ADAPTER}: give a folder that save_attached wrote.")
    require = Requirement(path)
    content = load_json(path.read_bytes(), require)
    has_keys = isinstance(content, dict) and content.keys() == KEYS
    require(has_keys, f"it does not have the keys {', '.join(sorted(KEYS))}")
    require(content["version"] == VERSION, f"its version is {content['version']!r}, not {VERSION}")
    require_sum(content, require)
    place, base = content["place"], content["base"]
    require(isinstance(place, dict) and place.keys() == {f.name for f in fields(Place)}, "place has other keys")
    counts = [place[key] for key in ("num_ids", "vocab_size", "hidden_size", "num_branches")]
    require(all(is_count(value) and value for value in counts), "a number of place is not 1 or more")
    scales = place["scales"]
    require(isinstance(scales, list) and all(isinstance(x, float) and 0 < x < math.inf for x in scales), "scales")
    require(isinstance(content["name"], str) and isinstance(base, dict) and base.keys() == BASE, "name or base")
    return AdapterFile(name=content["name"], place=Place(**{**place, "scales": tuple(scales)}), base=base)


def load_memory(folder: Path, place: Place, serving: ServingSettings | None, *, verify: bool) -> AttachedMemory:
    """Loads the memory of a folder, on the CPU.

    Args:
        serving: where its rows stay; None makes them parameters.
        verify: whether every byte is compared with its checksum; if not, tables are compared as they are read.

    Raises:
        ValueError: a file is missing or damaged, or rows are to be parameters and are stored in few bits.
    """
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    names = [] if manifest is None else [*manifest.files]
    check_files(folder, names, whole=verify)
    if manifest is not None:
        check_files(folder, [ADAPTER, WEIGHTS], whole=True)
    opened = open_tables(folder)
    if len(place.scales) != len(opened.memory.layers):
        raise ValueError(f"{folder / ADAPTER} and its memory.json are of different memories: copy the folder again.")
    attached = AttachedMemory(
        opened.memory, opened.geometry, place, tables="parameters" if serving is None else "external"
    )
    try:
        result = attached.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder / WEIGHTS} does not hold this memory ({reason}): copy the folder again.") from error
    wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if not is_table(key))]
    if wrong:
        raise ValueError(f"{folder / WEIGHTS} lacks, or has besides, {wrong[0]}: copy the folder again.")
    if serving is not None:
        serve_tables(attached, folder, serving)
    else:
        _fill(attached, opened)
    return attached


@torch.no_grad()
def _fill(attached: AttachedMemory, opened: TableFolder) -> None:
    """Fills the tables, which are parameters, with a folder's rows."""
    if opened.encoding not in PLAIN:
        raise ValueError(
            f"The tables in {opened.path} are stored as {opened.encoding}: load them with memory='ram' or 'disk'."
        )
    for layer, file in opened.tables.items():
        weight_RC, first = attached.memory.table(layer).weight, 0
        assert weight_RC is not None
        for rows_US in read_table(opened, file):
            block = decode(torch.from_numpy(rows_US), file.width, file.encoding, weight_RC.dtype, file.scale)
            weight_RC[first : first + len(block)] = block
            first += len(block)
